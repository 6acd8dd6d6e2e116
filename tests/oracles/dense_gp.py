"""Gaussian process regression as the textbook writes it: dense, float64, nothing shared or cached."""

import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import MultivariateNormal


def posterior(
    jacobian: Tensor, jacobian_star: Tensor, y: Tensor, noise: Tensor, scale: float, mean: Tensor, mean_star: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (N*,), covariance (N*, N*) and log marginal likelihood for vectors y, noise, mean (N,); NaN = not seen."""
    seen = ~torch.isnan(y)
    jacobian, y, noise, mean = jacobian[seen], y[seen], noise[seen], mean[seen]
    prior = scale * jacobian_star @ jacobian_star.T
    if not seen.any():
        return mean_star, prior, torch.zeros((), dtype=y.dtype)
    cross = scale * jacobian_star @ jacobian.T
    evidence = scale * jacobian @ jacobian.T + torch.diag(noise)
    moved = mean_star + cross @ torch.linalg.solve(evidence, y - mean)
    covariance = prior - cross @ torch.linalg.solve(evidence, cross.T)
    return moved, covariance, MultivariateNormal(mean, evidence).log_prob(y)


def fitted(jacobian: Tensor, y: Tensor, constant: bool, noise: Tensor | None = None) -> dict[str, float]:
    """outputscale, noise, constant and log marginal likelihood by brute force: Nelder and Mead from many starts."""
    gram = jacobian @ jacobian.T

    def unpack(t):
        sigma2 = torch.full_like(y, 10.0 ** t[1]) if noise is None else noise
        return 10.0 ** t[0], sigma2, t[-1] if constant else 0.0

    def loss(t):
        scale, sigma2, centre = unpack(t)
        mean = torch.full_like(y, centre)
        try:
            return -float(MultivariateNormal(mean, scale * gram + torch.diag(sigma2)).log_prob(y))
        except ValueError:  # not positive definite
            return 1e10

    best = None
    for scale in (-3, -1, 1):
        for sigma2 in (-4, -2, 0) if noise is None else (0,):
            start = [scale] + ([sigma2] if noise is None else []) + ([float(y.mean())] if constant else [])
            found = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-11, "maxiter": 600})
            best = found if best is None or found.fun < best.fun else best
    scale, sigma2, centre = unpack(best.x)
    return {"outputscale": scale, "noise": float(sigma2[0]), "constant": centre, "log_likelihood": -float(best.fun)}
