"""metrics.py, each against a version with a Python loop and scipy's densities."""

import math

import pytest
import torch
from scipy import stats

from ntkbook.experiments.metrics import between, coverage, nll, paired, rmse


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    mean, y = torch.randn(2, 4, 50, generator=generator, dtype=torch.float64)
    variance = 0.1 + torch.rand(4, 50, generator=generator, dtype=torch.float64)
    y[0, 3], y[2, 10:] = torch.nan, torch.nan
    return mean, variance, y


def loop(value, mean, variance, y):
    """Mean of value(mean, sd, y) over each row's observed points."""
    rows = []
    for m, v, target in zip(mean.tolist(), variance.tolist(), y.tolist()):
        points = [value(a, math.sqrt(b), c) for a, b, c in zip(m, v, target) if not math.isnan(c)]
        rows.append(sum(points) / len(points))
    return torch.tensor(rows, dtype=torch.float64)


def test_rmse(predictions):
    mean, variance, y = predictions
    slow = loop(lambda m, sd, target: (m - target) ** 2, mean, variance, y).sqrt()
    torch.testing.assert_close(rmse(mean, y), slow, rtol=1e-12, atol=0)


def test_nll(predictions):
    mean, variance, y = predictions
    slow = loop(lambda m, sd, target: -stats.norm.logpdf(target, m, sd), mean, variance, y)
    torch.testing.assert_close(nll(mean, variance, y), slow, rtol=1e-12, atol=0)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_coverage(predictions, level):
    mean, variance, y = predictions

    def inside(m, sd, target):
        low, high = stats.norm.interval(level, m, sd)
        return float(low <= target <= high)

    slow = loop(inside, mean, variance, y)
    torch.testing.assert_close(coverage(mean, variance, y, level), slow, rtol=1e-12, atol=0)


def test_a_nan_prediction_is_never_averaged_away(predictions):
    mean, variance, y = predictions
    mean[1, 0] = variance[3, 0] = torch.nan
    assert rmse(mean, y).isnan().tolist() == [False, True, False, False]
    assert nll(mean, variance, y).isnan().tolist() == [False, True, False, True]
    assert coverage(mean, variance, y).isnan().tolist() == [False, True, False, True]


def test_nothing_observed_is_nan(predictions):
    mean, variance, _ = predictions
    y = torch.full_like(mean, torch.nan)
    assert rmse(mean, y).isnan().all()
    assert nll(mean, variance, y).isnan().all()
    assert coverage(mean, variance, y).isnan().all()


@pytest.mark.parametrize("metric", [nll, coverage])
def test_variances_must_be_positive(predictions, metric):
    mean, variance, y = predictions
    variance[0, 0] = 0.0
    with pytest.raises(ValueError, match="must be positive, got 0"):
        metric(mean, variance, y)


def test_level_must_be_a_probability(predictions):
    with pytest.raises(ValueError, match=r"got 95\.0"):
        coverage(*predictions, level=95.0)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_paired_is_students_interval(level):
    differences = torch.tensor([0.3, -0.1, 0.4, 0.25, 0.7])
    interval = stats.ttest_1samp(differences.double().numpy(), 0).confidence_interval(level)
    result = paired(differences, level)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert result.mean == pytest.approx(0.31, rel=1e-6)
    assert result.standard_error == pytest.approx(result.sd / math.sqrt(5), rel=1e-12)
    assert str(paired(differences)) == "0.31 [-0.0477, 0.668] (95%, n = 5)"


def test_paired_holds_the_true_mean_as_often_as_it_says():
    draws = torch.randn(2000, 6, generator=torch.Generator().manual_seed(1)) + 1
    held = sum(result.low <= 1 <= result.high for result in map(paired, draws)) / 2000
    assert held == pytest.approx(0.95, abs=0.015)  # three standard errors


def test_paired_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="at least two differences, got 1"):
        paired(torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"differences \[1\] of 3 are not finite"):
        paired(torch.tensor([1.0, torch.nan, 2.0]))


def test_between_is_the_mean_over_pairs_with_the_textbook_jackknife():
    values = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values.fill_diagonal_(1e6)  # left out

    def mean(chosen):
        return sum(values[i, j] for i in chosen for j in chosen if i != j) / (len(chosen) * (len(chosen) - 1))

    everyone = list(range(6))
    without = torch.stack([mean([j for j in everyone if j != i]) for i in everyone])
    error = (5 / 6 * (without - without.mean()).square().sum()).sqrt()
    got = between(values)
    assert got.mean == pytest.approx(float(mean(everyone)), rel=1e-12)
    assert got.standard_error == pytest.approx(float(error), rel=1e-12)
    assert got.n == 6
    with pytest.raises(ValueError, match="at least three"):
        between(values[:2, :2])


def test_the_jackknife_interval_holds_the_mean_as_often_as_it_says():
    # Seed effects on both sides: pairs that share a seed are alike, which an interval over all pairs would ignore.
    generator = torch.Generator().manual_seed(2)
    inside = 0
    for _ in range(1000):
        rows, columns = torch.randn(2, 8, generator=generator, dtype=torch.float64)
        values = rows[:, None] + columns + 0.3 * torch.randn(8, 8, generator=generator, dtype=torch.float64)
        got = between(values)
        inside += got.low <= 0 <= got.high
    assert 925 <= inside <= 975  # of 1000 at 95 %: 3.6 standard errors
