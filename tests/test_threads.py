"""Threads that share a network, a linearisation or a posterior."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from ntkbook import NTKGP, Linearization, fisher_vector_product


@pytest.fixture(autouse=True)
def _switched_often():
    """Threads take turns every ten microseconds, so that what can go wrong does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def network(outputs=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, outputs))


def assert_the_same_in_threads(calls, *nets):
    before = [list(net.named_parameters()) for net in nets]
    want = [call() for call in calls]
    # a thread's own number of cores, or BLAS divides its sums otherwise than in the main one, and rounds otherwise
    with ThreadPoolExecutor(len(calls), initializer=torch.set_num_threads, initargs=(1,)) as threads:
        for _ in range(15):
            for got, wanted in zip(threads.map(lambda call: call(), calls), want):
                assert torch.equal(got, wanted)
    for net, parameters in zip(nets, before):
        assert [name for name, _ in net.named_parameters()] == [name for name, _ in parameters]
        assert all(now is then for now, (_, then) in zip(net.parameters(), parameters))
        assert all(isinstance(value, nn.Parameter) for value in net.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_predictions_from_threads_are_those_of_one():
    net = network()
    posterior = NTKGP(net, noise=0.1).condition(draw(12, 2), draw(12, seed=1))
    other = NTKGP(net, noise=0.1, space="parameter").condition(draw(12, 2), draw(12, seed=1))
    stars = [draw(9, 2, seed=seed) for seed in range(2, 5)]
    calls = [lambda x=x: torch.stack(posterior.marginals(x)) for x in stars]
    assert_the_same_in_threads([*calls, lambda: other.mean(stars[0])], net)


def test_products_with_networks_that_share_modules():
    body = network(5)
    one, two = nn.Sequential(body, nn.Linear(5, 1)).double(), nn.Sequential(body, nn.Tanh(), nn.Linear(5, 3)).double()
    x, lin = draw(7, 2), Linearization(one)
    v, w = draw(lin.num_params, 1), draw(Linearization(two).num_params, seed=1)
    calls = [
        lambda: lin.jvp(x, v[:, 0]),
        lambda: lin.jacobian(x),
        lambda: fisher_vector_product(two, x, w),
        lambda: Linearization(two).gram(x),
    ]
    assert_the_same_in_threads(calls, one, two)
