"""Products of a Jacobian with blocks of vectors, layer by layer, and what they and a Gram matrix cost.

With the factors of `ntkbook.layers`, inputs a and derivatives d, an example's row of J for output c is Σ_t d_ct a_tᵀ in
a layer's weight. So a block of k vectors takes one run of the network a chunk, o passes backward, and matrix products:

    J V:   B_t = V a_t, all columns at once, then Σ_t d_ct · B_t,
    Jᵀ U:  E_t = Σ_c u_c d_ct, then Σ_t E_t a_tᵀ, summed over examples, all columns at once.

torch.func's jvp and vjp go through the network with every column instead, at twice as many multiply-adds each.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from ntkbook.finding import find_layers
from ntkbook.functional import FunctionalNetwork
from ntkbook.gram import PASS, Shape, feature_shape, prefers_ghost
from ntkbook.layers import LayerFeatures, layer_features

BLOCK = 2**21
"""Numbers of B or E that are made at a time."""


class LayerBlocks:
    """The layers of a linearisation as its products with blocks of vectors use them, and counts of multiply-adds.

    Args:
        lin: the linearisation; x: inputs (n, ...), of which the first is looked at.
        outputs, memory: how many outputs the network has, and bytes that autograd keeps of one example.
    """

    def __init__(self, lin: FunctionalNetwork, x: Tensor, outputs: int, memory: int) -> None:
        self.lin, self.outputs = lin, outputs
        self.found = find_layers(lin, x[:1])
        self.shapes = [feature_shape(feature) for feature in self._features(x[:1])]
        starts, start = {}, 0
        for name, value in lin.params.items():
            starts[name] = slice(start, start + value.numel())
            start += value.numel()
        self.places = [[starts[name] for name in layer.parameters] for layer in self.found.layers]
        numbers = [shape.g * shape.t * (shape.i + shape.o * shape.z) for shape in self.shapes]
        self.work = 2 * (2 + outputs) * memory + 2 * lin.dtype.itemsize * max(numbers, default=0)
        """Bytes an example takes beside its share of B or E."""
        self.forward = sum(shape.g * shape.t * shape.i * shape.z for shape in self.shapes)
        self.forward += sum(lin.params[name].numel() for name in self.found.rest)
        """Multiply-adds of an example's run of the network; a parameter without a rule counts as used once."""

    # ------------------------------------------------------------------ what things cost, in multiply-adds

    def prefers_rule(self, k: int) -> bool:
        """Whether o passes backward, shared by k columns, and one product with each weight a column take fewer
        multiply-adds than the passes of torch.func, which are two such products. Every parameter must have a rule."""
        return not self.found.rest and self.outputs * (self.forward + k * self._derivatives) < k * self.forward

    def product_cost(self, k: int) -> int:
        """Of J V or Jᵀ U, an example."""
        if self.prefers_rule(k):
            once = (1 + self.outputs) * self.forward
            return once + k * (self.forward + (self.outputs + PASS) * self._derivatives)
        return (1 + 2 * k) * self.forward + k * PASS * self._derivatives

    def gram_cost(self, n: int, m: int, symmetric: bool) -> int:
        """Of J J₂ᵀ between n and m examples of the same shape: passes through the network, then all pairs."""
        making = (n if symmetric else n + m) * (1 + self.outputs) * self.forward
        o2 = self.outputs**2
        pairs = o2 * sum(self.lin.params[name].numel() for name in self.found.rest)
        for shape in self.shapes:
            if prefers_ghost(shape, shape, n, m):
                pairs += shape.g * shape.t**2 * (shape.i + o2 * (shape.z + PASS))
            else:
                pairs += o2 * shape.rows
                making += (n if symmetric else n + m) * shape.o * shape.g * shape.t * shape.i * shape.z
        return making + (n * (n + 1) // 2 if symmetric else n * m) * pairs

    @property
    def _derivatives(self) -> int:
        """An example's derivatives, of one output."""
        return sum(shape.g * shape.t * shape.z for shape in self.shapes)

    # ------------------------------------------------------------------ the products

    def jvp(self, x: Tensor, v: Float[Tensor, "p k"], size: int) -> Float[Tensor, "n o k"]:
        """J(x) V, `size` examples at a time."""
        packed = [pack(shape, v, places) for shape, places in zip(self.shapes, self.places)]
        out = v.new_zeros(len(x), self.outputs, v.shape[1])
        for part, product in zip(x.split(size), out.split(size)):
            layer_jvp(self._features(part), packed, product)
        return out

    def vjp(self, x: Tensor, u: Float[Tensor, "n o k"], size: int) -> Float[Tensor, "p k"]:
        """J(x)ᵀ U, `size` examples at a time."""
        k = u.shape[2]
        totals = [u.new_zeros(packed_shape(shape, k)) for shape in self.shapes]
        for part, weights in zip(x.split(size), u.split(size)):
            layer_vjp(self._features(part), weights, totals)
        total = u.new_zeros(k, self.lin.num_params).T
        for shape, places in zip(reversed(self.shapes), reversed(self.places)):
            unpack(shape, totals.pop(), total, places)
        return total

    def _features(self, x: Tensor) -> Iterable[LayerFeatures]:
        return layer_features(self.lin, self.found, x.detach())


def layer_jvp(
    features: Iterable[LayerFeatures], packed: list[Float[Tensor, "_ _ _"]], out: Float[Tensor, "n o k"]
) -> None:
    """Add J V to `out`, with V packed, layer by layer; a group of columns at a time."""
    for (_, a, d), v in zip(features, packed):
        n, _, g, t, z = d.shape
        inputs = _rows(a)
        for here, rows in _groups(n * g * t * z, out.shape[2], z):
            b = inputs @ v[:, rows].mT if a.is_floating_point() else v[:, rows].mT[:, a.flatten()]
            out[..., here] += torch.einsum("ncgtz,gntkz->nck", d, b.view(g, n, t, -1, z))


def layer_vjp(
    features: Iterable[LayerFeatures], u: Float[Tensor, "n o k"], totals: list[Float[Tensor, "_ _ _"]]
) -> None:
    """Add Jᵀ U, packed, to `totals`, layer by layer; a group of columns at a time."""
    for (_, a, d), total in zip(features, totals):
        n, _, g, t, z = d.shape
        inputs = _rows(a)
        for here, rows in _groups(n * g * t * z, u.shape[2], z):
            e = torch.einsum("nck,ncgtz->gntkz", u[..., here], d).reshape(g, n * t, -1)
            if a.is_floating_point():
                total[:, rows].baddbmm_(e.mT, inputs)
            else:
                total[:, rows].mT.index_add_(1, a.flatten(), e)


# ------------------------------------------------------------------ vectors as the layers want them
#
# In (g, k·z, i): every column's weights of a group, one below the other, so that one matrix product serves all columns;
# a bias is the last of the i, and an embedding's i are its words.


def packed_shape(shape: Shape, k: int) -> tuple[int, int, int]:
    return shape.g, k * shape.z, shape.columns


def pack(shape: Shape, v: Float[Tensor, "p k"], places: list[slice]) -> Float[Tensor, "_ _ _"]:
    """A layer's part of V."""
    packed = v.new_empty(packed_shape(shape, v.shape[1]))
    for part, flat in _parts(shape, packed, v, places):
        part.copy_(flat)
    return packed


def unpack(shape: Shape, packed: Float[Tensor, "_ _ _"], v: Float[Tensor, "p k"], places: list[slice]) -> None:
    """Write a layer's part of V."""
    for part, flat in _parts(shape, packed, v, places):
        flat.copy_(part)


def _parts(shape: Shape, packed: Tensor, v: Tensor, places: list[slice]) -> Iterable[tuple[Tensor, Tensor]]:
    """The weight and the bias, packed and in V, in the same order: views (g, k, z, i)."""
    k, embeds = v.shape[1], shape.columns != shape.i
    packed, start = packed.view(shape.g, k, shape.z, shape.columns), 0
    for place in places:
        flat = v[place].T
        i = flat.shape[1] // (shape.g * shape.z)
        flat = flat.unflatten(1, (1, i, shape.z)).mT if embeds else flat.unflatten(1, (shape.g, shape.z, i))
        yield packed[..., start : start + i], flat.transpose(0, 1)
        start += i


# ------------------------------------------------------------------ inside


def _rows(a: Tensor) -> Tensor:
    """Inputs (n, g, t, i) as (g, n·t, i)."""
    return a.transpose(0, 1).flatten(1, 2)


def _groups(numbers: int, k: int, z: int) -> Iterable[tuple[slice, slice]]:
    """Groups of the k columns, and of their rows in a packed layer, if each takes so many numbers of B or E."""
    size = max(1, BLOCK // numbers)
    for start in range(0, k, size):
        stop = min(start + size, k)
        yield slice(start, stop), slice(start * z, stop * z)
