"""Gram matrices: what they are made from, that the cheaper way is taken, and the memory that they take."""

import subprocess
import sys

import pytest
import torch
from oracles.jacobian import loop_jacobian
from oracles.largest import Largest
from oracles.networks import build
from torch import nn

from ntkbook import Linearization, gram
from ntkbook.experiments.networks import lenet3, mlp
from ntkbook.finding import find_layers
from ntkbook.gram import FeatureMaker, Shape, prefers_ghost, prefers_ghost_alone
from ntkbook.layers import layer_features

PLAIN = ["tanh", "relu in place", "one output", "no bias", "frozen", "vector output", "branches", "in place"]


def found(lin, x):
    return find_layers(lin, x[:1])


def maker(lin, x, x2=None, **options):
    o, memory = lin._inspect(x)
    return FeatureMaker(lin, x, x if x2 is None else x2, o, memory, None, **options)


def test_layers_say_which_of_their_parameters_count():
    net, x = build("frozen")
    layers, _ = found(Linearization(net), x)
    assert [(layer.module, layer.weight, layer.bias) for layer in layers] == [
        (net[2], True, True),
        (net[4], False, True),
    ]
    net, x = build("no bias")
    assert [(layer.weight, layer.bias) for layer in found(Linearization(net), x)[0]] == [(True, False)] * 3


def test_a_layer_that_is_not_called_contributes_nothing():
    net, x = build("vector output")
    assert net.unused not in [layer.module for layer in found(Linearization(net), x)[0]]
    only = Linearization(net, params=["unused.weight"])
    assert found(only, x) == ([], [])
    assert torch.equal(only.gram(x), torch.zeros(6, 6, dtype=torch.double))
    assert torch.equal(only.diagonal(x), torch.zeros(6, dtype=torch.double))


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_could_change_a_layer_send_it_to_the_fallback(hook):
    net, x = build("tanh")
    double = {"register_forward_hook": lambda m, a, z: 2 * z, "register_forward_pre_hook": lambda m, a: (2 * a[0],)}
    getattr(net[2], hook)(double[hook])
    lin = Linearization(net)
    assert found(lin, x)[1] == ["2.weight", "2.bias"]
    reference = loop_jacobian(net, x)
    torch.testing.assert_close(lin.gram(x), reference @ reference.T, rtol=1e-12, atol=1e-12)


def test_one_example_does_not_look_like_a_sequence():
    """A Linear on (examples · positions, features) is found out although one example with one position is not."""
    net = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 2), nn.Unflatten(0, (-1, 3)), nn.Flatten()).double()
    x = torch.randn(5, 3, 4, dtype=torch.double)
    assert found(Linearization(net), x) == ([], ["1.weight", "1.bias"])
    reference = loop_jacobian(net, x)
    torch.testing.assert_close(Linearization(net).gram(x), reference @ reference.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PLAIN)
def test_features_are_the_factors_of_the_gradients(name):
    """A Linear's gradient is the outer product d aᵀ, with a column for the bias; the bias's alone is d."""
    net, x = build(name)
    lin = Linearization(net)
    jacobian = lin.jacobian(x).view(len(x), -1, lin.num_params)
    rows = [lin.unflatten(row) for row in jacobian.flatten(0, 1)]
    for layer, a, d in layer_features(lin, found(lin, x), x):
        assert a.shape[1:3] == (1, 1)
        outer = (d[:, :, 0, 0, :, None] * a[:, :, 0, None]).flatten(0, 1)
        columns = [torch.stack([row[name] for row in rows]) for name in layer.parameters]
        columns = [column if column.ndim == 3 else column[..., None] for column in columns]
        torch.testing.assert_close(outer, torch.cat(columns, dim=2), rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------ which way is taken


def test_the_choice_follows_the_counts():
    x = torch.zeros(1000, 5)
    made = maker(Linearization(mlp([5, 200, 2000, 200, 1])), x)
    assert made.ghosts == [True, True, True, False]  # the last layer's rows are as short as its inputs
    made = maker(Linearization(mlp([5, 200, 2000, 200, 10])), x)
    assert made.ghosts == [True, True, True, True]  # whose rows ten outputs make ten times as many
    made = maker(Linearization(lenet3()), torch.zeros(1000, 784))
    assert made.ghosts == [False, False, True]
    late = nn.Sequential(nn.Conv2d(64, 256, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 1))
    assert maker(Linearization(late), torch.zeros(100, 64, 4, 4)).ghosts[0]  # 4 places, 147,456 weights


@pytest.mark.parametrize("t", [1, 2, 8, 30, 200])
def test_counts_are_those_of_the_products(t):
    """Multiply-adds, written out: at the places where one way becomes the cheaper one."""
    for o, i, z, n in [(1, 10, 1, 100), (1, 100, 100, 100), (10, 100, 100, 3), (2, 5, 7, 50)]:
        shape = Shape(o, 1, t, i, z, i)
        ghost = t * t * i + t * t * o * o * z + gram.PASS * (t * o) ** 2
        rows = (o * z * i) * o + 2 / n * (o * z * t * i + gram.PASS * o * z * i)
        assert prefers_ghost(shape, shape, n, n) is (ghost < rows)
        alone = t * t * i + o * t * t * z + gram.PASS * o * t * t
        assert prefers_ghost_alone(shape) is (alone < o * z * t * i + gram.PASS * o * z * i)


# ------------------------------------------------------------------ memory


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


PEAK = """
import sys, torch
from ntkbook import Linearization
from ntkbook.experiments.networks import lenet3, mlp
torch.set_num_threads(1)
def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
net = {"mlp": mlp([5, 200, 2000, 200, 1]), "lenet": lenet3()}[sys.argv[1]]
x = torch.randn(3000, 5) if sys.argv[1] == "mlp" else torch.rand(400, 784)
lin = Linearization(net)
lin.gram(x[:40]), lin.diagonal(x[:40])
before = peak()
if sys.argv[2] == "gram":
    result = lin.gram(x, memory=int(sys.argv[3]))
else:
    result = lin.diagonal(x, memory=int(sys.argv[3]))
print(peak() - before - result.numel() * result.element_size())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("name", ["mlp", "lenet"])
@pytest.mark.parametrize("what", ["gram", "diagonal"])
def test_memory_stays_within_what_is_given(name, what):
    """Features of all examples would take 58 and 83 MB, and are made again in parts."""
    memory = 40 * 2**20
    run = [sys.executable, "-c", PEAK, name, what, str(memory)]
    took = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert took < memory + 24 * 2**20  # torch's own buffers, and heaps that are not given back


@pytest.mark.parametrize("memory", [1, 3_000, 30_000, 10**9])
def test_features_are_held_within_the_room(memory, monkeypatch):
    net, x = build("convolutions", n=9)
    lin, held = Linearization(net), []
    call = FeatureMaker.__call__

    def noted(self, part, size):
        held.append(len(part) * self.kept)
        return call(self, part, size)

    monkeypatch.setattr(FeatureMaker, "__call__", noted)
    lin.gram(x, memory=memory)
    kept = maker(lin, x).kept
    assert max(held) <= max(memory, kept)
    assert sum(held) >= 9 * kept
    if memory == 10**9:
        assert held == [9 * kept]


def test_tiles_of_every_size_make_the_same_matrix(monkeypatch):
    net, x = build("convolutions", n=13)
    _, x2 = build("convolutions", n=9, seed=1)
    lin = Linearization(net)
    whole, cross = lin.gram(x), lin.gram(x, x2)
    for tile, leaf in ((1, 1), (9, 3), (200, 12), (10**6, 10**6)):
        monkeypatch.setattr(gram, "TILE", tile)
        monkeypatch.setattr(gram, "LEAF", leaf)
        torch.testing.assert_close(lin.gram(x), whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lin.gram(x, x2), cross, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [255, 300, 701])
def test_many_examples_in_strips_and_mirrored(n):
    net, x = build("tanh", n=n)
    lin = Linearization(net)
    jacobian = lin.jacobian(x)
    found = lin.gram(x)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, jacobian @ jacobian.T, rtol=1e-11, atol=1e-11)


def test_torchs_settings_stay():
    before = (torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.is_grad_enabled())
    net, x = build("convolutions")
    Linearization(net).gram(x)
    assert (torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.is_grad_enabled()) == before


def test_a_symmetric_gram_is_symmetric_and_semidefinite():
    net, x = build("tanh", n=40)
    gram = Linearization(net, chunk_size=7).gram(x)
    assert torch.linalg.eigvalsh(gram).min() > -1e-12 * gram.diagonal().max()
    torch.testing.assert_close(gram, gram.T, rtol=1e-14, atol=1e-14)
