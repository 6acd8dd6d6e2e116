"""Conditioning a Gaussian process by products with its Jacobian alone, in function space or in parameter space."""

import math
import warnings
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Integral
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ntkbook.krylov import Subspace, Whitened, conjugate_gradients
from ntkbook.linearize import Linearization
from ntkbook.memory import require_memory, total_memory
from ntkbook.moving import Movable


class ConvergenceWarning(RuntimeWarning):
    """An iterative solve stopped before its tolerance, or a cached subspace is too small for its variances."""


@dataclass(frozen=True)
class Iterative:
    """How `NTKGP` solves by products with the Jacobian (Section 2.1 and Appendix A of the paper).

    Attributes:
        tolerance: of the residual of the mean's linear system, relative to that of the zero vector.
        max_iterations: of conjugate gradients, all restarts together. A warning says when they did not do.
        rank: directions in the cached subspace, at most. Unless given, 1,000, or what an eighth of the machine's memory
            holds; then a warning says when that leaves more than 1 % of slack.
        slack: of the variances, see `Report`: the subspace grows until it is reached, or its rank.
        block: vectors that are multiplied at once while the subspace grows.
        probes: random vectors of the log-determinant's stochastic Lanczos quadrature.
        seed: of the subspace's first vectors and of the probes.
    """

    tolerance: float = 1e-8
    max_iterations: int = 1000
    rank: int | None = None
    slack: float = 1e-8
    block: int = 8
    probes: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tolerance", "slack"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"Iterative: expected a positive, finite {name}, got {value}.")
        for name, least in (("max_iterations", 1), ("rank", 1), ("block", 1), ("probes", 2)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Integral) or value is True or value < least):
                raise ValueError(f"Iterative: expected a whole number of {name}, at least {least}, got {value}.")


class Report(NamedTuple):
    """What an iterative conditioning reached; one number a task, or (T,) for T tasks.

    Attributes:
        residual: of the mean's linear system, relative to that of the zero vector.
        mean_error: a bound on the mean's error anywhere, in posterior standard deviations there; but for rounding, of
            the condition number's size in function space, of its square root's in parameter space.
        variance_slack: where `variance` says v, the exact posterior variance lies in [v / (1 + slack), v]; but for
            rounding of the prior variance.
        iterations: of conjugate gradients.
        rank: directions in the cached subspace.
        converged: whether `residual` is within the tolerance.
    """

    residual: Tensor
    mean_error: Tensor
    variance_slack: Tensor
    iterations: Tensor
    rank: Tensor
    converged: Tensor


def left(prior: Tensor, explained: Float[Tensor, "r m"]) -> Tensor:
    """prior − EᵀE (m, m), or its diagonal (m,), which is not negative, where `prior` is one."""
    if prior.ndim == 2:
        return prior - explained.T @ explained
    return (prior - explained.square().sum(0)).clamp_min(0)


class IterativeConditioning(Movable):
    """One pattern of observed values, conditioned on by products, for the tasks that share it.

    Its results are constants: no gradient flows to x, residuals or noise.

    Args:
        seen: which values were observed. noise: theirs. residuals: theirs less the prior mean, of each task.
        share: of the memory that a cached subspace may take: one over the number of patterns.
    """

    def __init__(
        self,
        lin: Linearization,
        x: Tensor,
        seen: Bool[Tensor, "n o"],
        noise: Float[Tensor, " N"],
        residuals: Float[Tensor, "t N"],
        scale: float,
        space: str,
        options: Iterative,
        share: float = 1.0,
    ) -> None:
        x, noise, residuals = x.detach(), noise.detach(), residuals.detach()
        self._lin, self._seen, self._scale, self._options = lin, seen.flatten(), scale, options
        self._deviation = noise.sqrt()
        self._target = (residuals / self._deviation).T
        # Solved for targets of size one, whose squares neither overflow nor underflow.
        self._unit = self._target.abs().amax(0)
        self._unit = torch.where(self._unit > 0, self._unit, 1.0)
        self._target = self._target / self._unit
        self._system = system = Whitened(lin, x, seen, noise, scale)
        parameter = space == "parameter"
        rank = self._rank(parameter, share)
        self._subspace = Subspace(
            system,
            self._target,
            rank=rank,
            slack=options.slack,
            block=min(options.block, -(-rank // 4)),  # at least four steps, for directions that are better than random
            seed=options.seed,
            keep=parameter,
        )
        size = system.shape[1 if parameter else 0]
        at_once = max(1, total_memory(x.device) // 16 // (8 * size * self._target.element_size()))
        solved = [self._solve(part, parameter) for part in self._target.split(at_once, dim=1)]
        solution, error, relative, iterations = (torch.cat(parts, -1) for parts in zip(*solved))
        self._solution = solution
        everywhere = torch.ones_like(error)
        self.report = Report(
            residual=relative,
            mean_error=error * self._unit,
            variance_slack=everywhere * self._subspace.slack,
            iterations=iterations,
            rank=everywhere.long() * self._subspace.rank,
            converged=relative <= options.tolerance,
        )
        self._warn()

    def _solve(self, target: Float[Tensor, "N t"], parameter: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The solution for some tasks, its residual's size, that relative to the start's, and iterations, (t,) each."""
        forward, adjoint = self._system.forward, self._system.adjoint
        solve = partial(
            conjugate_gradients,
            start=target.new_zeros(self._system.shape[1 if parameter else 0], target.shape[1]),
            precondition=self._subspace.precondition,
            tolerance=self._options.tolerance,
            max_iterations=self._options.max_iterations,
        )
        if parameter:
            # The residual of (I + AᵀA) φ = Aᵀb by way of the data's, whose rounding the square of A's size does not
            # magnify. Its size is a bound on the mean's error in posterior standard deviations: (I + AᵀA)⁻¹ is below
            # the preconditioner, and that is what the subspace is safe for. In function space, its plain norm is.
            solution, error, relative, used = solve(
                lambda v: adjoint(forward(v)) + v,
                lambda v: adjoint(target - forward(v)) - v,
                size=lambda r, energy: energy.sqrt(),
            )
        else:
            solution, error, relative, used = solve(
                lambda a: forward(adjoint(a)) + a,
                lambda a: target - (forward(adjoint(a)) + a),
                size=lambda r, energy: r.norm(dim=0),
            )
        return solution, error, relative, torch.full_like(error, used).long()

    def mean(self, x: Tensor, cross: Float[Tensor, "m every"]) -> Float[Tensor, "t m"]:
        """Each task's mean at x less the prior mean.

        `cross`: the prior covariance of f at x and at all data; parameter space does without.
        """
        if self._subspace.c is not None:
            moved = self._scale**0.5 * self._lin.jvp(x, self._solution).flatten(0, 1)
        else:
            moved = (cross[:, self._seen] / self._deviation) @ self._solution
        return self._unit[:, None] * moved.T

    def covariance(self, x: Tensor, cross: Float[Tensor, "m every"], prior: Tensor) -> Tensor:
        """The covariance at x, or its diagonal where `prior` is one."""
        if self._subspace.c is not None:
            return left(prior, self._scale**0.5 * self._lin.jvp(x, self._subspace.c).flatten(0, 1).T)
        cross = (cross[:, self._seen] / self._deviation) @ self._subspace.q
        return left(prior, torch.linalg.solve_triangular(self._subspace.root.T, cross.T, upper=False))

    @property
    def weights(self) -> Float[Tensor, "t N"]:
        """α of (s²K + Σ) α = y − m for each task."""
        parameter = self._subspace.c is not None
        solution = self._target - self._system.forward(self._solution) if parameter else self._solution
        return (solution / self._deviation[:, None] * self._unit).T

    @cached_property
    def log_likelihood(self) -> tuple[Float[Tensor, " t"], float]:
        """log p(y) of each task, and its standard error, which is the log-determinant's."""
        s, b = self._solution, self._target
        # bᵀ(I + AAᵀ)⁻¹b as an extreme value, whose error is the square of the solution's.
        if self._subspace.c is not None:
            quadratic = (b - self._system.forward(s)).square().sum(0) + s.square().sum(0)
        else:
            quadratic = (s * (2 * b - self._system.forward(self._system.adjoint(s)) - s)).sum(0)
        quadratic = quadratic * self._unit.square()
        rest, error = self._subspace.outside(self._system, self._options.probes, self._options.seed + 1)
        log_determinant = self._subspace.log_determinant + rest + 2 * float(self._deviation.log().sum())
        return -0.5 * (quadratic + log_determinant + len(b) * math.log(2 * math.pi)), 0.5 * error

    def _rank(self, parameter: bool, share: float) -> int:
        n, p = self._system.shape
        device, itemsize = self._target.device, self._target.element_size()
        each = (2 * n + (3 * p if parameter else 0)) * itemsize  # Q, AAᵀQ; G and two more of its size in its QR
        affordable = int(share * total_memory(device) / 8 / each)
        rank = min(n, p, self._options.rank or max(1, min(1000, affordable)))
        require_memory(rank * each, device, f"A subspace of rank {rank:,}", "Use a smaller rank= in Iterative(...).")
        return rank

    def _warn(self) -> None:
        report, options = self.report, self._options
        precise = "" if self._target.dtype == torch.double else ", or dtype=torch.float64"
        if not report.converged.all():
            warnings.warn(
                f"Conjugate gradients stopped after {int(report.iterations.max())} iterations at a relative residual "
                f"of {float(report.residual.max()):.1e}, above the tolerance of {options.tolerance:.1e}: the mean is "
                f"within {float(report.mean_error.max()):.1e} posterior standard deviations. Use a larger rank or more "
                f"max_iterations in solver=Iterative(...){precise}.",
                ConvergenceWarning,
                stacklevel=5,
            )
        if options.rank is None and self._subspace.slack > max(0.01, options.slack):
            warnings.warn(
                f"A subspace of rank {self._subspace.rank:,} leaves variances that may be up to "
                f"{1 + self._subspace.slack:.3g} times too large. Use a larger rank in solver=Iterative(...){precise}, "
                "or set it to what it is if that will do.",
                ConvergenceWarning,
                stacklevel=5,
            )
