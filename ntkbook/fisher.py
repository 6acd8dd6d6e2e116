"""Products with the Fisher matrix F = Σᵢ Jᵢᵀ Hᵢ Jᵢ (Section 2.2 of the paper), its approximations, and its operator.

Jᵢ (o, p) is the Jacobian of example i, Hᵢ (o, o) what `Likelihood.hessian` gives. With reduction="sum", the default,
F is this sum over examples, with "mean" it is divided by their number (as `fisher_diagonal` is). Four methods:

- "exact": J v by forward mode, H in closed form, Jᵀ by reverse mode. One vector takes one pass for outputs, J v and
  the graph of the pass backward; a block takes one pass for all its J v, vectorised, and one for all its Jᵀ.
- "double_backward": the Hessian in θ′ of KL(p_θ ‖ p_θ′) at θ′ = θ, by autograd, twice: exact too, and dearer.
- "forward_difference": the gradient of that divergence at θ′ = θ + ε v/‖v‖, times ‖v‖/ε; at θ it vanishes. O(ε) off.
- "central_difference": the difference of the gradients at θ ± ε v/‖v‖, times ‖v‖/2ε. O(ε²)
  off for a smooth network, O(ε) for one with kinks, such as ReLU's.

The step ε is a length: the paper's θ + εv (Appendix D) for a v of norm 1, scaled back. Products by finite differences
are homogeneous in v, but neither quite linear nor symmetric, and see through a `.detach()` inside the network, where
derivatives stop. Parameters are never touched by any of this.
"""

from collections.abc import Iterable, Iterator, Mapping
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
    automatic_step,
    batches,
    difference,
    double_backward,
    drawn_scores,
    exact,
    expected,
    inspected,
    products,
    squared_scores,
)
from ntkbook.lazy import MatrixFree, vectors_that_fit
from ntkbook.likelihoods import Likelihood, get_likelihood
from ntkbook.linearize import Linearization
from ntkbook.operators import GaussNewtonOperator, JacobianOperator
from ntkbook.similarity import _linearised, fisher_diagonal

METHODS = ("exact", "double_backward", "forward_difference", "central_difference")
DIFFERENCES = METHODS[2:]
REDUCTIONS = ("sum", "mean")

Vector = Tensor | Mapping[str, Tensor]


def fisher_vector_product(
    net: nn.Module | Linearization,
    x: Tensor | Iterable[Any],
    v: Vector,
    likelihood: str | Likelihood = "categorical",
    method: str = "exact",
    *,
    reduction: str = "sum",
    epsilon: float | str = "auto",
    chunk_size: int | None = None,
) -> Vector:
    """F v, with the Fisher matrix of p(y | f(x; θ)) in the expectation over y: no labels, no sampling.

    Args:
        net: a network, in its parameters with `requires_grad`, or a linearisation, in whatever it linearises in.
        x: inputs (n, ...), as for `Linearization`; or an iterable of such mini-batches, such as a DataLoader, taken
            one at a time. Of a mini-batch that is a tuple or list the first entry counts.
        v: (p,), or (p, k) for k vectors, or a dict like the parameters; in the network's dtype.
        likelihood: p(y | f), by its name in `ntkbook.likelihoods.LIKELIHOODS`, or an instance.
        method: "exact", "double_backward", "forward_difference" or "central_difference": see the top of this module.
        reduction: "sum" over all examples, or their "mean".
        epsilon: the length of the finite differences' step in parameters, or "auto": `automatic_epsilon`, which takes
            two passes forward of eight examples of each mini-batch.
        chunk_size: examples at a time; the linearisation's, or from the machine's memory, unless given. No result
            depends on it beyond rounding.

    Returns:
        F v like v, a constant: no gradient flows to x, v or the network. Sums over chunks and mini-batches are taken in
        float32 or better.

    Raises:
        ValueError: an unknown method, reduction or likelihood; a v or epsilon that does not fit; epsilon where the
            method takes no step; finite differences in less than float32; and as `Linearization`.
        NotImplementedError: as `Linearization`.
    """
    lin = _linearised(net)
    inputs = ((part, None) for part, _ in batches(x))
    return _streamed(lin, inputs, v, _method(lin, likelihood, method, epsilon), reduction, chunk_size)


def empirical_fisher_vector_product(
    net: nn.Module | Linearization,
    x: Tensor | Iterable[Any],
    y: Tensor | Iterable[Tensor] | None,
    v: Vector,
    likelihood: str | Likelihood = "categorical",
    *,
    reduction: str = "sum",
    chunk_size: int | None = None,
) -> Vector:
    """Σᵢ gᵢ gᵢᵀ v, with the gradients gᵢ = Jᵢᵀ ∇_f log p(yᵢ | fᵢ) at the labels there are.

    Not the Fisher matrix: no expectation over y is taken, and it vanishes where the labels are fitted.

    Args:
        y: labels or targets, as `Likelihood.log_prob` takes them: (n,) classes for "categorical". An iterable of as
            many mini-batches where x is one; None where x is an iterable of pairs (x, y), such as a DataLoader.
        net, x, v, likelihood, reduction, chunk_size: as for `fisher_vector_product`.

    Returns, raises: as there; ValueError also for a y of another length than x, or that p(y | f) cannot take.
    """
    method = partial(exact, partial(squared_scores, get_likelihood(likelihood)))
    return _streamed(_linearised(net), batches(x, y), v, method, reduction, chunk_size)


def monte_carlo_fisher_vector_product(
    net: nn.Module | Linearization,
    x: Tensor | Iterable[Any],
    v: Vector,
    likelihood: str | Likelihood = "categorical",
    *,
    samples: int = 1,
    seed: int = 0,
    reduction: str = "sum",
    chunk_size: int | None = None,
) -> Vector:
    """F v without bias, H replaced by the mean of ∇ log p(y | f) ∇ log p(y | f)ᵀ over draws y ~ p(y | f).

    Args:
        samples: draws an example.
        seed: an example's draws follow from the seed, its place in x and its f, not from v, nor from how x is divided
            into mini-batches and chunks. They take some 20 µs an example.
        net, x, v, likelihood, reduction, chunk_size: as for `fisher_vector_product`.

    Returns, raises: as there; ValueError also for less than one sample.
    """
    if samples < 1:
        raise ValueError(f"samples: expected a positive number of draws, got {samples}.")
    seeds = torch.Generator().manual_seed(seed)
    method = partial(exact, partial(drawn_scores, get_likelihood(likelihood), samples, seeds))
    inputs = ((part, None) for part, _ in batches(x))
    return _streamed(_linearised(net), inputs, v, method, reduction, chunk_size, samples)


class FisherOperator(GaussNewtonOperator):
    """The Fisher matrix F, (p, p), symmetric and positive semi-definite, as a `LinearOperator` that is never formed.

    Only products follow `method`; by finite differences they are as inexact, as little linear and as little symmetric
    as the top of this module says, which solvers must bear. Everything else is exact: the diagonal, the entries,
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


def automatic_epsilon(lin: Linearization, x: Tensor, v: Float[Tensor, " p"], method: str) -> float:
    """The step of "auto" for one vector and one mini-batch: ε = ℓ u^(1/2), or ℓ u^(1/3).

    u is the spacing of floating-point numbers at 1, ℓ = ‖f‖ / ‖J v̂‖ the length of a step along v̂ = v/‖v‖ that changes
    the outputs by their own size, at most ‖θ‖. Outputs are known to u‖f‖, so a product by a step ε errs by some u ℓ/ε
    from rounding, and by (ε/ℓ)^q from curvature, where the Jacobian changes over a length ℓ as well: the two balance at
    ε = ℓ u^(1/(1 + q)). q = 2 for central differences of a smooth network. For forward differences q = 1, and for both
    where the network has kinks, as ReLU's: a step makes a number of units change their sign that grows with ε, other
    ones on the other side, and nothing cancels.

    ℓ is measured on the first eight examples, by a step ‖θ‖ u^(1/2), and taken to be no shorter than that.

    ValueError for a method that takes no step.
    """
    _require(method, "method", DIFFERENCES)
    return automatic_step(lin, x, v / v.norm(), method == "central_difference") if v.any() else 0.0


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


@outside_inference_mode
def _streamed(
    lin: Linearization,
    data: Iterable[tuple[Any, Any]],
    v: Vector,
    method: Method,
    reduction: str,
    chunk_size: int | None,
    samples: int = 0,
) -> Vector:
    _require(reduction, "reduction", REDUCTIONS)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected a positive number of examples, got {chunk_size}.")
    flat = lin.flatten(v) if isinstance(v, Mapping) else v
    if flat.ndim not in (1, 2) or len(flat) != lin.num_params:
        raise ValueError(f"v: expected ({lin.num_params},) or ({lin.num_params}, k), got {tuple(flat.shape)}.")
    if flat.dtype != lin.dtype:
        raise ValueError(f"v: expected {lin.dtype}, like the network's parameters, got {flat.dtype}.")
    lin._require_same(flat, "v")
    found = (inspected(lin, *batch, samples) for batch in data)
    result = products(lin, found, flat.reshape(len(flat), -1), method, reduction, chunk_size)
    if isinstance(v, Mapping):
        return lin.unflatten(result[:, 0])
    return result.view(-1) if v.ndim == 1 else result
