"""Products with the NTK, J Jᵀ V, without forming it: against curvlinops and double backward; and three solvers.

    python benchmarks/products.py [--threads 2] [--repeats 5]

All in one run, float64, medians with the range over the repeats; ratios are to ours. The floor is the products' own
multiplications, 8 n p a vector (Jᵀu: two products with every weight; J v: two more), at the speed of a large matrix
product on the same threads, measured here.
"""

import statistics
from collections.abc import Callable

import torch
from curvlinops import JacobianLinearOperator
from gram import begin, seconds
from torch import Tensor, nn

from ntkbook import NTKGP, Iterative, Linearization
from ntkbook.experiments.networks import mlp

CASES = [((1, 40, 40, 1), 1000), ((2, 500, 500, 2), 300), ((5, 200, 2000, 200, 1), 500)]
VECTORS = (1, 8, 32)


def curvlinops(net: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """curvlinops' Jacobian and its adjoint. (Its targets are ignored.)"""
    operator = JacobianLinearOperator(net, list(net.parameters()), [(x, x)], check_deterministic=False)
    return lambda v: operator @ (operator.adjoint() @ v)


def double_backward(net: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Appendix A's three backward calls, a vector at a time."""
    parameters = list(net.parameters())

    def one(u: Tensor) -> Tensor:
        f = net(x)
        dummy = torch.zeros_like(f, requires_grad=True)
        back = torch.autograd.grad(f, parameters, dummy, create_graph=True)
        v = torch.autograd.grad(f, parameters, u.view_as(f), retain_graph=True)
        return torch.autograd.grad(back, dummy, v)[0].flatten()

    return lambda v: torch.stack([one(u) for u in v.T], 1)


def ours(net: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    lin = Linearization(net)
    return lambda v: lin.jvp(x, lin.vjp(x, v.view(len(x), -1, v.shape[1]))).flatten(0, 1)


def main() -> None:
    repeats, speed = begin(__doc__)
    for sizes, n in CASES:
        compare(mlp(sizes, "tanh", dtype=torch.float64), sizes, n, speed, repeats)


def compare(net: nn.Module, sizes: tuple[int, ...], n: int, speed: float, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, sizes[0], dtype=torch.double, generator=generator)
    p = sum(value.numel() for value in net.parameters())
    gradient = statistics.median(seconds(lambda: net(x).sum().backward(), repeats))
    print(f"\n{'-'.join(map(str, sizes))}, n = {n}, p = {p:,}; one gradient {1e3 * gradient:.1f} ms")
    methods = {"ours": ours(net, x), "curvlinops": curvlinops(net, x), "double backward": double_backward(net, x)}
    for k in VECTORS:
        v = torch.randn(n * sizes[-1], k, dtype=torch.double, generator=generator)
        want, base = methods["ours"](v), 0.0
        floor = 8 * n * p * k / speed
        for name, product in methods.items():
            assert torch.allclose(product(v), want, rtol=1e-8, atol=1e-8 * float(want.abs().max()))
            times = seconds(lambda product=product, v=v: product(v), repeats)
            median = statistics.median(times)
            base = median if name == "ours" else base
            print(
                f"  {k:3d} vectors, {name:15s} {median:8.3f} s [{min(times):.3f}, {max(times):.3f}] "
                f"{median / base:6.1f}x {median / gradient / k:6.1f} gradients a vector; floor {floor / median:4.0%}"
            )
    y = torch.sin(x.sum(1, keepdim=True)).expand(-1, sizes[-1])
    for name, settings in (
        ("Cholesky", {}),
        ("function space, products", {"solver": Iterative(rank=64)}),
        ("parameter space, products", {"space": "parameter", "solver": Iterative(rank=64)}),
    ):
        gp = NTKGP(net, noise=0.1, **settings)
        print(f"  condition, {name:26s} {seconds(lambda gp=gp: gp.condition(x, y), 1)[0]:8.3f} s")


if __name__ == "__main__":
    main()
