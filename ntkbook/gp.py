"""Gaussian processes whose kernel is the finite neural tangent kernel of a network, in function space."""

import copy
import math
from collections.abc import Callable

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from jaxtyping import Float
from linear_operator import to_linear_operator
from torch import Tensor, nn

from ntkbook.hyperparameters import ProfileLikelihood
from ntkbook.linearize import Linearization
from ntkbook.memory import require_memory, working_memory

Mean = str | Callable[[Tensor], Tensor]


class NTKGP:
    """y = m(x) + J(x) θ′ + ε with θ′ ~ N(0, s² I) and ε ~ N(0, σ²): the network's linearisation as a Gaussian process.

    Adapting to a task is conditioning on its data: closed form, Equation 3 of the paper in its dual form,
    with a Cholesky factorisation of s²K + σ²I at any size that fits in memory. Parameters are `Linearization`'s.

    Args:
        net: a network, or a `Linearization` of one.
        outputscale: s², the prior variance of a parameter. 1 in the paper.
        noise: σ², the variance of an observation.
        mean: m(x). "zero" as in the paper; "constant", fitted by `fit`, zero until then; "network", f(x; θ₀);
            or a function from x (n, ...) to (n,) or (n, o).
        dtype: of all computations, whatever the network's: float32 loses the small eigenvalues.
    """

    def __init__(
        self,
        net: nn.Module | Linearization,
        *,
        outputscale: float = 1.0,
        noise: float = 1e-2,
        mean: Mean = "zero",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if isinstance(mean, str) and mean not in ("zero", "constant", "network"):
            raise ValueError(f'mean: expected "zero", "constant", "network" or a function, got {mean!r}.')
        for name, value in (("outputscale", outputscale), ("noise", noise)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a positive number (a variance), got {value}.")
        lin = net if isinstance(net, Linearization) else Linearization(net)
        self.lin = lin if lin.dtype == dtype else lin.to(dtype=dtype)
        self.outputscale, self.noise, self.mean = float(outputscale), float(noise), mean
        self.constant: Float[Tensor, " o"] | None = None

    def __call__(self, x: Tensor) -> MultivariateNormal:
        """The prior of the latent f at x."""
        x = self._inputs(x)
        mean = self._mean(x)
        return _distribution(mean, self.outputscale * self.lin.gram(x))

    def fit(self, x: Tensor, y: Tensor, noise: float | Tensor | None = None) -> "NTKGP":
        """Set outputscale, noise and a constant mean to those of the largest marginal likelihood of y at x.

        With one eigendecomposition of K the likelihood of a ratio σ²/s² costs n operations, and s² and the constant
        are then closed-form, so one dimension is searched: a grid over 16 decades, then Brent's method.
        Given `noise`, a variance for each point, only outputscale (and constant) are fitted.

        Args:
            x: (n, ...); y: (n,) or (n, o), NaN where not observed.
        """
        x, y = self._inputs(x), self._targets(x, y[None])[0]
        seen = ~torch.isnan(y).flatten()
        n, o = y.shape
        r = (y - self._mean(x, fitting=True)).flatten()[seen]
        if len(r) < 2:
            raise ValueError(f"fit: expected at least two observed values, got {len(r)}.")
        self._require_room(n * o, copies=4)
        gram = self.lin.gram(x)[seen][:, seen]
        basis = torch.eye(o, dtype=r.dtype, device=r.device).repeat(n, 1)[seen]
        used = basis.any(0) if self.mean == "constant" else torch.zeros(o, dtype=torch.bool, device=r.device)
        basis = basis[:, used]
        fixed = None if noise is None else self._noise(noise, y).flatten()[seen].rsqrt()
        if fixed is not None:
            gram, r, basis = fixed[:, None] * gram * fixed, fixed * r, fixed[:, None] * basis
        eigenvalues, vectors = torch.linalg.eigh(gram)
        likelihood = ProfileLikelihood(eigenvalues.clamp_min(0), vectors.T @ r, vectors.T @ basis, fixed is not None)
        best = likelihood.maximise()
        scale, noise_, constant = likelihood.solution(best)
        self.outputscale = scale
        if fixed is None:
            self.noise = noise_
        if self.mean == "constant":
            self.constant = y.new_zeros(o)  # and stays so for an output that was never observed
            self.constant[used] = constant
        return self

    def condition(self, x: Tensor, y: Tensor, noise: float | Tensor | None = None) -> "Posterior":
        """The posterior given y (n,) or (n, o) at x (n, ...), NaN where not observed.

        `noise`: σ² of these points, a number or one per point, (n,) or (n, o); the GP's own unless given.
        """
        x, y = self._inputs(x), self._targets(x, y[None])
        return Posterior(self, x, y, self._noise(noise, y[0]), own_noise=noise is None, tasks=False)

    def condition_tasks(self, x: Tensor, y: Tensor, noise: float | Tensor | None = None) -> "Posterior":
        """The posteriors of T tasks at the same inputs: y (T, n) or (T, n, o), NaN where not observed.

        Tasks that were observed at the same points share one factorisation.
        """
        x = self._inputs(x)
        if y.ndim < 2 or len(y) == 0:
            raise ValueError(f"y: expected (T, n) or (T, n, o) with at least one task, got {tuple(y.shape)}.")
        y = self._targets(x, y)
        return Posterior(self, x, y, self._noise(noise, y[0]), own_noise=noise is None, tasks=True)

    def _inputs(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor (n, ...), got {type(x).__name__}.")
        return x.to(self.lin.device, self.lin.dtype if x.is_floating_point() else None)

    def _targets(self, x: Tensor, y: Tensor) -> Float[Tensor, "t n o"]:
        """Each task's observations, (T, n) or (T, n, o), checked."""
        y = y.to(self.lin.device, self.lin.dtype)
        o = self.lin.num_outputs(self._inputs(x))
        if y.shape[1:] == (len(x),) and o == 1:
            y = y[..., None]
        if y.shape[1:] != (len(x), o):
            wanted = f"({len(x)},) or ({len(x)}, 1)" if o == 1 else f"({len(x)}, {o})"
            raise ValueError(
                f"y: expected {wanted} a task for {len(x)} examples and {o} outputs, got {tuple(y.shape[1:])}."
            )
        if torch.isinf(y).any():
            raise ValueError("y: expected finite values, or NaN where nothing was observed; got an infinite one.")
        return y

    def _noise(self, noise: float | Tensor | None, y: Float[Tensor, "n o"]) -> Float[Tensor, "n o"]:
        noise = torch.as_tensor(self.noise if noise is None else noise, dtype=y.dtype, device=y.device)
        if noise.shape == (len(y),):
            noise = noise[:, None]
        if noise.ndim not in (0, 2) or (noise.ndim == 2 and noise.shape not in ((len(y), 1), y.shape)):
            raise ValueError(f"noise: expected a number, ({len(y)},) or {tuple(y.shape)}, got {tuple(noise.shape)}.")
        if not (noise > 0).all() or torch.isinf(noise).any():
            raise ValueError("noise: expected positive, finite variances.")
        return noise.expand(y.shape)

    def _mean(self, x: Tensor, fitting: bool = False) -> Float[Tensor, "n o"]:
        outputs = self.lin.outputs(x)
        if self.mean in ("zero", "constant"):
            zero = torch.zeros_like(outputs)
            return zero if self.mean == "zero" or fitting or self.constant is None else zero + self.constant
        mean = self.mean(x).to(outputs) if callable(self.mean) else outputs
        mean = mean[:, None] if mean.ndim == 1 else mean
        if mean.shape != outputs.shape:
            raise ValueError(f"mean: expected values of shape {tuple(outputs.shape)}, got {tuple(mean.shape)}.")
        if not torch.isfinite(mean).all():
            raise ValueError(f"mean: {int((~torch.isfinite(mean)).sum())} of {mean.numel()} values are not finite.")
        return mean

    def _require_room(self, n: int, copies: int = 3) -> None:
        nbytes = copies * n * n * torch.empty(0, dtype=self.lin.dtype).element_size()
        require_memory(
            nbytes, self.lin.device, f"Conditioning on {n:,} values (a Gram matrix and its factor)", "Use fewer points."
        )


class Posterior:
    """A Gaussian process given data: of one task, or of T tasks at the same inputs (then T leads every shape).

    Made by `NTKGP.condition` and `NTKGP.condition_tasks`.

    Attributes:
        log_marginal_likelihood: log p(y) of the observed values: a scalar, or (T,).
    """

    def __init__(
        self,
        gp: NTKGP,
        x: Tensor,
        y: Float[Tensor, "t n o"],
        noise: Float[Tensor, "n o"],
        *,
        own_noise: bool,
        tasks: bool,
    ) -> None:
        # As it is now: fitting the GP again must not change a posterior that was made before.
        self._gp = gp = copy.copy(gp)
        self._lin, self._scale, self._sigma2 = gp.lin, gp.outputscale, gp.noise if own_noise else None
        self._x, self._tasks, self._o = x, tasks, y.shape[2]
        residuals = (y - gp._mean(x)).flatten(1)
        observed, group_of = torch.unique(~torch.isnan(y.flatten(1)), dim=0, return_inverse=True)
        gp._require_room(residuals.shape[1], copies=3 + len(observed))
        gram = gp.lin.gram(x).mul_(gp.outputscale)
        self._group_of = group_of
        self._groups: list[tuple[Tensor, Tensor, Tensor]] = []  # observed (N,), factor L, weights (T_g, N_g)
        log_likelihood = residuals.new_empty(len(residuals))
        for g, seen in enumerate(observed):
            members = group_of == g
            r = residuals[members][:, seen]
            factor = _factorise(gram[seen][:, seen], noise.flatten()[seen])
            whitened = torch.linalg.solve_triangular(factor, r.T, upper=False)
            weights = torch.linalg.solve_triangular(factor.T, whitened, upper=True).T
            log_likelihood[members] = (
                -0.5 * whitened.square().sum(0)
                - factor.diagonal().log().sum()
                - 0.5 * r.shape[1] * math.log(2 * math.pi)
            )
            self._groups.append((seen, factor, weights))
        self.log_marginal_likelihood = log_likelihood if tasks else log_likelihood[0]

    def __call__(self, x: Tensor) -> MultivariateNormal:
        """The latent f at x (m, ...): mean (m,), or (m, o) with several outputs, and its covariance."""
        x = self._gp._inputs(x)
        mean, covariance = self._moments(x, full=True)
        return _distribution(mean if self._tasks else mean[0], covariance if self._tasks else covariance[0])

    def predictive(self, x: Tensor, noise: float | Tensor | None = None) -> MultivariateNormal:
        """A new observation y at x: the latent f plus noise, the GP's σ² unless one is given, per point if wanted."""
        if noise is None and self._sigma2 is None:
            raise ValueError("predictive: the data had a noise of their own, so say which noise= the new points have.")
        latent = self(x)
        m = latent.event_shape[0]
        sigma2 = self._gp._noise(self._sigma2 if noise is None else noise, latent.mean.new_empty(m, self._o))
        mean, covariance = latent.mean, latent.covariance_matrix
        return _distribution(mean if self._o > 1 else mean[..., None], covariance + torch.diag_embed(sigma2.flatten()))

    def mean(self, x: Tensor) -> Tensor:
        """The mean of f at x: (m,) or (m, o). No m × m matrix is formed: for many points."""
        return self._marginals(x)[0]

    def variance(self, x: Tensor) -> Tensor:
        """The variance of f at x, of the mean's shape. No m × m matrix is formed: for many points."""
        return self._marginals(x)[1]

    def sample(self, x: Tensor, num_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Joint draws of f at x, (num_samples, m) or (num_samples, m, o), through the covariance's eigenvectors.

        These exist also where the covariance is singular, as it is for more points than parameters.
        """
        mean, covariance = self._moments(self._gp._inputs(x), full=True)
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp_min(0).sqrt()[:, None]
        z = torch.randn(num_samples, *root.shape[:-1], generator=generator, dtype=root.dtype, device=root.device)
        draws = mean + torch.einsum("tij,stj->sti", root, z).reshape(num_samples, *mean.shape)
        draws = draws if self._o > 1 else draws[..., 0]
        return draws if self._tasks else draws[:, 0]

    def _marginals(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self._gp._inputs(x)
        size = max(1, working_memory(x.device) // (32 * len(self._x) * self._o * self._o))
        parts = [self._moments(part, full=False) for part in x.split(size)]
        mean, variance = (torch.cat(part, dim=1) for part in zip(*parts))
        if self._o == 1:
            mean, variance = mean[..., 0], variance[..., 0]
        return (mean, variance) if self._tasks else (mean[0], variance[0])

    def _moments(self, x: Tensor, full: bool) -> tuple[Float[Tensor, "t m o"], Tensor]:
        """Means, and covariances (T, m·o, m·o) or variances (T, m, o)."""
        prior_mean = self._gp._mean(x)
        if full:
            nbytes = (len(self._group_of) + 2) * prior_mean.numel() ** 2 * prior_mean.element_size()
            what = f"The covariances of {len(self._group_of)} tasks at {len(x):,} points"
            require_memory(nbytes, x.device, what, "Use mean(x) and variance(x), which form none.")
        cross = self._scale * self._lin.gram(x, self._x)
        prior = self._scale * (self._lin.gram(x) if full else self._lin.diagonal(x))
        mean = prior_mean.repeat(len(self._group_of), 1, 1)
        second = prior.new_empty(len(self._group_of), *prior.shape)
        for g, (seen, factor, weights) in enumerate(self._groups):
            members = self._group_of == g
            mean[members] += (weights @ cross[:, seen].T).view(-1, *prior_mean.shape)
            explained = torch.linalg.solve_triangular(factor, cross[:, seen].T, upper=False)
            if full:
                second[members] = prior - explained.T @ explained
            else:
                second[members] = (prior - explained.square().sum(0)).clamp_min(0)
        return mean, second if full else second.view(-1, *prior_mean.shape)


def _factorise(gram: Tensor, noise: Tensor) -> Tensor:
    """The Cholesky factor of gram + noise, as it stands: no jitter is added behind anyone's back."""
    matrix = gram.clone()
    matrix.diagonal().add_(noise)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info:
        raise ValueError(
            f"The Gram matrix plus noise is not positive definite in {gram.dtype}: the noise, {noise.min():.1e}, is "
            f"below the rounding of the matrix, whose largest entry is {gram.diagonal().max():.1e}. Use a larger "
            "noise, or dtype=torch.float64."
        )
    return factor


def _distribution(mean: Float[Tensor, "*t m o"], covariance: Float[Tensor, "*t mo mo"]) -> MultivariateNormal:
    operator = to_linear_operator(covariance)
    if mean.shape[-1] == 1:
        return MultivariateNormal(mean[..., 0], operator)
    return MultitaskMultivariateNormal(mean, operator, interleaved=True)
