"""Conditioning a Gaussian process by products with its Jacobian alone, in function space or in parameter space."""

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ntkbook.krylov import Subspace, Whitened, conjugate_gradients
from ntkbook.linearize import Linearization
from ntkbook.memory import require_memory, total_memory


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
        for name in ("tolerance", "max_iterations", "rank", "slack", "block", "probes"):
            value = getattr(self, name)
            least = 2 if name == "probes" else 0
            if value is not None and not (value > 0 and value >= least):
                wanted = "at least two probes" if least else f"a positive {name}"
                raise ValueError(f"Iterative: expected {wanted}, got {value}.")


class Report(NamedTuple):
    """What an iterative conditioning reached; one number a task, or (T,) for T tasks.

    Attributes:
        residual: of the mean's linear system, relative to that of the zero vector.
        mean_error: a bound on the mean's error anywhere, in posterior standard deviations there.
        variance_slack: where `variance` says v, the exact posterior variance lies in [v / (1 + slack), v].
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


class IterativeConditioning:
    """One pattern of observed values, conditioned on by products, for the tasks that share it."""

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
    ) -> None:
        self._lin, self._seen, self._scale, self._options = lin, seen.flatten(), scale, options
        self._deviation = noise.sqrt()
        self._target = (residuals / self._deviation).T
        self._system = system = Whitened(lin, x, seen, noise, scale)
        parameter = space == "parameter"
        rank = self._rank(parameter)
        self._subspace = Subspace(
            system,
            self._target,
            rank=rank,
            slack=options.slack,
            block=min(options.block, -(-rank // 4)),  # at least four steps, for directions that are better than random
            seed=options.seed,
            keep=parameter,
        )
        if parameter:
            # The residual of (I + AᵀA) φ = Aᵀb by way of the data's, whose rounding the square of A's size does not
            # magnify. Its size is a bound on the mean's error in posterior standard deviations: (I + AᵀA)⁻¹ is below
            # the preconditioner, and that is what the subspace is safe for. In function space, its plain norm is.
            apply = lambda v: system.adjoint(system.forward(v)) + v  # noqa: E731
            residual = lambda v: system.adjoint(self._target - system.forward(v)) - v  # noqa: E731
            size = lambda r, z: (r * z).sum(0).clamp_min(0).sqrt()  # noqa: E731
        else:
            apply = lambda a: system.forward(system.adjoint(a)) + a  # noqa: E731
            residual = lambda a: self._target - apply(a)  # noqa: E731
            size = lambda r, z: r.norm(dim=0)  # noqa: E731
        self._solution, error, relative, iterations = conjugate_gradients(
            apply,
            residual,
            self._target.new_zeros(system.shape[1 if parameter else 0], len(residuals)),
            self._subspace.precondition,
            size,
            tolerance=options.tolerance,
            max_iterations=options.max_iterations,
        )
        everywhere = torch.ones_like(error)
        self.report = Report(
            residual=relative,
            mean_error=error,
            variance_slack=everywhere * self._subspace.slack,
            iterations=everywhere.long() * iterations,
            rank=everywhere.long() * self._subspace.rank,
            converged=relative <= options.tolerance,
        )
        self._warn(iterations)

    def moments(self, x: Tensor, cross: Float[Tensor, "m every"]) -> tuple[Float[Tensor, "t m"], Float[Tensor, "r m"]]:
        """Each task's mean at x less the prior mean, and E with posterior covariance = prior − EᵀE.

        `cross`: the prior covariance of f at x and at all data; parameter space does without.
        """
        if self._subspace.c is not None:
            parts = (self._lin.jvp(x, part).flatten(0, 1).T for part in (self._solution, self._subspace.c))
            mean, explained = (self._scale**0.5 * part for part in parts)
            return mean, explained
        cross = cross[:, self._seen] / self._deviation
        lower = self._subspace.root.T
        explained = torch.linalg.solve_triangular(lower, (cross @ self._subspace.q).T, upper=False)
        return (cross @ self._solution).T, explained

    @cached_property
    def log_likelihood(self) -> tuple[Float[Tensor, " t"], float]:
        """log p(y) of each task, and its standard error, which is the log-determinant's."""
        s, b = self._solution, self._target
        # bᵀ(I + AAᵀ)⁻¹b as an extreme value, whose error is the square of the solution's.
        if self._subspace.c is not None:
            quadratic = (b - self._system.forward(s)).square().sum(0) + s.square().sum(0)
        else:
            quadratic = (s * (2 * b - self._system.forward(self._system.adjoint(s)) - s)).sum(0)
        rest, error = self._subspace.outside(self._system, self._options.probes, self._options.seed + 1)
        log_determinant = self._subspace.log_determinant + rest + 2 * float(self._deviation.log().sum())
        return -0.5 * (quadratic + log_determinant + len(b) * math.log(2 * math.pi)), 0.5 * error

    def _rank(self, parameter: bool) -> int:
        n, p = self._system.shape
        itemsize = self._target.element_size()
        each = (2 * n + (3 * p if parameter else 0)) * itemsize  # Q, AAᵀQ; G and two more of its size in its QR
        if self._options.rank is None:
            return max(1, min(n, p, 1000, total_memory(self._target.device) // 8 // each))
        rank = min(n, p, self._options.rank)
        require_memory(rank * each, self._target.device, f"A subspace of rank {rank:,}", "Use a smaller rank=.")
        return rank

    def _warn(self, iterations: int) -> None:
        report, options = self.report, self._options
        precise = "" if self._target.dtype == torch.double else ", or dtype=torch.float64"
        if not report.converged.all():
            warnings.warn(
                f"Conjugate gradients stopped after {iterations} iterations at a relative residual of "
                f"{float(report.residual.max()):.1e}, above the tolerance of {options.tolerance:.1e}: the mean is "
                f"within {float(report.mean_error.max()):.1e} posterior standard deviations. Use a larger rank or more "
                f"max_iterations in solver=Iterative(...){precise}.",
                ConvergenceWarning,
                stacklevel=5,
            )
        if options.rank is None and self._subspace.slack > max(0.01, options.slack):
            warnings.warn(
                f"A subspace of rank {self._subspace.rank:,} leaves variances that may be up to "
                f"{self._subspace.slack:.1e} times too large. Use a larger rank in solver=Iterative(...){precise}, or "
                "set it to what it is if that will do.",
                ConvergenceWarning,
                stacklevel=5,
            )
