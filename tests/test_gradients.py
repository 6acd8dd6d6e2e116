"""Networks that torch.func differentiates wrongly or not at all, and those that depend on values: against the loop."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.jacobian import loop_jacobian
from torch import nn

from ntkbook import NTKGP, Linearization, empirical_fisher_diagonal, fisher_diagonal, jacobian_diagonal
from ntkbook.gradients import agree

TOLERANCE = 1e-10  # of the largest entry, in float64


class Radial(nn.Module):
    """Radial basis functions; torch's derivative of cdist is wrong under vmap (2.15)."""

    def __init__(self, outputs):
        super().__init__()
        self.centres, self.head = nn.Parameter(torch.randn(8, 6)), nn.Linear(8, outputs)

    def forward(self, x):
        return self.head(torch.exp(-torch.cdist(x, self.centres)))


class Recurrent(nn.Module):
    def __init__(self, kind, outputs, **options):
        super().__init__()
        self.cells, self.head = kind(3, 4, **options), nn.Linear(8 if options.get("bidirectional") else 4, outputs)

    def forward(self, x):
        return self.head(self.cells(x.unflatten(1, (2, 3)))[0][:, -1])


class Cell(nn.Module):
    def __init__(self, kind, outputs):
        super().__init__()
        self.cell, self.head = kind(6, 4), nn.Linear(4, outputs)

    def forward(self, x):
        return self.head(self.cell(self.cell.weight_ih.new_tensor(0.5) * x))


class Masked(nn.Module):
    """A layer for some of the examples, which others do not come to."""

    def __init__(self, outputs, always=False):
        super().__init__()
        self.expert, self.head, self.always = nn.Linear(6, 6), nn.Linear(6, outputs), always

    def forward(self, x):
        h, chosen = x.clone(), x[:, 0] > 0
        if self.always or chosen.any():
            h[chosen] = torch.tanh(self.expert(x[chosen]))
        return self.head(h)


class Experts(nn.Module):
    """Every example goes to one of three layers, which has seen none where it is not chosen."""

    def __init__(self, outputs):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, outputs) for _ in range(3))

    def forward(self, x):
        places, parts = (x[:, 0] > 0).long() + (x[:, 1] > 0), []
        for number, expert in enumerate(self.experts):
            parts.append((expert(x) * (places == number)[:, None]) if (places == number).any() else 0)
        return torch.tanh(sum(parts))


class Sorted(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 5), nn.Linear(5, outputs)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.head(torch.tanh(self.layer(x[order]))[order.argsort()])


class Elsewhere(nn.Module):
    """A weight that large inputs read a second time, outside of its module."""

    def __init__(self, outputs):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, outputs)

    def forward(self, x):
        z = torch.tanh(self.layer(x))
        large = x[:, :1] > 0
        return self.head(torch.where(large, z @ self.layer.weight, z) if large.any() else z)


class Repeated(nn.Module):
    """A layer that is called again where an input is large: no example has a say in what others get."""

    def __init__(self, outputs):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, outputs)

    def forward(self, x):
        z = torch.tanh(self.layer(x))
        again = x[:, :1] > 0
        return self.head(torch.where(again, torch.tanh(self.layer(z)), z) if again.any() else z)


def sequential(*layers):
    return lambda o: nn.Sequential(nn.Linear(6, 6), *layers, nn.Linear(6, o))


NETWORKS = {  # by the number of outputs, on (n, 6); whether the gradients are taken one by one, which warns
    "radial": (Radial, False),
    "prelu": (sequential(nn.PReLU()), False),
    "prelu of channels": (sequential(nn.PReLU(6)), False),
    "rnn": (lambda o: Recurrent(nn.RNN, o, batch_first=True), True),
    "gru": (lambda o: Recurrent(nn.GRU, o, batch_first=True), True),
    "lstm": (lambda o: Recurrent(nn.LSTM, o, batch_first=True, bidirectional=True, num_layers=2), True),
    "gru cell": (lambda o: Cell(nn.GRUCell, o), True),
    "rnn cell": (lambda o: Cell(nn.RNNCell, o), True),
    "masked": (Masked, True),
    "masked always": (lambda o: Masked(o, always=True), True),
    "experts": (Experts, True),
    "sorted": (Sorted, False),
    "elsewhere": (Elsewhere, True),
    "repeated": (Repeated, True),
}


def build(name, n=4, o=2, seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = NETWORKS[name][0](o).double()
        x = torch.randn(n, 6, dtype=torch.double)
    return net, x


def error(got, want):
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((got.detach() - want).abs().max() / want.abs().max().clamp_min(1e-30))


@pytest.fixture(autouse=True)
def slow_is_said():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.func cannot differentiate this network, so")
        yield


def randn(*shape):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def errors(net, x, names=None, chunk_size=None):
    j = loop_jacobian(net, x, names)
    n, m = len(x), (len(x) + 1) // 2
    o, p = len(j) // n, j.shape[1]
    x2, j2 = x.flip(0)[:m], j.view(n, o, p).flip(0)[:m].flatten(0, 1)
    lin = Linearization(net, names, chunk_size=chunk_size)
    v, u = randn(p, 3), randn(n, o, 3)
    cross = (j @ j2.T).view(n, o, m, o)
    sums = j.square().sum(0) / n
    return {
        "jacobian": error(lin.jacobian(x), j),
        "gram": error(lin.gram(x), j @ j.T),
        "cross": error(lin.gram(x, x2), j @ j2.T),
        "trace": error(lin.gram(x, x2, trace=True), torch.einsum("icjc->ij", cross)),
        "output": error(lin.gram(x, output=0), (j @ j.T).view(n, o, n, o)[:, 0, :, 0]),
        "diagonal": error(lin.diagonal(x), j.square().sum(1)),
        "jvp": error(lin.jvp(x, v[:, 0]), (j @ v[:, 0]).view(n, o)),
        "jvp of a block": error(lin.jvp(x, v), (j @ v).view(n, o, 3)),
        "vjp": error(lin.vjp(x, u[..., 0]), j.T @ u[..., 0].flatten()),
        "vjp of a block": error(lin.vjp(x, u), j.T @ u.flatten(0, 1)),
        "many columns": error(lin.vjp(x, randn(n, o, 40)), j.T @ randn(n, o, 40).flatten(0, 1)),
        "many rows": error(lin.jvp(x, randn(p, 40)).flatten(0, 1), j @ randn(p, 40)),
        "jacobian diagonal": error(jacobian_diagonal(lin, x), sums),
        "fisher diagonal": error(fisher_diagonal(lin, x, "gaussian"), sums),
        "differentiable gram": error(lin.gram(x.clone().requires_grad_()), j @ j.T),
        "operator": error(lin.operator(x, method="products").matmul(u.flatten(0, 1)), j @ (j.T @ u.flatten(0, 1))),
    }


@pytest.mark.parametrize(("n", "o"), [(3, 3), (4, 2), (5, 1)])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_product_equals_the_loop_of_autograd(name, n, o):
    found = errors(*build(name, n, o))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("name", NETWORKS)
def test_nor_do_chunks_change_them(name):
    found = errors(*build(name, n=5), chunk_size=2)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("name", ["radial", "prelu", "masked", "sorted", "lstm"])
def test_in_some_of_the_parameters(name):
    net, x = build(name, n=3, o=3)
    for chosen in (["head.weight"], None) if hasattr(net, "head") else (["0.weight", "2.bias"], ["1.weight"]):
        found = errors(net, x, chosen)
        assert max(found.values()) < TOLERANCE, found


@given(
    name=st.sampled_from(["masked", "masked always", "experts", "elsewhere", "repeated", "sorted"]),
    signs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=5),
    o=st.integers(1, 2),
    size=st.sampled_from([None, 1, 2]),
)
def test_whichever_way_examples_take(name, signs, o, size):
    net, x = build(name, n=len(signs), o=o)
    x[:, :2] = x[:, :2].abs() * torch.where(torch.tensor(signs), 1.0, -1.0)
    found = errors(net, x, chunk_size=size)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("name", ["radial", "prelu", "lstm", "masked"])
def test_posteriors_in_both_spaces(name):
    net, x = build(name, n=5, o=2)
    y, j = randn(5, 2), loop_jacobian(net, x)
    gram = j @ j.T
    want = (gram @ torch.linalg.solve(gram + 0.1 * torch.eye(10), y.flatten())).view(5, 2)
    for space in ("function", "parameter"):
        assert error(NTKGP(net, noise=0.1, space=space).condition(x, y).mean(x), want) < 1e-8


def test_the_empirical_fisher_of_a_recurrent_network():
    net, x = build("gru", n=5, o=3)
    y = torch.arange(5) % 3
    scores = torch.nn.functional.one_hot(y, 3) - torch.softmax(net(x), 1).detach()
    want = torch.einsum("nop,no->np", loop_jacobian(net, x).view(5, 3, -1), scores).square().mean(0)
    assert error(empirical_fisher_diagonal(net, x, y), want) < TOLERANCE


def test_derivatives_by_vectors_where_blocks_go_one_by_one():
    net, x = build("radial", o=2)
    lin, j = Linearization(net), loop_jacobian(net, x)
    v, u = randn(lin.num_params, 3).requires_grad_(), randn(4, 2, 3).requires_grad_()
    (lin.jvp(x, v) * randn(4, 2, 3)).sum().backward()
    (lin.vjp(x, u) * randn(lin.num_params, 3)).sum().backward()
    assert error(v.grad, j.T @ randn(4, 2, 3).flatten(0, 1)) < TOLERANCE
    assert error(u.grad.flatten(0, 1), j @ randn(lin.num_params, 3)) < TOLERANCE


@pytest.mark.parametrize("name", NETWORKS)
def test_slow_ways_are_said_once_and_others_never(name):
    net, x = build(name, n=3, o=2)
    x[:, 0] = torch.tensor([1.0, -1.0, -1.0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lin = Linearization(net)
        for _ in range(2):
            lin.gram(x)
            lin.jacobian(x)
            jacobian_diagonal(lin, x)
            lin.jvp(x, randn(lin.num_params, 2))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == NETWORKS[name][1], messages
    assert all("one at a time" in message and "vjp" in message for message in messages)


# ------------------------------------------------------------------ examples that depend on each other


class Summed(nn.Module):
    """The first example is as it would be alone."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x)).cumsum(0))


class SummedBack(Summed):
    def forward(self, x):
        return super().forward(x.flip(0)).flip(0)


class Centred(Summed):
    def forward(self, x):
        return self.head(self.layer(x - x.mean(0)))


def calls(lin, x):
    p, o = lin.num_params, 2
    return [
        lambda: lin.outputs(x),
        lambda: lin.gram(x),
        lambda: lin.jacobian(x),
        lambda: lin.diagonal(x),
        lambda: lin.jvp(x, randn(p)),
        lambda: lin.vjp(x, randn(len(x), o)),
        lambda: jacobian_diagonal(lin, x),
    ]


TIME_FIRST = {kind.__name__: (lambda kind=kind: Recurrent(kind, 2)) for kind in (nn.RNN, nn.GRU, nn.LSTM)}
MIXED = {"summed": Summed, "summed back": SummedBack, "centred": Centred, **TIME_FIRST}


@pytest.mark.parametrize("copies", [0, 1, 3])
@pytest.mark.parametrize("name", MIXED)
def test_examples_that_depend_on_each_other_are_refused(name, copies):
    torch.manual_seed(0)
    net, x = MIXED[name]().double(), randn(4, 6)
    x = torch.cat([x[:1].expand(copies, 6), x])  # the first two are the same
    for number in range(7):
        with pytest.raises(ValueError, match=r"depends on the others in its batch.*batch_first=True.*dimension 0"):
            calls(Linearization(net), x)[number]()


def test_copies_of_one_example_do_not_settle_that():
    net, x = Centred().double(), randn(3, 6)
    lin = Linearization(net)
    lin.outputs(x[:1].expand(4, 6))
    with pytest.raises(ValueError, match="depends on the others"):
        lin.outputs(x)


def test_gradients_that_depend_on_the_batch_are_refused():
    """Outputs do not, so only the comparison of gradients can tell."""

    class Net(nn.Linear):
        def forward(self, x):
            z = super().forward(x) * self.bias
            return z + (z.sum() - z.sum().detach())

    with pytest.raises(ValueError, match="gradients depend on the others"):
        Linearization(Net(6, 2).double()).jacobian(randn(3, 6))


# ------------------------------------------------------------------ the comparison


@given(scale=st.floats(1e-10, 1e10), kind=st.sampled_from([torch.float32, torch.float64]))
def test_what_agrees(scale, kind):
    want = [scale * randn(50).to(kind), torch.zeros(5, dtype=kind), scale * randn(3).to(kind)]
    for ord in (2, torch.inf):
        assert agree([one * (1 + 10 * torch.finfo(kind).eps) for one in want], want, ord)
        assert not agree([want[0], want[1], want[2] * 1.2], want, ord)
        assert not agree([want[0], want[1] + scale, want[2]], want, ord)
        assert not agree([want[0] * torch.nan, *want[1:]], want, ord)
        assert agree([want[0] * torch.nan, *want[1:]], [want[0] * torch.nan, *want[1:]], ord)
    assert agree([], [])
