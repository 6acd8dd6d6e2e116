"""Moving what has been computed to another device or precision, without computing it again."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ntkbook.checks import place, require_double
from ntkbook.functional import FunctionalNetwork

Own = TypeVar("Own", bound="Movable")


class Movable:
    """What holds tensors, linearisations and other movables as attributes, or in tuples, lists and dicts of its own."""

    def to(
        self: Own,
        *where: torch.device | torch.dtype | str | int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Own:
        """The same on another device or in another precision, by name or not, as torch's; this one stays as it is.

        Nothing is factorised or solved again, so that results are the same, to the bit where device and dtype are. In
        less precision they, and the bounds on their errors, hold to its rounding. What an iterative solver has not been
        asked for yet, such as its log marginal likelihood, is computed there. A mean that is an nn.Module is moved
        too, as a copy; any other function must go along with the inputs that it is given.

        Raises:
            ValueError: a dtype that is not real, or one that the device does not have: pass dtype=torch.float32.
        """

        device, dtype = place(where, device, dtype)

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                kind = (dtype or value.dtype) if value.is_floating_point() else value.dtype
                require_double(device or value.device, kind)
                return value.to(device=device, dtype=kind)
            if isinstance(value, FunctionalNetwork):
                return value.to(device=device, dtype=dtype)  # pyright: ignore[reportAttributeAccessIssue]
            return copy.deepcopy(value).to(device=device, dtype=dtype)  # an nn.Module, which would be moved in place

        return _moved(self, move, {})


def _moved(value: Any, move: Callable[[Any], Any], done: dict[int, Any]) -> Any:
    """`value` with all that can be moved in it, each object once."""
    again = lambda part: _moved(part, move, done)  # noqa: E731
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, Tensor | nn.Module | FunctionalNetwork):
        other = move(value)
    elif isinstance(value, Movable):
        other = object.__new__(type(value))
        vars(other).update({name: again(part) for name, part in vars(value).items()})
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        other = type(value)(*map(again, value))
    elif isinstance(value, tuple | list):
        other = type(value)(map(again, value))
    elif isinstance(value, dict):
        other = {name: again(part) for name, part in value.items()}
    else:
        return value
    done[id(value)] = other
    return other
