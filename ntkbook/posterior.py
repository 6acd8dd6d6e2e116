"""Gaussian processes given data: what `NTKGP.condition` returns."""

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from jaxtyping import Bool, Float
from linear_operator import to_linear_operator
from torch import Tensor

from ntkbook.iterative import IterativeConditioning, Report, left
from ntkbook.memory import require_memory, working_memory
from ntkbook.moving import Movable
from ntkbook.nystrom import Nystrom, NystromConditioning

if TYPE_CHECKING:
    from ntkbook.gp import NTKGP


class Posterior(Movable):
    """A Gaussian process given data: of one task, or of T tasks at the same inputs (then T leads every shape).

    Made by `NTKGP.condition` and `NTKGP.condition_tasks`. Tasks that were observed at the same points share one
    factorisation, or one cached subspace. Differentiable in new inputs; in the data by Cholesky alone. (Its subclass
    `ntkbook.tasks.TaskPosterior` is for many patterns of missing values and for hyperparameters of each task.)

    Threads may share one, as they may a `Linearization`: its calls of the network wait for each other. Your own calls
    of the network in another thread, or its training, do not, and would meet the library's tensors in it.

    To save one, `torch.save(posterior, file)`; to load it, `torch.load(file, weights_only=False)`, which runs code that
    the file holds. It then says the same to the last bit. The network's class and a function for the mean must be
    importable where it is loaded, and the versions of ntkbook and torch those that saved it.
    """

    def __init__(
        self,
        gp: "NTKGP",
        x: Tensor,
        y: Float[Tensor, "t n o"],
        noise: Float[Tensor, "n o"],
        *,
        new_noise: float | Tensor | None,
        tasks: bool,
    ) -> None:
        # As it is now: fitting the GP again must not change a posterior that was made before.
        self._gp = gp = copy.copy(gp)
        self._lin, self._scale, self._sigma2 = gp.lin, gp.outputscale, new_noise
        self._x, self._tasks, self._o = x.clone(), tasks, y.shape[2]
        residuals = (y - gp._mean(x)).flatten(1)
        self._observed, self._group_of = observed, _ = torch.unique(
            ~torch.isnan(y.flatten(1)), dim=0, return_inverse=True
        )
        gp.iterative = iterative = gp._solver(x)
        if iterative is not None:
            self._x = self._x.detach()
        gram = residuals.new_empty(0)
        if iterative is None:
            instead = 'Use fewer points, or solver="cg", which forms no Gram matrix.'
            gp._require_room(residuals.shape[1], copies=3 + len(observed), instead=instead)
            gram = gp.lin.gram(x).mul_(gp.outputscale)
        self._groups: list[Cholesky | IterativeConditioning | NystromConditioning] = []
        for g, seen in enumerate(observed):
            r, sigma2 = residuals[self._group_of == g][:, seen], noise.flatten()[seen]
            if iterative is None or not seen.any():
                matrix = gram[seen][:, seen] if seen.any() else r.new_empty(0, 0)
                self._groups.append(Cholesky(matrix, sigma2, r, seen))
                continue
            data = gp.lin, x, seen.view(-1, self._o), sigma2, r, gp.outputscale
            if isinstance(iterative, Nystrom):
                self._groups.append(NystromConditioning(*data, iterative))
            else:
                self._groups.append(IterativeConditioning(*data, gp.space, iterative, 1 / len(observed)))

    @property
    def log_marginal_likelihood(self) -> Tensor:
        """log p(y) of the observed values: a scalar, or (T,). Iterative solvers wait until it is asked for."""
        return self._per_task([group.log_likelihood[0] for group in self._groups])

    @property
    def log_marginal_likelihood_error(self) -> Tensor:
        """The error of `log_marginal_likelihood`, the quadrature's standard error above all; zero by Cholesky."""
        return self._per_task(
            [torch.full_like(group.log_likelihood[0], group.log_likelihood[1]) for group in self._groups]
        )

    @property
    def report(self) -> Report | None:
        """What an iterative solver reached; None by Cholesky, which is exact but for rounding."""
        if self._gp.iterative is None:
            return None
        reports = [group.report for group in self._groups]
        return Report(*(self._per_task(list(field)) for field in zip(*reports)))

    @property
    def solver(self) -> str:
        """ "cholesky", "cg" or "nystrom"; "eigh" for tasks with hyperparameters or many patterns of their own."""
        iterative = self._gp.iterative
        return "cholesky" if iterative is None else "nystrom" if isinstance(iterative, Nystrom) else "cg"

    @property
    def weights(self) -> Tensor:
        """α of (s²K + Σ) α = y − m(x): (n,) or (n, o), NaN where nothing was observed. The mean is m + s² K(·, x) α."""
        every = torch.full((len(self._group_of), len(self._x) * self._o), torch.nan).to(self._groups[0].weights)
        for g, (group, seen) in enumerate(zip(self._groups, self._observed)):
            every[(self._group_of == g)[:, None] & seen] = group.weights.flatten()
        every = every.view(-1, len(self._x), self._o)
        every = every if self._o > 1 else every[..., 0]
        return every if self._tasks else every[0]

    @property
    def _crossed(self) -> bool:
        """Whether predictions are made from Gram columns of all data."""
        return self._gp.space == "function" and not isinstance(self._gp.iterative, Nystrom)

    def _per_task(self, values: list[Tensor]) -> Tensor:
        """One tensor a group, put in the order of the tasks."""
        every = values[0].new_empty(len(self._group_of))
        for g, value in enumerate(values):
            every[self._group_of == g] = value
        return every if self._tasks else every[0]

    def __repr__(self) -> str:
        tasks = f"{len(self._group_of):,} tasks, " if self._tasks else ""
        return f"{type(self).__name__}({tasks}{len(self._x):,} examples, solver={self.solver!r}, of {self._gp!r})"

    def __call__(self, x: Tensor) -> MultivariateNormal:
        """The latent f at x (m, ...): mean (m,), or (m, o) with several outputs, and its covariance."""
        x = self._gp._inputs(x)
        mean, covariance = self._moments(x, full=True)
        return distribution(mean if self._tasks else mean[0], covariance if self._tasks else covariance[0])

    def predictive(self, x: Tensor, noise: float | Tensor | None = None) -> MultivariateNormal:
        """A new observation y at x: the latent f plus noise, per point if wanted; unless given, that of the data."""
        latent = self(x)
        sigma2 = self._noise_at(noise, latent.event_shape[0])
        mean, covariance = latent.mean, latent.covariance_matrix
        return distribution(mean if self._o > 1 else mean[..., None], covariance + torch.diag_embed(sigma2))

    def _noise_at(self, noise: float | Tensor | None, m: int) -> Float[Tensor, "*t mo"]:
        noise = self._sigma2 if noise is None else noise
        if noise is None:
            raise ValueError("predictive: each datum had its own noise, so say which noise= the new points have.")
        like = torch.zeros(m, self._o, dtype=self._lin.dtype, device=self._lin.device)
        return self._gp._noise(noise, like).flatten()

    def mean(self, x: Tensor) -> Tensor:
        """The mean of f at x: (m,) or (m, o), from the weights: cheaper than `marginals`. For many points."""
        return self._in_parts(x, lambda part: (self._means(part, self._cross(part)),))[0]

    def variance(self, x: Tensor) -> Tensor:
        """The variance of f at x, of the mean's shape. No m × m matrix is formed: for many points."""
        return self.marginals(x)[1]

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

    def marginals(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`mean` and `variance` at once, for the variance's price."""
        mean, variance = self._in_parts(x, lambda part: self._moments(part, full=False))
        return mean, variance

    def _in_parts(self, x: Tensor, compute: Callable[[Tensor], tuple[Float[Tensor, "t m o"], ...]]) -> list[Tensor]:
        """What it gives at the points x, as many at a time as fit the memory."""
        x = self._gp._inputs(x)
        columns = len(self._x) * self._o
        if not self._crossed:
            columns = max(1, *(int(group.report.rank.max()) for group in self._groups))
        size = max(1, working_memory(x.device) // (32 * columns * self._o))
        points = x if len(x) else self._x[:1]  # whose shapes are those of no points too
        found = [torch.cat(part, dim=1)[:, : len(x)] for part in zip(*map(compute, points.split(size)))]
        found = found if self._o > 1 else [value[..., 0] for value in found]
        return found if self._tasks else [value[0] for value in found]

    def _cross(self, x: Tensor) -> Float[Tensor, "mo no"]:
        """The prior covariance of f at x and at all data."""
        if self._crossed:
            return self._lin.gram(x, self._x).mul_(self._scale)
        # Only tasks without data, which take no column, look at it.
        return x.new_zeros((), dtype=self._lin.dtype).expand(len(x) * self._o, len(self._x) * self._o)

    def _means(self, x: Tensor, cross: Float[Tensor, "mo no"]) -> Float[Tensor, "t m o"]:
        prior = self._gp._mean(x)
        mean = prior.repeat(len(self._group_of), 1, 1)
        for g, group in enumerate(self._groups):
            mean[self._group_of == g] += group.mean(x, cross).reshape(-1, *prior.shape)
        return mean

    def _moments(self, x: Tensor, full: bool) -> tuple[Float[Tensor, "t m o"], Tensor]:
        """Means, and covariances (T, m·o, m·o) or variances (T, m, o)."""
        if full:
            self._require_covariances(x)
        cross = self._cross(x)
        mean = self._means(x, cross)
        prior = self._scale * (self._lin.gram(x) if full else self._lin.diagonal(x))
        second = prior.new_empty(len(mean), *prior.shape)
        for g, group in enumerate(self._groups):
            second[self._group_of == g] = group.covariance(x, cross, prior)
        return mean, second if full else second.view_as(mean)

    def _require_covariances(self, x: Tensor) -> None:
        nbytes = (len(self._group_of) + 2) * (len(x) * self._o) ** 2 * self._lin.dtype.itemsize
        what = f"The covariances of {len(self._group_of)} tasks at {len(x):,} points"
        require_memory(nbytes, x.device, what, "Use mean(x) and variance(x), which form none.")


class Cholesky(Movable):
    """One pattern of observed values, conditioned on by a factor of its Gram matrix, for the tasks that share it."""

    def __init__(
        self,
        gram: Float[Tensor, "N N"],
        noise: Float[Tensor, " N"],
        residuals: Float[Tensor, "t N"],
        seen: Bool[Tensor, " every"],
    ) -> None:
        self._seen, self._factor = seen, _factorise(gram, noise)
        whitened = torch.linalg.solve_triangular(self._factor, residuals.T, upper=False)
        self.weights = torch.linalg.solve_triangular(self._factor.T, whitened, upper=True).T
        constant = self._factor.diagonal().log().sum() + 0.5 * len(noise) * math.log(2 * math.pi)
        self.log_likelihood = (-0.5 * whitened.square().sum(0) - constant, 0.0)
        zero, count = residuals.new_zeros(len(residuals)), residuals.new_zeros(len(residuals), dtype=torch.long)
        self.report = Report(zero, zero, zero, count, count, count == 0)

    def mean(self, x: Tensor, cross: Float[Tensor, "m every"]) -> Float[Tensor, "t m"]:
        """Each task's mean at x less the prior mean. `cross`: the prior covariance of f at x and at all data."""
        return self.weights @ self._columns(cross).T

    def covariance(self, x: Tensor, cross: Float[Tensor, "m every"], prior: Tensor) -> Tensor:
        """The covariance at x, or its diagonal where `prior` is one."""
        return left(prior, torch.linalg.solve_triangular(self._factor, self._columns(cross).T, upper=False))

    def _columns(self, cross: Float[Tensor, "m every"]) -> Float[Tensor, "m N"]:
        return cross if self._seen.all() else cross[:, self._seen]  # a copy


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


def distribution(mean: Float[Tensor, "*t m o"], covariance: Float[Tensor, "*t mo mo"]) -> MultivariateNormal:
    """A multivariate normal of m points, of several outputs where mean says so."""
    operator = to_linear_operator(covariance)
    if mean.shape[-1] == 1:
        return MultivariateNormal(mean[..., 0], operator)
    return MultitaskMultivariateNormal(mean, operator, interleaved=True)
