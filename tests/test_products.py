"""What chapter 5 measures of Fisher-vector products: what is measured, never how two times compare."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ntkbook import Linearization, fisher_vector_product
from ntkbook.experiments import products
from ntkbook.experiments.networks import mlp
from ntkbook.fisher import METHODS
from ntkbook.likelihoods import get_likelihood

NET = [3, 6, 4]


def data(n=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, NET[0], generator=generator, dtype=dtype), torch.arange(n) % NET[-1]


def vector(lin, seed=1):
    return torch.randn(lin.num_params, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_the_loss_gradient_is_that_of_autograd(likelihood):
    net, (x, y) = mlp(NET, dtype=torch.float64), data()
    y = y if likelihood == "categorical" else torch.randn(7, 4, dtype=torch.float64)
    found = products.loss_gradient(Linearization(net), x, y, likelihood)
    loss = cross_entropy(net(x), y) if likelihood == "categorical" else (net(x) - y).square().sum() / (2 * len(x))
    want = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(net.parameters()))])
    assert torch.allclose(found, want, rtol=1e-12, atol=1e-14)
    assert not found.requires_grad


@pytest.mark.parametrize(("method", "sides"), [("forward_difference", (1,)), ("central_difference", (1, -1))])
def test_errors_are_relative_and_in_the_precision_of_the_linearisation(method, sides):
    net, (x, _) = mlp(NET, dtype=torch.float64), data()
    lin, steps = Linearization(net), (0.3, 0.03)
    v, likelihood = vector(lin), get_likelihood("categorical")
    exact = fisher_vector_product(lin, x, v)
    f, theta, size = lin.outputs(x), lin.flatten(lin.params), v.norm()

    def gradient(shift):
        divergence = torch.func.grad(lambda p: likelihood.kl(f, lin._call(lin.unflatten(p), x)).sum())
        return divergence(theta + shift)

    want = []
    for step in steps:
        product = sum(side * gradient(side * step * v / size) for side in sides) * size / (step * len(sides))
        want.append(float(((product - exact).square().sum() / exact.square().sum()).sqrt()))
    found = products.errors(lin, x, v, "categorical", method, steps, exact)
    assert found.tolist() == pytest.approx(want, rel=1e-9)
    assert found[0] > found[1] > 0
    single = products.errors(lin.to(dtype=torch.float32), x, v, "categorical", method, (*steps, "auto"), exact)
    assert single.shape == (3,)
    assert single.dtype == torch.float64
    # gradients in float32 over the shorter step: 1e-7 / 0.03
    assert single[:2].tolist() == pytest.approx(want, rel=1e-2)
    assert 0 < single[2] < 0.1


def test_measure_sees_a_big_tensor():
    nbytes = 64 * 2**20
    seconds, peak = products.measure(lambda: torch.ones(nbytes // 4))
    assert seconds > 0
    if math.isnan(peak):
        pytest.skip("this system does not tell the peak")
    assert peak >= 0.9 * nbytes  # pages that were there already, the allocator's own among them
    assert products.measure(lambda: None)[1] < nbytes / 4  # the peak before is forgotten


def test_measure_lets_errors_through():
    with pytest.raises(ZeroDivisionError):
        products.measure(lambda: 1 / 0)


def test_a_system_that_does_not_tell(monkeypatch):
    """No such field, as in some containers, or no such file."""
    assert math.isnan(products._status("VmNone"))
    monkeypatch.setattr(products, "_status", lambda field: math.nan)
    seconds, peak = products.measure(lambda: None)
    assert seconds > 0
    assert math.isnan(peak)


def test_costs_of_all_methods():
    net, (x, y) = mlp(NET, dtype=torch.float64), data()
    first, second, *_ = net.parameters()
    first.grad = torch.ones_like(first)
    second.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    costs = products.product_costs(net, x, y, [2, 4, 100], repeats=3)
    assert list(costs) == ["gradient", *METHODS]
    for tried in costs.values():
        *single, best = tried
        assert [cost.chunk_size for cost in single] == [2, 4]  # no chunk is larger than the data
        assert [len(cost.seconds) for cost in single] == [1, 1]
        fastest = min(single, key=lambda cost: cost.seconds[0])
        assert (best.chunk_size, len(best.seconds)) == (fastest.chunk_size, 3)
        assert all(0 < seconds < math.inf for cost in tried for seconds in cost.seconds)
        assert all(math.isnan(cost.peak) or cost.peak >= 0 for cost in tried)
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(parameter.grad is None for parameter in net.parameters() if parameter is not first)
    assert not second.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert list(products.product_costs(net, x, y, [7], repeats=1, methods=["exact"])) == ["gradient", "exact"]


def test_costs_need_a_chunk_that_fits():
    with pytest.raises(ValueError, match=r"chunk_sizes: expected one up to the 7 examples, got \[8\]"):
        products.product_costs(mlp(NET, dtype=torch.float64), *data(), [8], repeats=1)


class Idle(nn.Module):
    """One of its parameters is not used."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(3, 4).double(), nn.Linear(2, 2).double()

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("net", [mlp(NET, dtype=torch.float64), Idle()], ids=["mlp", "idle"])
def test_a_loop_over_rows(net):
    x = data()[0]
    for rows in (1, 3, 1000):
        seconds = products.row_by_row(net, x, vector(Linearization(net)), rows)
        assert 0 < seconds < math.inf
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_loop_over_more_rows_than_there_are_is_all_of_them(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(products.time, "perf_counter", lambda: float(next(ticks)))
    net, (x, _) = mlp(NET, dtype=torch.float64), data()
    # one tick forward, one for all 28 rows
    assert products.row_by_row(net, x, vector(Linearization(net)), 1000) == 2.0
