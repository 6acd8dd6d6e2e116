"""Networks with two outputs, a mean and a variance (Appendix F's malaria network), and how they are adapted.

`mean_network` is what has a kernel; its variance is the noise of `OwnNoiseNTK`. All predictions have the face of
`ntkbook.experiments.baselines`: one task in, the predictive mean and variance of y at new inputs out.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from jaxtyping import Bool, Float
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ntkbook.experiments.baselines import Prediction
from ntkbook.experiments.networks import split_last
from ntkbook.gp import NTKGP
from ntkbook.likelihoods import HeteroscedasticGaussian

LIKELIHOOD = HeteroscedasticGaussian()
"""N(y | μ, 1e-5 + softplus(s)) of the outputs (μ, s), the second argument a variance."""


def diverged(loss: Float[Tensor, "*T epochs"]) -> Bool[Tensor, "*T"]:
    """Whether training ended no better than it began: its last epoch's loss is not finite, or not below the first's."""
    return ~(loss[..., -1] < loss[..., 0])


def mean_network(net: nn.Sequential) -> nn.Sequential:
    """μ(x) alone: the network without its second output, whose weights have no part in the mean's kernel."""
    features, last = split_last(net)
    mean = nn.Linear(last.in_features, 1, bias=last.bias is not None).to(last.weight)
    with torch.no_grad():
        mean.weight.copy_(last.weight[:1])
        if last.bias is not None:
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
        posterior = self.gp.condition(x, y[0], noise=predict([self.net], x).variance[0])
        parts = [(posterior.mean(part), posterior.variance(part)) for part in x_star.split(chunk_size)]
        mean, variance = (torch.cat(moment)[None] for moment in zip(*parts))
        return Prediction(mean, variance + predict([self.net], x_star).variance)


def converge_last(
    net: nn.Sequential, x: Float[Tensor, "n d"], y: Float[Tensor, " n"], max_iter: int = 20_000
) -> tuple[nn.Sequential, bool]:
    """The network with its last layer trained on until −log p(y | f) stops falling, by L-BFGS in float64.

    Returns:
        The network, in float64, and whether the optimiser had converged (a step gains less than 1e-10 of the loss)
        within `max_iter` iterations.
    """
    features, last = split_last(deepcopy(net).double())
    with torch.no_grad():
        phi = features(x.double())
    y = y.to(phi)
    free = list(last.parameters())

    def objective(vector):
        with torch.no_grad():
            vector_to_parameters(torch.as_tensor(vector).to(phi), free)
        loss = -LIKELIHOOD.log_prob(last(phi), y).mean()
        gradient = parameters_to_vector([g.contiguous() for g in torch.autograd.grad(loss, free)])
        return loss.item(), gradient.cpu().numpy()

    start = parameters_to_vector(free).detach().cpu().numpy()
    options = {"maxiter": max_iter, "maxfun": 2 * max_iter, "maxcor": 50, "ftol": 1e-10, "gtol": 1e-8}
    result = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    objective(result.x)  # the last point tried need not be the best
    return nn.Sequential(*features, last), bool(result.success)
