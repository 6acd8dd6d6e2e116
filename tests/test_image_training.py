"""image_training.py against the loop that everyone writes, and against crops by hand."""

import copy
import math

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ntkbook.experiments.convnets import preresnet
from ntkbook.experiments.image_training import crop_and_mirror, settle, train_images
from ntkbook.experiments.training import DivergenceError


def data(n=10, seed=0, side=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, side, side, generator=generator), torch.randint(4, (n,), generator=generator)


def small(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(20, 4),
        )  # fmt: skip


def slow_crop(x, generator):
    """The oracle: one image at a time, top and left of each first, then whether it is mirrored."""
    top, left = torch.randint(9, (2, len(x), 1), generator=generator)
    mirrored = torch.rand(len(x), 1, generator=generator) < 0.5
    done = []
    for image, i, j, flip in zip(x, top, left, mirrored):
        channels, height, width = image.shape
        large = torch.zeros(channels, height + 8, width + 8, dtype=x.dtype)
        large[:, 4:-4, 4:-4] = image
        part = large[:, i : i + height, j : j + width]
        done.append(part.flip(2) if flip else part)
    return torch.stack(done)


def slow_train(net, x, y, steps, lr, batch_size, seed, augment, decay_at):
    """The oracle. The nets after every step, 0 first, and the losses."""
    net = copy.deepcopy(net)
    net.train()
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.8, weight_decay=0.01)
    nets, losses = [copy.deepcopy(net)], []
    while True:
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x), batch_size):
            if len(losses) == steps:
                return nets, losses
            passed = [fraction for fraction in decay_at if len(losses) >= fraction * steps]
            optimiser.param_groups[0]["lr"] = lr / 10 ** len(passed)
            chosen = order[start : start + batch_size]
            seen = slow_crop(x[chosen], generator) if augment else x[chosen]
            loss = nn.CrossEntropyLoss()(net(seen), y[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            nets.append(copy.deepcopy(net))


def assert_same(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("batch_size", [4, 10, 50])
def test_it_is_the_loop_that_everyone_writes(augment, batch_size):
    net, (x, y) = small(), data()
    expected, expected_losses = slow_train(net, x, y, 8, 0.1, batch_size, 5, augment, (0.5, 0.75))
    kept, losses = train_images(
        net, x, y, steps=8, lr=0.1, momentum=0.8, weight_decay=0.01, batch_size=batch_size, seed=5, augment=augment,
        checkpoints=(3, 0, 8, 1),
    )  # fmt: skip
    assert list(kept) == [0, 1, 3, 8]
    for step, trained in kept.items():
        assert_same(trained, expected[step])
        assert not any(module.training for module in trained.modules())
    assert losses.tolist() == expected_losses


def test_the_rates_are_those_of_the_schedule():
    """Without momentum or decay of weights, and with a gradient of 1: steps of a linear loss are the rates."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).double()
    x, y = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)
    kept, _ = train_images(
        net, x, y, steps=4, lr=1.0, momentum=0.0, weight_decay=0.1, augment=False, decay_at=(0.5, 0.75),
        checkpoints=range(5),
    )  # fmt: skip
    weights = torch.stack([kept[step][1].weight.detach() for step in range(5)])
    shrunk = (weights[1:] / weights[:-1])[:, 0, 0]  # 1 - rate * weight_decay
    torch.testing.assert_close(
        (1 - shrunk) / 0.1, torch.tensor([1, 1, 0.1, 0.01], dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


@given(seed=st.integers(0, 1000), n=st.integers(1, 6), height=st.integers(1, 7), width=st.integers(1, 7))
def test_crops_are_those_of_the_slow_way(seed, n, height, width):
    x = torch.randn(n, 2, height, width, generator=torch.Generator().manual_seed(seed))
    one, other = (torch.Generator().manual_seed(seed + 1) for _ in range(2))
    assert torch.equal(crop_and_mirror(x, one), slow_crop(x, other))
    assert torch.equal(one.get_state(), other.get_state())


def test_every_crop_and_both_sides_come_up_about_as_often():
    n = 162 * 60
    x = torch.arange(1.0, 82).view(1, 1, 9, 9).expand(n, 1, 9, 9)
    y = crop_and_mirror(x, torch.Generator().manual_seed(0))
    centre = y[:, 0, 4, 4]  # which pixel came to the middle: 81 of them
    counts = centre.long().bincount(minlength=82)[1:]
    assert (counts - 120).abs().max() < 5 * math.sqrt(120)  # a Poisson count's spread
    rising = y[:, 0, 4, 5] > y[:, 0, 4, 4]
    inner = (centre - 1) % 9  # the column; at the border the neighbour is a zero
    sides = rising[(inner > 0) & (inner < 8)].double().mean()
    assert abs(sides - 0.5) < 0.03  # six standard errors


def test_deterministic_and_nothing_else_changes():
    net, (x, y) = preresnet(8, width=2, outputs=4), data(side=32)
    net.eval()
    before, given_x = copy.deepcopy(net), x.clone()
    state = torch.get_rng_state()
    one, losses = train_images(net, x, y, steps=3, lr=0.1, batch_size=4, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    again, same = train_images(net, x, y, steps=3, lr=0.1, batch_size=4, seed=1)
    other, _ = train_images(net, x, y, steps=3, lr=0.1, batch_size=4, seed=2)
    assert_same(one[3], again[3])
    assert torch.equal(losses, same)
    assert not torch.equal(one[3][0].weight, other[3][0].weight)
    assert_same(net, before)
    assert not net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(x, given_x)
    assert one[3][1].norms[0].num_batches_tracked == 3  # in train mode, although the network was not


def test_it_learns():
    x, y = data(64, side=8)
    x += 2 * nn.functional.one_hot(y, 4)[:, :3, None, None]  # classes have colours
    kept, losses = train_images(small(), x, y, steps=60, lr=0.1, batch_size=16, checkpoints=(0,))
    first, last = ((kept[step](x).argmax(1) == y).double().mean() for step in (0, 60))
    assert last > 0.9 > first
    assert losses[-10:].mean() < losses[:4].mean() / 2


def test_the_data_are_converted_to_the_network():
    x, y = data()
    kept, losses = train_images(small().double(), x, y.int().long(), steps=1, lr=0.1)
    assert losses.dtype == kept[1][0].weight.dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_same_images_are_seen():
    x, y = data()
    on_cpu, losses = train_images(small().double(), x, y, steps=4, lr=0.1, batch_size=4)
    on_gpu, others = train_images(small().double().cuda(), x, y, steps=4, lr=0.1, batch_size=4)
    torch.testing.assert_close(losses, others.cpu(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(on_cpu[4][0].weight, on_gpu[4][0].weight.cpu(), rtol=1e-9, atol=1e-10)


def test_divergence_is_an_error():
    x, y = data()
    with pytest.raises(DivergenceError, match=r"diverged in step \d+ of 30 at learning rate 1e\+20: lower it"):
        train_images(small(), x, y, steps=30, lr=1e20, weight_decay=1.0)
    with pytest.raises(DivergenceError, match="diverged in step 1 of 1 "):  # its loss is that before the step
        train_images(small(), x, y, steps=1, lr=float("inf"))


GOOD = {"steps": 1, "lr": 0.1}


@pytest.fixture
def shapes_unchecked():
    """Whoever uses the library has no run-time check of shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "at least 1, got 0 and 128"),
        ({"batch_size": 0}, "at least 1, got 1 and 0"),
        ({"checkpoints": (2,)}, r"checkpoints must be steps from 0 to 1, got \[2\]"),
        ({"checkpoints": (-1,)}, r"checkpoints must be steps from 0 to 1, got \[-1\]"),
        ({"decay_at": (1.5,)}, r"fractions of the steps, from 0 to 1, got \[1.5\]"),
        ({"x": data(9)[0]}, "x has 9 images and y has 10 classes"),
        ({"x": torch.full((10, 3, 8, 8), torch.nan)}, "NaN or infinite"),
        ({"y": -torch.ones(10, dtype=torch.int64)}, "classes from 0 on, got -1"),
        ({"y": torch.full((10,), 4)}, r"must map to \(n, classes\), with classes to 4, got \(10, 4\)"),
    ],
)
def test_arguments_are_checked(changes, message):
    x, y = data()
    with pytest.raises(ValueError, match=message):
        train_images(small(), **{"x": x, "y": y, **GOOD, **changes})


def test_dropout_is_refused():
    x, y = data()
    with pytest.raises(NotImplementedError, match=r"1 \(Dropout\) draws from the global random state"):
        train_images(nn.Sequential(small(), nn.Dropout(0.1)), x, y, **GOOD)


def test_settled_statistics_are_those_of_the_images():
    net = preresnet(8, width=4, seed=3)
    x = torch.randn(30, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    settled = settle(net, x, batch_size=10)
    assert not settled.training
    first = settled[0](x)  # what the first BatchNorm sees does not depend on any other
    norm = settled[1].norms[0]
    means = torch.stack([part.mean((0, 2, 3)) for part in first.split(10)]).mean(0)
    variances = torch.stack([part.var((0, 2, 3)) for part in first.split(10)]).mean(0)
    assert torch.allclose(norm.running_mean, means, atol=1e-6)
    assert torch.allclose(norm.running_var, variances, rtol=1e-5)
    assert norm.momentum == 0.1
    with torch.no_grad():
        assert float(settled(x).std()) < float(net.eval()(x).std())
    assert torch.equal(net[1].norms[0].running_mean, torch.zeros(4))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), settled.parameters()))
