"""Gram matrices of Jacobians, layer by layer, without a Jacobian.

A Linear layer that runs once per example, on a vector a and with output z = W a + b, gives output c of the
network the derivatives d f_c/dW = d aᵀ and d f_c/db = d, where d = d f_c/dz. Its share of J Jᵀ is therefore

    (D Dᵀ) ∘ (A Aᵀ + 1),

with A (n, in) the layer's inputs, D (n·o, out) the derivatives of the outputs, A Aᵀ repeated over output blocks, and
the 1 only with a bias: O(n²(o² out + in)) operations, and no object of the size of the parameters.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

Call = Callable[[Mapping[str, Tensor], Tensor], Float[Tensor, "n o"]]
LINEAR: Mapping[type[nn.Module], int] = {nn.Linear: 2}
"""The modules with a rule for Gram matrices, and how many dimensions their inputs have under it."""


class Layer(NamedTuple):
    """A Linear layer (or a convolution, for `similarity`), and which of its parameters are linearised in."""

    module: nn.Linear | nn.Conv2d
    weight: bool
    bias: bool


class LayerFeatures(NamedTuple):
    """What a layer contributes to the Jacobian: its inputs A and the outputs' derivatives D."""

    layer: Layer
    inputs: Float[Tensor, "n *i"]
    derivatives: Float[Tensor, "n o *z"]


Features = list[LayerFeatures] | Float[Tensor, "n o p"]
"""What a chunk of examples contributes: its layers' features, or its Jacobian's rows where no layer rule applies."""


def find_layers(
    net: nn.Module,
    call: Call,
    params: Mapping[str, Tensor],
    example: Tensor,
    kinds: Mapping[type[nn.Module], int] = LINEAR,
) -> list[Layer] | None:
    """The layers of these kinds that hold `params`, or None where the layer rule does not apply.

    It applies when every parameter belongs to a plain Linear that runs at most once, on one vector per example
    (another kind: on one input of so many dimensions, the batch's among them), and when nothing else reads its
    weights. The last is read off the autograd graph of `call`: each parameter must enter it exactly once, which a tied
    or functionally used weight does not. Both are looked at twice, for the example (1, ...) alone and beside itself: an
    input that does not depend on the batch has as many rows as one of the two, not as both.
    """
    layers: list[Layer] = []
    names: dict[str, nn.Module] = {}
    for name, module in net.named_modules():
        own = {kind: f"{name}.{kind}" if name else kind for kind in ("weight", "bias")}
        used = {kind: own[kind] for kind in own if own[kind] in params}
        touched = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        if used and type(module) in kinds and not touched:
            assert isinstance(module, nn.Linear | nn.Conv2d)
            layers.append(Layer(module, "weight" in used, "bias" in used))
            names.update(dict.fromkeys(used.values(), module))
    if names.keys() != params.keys():
        return None

    called = _called_once(call, params, names, example, kinds)
    if called is None or called != _called_once(call, params, names, torch.cat([example] * 2), kinds):
        return None
    return [layer for layer in layers if id(layer.module) in called] or None


def _called_once(
    call: Call,
    params: Mapping[str, Tensor],
    names: Mapping[str, nn.Module],
    x: Tensor,
    kinds: Mapping[type[nn.Module], int],
) -> set[int] | None:
    """The ids of the modules that run on x (n, ...), or None unless each runs once, alone reading its parameters."""
    calls: dict[int, tuple[Tensor, int]] = {}
    regular = True

    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        nonlocal regular
        regular &= id(module) not in calls and len(args) == 1
        if regular:
            regular = args[0].ndim == kinds[type(module)] and len(args[0]) == len(x)
            calls[id(module)] = args[0], args[0]._version

    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    with torch.enable_grad(), _hooks(list(dict.fromkeys(names.values())), note):
        outputs = call(leaves, x)
    if not regular or any(a._version != version for a, version in calls.values()):  # called oddly; input overwritten
        return None
    uses = _count_uses(outputs)
    if any(uses[id(leaves[name])] > (id(module) in calls) for name, module in names.items()):
        return None
    return set(calls)


def layer_features(
    call: Call,
    layers: list[Layer],
    params: Mapping[str, Tensor],
    x: Tensor,
    output: int | None = None,
    directions: Callable[[Float[Tensor, "n o"]], Float[Tensor, "k n o"]] | None = None,
) -> list[LayerFeatures]:
    """Run the network on x (n, ...) and return each layer's inputs and derivatives, of all outputs or of one.

    With `directions`, a function of the outputs f, the derivatives are those of the k products of f with its value.
    Differentiable in x if x requires a gradient.
    """
    differentiable = x.requires_grad and torch.is_grad_enabled()
    inputs: dict[int, Tensor] = {}
    shifts: dict[int, Tensor] = {}

    def tap(module: nn.Module, args: tuple, z: Tensor) -> Tensor:
        # df/dz is the derivative by a shift of z by zero: right also where an in-place activation overwrites z.
        inputs[id(module)], shifts[id(module)] = args[0], torch.zeros_like(z, requires_grad=True)
        return z + shifts[id(module)]

    with torch.enable_grad(), _hooks([layer.module for layer in layers], tap):
        f = call(params, x)
        basis = directions(f.detach()) if directions else _units(f, output)
        k = len(basis)
        wanted = [shifts[id(layer.module)] for layer in layers]
        if f.requires_grad:
            derivatives = torch.autograd.grad(
                f,
                wanted,
                basis if k > 1 else basis[0],
                is_grads_batched=k > 1,
                create_graph=differentiable,
                allow_unused=True,
            )
        else:
            derivatives = [None] * len(wanted)

    features = []
    for layer, z, d in zip(layers, wanted, derivatives):
        a = inputs[id(layer.module)]
        d = z.new_zeros(k, *z.shape) if d is None else d.reshape(k, *z.shape)
        features.append(LayerFeatures(layer, a if differentiable else a.detach(), d.transpose(0, 1)))
    return features


def gram_block(
    left: Features,
    right: list[LayerFeatures] | Float[Tensor, "m o p"],
    out: Float[Tensor, "r c"],
    trace: bool = False,
) -> None:
    """Add J₁ J₂ᵀ of two chunks to `out`: (n·o, m·o), or (n, m), summed over outputs, with `trace`."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        rows = (1, 2) if trace else (0, 1)
        out += left.flatten(*rows) @ right.flatten(*rows).T
        return
    assert isinstance(left, list)
    assert isinstance(right, list)
    for one, two in zip(left, right):
        n, o, _ = one.derivatives.shape
        m = len(two.derivatives)
        shared = one.inputs @ two.inputs.T if one.layer.weight else out.new_zeros(n, m)
        shared = shared + 1 if one.layer.bias else shared
        rows = (n, -1) if trace else (n * o, -1)
        products = one.derivatives.reshape(rows) @ two.derivatives.reshape(m if trace else m * o, -1).T
        if trace:
            out.addcmul_(products, shared)
        else:
            out.view(n, o, m, o).addcmul_(products.view(n, o, m, o), shared[:, None, :, None])


def gram_diagonal(features: Features) -> Float[Tensor, "n o"]:
    """The diagonal of J Jᵀ: every row's squared norm."""
    if isinstance(features, Tensor):
        return features.square().sum(-1)
    total = features[0].derivatives.new_zeros(features[0].derivatives.shape[:2])
    for layer, a, d in features:
        squares = a.square().sum(1) * layer.weight + layer.bias
        total = total + d.square().sum(2) * squares[:, None]
    return total


def _units(f: Float[Tensor, "n o"], output: int | None) -> Float[Tensor, "k n o"]:
    """Every output alone, or one."""
    units = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)[:, None].expand(-1, len(f), -1)
    return units if output is None else units[output, None]


@contextmanager
def _hooks(modules: list[nn.Module], hook: Callable) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _count_uses(outputs: Tensor) -> Counter[int]:
    """How often each leaf enters the graph of `outputs`, by id."""
    uses: Counter[int] = Counter()
    seen, stack = set(), [outputs.grad_fn] if outputs.grad_fn is not None else []
    while stack:
        node = stack.pop()
        for parent, _ in node.next_functions:
            if parent is None:
                continue
            leaf = getattr(parent, "variable", None)
            if leaf is not None:
                uses[id(leaf)] += 1
            elif parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return uses
