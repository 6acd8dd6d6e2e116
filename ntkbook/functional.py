"""A network as a function of its parameters: copied values, checked inputs, and the network itself left alone."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ntkbook.checks import (
    CALLING,
    named,
    outside_inference_mode,
    probe,
    require_module,
    require_pure,
    require_separate,
)


class FunctionalNetwork:
    """f(x; θ) at fixed parameters: what `Linearization` differentiates. See there for the arguments."""

    @outside_inference_mode
    def __init__(
        self,
        net: nn.Module,
        params: Iterable[str] | Mapping[str, Tensor] | None = None,
        *,
        chunk_size: int | None = None,
    ) -> None:
        require_module(net)
        with CALLING:
            own, buffers = dict(net.named_parameters()), dict(net.named_buffers())
            placed = {
                f"{path}.{key}" if path else key: value
                for path, module in net.named_modules()
                for key, value in [*module._parameters.items(), *module._buffers.items()]
                if value is not None
            }
        if isinstance(params, str):
            raise ValueError(f"params: expected an iterable of names, such as [{params!r}]; got the string {params!r}.")
        names = [name for name in own if own[name].requires_grad] if params is None else list(params)
        if any(not isinstance(name, str) for name in names):
            kinds = ", ".join(sorted({type(name).__name__ for name in names}))
            raise TypeError(
                f"params: expected names of parameters, or a mapping of names to values, got {kinds}. As names: "
                "[name for name, _ in net.named_parameters()]."
            )
        unknown = sorted(set(names) - own.keys())
        if unknown:
            raise ValueError(f"params: {unknown} are no parameters of this network, which has {sorted(own)}.")
        # In the network's own order, whatever the order of the names given.
        values = params if isinstance(params, Mapping) else own
        chosen = {name: values[name] for name in own if name in names}
        if not chosen:
            raise ValueError(
                f"There is nothing to linearise in: the network has {len(own)} parameters, and none was named or has "
                "requires_grad=True. Pass params=[...] with the names of those to use."
            )
        for name, value in chosen.items():
            if value.shape != own[name].shape or not value.is_floating_point():
                raise ValueError(
                    f"params[{name!r}]: expected real numbers of shape {tuple(own[name].shape)}, "
                    f"got {value.dtype} of shape {tuple(value.shape)}."
                )
        kinds = {(value.dtype, value.device) for value in chosen.values()}
        if len(kinds) > 1:
            raise ValueError(f"params: expected one dtype on one device, got {sorted(map(str, kinds))}.")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size: expected a positive number of examples, got {chunk_size}.")
        self.net = net
        self.params = {name: value.detach().clone() for name, value in chosen.items()}
        constants = {name: value for name, value in own.items() if name not in chosen} | buffers
        self.constants = {name: value.detach().clone() for name, value in constants.items()}
        # Where each tensor sits, tied ones in several places. functional_call can find the ties itself, but when one
        # module has two names it leaves its own tensors behind in the network (torch 2.15).
        names = {id(value): name for name, value in [*own.items(), *buffers.items()]}
        self._places = {place: names[id(value)] for place, value in placed.items()}
        self.chunk_size = chunk_size
        self._one_derivative = False  # whether forward and reverse mode were seen to agree
        self._separate = False  # whether examples were seen not to depend on each other
        self._way = 0  # to examples' gradients, of `gradients.WAYS`: those before it were seen to be wrong
        self._vectorises: dict[tuple, bool] = {}  # whether products with blocks were seen to be right, by their shapes

    # ------------------------------------------------------------------ what it is

    @property
    def num_params(self) -> int:
        """p, the number of parameters linearised in."""
        return sum(value.numel() for value in self.params.values())

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.params.values())).dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.params.values())).device

    def flatten(self, tree: Mapping[str, Tensor]) -> Float[Tensor, " p"]:
        """A dict like the parameters as one vector (p,), in the order of J's columns."""
        if tree.keys() != self.params.keys():
            raise ValueError(f"expected the entries {list(self.params)}, got {list(tree)}.")
        for name, value in self.params.items():
            if tree[name].shape != value.shape:
                raise ValueError(f"{name}: expected shape {tuple(value.shape)}, got {tuple(tree[name].shape)}.")
        return torch.cat([tree[name].reshape(-1) for name in self.params])

    def unflatten(self, v: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """A vector (p,) as a dict like the parameters."""
        parts = v.split([value.numel() for value in self.params.values()])
        return {name: part.view_as(value) for (name, value), part in zip(self.params.items(), parts)}

    @outside_inference_mode
    def num_outputs(self, x: Tensor) -> int:
        """o, the network's number of outputs at inputs x (n, ...)."""
        return self._inspect(x)[0]

    # ------------------------------------------------------------------ inside

    def _raw(self, params: Mapping[str, Tensor], x: Tensor) -> Any:
        # A copy of x, for networks that begin by working on it in place.
        values = {**self.constants, **params}
        placed = {place: values[name] for place, name in self._places.items()}
        with CALLING:
            return functional_call(self.net, placed, (x.clone(),), tie_weights=False)

    def _call(self, params: Mapping[str, Tensor], x: Tensor) -> Float[Tensor, "n o"]:
        outputs = self._raw(params, x)
        return outputs[:, None] if outputs.ndim == 1 else outputs

    def _require_same(self, tensor: Tensor, name: str) -> None:
        if tensor.device != self.device or (tensor.is_floating_point() and tensor.dtype != self.dtype):
            raise ValueError(
                f"{name}: expected {self.dtype} on {self.device}, like the network's parameters; got {tensor.dtype} on "
                f"{tensor.device}. Convert it, or the linearisation with .to(device=..., dtype=...)."
            )

    def _inspect(self, x: Tensor) -> tuple[int, int]:
        """Check inputs and network; return the number of outputs and the bytes of one example's forward pass."""
        if not isinstance(x, Tensor) or x.ndim == 0 or len(x) == 0:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: expected a tensor (n, ...) with at least one example, got {got}.")
        self._require_same(x, "x")
        finite = x.isfinite()[:, None].flatten(1).all(1)
        if not finite.all():
            bad = int((~finite).sum())
            raise ValueError(f"x: {bad} of {len(x)} examples hold NaN or infinities. Leave them out, or fill them in.")
        require_pure(self.net)
        versions = {name: value._version for name, value in self.constants.items()}
        with named("the network", x[:1], self.dtype):
            found = probe(self._raw, self.params, x[:1].detach())
        changed = [name for name, value in self.constants.items() if value._version != versions[name]]
        if changed:
            raise ValueError(
                f"The network changes its own {changed} in place when called, so it has no one Jacobian. Turn that "
                "off, or compute the new value without changing the old one."
            )
        if len(x) > 1 and not self._separate:
            others = (x != x[:1]).flatten(1).any(1).nonzero() if x.ndim > 1 else (x != x[0]).nonzero()
            pair = x[[0, int(others[0]) if len(others) else 1]].detach()
            with named("the network", pair, self.dtype):
                require_separate(self._raw, self.params, pair)
            self._separate = len(others) > 0  # two examples that are the same tell little
        return found
