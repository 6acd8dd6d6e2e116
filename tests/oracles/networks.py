"""Networks of every kind that a linearisation must cope with; each with inputs, and parameters without a layer rule."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder transposed."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 6)
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T, self.bias)


class Shared(nn.Module):
    """Two Linear modules with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Twice(nn.Module):
    """One Linear, called twice."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Alias(nn.Module):
    """One Linear under two names, called twice."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = self.one

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


class Penalised(nn.Module):
    """A weight that also enters the output on its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) + self.layer.weight.square().sum()


class Functional(nn.Module):
    """A Linear that is never called: its weight is read."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(F.linear(x, self.layer.weight)))


def _overridden() -> nn.Module:
    """A Linear whose instance has another forward, as adapters do it (a partial: so that copies copy it)."""
    net = nn.Sequential(nn.Linear(4, 3))
    net[0].forward = partial(_doubled, net[0])
    return net


def _doubled(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, 2 * layer.weight, layer.bias)


class Residual(nn.Module):
    """Skip connections, a layer that is not used, and a column that is squeezed away."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(3, 3)
        self.head = nn.Linear(5, 1)

    def forward(self, x):
        z = F.gelu(self.a(x))
        return self.head(z + torch.sin(self.b(z))).squeeze(-1)


class Branches(nn.Module):
    """Layers that read the input itself, products between layers, and two different heads."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(4, 5, bias=False)
        self.left, self.right = nn.Linear(5, 1), nn.Linear(4, 2)

    def forward(self, x):
        gate = torch.sigmoid(self.a(x)) * self.b(x)
        return torch.cat([self.left(gate), self.right(x)], dim=1)


class Detached(nn.Module):
    """A layer behind a detach: its derivatives are zero."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.a(x)).detach())


class Scaled(nn.Module):
    """Parameters of its own, one a number, and a buffer."""

    def __init__(self):
        super().__init__()
        self.layer, self.gain = nn.Linear(4, 3), nn.Parameter(torch.randn(3))
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x):
        return self.gain * torch.tanh(self.layer(x - self.shift) / self.temperature)


class InPlace(nn.Module):
    """Works in place on its inputs and on everything in between."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        x.mul_(2).add_(1)
        z = self.a(x)
        z.sigmoid_()
        out = self.b(z)
        out += 1
        return out.tanh_()


class Attention(nn.Module):
    """A transformer encoder layer over an embedded sequence of integers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


class Words(nn.Module):
    """An embedding, averaged."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x).mean(1)))


class Placed(nn.Module):
    """A layer on the examples, and one on a constant of so many rows: an encoding of places."""

    def __init__(self, rows: int):
        super().__init__()
        self.content, self.place, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2)
        self.register_buffer("code", torch.randn(rows, 4))

    def forward(self, x):
        return self.head(torch.tanh(self.content(x) + self.place(self.code).mean(0, keepdim=True)))


class PlacedImage(nn.Module):
    """The same of convolutions."""

    def __init__(self):
        super().__init__()
        self.content, self.place = nn.Conv2d(2, 3, 3), nn.Conv2d(1, 3, 3)
        self.register_buffer("code", torch.randn(1, 1, 5, 5))

    def forward(self, x):
        return torch.tanh(self.content(x) + self.place(self.code)).flatten(1)[:, ::9]


class OneByOne(nn.Module):
    """A layer that is called as often as there are examples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.tanh(torch.cat([self.layer(one) for one in x.split(1)]))


class Recurrent(nn.Module):
    """A Linear cell over the steps of a sequence."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            h = torch.tanh(self.cell(torch.cat([h, step], dim=1)))
        return self.head(h)


class Cubed(nn.Module):
    def forward(self, weight):
        return weight**3


def _parametrised() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    nn.utils.parametrize.register_parametrization(net[0], "weight", Cubed())
    return net


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def _normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.SiLU(), nn.Linear(6, 2))


def _batch_normed(affine: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=affine), nn.Tanh(), nn.Linear(6, 2))


def _mlp(activation: nn.Module, outputs: int = 3, bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 7, bias=bias), activation, nn.Linear(7, 5, bias=bias), activation, nn.Linear(5, outputs, bias=bias)
    )


def _frozen() -> nn.Module:
    net = _mlp(nn.Tanh())
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
    net[4].weight.requires_grad_(False)  # the bias alone
    return net


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    rest: tuple[str, ...] = ()
    """The parameters without a layer rule."""
    shape: tuple[int, ...] = (4,)
    integers: bool = False


ATTENTION = tuple(
    f"encoder.self_attn.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
)

CASES = {
    "tanh": Case(lambda: _mlp(nn.Tanh())),
    "relu in place": Case(lambda: _mlp(nn.ReLU(inplace=True))),
    "one output": Case(lambda: _mlp(nn.GELU(), 1)),
    "no bias": Case(lambda: _mlp(nn.ReLU(), bias=False)),
    "one layer": Case(lambda: nn.Linear(4, 2)),
    "frozen": Case(_frozen),
    "vector output": Case(Residual),
    "branches": Case(Branches),
    "detached": Case(Detached),
    "in place": Case(InPlace),
    "flattened image": Case(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ELU()), shape=(2, 2)),
    "batch norm without parameters": Case(lambda: _batch_normed(False)),
    "batch norm": Case(lambda: _batch_normed(True)),
    "layer norm": Case(_normed),
    "convolutions": Case(_conv, shape=(2, 5, 5)),
    "sequence of vectors": Case(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Flatten()), shape=(3, 4)),
    "tied": Case(Tied, rest=("bias", "encoder.weight")),
    "shared weight": Case(Shared, rest=("first.weight",)),
    "called twice": Case(Twice),
    "two names": Case(Alias),
    "recurrent": Case(Recurrent, shape=(3, 2)),
    "constant of one row": Case(lambda: Placed(1), rest=("place.weight", "place.bias")),
    "constant of two rows": Case(lambda: Placed(2), rest=("place.weight", "place.bias")),
    "constant image": Case(PlacedImage, rest=("place.weight", "place.bias"), shape=(2, 5, 5)),
    "example by example": Case(OneByOne, rest=("layer.weight", "layer.bias")),
    "weight read beside its layer": Case(Penalised, rest=("layer.weight",)),
    "weight read without its layer": Case(Functional, rest=("layer.weight",)),
    "forward of its own": Case(_overridden, rest=("0.weight", "0.bias")),
    "parameter of its own": Case(Scaled, rest=("gain", "temperature")),
    "parametrised weight": Case(_parametrised, rest=("0.bias", "0.parametrizations.weight.original")),
    "group norm": Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, 2))),
    "embedding": Case(Words, shape=(3,), integers=True),
    "transformer": Case(Attention, rest=ATTENTION, shape=(3,), integers=True),
}


def build(name: str, n: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """The network, in eval mode and with random statistics in its BatchNorms, and n inputs."""
    case = CASES[name]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = case.make().to(dtype).eval()
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        x = torch.randint(7, (n, *case.shape)) if case.integers else torch.randn(n, *case.shape, dtype=dtype)
    return net, x
