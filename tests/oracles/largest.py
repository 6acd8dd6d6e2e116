"""What a computation forms at most."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """The numbers and the bytes of the largest tensor that any operation makes.

    Args:
        expanded: whether views that repeat a number count in full, though they take no memory for it.
    """

    def __init__(self, expanded: bool = True):
        super().__init__()
        self.expanded, self.numel, self.nbytes = expanded, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and (self.expanded or 0 not in tensor.stride()):
                self.numel = max(self.numel, tensor.numel())
                self.nbytes = max(self.nbytes, tensor.numel() * tensor.element_size())
        return out
