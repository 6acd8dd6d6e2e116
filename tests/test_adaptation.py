"""The method with the baselines' face, against NTKGP task by task and against the dense formula."""

import pytest
import torch

from ntkbook import NTKGP, Linearization
from ntkbook.experiments.adaptation import NTK, residual_variance
from ntkbook.experiments.metrics import coverage, nll, rmse, table
from ntkbook.experiments.networks import mlp

NET = mlp([1, 6, 1], "tanh", seed=3, dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shared", [True, False])
def test_each_task_is_the_dense_formula(shared: bool) -> None:
    x, y, x_star = draw(*(() if shared else (3,)), 8, 1), draw(3, 8, seed=1), draw(5, 1, seed=2)
    y[1, 2] = torch.nan
    prediction = NTK(NET, outputscale=1.7, noise=0.2).predict(x, y, x_star)
    lin = Linearization(NET)
    for t in range(3):
        seen = ~y[t].isnan()
        xt = (x if shared else x[t])[seen]
        j, js = lin.jacobian(xt), lin.jacobian(x_star)
        inverse = torch.linalg.inv(1.7 * j @ j.T + 0.2 * torch.eye(len(xt), dtype=torch.float64))
        cross = 1.7 * js @ j.T
        variance = 1.7 * (js @ js.T).diagonal() - (cross @ inverse @ cross.T).diagonal() + 0.2
        torch.testing.assert_close(prediction.mean[t], cross @ inverse @ y[t, seen], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(prediction.variance[t], variance, rtol=1e-9, atol=1e-10)


def test_refit_uses_each_tasks_own_hyperparameters() -> None:
    x, x_star = draw(12, 1), draw(4, 1, seed=2)
    gaps = Linearization(NET).jvp(x, draw(19, 2, seed=1))[:, 0].T * torch.tensor([[1.0], [5.0]], dtype=torch.float64)
    y = NET(x)[:, 0].detach() + gaps + 0.3 * draw(2, 12, seed=5)
    prediction = NTK(NET, mean="network", refit=True).predict(x, y, x_star)
    for t in range(2):
        gp = NTKGP(NET, mean="network").fit(x, y[t])
        posterior = gp.condition(x, y[t])
        torch.testing.assert_close(prediction.mean[t], posterior.mean(x_star), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(prediction.variance[t], posterior.variance(x_star) + gp.noise, rtol=1e-9, atol=1e-10)


def test_undetermined_contexts_are_counted() -> None:
    x = draw(6, 1)
    with torch.no_grad():
        own = NET(x)[:, 0]
    noise = 1e-3 * torch.tensor([1.0, -1, 1, -1, 1, -1], dtype=torch.float64)
    ntk = NTK(NET, mean="network", refit=True)
    ntk.predict(x, torch.stack([own + noise, own + 1 + draw(6, seed=4)]), x)
    assert 0 < ntk.undetermined <= 2


def test_residual_variance_is_the_mean_squared_error_and_never_nothing() -> None:
    x, y = draw(9, 1), draw(9, seed=1)
    with torch.no_grad():
        assert residual_variance(NET, x, y) == pytest.approx(float((NET(x)[:, 0] - y).square().mean()), rel=1e-12)
        assert residual_variance(NET, x, NET(x)[:, 0]) == 1e-6


def test_table_has_a_row_a_task_and_nan_where_a_prediction_failed() -> None:
    mean, variance, y = draw(3, 7), draw(3, 7, seed=1).exp(), draw(3, 7, seed=2)
    mean[1] = torch.nan
    rows = table(mean, variance, y)
    assert [row["task"] for row in rows] == [0, 1, 2]
    assert rows[0]["rmse"] == float(rmse(mean[0], y[0]))
    assert rows[2]["nll"] == float(nll(mean[2], variance[2], y[2]))
    assert rows[2]["coverage"] == float(coverage(mean[2], variance[2], y[2]))
    assert all(rows[1][key] != rows[1][key] for key in ("rmse", "nll", "coverage"))
