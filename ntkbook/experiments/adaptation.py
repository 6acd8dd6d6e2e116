"""The method itself, with the face of the baselines: the source network's NTK conditioned on each task's context."""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntkbook.experiments.baselines import NOISE_FLOOR, Prediction, groups
from ntkbook.gp import NTKGP


def residual_variance(net: nn.Module, x: Float[Tensor, "n d"], y: Float[Tensor, "n"]) -> float:
    """The mean squared error of a network on its own training data: what the chapters take for σ²."""
    like = next(net.parameters())
    with torch.no_grad():
        residual = net(x.to(like)).squeeze(-1).double() - y.double()
    return max(float(residual.square().nanmean()), NOISE_FLOOR)


class NTK:
    """A Gaussian process with the network's finite NTK, conditioned on each task (Algorithm 1 of the paper).

    Args:
        net: the source network; untrained, its NTK is the baseline that says what training was worth.
        outputscale, noise, mean: see `NTKGP`.
        refit: fit outputscale and noise to each task's own context by marginal likelihood.

    Attributes:
        undetermined: how many of the fits so far had data that did not determine outputscale and noise.
    """

    undetermined: int = 0

    def __init__(
        self, net: nn.Module, *, outputscale: float = 1.0, noise: float = 1e-2, mean: str = "zero", refit: bool = False
    ) -> None:
        self.gp = NTKGP(net, outputscale=outputscale, noise=noise, mean=mean)
        self.refit = refit

    def fit(self, x: Float[Tensor, "n d"], y: Float[Tensor, "n"]) -> "NTK":
        """Set outputscale and noise by marginal likelihood on one task, the source."""
        with warnings.catch_warnings(record=True) as caught:  # counted here, where one fit of many may warn
            warnings.simplefilter("always")
            self.gp.fit(x, y)
        self.undetermined += any("determine" in str(warning.message) for warning in caught)
        return self

    def predict(
        self, x: Float[Tensor, "*tasks n d"], y: Float[Tensor, "T n"], x_star: Float[Tensor, "*starred m d"]
    ) -> Prediction:
        """Predictions (T, m). Arguments and errors as for `ntkbook.experiments.baselines.groups`."""
        mean = y.new_full((len(y), x_star.shape[-2]), torch.nan, dtype=torch.float64)
        variance = mean.clone()
        for group in groups(x, y, x_star):
            batches = [[i] for i in range(len(group.rows))] if self.refit else [list(range(len(group.rows)))]
            for batch in batches:
                if self.refit:
                    self.fit(group.x, group.y[batch[0]])
                rows = [group.rows[i] for i in batch]
                posterior = self.gp.condition_tasks(group.x, group.y[batch])
                mean[rows] = posterior.mean(group.x_star).to(mean)
                variance[rows] = posterior.variance(group.x_star).to(mean) + self.gp.noise
        return Prediction(mean, variance)
