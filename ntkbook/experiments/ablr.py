"""Adaptive Bayesian linear regression (ABLR): a Bayesian last layer on features that a network learns.

Perrone, Jenatton, Seeger, Archambeau: Scalable Hyperparameter Transfer Learning (NeurIPS 2018), the paper's [14].
With features Φ (n, D), a task is y ~ N(Φ w, σ² I) with weights w ~ N(0, I/α): features by the marginal likelihood of
the source, α and σ² by the marginal likelihood of each task's own context.
"""

from copy import deepcopy
from math import isfinite, log
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ntkbook.experiments.baselines import NOISE_FLOOR, Prediction, groups
from ntkbook.experiments.networks import split_last


def log_evidence(
    phi: Float[Tensor, "n D"], y: Float[Tensor, "n"], alpha: Float[Tensor, ""], noise: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """log N(y; 0, ΦΦᵀ/α + σ² I) in closed form (Perrone et al., Equation 2): O(n D² + D³), linear in the points.

    Args:
        phi: features.
        y: targets.
        alpha: precision of the prior of the weights.
        noise: variance σ² of the noise.
    """
    n, ratio = len(y), 1 / (alpha * noise)
    factor = torch.linalg.cholesky(torch.eye(phi.shape[1]).to(phi) + ratio * phi.mT @ phi)
    weights = ratio * torch.cholesky_solve((phi.mT @ y)[:, None], factor)[:, 0]
    # The quadratic form as a minimum over the weights: an error in them enters only squared.
    quadratic = (y - phi @ weights).square().sum() / noise + alpha * weights.square().sum()
    return -0.5 * (quadratic + 2 * factor.diagonal().log().sum() + n * (2 * torch.pi * noise).log())


class Posterior(NamedTuple):
    """Bayesian linear regression of G tasks at the same inputs, each with its own α and σ²; `refit` makes it."""

    basis: Float[Tensor, "D k"]
    singular: Float[Tensor, "k"]
    projected: Float[Tensor, "G k"]
    alpha: Float[Tensor, "G"]
    noise: Float[Tensor, "G"]

    def predict(self, phi: Float[Tensor, "m D"]) -> tuple[Float[Tensor, "G m"], Float[Tensor, "G m"]]:
        """Predictive mean and variance of y at features phi, noise included."""
        along = phi @ self.basis
        outside = (phi - along @ self.basis.mT).square().sum(1)
        shrink = (self.alpha * self.noise)[:, None]
        mean = (self.projected * self.singular / (self.singular**2 + shrink)) @ along.mT
        # The share of the prior variance that is left: all of it outside the features seen, λ/(s² + λ) along them.
        left = outside + (shrink / (self.singular**2 + shrink)) @ along.square().mT
        return mean, left / self.alpha[:, None] + self.noise[:, None]


def refit(phi: Float[Tensor, "n D"], y: Float[Tensor, "G n"], noise_floor: float = NOISE_FLOOR) -> Posterior:
    """α and σ² by marginal likelihood for each of G tasks, by one singular value decomposition.

    With λ = ασ², y ~ N(0, (ΦΦᵀ + λI)/α). The best α for a λ is known (σ² = λ/α not below the floor), which leaves one
    number a task: it is searched for on a grid over 30 decades, then on finer and finer grids around the best.
    """
    n = len(phi)
    left, singular, basis = torch.linalg.svd(phi, full_matrices=False)
    projected = y @ left
    outside = (y - projected @ left.mT).square().sum(1)

    def profile(log_ratio: Float[Tensor, "G g"]) -> tuple[Float[Tensor, "G g"], Float[Tensor, "G g"]]:
        ratio = log_ratio.exp()
        spread = singular.square()[:, None] + ratio[:, None, :]
        quadratic = (projected.square()[..., None] / spread).sum(1) + outside[:, None] / ratio
        scale = torch.maximum(quadratic / n, noise_floor / ratio)
        logdet = spread.log().sum(1) + (n - len(singular)) * log_ratio
        return -0.5 * (n * scale.log() + logdet + quadratic / scale), scale

    best = singular.square().mean().clamp(min=1e-12).log().expand(len(y), 1)
    half = 15 * torch.log(torch.tensor(10.0)).item()
    grid = torch.linspace(-1, 1, 101).to(phi)
    for _ in range(6):
        candidates = best + half * grid
        value, _ = profile(candidates)
        best = candidates.gather(1, value.argmax(1, keepdim=True))
        half /= 25  # two steps of the grid
    scale = profile(best)[1][:, 0]
    return Posterior(basis.mT, singular, projected, 1 / scale, best[:, 0].exp() * scale)


class ABLR:
    """ABLR with the last hidden layer of a network for features, and a one beside them where its last layer has a bias.

    `ABLR(net).fit(x_source, y_source).predict(x, y, x_star)`. Without `fit`, the features are the network's own: a
    Bayesian last layer. All in float64; the network is not changed.

    Attributes:
        features: the network without its last layer, as trained by `fit`.
        result: scipy's report on `fit`, or None; -result.fun is the log evidence of the source.
    """

    def __init__(self, net: nn.Module, noise_floor: float = NOISE_FLOOR) -> None:
        """Args:
            net: an `nn.Sequential` that ends in an `nn.Linear`; its parameters, trained or not, are where `fit` starts.
            noise_floor: the smallest noise variance. It is needed: the evidence of features that are free to put y into
                their span has no upper bound as the noise goes to 0.

        Raises:
            TypeError: another network.
        """
        features, last = split_last(net)
        self.features = deepcopy(features).double()
        self.bias = last.bias is not None
        self.noise_floor = noise_floor
        self.result: OptimizeResult | None = None

    def fit(self, x: Float[Tensor, "n d"], y: Float[Tensor, "n"], max_iter: int = 500) -> "ABLR":
        """Features, α and σ² by the marginal likelihood of the source, by L-BFGS (Perrone et al., Section 3.2).

        Args:
            x: inputs of the source task.
            y: its targets; NaN = not observed.
            max_iter: iterations at most. `result.success` says whether it converged, `result.message` why it ended.

        Raises:
            ArithmeticError: the evidence is not finite where the optimiser ended.
        """
        group = next(groups(x, y[None], x[:1]))
        x, y = group.x, group.y[0]
        parameters = [p.requires_grad_() for p in self.features.parameters()]
        device = parameters[0].device if parameters else x.device
        x, y = x.to(device), y.to(device)
        with torch.no_grad():
            start = refit(self._phi(x), y[None], self.noise_floor)
        logs = torch.stack([start.alpha.log(), start.noise.log()]).flatten().requires_grad_()
        free = [*parameters, logs]

        def objective(vector):
            with torch.no_grad():
                vector_to_parameters(torch.as_tensor(vector, device=device), free)
            value = -log_evidence(self._phi(x), y, *logs.exp())
            gradients = torch.autograd.grad(value, free)
            return value.item(), parameters_to_vector([g.contiguous() for g in gradients]).cpu().numpy()

        initial = parameters_to_vector(free).detach().cpu().numpy()
        # α within a million of 1: beyond, with the noise at its floor, ΦᵀΦ/(ασ²) + I is singular in float64
        bounds = [(None, None)] * (len(initial) - 2) + [(log(1e-6), log(1e6)), (log(self.noise_floor), None)]
        options = {"maxiter": max_iter, "maxfun": 4 * max_iter}
        result = minimize(objective, initial, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        value, _ = objective(result.x)  # the last point tried need not be the best
        if not isfinite(value):
            raise ArithmeticError(
                f"ABLR's evidence is {value} after {result.nit} iterations ({result.message}): standardise x and y"
            )
        self.result = result
        for p in parameters:
            p.requires_grad_(False)
        return self

    @torch.no_grad()
    def predict(
        self, x: Float[Tensor, "*tasks n d"], y: Float[Tensor, "T n"], x_star: Float[Tensor, "*others m d"]
    ) -> Prediction:
        """Predictions (T, m), with α and σ² fitted on each task's context. Arguments and errors as for `groups`."""
        mean = y.new_full((len(y), x_star.shape[-2]), torch.nan, dtype=torch.float64)
        variance = mean.clone()
        like = next(self.features.parameters(), x.double())
        for group in groups(x, y, x_star):
            posterior = refit(self._phi(group.x.to(like)), group.y.to(like), self.noise_floor)
            moments = posterior.predict(self._phi(group.x_star.to(like)))
            mean[group.rows], variance[group.rows] = (moment.to(mean) for moment in moments)
        return Prediction(mean, variance)

    def _phi(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n D"]:
        hidden = self.features(x)
        return torch.cat([hidden, hidden.new_ones(len(x), 1)], 1) if self.bias else hidden
