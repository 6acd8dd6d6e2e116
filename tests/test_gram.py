"""The layer rule: when it applies, what it makes, and what it never makes."""

import pytest
import torch
from oracles.jacobian import loop_jacobian
from oracles.networks import CASES, build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ntkbook import Linearization
from ntkbook.gram import find_layers, gram_block, gram_diagonal, layer_features

LAYERED = [name for name, case in CASES.items() if case.layers]


def layers_of(lin, x):
    return find_layers(lin.net, lin._call, lin.params, x[:1])


def test_layers_say_which_of_their_parameters_count():
    net, x = build("frozen")
    layers = layers_of(Linearization(net), x)
    assert [(layer.module, layer.weight, layer.bias) for layer in layers] == [
        (net[2], True, True),
        (net[4], False, True),
    ]
    net, x = build("no bias")
    assert [(layer.weight, layer.bias) for layer in layers_of(Linearization(net), x)] == [(True, False)] * 3


def test_a_layer_that_is_not_called_contributes_nothing():
    net, x = build("vector output")
    layers = layers_of(Linearization(net), x)
    assert net.unused not in [layer.module for layer in layers]
    only = Linearization(net, params=["unused.weight"])
    assert layers_of(only, x) is None
    assert torch.equal(only.gram(x), torch.zeros(6, 6, dtype=torch.double))
    assert torch.equal(only.diagonal(x), torch.zeros(6, dtype=torch.double))


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_could_change_a_layer_send_it_to_the_fallback(hook):
    net, x = build("tanh")
    double = {"register_forward_hook": lambda m, a, z: 2 * z, "register_forward_pre_hook": lambda m, a: (2 * a[0],)}
    getattr(net[2], hook)(double[hook])
    lin = Linearization(net)
    assert layers_of(lin, x) is None
    reference = loop_jacobian(net, x)
    torch.testing.assert_close(lin.gram(x), reference @ reference.T, rtol=1e-12, atol=1e-12)


def test_one_example_does_not_look_like_a_sequence():
    """A Linear on (examples · positions, features) is found out although one example with one position is not."""
    net = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 2), nn.Unflatten(0, (-1, 3)), nn.Flatten()).double()
    x = torch.randn(5, 3, 4, dtype=torch.double)
    assert layers_of(Linearization(net), x) is None
    reference = loop_jacobian(net, x)
    torch.testing.assert_close(Linearization(net).gram(x), reference @ reference.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERED)
def test_features_are_the_factors_of_the_gradients(name):
    """Each weight's gradient is the outer product d aᵀ, and each bias's is d."""
    net, x = build(name)
    lin = Linearization(net)
    layers = layers_of(lin, x)
    jacobian = lin.jacobian(x).view(len(x), -1, lin.num_params)
    names = {module: path for path, module in net.named_modules()}
    for layer, a, d in layer_features(lin._call, layers, lin.params, x, None):
        path = names[layer.module] and names[layer.module] + "."
        rows = [lin.unflatten(row) for row in jacobian.flatten(0, 1)]
        if layer.weight:
            weight = torch.stack([row[f"{path}weight"] for row in rows]).view(len(x), d.shape[1], *d.shape[2:], -1)
            torch.testing.assert_close(d[..., None] * a[:, None, None, :], weight, rtol=1e-12, atol=1e-14)
        if layer.bias:
            bias = torch.stack([row[f"{path}bias"] for row in rows]).view(d.shape)
            torch.testing.assert_close(d, bias, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["tanh", "layer norm"])
def test_blocks_add_to_what_is_there(name):
    net, x = build(name)
    lin = Linearization(net)
    features, _, _ = lin._features(x, len(x), lin.outputs(x).shape[1], 1, None)
    left, right = features(x), features(x[:2])
    whole = lin.gram(x, x[:2])
    out = torch.ones_like(whole)
    gram_block(left, right, out)
    torch.testing.assert_close(out - 1, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram_diagonal(left).flatten(), lin.diagonal(x), rtol=1e-14, atol=0)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_jacobian_is_formed():
    net = nn.Sequential(nn.Linear(3, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 2))
    x = torch.randn(20, 3)
    lin = Linearization(net)
    lin._call(lin.params, x)
    with Largest() as layered:
        lin.gram(x)
    assert layered.numel <= 300 * 300  # the network's own largest weight
    with Largest() as formed:
        lin.jacobian(x)
    assert formed.numel >= 20 * 2 * lin.num_params


def test_a_symmetric_gram_is_symmetric_and_semidefinite():
    net, x = build("tanh", n=40)
    gram = Linearization(net, chunk_size=7).gram(x)
    assert torch.linalg.eigvalsh(gram).min() > -1e-12 * gram.diagonal().max()
    torch.testing.assert_close(gram, gram.T, rtol=1e-14, atol=1e-14)
