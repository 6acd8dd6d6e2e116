"""networks.py: PyTorch's own initialisation, from a seed, leaving the global random state alone."""

import pytest
import torch
from torch import nn

from ntkbook.experiments.networks import ACTIVATIONS, lenet3, mlp, split_last


def test_mlp_is_what_pytorch_makes_after_manual_seed():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
    net = mlp([2, 5, 4, 1], "relu", seed=3)
    assert [type(layer) for layer in net] == [type(layer) for layer in expected]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), expected.parameters()))


def test_mlp_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    mlp([1, 3, 1], seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_seed_is_one_network_in_every_dtype_and_another_seed_another():
    single, double = mlp([1, 3, 1], seed=7), mlp([1, 3, 1], seed=7, dtype=torch.float64)
    assert next(single.parameters()).dtype == torch.float32
    assert all(torch.equal(a.double(), b) for a, b in zip(single.parameters(), double.parameters()))
    assert not torch.equal(single[0].weight, mlp([1, 3, 1], seed=8)[0].weight)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_runs(activation):
    assert mlp([1, 3, 2], activation)(torch.ones(4, 1)).shape == (4, 2)


@pytest.mark.parametrize("sizes", [[1], [], [1, 0, 1]])
def test_sizes_are_checked(sizes):
    with pytest.raises(ValueError, match="at least two positive numbers"):
        mlp(sizes)


def test_unknown_activation_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"tanh, relu.*got 'sin'"):
        mlp([1, 1], "sin")


def test_split_last_shares_the_parameters():
    net, x = mlp([1, 3, 2]), torch.ones(4, 1)
    features, last = split_last(net)
    torch.testing.assert_close(last(features(x)), net(x), rtol=0, atol=0)
    assert last.weight is net[-1].weight


@pytest.mark.parametrize("net", [nn.Linear(1, 1), nn.Sequential(), nn.Sequential(nn.Linear(1, 1), nn.Tanh())])
def test_split_last_needs_a_last_linear_layer(net):
    with pytest.raises(TypeError, match=r"nn.Sequential\(features, nn.Linear"):
        split_last(net)


def test_lenet3_is_two_convolutions_and_a_linear_layer_as_pytorch_makes_them():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = [nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), nn.Linear(256, 10)]
    net = lenet3(seed=3)
    layers = [module for module in net if list(module.parameters())]
    assert [str(layer) for layer in layers] == [str(layer) for layer in expected]
    for layer, other in zip(layers, expected):
        assert torch.equal(layer.weight, other.weight)
        assert torch.equal(layer.bias, other.bias)
    assert sum(parameter.numel() for parameter in net.parameters()) == 5142


def test_lenet3_computes_what_its_layers_do():
    net, x = lenet3(3, seed=1, dtype=torch.float64), torch.rand(4, 784, dtype=torch.float64)
    z = x.view(4, 1, 28, 28)
    for i in (1, 4):
        z = nn.functional.max_pool2d(nn.functional.conv2d(z, net[i].weight, net[i].bias).relu(), 2)
    torch.testing.assert_close(net(x), z.flatten(1) @ net[-1].weight.T + net[-1].bias, rtol=1e-12, atol=1e-12)


def test_lenet3s_seed_and_the_global_random_state():
    before = torch.get_rng_state()
    single, double, other = lenet3(seed=7), lenet3(seed=7, dtype=torch.float64), lenet3(seed=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a.double(), b) for a, b in zip(single.parameters(), double.parameters()))
    assert not torch.equal(single[1].weight, other[1].weight)


def test_lenet3_needs_an_output():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        lenet3(0)
