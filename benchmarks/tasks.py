"""Many tasks at the same inputs: NTKGP's shared eigendecomposition, NTKGP a task at a time, and GPyTorch in a loop.

    python -m benchmarks.tasks [--threads 2] [--repeats 5] [--tasks 1209] [--loop 4]

The precipitation chapter's shape: a 1-400-1 tanh network, 1,209 made-up stations of 300 days (a level, a season and
weather each), predicted on 65 days; float64. Timed: the fit, where there is one, then conditioning with the log
marginal likelihoods, means and variances. Loops run on `--loop` tasks, and their time is multiplied up to all tasks.
GPyTorch's ExactGP has the same Gram matrix, computed once, and Cholesky at any size; fitted, it takes 100 steps of
Adam, and the last column says how far its log likelihood stays behind. Agreement is asserted before anything is timed.
"""

import argparse
import statistics
from functools import partial

import gpytorch
import torch
from linear_operator import to_linear_operator
from torch import Tensor

from benchmarks.floor import timings
from ntkbook import NTKGP
from ntkbook.experiments.networks import mlp

DAYS, TEST = 300, 65
Result = tuple[Tensor, Tensor, Tensor]  # log marginal likelihoods (T,), means and variances (T, m)


def stations(count: int, missing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Days, those to predict, and values (T, 300), NaN where missing."""
    generator = torch.Generator().manual_seed(0)
    day = torch.arange(1.0, DAYS + TEST + 1, dtype=torch.float64)
    x = ((day - day[:DAYS].mean()) / day[:DAYS].std())[:, None]
    level, size, shift = torch.randn(3, count, 1, dtype=torch.float64, generator=generator)
    weather = torch.randn(count, DAYS, dtype=torch.float64, generator=generator)
    y = level + size.exp() * torch.sin(2 * torch.pi * day[:DAYS] / 365 + shift) + weather
    y[torch.rand(y.shape, generator=generator) < missing] = torch.nan
    return x[:DAYS], x[DAYS:], y


def together(gp: NTKGP, x: Tensor, y: Tensor, x_star: Tensor, fitted: bool) -> Result:
    found = gp.fit_tasks(x, y) if fitted else None
    many = gp.condition_tasks(x, y, hyperparameters=found)
    return many.log_marginal_likelihood, many.mean(x_star), many.variance(x_star)


def one_at_a_time(gp: NTKGP, x: Tensor, y: Tensor, x_star: Tensor, fitted: bool) -> Result:
    rows = []
    for task in y:
        one = NTKGP(gp.lin, outputscale=gp.outputscale, noise=gp.noise)
        posterior = (one.fit(x, task) if fitted else one).condition(x, task)
        rows.append((posterior.log_marginal_likelihood, posterior.mean(x_star), posterior.variance(x_star)))
    logs, means, variances = (torch.stack(column) for column in zip(*rows))
    return logs, means, variances


class Exact(gpytorch.models.ExactGP):
    """An ExactGP of rows of a Gram matrix: its inputs are their numbers."""

    def __init__(self, gram: Tensor, rows: Tensor, y: Tensor, outputscale: float, noise: float) -> None:
        likelihood = gpytorch.likelihoods.GaussianLikelihood(
            noise_constraint=gpytorch.constraints.GreaterThan(1e-8)
        ).double()
        super().__init__(rows, y, likelihood)
        self.gram, self.raw = gram, torch.nn.Parameter(torch.tensor(outputscale, dtype=torch.float64).log())
        likelihood.noise = torch.tensor([noise], dtype=torch.float64)  # a plain number is rounded to float32

    def forward(self, rows: Tensor) -> gpytorch.distributions.MultivariateNormal:
        rows = rows.flatten().long()
        covariance = self.raw.exp() * self.gram[rows][:, rows]
        return gpytorch.distributions.MultivariateNormal(
            covariance.new_zeros(len(rows)), to_linear_operator(covariance)
        )


def gpytorch_loop(gp: NTKGP, x: Tensor, y: Tensor, x_star: Tensor, fitted: bool) -> Result:
    gram = gp.lin.gram(torch.cat([x, x_star]))
    numbers, new = torch.arange(DAYS).double(), torch.arange(DAYS, DAYS + TEST).double()
    rows = []
    with gpytorch.settings.max_cholesky_size(10_000), gpytorch.settings.fast_pred_var(False):
        for task in y:
            seen = ~task.isnan()
            model = Exact(gram, numbers[seen], task[seen], gp.outputscale, gp.noise)
            likelihood = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
            optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
            for _ in range(100 if fitted else 0):
                optimiser.zero_grad()
                (-likelihood(model(model.train_inputs[0]), task[seen])).backward()
                optimiser.step()
            with torch.no_grad():
                log = likelihood(model(model.train_inputs[0]), task[seen]) * seen.sum()
                model.eval()
                latent = model(new)
                rows.append((log, latent.mean, latent.variance))
    logs, means, variances = (torch.stack(column) for column in zip(*rows))
    return logs, means, variances


def assert_agree(ours: Result, theirs: Result, fitted: bool) -> None:
    """Fitted, two searches end where the likelihood is the same, and their arguments to a part in 1e5."""
    tolerance = 1e-4 if fitted else 1e-7
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(ours[1], theirs[1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours[2], theirs[2], rtol=tolerance, atol=tolerance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("threads", 2), ("repeats", 5), ("tasks", 1209), ("loop", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.tasks} tasks of {DAYS} points\n")
    print("| problem | method | median s | range | ratio | log likelihood |")
    print("|---|---|---|---|---|---|")
    gp = NTKGP(mlp([1, 400, 1], "tanh", dtype=torch.float64), noise=1.0)
    for missing in (0.0, 0.1):
        x, x_star, y = stations(options.tasks, missing)
        few = y[: options.loop]
        for fitted in (False, True):
            problem = ("fitted" if fitted else "shared") + (", a tenth missing" if missing else "")
            ours = together(gp, x, y, x_star, fitted)
            some = tuple(part[: len(few)] for part in ours)
            assert_agree(some, one_at_a_time(gp, x, few, x_star, fitted), fitted)
            theirs = gpytorch_loop(gp, x, few, x_star, fitted)
            if not fitted:
                assert_agree(some, theirs, fitted)
            behind = f"{float((theirs[0] - some[0]).min()):+.1e}"
            base = None
            for name, run, tasks, note in (
                ("together", together, y, ""),
                ("NTKGP, a task at a time", one_at_a_time, few, "equal"),
                ("GPyTorch, a task at a time", gpytorch_loop, few, behind),
            ):
                times = timings(partial(run, gp, x, tasks, x_star, fitted), options.repeats)
                times = [t * len(y) / len(tasks) for t in times]
                median = statistics.median(times)
                base = base or median
                scaled = "" if len(tasks) == len(y) else f", from {len(tasks)} tasks"
                print(
                    f"| {problem} | {name}{scaled} | {median:.3f} | {min(times):.3f} to {max(times):.3f} | "
                    f"{median / base:.1f} | {note} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
