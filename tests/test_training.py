"""training.py against the loop that everyone writes: one network, torch.optim.SGD, one batch after the other."""

import copy

import jaxtyping
import pytest
import torch
from torch import nn

from ntkbook.experiments.networks import mlp
from ntkbook.experiments.training import DivergenceError, train
from ntkbook.likelihoods import Categorical, HeteroscedasticGaussian, Poisson


def slow_train(net, x, y, *, lr, epochs, momentum, batch_size, seed, names=None):
    """The oracle. The order of an epoch is the seed's next permutation."""
    net = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(seed)
    chosen = [p for name, p in net.named_parameters() if names is None or name in names]
    optimiser = torch.optim.SGD(chosen, lr=lr, momentum=momentum)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator) if batch_size < len(x) else torch.arange(len(x))
        for batch in order.split(batch_size):
            seen = ~y[batch].isnan()
            error = net(x[batch]) - y[batch].nan_to_num()
            loss = error[seen].square().sum() / max(1, seen.sum())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return net


def tasks(count=3, n=10, outputs=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 10 * torch.rand(count, n, 1, generator=generator, dtype=torch.float64) - 5
    y = torch.sin(x + torch.arange(count)[:, None, None]) * torch.arange(1, outputs + 1)
    return [mlp([1, 8, 7, outputs], seed=t, dtype=torch.float64) for t in range(count)], x, y


def assert_same(one, other, atol=1e-12):
    for (name, a), b in zip(one.named_parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(name="unchecked")
def fixture_unchecked():
    """Annotations are not checked, as for users: the library's own message must come."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


SETTINGS = {"lr": 3e-3, "momentum": 0.9, "batch_size": 3, "epochs": 40}


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 5, 10])
def test_all_at_once_is_each_alone_by_plain_sgd(batch_size, outputs):
    nets, x, y = tasks(outputs=outputs)
    settings = {**SETTINGS, "batch_size": batch_size}
    trained, _ = train(nets, x, y, seed=[5, 6, 7], **settings)
    for t in range(3):
        assert_same(trained[t], slow_train(nets[t], x[t], y[t], seed=5 + t, **settings))
        alone, _ = train(nets[t], x[t], y[t], seed=[5 + t], **settings)
        assert_same(trained[t], alone)


def test_missing_targets_match_plain_sgd_that_skips_them():
    nets, x, y = tasks(outputs=2)
    y[0, :4], y[1, 3, 1], y[2, ::2, 0] = torch.nan, torch.nan, torch.nan
    trained, _ = train(nets, x, y, seed=[5, 6, 7], **SETTINGS)
    for t in range(3):
        assert_same(trained[t], slow_train(nets[t], x[t], y[t], seed=5 + t, **SETTINGS))


def test_in_a_full_batch_a_missing_target_is_a_point_left_out():
    nets, x, y = tasks()
    settings = {**SETTINGS, "batch_size": None}
    y[1, 4:] = torch.nan
    trained, loss = train(nets, x, y, **settings)
    alone, loss_alone = train(nets[1], x[1, :4], y[1, :4], **settings)
    assert_same(trained[1], alone)
    torch.testing.assert_close(loss[1], loss_alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("likelihood", [HeteroscedasticGaussian(), Categorical()])
def test_likelihoods_and_decaying_steps_are_those_of_plain_sgd(likelihood):
    nets, x, y = tasks(outputs=2)
    y = (y[..., :1] > 0).long() if isinstance(likelihood, Categorical) else y[..., :1]
    settings = {"lr": 3e-3, "momentum": 0.9, "epochs": 25, "batch_size": 4}
    trained, loss = train(nets, x, y, seed=[5, 6, 7], likelihood=likelihood, decay_every=10, **settings)
    for t, start in enumerate(nets):
        net, generator = copy.deepcopy(start), torch.Generator().manual_seed(5 + t)
        optimiser = torch.optim.SGD(net.parameters(), lr=3e-3, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, step_size=10, gamma=0.1)
        for _ in range(25):
            summed = 0.0
            for batch in torch.randperm(10, generator=generator).split(4):
                f, target = net(x[t, batch]), y[t, batch, 0]
                if isinstance(likelihood, Categorical):
                    value = nn.functional.cross_entropy(f, target)
                else:
                    variance = 1e-5 + nn.functional.softplus(f[:, 1])
                    log_p = torch.distributions.Normal(f[:, 0], variance.sqrt()).log_prob(target)
                    value = -log_p.mean()
                optimiser.zero_grad()
                value.backward()
                optimiser.step()
                summed += value.item() * len(batch)
            schedule.step()
        assert_same(trained[t], net)
        assert loss[t, -1].item() == pytest.approx(summed / 10, rel=1e-12)


def test_with_a_likelihood_too_a_missing_target_is_a_point_left_out():
    nets, x, y = tasks(outputs=2)
    settings = {**SETTINGS, "batch_size": None, "likelihood": HeteroscedasticGaussian()}
    y = y[..., :1].clone()
    y[1, 4:] = torch.nan
    trained, _ = train(nets, x, y, **settings)
    assert_same(trained[1], train(nets[1], x[1, :4], y[1, :4], **settings)[0])


@pytest.mark.parametrize(
    ("likelihood", "y", "message"),
    [
        (Categorical(), torch.full((10, 1), 3), "classes from 0 to 1"),
        (Poisson(), torch.full((10, 1), -2.5), "Poisson expects"),
        (HeteroscedasticGaussian(), torch.zeros(10, 2), "one target a point"),
    ],
)
def test_targets_that_a_likelihood_cannot_take_are_refused(likelihood, y, message):
    nets, x, _ = tasks(outputs=1 if isinstance(likelihood, Poisson) else 2)
    with pytest.raises(ValueError, match=message):
        train(nets, x[0], y, likelihood=likelihood, **SETTINGS)


@pytest.mark.parametrize("epochs", [0, -1])
def test_a_decay_that_is_none_is_refused(epochs):
    nets, x, y = tasks()
    with pytest.raises(ValueError, match="decay_every must be a positive number"):
        train(nets, x, y, decay_every=epochs, **SETTINGS)


def test_loss_history_is_the_mean_over_an_epoch():
    nets, x, y = tasks()
    y[0, :4] = torch.nan
    _, loss = train(nets, x, y, seed=[5, 6, 7], **{**SETTINGS, "lr": 0.0})
    expected = torch.stack([(net(a) - b).square().nanmean() for net, a, b in zip(nets, x, y)]).detach()
    torch.testing.assert_close(loss, expected[:, None].expand(3, 40), rtol=1e-12, atol=0)


@pytest.mark.parametrize("only", ["last", ["4.weight", "4.bias"]])
def test_only_the_last_layer(only):
    nets, x, y = tasks()
    trained, _ = train(nets, x, y, only=only, seed=[5, 6, 7], **SETTINGS)
    for t in range(3):
        expected = slow_train(nets[t], x[t], y[t], names=["4.weight", "4.bias"], seed=5 + t, **SETTINGS)
        assert_same(trained[t], expected)
        assert_same(trained[t][:-1], nets[t][:-1], atol=0)


def test_parameters_without_gradient_are_not_trained():
    nets, x, y = tasks()
    for net in nets:
        net[0].requires_grad_(False)
    trained, _ = train(nets, x, y, **SETTINGS)
    assert_same(trained[0][0], nets[0][0], atol=0)
    assert not torch.equal(trained[0][2].weight, nets[0][2].weight)


def test_nothing_given_is_changed():
    nets, x, y = tasks()
    y[0, 0] = torch.nan
    copies, x_before, y_before = copy.deepcopy(nets), x.clone(), y.clone()
    state = torch.get_rng_state()
    train(nets, x, y, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, x_before)
    torch.testing.assert_close(y, y_before, rtol=0, atol=0, equal_nan=True)
    for net, before in zip(nets, copies):
        assert_same(net, before, atol=0)
        assert all(p.grad is None for p in net.parameters())


def test_seeds_repeat_and_differ():
    nets, x, y = tasks()
    same = [nets[0]] * 2
    first, _ = train(same, x[0], y[0], seed=1, **SETTINGS)
    again, _ = train(same, x[0], y[0], seed=1, **SETTINGS)
    assert_same(first[1], again[1], atol=0)
    assert not torch.equal(first[0][0].weight, first[1][0].weight)  # an order of its own for each network


def test_inputs_and_targets_shared_by_all_networks():
    nets, x, y = tasks()
    shared, loss = train(nets, x[0], y[0], seed=[5, 6, 7], **SETTINGS)
    repeated, _ = train(nets, x[:1].repeat(3, 1, 1), y[:1].repeat(3, 1, 1), seed=[5, 6, 7], **SETTINGS)
    assert loss.shape == (3, 40)
    for a, b in zip(shared, repeated):
        assert_same(a, b, atol=0)


def test_data_take_the_networks_dtype():
    net = mlp([1, 5, 1])
    trained, loss = train(net, torch.ones(4, 1, dtype=torch.float64), torch.ones(4, 1), **SETTINGS)
    assert loss.dtype == next(trained.parameters()).dtype == torch.float32


def test_divergence_names_the_networks_and_the_epoch():
    nets, x, y = tasks()
    y[1] *= 1e200
    with pytest.raises(DivergenceError, match=r"network\(s\) \[1\] of 3 diverged in epoch 1 of 40"):
        train(nets, x, y, **SETTINGS)


def test_divergence_in_the_very_last_step_is_seen():
    net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    x = torch.full((1, 1), 1e150, dtype=torch.float64)
    with pytest.raises(DivergenceError, match="last step of epoch 1"):
        train(net, x, torch.zeros_like(x), lr=1e300, epochs=1)


def test_marked_divergence_keeps_the_others_and_cannot_be_averaged_away():
    nets, x, y = tasks()
    good, good_loss = train(nets, x, y, seed=[5, 6, 7], **SETTINGS)
    y[1] *= 1e200
    trained, loss = train(nets, x, y, seed=[5, 6, 7], on_divergence="mark", **SETTINGS)
    assert (~loss.isfinite().all(-1)).tolist() == [False, True, False]
    assert trained[1](x[1]).isnan().all()
    for t in (0, 2):
        assert_same(trained[t], good[t])
        torch.testing.assert_close(loss[t], good_loss[t], rtol=1e-12, atol=0)


def test_buffers_are_used_and_kept():
    net = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double().eval()
    net[1].running_mean.fill_(2.0)
    x = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    trained, _ = train(net, x, x.sin(), seed=[0], **SETTINGS)
    assert_same(trained, slow_train(net, x, x.sin(), seed=0, **SETTINGS))
    assert torch.equal(trained[1].running_mean, net[1].running_mean)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.Dropout(0.5)])
def test_train_mode_batchnorm_and_dropout_are_refused(layer):
    net = nn.Sequential(nn.Linear(1, 3), layer, nn.Linear(3, 1))
    with pytest.raises(NotImplementedError, match=r"1 \(.*\) is in train mode.*net.eval\(\)"):
        train(net, torch.ones(4, 1), torch.ones(4, 1), **SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 9, 1)}, "x has 9 points and y has 10"),
        ({"x": torch.ones(2, 10, 1)}, r"x must be .* T = 3 networks .* got \(2, 10, 1\)"),
        ({"y": torch.ones(4, 10, 1)}, "y must be"),
        ({"x": torch.full((3, 10, 1), torch.nan)}, "x has NaN"),
        ({"y": torch.full((3, 10, 1), torch.inf)}, "y has infinite"),
        ({"y": torch.full((3, 10, 1), torch.nan)}, r"no target is observed for network\(s\) \[0, 1, 2\]"),
        ({"nets": []}, "list is empty"),
        ({"seed": [1, 2]}, "one for each of the 3 networks, got 2"),
        ({"only": ["9.weight"]}, r"no parameters \['9.weight'\]: it has \['0.weight'"),
        ({"only": []}, "nothing to train"),
        ({"on_divergence": "ignore"}, 'must be "raise" or "mark"'),
    ],
)
def test_errors_say_what_came(unchecked, change, message):
    nets, x, y = tasks()
    with pytest.raises(ValueError, match=message):
        train(**{"nets": nets, "x": x, "y": y, **SETTINGS, **change})


def test_progress_bar_is_shown_when_asked_for_and_only_then(capsys):
    nets, x, y = tasks()
    train(nets, x, y, **SETTINGS)
    assert capsys.readouterr().err == ""
    train(nets, x, y, progress=True, description="source network", **SETTINGS)
    assert "source network" in capsys.readouterr().err
