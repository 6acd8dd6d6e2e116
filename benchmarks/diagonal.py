"""The Fisher matrix's diagonal, exact: against torch.func's per-sample gradients, an output at a time, and BackPACK.

    python benchmarks/diagonal.py [--threads 2] [--repeats 5] [--images 10000]

Needs `pip install backpack-for-pytorch==1.7.1` (which curvlinops brings). All in one run, float32, medians with the
range over the repeats; ratios are to ours. Agreement is checked before timing, in float64 on the first images. The
floor is the multiplications that exact diagonals by layers need, counted below, at the speed of a large float32 product
of matrices on the same threads, measured here.
"""

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from backpack import backpack, extend
from backpack.extensions import DiagGGNExact
from gram import seconds
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ntkbook import fisher_diagonal
from ntkbook.experiments.networks import lenet3, mlp
from ntkbook.likelihoods import get_likelihood

CHUNK = 250  # images at a time for the others: the fastest of 50, 250 and 1,000, about


def ours(net: nn.Module, x: Tensor) -> Tensor:
    return fisher_diagonal(net, x)


def per_sample_gradients(net: nn.Module, x: Tensor) -> Tensor:
    """vmap(grad) as in torch's tutorial, for one column of the root of H after the other."""
    params = {name: value.detach() for name, value in net.named_parameters()}

    def product(params: dict[str, Tensor], example: Tensor, u: Tensor) -> Tensor:
        return functional_call(net, params, (example[None],))[0] @ u

    gradients = vmap(grad(product), in_dims=(None, 0, 0))
    total = torch.zeros(sum(value.numel() for value in params.values()), dtype=torch.double)
    for part in x.split(CHUNK):
        root = get_likelihood("categorical").root(net(part).detach())
        for u in root.unbind(2):
            found = gradients(params, part, u)
            total += torch.cat([g.square().sum(0, dtype=torch.double).flatten() for g in found.values()])
    return (total / len(x)).to(x.dtype)


def by_backpack(net: nn.Module, x: Tensor) -> Tensor:
    """DiagGGNExact of the cross-entropy, whose Hessian in the logits needs no labels."""
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))
    net = extend(copy.deepcopy(net))  # its hooks stay
    total = torch.zeros(sum(value.numel() for value in net.parameters()), dtype=torch.double)
    for part in x.split(CHUNK):
        with backpack(DiagGGNExact()):
            loss(net(part), torch.zeros(len(part), dtype=torch.long)).backward()
        total += torch.cat([value.diag_ggn_exact.double().flatten() for value in net.parameters()])
    return (total / len(x)).to(x.dtype)


def work(net: nn.Module, x: Tensor, o: int) -> float:
    """Multiply-adds, twice: forward, o backward (to all but the first layer's inputs), and gradients or squares."""
    total, first = 0, True
    hooks = []

    def count(module: nn.Module, args: tuple[Tensor], z: Tensor) -> None:
        nonlocal total, first
        layer = isinstance(module, nn.Conv2d)
        once = module.weight.numel() * (z[0, 0].numel() if layer else 1)
        total += once * (1 + (0 if first else o) + (o if layer else 1))  # a Linear's squares are one product
        first = False

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            hooks.append(module.register_forward_hook(count))
    net(x[:1])
    for hook in hooks:
        hook.remove()
    return 2.0 * len(x) * total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=10_000, help="for LeNet3; a fifth for the other network")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    a = torch.randn(2000, 2000)
    speed = 2 * 2000**3 / min(seconds(lambda: a @ a, 5))
    print(f"torch {torch.__version__}, {options.threads} threads, float32 matrix product {speed / 1e9:.0f} GFLOP/s\n")
    print("| network | n | method | median s | range | ratio |\n|---|---|---|---|---|---|")
    methods: dict[str, Callable] = {
        "by layers (ours)": ours,
        "torch.func per-sample gradients": per_sample_gradients,
        "BackPACK DiagGGNExact": by_backpack,
    }
    for name, make, n in (
        ("LeNet3", lenet3, options.images),
        (
            "784-300-100-10",
            lambda dtype=torch.float32: mlp([784, 300, 100, 10], "relu", dtype=dtype),
            options.images // 5,
        ),
    ):
        net, double = make(), make(dtype=torch.double)
        x = torch.rand(n, 784, generator=torch.Generator().manual_seed(0))
        want, base = ours(double, x[:300].double()), 0.0
        for title, run in methods.items():
            assert torch.allclose(run(double, x[:300].double()), want, rtol=0, atol=1e-10 * float(want.max())), title
            times = seconds(lambda run=run, net=net, x=x: run(net, x), options.repeats)
            median = statistics.median(times)
            base = base or median
            print(f"| {name} | {n:,} | {title} | {median:.2f} | {min(times):.2f} to {max(times):.2f} | "
                  f"{median / base:.1f} |", flush=True)  # fmt: skip
        floor = work(net, x, 10) / speed
        print(f"| {name} | {n:,} | floor | {floor:.2f} | | {floor / base:.2f} |")


if __name__ == "__main__":
    main()
