"""What the Fisher matrix F = Jᵀ H J needs of a likelihood p(y | f): H in closed form, a root of it, and KL.

H(x) = E_{p(y|f)}[∇_f log p(y|f) ∇_f log p(y|f)ᵀ] is one (o, o) block per example (paper, Section 2.2 and Appendix
C.1), and the Hessian of KL(p(y|f) ‖ p(y|f₂)) in f₂ at f₂ = f. f is always (n, o): n examples, o outputs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from ntkbook.numerics import centre, excess, normal_kl, normal_log_prob, normal_sample


class Likelihood(ABC):
    """p(y | f), independent over examples.

    All results have the dtype and device of f and are differentiable in it, by autograd and by torch.func. Arguments
    of a wrong shape, and values of y that p(y | f) cannot take, are a ValueError; under vmap, which hides values,
    only shapes are checked. For outputs up to ±1e4 (Poisson: see there) nothing overflows and no gradient is NaN.
    """

    num_outputs: int | None = None
    """How many outputs f must have; None for any number."""
    num_targets: int | None = 1
    """How many numbers y holds for an example; None for one an output."""
    support: str = "finite numbers"

    def log_prob(self, f: Float[Tensor, "n o"], y: Tensor) -> Float[Tensor, " n"]:
        """log p(y | f) of each example, in nats; y is as `sample` returns it, and (n, 1) may stand for (n,)."""
        self._check(f)
        return self._log_prob(f, self._targets(f, y))

    def kl(self, f: Float[Tensor, "n o"], f2: Tensor) -> Float[Tensor, " n"]:
        """KL(p(y | f) ‖ p(y | f₂)) of each example, in nats; f2 (n, o).

        Written so that first-order terms cancel on paper rather than in floating point: where f2 is close to f the
        value (second order in f2 − f) and its gradient in f2 (first order) have relative errors of some machine
        epsilons, times the size of the log probabilities. The rounding of f2 itself, eps·|f2| / |f2 − f|, remains.
        """
        self._check(f, f2)
        return self._kl(f, f2)

    def hessian(self, f: Float[Tensor, "n o"]) -> Float[Tensor, "n o o"]:
        """H, positive semi-definite."""
        return self.apply(f, self._identity(f))

    def root(self, f: Float[Tensor, "n o"]) -> Float[Tensor, "n o r"]:
        """L with H = L Lᵀ, in closed form: square, r = o, and smooth in f."""
        return self.apply_root(f, self._identity(f))

    def apply(self, f: Float[Tensor, "n o"], u: Tensor) -> Float[Tensor, "n o *k"]:
        """H u of each example, for u (n, o) or, k vectors at once, (n, o, k)."""
        return self._product(self._apply, f, u)

    def apply_root(self, f: Float[Tensor, "n o"], u: Tensor) -> Float[Tensor, "n o *k"]:
        """L u of each example, for u (n, r) or (n, r, k), r = o."""
        return self._product(self._apply_root, f, u)

    def apply_root_transpose(self, f: Float[Tensor, "n o"], u: Tensor) -> Float[Tensor, "n r *k"]:
        """Lᵀ u of each example, for u (n, o) or (n, o, k)."""
        return self._product(partial(self._apply_root, transpose=True), f, u)

    @torch.no_grad()
    def sample(self, f: Float[Tensor, "n o"], generator: torch.Generator | None = None) -> Tensor:
        """y ~ p(y | f), without a gradient: (n,) for one number per example, (n, o) for several."""
        self._check(f)
        return self._sample(f, generator)

    @abstractmethod
    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor: ...

    @abstractmethod
    def _kl(self, f: Tensor, f2: Tensor) -> Tensor: ...

    @abstractmethod
    def _apply_root(self, f: Tensor, u: Tensor, transpose: bool = False) -> Tensor:
        """L u or Lᵀ u, for u (n, o, k)."""

    def _apply(self, f: Tensor, u: Tensor) -> Tensor:
        return self._apply_root(f, self._apply_root(f, u, transpose=True))

    @abstractmethod
    def _sample(self, f: Tensor, generator: torch.Generator | None) -> Tensor: ...

    def _targets(self, f: Tensor, y: Tensor) -> Tensor:
        """y as (n, columns) in f's dtype."""
        columns = self.num_targets or f.shape[1]
        shapes = [(len(f),), (len(f), 1)] if columns == 1 else [(len(f), columns)]
        if tuple(y.shape) not in shapes:
            raise ValueError(f"y: expected {' or '.join(map(str, shapes))}, got {tuple(y.shape)}.")
        if not _holds(self._possible(y)):
            raise ValueError(f"y: {type(self).__name__} expects {self.support}, got others.")
        return y.reshape(len(f), columns).to(f.dtype)

    def _possible(self, y: Tensor) -> Tensor:
        return y.isfinite()

    def _check(self, f: Tensor, f2: Tensor | None = None) -> None:
        if f.ndim != 2 or not f.is_floating_point() or f.shape[1] != (self.num_outputs or f.shape[1]):
            raise ValueError(
                f"f: {type(self).__name__} expects floating-point outputs (n, {self.num_outputs or 'o'}), got "
                f"{tuple(f.shape)} of {f.dtype}."
            )
        if f2 is not None and f2.shape != f.shape:
            raise ValueError(f"f2: expected the shape of f, {tuple(f.shape)}, got {tuple(f2.shape)}.")

    def _identity(self, f: Tensor) -> Tensor:
        self._check(f)
        return torch.eye(f.shape[1], dtype=f.dtype, device=f.device).expand(len(f), -1, -1)

    def _product(self, multiply: Callable, f: Tensor, u: Tensor) -> Tensor:
        self._check(f)
        if u.ndim not in (2, 3) or u.shape[:2] != f.shape:
            n, o = f.shape
            raise ValueError(f"u: expected ({n}, {o}) or ({n}, {o}, k), got {tuple(u.shape)}.")
        return multiply(f, u) if u.ndim == 3 else multiply(f, u[..., None])[..., 0]


class _Diagonal(Likelihood):
    """A likelihood with diagonal H, and so with a diagonal root."""

    @abstractmethod
    def _scale(self, f: Tensor) -> Tensor:
        """The root's diagonal, (n, o)."""

    def _apply_root(self, f: Tensor, u: Tensor, transpose: bool = False) -> Tensor:
        return self._scale(f)[..., None] * u


class Gaussian(_Diagonal):
    """N(y | f, noise): homoscedastic regression, H = I / noise. y is (n, o), or (n,) for one output.

    Args:
        noise: σ², a variance: a number, or a tensor () or (o,), one for each output. A tensor that requires a
            gradient is a learnt noise: log_prob, kl and the products with H are differentiable in it. The paper's
            H = I is noise = 1, the default.
    """

    num_targets = None

    def __init__(self, noise: float | Tensor = 1.0):
        value = noise if isinstance(noise, Tensor) else torch.tensor(noise, dtype=torch.double)
        if value.ndim > 1 or not _holds((value > 0) & value.isfinite()):
            got = noise if value.ndim == 0 else f"a tensor {tuple(value.shape)}"
            raise ValueError(f"noise: expected positive, finite variances, a number or a tensor () or (o,); got {got}.")
        self.noise = noise

    def kl(self, f: Float[Tensor, "n o"], f2: Tensor, other: "Gaussian | None" = None) -> Float[Tensor, " n"]:
        """KL(N(f, noise) ‖ N(f₂, noise of `other`)) of each example, in nats; without `other` the noise is the same."""
        self._check(f, f2)
        return self._kl(f, f2, other)

    def log_noise_fisher(self, f: Float[Tensor, "n o"]) -> Float[Tensor, "*s"]:
        """The Fisher information of log σ² in the n examples of f, summed over them, shaped like the noise.

        n·o/2 for one noise, n/2 for each of o. Its cross terms with f, and between outputs, are zero, so the Fisher
        matrix of the network's parameters and log σ² together is diag(JᵀHJ, this).
        """
        noise = torch.as_tensor(self.noise)
        return f.new_full(noise.shape, self._variance(f).numel() / (2 * noise.numel()))

    def _variance(self, f: Tensor) -> Tensor:
        noise = torch.as_tensor(self.noise, dtype=f.dtype, device=f.device)
        if noise.ndim == 1 and len(noise) != f.shape[1]:
            raise ValueError(f"noise: expected one variance, or ({f.shape[1]},) as f has outputs, got ({len(noise)},).")
        return noise.expand_as(f)

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return normal_log_prob(y, f, self._variance(f)).sum(1)

    def _kl(self, f: Tensor, f2: Tensor, other: "Gaussian | None" = None) -> Tensor:
        v = self._variance(f)
        if other is None:
            return ((f2 - f).square() / (2 * v)).sum(1)
        v2 = other._variance(f)
        return normal_kl(f2 - f, v, v2, v2 - v).sum(1)

    def _scale(self, f: Tensor) -> Tensor:
        return self._variance(f).rsqrt()

    def _sample(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        y = normal_sample(f, self._variance(f), generator)
        return y[:, 0] if f.shape[1] == 1 else y


class HeteroscedasticGaussian(_Diagonal):
    """N(y | μ, v), v = floor + softplus(s), of two outputs f = (μ, s): H = diag(1/v, ½(v′/v)²), v′ = sigmoid(s).

    The paper's malaria likelihood (its appendix on experiments), whose second argument we take for a variance, as
    elsewhere in the paper. y is (n,) or (n, 1).

    Args:
        floor: the smallest variance.
    """

    num_outputs = 2

    def __init__(self, floor: float = 1e-5):
        if not 0 < floor < math.inf:
            raise ValueError(f"floor: expected a positive, finite variance, got {floor}.")
        self.floor = floor

    def moments(self, f: Float[Tensor, "n 2"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Mean and variance of y for each example."""
        self._check(f)
        mean, variance = self._moments(f)
        return mean[:, 0], variance[:, 0]

    def _moments(self, f: Tensor) -> tuple[Tensor, Tensor]:
        # torch's softplus leaves out log1p(e⁻ˢ) beyond s = 20, an error of 1e-10 in float64; this one is exact.
        return f[:, :1], self.floor - logsigmoid(-f[:, 1:])

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return normal_log_prob(y, *self._moments(f)).sum(1)

    def _kl(self, f: Tensor, f2: Tensor) -> Tensor:
        (mean, v), (mean2, v2) = self._moments(f), self._moments(f2)
        s, step = f[:, 1:], (f2 - f)[:, 1:]
        # softplus(s + step) − softplus(s) = log(1 + sigmoid(s)(e^step − 1)): no cancellation for small steps.
        small = step.abs() < 1
        change = torch.log1p(s.sigmoid() * step.where(small, 0).expm1()).where(small, v2 - v)
        return normal_kl(mean2 - mean, v, v2, change).sum(1)

    def _scale(self, f: Tensor) -> Tensor:
        _, v = self._moments(f)
        return torch.cat([v.rsqrt(), f[:, 1:].sigmoid() / (math.sqrt(2) * v)], 1)

    def _sample(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        return normal_sample(*self._moments(f), generator)[:, 0]


class Categorical(Likelihood):
    """π = softmax(f), of o logits: H = diag(π) − π πᵀ. y is (n,), integer classes from 0 to o − 1.

    The root is L = diag(√π) − π √πᵀ. H and L are singular, as π does not change when one number is added to all
    logits: H 1 = 0, L √π = 0. Products with them take O(o) operations a vector and no (o, o) matrix.
    """

    support = "classes from 0 to o − 1"

    def _check(self, f: Tensor, f2: Tensor | None = None) -> None:
        super()._check(f, f2)
        if f.shape[1] == 1:
            raise ValueError(
                "f: Categorical expects a logit for each of at least two classes, got one, which is certain and has no "
                'Fisher information. Two classes by one logit are "bernoulli".'
            )

    def hessian(self, f: Float[Tensor, "n o"]) -> Float[Tensor, "n o o"]:
        """H, exactly symmetric, and positive semi-definite since it is diagonally dominant as it is summed."""
        self._check(f)
        p = f.softmax(1)
        others = (p[:, :, None] * p[:, None, :]).masked_fill(torch.eye(p.shape[1], device=f.device).bool(), 0)
        return others.sum(2).diag_embed() - others

    def _targets(self, f: Tensor, y: Tensor) -> Tensor:
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or y.shape != f.shape[:1]:
            raise ValueError(f"y: expected integer classes ({len(f)},), got {tuple(y.shape)} of {y.dtype}.")
        if not _holds((y >= 0) & (y < f.shape[1])):
            raise ValueError(f"y: expected classes from 0 to {f.shape[1] - 1}, as f has outputs, got others.")
        return y[:, None].long()

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return f.log_softmax(1).gather(1, y)[:, 0]

    def _kl(self, f: Tensor, f2: Tensor) -> Tensor:
        # With c = d − Σ π d, d = f₂ − f: KL = log Σ π eᶜ = log(1 + Σ π (eᶜ − 1 − c)), a sum of positive terms.
        log_p = f.log_softmax(1)
        c = centre(log_p, (f2 - f)[..., None])[..., 0]
        far = (log_p + c).amax(1, keepdim=True) > 40  # where eᶜ could overflow, and KL is no small number
        near = excess(log_p, c.masked_fill(far, 0)).sum(1).log1p()
        return near.where(~far[:, 0], (log_p + c).logsumexp(1))

    def _apply(self, f: Tensor, u: Tensor) -> Tensor:
        log_p = f.log_softmax(1)
        return log_p.exp()[..., None] * centre(log_p, u)

    def _apply_root(self, f: Tensor, u: Tensor, transpose: bool = False) -> Tensor:
        log_p = f.log_softmax(1)
        root = (log_p / 2).exp()[..., None]
        if transpose:
            return root * centre(log_p, u)
        return root * (u - root * (root * u).sum(1, keepdim=True))

    def _sample(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        return f.softmax(1).multinomial(1, generator=generator)[:, 0]


class Bernoulli(_Diagonal):
    """p(y = 1) = sigmoid(f), of one logit: H = p (1 − p). y is (n,) or (n, 1), of any dtype, 0 or 1."""

    num_outputs = 1
    support = "zeros and ones"

    def _possible(self, y: Tensor) -> Tensor:
        return (y == 0) | (y == 1)

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return logsigmoid((2 * y - 1) * f)[:, 0]

    def _kl(self, f: Tensor, f2: Tensor) -> Tensor:
        zero = torch.zeros_like(f)  # two classes with the logits 0 and f
        return Categorical()._kl(torch.cat([zero, f], 1), torch.cat([zero, f2], 1))

    def _scale(self, f: Tensor) -> Tensor:
        return (logsigmoid(f) / 2).exp() * (logsigmoid(-f) / 2).exp()  # sqrt(p) has no finite derivative at p = 0

    def _sample(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        return f.sigmoid().bernoulli(generator=generator)[:, 0]


class Poisson(_Diagonal):
    """Counts y of rate λ = eᶠ, of one log-rate: H = λ. y is (n,) or (n, 1), of any dtype.

    H, KL and log_prob are finite where their values are in f's dtype: H for f up to 709 in float64, 88 in float32.
    """

    num_outputs = 1
    support = "counts 0, 1, 2, ..."

    def _possible(self, y: Tensor) -> Tensor:
        return y.isfinite() & (y >= 0) & (y == y.floor())

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return (y * f - f.exp() - (y + 1).lgamma())[:, 0]

    def _kl(self, f: Tensor, f2: Tensor) -> Tensor:
        return excess(f, f2 - f)[:, 0]  # λ₂ − λ − λ (f₂ − f)

    def _scale(self, f: Tensor) -> Tensor:
        return (f / 2).exp()

    def _sample(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.poisson(f.exp(), generator=generator)[:, 0]


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "gaussian": Gaussian,
    "heteroscedastic": HeteroscedasticGaussian,
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
}
"""The likelihoods that functions take by name, "gaussian", "heteroscedastic" and so on."""


def get_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """A likelihood by its name in LIKELIHOODS, with default arguments ("gaussian" has noise 1); instances pass through.

    Raises:
        ValueError: for any other name.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if likelihood not in LIKELIHOODS:
        names = ", ".join(map(repr, LIKELIHOODS))
        raise ValueError(f"likelihood: expected one of {names}, or an instance of Likelihood, got {likelihood!r}.")
    return LIKELIHOODS[likelihood]()


def _holds(condition: Tensor) -> bool:
    """Whether it holds everywhere; True under vmap, where values cannot be read."""
    try:
        return bool(condition.all())
    except RuntimeError as error:
        if "vmap" in str(error):
            return True
        raise
