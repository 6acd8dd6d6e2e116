"""fisher.py: four methods against dense Fisher matrices in float64 and curvlinops, and that nothing is changed."""

import math
from itertools import pairwise

import pytest
import torch
from curvlinops import GGNLinearOperator
from hypothesis import given
from hypothesis import strategies as st
from oracles.fisher import dense_empirical, dense_fisher, outputs
from oracles.jacobian import loop_jacobian
from oracles.largest import Largest
from oracles.networks import CASES, build
from test_operators import NETWORKS, TOLERANCE, SemidefiniteCase, error, randn
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkbook import (
    FisherOperator,
    Linearization,
    automatic_epsilon,
    curvature,
    empirical_fisher_vector_product,
    fisher,
    fisher_diagonal,
    fisher_vector_product,
    linearize,
    monte_carlo_fisher_vector_product,
)
from ntkbook.likelihoods import LIKELIHOODS, Gaussian, get_likelihood
from ntkbook.operators import GaussNewtonOperator

LINEAR = ("exact", "double_backward")
DIFFERENCES = ("forward_difference", "central_difference")


@pytest.fixture(autouse=True)
def unfused_attention():
    """The fused kernel has neither a forward-mode nor a second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def small(o=3, dtype=torch.double, seed=0, widths=(3, 5)):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        i, h = widths
        net = nn.Sequential(nn.Linear(i, h), nn.Tanh(), nn.Linear(h, o))
    return net.to(dtype)


def labels(likelihood, f, seed=0):
    return get_likelihood(likelihood).sample(f, torch.Generator().manual_seed(seed))


class Failing(nn.Module):
    """Raises at a call of its choice."""

    def __init__(self, exception):
        super().__init__()
        self.layer, self.exception, self.left = nn.Linear(3, 2), exception, math.inf
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise self.exception
        return torch.tanh(self.layer(x)) * self.scale


# ------------------------------------------------------------------ against dense matrices


@pytest.mark.parametrize("name", CASES)
def test_networks_of_every_kind(name):
    net, x = build(name)
    likelihood = get_likelihood("gaussian" if outputs(net, x).shape[1] == 1 else "categorical")
    dense = dense_fisher(net, x, likelihood)
    v = randn(len(dense), 3)
    for method in LINEAR:
        assert error(fisher_vector_product(net, x, v, likelihood, method), dense @ v) < TOLERANCE
        for column in v.T:
            assert error(fisher_vector_product(net, x, column, likelihood, method), dense @ column) < TOLERANCE
    if name != "detached":  # a derivative stops at a detach, a difference does not
        found = fisher_vector_product(net, x, v, likelihood, "central_difference")
        assert error(found, dense @ v) < 1e-7  # what differences can do in float64: about u^(2/3)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("likelihood", [*LIKELIHOODS, Gaussian(torch.tensor([0.3, 2.0, 0.1]))])
def test_likelihoods(likelihood, reduction):
    likelihood = get_likelihood(likelihood)
    net, x = small(likelihood.num_outputs or 3), 2 * randn(7, 3)
    dense = dense_fisher(net, x, likelihood) / (7 if reduction == "mean" else 1)
    v = randn(len(dense), 2)
    options = {"reduction": reduction}
    for method in LINEAR:
        assert error(fisher_vector_product(net, x, v, likelihood, method, **options), dense @ v) < TOLERANCE
    central = fisher_vector_product(net, x, v, likelihood, "central_difference", **options)
    assert error(central, dense @ v) < 1e-7
    op = FisherOperator(net, x, likelihood, **options)
    assert error(op.to_dense(), dense) < TOLERANCE
    assert error(op.diagonal(), dense.diagonal()) < TOLERANCE
    root = op.root_decomposition().root
    assert error((root @ root.mT).to_dense(), dense) < TOLERANCE
    y = labels(likelihood, outputs(net, x))
    dense = dense_empirical(net, x, y, likelihood) / (7 if reduction == "mean" else 1)
    found = empirical_fisher_vector_product(net, x, y, v, likelihood, **options)
    assert error(found, dense @ v) < TOLERANCE


@pytest.mark.parametrize("loss", ["categorical", "gaussian"])
def test_curvlinops_agrees(loss):
    net, x = build("convolutions")
    y = torch.arange(6) % 3 if loss == "categorical" else randn(6, 3)
    # Their squared error is the sum of (f − y)², whose Hessian is 2.
    theirs = nn.CrossEntropyLoss(reduction="sum") if loss == "categorical" else nn.MSELoss(reduction="sum")
    ggn = GGNLinearOperator(net, theirs, list(net.parameters()), [(x, y)], check_deterministic=False)
    v = randn(sum(p.numel() for p in net.parameters()))
    want = (ggn @ v) / (1 if loss == "categorical" else 2)
    for method in LINEAR:
        assert error(fisher_vector_product(net, x, v, loss, method), want) < TOLERANCE


@pytest.mark.parametrize(("method", "order"), [("forward_difference", 1), ("central_difference", 2)])
def test_the_order_of_finite_differences(method, order):
    """Where rounding is far: the error falls by 2 or by 4 as ε is halved, to a part in ten."""
    net, x = small(), randn(6, 3)
    v = randn(sum(p.numel() for p in net.parameters()), seed=3)
    exact = fisher_vector_product(net, x, v)
    errors = [
        float((fisher_vector_product(net, x, v, method=method, epsilon=step) - exact).norm())
        for step in (4e-3, 2e-3, 1e-3)
    ]
    for larger, smaller in pairwise(errors):
        assert larger / smaller == pytest.approx(2**order, rel=0.1)
    assert errors[0] < 0.1 * float(exact.norm())


def test_the_step_is_a_length():
    """θ + ε v/‖v‖: the product is the difference of two gradients, and homogeneous in v."""
    net, x = small(), randn(6, 3)
    lin, likelihood = Linearization(net), get_likelihood("categorical")
    v, step = 7 * randn(lin.num_params), 0.01

    f = lin.outputs(x)

    def gradient(shift):
        divergence = torch.func.grad(lambda p: likelihood.kl(f, lin._call(lin.unflatten(p), x)).sum())
        return divergence(lin.flatten(lin.params) + shift)

    unit = v / v.norm()
    forward = gradient(step * unit) / step * v.norm()
    central = (gradient(step * unit) - gradient(-step * unit)) / (2 * step) * v.norm()
    for method, want in zip(DIFFERENCES, (forward, central)):
        assert error(fisher_vector_product(lin, x, v, method=method, epsilon=step), want) < TOLERANCE
        for scale in (1e-200, -3.0 if method == "central_difference" else 3.0, 1e100):
            found = fisher_vector_product(lin, x, scale * v, method=method, epsilon=step)
            assert error(found / scale, want) < TOLERANCE


def test_automatic_steps():
    net, x = small(dtype=torch.float), randn(6, 3)
    lin = Linearization(net)
    v = randn(lin.num_params)
    exact = fisher_vector_product(lin.to(dtype=torch.double), x, v)
    for dtype, limits in ((torch.float32, (1e-2, 1e-3)), (torch.float64, (1e-6, 1e-8))):  # what these steps leave
        there = lin.to(dtype=dtype)
        for method, limit in zip(DIFFERENCES, limits):
            found = fisher_vector_product(there, x.to(dtype), v.to(dtype), method=method)
            assert found.dtype == dtype
            assert 0 < error(found.double(), exact) < limit
            step = automatic_epsilon(there, x.to(dtype), v.to(dtype), method)
            assert torch.equal(
                found, fisher_vector_product(there, x.to(dtype), v.to(dtype), method=method, epsilon=step)
            )
    with pytest.raises(ValueError, match=r"method: expected one of 'forward_difference', 'central_difference', got"):
        automatic_epsilon(lin, x.float(), v.float(), "exact")


def test_an_automatic_step_is_the_length_that_changes_the_outputs_by_their_size_times_rounding():
    x = randn(20, 3)
    u = torch.finfo(torch.double).eps
    for net, power in ((small(), 1 / 3), (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double(), 1 / 2)):
        lin = Linearization(net)
        v = lin.vjp(x, torch.ones(20, lin.num_outputs(x)).double())  # along which the outputs change most
        few = x[:8]
        size = float(lin.flatten(lin.params).norm())
        length = min(size, float(lin.outputs(few).norm() / lin.jvp(few, v / v.norm()).norm()))
        for method, exponent in zip(DIFFERENCES, (1 / 2, power)):
            found = automatic_epsilon(lin, x, v, method)
            assert found == pytest.approx(length * u**exponent, rel=1e-5)  # the trial step's own error
            assert automatic_epsilon(lin, x, -3 * v, method) == pytest.approx(found, rel=1e-5)
        assert length < size
    # Never beyond the parameters' own size; nor zero, where the outputs do not change or are zero.
    net = nn.Linear(2, 1, bias=False).double()
    lin, size = Linearization(net), float(net.weight.detach().norm())
    across = torch.tensor([[-1.0, 1.0]], dtype=torch.double)
    for inputs, v in ((across, torch.ones(2).double()), (torch.zeros(1, 2).double(), torch.ones(2).double())):
        assert automatic_epsilon(lin, inputs, v, "forward_difference") == pytest.approx(size * u**0.5)
    zero = Linearization(net, {"weight": torch.zeros(1, 2).double()})
    assert automatic_epsilon(zero, across, torch.tensor([1.0, 0.0]).double(), "forward_difference") == pytest.approx(
        u**0.5
    )


@pytest.mark.parametrize("method", DIFFERENCES)
@pytest.mark.parametrize("left", [1e-9, 1e-12])
def test_an_automatic_step_is_not_lost_in_the_rounding_of_the_parameters(method, left):
    """An output that cancels: its size over its slope is 1e-9 or less, and θ + ε v̂ would be θ."""
    net, x = small(1), randn(1, 3)
    with torch.no_grad():
        net[2].bias -= net(x)[0] - left
    lin = Linearization(net)
    v = lin.vjp(x, torch.ones(1, 1).double())
    found = fisher_vector_product(lin, x, v, "gaussian", method)
    assert error(found, fisher_vector_product(lin, x, v, "gaussian")) < 0.1  # at ε = u‖θ‖; it was 1, or 0 for a product


@pytest.mark.parametrize(
    ("layer", "kinked"),
    [
        (nn.ReLU(), True), (nn.LeakyReLU(), True), (nn.PReLU(), True), (nn.Hardtanh(), True), (nn.ReLU6(), True),
        (nn.Hardswish(), True), (nn.Hardsigmoid(), True), (nn.Threshold(0.1, 0), True), (nn.Softshrink(), True),
        (nn.Hardshrink(), True), (nn.MaxPool1d(2), True), (nn.AdaptiveMaxPool1d(2), True), (nn.Tanh(), False),
        (nn.GELU(), False), (nn.SiLU(), False), (nn.Softmax(1), False), (nn.LogSoftmax(1), False),
        (nn.Softplus(), False), (nn.Sigmoid(), False), (nn.LayerNorm(4), False), (nn.ELU(), False),
        (nn.AvgPool1d(2), False),
    ],
)  # fmt: skip
def test_kinks_are_seen_in_the_graph(layer, kinked):
    net = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (1, 4)), layer, nn.Flatten()).double()
    assert curvature._has_kinks(Linearization(net), randn(1, 3)) == kinked


@pytest.mark.parametrize("method", [*LINEAR, *DIFFERENCES])
def test_zero_vectors_give_zero(method):
    net, x = small(), randn(5, 3)
    p = Linearization(net).num_params
    assert not fisher_vector_product(net, x, torch.zeros(p).double(), method=method).any()
    v = randn(p, 3)
    v[:, 1] = 0
    product = fisher_vector_product(net, x, v, method=method)
    assert not product[:, 1].any()
    assert product[:, [0, 2]].abs().sum(0).gt(0).all()
    assert fisher_vector_product(net, x, v[:, :0], method=method).shape == (p, 0)


# ------------------------------------------------------------------ any shape


@given(
    o=st.integers(1, 4),
    n=st.integers(1, 9),
    k=st.integers(1, 4),
    seed=st.integers(0, 99),
    cut=st.integers(1, 4),
    chunk_size=st.none() | st.integers(1, 4),
    method=st.sampled_from(LINEAR + DIFFERENCES),
    reduction=st.sampled_from(["sum", "mean"]),
    double=st.booleans(),
)
def test_any_shape(o, n, k, seed, cut, chunk_size, method, reduction, double):
    """Symmetric, positive semi-definite and linear in v, however examples are divided."""
    dtype, tolerance = (torch.double, TOLERANCE) if double else (torch.float, 1e-4)
    net, x = small(o, seed=seed, dtype=dtype), randn(n, 3, seed=seed).to(dtype)
    lin = Linearization(net)
    v, w = randn(lin.num_params, k, seed=seed + 1).to(dtype), randn(lin.num_params, k, seed=seed + 2).to(dtype)
    options = {"likelihood": "gaussian" if o == 1 else "categorical", "method": method, "reduction": reduction}
    product = fisher_vector_product(lin, x, v, **options)
    assert (product.shape, product.dtype) == (v.shape, dtype)
    batches = x.split(min(cut, n))
    if method in LINEAR:  # rounding is multiplied by ‖θ‖/ε in a difference: 1e-9 and 1e-3 or so
        divided = fisher_vector_product(net, iter(batches), v, **options, chunk_size=chunk_size)
        assert error(divided, product) < tolerance
        single = fisher_vector_product(lin, x, v[:, 0], **options)
        assert error(single, product[:, 0]) < tolerance
        other = fisher_vector_product(lin, x, w, **options)
        assert error(fisher_vector_product(lin, x, v + 2 * w, **options), product + 2 * other) < 3 * tolerance
        inner, scale = v.T @ other, v.norm() * other.norm()
        assert bool(((product.T @ w) - inner).abs().le(tolerance * scale).all())
        assert bool((v * product).sum(0).ge(-tolerance * v.norm() * product.norm()).all())
    tree = lin.unflatten(v[:, 0].contiguous())
    found = fisher_vector_product(lin, x, tree, **options)
    assert found.keys() == tree.keys()
    assert error(lin.flatten(found), product[:, 0]) < (tolerance if method in LINEAR else 1e-1)


@pytest.mark.parametrize("method", [*LINEAR, *DIFFERENCES])
def test_batches_with_labels(method):
    """A DataLoader's labels are no outputs: they are left out."""
    net, x = small(), randn(6, 3)
    v = randn(Linearization(net).num_params)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(6) % 3), batch_size=4)
    want = fisher_vector_product(net, x, v, method=method)
    limit = TOLERANCE if method in LINEAR else 1e-6  # rounding over the step
    assert error(fisher_vector_product(net, loader, v, method=method), want) < limit
    want = empirical_fisher_vector_product(net, x, torch.arange(6) % 3, v)
    assert error(empirical_fisher_vector_product(net, loader, None, v), want) < TOLERANCE
    y = (torch.arange(6) % 3).split(2)
    assert error(empirical_fisher_vector_product(net, x.split(2), y, v, chunk_size=1), want) < TOLERANCE


def test_groups_of_vectors(monkeypatch):
    """As many vectors at a time as fit, alone where one fits; sums are the same, and samples too."""
    net, x = small(), randn(7, 3)
    v = randn(Linearization(net).num_params, 5)
    calls = [
        lambda: fisher_vector_product(net, x, v),
        lambda: monte_carlo_fisher_vector_product(net, x, v, samples=2, chunk_size=3),
    ]
    want = [call() for call in calls]
    for nbytes in (1, 2_000, 5_000):
        for module in (curvature, linearize):
            monkeypatch.setattr(module, "working_memory", lambda device, nbytes=nbytes: nbytes)
        for call, product in zip(calls, want):
            assert error(call(), product) < TOLERANCE


# ------------------------------------------------------------------ Monte Carlo


def test_monte_carlo_is_the_empirical_fisher_at_its_labels(monkeypatch):
    net, x = small(), randn(8, 3)
    v = randn(Linearization(net).num_params, 2)
    drawn = []
    likelihood = get_likelihood("categorical")
    original = type(likelihood).sample

    def sample(self, f, generator=None):
        drawn.append(original(self, f, generator))
        return drawn[-1]

    monkeypatch.setattr(type(likelihood), "sample", sample)
    product = monte_carlo_fisher_vector_product(net, x, v, samples=3, seed=5)
    y = torch.stack(drawn)
    assert y.shape == (8, 3)
    want = sum(empirical_fisher_vector_product(net, x, column, v) for column in y.T) / 3
    assert error(product, want) < TOLERANCE
    for batches, size in ((x, 1), (x, 3), (x.split(3), None), (x.split([1, 5, 2]), 2)):
        again = monte_carlo_fisher_vector_product(net, batches, v, samples=3, seed=5, chunk_size=size)
        assert error(again, product) < TOLERANCE
    assert error(monte_carlo_fisher_vector_product(net, x, v, samples=3, seed=6), product) > 1e-3


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_monte_carlo_is_unbiased(likelihood):
    """Means over seeds within four standard errors, entry by entry of two products."""
    likelihood = get_likelihood(likelihood)
    net, x = small(likelihood.num_outputs or 3, widths=(3, 2)), randn(4, 3)
    v = randn(Linearization(net).num_params, 2)
    draws = torch.stack(
        [monte_carlo_fisher_vector_product(net, x, v, likelihood, samples=20, seed=seed) for seed in range(60)]
    )
    spread = draws.std(0) / 60**0.5
    z = (draws.mean(0) - fisher_vector_product(net, x, v, likelihood)) / spread
    assert float(z.abs().max()) < 4
    assert float(z.square().mean()) > 0.05  # and it does vary


# ------------------------------------------------------------------ precisions


@pytest.mark.parametrize("method", [*LINEAR, *DIFFERENCES])
def test_precisions(method):
    """float32 to some roundings, differences to what their step leaves; halves keep sums in float32."""
    net, x = small(seed=1), randn(50, 3)
    v = randn(Linearization(net).num_params)
    want = fisher_vector_product(net, x, v)
    single = fisher_vector_product(net.float(), x.float(), v.float(), method=method)
    assert error(single.double(), want) < (1e-5 if method in LINEAR else 2e-2)
    for dtype, limit in ((torch.bfloat16, 3e-2), (torch.float16, 5e-3)):
        half = net.to(dtype), x.to(dtype), v.to(dtype)
        if method in LINEAR:
            found = fisher_vector_product(*half, method=method)
            assert found.dtype == dtype
            assert error(found.double(), want) < limit
            # 600 equal parts: a sum in bfloat16 stops growing after some 256 of them.
            one = fisher_vector_product(half[0], half[1][:1], half[2], method=method)
            many = fisher_vector_product(half[0], [half[1][:1]] * 600, half[2], method=method, reduction="mean")
            assert error(many, one) < 0.01  # a rounding
        else:
            with pytest.raises(ValueError, match=rf"needs float32 or float64: {dtype} has too few digits"):
                fisher_vector_product(*half, method=method)


# ------------------------------------------------------------------ nothing changes


@pytest.mark.parametrize("method", [*LINEAR, *DIFFERENCES])
@pytest.mark.parametrize("exception", [RuntimeError("broken"), KeyboardInterrupt()])
def test_nothing_changes_whatever_flies(method, exception):
    net, x = Failing(exception).double(), randn(6, 3)
    net.layer.bias.grad = randn(2)
    net.layer.weight.grad = None
    lin = Linearization(net)
    v = randn(lin.num_params)
    before = {name: value.detach().clone() for name, value in net.state_dict().items()}
    versions = {name: value._version for name, value in net.state_dict(keep_vars=True).items()}
    grad, random = net.layer.bias.grad.clone(), torch.get_rng_state()
    failed = 0
    for target in (net, lin):
        for left in [*range(14), math.inf]:
            net.left = left
            try:
                product = fisher_vector_product(target, x, v, method=method, chunk_size=2)
                assert (product.requires_grad, product.grad_fn) == (False, None)
            except (RuntimeError, KeyboardInterrupt) as error:
                assert error is exception  # noqa: PT017 - both
                failed += 1
            for name, value in net.state_dict(keep_vars=True).items():
                assert torch.equal(value, before[name])
                assert value._version == versions[name]
                assert value.requires_grad == (name != "scale")
            assert torch.equal(net.layer.bias.grad, grad)
            assert net.layer.weight.grad is None
            assert net.training
            assert torch.equal(torch.get_rng_state(), random)
            assert torch.is_grad_enabled()
    assert failed > 6


@pytest.mark.parametrize("method", [*LINEAR, *DIFFERENCES])
def test_modes(method):
    net, x = small(), randn(6, 3)
    v = randn(Linearization(net).num_params, 2)
    want = fisher_vector_product(net, x, v, method=method)
    with torch.no_grad():
        assert torch.equal(fisher_vector_product(net, x, v, method=method), want)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        inside = x.clone()
        for given in (inside, [inside[:4], inside[4:]]):
            found = fisher_vector_product(net, given, v.clone(), method=method)
            assert error(found, want) < (TOLERANCE if method in LINEAR else 1e-6)  # rounding over the step
        y = torch.arange(6) % 3
        empirical_fisher_vector_product(net, inside, y, v)
        empirical_fisher_vector_product(net, [inside], [y], v)
    leaf, vector = x.clone().requires_grad_(), v.clone().requires_grad_()
    product = fisher_vector_product(net, leaf, vector, method=method)
    assert torch.equal(product, want)
    assert not product.requires_grad
    noisy = Gaussian(torch.tensor(0.5, dtype=torch.double, requires_grad=True))
    assert not fisher_vector_product(net, x, v, noisy, method).requires_grad


# ------------------------------------------------------------------ the operator


class Fisher:
    make = staticmethod(lambda lin, x, x2: FisherOperator(lin, x.detach(), "gaussian"))
    dense = staticmethod(lambda j, j2: j.T @ j)


class TestFisherOperator(Fisher, SemidefiniteCase):
    """Everything that GaussNewtonOperator does, as H = 1; the gradients in x are not there."""

    def test_gradients(self, name):
        net, x = build(name)
        op, dense = FisherOperator(net, x.requires_grad_(x.is_floating_point()), "gaussian"), self.both(name)[1]
        v, weights = randn(len(dense), 3).requires_grad_(), randn(len(dense), 3)
        for output in ((weights * (op @ v)).sum(), (v * (op.mT @ weights)).sum()):
            assert error(torch.autograd.grad(output, v)[0], dense @ weights) < TOLERANCE
        quadratic = (v * (op @ v)).sum()
        first = torch.autograd.grad(quadratic, v, create_graph=True)[0]
        assert error(first, 2 * dense @ v) < TOLERANCE
        assert error(torch.autograd.grad((first * weights).sum(), v)[0], 2 * dense @ weights) < TOLERANCE
        assert not op.requires_grad

    def test_gradients_of_solves(self, name):
        op, dense = self.shifted(name)
        y = randn(len(dense), 2).requires_grad_()
        got = torch.autograd.grad((y * op.solve(y)).sum(), y)[0]
        assert error(got, 2 * torch.linalg.solve(dense, y)) < 1e-11  # κ of about 100


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_operator_with_another_h(name, reduction):
    net, x = build(name)
    likelihood = Gaussian(0.3) if name == "one output" else get_likelihood("categorical")
    dense = dense_fisher(net, x, likelihood) / (len(x) if reduction == "mean" else 1)
    for method in (*LINEAR, *DIFFERENCES):
        op = FisherOperator(net, x, likelihood, method=method, reduction=reduction)
        v = randn(len(dense), 2)
        limit = TOLERANCE if method in LINEAR else 1e-5  # forward differences: about the root of rounding
        for _ in range(2):
            assert error(op @ v, dense @ v) < limit
            assert error(op @ v[:, 0], dense @ v[:, 0]) < limit
        for got, want in (
            (op.to_dense(), dense),
            (op.diagonal(), dense.diagonal()),
            (op[torch.tensor([1, 2]), torch.tensor([0, 2])], dense[[1, 2], [0, 2]]),
            (op.expand(2, *op.shape).root_decomposition().to_dense(), dense.expand(2, -1, -1)),
        ):
            assert float((got - want).abs().max()) < TOLERANCE * float(dense.abs().max())
    assert isinstance(op, GaussNewtonOperator)
    assert torch.linalg.eigvalsh(op.to_dense()).min() > -TOLERANCE * float(dense.abs().max())


def test_the_operator_runs_the_network_as_often_as_it_must():
    """Once a product for "exact"; once or twice for differences, whose outputs at θ are kept."""
    calls = []

    class Counting(nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    net, x = Counting(3, 2).double(), randn(6, 3)
    for method, times in (("exact", 1), ("double_backward", 1), ("forward_difference", 1), ("central_difference", 2)):
        epsilon = 0.1 if method in DIFFERENCES else "auto"  # an automatic step takes passes of its own
        op = FisherOperator(net, x, method=method, epsilon=epsilon)
        op @ randn(8)
        calls.clear()
        op @ randn(8)
        assert calls == [6] * times


@pytest.mark.parametrize("method", [*LINEAR, *DIFFERENCES])
@pytest.mark.parametrize("k", [1, 4])
def test_memory_is_bounded_in_n(method, k, monkeypatch):
    """Nothing with an entry an example and channel is formed beyond a chunk's; x itself has 25 times 2 an example."""
    net, _ = build("convolutions")
    for module in (curvature, linearize):
        monkeypatch.setattr(module, "working_memory", lambda device: 400_000)
    lin = Linearization(net)
    v = randn(lin.num_params, k)
    sizes = []
    for n in (400, 1600):
        x = randn(n, 2, 5, 5)
        batches = x.split(400)
        with Largest() as largest:
            fisher_vector_product(lin, batches, v, method=method)
        sizes.append(largest.numel)
    assert sizes[0] == sizes[1]
    with Largest() as largest:
        fisher_vector_product(lin, x, v, method=method)
    assert largest.numel <= x.numel()  # the check that x is finite
    with Largest() as largest:
        fisher_vector_product(lin, x, v, method=method, chunk_size=1600)
    assert largest.numel > x.numel()  # the counter works: 3 channels of 25 an example


def test_samples_count_in_the_memory(monkeypatch):
    net, x = small(), randn(400, 3)
    v = randn(Linearization(net).num_params)
    for module in (curvature, linearize):
        monkeypatch.setattr(module, "working_memory", lambda device: 400_000)
    with Largest() as largest:
        monte_carlo_fisher_vector_product(net, x, v, samples=100)
    assert largest.numel < 400_000 // 8  # all draws at once: 120,000


# ------------------------------------------------------------------ errors


def test_errors():
    net, x = small(), randn(5, 3)
    p = Linearization(net).num_params
    v, y = randn(p), torch.arange(5) % 3
    tree = Linearization(net).unflatten(v)
    for call, message in (
        (lambda: fisher_vector_product(net, x, v, method="fast"), r"method: expected one of 'exact', .*got 'fast'"),
        (lambda: FisherOperator(net, x, method="fast"), r"method: expected one of 'exact', .*got 'fast'"),
        (lambda: fisher_vector_product(net, x, v, reduction="none"), r"reduction: expected one of 'sum', 'mean', got"),
        (lambda: FisherOperator(net, x, reduction="none"), r"reduction: expected one of 'sum', 'mean', got"),
        (lambda: fisher_vector_product(net, x, v, "normal"), r"likelihood: expected one of 'gaussian'.* got 'normal'"),
        (lambda: fisher_vector_product(net, x, v, "bernoulli"), r"f: Bernoulli expects .*\(n, 1\), got \(5, 3\)"),
        (lambda: fisher_vector_product(net, x, v[1:]), rf"v: expected \({p},\) or \({p}, k\), got \({p - 1},\)"),
        (lambda: fisher_vector_product(net, x, v[None, None]), r"v: expected .*got \(1, 1, "),
        (lambda: fisher_vector_product(net, x, v.float()), r"v: expected torch.float64.*got torch.float32"),
        (lambda: fisher_vector_product(net, x, {"a": v}), r"expected the entries .*got \['a'\]"),
        (
            lambda: fisher_vector_product(net, x, {k: a.mT if a.ndim == 2 else a for k, a in tree.items()}),
            r"0.weight: expected shape \(5, 3\), got \(3, 5\)",
        ),
        (lambda: empirical_fisher_vector_product(net, x.split(2), y, v), r"y: expected mini-batches .*got one tensor"),
        (lambda: fisher_vector_product(net, x, v, chunk_size=0), r"chunk_size: expected a positive number .*got 0"),
        (lambda: fisher_vector_product(net, [], v), r"x: expected at least one mini-batch, got none"),
        (lambda: fisher_vector_product(net, x.float(), v), r"x: expected torch.float64"),
        (lambda: fisher_vector_product(net, x, v, epsilon=0.1), r"epsilon: the method 'exact' takes no step"),
        (lambda: fisher_vector_product(net, x, v, method="double_backward", epsilon=0.1), r"takes no step"),
        (lambda: monte_carlo_fisher_vector_product(net, x, v, samples=0), r"samples: expected a positive .*got 0"),
        (lambda: empirical_fisher_vector_product(net, x, y[:4], v), r"y: expected 5 of them.*got 4"),
        (lambda: empirical_fisher_vector_product(net, x, None, v), r"y: expected labels: pass y, or"),
        (lambda: empirical_fisher_vector_product(net, [x, x], [y], v), r"zip\(\) argument 2 is shorter"),
        (lambda: empirical_fisher_vector_product(net, x, y + 1, v), r"y: expected classes from 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for epsilon in (0.0, -1.0, math.nan, math.inf, "small"):
        with pytest.raises(ValueError, match=r"epsilon: expected a positive, finite number or 'auto', got"):
            fisher_vector_product(net, x, v, method="central_difference", epsilon=epsilon)
    with pytest.raises(ValueError, match=r"BatchNorm1d '1' is in train mode"):
        fisher_vector_product(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double(), x, randn(12))


def test_an_operator_in_a_line():
    op = FisherOperator(small(), randn(5, 3), reduction="mean")
    want = f"FisherOperator({op.shape[0]} x {op.shape[0]}, 5 examples, likelihood=Categorical, method='exact', "
    assert repr(op) == want + "reduction='mean')"


def test_one_class_is_an_error_and_not_a_matrix_of_zeros():
    net, x = nn.Linear(3, 1).double(), randn(5, 3)
    calls = [lambda method=method: fisher_vector_product(net, x, randn(4), method=method) for method in fisher.METHODS]
    calls += [lambda: FisherOperator(net, x) @ randn(4), lambda: FisherOperator(net, x).to_dense()]
    calls += [lambda: fisher_diagonal(net, x), lambda: monte_carlo_fisher_vector_product(net, x, randn(4))]
    for call in calls:
        with pytest.raises(ValueError, match=r'two classes, got one.*"bernoulli"'):
            call()


def test_what_cannot_fit_is_refused(monkeypatch):
    op = FisherOperator(small(), randn(5, 3))
    monkeypatch.setattr("ntkbook.memory.available_memory", lambda device: 1_000)
    with pytest.raises(MemoryError, match=r"Use its products, its diagonal"):
        op.to_dense()


def test_the_dense_oracle_is_a_jacobian_product():
    """The oracle of H = 1 against the loop of autograd itself."""
    net, x = build("tanh")
    j = loop_jacobian(net, x)
    assert error(dense_fisher(net, x, get_likelihood("gaussian")), j.T @ j) < TOLERANCE
