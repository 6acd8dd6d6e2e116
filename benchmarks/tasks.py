"""Many tasks at the same inputs: NTKGP's shared eigendecomposition, NTKGP a task at a time, and GPyTorch in a loop.

The precipitation chapter's shape: made-up stations, with a level, a season and weather each; float64. Inputs are
(x, x*, values), NaN where missing; an answer is (tasks, 1 + 2m): the log marginal likelihood a value, means, variances.
Where hyperparameters are fitted, that is timed too. Loops run over FEW tasks, and their time is multiplied up.
GPyTorch's ExactGP has the same Gram matrix, computed once, and takes 100 steps of Adam to fit.
"""

import math
from collections.abc import Callable
from functools import partial

import gpytorch
import numpy as np
import torch
from linear_operator import to_linear_operator
from scipy.optimize import minimize
from torch import Tensor, nn

from benchmarks.harness import Competitor
from ntkbook import NTKGP, Linearization

FEW = 8
Inputs = tuple[Tensor, Tensor, Tensor]


def stations(count: int, days: int, missing: float) -> Inputs:
    """Days, those to predict (a fifth as many more), and values (T, days), NaN where missing."""
    generator = torch.Generator().manual_seed(0)
    day = torch.arange(1.0, days + days // 5 + 1, dtype=torch.float64)
    x = ((day - day[:days].mean()) / day[:days].std())[:, None]
    level, size, shift = torch.randn(3, count, 1, dtype=torch.float64, generator=generator)
    weather = torch.randn(count, days, dtype=torch.float64, generator=generator)
    y = level + size.exp() * torch.sin(2 * torch.pi * day[:days] / 365 + shift) + weather
    y[torch.rand(y.shape, generator=generator) < missing] = torch.nan
    return x[:days], x[days:], y


def together(gp: NTKGP, fitted: bool, inputs: Inputs, size: int | None) -> Tensor:
    x, new, y = inputs
    many = gp.condition_tasks(x, y, hyperparameters=gp.fit_tasks(x, y) if fitted else None)
    values = (~y.isnan()).sum(1)
    logs = (many.log_marginal_likelihood / values)[:, None]
    return torch.cat([logs, many.mean(new), many.variance(new)], 1)


def one_at_a_time(gp: NTKGP, fitted: bool, inputs: Inputs, size: int | None) -> Tensor:
    x, new, y = inputs
    rows = []
    for task in y[:FEW]:
        one = NTKGP(gp.lin, outputscale=gp.outputscale, noise=gp.noise)
        posterior = (one.fit(x, task) if fitted else one).condition(x, task)
        log = posterior.log_marginal_likelihood[None] / (~task.isnan()).sum()
        rows.append(torch.cat([log, posterior.mean(new), posterior.variance(new)]))
    return torch.stack(rows)


class Exact(gpytorch.models.ExactGP):
    """An ExactGP of rows of a Gram matrix: its inputs are their numbers."""

    def __init__(self, gram: Tensor, rows: Tensor, y: Tensor, outputscale: float, noise: float) -> None:
        likelihood = gpytorch.likelihoods.GaussianLikelihood(
            noise_constraint=gpytorch.constraints.GreaterThan(1e-8)
        ).double()
        super().__init__(rows, y, likelihood)
        self.gram, self.raw = gram, nn.Parameter(torch.tensor(outputscale, dtype=torch.float64).log())
        likelihood.noise = torch.tensor([noise], dtype=torch.float64)  # a plain number is rounded to float32

    def forward(self, rows: Tensor) -> gpytorch.distributions.MultivariateNormal:
        rows = rows.flatten().long()
        covariance = self.raw.exp() * self.gram[rows][:, rows]
        return gpytorch.distributions.MultivariateNormal(
            covariance.new_zeros(len(rows)), to_linear_operator(covariance)
        )


def gpytorch_loop(gp: NTKGP, fitted: bool, inputs: Inputs, size: int | None) -> Tensor:
    x, new, y = inputs
    gram = gp.lin.gram(torch.cat([x, new]))
    numbers = torch.arange(len(gram)).double()
    rows = []
    with gpytorch.settings.max_cholesky_size(10_000), gpytorch.settings.fast_pred_var(False):
        for task in y[:FEW]:
            seen = ~task.isnan()
            model = Exact(gram, numbers[: len(x)][seen], task[seen], gp.outputscale, gp.noise)
            likelihood = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
            optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
            for _ in range(100 if fitted else 0):
                optimiser.zero_grad()
                (-likelihood(model(model.train_inputs[0]), task[seen])).backward()
                optimiser.step()
            with torch.no_grad():
                log = likelihood(model(model.train_inputs[0]), task[seen])
                model.eval()
                latent = model(numbers[len(x) :])
                rows.append(torch.cat([log[None], latent.mean, latent.variance]))
    return torch.stack(rows)


def multiplied(run: Callable[[Inputs, int | None], Tensor]) -> Callable:
    """The cost of a loop over all tasks, from that over the first of them."""

    def cost(inputs: Inputs, size: int | None) -> tuple[Tensor, float, float]:
        answer, seconds, peak = Competitor(run).measured(inputs, size)
        return answer, seconds * len(inputs[2]) / len(answer), peak

    return cost


def ways(net: nn.Module, noise: float, fitted: bool) -> dict[str, Competitor]:
    gp = NTKGP(net, noise=noise)
    found = {f"ntkbook, all tasks{' fitted' if fitted else ''} together": Competitor(partial(together, gp, fitted))}
    # Adam does not end at the maximum: how far from it is the error that is shown.
    for name, run, tolerance in (
        ("ntkbook, a task at a time", one_at_a_time, None),
        ("GPyTorch, a task at a time", gpytorch_loop, 0.5 if fitted else None),
    ):
        way = partial(run, gp, fitted)
        found[f"{name} (from {FEW})"] = Competitor(
            way, tolerance=tolerance, cost=multiplied(way), compare=slice(0, FEW)
        )
    return found


def dense(net: nn.Module, noise: float, fitted: bool, inputs: Inputs) -> Tensor:
    """The textbook's formulas a task at a time; hyperparameters by a grid and Nelder and Mead's simplices."""
    x, new, y = inputs
    lin = Linearization(net)
    j, star = lin.jacobian(x), lin.jacobian(new)
    rows = []
    for task in y:
        seen = ~task.isnan()
        k, cross, target = j[seen] @ j[seen].T, star @ j[seen].T, task[seen]

        def covariance(at: np.ndarray, k: Tensor = k) -> Tensor:
            return math.exp(at[0]) * k + math.exp(at[1]) * torch.eye(len(k), dtype=k.dtype)

        def loss(at: np.ndarray, target: Tensor = target, covariance: Callable = covariance) -> float:
            root, failed = torch.linalg.cholesky_ex(covariance(at))
            if failed:
                return math.inf
            half = torch.linalg.solve_triangular(root, target[:, None], upper=False)
            return float(half.square().sum() / 2 + root.diagonal().log().sum()) / len(target)

        at = np.array([0.0, math.log(noise)])
        if fitted:
            grid = [np.array([a, b]) for a in np.linspace(-12, 12, 13) for b in np.linspace(-12, 12, 13)]
            tight = {"xatol": 1e-9, "fatol": 1e-15, "maxiter": 2000, "maxfev": 2000}
            at = minimize(loss, min(grid, key=loss), method="Nelder-Mead", options=tight).x
        scale, whole = math.exp(at[0]), covariance(at)
        log = -loss(at) - math.log(2 * math.pi) / 2
        mean = scale * cross @ torch.linalg.solve(whole, target)
        down = scale**2 * (cross * torch.linalg.solve(whole, cross.T).T).sum(1)
        rows.append(torch.cat([mean.new_tensor([log]), mean, scale * (star * star).sum(1) - down]))
    return torch.stack(rows)
