"""What chapter 1 times, and what it compares an iterative posterior with."""

import math
import time
import warnings
from contextlib import ExitStack
from typing import NamedTuple

import torch
from jaxtyping import Float
from linear_operator import settings
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from ntkbook import NTKGP, Iterative, Linearization


class Timing(NamedTuple):
    """One log marginal likelihood: the time it took, its value, and what the solver knows of its error.

    Attributes:
        seconds: wall time, conditioning included.
        value: log p(y).
        standard_error: of the value, from the log-determinant's random probes; 0 by Cholesky, nan if not reported.
        residual: of the linear system, relative; 0 by Cholesky, nan if not reported.
        iterations: of conjugate gradients; -1 if not reported.
    """

    seconds: float
    value: float
    standard_error: float = 0.0
    residual: float = 0.0
    iterations: int = 0


def time_log_likelihood(
    lin: Linearization, x: Float[Tensor, "n d"], y: Float[Tensor, " n"], noise: float, method: str, solver: Iterative
) -> Timing:
    """Time log p(y) once, from the network on.

    Args:
        lin: in float64. x: inputs; y: observations; noise: σ².
        method: "cholesky", "function" or "parameter" (`NTKGP` with `solver`), or "default": `inv_quad_logdet` of
            linear_operator by conjugate gradients with the settings it comes with, a tolerance of 1 among them.
        solver: of the two iterative methods.
    """
    start = time.perf_counter()
    if method == "default":
        return Timing(*_by_default(lin, x, y, noise, start), torch.nan, torch.nan, -1)
    space = "parameter" if method == "parameter" else "function"
    gp = NTKGP(lin, noise=noise, space=space, solver="cholesky" if method == "cholesky" else solver)
    posterior = gp.condition(x, y)
    value = float(posterior.log_marginal_likelihood)
    seconds, report = time.perf_counter() - start, posterior.report
    if report is None:
        return Timing(seconds, value)
    error = float(posterior.log_marginal_likelihood_error)
    return Timing(seconds, value, error, float(report.residual), int(report.iterations))


def _by_default(lin: Linearization, x: Tensor, y: Tensor, noise: float, start: float) -> tuple[float, float]:
    operator = lin.operator(x, method="products").add_diagonal(torch.tensor(noise, dtype=y.dtype, device=y.device))
    with ExitStack() as stack:
        # The defaults by name, for other libraries change them when they are imported.
        for setting in (
            settings.fast_computations(covar_root_decomposition=True, log_prob=True, solves=True),
            settings.max_cholesky_size(0),
            settings.cg_tolerance(1),
            settings.max_cg_iterations(1000),
            settings.num_trace_samples(10),
            settings.max_lanczos_quadrature_iterations(20),
            settings.max_preconditioner_size(15),
            torch.random.fork_rng([]),
            warnings.catch_warnings(),
        ):
            stack.enter_context(setting)
        warnings.simplefilter("ignore", NumericalWarning)  # it says itself that it has not converged
        torch.manual_seed(0)
        quadratic, log_determinant = operator.inv_quad_logdet(y[:, None], logdet=True)
    assert quadratic is not None  # both were asked for
    assert log_determinant is not None
    value = -0.5 * (float(quadratic + log_determinant) + len(y) * math.log(2 * math.pi))
    return time.perf_counter() - start, value


def krylov_variance(
    lin: Linearization, x: Tensor, y: Float[Tensor, " n"], x_star: Tensor, *, noise: float, rank: int
) -> Float[Tensor, " m"]:
    """The posterior variance of a Krylov subspace of JᵀJ alone: prior variance outside it is forgotten.

    σ² j V (Vᵀ (JᵀJ + σ²I) V)⁻¹ Vᵀ jᵀ with an orthonormal basis V of rank vectors from Jᵀy: what a parameter-space
    posterior gives that puts a projection of its matrix into the inverse. For one output and s² = 1.
    """
    j, j_star = lin.jacobian(x), lin.jacobian(x_star)
    basis = (j.T @ y)[:, None]
    for _ in range(rank - 1):
        new = j.T @ (j @ basis[:, -1:])
        for _ in range(3):  # orthogonal to rounding
            new = new / new.norm()
            new = new - basis @ torch.linalg.lstsq(basis, new).solution
        basis = torch.linalg.qr(torch.cat([basis, new / new.norm()], 1))[0]
    inside, image = j_star @ basis, j @ basis
    matrix = image.T @ image + noise * torch.eye(rank, dtype=image.dtype, device=image.device)
    return noise * (inside * torch.linalg.solve(matrix, inside.T).T).sum(1)
