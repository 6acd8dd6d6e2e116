"""Sinusoids: the two processes, their seeds, and what they leave alone."""

import math
import random

import numpy as np
import pytest
import torch

from ntkbook.experiments.data.sinusoids import sinusoid_tasks


def test_shapes_and_values():
    tasks = sinusoid_tasks(0, n_tasks=4, n_points=7, n_test=11)
    assert tasks.x.shape == tasks.y.shape == (4, 7, 1)
    assert tasks.x_test.shape == (11, 1)
    assert tasks.y_test.shape == (4, 11)
    assert all(t.dtype == torch.float64 for t in (tasks.x, tasks.y, tasks.x_test, tasks.y_test, tasks.phase))
    for t in range(4):
        a, w, b = tasks.amplitude[t].item(), tasks.frequency[t].item(), tasks.phase[t].item()
        slow = [a * math.sin(w * x + b) for x in tasks.x_test[:, 0].tolist()]
        torch.testing.assert_close(tasks.y_test[t], torch.tensor(slow, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(tasks.truth(tasks.x_test), tasks.y_test, rtol=0, atol=0)
    noise = tasks.y[..., 0] - tasks.truth(tasks.x)
    assert (noise.abs() <= 6 * tasks.noise_sd[:, None]).all()
    assert (noise != 0).all()


def standard(values):
    return values.mean().item(), values.std().item()


@pytest.mark.parametrize("ranges", ["kim", "appendix-f"])
def test_the_process(ranges):
    tasks = sinusoid_tasks(1, n_tasks=4000, n_points=5, ranges=ranges, n_test=2)
    kim = ranges == "kim"

    def uniform(values, low, high):
        assert low <= values.min()
        assert values.max() <= high
        spread = (high - low) / math.sqrt(12)
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=5 * spread / math.sqrt(values.numel()))
        assert values.std().item() == pytest.approx(spread, rel=0.05)

    uniform(tasks.amplitude, 0.1, 5.0)
    uniform(tasks.frequency, *((0.5, 2.0) if kim else (0.0, 2 * math.pi)))
    if kim:
        uniform(tasks.x, -5.0, 5.0)
        uniform(tasks.phase, 0.0, 2 * math.pi)
        torch.testing.assert_close(tasks.noise_sd, 0.01 * tasks.amplitude)
        assert tasks.x_test[:, 0].tolist() == [-5.0, 5.0]
    else:
        mean, sd = standard(tasks.x)
        assert mean == pytest.approx(0, abs=0.04)
        assert sd == pytest.approx(1, rel=0.05)
        assert (tasks.phase == 0).all()
        torch.testing.assert_close(tasks.noise_sd**2, 0.01 * tasks.amplitude)
    mean, sd = standard((tasks.y[..., 0] - tasks.truth(tasks.x)) / tasks.noise_sd[:, None])
    assert mean == pytest.approx(0, abs=0.04)
    assert sd == pytest.approx(1, rel=0.03)
    parts = torch.stack([tasks.amplitude, tasks.frequency, tasks.x[:, 0, 0], tasks.x[:, 1, 0]])
    assert (torch.corrcoef(parts) - torch.eye(4, dtype=torch.float64)).abs().max() < 0.08


def test_a_seed_is_a_result_and_the_first_tasks_stay():
    one, again, other = sinusoid_tasks(3), sinusoid_tasks(3, n_tasks=12), sinusoid_tasks(4)
    assert torch.equal(one.y, again.y[:10])
    assert torch.equal(one.x, again.x[:10])
    assert not torch.isclose(one.x, other.x).any()


def test_the_global_random_states_are_neither_used_nor_changed():
    torch.manual_seed(0)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # noqa: NPY002
    first = sinusoid_tasks(0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert before[2] == random.getstate()
    torch.manual_seed(1)
    assert torch.equal(first.y, sinusoid_tasks(0).y)


def test_the_provenance_tells_the_processes_apart():
    kim, printed = (sinusoid_tasks(0, ranges=ranges).provenance for ranges in ("kim", "appendix-f"))
    assert not kim.is_stand_in
    assert "Kim et al. (2018)" in kim.banner()
    assert "Appendix F prints" in printed.banner()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ranges": "maml"}, "one of kim, appendix-f; got 'maml'"),
        ({"seed": -1}, "seed=-1"),
        ({"n_tasks": 0}, "n_tasks=0"),
        ({"n_points": 0}, "n_points=0"),
        ({"n_test": 0}, "at least one"),
    ],
)
def test_bad_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        sinusoid_tasks(**({"seed": 0} | wrong))
