"""The finite neural tangent kernel as a GPyTorch kernel."""

from collections.abc import Sequence
from typing import Any

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float
from torch import Tensor, nn

from ntkbook.checks import outside_inference_mode
from ntkbook.gram import FeatureMaker, Features
from ntkbook.linearize import Linearization, _differentiable, by_rules
from ntkbook.memory import working_memory

SMALL = 2**14
"""Numbers of a Gram matrix that take less time than a call of `Linearization.gram` does."""


class NTKKernel(Kernel):
    """k(x, x′) = J(x) J(x′)ᵀ, the finite neural tangent kernel of `net` at its present parameters.

    For GPyTorch and BoTorch. It has no hyperparameters: put it in a `ScaleKernel` for an outputscale. It works in the
    dtype and on the device of its inputs, and is differentiable in them. Training the network afterwards does not
    change it. The last matrix of one set of inputs is kept, so that fitting hyperparameters forms it once; those of a
    batch, as acquisition functions ask for them, are formed together.

    GPyTorch solves by conjugate gradients with a loose tolerance above 800 points: raise
    `gpytorch.settings.max_cholesky_size` for exact results, or use `NTKGP`, which is always exact.

    Args:
        net: see `Linearization`, or one of those.
        input_shape: shape of one example, such as (3, 32, 32), if the network wants more than a vector: GPyTorch's
            inputs (..., n, d) are then unflattened to (n, *input_shape).
        output: the kernel of one output alone. Without it, a network of o outputs has o rows an example, as in
            GPyTorch's multitask kernels (interleaved: row i·o + c): a model of one output, such as BoTorch's
            SingleTaskGP, then fails to broadcast n·o rows with its n.
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
        self._kept: tuple[tuple, Tensor, Tensor] | None = None

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
        one, two = _entry(x1), _entry(x2)
        if one is not None and two is not None:
            gram = self._gram(one, None if _same(x1, x2) else two)
            return gram.repeat(*batch, 1, 1) if batch else gram
        if two is not None:  # the same for all of a batch, as the data are in a posterior
            rows = self._gram(x1.reshape(-1, x1.shape[-1]), two)
            return rows.view(*x1.shape[:-2], -1, rows.shape[-1]).expand(*batch, -1, -1)
        if one is not None:
            return self.forward(x2, one).mT.expand(*batch, -1, -1)
        left, right = (self._examples(x.expand(*batch, *x.shape[-2:]).reshape(-1, x.shape[-1])) for x in (x1, x2))
        blocks = _blocks(lin, left, None if _same(x1, x2) else right, batch.numel(), self.output)
        return blocks.view(*batch, *blocks.shape[1:])

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        if self.output is not None:
            return 1
        dims = self.active_dims
        if isinstance(dims, Tensor) and x1.shape[-1] != len(dims):  # a sum of kernels does not select them
            x1 = x1.index_select(-1, dims)
        return self._linearization(x1).num_outputs(self._examples(x1.reshape(-1, x1.shape[-1])[:1]))

    def _gram(self, x1: Tensor, x2: Tensor | None) -> Tensor:
        """J(x1) J(x2)ᵀ; the last J(x1) J(x1)ᵀ is kept, for hyperparameters are fitted by calls with the same inputs."""
        lin = self._linearization(x1)
        if x2 is not None or _differentiable(x1):
            return lin.gram(self._examples(x1), None if x2 is None else self._examples(x2), output=self.output)
        kind = (self.output, self.input_shape, x1.device, x1.dtype, x1.shape)
        if self._kept is None or self._kept[0] != kind or not torch.equal(self._kept[1], x1):
            gram = lin.gram(self._examples(x1), output=self.output)
            if gram.nbytes > working_memory(x1.device):
                return gram
            self._kept = kind, x1.clone(), gram
        return self._kept[2].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None}

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
    return x1 is x2 or (not _differentiable(x1, x2) and x1.shape == x2.shape and torch.equal(x1, x2))


def _entry(x: Float[Tensor, "*b n d"]) -> Float[Tensor, "n d"] | None:
    """What all of a batch are, also in derivatives: the only one, or equal ones where no derivative is asked for."""
    first = x[(0,) * (x.ndim - 2)]
    return first if x.shape[:-2].numel() == 1 or (not _differentiable(x) and bool((x == first).all())) else None


@outside_inference_mode
def _blocks(
    lin: Linearization, x1: Tensor, x2: Tensor | None, b: int, output: int | None
) -> Float[Tensor, "b rows columns"]:
    """J(x1) J(x2)ᵀ of each of b batches of examples, x1 (b·n, ...) and x2 (b·m, ...), from features made together."""
    other = x1 if x2 is None else x2
    n, m = len(x1) // b, len(other) // b
    outputs, saved = lin._inspect(x1)
    if x2 is not None:
        lin._inspect(x2)
    o = outputs if output is None else 1
    if n * m * o * o > SMALL:
        seconds = [None] * b if x2 is None else x2.split(m)
        return torch.stack([lin.gram(one, two, output=output) for one, two in zip(x1.split(n), seconds)])
    if _differentiable(x1, other):
        left = lin._differentiable_features(x1, output, False)
        return _products(left, left if x2 is None else lin._differentiable_features(other, output, False), b)
    budget = lin._budget(None)

    def products(rules: bool) -> Tensor:
        maker = FeatureMaker(lin, x1[:n], other[:m], outputs, saved, output, rules=rules)
        size = lin._pass_size(max(len(x1), len(other)), maker.work, budget)
        each = (n + m) * maker.kept + 3 * n * m * maker.tile * lin.dtype.itemsize
        at_once = max(1, (budget - size * maker.work) // each)
        found = []
        for one, two in zip(x1.split(at_once * n), other.split(at_once * m)):
            left = maker(one, size)
            found.append(_products(left, left if x2 is None else maker(two, size), len(one) // n))
        return torch.cat(found)

    return by_rules(products)


def _products(left: Features, right: Features, b: int) -> Float[Tensor, "b no mo"]:
    """The products of b batches of features, each with its own."""
    (many, o, _), m = left.rows[0].shape, len(right.rows[0]) // b
    n = many // b
    total = left.rows[0].new_zeros(b, n * o, m * o)
    for one, two in zip(left.rows, right.rows):
        total = total + one.reshape(b, n * o, one.shape[2]) @ two.reshape(b, m * o, two.shape[2]).mT
    for (a, d), (a2, d2) in zip(left.factors, right.factors):
        (_, _, g, t, z), t2 = d.shape, d2.shape[3]
        for i in range(g):
            products = d[:, :, i].reshape(b, n * o * t, z) @ d2[:, :, i].reshape(b, m * o * t2, z).mT
            inputs, inputs2 = a[:, i].reshape(b, n * t, -1), a2[:, i].reshape(b, m * t2, -1)
            tokens = not a.is_floating_point()  # unit vectors, by the places of their ones
            shared = (inputs == inputs2.mT).to(d.dtype) if tokens else inputs @ inputs2.mT
            both = products.view(b, n, o, t, m, o, t2) * shared.view(b, n, 1, t, m, 1, t2)
            total = total + both.sum((3, 6)).view(b, n * o, m * o)
    return total
