"""Layers whose gradients are known products: which parameters they hold, and the factors of those gradients.

Every layer with a rule is brought to one form. Its calls in a forward pass make positions t, with inputs a_t and
outputs z_t, in g groups; the gradient of output f of the network in group γ's weight is

    ∂f/∂W_γ = Σ_t d_γt a_γtᵀ,    d_γt = ∂f/∂z_γt.

A Linear has one group, a convolution's inputs are the patches under its kernel, a normalisation has a group of one
number a channel, an embedding's inputs are unit vectors. A bias is one more column of W, on inputs of 1.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import jacrev, vmap

from ntkbook.checks import CALLING, explained

Call = Callable[[Mapping[str, Tensor], Tensor], Float[Tensor, "n o"]]
DIMENSIONS: Mapping[type[nn.Module], tuple[int, ...]] = {
    nn.Linear: tuple(range(2, 9)),
    nn.Conv1d: (3,),
    nn.Conv2d: (4,),
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.GroupNorm: tuple(range(2, 9)),
    nn.LayerNorm: tuple(range(2, 9)),
    nn.Embedding: tuple(range(1, 9)),
}
"""The modules with a rule, and how many dimensions their inputs may have, the batch's among them."""


class Layer(NamedTuple):
    """A module with a rule, its name in the network, and which of its parameters go by the rule."""

    module: nn.Module
    name: str
    weight: bool
    bias: bool

    @property
    def parameters(self) -> list[str]:
        """Their names in the network."""
        kinds = [kind for kind, used in (("weight", self.weight), ("bias", self.bias)) if used]
        return [f"{self.name}.{kind}" if self.name else kind for kind in kinds]


class LayerFeatures(NamedTuple):
    """The factors of a layer's gradients: inputs a, with a last column of 1 for a bias, and derivatives d.

    An embedding's inputs are the integers that it was given, for unit vectors: (n, 1, t, 1).
    """

    layer: Layer
    inputs: Shaped[Tensor, "n g t i"]
    derivatives: Float[Tensor, "n o g t z"]


def find_layers(
    net: nn.Module, call: Call, params: Mapping[str, Tensor], example: Tensor
) -> tuple[list[Layer], list[str]]:
    """The layers whose rules hold, each for its weight, its bias or both, and the names of parameters without a rule.

    A rule holds for a parameter that enters the outputs through plain calls of its own module and in no other way: read
    off the autograd graph of `call`, from which those calls' parameters are cut. A plain call is on one input with the
    batch's examples in their order, which nothing overwrites. All is looked at twice, for the example (1, ...) alone
    and beside itself: an input that does not depend on the batch has as many rows as one of the two, not as both.
    Parameters that the outputs do not depend on are in neither list.
    """
    layers = []
    for name, module in net.named_modules():
        weight, bias = (f"{name}.{kind}".lstrip(".") in params for kind in ("weight", "bias"))
        with CALLING:  # hooks of another thread's call would count for the user's
            if (weight or bias) and _has_rule(module):
                layers.append(Layer(module, name, weight, bias))
    rest: set[str] = set()
    called: set[int] = set()
    for x in (example, torch.cat([example] * 2)):
        read, odd, called = _look(call, params, layers, x)
        rest |= read.union(*(layer.parameters for layer in layers if id(layer.module) in odd))
        layers = [layer for layer in layers if id(layer.module) not in odd]
    layers = [
        layer._replace(
            weight=layer.weight and layer.parameters[0] not in rest,
            bias=layer.bias and layer.parameters[-1] not in rest,
        )
        for layer in layers
        if id(layer.module) in called
    ]
    return [layer for layer in layers if layer.parameters], [name for name in params if name in rest]


def _look(
    call: Call, params: Mapping[str, Tensor], layers: list[Layer], x: Tensor
) -> tuple[set[str], set[int], set[int]]:
    """On x (n, ...): the parameters that the outputs read beside the layers' own calls; of the layers' modules, those
    that are called in another way than their rules are for; and those that are called."""
    own = {id(layer.module): [name.rpartition(".")[2] for name in layer.parameters] for layer in layers}
    hidden: dict[str, Tensor] = {}
    calls: list[tuple[int, Tensor, int, Tensor]] = []
    odd: set[int] = set()

    def cut(module: nn.Module, args: tuple) -> None:
        for kind in own[id(module)]:
            hidden[kind] = module._parameters[kind]  # pyright: ignore[reportArgumentType]
            module._parameters[kind] = hidden[kind].detach()  # pyright: ignore[reportArgumentType]

    def note(module: nn.Module, args: tuple, z: Tensor) -> Tensor:
        for kind in own[id(module)]:
            module._parameters[kind] = hidden[kind]  # pyright: ignore[reportArgumentType]
        a = args[0] if len(args) == 1 else z.new_zeros(())
        if a.ndim not in DIMENSIONS[type(module)] or not len(a) == len(z) == len(x) or z.dtype != dtype:
            odd.add(id(module))
        shift = torch.zeros_like(z, requires_grad=True)
        calls.append((id(module), a, a._version, shift))
        return z + shift

    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    dtype = next(iter(leaves.values())).dtype
    modules = [layer.module for layer in layers]
    with explained("gram"), torch.enable_grad():
        with _hooks(modules, note, cut):
            outputs = call(leaves, x)
        if calls and outputs.requires_grad:  # the first example depends on the first row of a plain call alone
            weights = torch.arange(1, outputs.shape[1] + 1, dtype=outputs.dtype, device=outputs.device).cos()
            shifts = [shift for *_, shift in calls]
            derivatives = torch.autograd.grad((outputs[0] * weights).sum(), shifts, allow_unused=True)
            odd.update(call[0] for call, d in zip(calls, derivatives) if d is not None and d.ndim and d[1:].any())
    odd.update(module for module, a, version, _ in calls if a._version != version)
    read = _leaves(outputs)
    return {name for name in leaves if id(leaves[name]) in read}, odd, {module for module, *_ in calls}


def layer_features(
    call: Call,
    layers: list[Layer],
    params: Mapping[str, Tensor],
    x: Tensor,
    output: int | None = None,
    directions: Callable[[Float[Tensor, "n o"]], Float[Tensor, "k n o"]] | None = None,
) -> Iterator[LayerFeatures]:
    """Run the network on x (n, ...) and give each layer's inputs and derivatives, of all outputs or of one.

    With `directions`, a function of the outputs f, the derivatives are those of the k products of f with its value.
    Differentiable in x if x requires a gradient and the layers are Linear.
    """
    differentiable = x.requires_grad and torch.is_grad_enabled()
    inputs: dict[int, list[Tensor]] = {id(layer.module): [] for layer in layers}
    shifts: dict[int, list[Tensor]] = {id(layer.module): [] for layer in layers}

    def tap(module: nn.Module, args: tuple, z: Tensor) -> Tensor:
        # df/dz is the derivative by a shift of z by zero: right also where an in-place activation overwrites z.
        a, shift = args[0] if differentiable else args[0].detach(), z.new_zeros(()).expand(z.shape).requires_grad_()
        inputs[id(module)].append(_normalised(module, a))  # now, while its running statistics are the given ones
        shifts[id(module)].append(shift)
        padding = module.padding_idx if isinstance(module, nn.Embedding) else None
        return z + (shift if padding is None else shift * (a != padding)[..., None])

    with explained("gram"), torch.enable_grad(), _hooks([layer.module for layer in layers], tap):
        f = call(params, x)
        basis = directions(f.detach()) if directions else _units(f, output)
        k = len(basis)
        wanted = [shift for layer in layers for shift in shifts[id(layer.module)]]
        batched = differentiable or all(isinstance(layer.module, nn.Linear) for layer in layers)
        if f.requires_grad:
            derivatives = _all_at_once(f, wanted, basis, differentiable) if batched else _one_by_one(f, wanted, basis)
        else:
            derivatives = [z.new_zeros(len(z), k, *z.shape[1:]) for z in wanted]
    del f
    derivatives.reverse()  # from the end, to let go of each when its layer is done
    for layer in layers:
        module = layer.module
        parts = []
        for _ in shifts.pop(id(module)):
            parts.append(_derivatives(module, derivatives.pop()))
        d, calls = _joined(parts, 3), inputs.pop(id(module))
        if layer.weight:
            yield LayerFeatures(layer, _joined([_inputs(module, a, layer.bias) for a in calls], 2), d)
        else:  # the bias alone: one position, whose derivative is the sum
            yield LayerFeatures(layer, d.new_ones(len(d), 1, 1, 1), d.sum(3).flatten(2)[:, :, None, None])


def _all_at_once(
    f: Tensor, wanted: list[Tensor], basis: Float[Tensor, "k n o"], differentiable: bool
) -> list[Float[Tensor, "n k *z"]]:
    """The derivatives of the k products of f with the basis in what is wanted, (n, *z) each, by one pass backward."""
    k = len(basis)
    options = {"is_grads_batched": k > 1, "create_graph": differentiable, "allow_unused": True}
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


def jacobian_rows(
    call: Call, params: Mapping[str, Tensor], constants: Mapping[str, Tensor], x: Tensor, output: int | None = None
) -> Float[Tensor, "n o p"]:
    """Jacobians in `params` of any network, at the other parameters `constants`, by torch.func."""
    select = slice(None) if output is None else slice(output, output + 1)

    def rows(example: Tensor) -> Tensor:
        parts = jacrev(lambda p: call({**constants, **p}, example[None])[0, select])(dict(params))
        return torch.cat([part.reshape(len(part), -1) for part in parts.values()], dim=1)

    with explained("jacobian"), torch.no_grad():
        return vmap(rows)(x)


# ------------------------------------------------------------------ the modules with a rule


def _has_rule(module: nn.Module) -> bool:
    touched = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    odd = isinstance(module, nn.Embedding) and (
        module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    )
    return type(module) in DIMENSIONS and not touched and not odd


def _normalised(module: nn.Module, a: Tensor) -> Tensor:
    """What a normalisation multiplies its weight with; other modules' inputs as they are."""
    with torch.no_grad():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            return F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(a, module.num_groups, eps=module.eps)
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(a, module.normalized_shape, eps=module.eps)
    return a


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


def _derivatives(module: nn.Module, d: Float[Tensor, "n o *z"]) -> Float[Tensor, "n o g t z"]:
    n, o, *_ = d.shape
    if isinstance(module, nn.Linear | nn.Embedding):
        return d.reshape(n, o, 1, -1, d.shape[-1])
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return d.reshape(n, o, module.groups, module.out_channels // module.groups, -1).mT
    if isinstance(module, nn.LayerNorm):
        return d.reshape(n, o, -1, math.prod(module.normalized_shape)).mT[..., None]
    return d.reshape(n, o, d.shape[2], -1, 1)


# ------------------------------------------------------------------ hooks and graphs


def _units(f: Float[Tensor, "n o"], output: int | None) -> Float[Tensor, "k n o"]:
    """Every output alone, or one."""
    units = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)[:, None].expand(-1, len(f), -1)
    return units if output is None else units[output, None]


@contextmanager
def _hooks(modules: list[nn.Module], after: Callable, before: Callable | None = None) -> Iterator[None]:
    handles = [module.register_forward_hook(after) for module in modules]
    handles += [module.register_forward_pre_hook(before) for module in modules if before is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _leaves(outputs: Tensor) -> set[int]:
    """The ids of the leaves in the graph of `outputs`."""
    leaves: set[int] = set()
    seen, stack = set(), [outputs.grad_fn] if outputs.grad_fn is not None else []
    while stack:
        for parent, _ in stack.pop().next_functions:
            if parent is None or parent in seen:
                continue
            seen.add(parent)
            stack.append(parent)
            leaves.add(id(getattr(parent, "variable", None)))
    return leaves
