"""How good predictions are, and whether a difference between two methods is more than chance."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor


def rmse(mean: Float[Tensor, "*tasks m"], y: Float[Tensor, "*tasks m"]) -> Float[Tensor, "*tasks"]:
    """Root mean squared error over the last dimension, in y's units.

    Points where y is NaN are left out (NaN if there is no other); a NaN prediction of an observed point gives NaN.
    """
    return _mean_observed((mean - y).square(), y).sqrt()


def nll(
    mean: Float[Tensor, "*tasks m"], variance: Float[Tensor, "*tasks m"], y: Float[Tensor, "*tasks m"]
) -> Float[Tensor, "*tasks"]:
    """Negative log density of y under independent Gaussians, in nats a point: mean over the last dimension.

    Args:
        mean: predictive mean.
        variance: predictive variance of y, noise included.
        y: what was observed; NaN is left out as in `rmse`.

    Raises:
        ValueError: a variance is not positive.
    """
    _check_variance(variance)
    return _mean_observed(0.5 * ((2 * torch.pi * variance).log() + (y - mean).square() / variance), y)


def coverage(
    mean: Float[Tensor, "*tasks m"],
    variance: Float[Tensor, "*tasks m"],
    y: Float[Tensor, "*tasks m"],
    level: float = 0.95,
) -> Float[Tensor, "*tasks"]:
    """Share of the points inside the central interval of a Gaussian that should hold `level` of them.

    Args:
        mean: predictive mean.
        variance: predictive variance of y, noise included.
        y: what was observed; NaN is left out as in `rmse`.
        level: of the interval, between 0 and 1.

    Raises:
        ValueError: a variance is not positive, or the level is not between 0 and 1.
    """
    _check_variance(variance)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    distance = (y - mean).abs() / variance.sqrt()
    inside = (distance <= float(stats.norm.ppf((1 + level) / 2))).to(mean.dtype)
    return _mean_observed(torch.where(distance.isnan(), torch.nan, inside), y)


@dataclass(frozen=True)
class Paired:
    """Differences between two methods on the same tasks or seeds: their mean, and how sure it is."""

    mean: float
    sd: float
    standard_error: float
    low: float
    high: float
    n: int
    level: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}] ({self.level:.0%}, n = {self.n})"


def paired(differences: Float[Tensor, "n"], level: float = 0.95) -> Paired:
    """Mean of paired differences with Student's t-interval.

    The differences must be independent: one a seed, or one a task where tasks are what varies.

    Raises:
        ValueError: fewer than two differences, or some not finite (a network that diverged, a fit that failed: these
            must be counted and told, not averaged away).
    """
    values = differences.detach().double().cpu()
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least two differences, got {n}: use more seeds or tasks")
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"differences {bad} of {n} are not finite (a network diverged, a fit failed or nothing was observed): "
            "leave these pairs out yourself, and say so beside the result"
        )
    mean, sd = values.mean().item(), values.std().item()
    standard_error = sd / n**0.5
    half = standard_error * float(stats.t.ppf((1 + level) / 2, n - 1))
    return Paired(mean, sd, standard_error, mean - half, mean + half, n, level)


def between(values: Float[Tensor, "n n"], level: float = 0.95) -> Paired:
    """Mean over pairs of different seeds, of something measured for seed i on one side and seed j on the other.

    Each seed is in many pairs, so the interval is the jackknife's: Student's t-interval of the n pseudo-values. The
    diagonal, where both sides have the same seed, is left out.

    Raises:
        ValueError: a pair is not finite; fewer than three seeds, which leave no pair when one is left out.
    """
    n = len(values)
    off = ~torch.eye(n, dtype=torch.bool)
    values = values.detach().double().cpu()
    if values.shape != (n, n) or not values[off].isfinite().all():
        raise ValueError(f"expected a finite value for each pair of different seeds (n, n), got {values}")
    if n < 3:
        raise ValueError(f"pairs of different seeds need at least three of them for an interval, got {n}")
    values = values.where(off, 0)
    total, own = values.sum(), values.sum(0) + values.sum(1)
    without = (total - own) / ((n - 1) * (n - 2))
    return paired(total / (n - 1) - (n - 1) * without, level)


def _mean_observed(values: Float[Tensor, "*tasks m"], y: Float[Tensor, "*tasks m"]) -> Float[Tensor, "*tasks"]:
    observed = ~y.isnan()
    return torch.where(observed, values, 0).sum(-1) / observed.sum(-1)


def _check_variance(variance: Tensor) -> None:
    if (variance <= 0).any():
        raise ValueError(
            f"predictive variances must be positive, got {variance.min().item():.3g}: add the noise's variance"
        )


def table(
    mean: Float[Tensor, "T m"], variance: Float[Tensor, "T m"], y: Float[Tensor, "T m"]
) -> list[dict[str, int | float]]:
    """The three metrics of T tasks as rows {"task", "rmse", "nll", "coverage"}; NaN where there is no prediction."""
    rows = []
    for t in range(len(y)):
        one = (mean[t], variance[t], y[t])
        failed = bool(mean[t].isnan().any())
        values = [torch.nan] * 3 if failed else [float(rmse(one[0], one[2])), float(nll(*one)), float(coverage(*one))]
        rows.append({"task": t, **dict(zip(("rmse", "nll", "coverage"), values))})
    return rows
