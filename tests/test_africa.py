"""The run on all of Africa, on the stand-in; the files it writes."""

import json
import math

import numpy as np
import pytest
import torch

from ntkbook import NTKGP, Linearization, Nystrom
from ntkbook.experiments import africa
from ntkbook.experiments.data.malaria import load_malaria
from ntkbook.experiments.networks import mlp

SMALL = africa.Settings(
    n_train=200, hidden=20, epochs=10, subset=150, rbf_points=60, dense=300, compared=100, sizes=(200, 500),
    inducing=40, coarsen=6, solver=Nystrom(rank=30, pool=300, max_iterations=100),
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    data = load_malaria((2012, 2015), "africa", source="embedded")
    lines = []
    out, images = africa.run(data, SMALL, lines.append)
    return data, out, images, lines


def test_the_run_conditions_on_every_pixel(finished):
    data, out, _, lines = finished
    n = len(data.longitude)
    assert [cost["n"] for cost in out["costs"]] == [200, 500, n]
    assert all(cost["residual"] <= 1e-6 for cost in out["costs"])
    assert out["all"]["independent_residual"] <= 2e-6
    assert 1 < out["all"]["degrees"] < out["all"]["rank"] + 1
    assert any("minutes" in line for line in lines)


def test_the_run_compares_with_cholesky(finished):
    dense = finished[1]["dense"]
    assert dense["mean_in_predictive_sd"] < 1e-4
    assert dense["predictive_sd"] < 1e-3
    assert dense["sd"][0] >= -1e-6


def test_errors_are_of_pixels_that_were_not_given(finished):
    out = finished[1]
    assert out["errors"].keys() == {"blind", "ntk", "last_layer_exact", "rbf_30", "rbf_40"}
    assert out["errors"]["ntk"]["mse"] < out["variance"]
    assert all(math.isfinite(value) for row in out["errors"].values() for value in row.values())


def test_the_maps_are_coarse(finished):
    data, _, images, _ = finished
    truth = data.grid(data.rate[1], coarsen=6).values.numpy()
    assert np.nanmax(abs(images["truth"] - truth)) < 1e-3  # half precision
    assert images["mean"].shape == images["sd"].shape == truth.shape
    assert np.nanmin(images["sd"]) > 0


def test_hyperparameters_are_those_of_fit_or_of_the_limit():
    x = torch.rand(150, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    y = torch.sin(5 * x[:, 0]) * x[:, 1] + 0.1 * torch.sin(1e4 * x[:, 0])
    mean = mlp([2, 10, 1], "tanh", dtype=torch.double)
    free = NTKGP(mean).fit(x, y)
    wide = africa.fitted(mean, x, y, len(x), africa.Settings(condition=1e30))
    assert wide["outputscale"] == pytest.approx(free.outputscale, rel=1e-9)
    assert wide["noise"] == pytest.approx(free.noise, rel=1e-9)
    limited = africa.fitted(mean, x, y, 10_000, africa.Settings(condition=1e6))
    level = float(Linearization(mean).diagonal(x).mean())
    assert 10_000 * level * limited["outputscale"] / limited["noise"] == pytest.approx(1e6)
    assert limited["log_likelihood"] < limited["free_log_likelihood"] == pytest.approx(wide["log_likelihood"])


def test_the_command_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(africa, "Settings", lambda: SMALL)
    out = tmp_path / "results" / "04_malaria.africa.json"
    africa.main(["--source", "embedded", "--out", str(out), "--pixels", "900", "--condition", "1e8"])
    stored = json.loads(out.read_text())
    assert stored["n"] == 900
    assert stored["settings"]["condition"] == 1e8
    assert stored["data"]["source"] == "made-up"
    assert {"truth", "blind", "mean", "sd", "extent"} == set(np.load(out.with_suffix(".npz")))
    assert "wrote" in capsys.readouterr().out
