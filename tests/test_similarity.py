"""similarity.py: diagonals against one autograd call an example and output, dense JᵀHJ, and curvlinops."""

import copy

import jaxtyping
import pytest
import torch
from curvlinops import EFLinearOperator, GGNLinearOperator
from hypothesis import given
from hypothesis import strategies as st
from oracles.jacobian import loop_jacobian
from oracles.largest import Largest
from oracles.networks import CASES, build
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ntkbook
from ntkbook import Linearization, similarity
from ntkbook.experiments.networks import lenet3, mlp
from ntkbook.finding import Found
from ntkbook.likelihoods import Gaussian, get_likelihood
from ntkbook.similarity import (
    by_layer,
    cosine_by_layer,
    cosine_similarity,
    empirical_fisher_diagonal,
    fisher_diagonal,
    jacobian_diagonal,
)

TOLERANCE = 1e-12  # of the largest entry, in float64
OUTPUTS = {"one output": 1, "vector output": 1}


@pytest.fixture(autouse=True)
def unfused_attention():
    """The fused kernel has no rule for vmap, and warns."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def error(got, want):
    """The largest difference, relative to the largest entry."""
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


def no_layers(lin, example):
    return Found([], list(lin.params))


def dense_fisher(net, x, likelihood):
    """The diagonal of the dense mean of JᵀHJ, H by `hessian`, not by the root that the library uses."""
    jacobian, f = loop_jacobian(net, x), net(x).detach()
    f = f[:, None] if f.ndim == 1 else f
    h = get_likelihood(likelihood).hessian(f)
    return (jacobian.T @ torch.block_diag(*h) @ jacobian).diagonal() / len(x)


def loop_empirical(net, x, y, likelihood):
    """One backward pass an example."""
    net, total = copy.deepcopy(net), 0
    for i in range(len(x)):
        net.zero_grad()
        f = net(x[i : i + 1].clone())
        get_likelihood(likelihood).log_prob(f[:, None] if f.ndim == 1 else f, y[i : i + 1]).sum().backward()
        values = [p for p in net.parameters() if p.requires_grad]
        total += torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in values]) ** 2
    return total / len(x)


def convolutions():
    """Strides, padding, dilation, kernels that are not square, no bias, and what has no rule."""
    return {
        "strided": nn.Sequential(nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), nn.Tanh(), nn.Flatten()),
        "dilated": nn.Sequential(nn.Conv2d(2, 3, 2, dilation=2, bias=False), nn.SiLU(), nn.Flatten(), nn.Linear(27, 2)),
        "grouped": nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten()),
        "circular": nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Flatten()),
        "same": nn.Sequential(nn.Conv2d(2, 2, 3, padding="same"), nn.Tanh(), nn.Flatten()),
        "bias alone": nn.Sequential(nn.Conv2d(2, 2, 3), nn.Tanh(), nn.Flatten()),
    }


@pytest.mark.parametrize("name", CASES)
def test_networks_of_every_kind(name):
    net, x = build(name)
    likelihood = "gaussian" if OUTPUTS.get(name) else "categorical"
    jacobian = loop_jacobian(net, x)
    assert error(jacobian_diagonal(net, x), jacobian.square().sum(0) / len(x)) < TOLERANCE
    assert error(fisher_diagonal(net, x, likelihood), dense_fisher(net, x, likelihood)) < TOLERANCE
    y = randn(len(x)) if likelihood == "gaussian" else torch.arange(len(x)) % 2
    expected = loop_empirical(net, x, y, likelihood)
    assert error(empirical_fisher_diagonal(net, x, y, likelihood), expected) < TOLERANCE


@pytest.mark.parametrize("name", convolutions())
def test_convolutions(name):
    net, x = convolutions()[name].double(), randn(5, 2, 5, 5)
    if name == "bias alone":
        net[0].weight.requires_grad_(False)
    for likelihood in ("categorical", Gaussian(0.3)):
        assert error(fisher_diagonal(net, x, likelihood), dense_fisher(net, x, likelihood)) < TOLERANCE


def test_lenet3_by_layers_and_by_examples(monkeypatch):
    net, x, y = lenet3(seed=1, dtype=torch.double), randn(7, 784).abs(), torch.arange(7)
    calls = [
        lambda: fisher_diagonal(net, x),
        lambda: jacobian_diagonal(net, x),
        lambda: empirical_fisher_diagonal(net, x, y),
    ]
    fast = [call() for call in calls]
    monkeypatch.setattr(similarity, "find_layers", no_layers)
    for call, one in zip(calls, fast):
        assert error(call(), one) < TOLERANCE
    assert error(fast[0], dense_fisher(net, x, "categorical")) < TOLERANCE
    assert error(fast[2], loop_empirical(net, x, y, "categorical")) < TOLERANCE


def test_lenet3_takes_the_layer_rule(monkeypatch):
    monkeypatch.setattr(similarity, "_by_examples", None)
    assert jacobian_diagonal(lenet3(), torch.rand(2, 784)).shape == (5142,)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "heteroscedastic", "bernoulli", "poisson"])
@pytest.mark.parametrize("generic", [False, True])
@given(n=st.integers(1, 9), width=st.integers(1, 6), scale=st.floats(0.1, 3), seed=st.integers(0, 99))
def test_every_likelihood(likelihood, generic, n, width, scale, seed):
    o = {"categorical": 4, "gaussian": 3, "heteroscedastic": 2}.get(likelihood, 1)
    net, x = mlp([2, width, o], seed=seed, dtype=torch.double), scale * randn(n, 2, seed=seed)
    f, kind = net(x).detach(), get_likelihood(likelihood)
    y = kind.sample(f, torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        if generic:
            patch.setattr(similarity, "find_layers", no_layers)
        true, empirical = fisher_diagonal(net, x, kind), empirical_fisher_diagonal(net, x, y, likelihood)
    assert error(true, dense_fisher(net, x, likelihood)) < TOLERANCE
    assert error(empirical, loop_empirical(net, x, y, likelihood)) < TOLERANCE


@pytest.mark.parametrize("name", ["tanh", "convolutions", "layer norm", "one output"])
def test_curvlinops_agrees(name):
    net, x = build(name)
    parameters = list(net.parameters())
    if name == "one output":  # their mean squared loss is half of a Gaussian's with noise 1/2, and so is its GGN
        y, loss, likelihood, factor = randn(len(x), 1), nn.MSELoss(), "gaussian", 2.0
    else:
        y, loss, likelihood, factor = torch.arange(len(x)) % 2, nn.CrossEntropyLoss(), "categorical", 1.0
    eye = torch.eye(sum(p.numel() for p in net.parameters()), dtype=torch.double)
    for operator, ours, scale in (
        (GGNLinearOperator, fisher_diagonal(net, x, likelihood), factor),
        (EFLinearOperator, empirical_fisher_diagonal(net, x, y, likelihood), factor**2),
    ):
        theirs = operator(net, loss, parameters, [(x, y)], check_deterministic=False) @ eye
        assert error(scale * ours, theirs.diagonal()) < TOLERANCE


def test_chunks_change_nothing_beyond_rounding(monkeypatch):
    for name in ("tanh", "layer norm"):
        net, x = build(name)
        whole = fisher_diagonal(net, x)
        for size in (1, 2, 4, 100):
            assert error(fisher_diagonal(net, x, chunk_size=size), whole) < 1e-14
            assert error(fisher_diagonal(Linearization(net, chunk_size=size), x), whole) < 1e-14
        y = torch.arange(len(x)) % 2
        assert error(
            empirical_fisher_diagonal(net, x, y, chunk_size=4), empirical_fisher_diagonal(net, x, y)
        ) < 1e-14  # fmt: skip
        monkeypatch.setattr(similarity, "working_memory", lambda device: 1)  # one example at a time
        assert error(fisher_diagonal(net, x), whole) < 1e-14


@pytest.mark.parametrize("name", ["convolutions", "tanh", "layer norm"])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_little_memory_only_makes_smaller_blocks_of_directions(name, chunk_size, monkeypatch):
    net, x = build(name)
    whole, blocks, block = fisher_diagonal(net, x), [], similarity._block
    monkeypatch.setattr(similarity, "_block", lambda *arguments: blocks.append(block(*arguments)) or blocks[-1])
    for budget in (1, *(int(1.15**k) for k in range(35, 85))):
        monkeypatch.setattr(similarity, "working_memory", lambda device, budget=budget: budget)
        assert error(fisher_diagonal(net, x, chunk_size=chunk_size), whole) < 1e-14
    assert {len(rows) for rows in blocks} == set(range(1, net(x).shape[1] + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", [True, False])
def test_many_outputs_stay_within_the_memory(rule, dtype, monkeypatch):
    """No tensor that an operation makes is larger than the budget, and nor are a convolution's gradients and copies."""
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 60)).to(dtype)
    x, made, took = randn(9, 2, 5, 5).to(dtype), similarity.gradient_rows, []

    def noted(feature):
        gradients = made(feature)
        took.append(gradients.numel() * (dtype.itemsize + (8 if dtype == torch.float32 else 0)))
        return gradients

    monkeypatch.setattr(similarity, "gradient_rows", noted)
    if not rule:
        monkeypatch.setattr(similarity, "find_layers", no_layers)
    with Largest() as freely:
        whole = jacobian_diagonal(net, x)
    for budget in (150_000, 300_000, 4_000_000):
        monkeypatch.setattr(similarity, "working_memory", lambda device, budget=budget: budget)
        took.clear()
        with Largest() as largest:
            diagonal = jacobian_diagonal(net, x)
        assert largest.nbytes <= budget < freely.nbytes or budget == 4_000_000
        assert bool(took) is rule
        assert max(took, default=0) <= budget
        assert error(diagonal.double(), whole.double()) < (1e-14 if dtype == torch.double else 1e-6)
    assert max(took, default=0) <= budget // 4  # examples share a quarter, where all their directions fit


def test_a_gradient_that_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr("ntkbook.memory.available_memory", lambda device: 100_000)
    for name in ("convolutions", "layer norm"):
        net, x = build(name)
        assert jacobian_diagonal(net, x).isfinite().all()
    wide = mlp([2, 2000, 1])
    assert jacobian_diagonal(wide, torch.ones(1, 2)).shape == (8001,)  # the layer rule forms none
    wide[0].register_forward_hook(lambda *arguments: None)
    with pytest.raises(MemoryError, match=r"One gradient of 8,001 parameters takes .*Linearise in fewer: params="):
        jacobian_diagonal(wide, torch.ones(1, 2))


def test_float32_sums_over_many_examples_in_float64():
    """Float32 rounds each example's share, to either side; sums in float32 would be off by more and more."""
    net, x = mlp([4, 8, 3], seed=2), randn(3000, 4).float()
    single = fisher_diagonal(net, x, chunk_size=1)
    assert single.dtype == torch.float32
    assert error(single.double(), fisher_diagonal(net.double(), x.double())) < 1e-7  # with float32 sums 1e-6


def test_a_linearisation_says_in_which_parameters_and_where():
    net, x = build("convolutions")
    names = ["4.weight", "7.bias"]
    expected = loop_jacobian(net, x, names).square().sum(0) / len(x)
    assert error(jacobian_diagonal(Linearization(net, names), x), expected) < TOLERANCE
    head = Linearization(net, ["7.weight", "7.bias"])
    zero = jacobian_diagonal(Linearization(net, {n: torch.zeros_like(v) for n, v in head.params.items()}), x)
    assert error(zero, jacobian_diagonal(head, x)) < TOLERANCE  # a last layer's features do not depend on it


def test_nothing_of_the_network_changes_and_no_gradient_is_left():
    net, x = lenet3(seed=1), torch.rand(3, 784, requires_grad=True)
    before = copy.deepcopy(net.state_dict())
    diagonal = fisher_diagonal(net, x)
    assert not diagonal.requires_grad
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    with torch.no_grad():
        assert torch.equal(fisher_diagonal(net, x), diagonal)
    with torch.inference_mode():
        assert torch.equal(fisher_diagonal(net, x.clone()), diagonal)


def test_layers_keep_weight_and_bias_together_in_the_order_of_the_parameters():
    net, x = lenet3(seed=1), torch.rand(4, 784)
    a, b = fisher_diagonal(net, x), jacobian_diagonal(net, x)
    parts = by_layer(net, a)
    assert {name: len(part) for name, part in parts.items()} == {"1": 156, "4": 2416, "8": 2570}
    assert torch.equal(torch.cat(list(parts.values())), a)
    cosines = cosine_by_layer(Linearization(net), a, b)
    assert cosines == {name: cosine_similarity(parts[name], by_layer(net, b)[name]) for name in parts}
    assert all(0 < value < 1 for value in cosines.values())
    assert list(by_layer(nn.Linear(2, 1), torch.ones(3))) == [""]


@given(pairs=st.lists(st.tuples(*[st.floats(-1e3, 1e3).map(lambda v: round(v, 3))] * 2), min_size=1, max_size=8))
def test_the_cosine_is_scale_free_symmetric_and_bounded(pairs):
    a, b = torch.tensor(pairs, dtype=torch.double).T
    if not a.any() or not b.any():
        with pytest.raises(ValueError, match="entries are zero, so it has no direction"):
            cosine_similarity(a, b)
        return
    cosine = cosine_similarity(a, b)
    assert -1 <= cosine <= 1
    assert cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-14)
    assert cosine == cosine_similarity(b, a)
    assert cosine_similarity(1e-200 * a, 1e200 * b) == pytest.approx(cosine, abs=1e-14)
    assert cosine_similarity(a, -a) == pytest.approx(-1, abs=1e-15)


def test_the_cosine_of_float32_is_computed_in_float64():
    a = torch.full((100_000,), 1e-30)  # whose squares are zero in float32
    b = a.clone()
    b[::2] = 0
    assert cosine_similarity(a, b) == pytest.approx(0.5**0.5, abs=1e-14)


def test_the_face_of_the_library():
    a, b = lenet3(seed=1), lenet3(seed=2)
    xa, xb = torch.rand(5, 784), torch.rand(6, 784)
    cosine = ntkbook.cosine_similarity(ntkbook.fisher_diagonal(a, xa), ntkbook.fisher_diagonal(b, xb))
    assert 0 < cosine < 1
    for name in ("by_layer", "cosine_by_layer", "empirical_fisher_diagonal", "jacobian_diagonal"):
        assert getattr(ntkbook, name) is getattr(similarity, name)


@pytest.mark.parametrize("shapes", [((3,), (2,)), ((2, 3), (2, 3)), ((), ())])
def test_the_cosine_is_of_two_vectors_of_one_length(shapes):
    jaxtyping.config.update("jaxtyping_disable", True)  # as outside tests
    try:
        with pytest.raises(ValueError, match=r"expected two vectors of one length, got \(.*\) and \("):
            cosine_similarity(*map(torch.ones, shapes))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_errors_say_what_to_do():
    net, x = lenet3(), torch.rand(3, 784)
    with pytest.raises(ValueError, match=r"y: expected 3 of them.*got 2"):
        empirical_fisher_diagonal(net, x, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="expected classes from 0 to 9"):
        empirical_fisher_diagonal(net, x, torch.tensor([0, 10, 1]))
    with pytest.raises(ValueError, match="likelihood: expected one of"):
        fisher_diagonal(net, x, "softmax")
    with pytest.raises(ValueError, match=r"expects floating-point outputs \(n, 2\)"):
        fisher_diagonal(net, x, "heteroscedastic")
    with pytest.raises(ValueError, match="1 of 3 examples hold NaN"):
        fisher_diagonal(net, torch.where(torch.arange(3)[:, None] == 1, torch.nan, x))
    with pytest.raises(ValueError, match="2 of 3 examples hold NaN or infinities"):
        jacobian_diagonal(net, torch.where(torch.arange(3)[:, None] > 0, -torch.inf, x))
    with pytest.raises(ValueError, match="chunk_size: expected a positive number"):
        jacobian_diagonal(net, x, chunk_size=0)
    with pytest.raises(ValueError, match=r"train mode.*net.eval\(\)"):
        fisher_diagonal(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), torch.rand(3, 4))
    with pytest.raises(ValueError, match=r"v: expected \(5142,\), one entry a parameter, got \(3,\)"):
        by_layer(net, torch.ones(3))
    b = torch.ones(5142)
    b[156:2572] = 0
    with pytest.raises(ValueError, match="layer '4': b: all 2416 entries are zero"):
        cosine_by_layer(net, torch.ones(5142), b)
    with pytest.raises(ValueError, match="a: expected finite entries, got 1 others"):
        cosine_similarity(torch.tensor([1.0, torch.inf]), torch.ones(2))
