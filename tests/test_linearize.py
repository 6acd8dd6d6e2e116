"""Linearization against loops of autograd, torch.func and curvlinops; its errors; and that it changes nothing."""

import copy
import gc
from functools import partial
from itertools import pairwise

import pytest
import torch
from curvlinops import JacobianLinearOperator
from hypothesis import given
from hypothesis import strategies as st
from oracles.jacobian import loop_jacobian
from oracles.networks import CASES, build
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkbook import Linearization, linearize
from ntkbook.finding import find_layers

TOLERANCE = 1e-12  # of the largest entry, in float64


@pytest.fixture(autouse=True)
def plain_attention():
    """Fused attention has no forward-mode derivative, and a slow batched one, about which torch warns."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def error(got, want):
    """The largest difference, relative to the largest entry."""
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def without_rule(lin, x):
    return find_layers(lin, x[:1])[1]


def snapshot(net):
    """Everything of a network that a call could change."""
    return {
        "state": {name: value.clone() for name, value in net.state_dict().items()},
        "versions": [(id(value), value._version) for value in [*net.parameters(), *net.buffers()]],
        "gradients": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "trainable": [p.requires_grad for p in net.parameters()],
        "modes": [module.training for module in net.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()],
        "rng": torch.get_rng_state(),
        "settings": (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()),
    }


def assert_unchanged(net, before):
    after = snapshot(net)
    for part in before:
        torch.testing.assert_close(after[part], before[part], rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------ every kind of network


@pytest.mark.parametrize("name", CASES)
def test_every_product_equals_the_loop_of_autograd(name):
    net, x = build(name)
    _, x2 = build(name, n=3, seed=1)
    lin = Linearization(net)
    reference, reference2 = loop_jacobian(net, x), loop_jacobian(net, x2)
    n, o = len(x), len(reference) // len(x)
    assert without_rule(lin, x) == list(CASES[name].rest)
    assert lin.num_params == reference.shape[1]

    generator = torch.Generator().manual_seed(0)
    v = torch.randn(lin.num_params, 3, dtype=torch.double, generator=generator)
    u = torch.randn(n, o, 3, dtype=torch.double, generator=generator)
    gram = reference @ reference.T
    cross = reference @ reference2.T
    pushed = lin.jvp(x, v)
    found = {
        "outputs": error(lin.outputs(x), net(x.clone()).detach().reshape(n, o)),
        "jacobian": error(lin.jacobian(x), reference),
        "jvp": error(pushed, (reference @ v).view(n, o, 3)),
        "vjp": error(lin.vjp(x, u), reference.T @ u.view(n * o, 3)),
        "gram": error(lin.gram(x), gram),
        "cross": error(lin.gram(x, x2), cross),
        "trace": error(lin.gram(x, x2, trace=True), torch.einsum("icjc->ij", cross.view(n, o, 3, o))),
        "output": error(lin.gram(x, x2, output=-1), cross.view(n, o, 3, o)[:, -1, :, -1]),
        "diagonal": error(lin.diagonal(x), gram.diagonal()),
        "its output": error(lin.diagonal(x, output=o - 1), gram.diagonal().view(n, o)[:, -1]),
    }
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_mutated(name):
    net, x = build(name)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    before, inputs = snapshot(net), x.clone()
    lin = Linearization(net)
    kept = {k: v.clone() for k, v in {**lin.params, **lin.constants}.items()}
    o = lin.outputs(x).shape[1]
    lin.gram(x)
    lin.gram(x, x[:2], trace=True)
    lin.diagonal(x)
    lin.jacobian(x)
    lin.vjp(x, torch.ones(len(x), o, dtype=torch.double))
    lin.jvp(x, torch.ones(lin.num_params, dtype=torch.double))
    assert_unchanged(net, before)
    assert torch.equal(x, inputs)
    for key, value in {**lin.params, **lin.constants}.items():
        assert torch.equal(value, kept[key]), key


@pytest.mark.parametrize("name", ["tanh", "convolutions"])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 100])
def test_chunks_do_not_change_results(name, chunk_size):
    net, x = build(name, n=7)
    whole, chunked = Linearization(net), Linearization(net, chunk_size=chunk_size)
    v = torch.randn(whole.num_params, 2, dtype=torch.double)
    u = torch.randn(7, 3, 2, dtype=torch.double)
    for call in (
        lambda lin: lin.outputs(x),
        lambda lin: lin.jacobian(x),
        lambda lin: lin.jvp(x, v),
        lambda lin: lin.vjp(x, u),
        lambda lin: lin.gram(x),
        lambda lin: lin.gram(x[:2], x),
        lambda lin: lin.gram(x, x[:2], trace=True),
        lambda lin: lin.diagonal(x, output=1),
    ):
        assert error(call(chunked), call(whole)) < TOLERANCE


@pytest.mark.parametrize("name", ["tanh", "convolutions"])
def test_little_memory_only_makes_smaller_chunks(name, monkeypatch):
    net, x = build(name, n=7)
    lin = Linearization(net)
    whole = lin.gram(x)
    for memory in (1, 10_000, 20_000, 40_000, 80_000):
        assert error(lin.gram(x, memory=memory), whole) < TOLERANCE
        assert error(Linearization(net, chunk_size=2).gram(x, x[1:], memory=memory), whole[:, 3:]) < TOLERANCE
        assert error(lin.gram(x[5:], x, memory=memory), whole[15:]) < TOLERANCE
        assert error(lin.diagonal(x, memory=memory), whole.diagonal()) < TOLERANCE
    monkeypatch.setattr(linearize, "working_memory", lambda device: 20_000)
    monkeypatch.setattr(linearize, "total_memory", lambda device: 50_000)
    assert error(lin.gram(x), whole) < TOLERANCE


def test_one_point_against_many_takes_few_passes():
    net, x = build("tanh", n=200)
    calls = []
    net[0].register_forward_hook(lambda *args: calls.append(0))  # also sends it to the fallback
    Linearization(net).gram(x[:1], x)
    assert len(calls) < 16


# ------------------------------------------------------------------ second opinions


def test_agrees_with_curvlinops():
    net, x = build("convolutions")
    lin = Linearization(net)
    data = [(x, torch.zeros(len(x), 3))]
    operator = JacobianLinearOperator(net, list(net.parameters()), data, check_deterministic=False)
    identity = torch.eye(lin.num_params, dtype=torch.double)
    assert error(lin.jacobian(x), operator @ identity) < TOLERANCE
    assert error(lin.jvp(x, identity[:, :4]).reshape(-1, 4), operator @ identity[:, :4]) < TOLERANCE
    u = torch.randn(len(x), 3, dtype=torch.double)
    assert error(lin.vjp(x, u), operator.adjoint() @ u.reshape(-1)) < TOLERANCE


def test_agrees_with_torch_func():
    net, x = build("branches")
    parts = jacrev(lambda p: functional_call(net, p, (x,)))(dict(net.named_parameters()))
    whole = torch.cat([parts[name].flatten(2) for name, _ in net.named_parameters()], dim=2).flatten(0, 1)
    lin = Linearization(net)
    assert error(lin.jacobian(x), whole) < TOLERANCE
    assert error(lin.gram(x), whole @ whole.T) < TOLERANCE


ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "softplus": nn.Softplus, "elu": nn.ELU}


@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    n=st.integers(1, 6),
    m=st.integers(1, 6),
    chunk_size=st.none() | st.integers(1, 4),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    frozen=st.integers(0, 31),
    seed=st.integers(0, 1000),
)
def test_random_networks(widths, activation, bias, n, m, chunk_size, dtype, frozen, seed):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layers = [(nn.Linear(i, o, bias=bias), ACTIVATIONS[activation]()) for i, o in pairwise(widths)]
        net = nn.Sequential(*[module for pair in layers for module in pair][:-1]).to(dtype)
        x, x2 = torch.randn(n, widths[0], dtype=dtype), torch.randn(m, widths[0], dtype=dtype)
    for i, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(not frozen >> i & 1)
    if not any(p.requires_grad for p in net.parameters()):
        net[0].weight.requires_grad_()
    lin = Linearization(net, chunk_size=chunk_size)
    reference, reference2 = loop_jacobian(net, x), loop_jacobian(net, x2)
    scale = (reference.norm(dim=1).max() * reference2.norm(dim=1).max()).clamp_min(1e-20)
    close = 1e-13 if dtype == torch.float64 else 1e-5
    assert not without_rule(lin, x)
    assert lin.gram(x, x2).dtype == dtype
    assert (lin.gram(x, x2) - reference @ reference2.T).abs().max() <= close * scale
    square = reference @ reference.T
    assert (lin.gram(x) - square).abs().max() <= close * square.abs().max()
    assert (lin.diagonal(x) - square.diagonal()).abs().max() <= close * square.abs().max()
    assert (lin.jacobian(x) - reference).abs().max() <= close * reference.abs().max()


def test_a_jvp_is_what_finite_differences_tend_to():
    net, x = build("tanh")
    lin = Linearization(net)
    v = torch.randn(lin.num_params, dtype=torch.double)
    at = lambda h: functional_call(net, lin.unflatten(lin.flatten(lin.params) + h * v), (x,))  # noqa: E731
    difference = (at(1e-5) - at(-1e-5)) / 2e-5
    assert error(lin.jvp(x, v), difference.detach()) < 1e-8


# ------------------------------------------------------------------ parameters, dtypes, shapes


def test_params_by_name_keep_the_networks_order():
    net, x = build("tanh")
    whole = Linearization(net)
    names = ["4.bias", "2.weight"]
    some = Linearization(net, params=names)
    assert list(some.params) == ["2.weight", "4.bias"]
    assert error(some.jacobian(x), loop_jacobian(net, x, names)) < TOLERANCE
    assert not without_rule(some, x)
    assert error(some.gram(x), some.jacobian(x) @ some.jacobian(x).T) < TOLERANCE
    rest = Linearization(net, params=[name for name in whole.params if name not in names])
    assert error(some.gram(x) + rest.gram(x), whole.gram(x)) < TOLERANCE
    frozen, _ = build("frozen")
    assert Linearization(frozen, params=["0.weight"]).num_params == 28  # also one that is frozen, if it is asked for


def test_params_with_other_values_linearise_there():
    net, x = build("tanh")
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3)
    lin = Linearization(net, params=dict(other.named_parameters()))
    assert error(lin.gram(x), Linearization(other).gram(x)) < TOLERANCE
    assert error(lin.outputs(x), other(x).detach()) < TOLERANCE


def test_training_afterwards_changes_nothing():
    net, x = build("batch norm")
    lin = Linearization(net)
    before = lin.gram(x)
    with torch.no_grad():
        for value in [*net.parameters(), *net.buffers()]:
            value.add_(1)
    assert torch.equal(lin.gram(x), before)


@pytest.mark.parametrize("name", ["tanh", "convolutions", "transformer"])
def test_float32_and_conversion(name):
    net, x = build(name, dtype=torch.float32)
    lin = Linearization(net)
    gram = lin.gram(x)
    assert gram.dtype == lin.dtype == torch.float32
    double = lin.to(dtype=torch.double)
    points = x.double() if x.is_floating_point() else x
    reference = double.gram(points)
    assert reference.dtype == double.dtype == torch.double
    assert error(gram.double(), reference) < 1e-5
    wide = loop_jacobian(copy.deepcopy(net).double(), points)
    assert error(reference, wide @ wide.T) < TOLERANCE
    assert next(net.parameters()).dtype == torch.float32


def test_vectors_dicts_and_blocks():
    net, x = build("tanh")
    lin = Linearization(net)
    v = torch.randn(lin.num_params, dtype=torch.double)
    tree = lin.unflatten(v)
    assert [part.shape for part in tree.values()] == [p.shape for p in net.parameters()]
    assert torch.equal(lin.flatten(dict(reversed(tree.items()))), v)
    assert lin.jvp(x, v).shape == (6, 3)
    assert torch.equal(lin.jvp(x, tree), lin.jvp(x, v))
    assert lin.jvp(x, v[:, None]).shape == (6, 3, 1)
    many = torch.randn(lin.num_params, 130, dtype=torch.double)  # more than are pushed at once
    assert error(lin.jvp(x, many).reshape(18, -1), lin.jacobian(x) @ many) < TOLERANCE
    u = torch.randn(6, 3, 130, dtype=torch.double)
    assert error(lin.vjp(x, u), lin.jacobian(x).T @ u.reshape(18, -1)) < TOLERANCE
    assert lin.vjp(x, u[..., 0]).shape == (lin.num_params,)
    assert lin.vjp(x, u[..., :1]).shape == (lin.num_params, 1)


# ------------------------------------------------------------------ autograd around it


@pytest.mark.parametrize("name", ["tanh", "layer norm", "transformer"])
def test_inference_mode_and_no_grad(name):
    net, x = build(name)
    want = Linearization(net).gram(x)
    with torch.no_grad():
        assert torch.equal(Linearization(net).gram(x), want)
    with torch.inference_mode():
        lin = Linearization(net)
        points = x.clone()
        assert torch.equal(lin.gram(points), want)
        assert torch.equal(lin.gram(points, x2=points[:2]), lin.gram(x, x[:2]))
        lin.vjp(points, u=torch.ones(6, lin.outputs(points).shape[1], dtype=torch.double))
        lin.jvp(points, lin.unflatten(torch.ones(lin.num_params, dtype=torch.double)))
    assert torch.equal(lin.gram(x), want)  # made inside, used outside
    assert not want.requires_grad


@pytest.mark.parametrize("name", ["tanh", "vector output", "layer norm", "called twice", "group norm"])
def test_derivatives_in_the_inputs(name):
    net, x = build(name, n=2)
    lin = Linearization(net, chunk_size=1)
    if name == "vector output":
        lin = Linearization(net, chunk_size=1, params=["a.weight", "b.bias", "head.weight"])
    x, x2 = x.requires_grad_(), torch.randn(1, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: lin.gram(a), (x,))
    assert torch.autograd.gradcheck(lambda a, b: lin.gram(a, b), (x, x2))
    assert torch.autograd.gradcheck(lambda a, b: lin.gram(a, b, trace=True), (x, x2))
    assert torch.autograd.gradcheck(lambda a: lin.diagonal(a), (x,))
    assert torch.autograd.gradcheck(lambda a: lin.jacobian(a), (x,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda a: lin.outputs(a), (x,))
    o = lin.outputs(x).shape[1]
    v = torch.randn(lin.num_params, 2, dtype=torch.double, requires_grad=True)
    u = torch.randn(2, o, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lin.jvp, (x, v), fast_mode=True)
    assert torch.autograd.gradcheck(lin.vjp, (x, u), fast_mode=True)
    assert torch.autograd.gradcheck(lambda v: lin.jvp(x.detach(), v), (v,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda u: lin.vjp(x.detach(), u), (u,))
    with torch.no_grad():
        assert not lin.gram(x).requires_grad


# ------------------------------------------------------------------ errors


def refused(kind, message, call, net):
    """The error comes, says what it should, and leaves the network alone."""
    before = snapshot(net)
    with pytest.raises(kind, match=message):
        call()
    assert_unchanged(net, before)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.BatchNorm1d(3), r"BatchNorm1d '1' is in train mode.*Call net.eval\(\)"),
        (nn.Dropout(0.5), r"Dropout '1' is in train mode.*outputs are random.*net.eval\(\)"),
        (nn.RReLU(), "RReLU '1' is in train mode"),
        (nn.BatchNorm1d(3, track_running_stats=False), "keeps no running statistics.*track_running_stats=True"),
        (nn.LSTM(3, 3, 2, dropout=0.1), "LSTM '1' is in train mode"),
        (nn.Sequential(nn.Identity(), nn.InstanceNorm1d(3, track_running_stats=True)), r"InstanceNorm1d '1.1' is in"),
    ],
)
def test_train_mode_is_refused(module, message):
    net = nn.Sequential(nn.Linear(3, 3), module).double()
    lin, x = Linearization(net), torch.randn(4, 3, dtype=torch.double)
    for call in (lin.outputs, lin.gram, lin.jacobian, lin.diagonal):
        refused(ValueError, message, lambda call=call: call(x), net)


def test_randomness_and_changing_buffers_are_refused():
    class Noisy(nn.Linear):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5)

    net = Noisy(3, 2).double().eval()
    x = torch.randn(4, 3, dtype=torch.double)
    refused(ValueError, "draws random numbers, so it has no one Jacobian", lambda: Linearization(net).gram(x), net)

    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return super().forward(x) * self.count

    counting = Counting().double()
    lin = Linearization(counting)
    refused(ValueError, r"changes its own \['count'\]", lambda: lin.gram(x), counting)


def test_examples_that_depend_on_each_other_are_refused():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    net, x = Centred(4, 3).double(), torch.randn(5, 4, dtype=torch.double)
    refused(ValueError, "depends on the others in its batch", lambda: Linearization(net).gram(x), net)
    assert Linearization(net).gram(x[:1]).shape == (3, 3)
    mixes = nn.Sequential(nn.Linear(4, 3), nn.Unflatten(0, (1, -1)), nn.Flatten(1)).double()
    refused(ValueError, r"from two it made \(1, 6\)", lambda: Linearization(mixes).gram(x), mixes)


def test_networks_without_parameters_are_refused():
    frozen = nn.Linear(3, 2).requires_grad_(False)
    for net in (nn.ReLU(), frozen):
        refused(ValueError, r"nothing to linearise in.*Pass params=\[", lambda net=net: Linearization(net), net)
    refused(ValueError, "no parameters of this network, which has", lambda: Linearization(frozen, ["wait"]), frozen)
    refused(ValueError, r"an iterable of names, such as \['bias'\]", lambda: Linearization(frozen, "bias"), frozen)
    wrong = {"weight": torch.zeros(3, 3)}
    message = r"params\['weight'\]: expected real numbers of shape \(2, 3\)"
    refused(ValueError, message, lambda: Linearization(frozen, wrong), frozen)
    wrong = {"weight": torch.zeros(2, 3)}
    refused(ValueError, "chunk_size: expected a positive", lambda: Linearization(frozen, wrong, chunk_size=0), frozen)
    mixed = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).double())
    refused(ValueError, "expected one dtype on one device", lambda: Linearization(mixed), mixed)


@pytest.mark.parametrize("name", ["tanh", "layer norm"])
def test_inputs_are_checked(name):
    net, x = build(name)
    lin = Linearization(net)
    holes = x.clone()
    holes[[1, 3], 2] = torch.nan
    for call in (lin.gram, lin.jacobian, lin.diagonal, lin.outputs, lambda bad: lin.gram(x, bad)):
        refused(ValueError, "x: 2 of 6 examples hold NaN", lambda call=call: call(holes), net)
        refused(ValueError, "expected torch.float64 on cpu.*got torch.float32", lambda call=call: call(x.float()), net)
        refused(ValueError, "got torch.float64 on meta.*Convert it", lambda call=call: call(x.to("meta")), net)
        refused(ValueError, r"at least one example, got shape \(0, 4\)", lambda call=call: call(x[:0]), net)
        refused(ValueError, r"at least one example, got shape \(\)", lambda call=call: call(x[0, 0]), net)
        refused(ValueError, r"x: the network fails on examples of shape \(3,\)", lambda call=call: call(x[:, :3]), net)


def test_vectors_are_checked():
    net, x = build("tanh")
    lin = Linearization(net)
    p = lin.num_params
    three, ones = torch.ones(3, dtype=torch.double), torch.ones(18, dtype=torch.double)
    refused(ValueError, rf"v: expected \({p},\) or \({p}, k\), got \(3,\)", lambda: lin.jvp(x, three), net)
    refused(ValueError, "v: expected torch.float64", lambda: lin.jvp(x, torch.ones(p)), net)
    refused(ValueError, r"expected the entries \['0.weight'", lambda: lin.jvp(x, {"a": three}), net)
    refused(ValueError, r"u: expected \(6, 3\) or \(6, 3, k\), got \(18,\)", lambda: lin.vjp(x, ones), net)
    refused(ValueError, "u: expected torch.float64", lambda: lin.vjp(x, torch.ones(6, 3)), net)
    refused(ValueError, "the network has 3 outputs, got index 3", lambda: lin.gram(x, output=3), net)
    refused(ValueError, "the network has 3 outputs, got index -4", lambda: lin.diagonal(x, output=-4), net)
    refused(ValueError, "memory: expected a positive number of bytes, got 0", lambda: lin.gram(x, memory=0), net)
    refused(ValueError, "memory: expected a positive", lambda: lin.diagonal(x, memory=-1), net)
    refused(ValueError, "give one of them", lambda: lin.gram(x, output=0, trace=True), net)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda z: z[None], r"must map n examples to \(n,\) or \(n, o\); from one example it made \(1, 1, 3\)"),
        (lambda z: z.sum(), r"from one example it made \(\)"),
        (lambda z: z.squeeze(0), r"from one example it made \(3,\).*squeeze\(-1\)"),
        (lambda z: (z, z), "from one example it made tuple"),
    ],
)
def test_outputs_are_checked(forward, message):
    class Net(nn.Linear):
        def forward(self, x):
            return forward(super().forward(x))

    net = Net(4, 3)
    refused(ValueError, message, lambda: Linearization(net).gram(torch.ones(2, 4)), net)


def test_a_missing_forward_derivative_is_explained():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 1)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0].sum(1))

    torch.manual_seed(0)
    net, x = Attends().double().eval(), torch.randn(3, 4, 8, dtype=torch.double)
    for case, points in ((net, x), build("transformer")):
        lin = Linearization(case)
        v = torch.ones(lin.num_params, dtype=torch.double)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            refused(
                NotImplementedError,
                r"jvp: .* without a forward-mode derivative.*SDPBackend.MATH",
                lambda lin=lin, points=points, v=v: lin.jvp(points, v),
                case,
            )
        with sdpa_kernel(SDPBackend.MATH):  # the remedy helps
            assert error(lin.jvp(points, v), (lin.jacobian(points) @ v).view(len(points), -1)) < TOLERANCE


def test_no_grad_inside_the_network_is_refused_where_it_would_be_wrong():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.head = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            with torch.no_grad():
                gate = torch.sigmoid(self.gate(x))
            return gate * self.head(x)

    net, x = Gated().double(), torch.randn(5, 4, dtype=torch.double)
    lin = Linearization(net)
    reference = loop_jacobian(net, x)
    assert error(lin.gram(x), reference @ reference.T) < TOLERANCE
    v = torch.ones(lin.num_params, dtype=torch.double)
    refused(NotImplementedError, r"differently.*torch.no_grad\(\) inside forward", lambda: lin.jvp(x, v), net)
    some = Linearization(net, params=["head.weight", "head.bias"])
    assert error(some.jvp(x, v[:15]), (some.jacobian(x) @ v[:15]).view(5, 3)) < TOLERANCE


def test_what_torch_func_cannot_do_goes_by_plain_autograd():
    class Choosy(nn.Linear):
        def forward(self, x):
            z = super().forward(x) * self.weight.sum()
            return torch.cat([one if one.sum() > 0 else -one for one in z.split(1)])

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    class Old(nn.Linear):
        def forward(self, x):
            return Square.apply(super().forward(x))

    for net in (Choosy(4, 3), Old(4, 3), nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), Old(3, 2))):
        net, x = net.double(), torch.randn(3, 4, dtype=torch.double)
        lin, j = Linearization(net), loop_jacobian(net, x)
        v = torch.randn(lin.num_params, 3, dtype=torch.double)
        before = snapshot(net)
        with pytest.warns(UserWarning, match="one at a time by plain autograd.*an if on a tensor's value"):
            assert error(lin.jacobian(x), j) < TOLERANCE
        assert error(lin.gram(x), j @ j.T) < TOLERANCE
        assert error(lin.jvp(x, v).flatten(0, 1), j @ v) < TOLERANCE
        assert error(lin.vjp(x, lin.jvp(x, v)), j.T @ (j @ v)) < TOLERANCE
        assert_unchanged(net, before)


def test_an_exception_in_the_middle_leaves_nothing_behind():
    class Fragile(nn.Module):
        def forward(self, x):
            if len(x) > 1:
                raise KeyError("in the middle")
            return x

    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Fragile(), nn.Linear(3, 2))
    refused(KeyError, "in the middle", lambda: Linearization(net).gram(torch.ones(3, 4)), net)


def test_inputs_overwritten_behind_autograds_back_are_refused_not_wrong():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            z = self.layer(x)
            x.zero_()
            return torch.sin(z)

    net = Overwrites()
    refused(RuntimeError, "modified by an inplace operation", lambda: Linearization(net).gram(torch.ones(2, 4)), net)


def test_what_cannot_fit_is_refused(monkeypatch):
    net, x = build("tanh", n=100)
    lin = Linearization(net)
    monkeypatch.setattr("ntkbook.memory.available_memory", lambda device: 100_000)
    message = r"The Gram matrix of 300 x 300 torch.float64 takes 0.0 GiB, and .* available on cpu. Use fewer"
    refused(MemoryError, message, lambda: lin.gram(x), net)
    refused(MemoryError, "The Jacobian of 300 x 93 .* Use jvp, vjp or gram", lambda: lin.jacobian(x), net)
    assert lin.gram(x, output=0).shape == (100, 100)
    monkeypatch.setattr("ntkbook.memory.available_memory", lambda device: 2**40)
    many = x[:1].expand(10**6, 4)
    refused(MemoryError, "takes 67055.2 GiB, and 1024.0 GiB are", lambda: lin.gram(many), net)


def test_memory_of_an_example_is_that_of_its_activations_and_not_of_the_weights():
    # tanh keeps its 500 outputs, each Linear its input (the first one x), and the layers after them share these
    net = nn.Sequential(nn.Linear(300, 500), nn.Tanh(), nn.Linear(500, 500), nn.Tanh(), nn.Linear(500, 2)).double()
    _, memory = Linearization(net)._inspect(torch.zeros(1, 300, dtype=torch.float64))
    assert 8 * (300 + 500 + 500) <= memory <= 2 * 8 * (300 + 500 + 500)


def test_calls_leave_no_tensors_behind():
    """A graph whose saved tensors hold on to it is freed by nobody: each call would keep an example's pass forward."""

    def alive():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    def pushed(lin, x):
        lin.jvp(x, torch.ones(lin.num_params, dtype=lin.dtype))

    for name in ("convolutions", "layer norm"):
        net, x = build(name)
        lin = Linearization(net)
        u = lin.outputs(x)
        calls = (lin.outputs, lin.gram, lin.diagonal, lin.jacobian, partial(lin.vjp, u=u), partial(pushed, lin))
        for call in calls:
            call(x)
        before = alive()
        for call in calls:
            call(x)
        assert alive() == before, name
