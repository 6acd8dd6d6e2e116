"""The finite neural tangent kernel as a GPyTorch kernel."""

from collections.abc import Sequence

import torch
from gpytorch.kernels import Kernel
from torch import Tensor, nn

from ntkbook.linearize import Linearization


class NTKKernel(Kernel):
    """k(x, x′) = J(x) J(x′)ᵀ, the finite neural tangent kernel of `net` at its present parameters.

    For GPyTorch and BoTorch. It has no hyperparameters: put it in a `ScaleKernel` for an outputscale. It works in the
    dtype and on the device of its inputs, and is differentiable in them. Training the network afterwards does not
    change it.

    GPyTorch solves by conjugate gradients with a loose tolerance above 800 points: raise
    `gpytorch.settings.max_cholesky_size` for exact results, or use `NTKGP`, which is always exact.

    Args:
        net: see `Linearization`, or one of those.
        input_shape: shape of one example, such as (3, 32, 32), if the network wants more than a vector: GPyTorch's
            inputs (..., n, d) are then unflattened to (n, *input_shape).
        output: the kernel of one output alone. Without it, a network of o outputs has o rows an example, as in
            GPyTorch's multitask kernels (interleaved: row i·o + c).
    """

    has_lengthscale = False

    def __init__(
        self,
        net: nn.Module | Linearization,
        *,
        input_shape: Sequence[int] | None = None,
        output: int | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        lin = net if isinstance(net, Linearization) else Linearization(net)
        self._linearizations = {(lin.device, lin.dtype): lin}
        self._dtype = lin.dtype
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.output = output

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the inputs seen last: a kernel without parameters would report torch's default."""
        return self._dtype

    @property
    def is_stationary(self) -> bool:
        return False

    def __call__(self, x1: Tensor, *args, **kwargs):
        self._dtype = x1.dtype
        return super().__call__(x1, *args, **kwargs)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params) -> Tensor:
        """(..., n·o, m·o) for x1 (..., n, d) and x2 (..., m, d), or its diagonal (..., n·o)."""
        if last_dim_is_batch:
            raise ValueError("NTKKernel: last_dim_is_batch splits an input that the network needs whole.")
        lin = self._linearization(x1)
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
        if diag:
            if not _same(x1, x2):
                full = self.forward(x1, x2)
                return full.diagonal(dim1=-2, dim2=-1)
            return lin.diagonal(self._examples(x1.reshape(-1, x1.shape[-1])), output=self.output).reshape(*batch, -1)
        if not batch:
            second = None if _same(x1, x2) else self._examples(x2)
            return lin.gram(self._examples(x1), second, output=self.output)
        pairs = zip(x1.expand(*batch, *x1.shape[-2:]).flatten(0, -3), x2.expand(*batch, *x2.shape[-2:]).flatten(0, -3))
        grams = torch.stack([self.forward(a, b) for a, b in pairs])
        return grams.reshape(*batch, *grams.shape[1:])

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        if self.output is not None:
            return 1
        dims = self.active_dims
        if isinstance(dims, Tensor) and x1.shape[-1] != len(dims):  # a sum of kernels does not select them
            x1 = x1.index_select(-1, dims)
        return self._linearization(x1).num_outputs(self._examples(x1.reshape(-1, x1.shape[-1])[:1]))

    def _examples(self, x: Tensor) -> Tensor:
        return x if self.input_shape is None else x.reshape(len(x), *self.input_shape)

    def _linearization(self, x: Tensor) -> Linearization:
        key = (x.device, x.dtype)
        if key not in self._linearizations:
            some = next(iter(self._linearizations.values()))
            self._linearizations[key] = some.to(device=x.device, dtype=x.dtype)
        return self._linearizations[key]


def _same(x1: Tensor, x2: Tensor) -> bool:
    """Whether k(x1, x2) is k(x1, x1), also in its derivatives: equal values do where none is asked for."""
    if x1 is x2:
        return True
    differentiated = torch.is_grad_enabled() and (x1.requires_grad or x2.requires_grad)
    return not differentiated and x1.shape == x2.shape and torch.equal(x1, x2)
