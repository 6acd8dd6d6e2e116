"""What chapter 5 measures of Fisher-vector products: errors, times and memory."""

import ctypes
import gc
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad

from ntkbook import Linearization
from ntkbook.fisher import METHODS, fisher_vector_product
from ntkbook.likelihoods import Likelihood, get_likelihood


def loss_gradient(lin: Linearization, x: Tensor, y: Tensor, likelihood: str | Likelihood) -> Float[Tensor, " p"]:
    """The gradient of the mean of −log p(y | f(x; θ)): the direction on which the paper measures products."""
    likelihood = get_likelihood(likelihood)
    return lin.vjp(x, grad(lambda f: -likelihood.log_prob(f, y).mean())(lin.outputs(x)))


def errors(
    lin: Linearization,
    x: Tensor,
    v: Float[Tensor, " p"],
    likelihood: str | Likelihood,
    method: str,
    epsilons: Iterable[float | str],
    exact: Float[Tensor, " p"],
) -> Float[Tensor, " e"]:
    """The relative error of F v by finite differences for each step, in the linearisation's precision.

    ‖F v − by differences‖ / ‖F v‖ (Appendix D's measure), float64, against `exact`, the product in float64.
    """
    x, v = x.to(lin.dtype), v.to(lin.dtype)
    products = (fisher_vector_product(lin, x, v, likelihood, method, epsilon=epsilon) for epsilon in epsilons)
    return torch.stack([(torch.as_tensor(product).double() - exact).norm() / exact.norm() for product in products])


class Cost(NamedTuple):
    """What a product took.

    Attributes:
        chunk_size: examples at a time.
        seconds: wall time of each repetition.
        peak: bytes above what was held before, at most; nan where the system does not tell.
    """

    chunk_size: int
    seconds: list[float]
    peak: float


def measure(call: Callable[[], object], device: torch.device | str = "cpu") -> tuple[float, float]:
    """Seconds of one call, and the bytes that it took above what was held before; nan where nobody tells."""
    gc.collect()
    before = _reset_peak(device)
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start, max(_peak(device) - before, 0.0)


def product_costs(
    net: nn.Module, x: Tensor, y: Tensor, chunk_sizes: Sequence[int], repeats: int, methods: Sequence[str] = METHODS
) -> dict[str, list[Cost]]:
    """The cost of one gradient of the cross-entropy and of one Fisher-vector product by each method.

    Each chunk size is tried once; the fastest of a method is then repeated, all methods in turn, so that what disturbs
    the machine disturbs all of them.

    Returns:
        "gradient" and each method: the tried chunk sizes, and last the best one with its repetitions.
    """
    lin, net = Linearization(net), deepcopy(net)  # a copy, for what backward passes leave
    v = loss_gradient(lin, x, y, "categorical")
    device = lin.device

    def gradient(size: int) -> None:
        for part, target in zip(x.split(size), y.split(size)):
            nn.functional.cross_entropy(net(part), target, reduction="sum").backward()
        net.zero_grad(set_to_none=True)

    def call(method: str, size: int) -> Callable[[], object]:
        if method == "gradient":
            return lambda: gradient(size)
        return lambda: fisher_vector_product(lin, x, v, method=method, chunk_size=size)

    sizes = [size for size in chunk_sizes if size <= len(x)]
    if not sizes:
        raise ValueError(f"chunk_sizes: expected one up to the {len(x)} examples, got {list(chunk_sizes)}.")
    gradient(max(sizes))  # what is done once only, done before
    costs: dict[str, list[Cost]] = {}
    for method in ("gradient", *methods):
        costs[method] = []
        for size in sizes:
            seconds, peak = measure(call(method, size), device)
            costs[method].append(Cost(size, [seconds], peak))
    best = {method: min(tried, key=lambda cost: cost.seconds[0]) for method, tried in costs.items()}
    rounds = {method: [] for method in costs}
    for _ in range(repeats):
        for method, cost in best.items():
            rounds[method].append(measure(call(method, cost.chunk_size), device)[0])
    for method, cost in best.items():
        costs[method].append(cost._replace(seconds=rounds[method]))
    return costs


def row_by_row(net: nn.Module, x: Tensor, v: Float[Tensor, " p"], rows: int) -> float:
    """Seconds of a product that makes the rows of J one backward pass each, as estimated from the first rows.

    The graph of the whole mini-batch is kept, and each of its n·o outputs asked for its gradient: J v and then Jᵀ u
    from them. What nobody should do, and what "autograd" may mean to somebody.
    """
    leaves = [p for p in net.parameters() if p.requires_grad]
    start = time.perf_counter()
    f = net(x)
    _wait(x.device)
    forward = time.perf_counter() - start
    start = time.perf_counter()
    entries = f.flatten()[:rows]
    for entry in entries:
        gradients = torch.autograd.grad(entry, leaves, retain_graph=True, materialize_grads=True)
        row = torch.cat([g.flatten() for g in gradients])
        row.mul_(row @ v)
    _wait(x.device)
    return forward + (time.perf_counter() - start) / len(entries) * f.numel()


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device | str) -> float:
    """Forget the peak so far; bytes in use."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back, so that it is not there already when used
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets the peak of the resident size to the size
        return _status("VmRSS")
    return torch.nan


def _peak(device: torch.device | str) -> float:
    return float(torch.cuda.max_memory_allocated(device)) if torch.device(device).type == "cuda" else _status("VmHWM")


def _status(field: str) -> float:
    with suppress(OSError), open("/proc/self/status") as lines:
        return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(field)), torch.nan)
    return torch.nan
