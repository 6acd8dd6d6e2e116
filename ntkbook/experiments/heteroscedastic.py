"""Networks with two outputs, a mean and a variance (Appendix F's malaria network), and how they are adapted.

`mean_network` is what has a kernel; its variance is the noise of `OwnNoiseNTK`. All predictions have the face of
`ntkbook.experiments.baselines`: one task in, the predictive mean and variance of y at new inputs out.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.func import grad_and_value, hessian, vmap

from ntkbook.experiments.baselines import Prediction
from ntkbook.experiments.networks import split_last
from ntkbook.gp import NTKGP
from ntkbook.likelihoods import HeteroscedasticGaussian

LIKELIHOOD = HeteroscedasticGaussian()
"""N(y | μ, 1e-5 + softplus(s)) of the outputs (μ, s), the second argument a variance."""


def diverged(loss: Float[Tensor, "*T epochs"]) -> Bool[Tensor, "*T"]:
    """Whether training ended no better than it began: its last epoch's loss is not finite, or not below the first's."""
    return ~((loss[..., -1] < loss[..., 0]) & loss[..., -1].isfinite())


def mean_network(net: nn.Sequential) -> nn.Sequential:
    """μ(x) alone: the network without its second output, whose weights have no part in the mean's kernel."""
    features, last = split_last(net)
    mean = nn.Linear(last.in_features, 1).to(last.weight)
    with torch.no_grad():
        mean.weight.copy_(last.weight[:1])
        mean.bias.copy_(last.bias[:1])
    return nn.Sequential(*deepcopy(features), mean)


@torch.no_grad()
def predict(nets: Sequence[nn.Module], x: Float[Tensor, "m d"]) -> Prediction:
    """What T networks say themselves at x: mean and variance (T, m)."""
    like = next(nets[0].parameters())
    moments = [LIKELIHOOD.moments(net(x.to(like)).double()) for net in nets]
    mean, variance = zip(*moments)
    return Prediction(torch.stack(mean), torch.stack(variance))


class OwnNoiseNTK:
    """A Gaussian process with the NTK of a network's mean, and the network's variance for the noise at every point.

    Args:
        net: a network with two outputs.
        mean: "zero", as in the paper, or "network".
    """

    def __init__(self, net: nn.Sequential, *, mean: str = "zero") -> None:
        self.net, self.gp = net, NTKGP(mean_network(net), mean=mean)

    def predict(
        self, x: Float[Tensor, "n d"], y: Float[Tensor, "1 n"], x_star: Float[Tensor, "m d"], chunk_size: int = 5000
    ) -> Prediction:
        """Predictions (1, m) at x_star, in chunks, after conditioning on y at x."""
        (task,) = y
        posterior = self.gp.condition(x, task, noise=predict([self.net], x).variance[0])
        parts = [(posterior.mean(part), posterior.variance(part)) for part in x_star.split(chunk_size)]
        mean, variance = (torch.cat(moment)[None] for moment in zip(*parts))
        return Prediction(mean, variance + predict([self.net], x_star).variance)


def converge_last(
    net: nn.Sequential, x: Float[Tensor, "n d"], y: Float[Tensor, " n"], max_iter: int = 1000
) -> tuple[nn.Sequential, bool]:
    """The network with its last layer trained on until the mean −log p(y | f) is at a minimum, in float64.

    By Newton's method in a trust region, in an orthonormal basis of the features' span (of those directions that
    float64 can tell apart, as `torch.linalg.matrix_rank` counts them). The features of a smooth network are so nearly
    dependent that gradient descent, and L-BFGS too, seem to have converged long before.

    Returns:
        The network, and whether the largest entry of the gradient in that basis fell below 1e-6 nats a point within
        `max_iter` iterations.
    """
    features, last = split_last(deepcopy(net).double())
    y = y.to(next(last.parameters()))
    with torch.no_grad():
        phi = torch.cat([features(x.to(y)), torch.ones_like(y)[:, None]], 1)
        left, singular, right = torch.linalg.svd(phi, full_matrices=False)
        kept = singular > singular[0] * max(phi.shape) * torch.finfo(phi.dtype).eps
        basis = left[:, kept] * len(y) ** 0.5
        start = last(phi[:, :-1])

    def outputs(vector: Any) -> Float[Tensor, "n 2"]:
        return start + basis @ torch.as_tensor(vector).to(phi).view(2, -1).T

    def loss(f: Float[Tensor, "n 2"]) -> Tensor:
        return -LIKELIHOOD.log_prob(f, y).mean()

    def objective(vector):
        gradient, value = grad_and_value(loss)(outputs(vector))
        return value.item(), (gradient.T @ basis).flatten().cpu().numpy()

    def curvature(vector):
        one = vmap(hessian(lambda f, target: -LIKELIHOOD.log_prob(f[None], target[None])[0]))
        blocks = one(outputs(vector), y) / len(y)
        rows = torch.einsum("nab,nr,ns->arbs", blocks, basis, basis)
        return rows.reshape(2 * basis.shape[1], -1).cpu().numpy()

    options = {"maxiter": max_iter, "gtol": 1e-6}
    zero = np.zeros(2 * basis.shape[1])
    result = minimize(objective, zero, jac=True, hess=curvature, method="trust-exact", options=options)
    step = torch.as_tensor(result.x).to(phi).view(2, -1) @ (right[kept] / singular[kept, None] * len(y) ** 0.5)
    with torch.no_grad():
        last.weight += step[:, :-1]
        last.bias += step[:, -1]
    return nn.Sequential(*features, last), bool(result.success)
