"""The problems: networks, inputs, the reference on a few examples in float64, who takes part, and the floor."""

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import competitors, floor, neural, posterior, tasks
from benchmarks.harness import Case, Skipped
from ntkbook import Linearization, fisher_vector_product
from ntkbook.experiments.convnets import preresnet
from ntkbook.experiments.networks import lenet3, mlp

WIDE = (5, 200, 2000, 200, 1)
MALARIA = (2, 500, 500, 2)


class Settings(NamedTuple):
    """Where environments of others are, and whether they may be made."""

    cache: Path
    install: bool = True


class Problem(NamedTuple):
    """A name, the group by which it is asked for, and what builds it."""

    name: str
    group: str
    build: Callable[[Settings], Case]


class First(nn.Module):
    """The first output alone: the malaria network's mean."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, :1]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spread(n: int, m: int) -> Tensor:
    """m of n examples, evenly spread."""
    return torch.linspace(0, n - 1, min(m, n)).long()


def divisor(n: int, most: int) -> int:
    """The largest up to `most`: neural-tangents' batches must divide n."""
    return max(k for k in range(1, most + 1) if n % k == 0)


def network(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[int, ...], int]:
    """A network, an example's shape, and its number of outputs."""
    if name == "LeNet3":
        return lenet3(dtype=dtype), (784,), 10
    if name == "LeNet-5":
        return lenet5(dtype), (784,), 10
    if name == "PreResNet20":
        return preresnet(20, dtype=dtype).eval(), (3, 32, 32), 10
    if name == "PreResNet8":
        return preresnet(8, width=4, dtype=dtype).eval(), (3, 32, 32), 10
    sizes = tuple(map(int, name.split("-")))
    return mlp(sizes, "tanh", dtype=dtype), sizes[:1], sizes[-1]


def lenet5(dtype: torch.dtype) -> nn.Sequential:
    """LeNet-5 with ReLU and maxima: 61,706 parameters."""
    torch.manual_seed(0)
    convolutions = [
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    ]  # fmt: skip
    return nn.Sequential(
        *convolutions, nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)
    ).to(dtype)


def gram(name: str, n: int, first: bool, few: int, settings: Settings) -> Case:
    net, shape, o = network(name)
    o = 1 if first else o
    x = draw(n, *shape)
    small = x[spread(n, few)]
    net64 = copy.deepcopy(net).double()
    jacobian = Linearization(First(net64) if first else net64).jacobian(small.double())
    worker = neural.Worker(net, o, settings.cache, settings.install)
    ways = competitors.gram(First(net) if first else net)
    if first:  # ours selects an output by itself
        lin = Linearization(net)
        ways["ntkbook"].run = lambda inputs, size: lin.gram(inputs[0], output=0)
    ways |= neural.competitors(worker, (None, divisor(n, 200), divisor(n, 25)))
    products = floor.gram(floor.uses(net, x), n, o)
    return Case(
        (x,), (small,), jacobian @ jacobian.T, ways, partial(floor.seconds, products, x.dtype), 1e-4, worker.close
    )


def products(name: str, n: int, vectors: int, settings: Settings) -> Case:
    net, shape, o = network(name)
    x, v = draw(n, *shape), draw(n * o, vectors, seed=1)
    small = x[:8]
    jacobian = Linearization(copy.deepcopy(net).double()).jacobian(small.double())
    reference = jacobian @ (jacobian.T @ v[: 8 * o].double())
    work = floor.product(floor.uses(net, x), n, vectors)
    seconds = partial(floor.seconds, work, x.dtype)
    return Case((x, v), (small, v[: 8 * o]), reference, competitors.products(net), seconds, 1e-4)


def fisher(name: str, n: int, vectors: int, settings: Settings) -> Case:
    net, shape, _ = network(name)
    x, p = draw(n, *shape), sum(value.numel() for value in net.parameters())
    v = draw(p, vectors, seed=1) if vectors > 1 else draw(p, seed=1)
    small = x[:8]
    net64 = copy.deepcopy(net).double()
    reference = fisher_vector_product(net64, small.double(), v.double(), method="double_backward")
    sizes = (*(size for size in (64, 256, 1024) if size < n), n)
    work = floor.product(floor.uses(net, x), n, vectors)
    ways = competitors.fisher(net, sizes)
    return Case((x, v), (small, v), reference, ways, partial(floor.seconds, work, x.dtype), 1e-3)


def diagonal(name: str, n: int, settings: Settings) -> Case:
    net, shape, o = network(name)
    x = draw(n, *shape)
    small = x[:8]
    net64 = copy.deepcopy(net).double()
    jacobian = Linearization(net64).jacobian(small.double()).view(len(small), o, -1)
    chances = net64(small.double()).detach().softmax(1)
    h = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None]
    reference = torch.einsum("nap,nab,nbp->p", jacobian, h, jacobian) / len(small)
    layers = floor.uses(net, x)
    positions = [use.positions > 1 for use in layers]
    work = floor.passes(layers, n, 1, o, 0)
    work += [  # squares of gradients: of a vector's layer one product, else a gradient for each output
        floor.Product(float(n * use.positions * use.inner * use.outer * (o if many else 1)), use.inner, use.outer)
        for use, many in zip(layers, positions)
        if use.inner
    ]
    return Case((x,), (small,), reference, competitors.diagonal(net), partial(floor.seconds, work, x.dtype), 1e-4)


def regression(name: str, n: int, m: int, predict: bool, settings: Settings) -> Case:
    """In float64: NTKGP's own precision."""
    net, shape, o = network(name, torch.float64)
    x, new = draw(n, *shape, dtype=torch.float64), draw(m, *shape, seed=1, dtype=torch.float64)
    y = x.flatten(1).sum(1).sin()
    small = (x[:20], y[:20], new[:5])
    layers = floor.uses(net, x)

    def seconds() -> float:
        work = floor.gram(layers, m, o, n) if predict else floor.gram(layers, n, o)
        matrix = torch.eye(n, dtype=torch.float64).add_(0.1 / n)
        if predict:
            right = torch.ones(n, m, dtype=torch.float64)
            other = floor.best(lambda: torch.linalg.solve_triangular(matrix, right, upper=False), 3)
        else:
            other = floor.best(lambda: torch.linalg.cholesky(matrix), 3)
        return floor.seconds(work, torch.float64) + other

    with suppress(Skipped):
        posterior.laplace(*settings)  # installed here, where no time is limited
    ways = (posterior.predictions if predict else posterior.likelihoods)(net, *settings)
    return Case((x, y, new), small, posterior.dense(net, small, predict), ways, seconds, 1e-6)


def many_tasks(name: str, count: int, days: int, fitted: bool, missing: float, settings: Settings) -> Case:
    """In float64. The floor: the Gram matrix, one eigendecomposition, and every task's products with eigenvectors."""
    net, _, o = network(name, torch.float64)
    x, new, y = tasks.stations(count, days, missing)
    small = (x, new, y[: tasks.FEW // 2])
    layers, m = floor.uses(net, x), len(new)

    def seconds() -> float:
        work = [*floor.gram(layers, days, o), *floor.gram(layers, m, o, days)]
        work.append(floor.Product(float(count * days * (days + 2 * m)), days, days))
        matrix = torch.eye(days, dtype=torch.float64)
        return floor.seconds(work, torch.float64) + floor.best(lambda: torch.linalg.eigh(matrix), 3)

    noise = 1.0
    ways, reference = tasks.ways(net, noise, fitted), tasks.dense(net, noise, fitted, small)
    # Two searches end where the likelihood is the same, and their arguments to the root of its rounding.
    return Case((x, new, y), small, reference, ways, seconds, 1e-4 if fitted else 1e-7)


def problems(quick: bool = False) -> list[Problem]:
    """All of them, at their sizes; quick: the same at sizes for a minute or two."""
    wide, malaria = ("5-20-40-20-1", "2-20-20-2") if quick else ("-".join(map(str, s)) for s in (WIDE, MALARIA))
    residual = "PreResNet8" if quick else "PreResNet20"
    ns: Sequence[int] = (50, 100) if quick else (500, 1000, 5000, 10_000, 20_000)
    found: list[Problem] = []

    def add(group: str, title: str, build: Callable[[Settings], Case]) -> None:
        found.append(Problem(f"{group}: {title}", group, build))

    for n in ns:
        add("gram", f"{wide}, n = {n:,}", partial(gram, wide, n, False, 32))
    for n in ns[1:2] if quick else (2000,):
        add("gram", f"{malaria}, mean, n = {n:,}", partial(gram, malaria, n, True, 32))
    n = 20 if quick else 1000
    add("gram", f"LeNet-5, n = {n:,}", partial(gram, "LeNet-5", n, False, 8))
    n = 6 if quick else 256
    add("gram", f"{residual}, n = {n:,}", partial(gram, residual, n, False, 4))
    for n in ns[:1] if quick else (100, 1000, 20_000):
        for k in (1, 10, 100):
            add("products", f"{wide}, n = {n:,}, {k} vectors", partial(products, wide, n, k))
    classifier = "784-10-10" if quick else "784-300-100-10"
    for name, n in ((classifier, ns[1]), ("LeNet3", ns[0]), (residual, 6 if quick else 256)):
        for k in (1, 10):
            add("fisher", f"{name}, n = {n:,}, {k} vectors", partial(fisher, name, n, k))
    for name, n in ((classifier, 20 if quick else 2000), ("LeNet3", 20 if quick else 10_000)):
        add("diagonal", f"{name}, n = {n:,}", partial(diagonal, name, n))
    for n, m in ((60, 10),) if quick else ((500, 100), (10_000, 1000)):
        add("likelihood", f"{wide}, float64, n = {n:,}", partial(regression, wide, n, m, False))
        add("prediction", f"{wide}, float64, n = {n:,}, {m:,} points", partial(regression, wide, n, m, True))
    count, days = (20, 150) if quick else (1209, 300)
    for fitted in (False, True):
        for missing in (0.0, 0.1):
            title = f"{count:,} tasks of {days} points{', fitted' * fitted}{', a tenth missing' * bool(missing)}"
            add("tasks", title, partial(many_tasks, "1-400-1", count, days, fitted, missing))
    return found
