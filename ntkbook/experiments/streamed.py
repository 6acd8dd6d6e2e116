"""Gaussian processes with few features, conditioned on any number of points: what all of Africa is compared with."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntkbook.experiments.ablr import refit
from ntkbook.experiments.baselines import Prediction
from ntkbook.experiments.networks import split_last
from ntkbook.nystrom import pivots


class FeatureGP:
    """y ~ N(Φw, (rest + σ²) I), w ~ N(0, I), by QR of the data's features in chunks: any number of points.

    Args:
        features: from x (n, d) to Φ (n, r). prior: from x to the prior variance of f, Φ's part in it and what is left.
        noise: σ². mean: a constant.
    """

    def __init__(self, features: Callable, prior: Callable, noise: float, mean: float = 0.0, chunk: int = 20_000):
        self.features, self.prior, self.noise, self.mean, self.chunk = features, prior, noise, mean, chunk

    def condition(self, x: Float[Tensor, "n d"], y: Float[Tensor, " n"]) -> "FeatureGP":
        """Replaces what was there. Its memory does not grow with n."""
        r = self.features(x[:1]).shape[1]
        stacked = torch.eye(r + 1, dtype=torch.double)
        stacked[r] = 0
        for part, target in zip(x.split(self.chunk), y.split(self.chunk)):
            rows = torch.cat([self.features(part), (target - self.mean)[:, None]], 1) / self.noise**0.5
            stacked = torch.linalg.qr(torch.cat([stacked, rows]), mode="r")[1]
        self.root = stacked[:r, :r]
        self.weights = torch.linalg.solve_triangular(self.root, stacked[:r, r:], upper=True)[:, 0]
        return self

    def predict(self, x: Float[Tensor, "m d"]) -> Prediction:
        """Predictions (1, m)."""
        parts = []
        for part in x.split(self.chunk):
            phi = self.features(part)
            inside = torch.linalg.solve_triangular(self.root.T, phi.T, upper=False).square().sum(0)
            outside = (self.prior(part) - phi.square().sum(1)).clamp_min(0)
            parts.append((self.mean + phi @ self.weights, outside + inside + self.noise))
        return Prediction(*(torch.cat(moment)[None] for moment in zip(*parts)))

    def degrees(self) -> float:
        """The trace of K (K + σ²I)⁻¹ for the kernel ΦΦᵀ."""
        eye = torch.eye(len(self.root), dtype=torch.double)
        return len(self.root) - float(torch.linalg.solve_triangular(self.root, eye, upper=True).square().sum())


def last_layer(mean: nn.Sequential, x: Tensor, y: Tensor) -> FeatureGP:
    """The exact Bayesian last layer; α and σ² by marginal likelihood on a subset."""
    hidden = split_last(deepcopy(mean).double())[0]

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        phi = hidden(x)
        return torch.cat([phi, torch.ones_like(phi[:, :1])], 1)

    found = refit(features(x), y[None])
    alpha = float(found.alpha)
    return FeatureGP(
        lambda x: features(x) / alpha**0.5, lambda x: features(x).square().sum(1) / alpha, float(found.noise)
    )


def inducing_rbf(gp: Any, x: Tensor, m: int) -> FeatureGP:
    """`fit_rbf`'s GP seen through m of the points x, chosen as the network's landmarks are."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return gp.covar_module(a, b).to_dense().detach()

    gram = kernel(x, x)
    z = x[pivots(gram, m, 1e-10 * float(gram.trace()))]
    factor, scale = torch.linalg.cholesky(kernel(z, z) + 1e-10 * torch.eye(len(z)) * gram[0, 0]), float(gram[0, 0])
    noise, mean = float(gp.likelihood.noise.detach()), float(gp.mean_module.constant.detach())

    def features(a: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, kernel(z, a), upper=False).T

    return FeatureGP(features, lambda a: torch.full((len(a),), scale, dtype=torch.double), noise, mean, chunk=5000)
