"""Which layers of a network have a rule for their gradients, and what a run of the network shows of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ntkbook.checks import CALLING, explained
from ntkbook.functional import FunctionalNetwork
from ntkbook.gradients import leaves_of

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


class Found(NamedTuple):
    """The layers whose rules hold, each for its weight, its bias or both; the names of parameters without a rule.

    Parameters that the outputs do not depend on are in neither list.
    """

    layers: list[Layer]
    rest: list[str]


class Seen(NamedTuple):
    """A call of a layer's module: its input, as the weight multiplies it, and a shift by zero of what came out."""

    module: nn.Module
    input: Tensor
    shift: Tensor


class Run(NamedTuple):
    """A run of a network: its outputs, from which the parameters of the layers' own calls are cut, and those calls.

    odd: ids of modules that were called in another way than their rules are for: not on one input with the batch's
    examples in their order, or on one that was overwritten afterwards.
    read: the parameters that the outputs depend on beside the layers' own calls, read off the autograd graph.
    """

    outputs: Float[Tensor, "n o"]
    calls: list[Seen]
    odd: set[int]
    read: set[str]


class BrokenRule(Exception):
    """Examples take another way through the network than the one at which its layers were looked at."""


def find_layers(lin: FunctionalNetwork, example: Shaped[Tensor, "1 ..."]) -> Found:
    """Which parameters of a network go by a rule.

    A rule holds for a parameter that enters the outputs through plain calls of its own module and in no other way. All
    is looked at twice, for the example alone and beside itself: an input that does not depend on the batch has as many
    rows as one of the two, not as both. What the network does on other examples, `layer_features` looks at.
    """
    example = example.detach()
    layers = []
    for name, module in lin.net.named_modules():
        weight, bias = (f"{name}.{kind}".lstrip(".") in lin.params for kind in ("weight", "bias"))
        with CALLING:  # hooks of another thread's call would count for the user's
            if (weight or bias) and _has_rule(module):
                layers.append(Layer(module, name, weight, bias))
    rest: set[str] = set()
    called: set[int] = set()
    for x in (example, torch.cat([example] * 2)):
        with explained("gram"), torch.enable_grad():
            seen = run(lin, layers, x)
            odd = seen.odd | _mixed(seen)
        rest |= seen.read.union(*(layer.parameters for layer in layers if id(layer.module) in odd))
        layers = [layer for layer in layers if id(layer.module) not in odd]
        called = {id(call.module) for call in seen.calls}
    layers = [
        layer._replace(
            weight=layer.weight and layer.parameters[0] not in rest,
            bias=layer.bias and layer.parameters[-1] not in rest,
        )
        for layer in layers
        if id(layer.module) in called
    ]
    return Found([layer for layer in layers if layer.parameters], [name for name in lin.params if name in rest])


def run(lin: FunctionalNetwork, layers: list[Layer], x: Shaped[Tensor, "n ..."]) -> Run:
    """Run the network on x, with gradients on; the layers' inputs have graphs if x requires a gradient."""
    own = {id(layer.module): [name.rpartition(".")[2] for name in layer.parameters] for layer in layers}
    hidden: dict[str, Tensor] = {}
    calls: list[Seen] = []
    versions: list[tuple[int, Tensor, int]] = []
    odd: set[int] = set()
    leaves = leaves_of(lin.params)

    def cut(module: nn.Module, args: tuple) -> None:
        for kind in own[id(module)]:
            hidden[kind] = module._parameters[kind]  # pyright: ignore[reportArgumentType]
            module._parameters[kind] = hidden[kind].detach()  # pyright: ignore[reportArgumentType]

    def note(module: nn.Module, args: tuple, z: Tensor) -> Tensor:
        for kind in own[id(module)]:
            module._parameters[kind] = hidden[kind]  # pyright: ignore[reportArgumentType]
        # df/dz is the derivative by a shift of z by zero: right also where an in-place activation overwrites z.
        shift = z.new_zeros(()).expand(z.shape).requires_grad_()
        a = args[0] if len(args) == 1 else z.new_zeros(())
        if a.ndim not in DIMENSIONS[type(module)] or not len(a) == len(z) == len(x) or z.dtype != lin.dtype:
            odd.add(id(module))
            calls.append(Seen(module, a, shift))
            return z + shift
        versions.append((id(module), a, a._version))
        kept = a if x.requires_grad else a.detach()
        calls.append(Seen(module, _normalised(module, kept), shift))
        padding = module.padding_idx if isinstance(module, nn.Embedding) else None
        return z + (shift if padding is None else shift * (a != padding)[..., None])

    with _hooks([layer.module for layer in layers], note, cut):
        outputs = lin._call(leaves, x)
    odd.update(module for module, a, version in versions if a._version != version)
    graph = _leaves(outputs)
    return Run(outputs, calls, odd, {name for name in leaves if id(leaves[name]) in graph})


# ------------------------------------------------------------------ inside


def _has_rule(module: nn.Module) -> bool:
    touched = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    odd = isinstance(module, nn.Embedding) and (
        module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    )
    return type(module) in DIMENSIONS and not touched and not odd


def _mixed(seen: Run) -> set[int]:
    """The modules with a call of which the first example depends on another row than the first."""
    f, shifts = seen.outputs, [call.shift for call in seen.calls]
    if not shifts or not f.requires_grad:
        return set()
    weights = torch.arange(1, f.shape[1] + 1, dtype=f.dtype, device=f.device).cos()
    derivatives = torch.autograd.grad((f[0] * weights).sum(), shifts, allow_unused=True)
    return {id(call.module) for call, d in zip(seen.calls, derivatives) if d is not None and d.ndim and d[1:].any()}


def _normalised(module: nn.Module, a: Tensor) -> Tensor:
    """What a normalisation multiplies its weight with; other modules' inputs as they are.

    Taken during the call, while the running statistics are those of the linearisation.
    """
    with torch.no_grad():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            return F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(a, module.num_groups, eps=module.eps)
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(a, module.normalized_shape, eps=module.eps)
    return a


@contextmanager
def _hooks(modules: list[nn.Module], after: Callable, before: Callable) -> Iterator[None]:
    handles = [module.register_forward_hook(after) for module in modules]
    handles += [module.register_forward_pre_hook(before) for module in modules]
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
