"""The Fisher matrix as a `LinearOperator`, whose products are those of `ntkbook.fisher`."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from linear_operator import LinearOperator
from linear_operator.operators import BlockDiagLinearOperator, DenseLinearOperator, RootLinearOperator
from torch import Tensor, nn

from ntkbook.checks import outside_inference_mode
from ntkbook.curvature import (
    Batch,
    Method,
    Symmetric,
    difference,
    double_backward,
    exact,
    expected,
    inspected,
    products,
)
from ntkbook.lazy import MatrixFree, vectors_that_fit
from ntkbook.likelihoods import Likelihood, get_likelihood
from ntkbook.linearize import Linearization
from ntkbook.operators import GaussNewtonOperator, JacobianOperator
from ntkbook.similarity import _linearised, fisher_diagonal

METHODS = ("exact", "double_backward", "forward_difference", "central_difference")
DIFFERENCES = METHODS[2:]
REDUCTIONS = ("sum", "mean")


class FisherOperator(GaussNewtonOperator):
    """The Fisher matrix F, (p, p), symmetric and positive semi-definite, as a `LinearOperator` that is never formed.

    Only products follow `method`; by finite differences they are as inexact, as little linear and as little symmetric
    as `ntkbook.fisher` says, which solvers must bear. Everything else is exact: the diagonal, the entries,
    `to_dense`, and the root JᵀL with L Lᵀ = H, lazy too. What linear_operator does above 800 parameters: see
    `ntkbook.operators`. With a Gaussian likelihood of noise 1 this is the matrix of `GaussNewtonOperator`.

    Args:
        net, likelihood, method, reduction, epsilon: as for `fisher_vector_product`.
        x: inputs (n, ...). A constant, as all of F is: gradients flow to right-hand sides alone.
        outputs: o, found out unless given.
        batch_shape: a batch of this same matrix.
        cache: what is kept between products, the outputs of finite differences; filled here.

    Raises: as `fisher_vector_product`; MemoryError for a `to_dense` that cannot fit.
    """

    def __init__(
        self,
        net: nn.Module | Linearization,
        x: Tensor,
        likelihood: str | Likelihood = "categorical",
        *,
        method: str = "exact",
        reduction: str = "sum",
        epsilon: float | str = "auto",
        outputs: int | None = None,
        batch_shape: torch.Size = torch.Size(),
        cache: dict[str, Batch] | None = None,
    ) -> None:
        lin, x = _linearised(net), x.detach()
        _require(reduction, "reduction", REDUCTIONS)
        self._method = _method(lin, likelihood, method, epsilon)
        self.outputs = lin.num_outputs(x) if outputs is None else outputs
        # linear_operator makes operators anew from these arguments at every product: the cache goes with them.
        self._cache = {} if cache is None else cache
        options = {"method": method, "reduction": reduction, "epsilon": epsilon, "outputs": self.outputs}
        MatrixFree.__init__(
            self, net=lin, x=x, likelihood=likelihood, batch_shape=batch_shape, cache=self._cache, **options
        )
        self.lin, self.x, self.likelihood, self.reduction = lin, x, get_likelihood(likelihood), reduction
        self.method, self._shape = method, (lin.num_params, lin.num_params)

    def __repr__(self) -> str:
        like, p = type(self.likelihood).__name__, self._shape[0]
        options = f"method={self.method!r}, reduction={self.reduction!r}"
        return f"FisherOperator({p} x {p}, {len(self.x):,} examples, likelihood={like}, {options})"

    def _with(self, **changes: Any) -> "FisherOperator":
        return super()._with(**(changes if changes.keys() == {"batch_shape"} else {**changes, "cache": None}))

    def _product(self, block: Tensor) -> Tensor:
        self.lin._require_same(block, "v")
        return Symmetric.apply(self._constant_product, block)  # pyright: ignore[reportReturnType]

    @outside_inference_mode
    def _constant_product(self, block: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
        if not self._cache:
            f = self.lin.outputs(self.x) if self.method in DIFFERENCES else None
            self._cache["data"] = inspected(self.lin, self.x, f)
        return products(self.lin, [self._cache["data"]], block, self._method, self.reduction, None)

    def _diagonal(self) -> Tensor:
        mean = fisher_diagonal(self.lin, self.x, self.likelihood)
        return (mean if self.reduction == "mean" else mean * len(self.x)).expand(*self._batch, -1)

    def _row_chunks(self, x: Tensor) -> Iterator[Float[Tensor, "r p"]]:
        """The rows of LᵀJ, L Lᵀ = H, so that all that JᵀJ does with those of J is true of JᵀHJ."""
        fit, o = vectors_that_fit(self.lin, 4), self.outputs
        for part in x.split(max(1, fit // o)):
            root = self._root(part)
            if fit >= o:
                yield (root.mT @ self.lin.jacobian(part).unflatten(0, (len(part), o))).flatten(0, 1)
            else:
                yield from (self.lin.vjp(part, some).T for some in root.split(fit, dim=2))

    def _root(self, x: Tensor) -> Float[Tensor, "n o r"]:
        with torch.no_grad():
            root = self.likelihood.root(self.lin.outputs(x))
        return root / len(self.x) ** 0.5 if self.reduction == "mean" else root

    def root_decomposition(self, method: str | None = None) -> LinearOperator:
        """R with R Rᵀ = F: R = JᵀL, lazily, or by the method asked for, "lanczos" among them."""
        if method is not None:
            return super().root_decomposition(method)
        jacobian = JacobianOperator(self.lin, self.x, transposed=True, outputs=self.outputs)
        root = jacobian @ BlockDiagLinearOperator(DenseLinearOperator(self._root(self.x)))
        return RootLinearOperator(root.expand(*self._batch, *root.shape))


# ------------------------------------------------------------------ inside


def _require(value: str, name: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}.")


def _method(lin: Linearization, likelihood: str | Likelihood, method: str, epsilon: float | str) -> Method:
    _require(method, "method", METHODS)
    likelihood = get_likelihood(likelihood)
    if method in DIFFERENCES:
        return partial(difference, likelihood, _step(lin, method, epsilon), method == "central_difference")
    if epsilon != "auto":
        raise ValueError(f"epsilon: the method {method!r} takes no step. Leave epsilon out, or use {DIFFERENCES}.")
    return (
        partial(double_backward, likelihood)
        if method == "double_backward"
        else partial(exact, partial(expected, likelihood))
    )


def _step(lin: Linearization, method: str, epsilon: float | str) -> float | None:
    """The checked ε, None for one that follows from the vector and the mini-batch."""
    if torch.finfo(lin.dtype).bits < 32:
        raise ValueError(
            f"method: {method!r} needs float32 or float64: {lin.dtype} has too few digits to hold θ + εv beside θ. Use "
            "'exact', or convert the linearisation with .to(dtype=torch.float32)."
        )
    if epsilon == "auto":
        return None
    if isinstance(epsilon, str) or not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon: expected a positive, finite number or 'auto', got {epsilon!r}.")
    return float(epsilon)
