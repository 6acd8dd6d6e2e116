"""The floor: multiply-adds that must be done, at the best rate of a product of just these shapes, measured here.

A Gram matrix: the symmetric half of each layer's products, plus one pass forward and o backward. Of a convolution the
cheaper of per-example gradients and the ghost product over positions, as counted. Nothing entry by entry is counted.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

TILES = (256, 512, 1024, 2048)


class Use(NamedTuple):
    """One module with parameters in one pass: as a product, (positions x inner) (inner x outer) an example."""

    positions: int
    inner: int
    outer: int
    parameters: int


class Product(NamedTuple):
    """Multiply-adds, and the sizes of the matrix product that does them: (m x inner)(inner x outer), outer = m if 0."""

    multiply_adds: float
    inner: int
    outer: int = 0


def uses(net: nn.Module, x: Tensor) -> list[Use]:
    """The modules that hold parameters, in the order in which they run."""
    found: list[Use] = []

    def note(module: nn.Module, args: tuple[Tensor], z: Tensor) -> None:
        size = sum(p.numel() for p in module.parameters(recurse=False))
        if isinstance(module, nn.Linear):
            found.append(Use(args[0][0].numel() // module.in_features, module.in_features, module.out_features, size))
        elif isinstance(module, nn.Conv2d):
            inner = module.weight[0].numel()
            found.append(Use(z[0, 0].numel(), inner, module.out_channels, size))
        elif size:
            found.append(Use(1, 0, 0, size))  # a norm: its multiply-adds elsewhere are not matrix products

    hooks = [module.register_forward_hook(note) for module in net.modules() if len(list(module.children())) == 0]
    with torch.no_grad():
        net(x[:1])
    for hook in hooks:
        hook.remove()
    return found


def passes(layers: list[Use], n: int, forward: float, backward: float, weights: float) -> list[Product]:
    """Passes of n examples: forward, back to inputs (none for the first layer), and to the weights."""
    products = []
    for index, use in enumerate(layers):
        once = n * use.positions * use.inner * use.outer
        if once:
            products += [Product(once * (forward + weights), use.inner, use.outer)]
            products += [Product(once * backward, use.outer, use.inner)] if index else []
    return products


def gram(layers: list[Use], n: int, o: int, m: int | None = None) -> list[Product]:
    """J(x)J(x)ᵀ for n examples; for n and m others, all of it."""
    pairs = n * (n + 1) / 2 if m is None else n * m
    examples = n + (m or 0)
    products = passes(layers, examples, 1, o, 0)
    for use in layers:
        p, inner, outer = use.positions**2, use.inner, use.outer
        contraction = pairs * o * o * use.parameters + examples * o * use.positions * inner * outer
        ghost = pairs * p * (inner + o * o * (outer + (p > 1)))
        if inner and ghost <= contraction:
            products += [Product(pairs * p * inner, inner), Product(pairs * p * o * o * outer, outer)]
        else:
            products += [Product(contraction, use.parameters)]
    return products


def product(layers: list[Use], n: int, vectors: int) -> list[Product]:
    """J Jᵀ V or Jᵀ H J V: one pass forward, and for each vector one back and one of forward mode."""
    one = passes(layers, n, 2, 1, 1)  # forward mode: W da and dW a; back: to inputs and to weights
    first = layers[0]
    spared = Product(  # the inputs have no tangent
        -float(n * first.positions * first.inner * first.outer), first.inner, first.outer
    )
    return passes(layers, n, 1, 0, 0) + [
        part._replace(multiply_adds=part.multiply_adds * vectors) for part in [*one, spared]
    ]


def seconds(products: list[Product], dtype: torch.dtype) -> float:
    """The time of these products, each at the best rate of its shape."""
    return sum(part.multiply_adds / rate(part.inner, part.outer, dtype) for part in products)


def best(call: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest call."""
    return min(timings(call, repeats))


def timings(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each call after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


@cache
def rate(inner: int, outer: int, dtype: torch.dtype) -> float:
    """Multiply-adds a second of torch.mm, (m x inner) by (inner x outer), at the best m of several."""
    found = 0.0
    for m in TILES:
        columns = outer or m
        a, b = torch.randn(m, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
        found = max(found, m * inner * columns / best(lambda a=a, b=b: torch.mm(a, b)))
    return found
