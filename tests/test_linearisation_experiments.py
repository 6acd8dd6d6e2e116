"""Wide networks, the linearised training and many descents, each against the plain way of doing it."""

import pytest
import torch

from ntkbook.experiments.linearisation import Scale, descend, ntk_mlp, train_linearised
from ntkbook.experiments.networks import mlp
from ntkbook.experiments.training import train
from ntkbook.linearize import Linearization

F64 = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_ntk_mlp_is_the_formula():
    net, x = ntk_mlp([2, 5, 4, 3], "relu", seed=1), randn(7, 2)
    (w1, b1), (w2, b2), (w3, b3) = ((m.weight, m.bias) for m in net if isinstance(m, torch.nn.Linear))
    hidden = torch.relu(torch.relu(x @ w1.T + b1) @ w2.T / 5**0.5 + b2)
    torch.testing.assert_close(net(x), hidden @ w3.T / 4**0.5 + b3, rtol=1e-13, atol=1e-13)


def test_ntk_mlp_draws_standard_normals_from_its_seed_alone():
    state = torch.random.get_rng_state()
    nets = [ntk_mlp([1, 200, 200, 1], seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), state)
    flat = [torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])
    assert abs(float(flat[0].mean())) < 5 / len(flat[0]) ** 0.5  # five standard errors
    assert abs(float(flat[0].std()) - 1) < 5 / (2 * len(flat[0])) ** 0.5


def test_the_ntk_of_wide_networks_varies_little():
    """What the parameterisation is for: the kernel has a limit, so that two seeds agree ever better."""
    x = randn(6, 1)

    def spread(width):
        grams = torch.stack([Linearization(ntk_mlp([1, width, width, 1], seed=s)).gram(x) for s in range(6)])
        return float(grams.std(0).norm() / grams.mean(0).norm())

    assert spread(400) < 0.5 * spread(25)  # theory: a quarter


@pytest.mark.parametrize(
    ("sizes", "activation", "message"),
    [([3], "tanh", "at least two"), ([1, 0], "tanh", "positive"), ([1, 2], "?", "one of")],
)
def test_ntk_mlp_says_what_is_wrong(sizes, activation, message):
    with pytest.raises(ValueError, match=message):
        ntk_mlp(sizes, activation)


def test_scale_shows_its_factor():
    assert "0.25" in repr(Scale(0.25))


class Linearised(torch.nn.Module):
    """f₀ + J(θ − θ₀) as a module, to be trained by the ordinary loop."""

    def __init__(self, lin, x):
        super().__init__()
        self.lin, self.jacobian, self.f = [lin], lin.jacobian(x), lin.outputs(x)
        self.step = torch.nn.Parameter(torch.zeros(lin.num_params, dtype=F64))

    def forward(self, x):  # the inputs are indices of x
        rows = x[:, 0].long()
        return self.f[rows] + (self.jacobian[rows] @ self.step)[:, None]


def test_train_linearised_is_gradient_descent_on_the_linear_model():
    lin = Linearization(mlp([1, 6, 1], seed=2, dtype=F64))
    x, y, x_star = randn(8, 1), randn(8, seed=1), randn(5, 1, seed=2)
    module = Linearised(lin, torch.cat([x, x_star]))
    index = torch.arange(13, dtype=F64)[:, None]
    trained, _ = train(module, index[:8], y[:, None], lr=0.05, epochs=40, progress=False)
    found = train_linearised(lin, x, y, x_star, lr=0.05, epochs=40)
    torch.testing.assert_close(found, trained(index[8:])[:, 0].detach(), rtol=1e-11, atol=1e-11)
    assert (found - lin.outputs(x_star)[:, 0]).norm() > 0.1  # it has moved


def test_train_linearised_refuses_a_rate_that_diverges():
    lin = Linearization(mlp([1, 6, 1], seed=2, dtype=F64))
    x, y = randn(8, 1), randn(8, seed=1)
    limit = 8 / float(torch.linalg.eigvalsh(lin.gram(x))[-1])
    train_linearised(lin, x, y, x, lr=0.99 * limit, epochs=2)
    with pytest.raises(ArithmeticError, match="diverges"):
        train_linearised(lin, x, y, x, lr=1.01 * limit, epochs=2)


def test_descend_finds_a_quadratic_minimum_from_everywhere():
    scales, centre = torch.tensor([1.0, 3.0, 10.0], dtype=F64), randn(3)
    path, values = descend(lambda t: (scales * (t - centre).square()).sum(), randn(5, 3, seed=1), steps=300)
    assert path.shape == (301, 5, 3)
    assert values.shape == (301, 5)
    assert (values.diff(dim=0) <= 0).all()
    assert (path[-1] - centre).abs().max() < 1e-6  # where halving the loss no longer changes a double
    torch.testing.assert_close(values, (scales * (path - centre).square()).sum(-1), rtol=1e-13, atol=1e-15)


def test_descend_keeps_starts_apart_and_stops_where_asked():
    loss = lambda t: (t.square() - 1).square().sum()  # noqa: E731
    starts = torch.tensor([[2.0], [-0.5], [0.3]], dtype=F64)
    path, _ = descend(loss, starts, steps=105, every=10)
    assert path[-1, :, 0].sign().tolist() == [1, -1, 1]
    assert (path[-1].abs() - 1).abs().max() < 1e-6
    whole, _ = descend(loss, starts, steps=105)
    assert torch.equal(path, whole[[*range(0, 101, 10), 105]])
    alone, _ = descend(loss, starts[1:2], steps=105)
    torch.testing.assert_close(alone[:, 0], whole[:, 1], rtol=1e-12, atol=0)
