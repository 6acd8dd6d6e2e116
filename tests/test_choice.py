"""Products of the NTK operator by its Gram matrix or without: the values, and when which way is taken."""

import pytest
import torch
from oracles.jacobian import loop_jacobian
from oracles.networks import build

from ntkbook import Linearization
from ntkbook.blocks import LayerBlocks
from ntkbook.experiments.networks import mlp
from ntkbook.operators import NTKOperator

TOLERANCE = 1e-12  # of the largest entry, in float64


def randn(*shape):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def error(got, want):
    assert got.shape == want.shape
    return float((got.detach() - want).abs().max() / want.abs().max())


@pytest.fixture
def formed(monkeypatch):
    """How many Gram matrices were formed, one entry each."""
    calls, original = [], Linearization.gram
    monkeypatch.setattr(Linearization, "gram", lambda self, *a, **b: calls.append(1) or original(self, *a, **b))
    return calls


@pytest.mark.parametrize("name", ["tanh", "one output", "convolutions", "parameter of its own", "embedding"])
@pytest.mark.parametrize("method", ["auto", "gram", "products"])
def test_every_way_gives_the_same(name, method):
    net, x = build(name)
    x2 = build(name, n=4, seed=1)[1]
    j, j2 = loop_jacobian(net, x), loop_jacobian(net, x2)
    lin = Linearization(net)
    for op, dense in ((lin.operator(x, method=method), j @ j.T), (lin.operator(x, x2, method=method), j @ j2.T)):
        for k in (1, 2, 40):
            v = randn(dense.shape[1], k)
            assert error(op @ v, dense @ v) < TOLERANCE
        assert error(op.mT @ randn(len(dense), 2), dense.T @ randn(len(dense), 2)) < TOLERANCE
        assert error(op[1:] @ v, dense[1:] @ v) < TOLERANCE


def test_the_method_is_honoured_and_said(formed):
    net, x = build("tanh")
    lin, v = Linearization(net), randn(18, 50)
    op = lin.operator(x, method="products")
    assert op.taken is None
    assert repr(op) == "NTKOperator(18 x 18, method='products', taken=None)"
    for _ in range(30):
        op @ v
    assert (op.taken, formed) == ("products", [])
    op.to_dense()
    op @ v
    assert (op.taken, len(formed)) == ("products", 1)
    op = lin.operator(x, method="gram")
    op @ v[:, :1]
    op @ v
    op.to_dense()
    assert (op.taken, len(formed)) == ("gram", 2)
    assert repr(op) == "NTKOperator(18 x 18, method='gram', taken='gram')"
    for copy in (op.mT, op[:6, :6], op.clone(), op.float()):
        assert copy._kept.method == "gram"
    with pytest.raises(ValueError, match=r"method: expected one of \('auto', 'gram', 'products'\), got 'dense'"):
        NTKOperator(lin, x, method="dense")


def costs(monkeypatch, product, gram):
    monkeypatch.setattr(LayerBlocks, "product_cost", lambda self, k: product * k)
    monkeypatch.setattr(LayerBlocks, "gram_cost", lambda self, n, m, symmetric: gram)


def test_the_matrix_is_formed_once_products_would_have_paid_for_it(formed, monkeypatch):
    net, x = build("tanh")
    costs(monkeypatch, product=100, gram=5000)  # 1,200 a vector for 6 + 6 examples; 324 a vector with the matrix
    op, ways = Linearization(net).operator(x), []
    for _ in range(7):
        op @ randn(18)
        ways.append(op.taken)
    assert ways == ["products"] * 4 + ["gram"] * 3
    assert len(formed) == 1
    op = Linearization(net).operator(x)
    op @ randn(18, 5)  # 6,000 against 5,000 + 1,620
    assert op.taken == "products"
    op @ randn(18)
    assert op.taken == "gram"
    op = Linearization(net).operator(x)
    op @ randn(18, 6)  # 7,200 against 5,000 + 1,944: at once
    assert op.taken == "gram"
    cross = Linearization(net).operator(x, x[:2])  # 800 a vector, and 108
    cross @ randn(6, 7)
    assert cross.taken == "products"
    cross @ randn(6, 1)
    assert cross.taken == "gram"


def test_a_matrix_that_is_there_is_used(formed):
    lin, x = Linearization(mlp([5, 20, 20, 1], dtype=torch.double)), randn(500, 5)
    op = lin.operator(x)
    op @ randn(500)
    assert op.taken == "products"
    op.to_dense()
    op @ randn(500)
    assert (op.taken, len(formed)) == ("gram", 1)


@pytest.mark.parametrize(
    ("where", "nbytes"), [("total_memory", 4 * 18 * 18 * 8), ("available_memory", 2 * 18 * 18 * 8)]
)
def test_a_matrix_that_does_not_fit_is_not_formed(where, nbytes, monkeypatch, formed):
    net, x = build("tanh")
    costs(monkeypatch, product=100, gram=1)
    for fits in (True, False):
        monkeypatch.setattr(f"ntkbook.choice.{where}", lambda device, fits=fits: nbytes if fits else nbytes - 1)
        op = Linearization(net).operator(x)
        for _ in range(3):
            op @ randn(18)
        assert op.taken == ("gram" if fits else "products")
    assert len(formed) == 1


def test_few_points_go_by_the_matrix_and_many_by_products():
    """The counted crossovers of 5-200-2000-200-1."""
    lin = Linearization(mlp([5, 200, 2000, 200, 1]))
    counts = LayerBlocks(lin, torch.zeros(1, 5), *lin._inspect(torch.zeros(1, 5)))
    found = {}
    for k in (1, 10, 100):
        pays = lambda n, k=k: 2 * n * counts.product_cost(k) >= counts.gram_cost(n, n, True) + n * n * k  # noqa: E731
        found[k] = next(n for n in range(100, 10**6, 10) if not pays(n))
    assert found == {1: 1360, 10: 7590, 100: 67430}


def test_gradients_do_not_depend_on_the_way():
    net, x = build("one output")
    lin, v, w = Linearization(net), randn(6, 4).requires_grad_(), randn(6, 4)
    x.requires_grad_()
    wanted = {}
    for method in ("gram", "products", "auto"):
        op = lin.operator(x, method=method)
        wanted[method] = torch.autograd.grad((w * (op @ v)).sum(), [x, v])
        with torch.no_grad():
            op @ v  # keeps a matrix without a graph,
        again = torch.autograd.grad((w * (op.to_dense() @ v)).sum(), [x, v])  # which is not taken here
        for got, want in zip(again, wanted["gram"]):
            assert error(got, want) < TOLERANCE
    for got, want in [*zip(wanted["products"], wanted["gram"]), *zip(wanted["auto"], wanted["gram"])]:
        assert error(got, want) < TOLERANCE
