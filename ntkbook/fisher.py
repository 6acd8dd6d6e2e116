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

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntkbook.checks import outside_inference_mode
from ntkbook.curvature import Method, automatic_step, batches, drawn_scores, exact, inspected, products, squared_scores
from ntkbook.fisher_operator import DIFFERENCES, METHODS, REDUCTIONS, FisherOperator, _method, _require
from ntkbook.likelihoods import Likelihood, get_likelihood
from ntkbook.linearize import Linearization
from ntkbook.similarity import _linearised

__all__ = [
    "DIFFERENCES",
    "METHODS",
    "REDUCTIONS",
    "FisherOperator",
    "automatic_epsilon",
    "empirical_fisher_vector_product",
    "fisher_vector_product",
    "monte_carlo_fisher_vector_product",
]

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
        F v like v, a constant; no gradient flows to x, v or the network. Sums over chunks and mini-batches are taken in
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
