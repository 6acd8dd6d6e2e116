"""Jᵀ H J v by four methods, examples in chunks and vectors in blocks: what `fisher.py` is made of.

A method adds to `total` (k, p) its products with the vectors (k, p), over the chunks of one mini-batch.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vmap
from torch.func import vjp as func_vjp

from ntkbook.checks import explained
from ntkbook.lazy import vectors_that_fit
from ntkbook.likelihoods import Likelihood
from ntkbook.linearize import Linearization
from ntkbook.memory import working_memory

Multiply = Callable[[Float[Tensor, "n o k"]], Float[Tensor, "n o k"]]
Curvature = Callable[[Float[Tensor, "n o"], Tensor | None], Multiply]  # outputs and labels -> u -> H u
GROUP = 64  # vectors at a time
FEW = 8  # examples that an automatic step is taken from
# Operations whose derivatives jump, as autograd calls them.
KINKS = re.compile(
    "(Relu|LeakyRelu|Prelu|Rrelu|Threshold|Hard|Softshrink|Clamp|Abs|Sign|Max|Min|Amax|Amin|AdaptiveMax|FractionalMax|Median|Kth|Sort|Topk|Where)"
)
Pull = Callable[[Float[Tensor, "n o k"]], Float[Tensor, "k p"]]
Route = Callable[[Linearization, Tensor, Float[Tensor, "k p"]], tuple[Tensor, Tensor, Pull]]


class Batch(NamedTuple):
    """A mini-batch, or an operator's inputs."""

    x: Tensor
    extra: Tensor | None
    """Labels; the outputs, where a method needs them and has them already."""
    memory: int
    """Bytes of one example's pass forward, and of its samples."""

    def chunks(self, lin: Linearization, chunk_size: int | None, copies: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Examples and their labels, as many as fit if each takes some copies of its pass forward."""
        size = chunk_size or lin._size(len(self.x), copies * self.memory)
        for start in range(0, len(self.x), size):
            part = slice(start, start + size)
            yield self.x[part].detach(), None if self.extra is None else self.extra[part]


# Adds to the last but one, total (k, p), its products with the columns (k, p); the last is the chunk size.
Method = Callable[[Linearization, Batch, Tensor, Tensor, int | None], None]


def batches(x: Tensor | Iterable[Any], y: Tensor | Iterable[Tensor] | None = None) -> Iterator[tuple[Any, Any]]:
    """Mini-batches of inputs and labels, None where there are none."""
    if isinstance(x, Tensor):
        yield x, y
    elif isinstance(y, Tensor):
        raise ValueError("y: expected mini-batches of labels where x is an iterable of them, got one tensor.")
    elif y is not None:
        yield from zip(x, y, strict=True)
    else:
        for batch in x:
            yield (batch[0], batch[1] if len(batch) > 1 else None) if isinstance(batch, tuple | list) else (batch, None)


def inspected(lin: Linearization, x: Tensor, y: Tensor | None, samples: int = 0) -> Batch:
    o, memory = lin._inspect(x)
    if y is not None and len(y) != len(x):
        raise ValueError(f"y: expected {len(x)} of them, as many as inputs x; got {len(y)}.")
    return Batch(x, y.clone() if y is not None and y.is_inference() else y, memory + 8 * samples * o)


def products(
    lin: Linearization,
    data: Iterable[Batch],
    v: Float[Tensor, "p k"],
    method: Method,
    reduction: str,
    chunk_size: int | None,
) -> Float[Tensor, "p k"]:
    """The sum or mean over mini-batches of a method's products."""
    if not v.shape[1]:
        return torch.zeros_like(v)
    columns, n = v.detach().T.contiguous(), 0
    total = torch.zeros_like(columns, dtype=torch.promote_types(lin.dtype, torch.float32))
    for batch in data:
        method(lin, batch, columns, total, chunk_size)
        n += len(batch.x)
    if not n:
        raise ValueError(
            "x: expected at least one mini-batch, got none. A generator is used up by its first use: pass a list, or "
            "make another."
        )
    return (total.div_(n) if reduction == "mean" else total).to(lin.dtype).T


class Symmetric(torch.autograd.Function):
    """v -> F v for a constant, symmetric F: its derivative is itself."""

    @staticmethod
    def forward(ctx: Any, product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        ctx.product = product
        return product(v.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Any]:
        return None, Symmetric.apply(ctx.product, gradients[0])


def exact(
    curvature: Curvature,
    lin: Linearization,
    batch: Batch,
    columns: Float[Tensor, "k p"],
    total: Float[Tensor, "k p"],
    chunk_size: int | None,
) -> None:
    """J v by forward mode, then H, then Jᵀ by reverse mode; vectors in groups that fit the memory with a chunk."""
    lin._require_one_derivative(batch.x[:1])
    group = min(len(columns), GROUP)
    # On a CPU, blocks are faster in a quarter of the memory, nearer the caches: a small PreResNet took three quarters.
    share = 4 if group > 1 and lin.device.type == "cpu" else 1
    for x, y in batch.chunks(lin, chunk_size, 3 * group * share):
        fit = max(1, min(group, working_memory(lin.device) // (3 * share * len(x) * batch.memory)))
        multiply = None
        for some, sums in zip(columns.split(fit), total.split(fit)):
            route: Route = _dual if len(some) == 1 else _block
            with explained("exact"), torch.no_grad():
                f, pushed, pull = route(lin, x, some)
                multiply = multiply or curvature(_better(f.detach()), y)  # once a chunk, for it may draw samples
                sums += pull(multiply(_better(pushed)).to(f.dtype))


def _dual(lin: Linearization, x: Tensor, columns: Float[Tensor, "1 p"]) -> tuple[Tensor, Tensor, Pull]:
    """f, J v and u -> Jᵀ u of one vector: dual numbers over parameters that require gradients, one pass forward."""
    leaves, tangents = _leaves(lin), lin.unflatten(columns[0])
    with torch.enable_grad(), forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(leaf, tangents[name]) for name, leaf in leaves.items()}
        f, pushed = forward_ad.unpack_dual(lin._call(duals, x))
    pushed = torch.zeros_like(f) if pushed is None else pushed
    return f, pushed.detach()[..., None], lambda u: lin.flatten(_gradient(f, leaves, u[..., 0]))[None]


def _block(lin: Linearization, x: Tensor, columns: Float[Tensor, "k p"]) -> tuple[Tensor, Tensor, Pull]:
    """The same of several vectors, vectorised."""
    pushed = vmap(partial(lin._directional, x), out_dims=-1)(columns)
    f, pull = func_vjp(lambda p: lin._call(p, x), lin.params)[:2]
    fit = vectors_that_fit(lin, 2)
    return f, pushed, vmap(lambda u: lin.flatten(pull(u)[0]), in_dims=-1, chunk_size=fit)


def expected(likelihood: Likelihood, f: Tensor, _: Tensor | None) -> Multiply:
    """H, the expectation over p(y | f) in closed form."""
    return partial(likelihood.apply, f)


def squared_scores(likelihood: Likelihood, f: Float[Tensor, "n o"], y: Tensor | None) -> Multiply:
    """s sᵀ, with the score s = ∇_f log p(y | f)."""
    if y is None:
        raise ValueError("y: expected labels: pass y, or mini-batches that are pairs (x, y).")
    scores = grad(lambda f: likelihood.log_prob(f, y).sum())(f)[..., None]
    return lambda u: scores * (scores * u).sum(1, keepdim=True)


def drawn_scores(
    likelihood: Likelihood, samples: int, seeds: torch.Generator, f: Float[Tensor, "n o"], _: Tensor | None
) -> Multiply:
    """The mean of s sᵀ over draws y ~ p(y | f), each example's from a seed of its own."""
    own = torch.Generator()
    draws = [
        likelihood.sample(row.expand(samples, -1), own.manual_seed(seed))
        for row, seed in zip(f.cpu().split(1), torch.randint(2**62, (len(f),), generator=seeds).tolist())
    ]
    multiply = squared_scores(likelihood, f.repeat_interleave(samples, 0), torch.cat(draws).to(f.device))
    return lambda u: multiply(u.repeat_interleave(samples, 0)).unflatten(0, (len(f), samples)).mean(1)


def double_backward(
    likelihood: Likelihood,
    lin: Linearization,
    batch: Batch,
    columns: Float[Tensor, "k p"],
    total: Float[Tensor, "k p"],
    chunk_size: int | None,
) -> None:
    """The gradient of gᵀv, g that of KL(p_θ ‖ p_θ′) in θ′ at θ′ = θ, with its graph."""
    for x, _ in batch.chunks(lin, chunk_size, 4):
        leaves = _leaves(lin)
        with explained("double_backward"), torch.enable_grad():
            f = _better(lin._call(leaves, x))
            first = _gradient(likelihood.kl(f.detach(), f).sum(), leaves, create_graph=True)
            for v, sums in zip(columns, total):
                value = sum(((first[name] * part).sum() for name, part in lin.unflatten(v).items()), f.new_zeros(()))
                sums += lin.flatten(_gradient(value, leaves))


def difference(
    likelihood: Likelihood,
    epsilon: float | None,
    central: bool,
    lin: Linearization,
    batch: Batch,
    columns: Float[Tensor, "k p"],
    total: Float[Tensor, "k p"],
    chunk_size: int | None,
) -> None:
    """Gradients of KL(p_θ ‖ p_θ′) in θ′, at θ′ = θ + εv/‖v‖, and at θ′ = θ − εv/‖v‖ if `central`."""
    chunks = list(batch.chunks(lin, chunk_size, 2))
    with explained("difference"), torch.no_grad():
        chunks = [(x, lin._call(lin.params, x) if f is None else f) for x, f in chunks]
    for v, sums in zip(columns, total):
        largest = float(v.abs().max())
        if largest == 0:
            continue
        direction = v / largest  # so that no square underflows
        norm = float(direction.norm())
        step = automatic_step(lin, batch.x, direction / norm, central) if epsilon is None else epsilon
        moves, parts = lin.unflatten(direction), lin.unflatten(sums)
        for sign in (1, -1) if central else (1,):
            shift = sign * step / norm
            leaves = {k: value.add(moves[k], alpha=shift).requires_grad_() for k, value in lin.params.items()}
            for x, f in chunks:
                with explained("difference"), torch.enable_grad():
                    kl = likelihood.kl(f, lin._call(leaves, x)).sum()
                weight = sign * norm * largest / (step * (2 if central else 1))
                for name, gradient in _gradient(kl, leaves, retain_graph=False).items():
                    parts[name].add_(gradient, alpha=weight)


def automatic_step(lin: Linearization, x: Tensor, direction: Float[Tensor, " p"], central: bool) -> float:
    """The ε that `fisher.automatic_epsilon` derives, for a direction of norm 1 and the first examples of x."""
    u = torch.finfo(lin.dtype).eps
    x, scale = x[:FEW].detach(), float(lin.flatten(lin.params).norm()) or 1.0
    trial = scale * u**0.5
    moved = {
        k: value.add(move, alpha=trial)
        for (k, value), move in zip(lin.params.items(), lin.unflatten(direction).values())
    }
    with explained("difference"), torch.no_grad():
        f, shifted = lin._call(lin.params, x), lin._call(moved, x)
    speed = float((shifted - f).norm()) / trial
    # Where outputs cancel, their rounding is not u‖f‖, and steps from their size would be lost in that of θ.
    length = min(scale, max(trial, float(f.norm()) / speed)) if speed and f.any() else scale
    return length * u ** (1 / 3 if central and not _has_kinks(lin, x[:1]) else 1 / 2)


def _has_kinks(lin: Linearization, example: Tensor) -> bool:
    """Whether the network's derivative jumps, as that of ReLU and of a maximum does: by the names in its graph."""
    with explained("difference"), torch.enable_grad():
        stack: list[Any] = [lin._call(_leaves(lin), example).grad_fn]
    seen = set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            if KINKS.match(node.name()):
                return True
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return False


def _leaves(lin: Linearization) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in lin.params.items()}


def _better(f: Tensor) -> Tensor:
    """In float32 or better."""
    return f.to(torch.promote_types(f.dtype, torch.float32))


def _gradient(
    output: Tensor,
    leaves: Mapping[str, Tensor],
    u: Tensor | None = None,
    create_graph: bool = False,
    retain_graph: bool = True,
) -> dict[str, Tensor]:
    """The gradient of u·output in the leaves."""
    if not output.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    wanted = list(leaves.values())
    options = {"create_graph": create_graph, "retain_graph": retain_graph, "materialize_grads": True}
    return dict(zip(leaves, torch.autograd.grad(output, wanted, u, **options)))
