"""The NTK's Gram matrix: layer by layer, against an explicit Jacobian, torch.func's usual recipe and curvlinops.

    python benchmarks/gram.py [--threads 2] [--repeats 5]

All in one run, float64, medians with the range over the repeats; ratios are to the layer rule. The floor is the rule's
own multiplications, 2 n² Σ (o² out + in), at the speed of a large matrix product on the same threads, measured here.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from curvlinops import JacobianLinearOperator
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from ntkbook import Linearization
from ntkbook.experiments.networks import mlp

CASES = [((1, 400, 1), 300), ((1, 40, 40, 1), 1000), ((2, 500, 500, 2), 300), ((5, 200, 2000, 200, 1), 500)]


def explicit(net: nn.Module, x: Tensor) -> Tensor:
    jacobian = Linearization(net).jacobian(x)
    return jacobian @ jacobian.T


def torch_func(net: nn.Module, x: Tensor) -> Tensor:
    """Per-example Jacobians by vmap over jacrev, contracted a parameter at a time: the recipe of torch's tutorials."""
    params = {name: value.detach() for name, value in net.named_parameters()}
    jacobians = vmap(jacrev(lambda p, e: functional_call(net, p, (e[None],))[0]), (None, 0))(params, x)
    blocks = (j.flatten(2) for j in jacobians.values())
    total = sum(torch.einsum("nap,mbp->namb", j, j) for j in blocks)
    return total.flatten(2).flatten(0, 1)


def curvlinops(net: nn.Module, x: Tensor) -> Tensor:
    """J Jᵀ by products of curvlinops' Jacobian and its adjoint with the identity. (Its targets are ignored.)"""
    operator = JacobianLinearOperator(net, list(net.parameters()), [(x, x)], check_deterministic=False)
    eye = torch.eye(operator.shape[0], dtype=x.dtype)
    return operator @ (operator.adjoint() @ eye)


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def begin(description: str) -> tuple[int, float]:
    """Read --threads and --repeats; return the repeats, and a large matrix product's operations a second."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    a = torch.randn(2000, 2000, dtype=torch.float64)
    speed = 2 * 2000**3 / min(seconds(lambda: a @ a, 5))
    print(f"torch {torch.__version__}, {options.threads} threads, matrix product {speed / 1e9:.0f} GFLOP/s\n")
    return options.repeats, speed


def main() -> None:
    repeats, speed = begin(__doc__)
    print("| network | n | method | median s | range | ratio | max relative error |\n|---|---|---|---|---|---|---|")
    for sizes, n in CASES:
        net = mlp(sizes, "tanh", dtype=torch.float64)
        x = torch.randn(n, sizes[0], dtype=torch.float64)
        o = sizes[-1]
        truth = explicit(net, x)
        base = None
        methods = {
            "layer rule": lambda net=net, x=x: Linearization(net).gram(x),
            "explicit Jacobian": lambda net=net, x=x: explicit(net, x),
            "torch.func recipe": lambda net=net, x=x: torch_func(net, x),
            "curvlinops J (Jᵀ I)": lambda net=net, x=x: curvlinops(net, x),
        }
        for name, run in methods.items():
            times = seconds(run, repeats)
            median = statistics.median(times)
            base = base or median
            error = float((run() - truth).abs().max() / truth.abs().max())
            print(
                f"| {'-'.join(map(str, sizes))} | {n} | {name} | {median:.4f} | {min(times):.4f} to {max(times):.4f} "
                f"| {median / base:.1f} | {error:.0e} |"
            )
        work = sum(2 * n * n * (o * o * b + a) for a, b in itertools.pairwise(sizes))
        print(f"| {'-'.join(map(str, sizes))} | {n} | floor | {work / speed:.4f} | | {work / speed / base:.2f} | |")


if __name__ == "__main__":
    main()
