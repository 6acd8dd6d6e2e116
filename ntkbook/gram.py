"""Gram matrices J J₂ᵀ of Jacobians, layer by layer, without a Jacobian where that is cheaper.

With the factors of `ntkbook.layers`, a layer's share for two examples with derivatives d, d′ and inputs a, a′ is

    Σ_tt′ (d_t · d′_t′)(a_t · a′_t′),

the ghost product: no object of the size of the parameters. With one position (a Linear on a vector) it is
(D Dᵀ) ∘ (A Aᵀ) for all examples. Where positions are many and the weight is small, rows of the Jacobian in that layer's
parameters, Σ_t d_t a_tᵀ, are cheaper: `prefers_ghost` counts. Rows are written once, to where they are multiplied.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ntkbook.finding import BrokenRule, Found, find_layers
from ntkbook.functional import FunctionalNetwork
from ntkbook.gradients import jacobian_rows
from ntkbook.layers import LayerFeatures, gradient_rows, layer_features

PASS = 16
"""How many multiply-adds of a matrix product take as long as one number of an elementwise pass, on most machines."""
TILE = 2**20
"""Numbers of the result that are worked on at a time, so that elementwise passes stay in the cache."""
LEAF = 128
"""Rows of the squares on the diagonal whose lower halves are computed too."""


class Factors(NamedTuple):
    """A layer's inputs and derivatives, for the ghost product."""

    inputs: Shaped[Tensor, "n g t i"]
    derivatives: Float[Tensor, "n o g t z"]


class Features(NamedTuple):
    """What examples contribute to a Gram matrix: layers' factors, and rows of the Jacobian in all other parameters,
    layer by layer; at the end those in parameters without a rule, which may be none."""

    factors: list[Factors]
    rows: list[Float[Tensor, "n o _"]]

    def part(self, start: int, stop: int) -> "Features":
        cut = [Factors(a[start:stop], d[start:stop]) for a, d in self.factors]
        return Features(cut, [rows[start:stop] for rows in self.rows])


class Shape(NamedTuple):
    """Of a layer's features: outputs, groups, positions, inputs, and derivatives; entries of a group's weight are
    columns · z, where an embedding's columns are its words and its inputs one number each."""

    o: int
    g: int
    t: int
    i: int
    z: int
    columns: int

    @property
    def rows(self) -> int:
        return self.g * self.z * self.columns


def feature_shape(feature: LayerFeatures) -> Shape:
    """The shape of a layer's features."""
    (_, g, t, i), (_, o, *_, z) = feature.inputs.shape, feature.derivatives.shape
    module = feature.layer.module
    return Shape(o, g, t, i, z, i if feature.inputs.is_floating_point() else module.num_embeddings)  # pyright: ignore[reportArgumentType]


def prefers_ghost(one: Shape, two: Shape, n: int, m: int) -> bool:
    """Whether the ghost product takes fewer multiply-adds than rows, per pair of n and m examples of these shapes.

    Rows have to be made first, once an example: that is shared between its pairs.
    """
    o, g, t, i, z, _ = one
    ghost = g * t * two.t * (i + o * o * (z + PASS))
    return ghost < o * o * one.rows + _making(one) / m + _making(two) / n


def prefers_ghost_alone(shape: Shape) -> bool:
    """The same for examples' products with themselves, an output at a time."""
    o, g, t, i, z, _ = shape
    return g * t * t * (i + o * (z + PASS)) < _making(shape)


def _making(shape: Shape) -> int:
    return shape.o * (shape.g * shape.t * shape.i * shape.z + PASS * shape.rows)


class FeatureMaker:
    """Makes the features of examples: their layers', where rules hold, and rows of the Jacobian for the rest.

    Args:
        lin: the network, and the parameters that count.
        x, x2: the examples whose Gram matrix is wanted; x alone for its diagonal.
        outputs, memory: how many outputs the network has, and bytes that autograd keeps of one example.
        output, trace: one output alone; all as one long row.
        rules: False for rows of the Jacobian alone.

    Raises:
        BrokenRule: as `layer_features`, here or when it is called; never without rules.
    """

    def __init__(
        self,
        lin: FunctionalNetwork,
        x: Tensor,
        x2: Tensor | None,
        outputs: int,
        memory: int,
        output: int | None,
        trace: bool = False,
        rules: bool = True,
    ) -> None:
        self.lin, self.output, self.trace = lin, output, trace
        self.found = find_layers(lin, x[:1]) if rules else Found([], list(lin.params))
        shapes = self._shapes(x)
        if x2 is None:
            self.ghosts = [prefers_ghost_alone(shape) for shape in shapes]
        else:
            others = shapes if x2.shape[1:] == x.shape[1:] else self._shapes(x2)
            self.ghosts = [prefers_ghost(one, two, len(x), len(x2)) for one, two in zip(shapes, others)]
        o = outputs if output is None else 1
        p = sum(lin.params[name].numel() for name in self.found.rest)
        self.outputs = 1 if trace else o
        self.columns = [shape.rows for shape, ghost in zip(shapes, self.ghosts) if not ghost]
        self.columns.append(p * (o if trace else 1))
        itemsize = lin.dtype.itemsize
        factors = [shape.g * shape.t * (shape.i + shape.o * shape.z) for shape in shapes]
        kept = sum(numbers for numbers, ghost in zip(factors, self.ghosts) if ghost) + self.outputs * sum(self.columns)
        self.kept = max(1, kept * itemsize)
        """Bytes of an example's features."""
        made = [0 if ghost else shape.o * shape.rows for shape, ghost in zip(shapes, self.ghosts)]
        largest = max([2 * numbers + rows for numbers, rows in zip(factors, made)], default=0)
        self.work = (3 + o) * memory + itemsize * max(largest, 3 * o * p)
        """Bytes an example takes while its features are made: activations, o + 1 derivatives of each, a layer's factors
        and rows; or torch's rows of the rest with copies."""
        self.tile = max([(s.o * s.t) ** 2 for s, ghost in zip(shapes, self.ghosts) if ghost], default=1)

    def _shapes(self, x: Tensor) -> list[Shape]:
        return [feature_shape(feature) for feature in self._layer_features(x[:1].detach())]

    def _layer_features(self, x: Tensor) -> Iterator[LayerFeatures]:
        for layer, a, d in layer_features(self.lin, self.found, x, self.output):
            yield LayerFeatures(layer, a, stacked(d) if self.trace else d)

    def __call__(self, x: Float[Tensor, "n ..."] | Shaped[Tensor, "n ..."], size: int) -> Features:
        """The features of x (n, ...), made of `size` examples at a time."""
        n = len(x)
        empty = next(iter(self.lin.params.values())).new_empty
        rows = [empty(n, self.outputs, columns) for columns in self.columns]
        factors: list[Factors] = []
        for start in range(0, n, size):
            part, here = x[start : start + size].detach(), slice(start, start + size)
            made, kept = iter(rows), iter(factors)  # which grows ahead of its iterator in the first chunk
            for feature, ghost in zip(self._layer_features(part), self.ghosts):
                if not ghost:
                    gradient_rows(feature, out=next(made)[here])
                    continue
                if start == 0:
                    factors.append(Factors(*(v.new_empty(n, *v.shape[1:]) for v in feature[1:])))
                inputs, derivatives = next(kept)
                if inputs.shape[1:] != feature.inputs.shape[1:]:  # as many calls as the values ask for
                    raise BrokenRule
                inputs[here], derivatives[here] = feature[1:]
            if self.found.rest:
                gradients = jacobian_rows(self.lin, self.found.rest, part, self.output)
                next(made)[here] = gradients.reshape(len(part), self.outputs, -1)
        return Features(factors, rows)


def gram(maker: FeatureMaker, x: Tensor, x2: Tensor | None, out: Float[Tensor, "r c"], size: int, room: int) -> None:
    """Add J(x) J(x2)ᵀ to `out`, of zeros: with `room` bytes for features, made of `size` examples at a time.

    Where the features of all examples do not fit, x is taken in parts, and those of x2 are made again for each part.
    """
    symmetric = x2 is None
    x2 = x if x2 is None else x2
    n, m, o = len(x), len(x2), maker.outputs
    products = _Products(out, maker.tile)
    fit = max(2, (room - products.nbytes) // maker.kept)
    narrow = 0 if symmetric and n <= fit else min(m, max(1, fit // 4))
    wide = min(n, fit - narrow)
    right = None
    for start in range(0, n, wide):
        left = maker(x[start : start + wide], size)
        here = slice(start * o, (start + wide) * o)
        if symmetric:
            products.square(left, out[here, here])
        for first in range(start + wide if symmetric else 0, m, max(1, narrow)):
            if right is None or symmetric or narrow < m:
                right = maker(x2[first : first + narrow], size)
            products.add(left, right, out[here, first * o : (first + narrow) * o])
    if symmetric:
        _mirror(out)


def gram_diagonal(features: Features) -> Float[Tensor, "n o"]:
    """The diagonal of J Jᵀ: every row's squared norm."""
    total = torch.stack([rows.square().sum(-1) for rows in features.rows]).sum(0)
    for a, d in features.factors:
        shared = _same(a, a).to(d.dtype) if not a.is_floating_point() else a @ a.mT
        total += ((d @ d.mT) * shared[:, None]).sum((2, 3, 4))
    return total


def differentiable_gram(left: Features, right: Features) -> Float[Tensor, "r c"]:
    """J₁ J₂ᵀ with a graph behind it, of rows in all parameters or of layers with one position."""
    total = left.rows[-1].flatten(0, 1) @ right.rows[-1].flatten(0, 1).T
    for (a, d), (a2, d2) in zip(left.factors, right.factors):
        (n, o, *_), (m, o2, *_) = d.shape, d2.shape
        products = d.reshape(n * o, -1) @ d2.reshape(m * o2, -1).T
        shared = a.flatten(1) @ a2.flatten(1).T
        total = total + (products.view(n, o, m, o2) * shared[:, None, :, None]).view_as(total)
    return total


def stacked(d: Float[Tensor, "n o g t z"]) -> Float[Tensor, "n 1 g t oz"]:
    """All outputs' derivatives as those of one, so that products are sums over outputs."""
    return d.permute(0, 2, 3, 1, 4).flatten(3)[:, None]


class _Products:
    """Adds products of features to tiles of a result, in buffers that are there once."""

    def __init__(self, out: Tensor, tile: int) -> None:
        self.buffers = [out.new_empty(max(min(TILE, out.numel()), tile)) for _ in range(2)]
        self.nbytes = sum(buffer.nbytes for buffer in self.buffers)

    def square(self, features: Features, out: Float[Tensor, "r r"]) -> None:
        """The upper half of J Jᵀ (and what the squares on the diagonal have below)."""
        n, o, _ = features.rows[-1].shape
        if n * o <= LEAF or n == 1:
            self.add(features, features, out)
            return
        half = _half(n)
        one, two = features.part(0, half), features.part(half, n)
        self.square(one, out[: half * o, : half * o])
        self.square(two, out[half * o :, half * o :])
        self.add(one, two, out[: half * o, half * o :])

    def add(self, left: Features, right: Features, out: Float[Tensor, "r c"]) -> None:
        (n, o, _), m = left.rows[-1].shape, len(right.rows[-1])
        if out.numel() > TILE and max(n, m) > 1:
            if n > m:
                half = _half(n)
                self.add(left.part(0, half), right, out[: half * o])
                self.add(left.part(half, n), right, out[half * o :])
            else:
                half = _half(m)
                self.add(left, right.part(0, half), out[:, : half * o])
                self.add(left, right.part(half, m), out[:, half * o :])
            return
        for one, two in zip(left.rows, right.rows):
            if one.shape[2]:
                out.addmm_(one.view(n * o, -1), two.view(m * o, -1).T)
        for one, two in zip(left.factors, right.factors):
            self._ghost(one, two, out.view(n, o, m, o))

    def _ghost(self, one: Factors, two: Factors, out: Float[Tensor, "n o m o"]) -> None:
        (n, o, g, t, z), (m, *_, t2, _) = one.derivatives.shape, two.derivatives.shape
        if n * m * o * o * t * t2 > len(self.buffers[0]):
            if n > m:
                for here in (slice(0, _half(n)), slice(_half(n), n)):
                    self._ghost(Factors(*(v[here] for v in one)), two, out[here])
            else:
                for here in (slice(0, _half(m)), slice(_half(m), m)):
                    self._ghost(one, Factors(*(v[here] for v in two)), out[:, :, here])
            return
        for group in range(g):
            (a, d), (a2, d2) = ((f.inputs[:, group], f.derivatives[:, :, group]) for f in (one, two))
            products = self._product(0, d.reshape(n * o * t, z), d2.reshape(m * o * t2, z))
            if a.is_floating_point():
                shared = self._product(1, a.reshape(n * t, -1), a2.reshape(m * t2, -1))
            else:
                shared = _same(a.reshape(n * t, 1), a2.reshape(m * t2, 1)).to(out.dtype)
            if t == t2 == 1:
                shared = shared[:, :, None].expand(n, m, o).reshape(n, 1, m * o)  # so that inner loops are long
                out.view(n, o, m * o).addcmul_(products.view(n, o, m * o), shared)
            else:
                products = products.view(n, o, t, m, o, t2).mul_(shared.view(n, 1, t, m, 1, t2))
                out += products.sum((2, 5))

    def _product(self, number: int, left: Float[Tensor, "a k"], right: Float[Tensor, "b k"]) -> Float[Tensor, "a b"]:
        a, b = len(left), len(right)
        return torch.mm(left, right.T, out=self.buffers[number][: a * b].view(a, b))


def _same(tokens: Tensor, others: Tensor) -> Tensor:
    """Products of unit vectors, given by the places of their ones, (..., t, 1) and (..., t2, 1)."""
    return tokens == others.mT


def _half(n: int) -> int:
    """The middle; a round number where that is near."""
    return (n // 2 + 32) // 64 * 64 if n >= 256 else n // 2


def _mirror(out: Float[Tensor, "r r"], block: int = 256) -> None:
    """Copy the upper half to the lower."""
    for start in range(0, len(out), block):
        stop = min(start + block, len(out))
        square = out[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        for first in range(stop, len(out), block):
            out[first : first + block, start:stop] = out[start:stop, first : first + block].T
