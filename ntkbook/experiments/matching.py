"""LeNet3's symmetries: its channels and classes in another order are the same function, and another diagonal.

Two networks of different initialisations have no common order of channels, so that a comparison parameter by
parameter compares unlike things. `match` looks for the order in which they are most alike.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor]
SIZES = (6, 16)  # channels of `lenet3`'s convolutions


class Order(NamedTuple):
    """An order of the first convolution's channels, of the second's, and of the classes."""

    first: Int[Tensor, " 6"]
    second: Int[Tensor, " 16"]
    classes: Int[Tensor, " o"]


def reorder(v: Float[Tensor, " p"], order: Order) -> Float[Tensor, " p"]:
    """A vector like LeNet3's parameters, as that of the network with its channels and classes in this order."""
    one, two, three = _parts(v)
    one, two = one[order.first], two[order.second]
    weights, bias = two[:, :-1].view(SIZES[1], SIZES[0], 25)[:, order.first], two[:, -1]
    three = three[order.classes]
    last, last_bias = three[:, :-1].view(-1, SIZES[1], 16)[:, order.second], three[:, -1]
    pieces = (one[:, :-1], one[:, -1], weights, bias, last, last_bias)
    return torch.cat([piece.reshape(-1) for piece in pieces])


def identity(v: Float[Tensor, " p"]) -> Order:
    """The order that changes nothing."""
    return Order(torch.arange(SIZES[0]), torch.arange(SIZES[1]), torch.arange(len(_parts(v)[2])))


def shuffled(v: Float[Tensor, " p"], generator: torch.Generator) -> Order:
    """A random order."""
    first, second, classes = (torch.randperm(len(part), generator=generator) for part in identity(v))
    return Order(first, second, classes)


def match(
    a: Float[Tensor, " p"], b: Float[Tensor, " p"], starts: Sequence[Order] = (), sweeps: int = 50
) -> Float[Tensor, " p"]:
    """b in the order, of those found, whose cosine with a is the largest.

    One of the three orders at a time is the best for the others, an assignment problem, until none changes: a local
    optimum, from the order that b has and from `starts`; the best of them wins.
    """
    a, b = a.double().cpu(), b.double().cpu()
    found = [_ascend(a, reorder(b, start), sweeps) for start in (identity(b), *starts)]
    return max(found, key=lambda one: float(a @ one))


def _ascend(a: Tensor, b: Tensor, sweeps: int) -> Tensor:
    for _ in range(sweeps):
        before = b
        for which in range(3):
            gains = _gains(a, b, which)
            best = torch.from_numpy(linear_sum_assignment(gains.numpy(), maximize=True)[1])
            order = identity(b)._asdict()
            order[Order._fields[which]] = best
            b = reorder(b, Order(**order))
        if torch.equal(before, b):
            break
    return b


def _gains(a: Tensor, b: Tensor, which: int) -> Tensor:
    """(k, k): what channel or class j of b in the place of i adds to aᵀb, all else as it is."""
    (one, two, three), (one_b, two_b, three_b) = _parts(a), _parts(b)
    if which == 2:
        return three @ three_b.T

    def inputs(part: Tensor, channels: int) -> Tensor:
        return part[:, :-1].view(len(part), channels, -1).transpose(0, 1).reshape(channels, -1)

    if which == 0:
        return one @ one_b.T + inputs(two, SIZES[0]) @ inputs(two_b, SIZES[0]).T
    return two @ two_b.T + inputs(three, SIZES[1]) @ inputs(three_b, SIZES[1]).T


def _parts(v: Tensor) -> Parts:
    """The three layers, a row a channel or class: its weights, then its bias."""
    outputs = (len(v) - 6 * 26 - 16 * 151) // 257
    sizes = (6 * 25, 6, 16 * 150, 16, outputs * 256, outputs)
    if sum(sizes) != len(v) or outputs < 1:
        raise ValueError(f"v: expected one entry for each of lenet3's parameters, got {tuple(v.shape)}.")
    pieces = v.split(sizes)
    layers = [torch.cat([w.view(len(b), -1), b[:, None]], 1) for w, b in zip(pieces[::2], pieces[1::2])]
    return layers[0], layers[1], layers[2]
