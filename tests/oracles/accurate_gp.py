"""The posterior of a Bayesian linear model by QR of its stacked system: accurate where a Gram matrix is not."""

import math

import mpmath
import torch
from torch import Tensor


def posterior(
    jacobian: Tensor, jacobian_star: Tensor, y: Tensor, noise: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (N*,), covariance (N*, N*) and log marginal likelihood for vectors y and noise (N,), prior mean zero.

    The least squares problem |[A; I] φ − [b; 0]|² has the square root of the condition number of I + AᵀA, and steps of
    refinement take out what is left of it.
    """
    seen = ~torch.isnan(y)
    jacobian, y, noise = jacobian[seen], y[seen], noise[seen]
    a, b = (scale / noise).sqrt()[:, None] * jacobian, y / noise.sqrt()
    q, r = torch.linalg.qr(torch.cat([a, torch.eye(a.shape[1], dtype=a.dtype)]))
    phi = torch.linalg.solve_triangular(r, q[: len(a)].T @ b[:, None], upper=True)[:, 0]
    for _ in range(3):
        gradient = a.T @ (b - a @ phi) - phi
        phi = phi + torch.cholesky_solve(gradient[:, None], r, upper=True)[:, 0]
    star = scale**0.5 * jacobian_star
    root = torch.linalg.solve_triangular(r.T, star.T, upper=False)
    log_determinant = 2 * r.diagonal().abs().log().sum() + noise.log().sum()
    squares = (b - a @ phi).square().sum() + phi.square().sum()
    evidence = -0.5 * (squares + log_determinant + len(y) * math.log(2 * math.pi))
    return star @ phi, root.T @ root, evidence


def fifty_digits(
    jacobian: Tensor, jacobian_star: Tensor, y: Tensor, noise: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the textbook's dense formula in fifty digits: mean, variance, log marginal likelihood."""
    with mpmath.workdps(50):
        j, j_star, target = (mpmath.matrix(v.tolist()) for v in (jacobian, jacobian_star, y[:, None]))
        evidence = scale * j * j.T + mpmath.diag([mpmath.mpf(v) for v in noise.tolist()])
        cross = scale * j_star * j.T
        inverse = evidence**-1
        mean = cross * inverse * target
        variance = [
            scale * (j_star[i, :] * j_star[i, :].T)[0] - (cross[i, :] * inverse * cross[i, :].T)[0]
            for i in range(j_star.rows)
        ]
        log = -(target.T * inverse * target)[0] - mpmath.log(mpmath.det(evidence)) - len(y) * mpmath.log(2 * mpmath.pi)
        tensor = lambda values: torch.tensor([float(v) for v in values], dtype=torch.double)  # noqa: E731
        return tensor(mean), tensor(variance), torch.tensor(float(log / 2), dtype=torch.double)
