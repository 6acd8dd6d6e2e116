"""Streamed Gaussian processes: the exact ones, in chunks."""

import torch

from ntkbook.experiments import streamed
from ntkbook.experiments.ablr import ABLR
from ntkbook.experiments.baselines import SharedRBF, fit_rbf
from ntkbook.experiments.networks import mlp


def some(n=150):
    x = torch.rand(n, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    return x, torch.sin(5 * x[:, 0]) * x[:, 1]


def test_the_streamed_last_layer_is_the_exact_one():
    x, y = some()
    mean = mlp([2, 10, 1], "tanh", dtype=torch.double)
    want = ABLR(mean).predict(x, y[None], x[:20])
    model = streamed.last_layer(mean, x, y)
    model.chunk = 40
    got = model.condition(x, y).predict(x[:20])
    for one, other in zip(got, want):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()  # α and σ² agree, features are ill-conditioned
    assert 1 < model.degrees() < 11


def test_as_many_inducing_points_as_there_are_points_are_the_gp_itself():
    x, y = some(60)
    gp = fit_rbf(x, y + 0.1 * torch.sin(100 * x[:, 0]), lengthscales=(0.3,))
    shared = SharedRBF()
    shared.gp = gp
    star = some(20)[0] + 0.01
    got = streamed.inducing_rbf(gp, x, 60).condition(x, y).predict(star)
    want = shared.predict(x, y[None], star)
    assert (got.mean - want.mean).abs().max() <= 1e-4  # the inducing points' jitter
    assert (got.variance / want.variance - 1).abs().max() <= 1e-3
