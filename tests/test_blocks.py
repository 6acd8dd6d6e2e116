"""Products with blocks of vectors by the layers' rule: their values, how often they run the network, what they hold."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.jacobian import loop_jacobian
from oracles.largest import Largest
from oracles.networks import CASES, build
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkbook import Linearization, blocks, linearize
from ntkbook.blocks import LayerBlocks
from ntkbook.experiments.networks import mlp
from ntkbook.gram import PASS

TOLERANCE = 1e-12  # of the largest entry, in float64
RULED = [name for name in CASES if not CASES[name].rest]


@pytest.fixture(autouse=True)
def plain_attention():
    """Fused attention has no forward-mode derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def randn(*shape, dtype=torch.double):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def rule(lin, x):
    return LayerBlocks(lin, x, *lin._inspect(x))


def error(got, want):
    """The largest difference, relative to the largest entry."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def errors(product, j, k, *size):
    """Of J V and Jᵀ U, by a linearisation or by the rule alone."""
    n, o = size[0], len(j) // size[0]
    v, u = randn(j.shape[1], k, dtype=j.dtype), randn(n, o, k, dtype=j.dtype)
    pushed, pulled = product.jvp(v), product.vjp(u)
    return max(error(pushed.flatten(0, 1), j @ v), error(pulled, j.T @ u.flatten(0, 1)))


class Ruled:
    """The rule's products, whether it is the cheaper way or not."""

    def __init__(self, lin, x, size):
        self.rule, self.x, self.size = rule(lin, x), x, size

    def jvp(self, v):
        return self.rule.jvp(self.x, v, self.size)

    def vjp(self, u):
        return self.rule.vjp(self.x, u, self.size)


class Public:
    def __init__(self, lin, x):
        self.lin, self.x = lin, x

    def jvp(self, v):
        return self.lin.jvp(self.x, v)

    def vjp(self, u):
        return self.lin.vjp(self.x, u)


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("name", RULED)
@pytest.mark.parametrize("block", [1, 100, blocks.BLOCK])
def test_the_rule_equals_the_jacobian(name, block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    net, x = build(name)
    lin, j = Linearization(net), loop_jacobian(net, x)
    for k in (1, 2, 7, 100):
        for size in (1, 4, 6):
            assert errors(Ruled(lin, x, size), j, k, 6) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k", [1, 2, 7, 100])
def test_products_equal_the_jacobian(name, k):
    net, x = build(name)
    j = loop_jacobian(net, x)
    assert errors(Public(Linearization(net), x), j, k, 6) < TOLERANCE
    assert errors(Public(Linearization(net, chunk_size=1), x), j, k, 6) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["one output", "vector output", "frozen", "layer norm", "convolutions", "called twice"]
)
def test_single_precision(name):
    net, x = build(name, dtype=torch.float32)
    j = loop_jacobian(net, x)
    assert errors(Ruled(Linearization(net), x, 4), j, 7, 6) < 1e-5  # float32


def test_frozen_and_chosen_parameters():
    net, x = build("one output")
    for names in (["0.weight"], ["2.bias"], ["0.bias", "4.weight"], ["4.bias"]):
        lin = Linearization(net, params=names)
        assert errors(Ruled(lin, x, 4), loop_jacobian(net, x, names), 3, 6) < TOLERANCE


@given(
    widths=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    bias=st.booleans(),
    n=st.integers(1, 6),
    k=st.integers(1, 9),
    size=st.integers(1, 6),
    block=st.sampled_from([1, 30, 10**6]),
)
def test_any_shape_of_linear_layers(widths, bias, n, k, size, block):
    layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o, bias=bias), nn.Tanh())]
    check(nn.Sequential(*layers[:-1]).double(), randn(n, widths[0]), k, size, block)


@given(
    groups=st.integers(1, 3),
    ways=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    bias=st.booleans(),
    n=st.integers(1, 4),
    k=st.integers(1, 6),
    size=st.integers(1, 4),
    block=st.sampled_from([1, 30, 10**6]),
)
def test_any_shape_of_convolutions(groups, ways, kernel, stride, padding, bias, n, k, size, block):
    i, o = (groups * way for way in ways)
    net = nn.Sequential(
        nn.Conv2d(i, o, kernel, stride, padding, groups=groups, bias=bias), nn.Tanh(), nn.Conv2d(o, 2, 1), nn.Flatten()
    )
    check(net.double(), randn(n, i, 4, 4), k, size, block)


def check(net, x, k, size, block):
    lin, j = Linearization(net), loop_jacobian(net, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        ruled = Ruled(lin, x, size)
        v, u = randn(j.shape[1], k), randn(len(x), len(j) // len(x), k)
        scale = 10 * max(1.0, float(j.abs().max())) * len(j)  # entries may cancel
        assert (ruled.jvp(v).flatten(0, 1) - j @ v).abs().max() < TOLERANCE * scale
        assert (ruled.vjp(u) - j.T @ u.flatten(0, 1)).abs().max() < TOLERANCE * scale


def test_vectors_laid_out_in_any_way():
    net, x = build("convolutions")
    ruled, j = Ruled(Linearization(net), x, 4), loop_jacobian(net, x)
    v, u = randn(7, j.shape[1]).T, randn(7, 3, 6).permute(2, 1, 0)
    assert error(ruled.jvp(v).flatten(0, 1), j @ v) < TOLERANCE
    assert error(ruled.vjp(u), j.T @ u.flatten(0, 1)) < TOLERANCE


def test_gradients_flow_through_vectors():
    net, x = build("one output")
    lin, j = Linearization(net), loop_jacobian(net, x)
    v, u, w = randn(lin.num_params, 7).requires_grad_(), randn(6, 1, 7).requires_grad_(), randn(6, 1, 7)
    assert rule(lin, x).prefers_rule(7)
    assert error(torch.autograd.grad((w * lin.jvp(x, v)).sum(), v)[0], j.T @ w[:, 0]) < TOLERANCE
    pulled = lin.vjp(x, u)
    assert error(torch.autograd.grad((v.detach() * pulled).sum(), u)[0][:, 0], j @ v.detach()) < TOLERANCE
    with torch.no_grad():
        assert not lin.jvp(x, v).requires_grad
        assert not lin.vjp(x, u).requires_grad


# ------------------------------------------------------------------ when the rule is taken, and what it runs


def test_counts_written_out():
    """Multiply-adds of 5-200-2000-200-1, whose weights are used once an example."""
    lin = Linearization(mlp([5, 200, 2000, 200, 1]))
    x = torch.zeros(3, 5)
    counts = rule(lin, x)
    forward, derivatives = 6 * 200 + 201 * 2000 + 2001 * 200 + 201, 2401
    assert counts.forward == forward == lin.num_params
    assert counts.product_cost(1) == 3 * forward + PASS * derivatives
    assert counts.product_cost(10) == 2 * forward + 10 * (forward + (1 + PASS) * derivatives)
    pair = (6 + 200) + (201 + 2000) + (2001 + 200) + (201 + 1) + 4 * PASS
    last = 201 + 1 + PASS - 201  # whose rows are shorter, and made once
    assert counts.gram_cost(1000, 1000, symmetric=True) == 2000 * forward + 201_000 + 500_500 * (pair - last)
    assert counts.gram_cost(1000, 10, symmetric=False) == 2020 * forward + 10_000 * pair


def test_counts_of_convolutions():
    net, x = build("convolutions")
    counts = rule(Linearization(net), x)
    conv, norm, conv2, linear = 25 * 19 * 3, 25 * 3 + 25 * 3, 13 * 4, 5 * 3  # positions, inputs, channels
    assert counts.forward == conv + norm + conv2 + linear
    o, derivatives = 3, 25 * 3 + 25 * 3 + 4 + 3
    for k in (1, 3, 4, 5, 6, 7, 20):
        assert counts.prefers_rule(k) is (o * (counts.forward + k * derivatives) < k * counts.forward)
    assert not counts.prefers_rule(3)
    assert counts.prefers_rule(7)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].rest])
def test_parameters_without_a_rule_go_the_other_way(name):
    net, x = build(name)
    assert not any(rule(Linearization(net), x).prefers_rule(k) for k in (1, 2, 100))


@pytest.mark.parametrize("k", [2, 7, 100])
def test_the_network_runs_once_a_chunk(k):
    net, x = build("one output", n=9)
    lin, runs = Linearization(net, chunk_size=3), []
    net.register_forward_hook(lambda module, args, out: runs.append(len(out)))  # on no layer: the rule holds
    assert rule(lin, x).prefers_rule(k)
    v, u = randn(lin.num_params, k), randn(9, 1, k)
    lin.jvp(x, v)  # what is looked at once
    for product in (lambda: lin.jvp(x, v), lambda: lin.vjp(x, u)):
        runs.clear()
        product()
        assert runs.count(3) == 3
        assert sorted(runs) == [1, 1, 1, 2, 3, 3, 3]  # and one or two examples, to look at the network


# ------------------------------------------------------------------ memory


def test_nothing_grows_with_n_beyond_the_vectors(monkeypatch):
    monkeypatch.setattr(linearize, "working_memory", lambda device: 400_000)
    net, _ = build("one output")
    lin, k = Linearization(net), 10
    sizes = []
    for n in (1600, 6400):
        x = randn(n, 4)
        with Largest(expanded=False) as largest:
            lin.jvp(x, randn(lin.num_params, k))
            lin.vjp(x, randn(n, 1, k))
        sizes.append(largest.numel)
    assert sizes == [1600 * k, 6400 * k]  # the vectors themselves
    with Largest(expanded=False) as largest:
        Linearization(net, chunk_size=1600).jvp(randn(1600, 4), randn(lin.num_params, k))
    assert largest.numel >= 1600 * 7 * k  # the counter works: a layer's B


PEAK = """
import sys, torch
from ntkbook import Linearization, linearize
from ntkbook.experiments.networks import mlp
torch.set_num_threads(1)
linearize.working_memory = lambda device: int(sys.argv[1])
def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
lin = Linearization(mlp([5, 200, 2000, 200, 1]))
operator = lambda n: lin.operator(torch.randn(n, 5), method="products")
operator(10) @ torch.randn(10, 2)
few, v = operator(6000), torch.randn(6000, 2)
before = peak()
product = few @ v
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_of_a_product():
    """The derivatives and inputs of all examples are 110 MB, and as much again is made of them."""
    run = [sys.executable, "-c", PEAK, str(32 * 2**20)]
    took = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    vectors = 2 * 803_001 * 4
    chunk, products = 8 * 2**20, 2 * 4 * blocks.BLOCK
    assert took < 3 * vectors + chunk + products + 24 * 2**20  # torch's own buffers, and heaps that are not given back
