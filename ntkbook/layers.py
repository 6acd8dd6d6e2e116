"""Layers whose gradients are known products: which parameters they hold, and the factors of those gradients.

Every layer with a rule is brought to one form. Its calls in a forward pass make positions t, with inputs a_t and
outputs z_t, in g groups; the gradient of output f of the network in group γ's weight is

    ∂f/∂W_γ = Σ_t d_γt a_γtᵀ,    d_γt = ∂f/∂z_γt.

A Linear has one group, a convolution's inputs are the patches under its kernel, a normalisation has a group of one
number a channel, an embedding's inputs are unit vectors. A bias is one more column of W, on inputs of 1.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ntkbook.checks import explained
from ntkbook.finding import BrokenRule, Found, Layer, Seen, run
from ntkbook.functional import FunctionalNetwork
from ntkbook.gradients import Directions, agree, quiet, random, units


class LayerFeatures(NamedTuple):
    """The factors of a layer's gradients: inputs a, with a last column of 1 for a bias, and derivatives d.

    An embedding's inputs are the integers that it was given, for unit vectors: (n, 1, t, 1).
    """

    layer: Layer
    inputs: Shaped[Tensor, "n g t i"]
    derivatives: Float[Tensor, "n o g t z"]


def layer_features(
    lin: FunctionalNetwork,
    found: Found,
    x: Shaped[Tensor, "n ..."],
    output: int | None = None,
    directions: Directions | None = None,
) -> Iterator[LayerFeatures]:
    """Run the network on x and give the found layers' inputs and derivatives, of all outputs or of one.

    With `directions`, a function of the outputs f, the derivatives are those of the k products of f with its value.
    Differentiable in x if x requires a gradient and the layers are Linear.

    Raises:
        BrokenRule: a rule that held where the layers were found does not hold on x, as the network depends on values.
    """
    layers, rest = found
    if len(rest) == len(lin.params):
        return
    with explained("gram"), torch.enable_grad():
        outputs, calls, odd, read = run(lin, layers, x)
        own: dict[int, list[Seen]] = {id(layer.module): [] for layer in layers}
        for call in calls:
            own[id(call.module)].append(call)
        if odd or not read <= set(rest) or not all(own.values()):
            raise BrokenRule
        basis = directions(outputs.detach()) if directions else units(outputs, output)
        wanted = [call.shift for layer in layers for call in own[id(layer.module)]]
        derivatives = _derivatives(outputs, wanted, basis, layers, x.requires_grad)
    del outputs, calls, wanted
    derivatives.reverse()  # from the end, to let go of each when its layer is done
    for layer in layers:
        module, inputs = layer.module, [call.input for call in own.pop(id(layer.module))]
        d = _joined([_in_groups(module, derivatives.pop()) for _ in inputs], 3)
        if layer.weight:
            yield LayerFeatures(layer, _joined([_inputs(module, a, layer.bias) for a in inputs], 2), d)
        else:  # the bias alone: one position, whose derivative is the sum
            yield LayerFeatures(layer, d.new_ones(len(d), 1, 1, 1), d.sum(3).flatten(2)[:, :, None, None])


def _derivatives(
    f: Tensor, wanted: list[Tensor], basis: Float[Tensor, "k n o"], layers: list[Layer], differentiable: bool
) -> list[Float[Tensor, "n k *z"]]:
    """Those of the k products of f with the basis in what is wanted, (n, *z) each.

    With one more pass, for random products: a row that is not its example's has another factor in it than its own.
    """
    if not wanted or not f.requires_grad:
        return [z.new_zeros(len(z), len(basis), *z.shape[1:]) for z in wanted]
    one, two = random(basis[:, 0, 0]), random(basis[0, :, 0])
    u = torch.einsum("k,kno->no", one, basis) * two[:, None]
    mixed = torch.autograd.grad(f, wanted, u, retain_graph=True, materialize_grads=True) if u.numel() > 1 else None
    batched = differentiable or all(isinstance(layer.module, nn.Linear) for layer in layers)
    found = _all_at_once(f, wanted, basis, differentiable) if batched else _one_by_one(f, wanted, basis)
    if mixed is None:  # one row, alone
        return found
    with torch.no_grad():  # a number an example and product is enough to compare
        some = [random(d[0, 0].flatten()) for d in found]
        expected = [two * (_times(d, r) @ one) for d, r in zip(found, some)]
        if not agree(expected, [d.flatten(1) @ r for d, r in zip(mixed, some)], torch.inf):
            raise BrokenRule
    return found


def _times(d: Float[Tensor, "n k *z"], r: Float[Tensor, " _"]) -> Float[Tensor, "n k"]:
    """d · r for flat r, without a copy of d."""
    return d.flatten(2) @ r if d.is_contiguous() else (d.transpose(0, 1).flatten(2) @ r).T


def _all_at_once(
    f: Tensor, wanted: list[Tensor], basis: Float[Tensor, "k n o"], differentiable: bool
) -> list[Float[Tensor, "n k *z"]]:
    """The derivatives of the k products of f with the basis in what is wanted, (n, *z) each, by one pass backward."""
    k = len(basis)
    options = {"is_grads_batched": k > 1, "create_graph": differentiable, "allow_unused": True}
    with quiet() if k > 1 else nullcontext():
        found = torch.autograd.grad(f, wanted, basis if k > 1 else basis[0], **options)
    return [
        (z.new_zeros(k, *z.shape) if d is None else d.reshape(k, *z.shape)).transpose(0, 1)
        for z, d in zip(wanted, found)
    ]


def _one_by_one(f: Tensor, wanted: list[Tensor], basis: Float[Tensor, "k n o"]) -> list[Float[Tensor, "n k *z"]]:
    """The same by k passes: torch's batched derivatives of convolutions are k passes as well, and copies."""
    found = [z.new_empty(len(z), len(basis), *z.shape[1:]) for z in wanted]
    for row, u in enumerate(basis):
        for d, one in zip(found, torch.autograd.grad(f, wanted, u, retain_graph=True, allow_unused=True)):
            d[:, row] = 0 if one is None else one
    return found


def gradient_rows(feature: LayerFeatures, out: Float[Tensor, "n o _"] | None = None) -> Float[Tensor, "n o g z i"]:
    """Every example's and output's gradient Σ_t d_t a_tᵀ, with a last column for the bias where there is one.

    `out`: where to write them, flat and contiguous.
    """
    _, a, d = feature
    n, o, g, t, z = d.shape
    if isinstance(feature.layer.module, nn.Embedding) and feature.layer.weight:
        rows = d.new_zeros(n * o, feature.layer.module.num_embeddings, z)
        tokens = a.expand(n, o, t, z).reshape(n * o, t, z)
        rows = rows.scatter_add_(1, tokens, d.reshape(n * o, t, z)).view(n, o, 1, -1, z).transpose(3, 4)
    else:
        left, right = d.permute(0, 2, 1, 4, 3).reshape(n * g, o * z, t), a.reshape(n * g, t, -1)
        if g == 1 and out is not None:
            return torch.bmm(left, right, out=out.view(n, o * z, -1)).view(n, o, g, z, -1)
        rows = torch.bmm(left, right).view(n, g, o, z, -1).transpose(1, 2)
    return rows if out is None else out.view(rows.shape).copy_(rows)


# ------------------------------------------------------------------ the modules with a rule


def _inputs(module: nn.Module, a: Tensor, bias: bool) -> Shaped[Tensor, "n g t i"]:
    n = len(a)
    if isinstance(module, nn.Embedding):
        return a.reshape(n, 1, -1, 1)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        patches = _patches(module, a)
        return F.pad(patches.view(n, module.groups, -1, patches.shape[-1]), (0, 0, 0, int(bias)), value=1.0).mT
    if isinstance(module, nn.Linear):
        a = a.reshape(n, 1, -1, module.in_features)
    elif isinstance(module, nn.LayerNorm):
        a = a.reshape(n, -1, math.prod(module.normalized_shape)).mT[..., None]
    else:
        a = a.reshape(*a.shape[:2], -1, 1)
    return F.pad(a, (0, int(bias)), value=1.0)


def _patches(module: nn.Conv1d | nn.Conv2d, a: Tensor) -> Float[Tensor, "n i t"]:
    """What the kernel sees at every place: (channels · kernel) numbers."""
    padding = module._reversed_padding_repeated_twice  # also of padding="same"
    if any(padding):
        a = F.pad(a, padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if isinstance(module, nn.Conv1d):
        a, kernel, dilation, stride = a[:, :, None], (1, *kernel), (1, *dilation), (1, *stride)
    return F.unfold(a, kernel, dilation, 0, stride)  # pyright: ignore[reportArgumentType]


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _in_groups(module: nn.Module, d: Float[Tensor, "n o *z"]) -> Float[Tensor, "n o g t z"]:
    n, o, *_ = d.shape
    if isinstance(module, nn.Linear | nn.Embedding):
        return d.reshape(n, o, 1, -1, d.shape[-1])
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return d.reshape(n, o, module.groups, module.out_channels // module.groups, -1).mT
    if isinstance(module, nn.LayerNorm):
        return d.reshape(n, o, -1, math.prod(module.normalized_shape)).mT[..., None]
    return d.reshape(n, o, d.shape[2], -1, 1)
