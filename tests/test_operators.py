"""Every operator against its dense self: linear_operator's own test cases, and a stricter one in float64."""

import pickle
import subprocess
import sys
import unittest
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_operator import settings
from linear_operator.operators import CatLinearOperator, DenseLinearOperator, DiagLinearOperator, LinearOperator
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase, RectangularLinearOperatorTestCase
from oracles.jacobian import loop_jacobian
from oracles.largest import Largest
from oracles.networks import build
from torch import nn
from torch.func import functional_call

from ntkbook import Linearization, lazy
from ntkbook.lazy import Selected
from ntkbook.operators import GaussNewtonOperator, JacobianOperator, NTKOperator

TOLERANCE = 1e-12  # of the largest entry, in float64
NETWORKS = ["tanh", "one output", "layer norm", "convolutions", "embedding"]  # the last with integer inputs


@pytest.fixture(autouse=True)
def linear_operators_own_settings():
    """As linear_operator comes: importing botorch, as other tests do, turns Cholesky on up to 4,096 rows and beyond."""
    own = settings.fast_computations(covar_root_decomposition=True, log_prob=True, solves=True)
    with own, settings.max_cholesky_size(800), settings.cholesky_max_tries(3):
        yield


def mlp(*widths):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layers = [module for i, o in pairwise(widths) for module in (nn.Linear(i, o), nn.Tanh())]
        return nn.Sequential(*layers[:-1]).double()


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


@torch.enable_grad()
def graph_jacobian(lin, x):
    """J(x), differentiable in x: plain autograd, an example and an output at a time."""
    leaves = {name: value.detach().requires_grad_() for name, value in lin.params.items()}
    rows = []
    for example in x.split(1):
        for f in functional_call(lin.net, leaves, (example,)).reshape(-1):
            parts = torch.autograd.grad(f, list(leaves.values()), create_graph=True, materialize_grads=True)
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


def error(got, want):
    """The largest difference, relative to the largest entry."""
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30)) if want.numel() else 0.0


def as_dense(result):
    return result.to_dense() if isinstance(result, LinearOperator) else result


# ------------------------------------------------------------------ the kinds of operators, and their dense selves


class Jacobian:
    make = staticmethod(lambda lin, x, x2: JacobianOperator(lin, x))
    dense = staticmethod(lambda j, j2: j)


class Transposed:
    make = staticmethod(lambda lin, x, x2: JacobianOperator(lin, x).mT)
    dense = staticmethod(lambda j, j2: j.T)


class NTK:
    make = staticmethod(lambda lin, x, x2: lin.operator(x))
    dense = staticmethod(lambda j, j2: j @ j.T)


class CrossNTK:
    make = staticmethod(lambda lin, x, x2: lin.operator(x, x2))
    dense = staticmethod(lambda j, j2: j @ j2.T)


class GaussNewton:
    make = staticmethod(lambda lin, x, x2: GaussNewtonOperator(lin, x))
    dense = staticmethod(lambda j, j2: j.T @ j)


class SelectedRows:
    make = staticmethod(lambda lin, x, x2: JacobianOperator(lin, x)[[3, 0, 2, 2], 1::2])
    dense = staticmethod(lambda j, j2: j[[3, 0, 2, 2], 1::2])


class SelectedNTK:
    """A principal submatrix: square and positive definite."""

    make = staticmethod(lambda lin, x, x2: lin.operator(x)[1:, 1:])
    dense = staticmethod(lambda j, j2: (j @ j.T)[1:, 1:])


# ------------------------------------------------------------------ linear_operator's own test cases


class Theirs:
    """Their cases draw in torch's default dtype: float64 here. Their tolerances, 1e-4 to 5e-2, are for float32 and
    for iterations that stop early; ours below are near rounding where nothing is iterated."""

    seed = 0
    net = mlp(3, 4, 2)

    def setUp(self):
        torch.set_default_dtype(torch.float64)
        super().setUp()

    def tearDown(self):
        super().tearDown()
        torch.set_default_dtype(torch.float32)

    def inputs(self):
        return torch.randn(4, 3), torch.randn(3, 3)

    def create_linear_op(self):
        return self.make(Linearization(self.net), *self.inputs())

    def evaluate_linear_op(self, op):
        if isinstance(op, Selected):
            return self.evaluate_linear_op(op.base)[op.rows][:, op.columns]
        j = graph_jacobian(op.lin, op.x)
        if isinstance(op, JacobianOperator):
            return j.T if op.transposed else j
        if isinstance(op, GaussNewtonOperator):
            return j.T @ j
        return j @ (j if op.x2 is None else graph_jacobian(op.lin, op.x2)).T


class TestTheirJacobian(Jacobian, Theirs, RectangularLinearOperatorTestCase, unittest.TestCase):
    pass


class TestTheirTransposed(Transposed, Theirs, RectangularLinearOperatorTestCase, unittest.TestCase):
    pass


class TestTheirCrossNTK(CrossNTK, Theirs, RectangularLinearOperatorTestCase, unittest.TestCase):
    pass


class TestTheirSelectedRows(SelectedRows, Theirs, RectangularLinearOperatorTestCase, unittest.TestCase):
    pass


class TestTheirNTK(NTK, Theirs, LinearOperatorTestCase, unittest.TestCase):
    def inputs(
        self,
    ):  # three: with four the log-determinant is near 0, and their tolerance for estimates of it relative
        return torch.randn(3, 3), torch.randn(3, 3)


class TestTheirSelectedNTK(SelectedNTK, Theirs, LinearOperatorTestCase, unittest.TestCase):
    pass


class TestTheirGaussNewton(GaussNewton, Theirs, LinearOperatorTestCase, unittest.TestCase):
    should_call_lanczos = False  # its root is Jᵀ, exact
    net = mlp(2, 2, 1)  # of full rank, with distinct eigenvalues, as their solves and eigenvectors need it

    def inputs(self):
        return 2 * torch.randn(40, 2), torch.randn(3, 2)


# ------------------------------------------------------------------ ours: any operator


INDICES = {
    "row": 1,
    "last row": -1,
    "column": (slice(None), 2),
    "last column": (..., -1),
    "element": (2, -3),
    "number in a tensor": (torch.tensor(2), slice(None)),
    "rows": slice(1, 3),
    "no rows": slice(2, 2),
    "steps": (slice(None, None, 2), slice(1, None, 3)),
    "from the end": (slice(-3, -1), ...),
    "rows out of order": torch.tensor([3, 0, 0, -1]),
    "columns": (slice(None), torch.tensor([2, 1, -2])),
    "list": [2, 0],
    "both": (slice(0, 2), torch.tensor([1, 1, 0])),
    "pairs": (torch.tensor([3, 0, 0]), torch.tensor([1, -1, 2])),
    "grid": (torch.tensor([[3], [0]]), torch.tensor([[1, -1, 2]])),
    "everything": (...,),
}


@pytest.mark.parametrize("name", NETWORKS)
class OperatorCase:
    """What every operator must do as its dense self does."""

    def both(self, name, **options):
        net, x = build(name)
        x2 = build(name, n=4, seed=1)[1]
        lin = Linearization(net, **options)
        return self.make(lin, x, x2), self.dense(loop_jacobian(net, x), loop_jacobian(net, x2))

    def test_products(self, name):
        op, dense = self.both(name)
        m, n = dense.shape
        assert op.shape == dense.shape
        assert (op.dtype, op.device) == (torch.double, torch.device("cpu"))
        for shape in ((n,), (n, 1), (n, 5), (2, n, 3), (2, 1, n, 2), (n, 0)):
            v = randn(*shape)
            assert error(op @ v, dense @ v) < TOLERANCE
        for shape in ((m,), (5, m), (2, 3, m)):
            u = randn(*shape)
            assert error(u @ op, u @ dense) < TOLERANCE
        assert error(op.mT @ randn(m, 2), dense.T @ randn(m, 2)) < TOLERANCE
        assert error(op.mT.mT @ randn(n, 2), dense @ randn(n, 2)) < TOLERANCE
        assert error(op.mT.to_dense(), dense.T) < TOLERANCE
        assert error(op.to_dense(), dense) < TOLERANCE
        assert error(op.sum(0), dense.sum(0)) < TOLERANCE

    @pytest.mark.parametrize("kind", INDICES)
    def test_indexing(self, name, kind):
        op, dense = self.both(name)
        for one, other in ((op, dense), (op.mT, dense.T)):
            found, expected = one[INDICES[kind]], other[INDICES[kind]]
            assert error(as_dense(found), expected) < TOLERANCE
            if isinstance(found, LinearOperator):
                v, u = randn(found.shape[1], 2), randn(found.shape[0])
                assert error(found @ v, expected @ v) < TOLERANCE
                assert error(found.mT @ u, expected.T @ u) < TOLERANCE
        rows = torch.arange(len(dense)) % 3 == 1
        assert error(op[rows].to_dense(), dense[rows]) < TOLERANCE

    def test_slices_of_slices_and_batches(self, name):
        op, dense = self.both(name)
        assert error(op[1:][:, 2:][0:2, ::2].to_dense(), dense[1:][:, 2:][0:2, ::2]) < TOLERANCE
        assert error(op[1:, 2:][1, 1:], dense[1:, 2:][1, 1:]) < TOLERANCE
        many = dense.expand(3, *dense.shape)
        for batch in (op.expand(3, *dense.shape), op.repeat(3, 1, 1), op.unsqueeze(0).expand(3, *dense.shape)):
            v = randn(3, dense.shape[1], 2)
            assert batch.shape == many.shape
            assert error(batch @ v, many @ v) < TOLERANCE
            assert error(batch.mT.to_dense(), many.mT) < TOLERANCE
            pairs = (torch.tensor([2, 0]), torch.tensor([1, 2]), torch.tensor([0, 1]))
            for index in (1, (slice(2), 1), (..., slice(1, 3)), (1, -1), (1, slice(1, 3), [0, 2]), pairs):
                assert error(as_dense(batch[index]), many[index]) < TOLERANCE
            assert error(batch.sum(0).to_dense(), many.sum(0)) < TOLERANCE

    # CatLinearOperator indexes by a list, about which torch warns.
    @pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
    def test_with_other_operators(self, name):
        op, dense = self.both(name)
        m, n = dense.shape
        other = randn(m, n)
        v = randn(n, 2)
        pairs = [
            (op + DenseLinearOperator(other), dense + other),
            (op - other, dense - other),
            (2.5 * op, 2.5 * dense),
            (op / 4, dense / 4),
            (op @ op.mT, dense @ dense.T),
            (op.mT @ op, dense.T @ dense),
            (op @ DiagLinearOperator(v[:, 0]), dense * v[:, 0]),
            (CatLinearOperator(op, DenseLinearOperator(other), dim=-2), torch.cat([dense, other])),
            (CatLinearOperator(op, op, dim=-1), torch.cat([dense, dense], dim=1)),
            (op * other, dense * other),
        ]
        for one, expected in pairs:
            v = randn(expected.shape[1], 2)
            assert error(one @ v, expected @ v) < TOLERANCE
            assert error(one.to_dense(), expected) < TOLERANCE

    def test_copies(self, name):
        op, dense = self.both(name)
        op.to_dense()  # a filled cache travels too
        v = randn(dense.shape[1], 2)
        rebuilt = op.representation_tree()(*op.representation())
        for copy in (rebuilt, op.clone(), op.detach(), pickle.loads(pickle.dumps(op)), op.to("cpu"), op.cpu()):
            assert type(copy) is type(op)
            assert error(copy @ v, dense @ v) < TOLERANCE
        for single in (op.float(), op.to(torch.float32), op.to(dtype=torch.float32), op.type(torch.float32)):
            assert single.dtype == torch.float32
            assert error((single @ v.float()).double(), dense @ v) < 1e-5  # float32
            assert error(single.to_dense().double(), dense) < 1e-5
            back = single.double()
            assert back.dtype == torch.double
            assert error(back @ v, dense @ v) < 1e-5  # the parameters were rounded
        assert op.to("meta").device.type == "meta"
        assert op.dtype == torch.double

    def test_gradients(self, name):
        net, x = build(name)
        x2 = build(name, n=4, seed=1)[1]
        lin = Linearization(net)
        leaves = [x, x2] if name == "embedding" else [x.requires_grad_(), x2.requires_grad_()]
        op = self.make(lin, *leaves)
        dense = self.dense(graph_jacobian(lin, x), graph_jacobian(lin, x2))
        v, weights = randn(dense.shape[1], 3).requires_grad_(), randn(dense.shape[0], 3)
        wanted = [v, *(leaf for leaf in leaves if leaf.requires_grad)]

        def gradients(output):
            return torch.autograd.grad(output, wanted, materialize_grads=True, retain_graph=True)

        expected = gradients((weights * (dense @ v)).sum())
        assert error(expected[0], dense.T @ weights) < TOLERANCE
        for output in ((weights * (op @ v)).sum(), (weights * op._matmul(v)).sum(), (v * (op.mT @ weights)).sum()):
            for got, want in zip(gradients(output), expected):
                assert error(got, want) < TOLERANCE
        for got, want in zip(gradients((weights * (op.to_dense() @ v)).sum()), expected):
            assert error(got, want) < TOLERANCE
        entry = self.make(lin, *leaves)[1, 2] ** 2 + (0 * v).sum()
        for got, want in zip(gradients(entry), gradients(dense[1, 2] ** 2 + (0 * v).sum())):
            assert error(got, want) < TOLERANCE

    def test_chunks_change_nothing(self, name, monkeypatch):
        whole, _ = self.both(name)
        for nbytes in (10_000, 1):  # a few rows of J at a time; one
            with monkeypatch.context() as patch:
                patch.setattr(lazy, "working_memory", lambda device, nbytes=nbytes: nbytes)
                op, dense = self.both(name)
                v = randn(dense.shape[1], 3)
                assert error(op @ v, whole @ v) < TOLERANCE
                assert error(op[1:, 2:].to_dense(), dense[1:, 2:]) < TOLERANCE
                assert error(op[1, 2], dense[1, 2]) < TOLERANCE
                if op.is_square:
                    assert error(op.diagonal(), dense.diagonal()) < TOLERANCE


class TestJacobian(Jacobian, OperatorCase):
    pass


class TestTransposed(Transposed, OperatorCase):
    pass


class TestCrossNTK(CrossNTK, OperatorCase):
    pass


class TestSelectedRows(SelectedRows, OperatorCase):
    pass


# ------------------------------------------------------------------ ours: positive semi-definite operators


class SemidefiniteCase(OperatorCase):
    """With 1 added to the diagonal: JᵀJ has a rank of n·o at most."""

    def shifted(self, name):
        op, dense = self.both(name)
        return op.add_jitter(1.0), dense + torch.eye(len(dense), dtype=torch.double)

    def test_diagonals(self, name):
        op, dense = self.both(name)
        d = randn(len(dense)).abs()
        assert error(op.diagonal(), dense.diagonal()) < TOLERANCE
        assert error(op.expand(2, *op.shape).diagonal(), dense.diagonal().expand(2, -1)) < TOLERANCE
        assert error(op.add_jitter(0.5).diagonal(), dense.diagonal() + 0.5) < TOLERANCE
        assert error(op.add_diagonal(d).to_dense(), dense + d.diag()) < TOLERANCE
        assert error(op.add_jitter(0.5) @ d, dense @ d + 0.5 * d) < TOLERANCE

    def test_direct_solves(self, name):
        op, dense = self.shifted(name)
        condition = float(torch.linalg.cond(dense))
        y = randn(len(dense), 2)
        solution = torch.linalg.solve(dense, y)
        assert error(op.solve(y), solution) < 1e-15 * condition + TOLERANCE
        assert error(op.solve(y[:, 0]), solution[:, 0]) < 1e-15 * condition + TOLERANCE
        quadratic, logdet = op.inv_quad_logdet(y, logdet=True)
        assert error(quadratic, (y * solution).sum()) < 1e-15 * condition + TOLERANCE
        assert error(logdet, torch.logdet(dense)) < TOLERANCE
        assert error(op.logdet(), torch.logdet(dense)) < TOLERANCE
        root = op.root_decomposition().root.to_dense()
        assert error(root @ root.T, dense) < TOLERANCE
        evals, evecs = op.eigh()
        assert error((evecs.to_dense() * evals) @ evecs.to_dense().T, dense) < TOLERANCE

    def test_iterative_solves(self, name):
        """By products alone. linear_cg stops moving once a squared residual is below its eps of 1e-10, in float64 and
        with dense matrices too: 1e-5 is what it can do."""
        op, dense = self.shifted(name)
        y = randn(len(dense), 2)
        solution = torch.linalg.solve(dense, y)
        with settings.max_cholesky_size(0), settings.cg_tolerance(1e-5), settings.max_cg_iterations(200):
            assert error(op.solve(y), solution) < 1e-4
            assert error(op.inv_quad(y), (y * solution).sum()) < 1e-4

    def test_gradients_of_solves(self, name):
        net, x = build(name)
        if not x.is_floating_point():
            assert not self.both(name)[0].requires_grad
            return
        x.requires_grad_()
        x2 = build(name, n=4, seed=1)[1]
        lin = Linearization(net)
        dense = self.dense(graph_jacobian(lin, x), graph_jacobian(lin, x2))
        dense = dense + torch.eye(len(dense), dtype=torch.double)
        y = randn(len(dense), 2)
        expected = torch.autograd.grad((y * torch.linalg.solve(dense, y)).sum() + torch.logdet(dense), x)[0]
        op = self.make(lin, x, x2).add_jitter(1.0)
        quadratic, logdet = op.inv_quad_logdet(y, logdet=True)
        assert error(torch.autograd.grad(quadratic + logdet, x)[0], expected) < 1e-11  # κ of about 100
        op = self.make(lin, x, x2).add_jitter(1.0)
        value = (y * op.solve(y)).sum() + op.logdet()
        assert error(torch.autograd.grad(value, x)[0], expected) < 1e-11


class TestNTK(NTK, SemidefiniteCase):
    pass


class TestSelectedNTK(SelectedNTK, SemidefiniteCase):
    pass


class TestGaussNewton(GaussNewton, SemidefiniteCase):
    pass


FULL_RANK = {
    "NTK": (mlp(3, 6, 3), 5, NTK),
    "selected NTK": (mlp(3, 6, 3), 5, SelectedNTK),
    "JᵀJ": (mlp(2, 2, 1), 40, GaussNewton),
}


@pytest.mark.parametrize("case", FULL_RANK)
def test_lanczos_of_full_rank(case):
    net, n, kind = FULL_RANK[case]
    x = 2 * randn(n, net[0].in_features)
    op, j = kind.make(Linearization(net), x, x), loop_jacobian(net, x)
    dense = kind.dense(j, j)
    with settings.max_root_decomposition_size(len(dense)), settings.tridiagonal_jitter(0.0):
        root = op.root_decomposition(method="lanczos").root.to_dense()
        inverse = op.root_inv_decomposition(method="lanczos", initial_vectors=randn(len(dense), 1)).root.to_dense()
        evals, evecs = op.diagonalization(method="lanczos")
    condition = float(torch.linalg.cond(dense))
    assert root.shape == dense.shape
    assert error(root @ root.T, dense) < 1e-8
    assert error((evecs.to_dense() * evals) @ evecs.to_dense().T, dense) < 1e-8
    assert error(inverse @ inverse.T, torch.linalg.inv(dense)) < max(1e-8, 1e-12 * condition)
    pivoted = op.pivoted_cholesky(rank=len(dense), error_tol=1e-14)
    assert error(pivoted @ pivoted.T, dense) < 1e-8


@pytest.mark.parametrize("name", NETWORKS)
def test_the_root_of_the_gauss_newton_matrix_is_the_jacobian(name):
    net, x = build(name)
    j = loop_jacobian(net, x)
    op = GaussNewtonOperator(Linearization(net), x)
    root = op.root_decomposition()
    assert isinstance(root.root, JacobianOperator)
    v = randn(len(j.T), 2)
    assert error(root @ v, j.T @ (j @ v)) < TOLERANCE
    samples = op.zero_mean_mvn_samples(3)
    assert error(torch.linalg.lstsq(j.T, samples.T).solution.T @ j, samples) < 1e-9  # in J's row space; κ of J


# ------------------------------------------------------------------ nothing large is formed


def test_a_wide_network_is_never_squared(monkeypatch):
    """p² would be 54 GB and n·p 130 MB: neither is made by any of this, gradients included."""
    net = mlp(8, 200, 400, 1)
    x, n = randn(200, 8), 200
    lin = Linearization(net, chunk_size=50)
    p = lin.num_params
    assert p * p * 8 > 50e9
    monkeypatch.setattr(lazy, "working_memory", lambda device: 3 * 8 * p * 10)  # ten rows of J
    y, v = randn(n), randn(p)
    few = (settings.max_cholesky_size(0), settings.cg_tolerance(1e-2), settings.max_cg_iterations(20))
    found = {}

    def watch(what, call):
        with few[0], few[1], few[2], Largest(expanded=False) as largest:
            call()
        found[what] = largest.numel

    jacobian, ntk, square = JacobianOperator(lin, x), lin.operator(x), GaussNewtonOperator(lin, x)
    leaf = x.clone().requires_grad_()
    watch("J v", lambda: jacobian @ v)
    watch("Jᵀ u", lambda: jacobian.mT @ y)
    watch("J[3]", lambda: jacobian[3])
    watch("K u", lambda: ntk @ y)
    watch("K[3, 1:]", lambda: ntk[3, 1:])
    watch("diag K", lambda: ntk.diagonal())
    watch("K solve", lambda: ntk.add_jitter(1e3).solve(y))
    watch("JᵀJ v", lambda: square @ v)
    watch("JᵀJ solve", lambda: square.add_jitter(1e3).solve(v))
    watch("JᵀJ[:, 3]", lambda: square[:, 3])
    watch("JᵀJ root", lambda: square.root_decomposition() @ v)
    watch("gradient", lambda: torch.autograd.grad((lin.operator(leaf) @ y).sum(), leaf))
    watch("J's gradient", lambda: torch.autograd.grad((JacobianOperator(lin, leaf) @ v).sum(), leaf))
    watch("diag JᵀJ", lambda: square.diagonal())
    watch("JᵀJ[[2, 4], [3, 3]]", lambda: square[[2, 4], [3, 3]])
    # Ten rows of J at a time for the diagonal of JᵀJ and for scattered elements; a preconditioner of linear_operator's,
    # of rank 15, in the solve; else nothing beyond one vector.
    sizes = {what: size / p for what, size in found.items()}
    allowed = {"diag JᵀJ": 12, "JᵀJ[[2, 4], [3, 3]]": 12, "JᵀJ solve": 32}
    assert not {what: size for what, size in sizes.items() if size > allowed.get(what, 1.5)}
    assert sizes["diag JᵀJ"] >= 10  # such a chunk is seen


@pytest.mark.parametrize("name", NETWORKS)
def test_products_and_solves_form_no_jacobian(name, monkeypatch):
    net, x = build(name)
    lin = Linearization(net)
    formed = []
    original = Linearization.jacobian
    monkeypatch.setattr(Linearization, "jacobian", lambda self, x: formed.append(len(x)) or original(self, x))
    for op in (JacobianOperator(lin, x), JacobianOperator(lin, x).mT, lin.operator(x), GaussNewtonOperator(lin, x)):
        op @ randn(op.shape[1], 2)
        randn(2, op.shape[0]) @ op
        if op.is_square:
            with settings.max_cholesky_size(0), settings.cg_tolerance(1e-2):
                op.add_jitter(1.0).solve(randn(op.shape[0]))
    lin.operator(x).diagonal()
    assert not formed
    GaussNewtonOperator(lin, x).diagonal()
    assert formed  # what counts is that the counter works


def test_rows_ask_for_their_examples_only(monkeypatch):
    net, x = build("tanh")
    lin = Linearization(net)
    asked = []
    for method in ("jacobian", "gram"):
        original = getattr(Linearization, method)

        def watched(self, *inputs, original=original):
            asked.append([len(part) for part in inputs if part is not None])
            return original(self, *inputs)

        monkeypatch.setattr(Linearization, method, watched)
    op = JacobianOperator(lin, x)
    assert isinstance(op[3:9], JacobianOperator)  # examples 1 and 2, whole
    assert isinstance(op[4:9], Selected)
    assert isinstance(lin.operator(x)[3:9, 3:9], NTKOperator)
    assert lin.operator(x)[3:9, 3:9].x2 is None
    assert lin.operator(x)[3:9].x2 is not None
    assert not asked
    assert op[4:8].to_dense().shape == (4, lin.num_params)
    assert lin.operator(x)[4:8, 17].shape == (4,)
    assert lin.operator(x)[[1, 2], [4, 5]].shape == (2,)
    assert asked == [[2], [2, 1], [1, 1]]


# ------------------------------------------------------------------ any shape


@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    n=st.integers(1, 5),
    m=st.integers(1, 5),
    columns=st.integers(0, 4),
    batch=st.lists(st.integers(1, 3), max_size=2),
    index=st.tuples(*[st.slices(12) | st.lists(st.integers(-1, 0), min_size=1, max_size=4)] * 2),
    chunk_size=st.none() | st.integers(1, 3),
)
def test_any_shape(widths, n, m, columns, batch, index, chunk_size):
    net = mlp(*widths)
    x, x2 = randn(n, widths[0]), randn(m, widths[0], seed=1)
    lin = Linearization(net, chunk_size=chunk_size)
    j, j2 = loop_jacobian(net, x), loop_jacobian(net, x2)
    index = tuple(slice(i.start, i.stop, abs(i.step or 1)) if isinstance(i, slice) else torch.tensor(i) for i in index)
    for kind in (Jacobian, Transposed, NTK, CrossNTK, GaussNewton):
        op, dense = kind.make(lin, x, x2), kind.dense(j, j2)
        scale = max(1.0, float(dense.abs().max())) * 10  # of products and of entries that may cancel
        v = randn(*batch, dense.shape[1], columns)
        assert (op @ v).shape == (dense @ v).shape
        assert bool(((op @ v) - dense @ v).abs().le(TOLERANCE * scale).all())
        found = as_dense(op[index])
        assert found.shape == dense[index].shape
        assert bool((found - dense[index]).abs().le(TOLERANCE * scale).all())


# ------------------------------------------------------------------ errors, and what the documentation says


def test_errors():
    net, x = build("tanh")
    lin = Linearization(net)
    p = lin.num_params
    jacobian, ntk = JacobianOperator(lin, x), lin.operator(x)
    with pytest.raises(RuntimeError, match=rf"Incompatible dimensions for matmul: .*18, {p}.* and .*18"):
        jacobian @ randn(18)
    with pytest.raises(RuntimeError, match="Incompatible dimensions"):
        ntk @ randn(6, 3)
    with pytest.raises(ValueError, match=r"v: expected torch.float64 on cpu.*got torch.float32"):
        jacobian @ randn(p).float()
    with pytest.raises(ValueError, match=r"u: expected torch.float64 on cpu.*got torch.float32"):
        ntk @ randn(18).float()
    for index, message in (
        (18, r"index 18 is out of range for dimension 0 of shape \(18, 18\)"),
        ((0, -19), "index -19 is out of range for dimension 1"),
        (torch.tensor([0, 18]), r"index \[0, 18\] is out of range for 18 rows"),
        ((slice(None), [-19]), r"index \[-19\] is out of range for 18 columns"),
        ((0, 0, 0), "at most 2 indices, got 3"),
    ):
        with pytest.raises(IndexError, match=message):
            ntk[index]
    with pytest.raises(RuntimeError, match="only implemented for square"):
        jacobian.diagonal()
    with pytest.raises(RuntimeError, match=r"repeat: expected \(\*batch, 1, 1\)"):
        jacobian.repeat(1, 2)
    holes = x.clone()
    holes[2] = torch.nan
    for make in (JacobianOperator, NTKOperator, GaussNewtonOperator, lambda lin, bad: NTKOperator(lin, x, bad)):
        with pytest.raises(ValueError, match="x: 1 of 6 examples hold NaN"):
            make(lin, holes)
        with pytest.raises(ValueError, match=r"x: expected torch\.float64 on cpu"):
            make(lin, x.float())
        with pytest.raises(ValueError, match=r"x: the network fails on examples of shape \(3,\)"):
            make(lin, x[:, :3])


def test_what_cannot_fit_is_refused(monkeypatch):
    net, x = build("tanh")
    op = GaussNewtonOperator(Linearization(net), x)
    monkeypatch.setattr("ntkbook.memory.available_memory", lambda device: 10_000)
    with pytest.raises(MemoryError, match=r"JᵀJ of 93 x 93 torch\.float64 takes .* Use its products, its diagonal"):
        op.to_dense()
    assert (op @ randn(93)).shape == (93,)


def test_the_documented_settings_of_linear_operator():
    """The module says when linear_operator leaves Cholesky, and with which tolerance."""
    ask = "from linear_operator.settings import *; print(max_cholesky_size.value(), cg_tolerance.value())"
    fresh = subprocess.run([sys.executable, "-W", "ignore", "-c", ask], capture_output=True, text=True, check=True)
    assert fresh.stdout.split() == ["800", "1"]
    net = mlp(2, 20, 1)
    x = randn(801, 2)
    op, j = Linearization(net).operator(x).add_jitter(0.01), loop_jacobian(net, x)
    dense = j @ j.T + 0.01 * torch.eye(801, dtype=torch.double)
    y = randn(801)
    solution = torch.linalg.solve(dense, y)
    assert error(op.solve(y), solution) > 1e-3  # no solution
    with settings.max_cholesky_size(10_000):
        assert error(op.solve(y), solution) < 1e-8  # κ of 1e6
