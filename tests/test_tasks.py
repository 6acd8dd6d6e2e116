"""Many tasks: hyperparameters of each and gaps of their own, against the formulas and against one task at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import accurate_gp, dense_gp
from torch import nn

from ntkbook import NTKGP, Iterative, Linearization, TaskHyperparameters, gp, tasks
from ntkbook import hyperparameters as hyperparameter_module
from ntkbook.experiments.networks import mlp
from ntkbook.posterior import Posterior

NAN = torch.nan
undetermined_too = pytest.mark.filterwarnings("ignore:fit.*determine:UserWarning")


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def network(outputs=1, width=9, inputs=2, seed=0, activation="tanh"):
    return mlp([inputs, width, outputs], activation, seed=seed, dtype=torch.double)


def curves(x, count, outputs=1, seed=0, noise=0.1):
    """Tasks with a level, a size and a noise of their own: (T, n, o)."""
    level, size, shift = draw(3, count, 1, outputs, seed=seed)
    spread = noise * draw(count, 1, 1, seed=seed + 1).exp()
    y = level + size.exp() * torch.sin(1.5 * x[:, :1] + shift)
    return y + spread * draw(count, len(x), outputs, seed=seed + 2)


def gaps(y, share=0.1, seed=5):
    holes = torch.rand(y.shape, generator=torch.Generator().manual_seed(seed)) < share
    return y.masked_fill(holes, NAN)


def hyperparameters(count, seed=0):
    return TaskHyperparameters(draw(count, seed=seed).exp(), 0.1 * draw(count, seed=seed + 1).exp())


def alone(net, x, y, scale, noise, constant=None, mean="zero"):
    """`condition` on one task."""
    one = NTKGP(net, outputscale=float(scale), noise=float(noise), mean=mean)
    one.constant = constant
    return one.condition(x, y)


def assert_same(many, t, one, x_star, prior, tolerance=1e-8):
    """Task t of a posterior of many, and a posterior of one task: relative to the prior's size."""
    mean = one(x_star).mean
    assert (many(x_star).mean[t] - mean).abs().max() <= tolerance * max(prior, float(mean.abs().max()))
    assert (many.mean(x_star)[t] - mean).abs().max() <= tolerance * max(prior, float(mean.abs().max()))
    assert (many(x_star).covariance_matrix[t] - one(x_star).covariance_matrix).abs().max() <= tolerance * prior
    assert (many.variance(x_star)[t] - one.variance(x_star)).abs().max() <= tolerance * prior
    alpha, scale = many.weights[t], float(one.weights.nan_to_num().abs().amax())
    torch.testing.assert_close(alpha, one.weights, rtol=0, atol=1e-6 * scale, equal_nan=True)  # σ⁻² times the mean's
    want = float(one.log_marginal_likelihood)
    assert float(many.log_marginal_likelihood[t]) == pytest.approx(want, rel=tolerance, abs=tolerance)


# ------------------------------------------------------------------ conditioning


@given(
    count=st.integers(1, 6),
    n=st.integers(1, 20),
    o=st.integers(1, 3),
    width=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.1, 0.7]),
    log_noise=st.floats(-4, 1),
    seed=st.integers(0, 10**6),
)
def test_random_tasks_follow_the_formula(count, n, o, width, share, log_noise, seed):
    net = network(o, width, inputs=3, seed=seed, activation="relu" if seed % 2 else "tanh")
    x, x_star = draw(n, 3, seed=seed), draw(5, 3, seed=seed + 1)
    y = gaps(draw(count, n, o, seed=seed + 2), share, seed)
    scale = draw(count, seed=seed + 3).exp()
    each = TaskHyperparameters(scale, scale * 10**log_noise)
    many = NTKGP(net).condition_tasks(x, y if o > 1 else y[..., 0], hyperparameters=each)
    lin = Linearization(net)
    j, j_star = lin.jacobian(x), lin.jacobian(x_star)
    zero, zero_star = torch.zeros(n * o, dtype=j.dtype), torch.zeros(5 * o, dtype=j.dtype)
    latent, mean, variance = many(x_star), many.mean(x_star), many.variance(x_star)
    assert latent.mean.shape == mean.shape == variance.shape == ((count, 5) if o == 1 else (count, 5, o))
    for t in range(count):
        sigma2 = each.noise[t].expand(n * o)
        want = dense_gp.posterior(j, j_star, y[t].flatten(), sigma2, float(scale[t]), zero, zero_star)
        prior = float(scale[t] * j_star.square().sum(1).max())
        unit = max(prior, float(y[t].nan_to_num().square().max()))
        assert (latent.mean[t].flatten() - want[0]).abs().max() <= 1e-8 * unit
        assert (mean[t].flatten() - want[0]).abs().max() <= 1e-8 * unit
        assert (latent.covariance_matrix[t] - want[1]).abs().max() <= 1e-8 * prior
        assert (variance[t].flatten() - want[1].diagonal()).abs().max() <= 1e-8 * prior
        assert (variance >= 0).all()
        got = float(many.log_marginal_likelihood[t])
        assert got == pytest.approx(float(want[2]), rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_small_noise_leaves_variances_positive_and_right(share):
    """κ is 1e12: by Cholesky, variances are right to 1e-4 of the prior here, and clamped; these keep their digits."""
    net = network(width=40, inputs=1)
    x, x_star = torch.linspace(-2, 2, 60, dtype=torch.double)[:, None], draw(9, 1).clamp(-1.9, 1.9)
    y = gaps(curves(x, 4)[..., 0], share)
    noise = torch.full((4,), 1e-10, dtype=torch.double)
    many = NTKGP(net).condition_tasks(x, y, hyperparameters=TaskHyperparameters(torch.ones_like(noise), noise))
    lin = Linearization(net)
    j, j_star = lin.jacobian(x), lin.jacobian(x_star)
    for t in range(4):
        want = accurate_gp.posterior(j, j_star, y[t], noise[t].expand(60), 1.0)[1].diagonal()
        error = (many.variance(x_star)[t] - want).abs() / j_star.square().sum(1)
        assert error.max() <= 1e-9  # eps times √κ
        assert (many.variance(x_star)[t] > 0).all()


@pytest.mark.parametrize("mean", ["zero", "constant", "network", "function"])
def test_every_mean_and_its_own_constants(mean):
    net, x, x_star = network(2), draw(12, 2), draw(4, 2, seed=1)
    y = gaps(curves(x, 5, 2))
    constant = draw(5, 2, seed=7) if mean == "constant" else None
    function = lambda x: x.sum(1)[:, None] * torch.tensor([1.0, 2.0])  # noqa: E731
    many_gp = NTKGP(net, mean=function if mean == "function" else mean)
    each = hyperparameters(5)._replace(constant=constant)
    many = many_gp.condition_tasks(x, y, hyperparameters=each)
    for t in range(5):
        c = None if constant is None else constant[t]
        one = alone(net, x, y[t], each.outputscale[t], each.noise[t], c, many_gp.mean)
        assert_same(many, t, one, x_star, float(one._gp(x_star).variance.max()))
        got, want = many.predictive(x_star).covariance_matrix[t], one.predictive(x_star).covariance_matrix
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    if mean == "constant":  # without constants of their own they share the GP's
        many_gp.constant = draw(2, seed=8)
        many = many_gp.condition_tasks(x, y, hyperparameters=each._replace(constant=None))
        one = alone(net, x, y[1], each.outputscale[1], each.noise[1], many_gp.constant, mean)
        assert_same(many, 1, one, x_star, float(one._gp(x_star).variance.max()))


def test_many_patterns_share_one_eigendecomposition(monkeypatch):
    net = network(inputs=1, width=50)
    x, x_star = torch.linspace(-2, 2, 80, dtype=torch.double)[:, None], draw(5, 1)
    y = gaps(curves(x, 40)[..., 0])
    y[3] = NAN
    model = NTKGP(net, outputscale=0.7, noise=0.05)
    grams, sizes, factors = [], [], []
    gram, eigh, cholesky = Linearization.gram, torch.linalg.eigh, torch.linalg.cholesky_ex
    monkeypatch.setattr(Linearization, "gram", lambda *a, **k: grams.append(0) or gram(*a, **k))
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: sizes.append(tuple(a.shape)) or eigh(a))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: factors.append(0) or cholesky(a))
    many = model.condition_tasks(x, y)
    assert len(grams) == 1
    assert sizes[0] == (80, 80)
    assert [size[0] for size in sizes[1:]] == [40]
    assert sizes[1][1] <= 20  # the rank of the kernel, to rounding
    assert not factors
    for t in (0, 3, 39):
        assert_same(many, t, model.condition(x, y[t]), x_star, float(model(x_star).variance.max()))
    assert many.log_marginal_likelihood[3] == 0
    assert torch.equal(many.mean(x_star)[3], model(x_star).mean)
    assert torch.equal(many.log_marginal_likelihood_error, torch.zeros(40, dtype=torch.double))
    assert many.report is None
    assert many.solver == "eigh"
    monkeypatch.setattr(gp, "MANY_PATTERNS", 100)
    groups = model.condition_tasks(x, y)
    assert type(groups) is Posterior
    torch.testing.assert_close(many.mean(x_star), groups.mean(x_star), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(many.variance(x_star), groups.variance(x_star), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(many.log_marginal_likelihood, groups.log_marginal_likelihood, rtol=1e-10, atol=1e-10)


def test_when_patterns_keep_factors_of_their_own():
    """Gradients in the data, noise per point and a kernel of full rank."""
    net, x = network(inputs=1, width=50), torch.linspace(-2, 2, 80, dtype=torch.double)[:, None]
    y = gaps(curves(x, 40)[..., 0])
    model = NTKGP(net, noise=0.05)
    assert type(model.condition_tasks(x, y)) is tasks.TaskPosterior
    assert type(model.condition_tasks(x, y, noise=0.3)) is tasks.TaskPosterior
    assert type(model.condition_tasks(x, y.clone().requires_grad_())) is Posterior
    assert type(model.condition_tasks(x.clone().requires_grad_(), y)) is Posterior
    assert type(model.condition_tasks(x, y, noise=torch.full((80,), 0.05))) is Posterior
    wide = draw(20, 30, seed=1)
    full_rank = NTKGP(network(inputs=30, width=30), noise=0.05)
    assert type(full_rank.condition_tasks(wide, gaps(draw(40, 20), 0.2))) is Posterior
    got = model.condition_tasks(x, y, noise=0.3).predictive(x[:3])
    want = model.condition(x, y[2], noise=0.3).predictive(x[:3])
    torch.testing.assert_close(got.covariance_matrix[2], want.covariance_matrix, rtol=1e-8, atol=1e-9)
    got = model.condition_tasks(x, y, noise=0.3).predictive(x[:3], noise=torch.tensor([0.1, 0.2, 0.3]))
    want = model.condition(x, y[2], noise=0.3).predictive(x[:3], noise=torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(got.covariance_matrix[2], want.covariance_matrix, rtol=1e-8, atol=1e-9)


def test_samples_and_derivatives_at_new_inputs():
    net, x, x_star = network(2), draw(6, 2), draw(2, 2, seed=1)
    many = NTKGP(net).condition_tasks(x, gaps(draw(3, 6, 2), 0.3), hyperparameters=hyperparameters(3))
    a = x_star.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: many(a).mean, (a,))
    assert torch.autograd.gradcheck(lambda a: many(a).covariance_matrix, (a,))
    assert torch.autograd.gradcheck(many.variance, (a,))
    draws = many.sample(x_star, 4000, generator=torch.Generator().manual_seed(0))
    assert draws.shape == (4000, 3, 2, 2)
    deviation = many.variance(x_star).sqrt()
    assert ((draws.mean(0) - many.mean(x_star)).abs() <= 5 * deviation / math.sqrt(4000)).all()


# ------------------------------------------------------------------ fitting


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("mean", ["zero", "constant", "network", "function"])
def test_each_fit_is_what_it_is_alone(activation, share, mean):
    net = network(inputs=1, width=30, activation=activation)
    x = torch.linspace(-2, 2, 40, dtype=torch.double)[:, None]
    y = gaps(curves(x, 6)[..., 0], share)
    y[4] += 100  # a level that a constant takes
    model = NTKGP(net, mean=(lambda x: x[:, 0]) if mean == "function" else mean)
    found = model.fit_tasks(x, y)
    assert found.determined.all()
    assert (model.outputscale, model.noise, model.constant) == (1.0, 1e-2, None)
    many = model.condition_tasks(x, y, hyperparameters=found)
    for t in range(6):
        one = NTKGP(net, mean=model.mean).fit(x, y[t])
        best = float(one.condition(x, y[t]).log_marginal_likelihood)
        assert float(many.log_marginal_likelihood[t]) == pytest.approx(best, abs=1e-6)
        # The maximum is flat: its arguments are known to the square root of what its value is.
        assert float(found.outputscale[t]) == pytest.approx(one.outputscale, rel=1e-3)
        assert float(found.noise[t]) == pytest.approx(one.noise, rel=1e-3)
        if mean == "constant":
            assert float(found.constant[t]) == pytest.approx(float(one.constant), rel=1e-3)
    assert (found.constant is None) == (mean != "constant")


@pytest.mark.parametrize("constant", [False, True])
def test_fits_reach_what_brute_force_does(constant):
    net, x = network(inputs=1, width=12, seed=2), torch.linspace(-2, 2, 25, dtype=torch.double)[:, None]
    y = gaps(curves(x, 3)[..., 0])[[0, 2] if constant else [0, 1]]
    model = NTKGP(net, mean="constant" if constant else "zero")
    many = model.condition_tasks(x, y, hyperparameters=model.fit_tasks(x, y))
    for t in range(2):
        seen = ~y[t].isnan()
        brute = dense_gp.fitted(Linearization(net).jacobian(x[seen]), y[t, seen], constant)
        assert float(many.log_marginal_likelihood[t]) >= brute["log_likelihood"] - 1e-7


@given(
    count=st.integers(1, 4),
    n=st.integers(2, 15),
    o=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.1, 0.5]),
    constant=st.booleans(),
    seed=st.integers(0, 10**6),
)
@undetermined_too
def test_random_fits_are_as_good_as_alone(count, n, o, share, constant, seed):
    net, x = network(o, 8, inputs=2, seed=seed), draw(n, 2, seed=seed)
    y = gaps(curves(x, count, o, seed=seed), share, seed)
    mean = "constant" if constant else "zero"
    model = NTKGP(net, mean=mean)
    found = model.fit_tasks(x, y if o > 1 else y[..., 0])
    for t in range(count):
        if not found.determined[t]:
            continue
        one = NTKGP(net, mean=mean).fit(x, y[t] if o > 1 else y[t, :, 0])
        got = alone(net, x, y[t], found.outputscale[t], found.noise[t], constant and found.constant[t], mean)
        want = one.condition(x, y[t])
        # Both values are a Cholesky factor's, rounded by up to κ eps of them.
        assert float(got.log_marginal_likelihood) >= float(want.log_marginal_likelihood) - 1e-6


@undetermined_too
def test_an_output_that_was_never_seen_has_no_constant():
    net, x = network(2), draw(20, 2)
    y = curves(x, 3, 2)
    y[1, :, 1] = NAN
    found = NTKGP(net, mean="constant").fit_tasks(x, y)
    one = NTKGP(net, mean="constant").fit(x, y[1])
    assert found.constant[1, 1] == one.constant[1] == 0
    assert float(found.constant[1, 0]) == pytest.approx(float(one.constant[0]), rel=1e-3)


def test_tasks_that_determine_nothing_keep_what_the_gp_has():
    net, x, x_star = network(), draw(30, 2), draw(4, 2, seed=1)
    y = curves(x, 6)[..., 0]
    y[1], y[2, 1:], y[3], y[4] = NAN, NAN, 2.5, draw(30, seed=3)
    model = NTKGP(net, outputscale=0.6, noise=0.2, mean="constant")
    model.constant = torch.tensor([0.4], dtype=torch.double)
    with pytest.warns(UserWarning, match=r"4 of 6 tasks do not .* 3 of them have fewer than two") as caught:
        found = model.fit_tasks(x, y)
    assert len(caught) == 1
    assert found.determined.tolist() == [True, False, False, False, False, True]
    assert found.outputscale[1:4].tolist() == [0.6] * 3
    assert found.noise[1:4].tolist() == [0.2] * 3
    assert found.constant[1:4, 0].tolist() == [0.4] * 3
    with pytest.warns(UserWarning, match="grows up to the end of the search"):  # as it does alone
        one = NTKGP(net, mean="constant").fit(x, y[4])
    assert float(found.noise[4]) == pytest.approx(one.noise, rel=1e-6)
    many = model.condition_tasks(x, y, hyperparameters=found)
    assert torch.equal(many.mean(x_star)[1], model(x_star).mean)
    torch.testing.assert_close(many.variance(x_star)[1], model(x_star).variance, rtol=1e-12, atol=0)
    assert many.log_marginal_likelihood[1] == 0


def test_one_task_one_point_equal_tasks_and_a_dead_kernel():
    net, x = network(), draw(20, 2)
    y = curves(x, 1)[..., 0]
    model = NTKGP(net)
    one = model.fit_tasks(x, y)
    same = model.fit_tasks(x, y.expand(5, -1))
    for got, want in zip(same[:2], one[:2]):
        torch.testing.assert_close(got, want.expand(5), rtol=1e-6, atol=0)
    with pytest.warns(UserWarning, match="1 of 1 tasks do not determine"):
        point = model.fit_tasks(x[:1], y[:, :1])
    posterior = model.condition_tasks(x[:1], y[:, :1], hyperparameters=point)
    assert_same(posterior, 0, model.condition(x[:1], y[0, :1]), x, float(model(x).variance.max()))
    dead = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False)).double()
    with torch.no_grad():
        dead[0].bias.fill_(-100)
    with pytest.warns(UserWarning, match="1 of 1 tasks do not determine"):
        nothing = NTKGP(dead).fit_tasks(x, y)
    assert torch.equal(NTKGP(dead).condition_tasks(x, y, hyperparameters=nothing).variance(x), torch.zeros_like(y))


@undetermined_too
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_fit_costs_one_gram_matrix_and_one_eigendecomposition_of_its_size(monkeypatch, share):
    net, x = network(), draw(30, 2)
    y = gaps(curves(x, 20)[..., 0], share)
    grams, sizes, gram, eigh = [], [], Linearization.gram, torch.linalg.eigh
    monkeypatch.setattr(Linearization, "gram", lambda *a, **k: grams.append(0) or gram(*a, **k))
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: sizes.append(tuple(a.shape)) or eigh(a))
    NTKGP(net).fit_tasks(x, y)
    assert len(grams) == 1
    assert sizes[0] == (30, 30)
    assert [size[0] for size in sizes[1:]] == [len(torch.unique(y.isnan(), dim=0))]


@undetermined_too
def test_chunks_of_tasks_do_not_matter(monkeypatch):
    net, x, x_star = network(), draw(20, 2), draw(5, 2, seed=1)
    y = gaps(curves(x, 7)[..., 0])
    model = NTKGP(net, mean="constant")

    def results():
        found = model.fit_tasks(x, y)
        many = model.condition_tasks(x, y, hyperparameters=hyperparameters(7))
        moments = many.mean(x_star), many.variance(x_star), many.log_marginal_likelihood
        return *moments, found.outputscale, found.noise, found.constant

    want = results()
    sizes, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: sizes.append(len(a)) or eigh(a))
    for module in (tasks, hyperparameter_module):
        monkeypatch.setattr(module, "working_memory", lambda device: 1)
    got = results()
    assert set(sizes) == {20, 1}
    for one, two in zip(got[:3], want[:3]):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)
    for one, two in zip(got[3:], want[3:]):  # arguments of a flat maximum
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------ errors


def test_errors_say_what_to_do(monkeypatch):
    net, x, y = network(), draw(6, 2), draw(3, 6, seed=1)
    model, each = NTKGP(net), hyperparameters(3)
    with pytest.raises(ValueError, match=r"y: expected \(T, n\) or \(T, n, o\) with at least one task, got \(6,\)"):
        model.fit_tasks(x, y[0])
    with pytest.raises(
        ValueError, match=r"y: expected \(T, 6\) or \(T, 6, 1\) for 6 examples of 1 outputs, got \(3, 5\)"
    ):
        model.fit_tasks(x, y[:, :5])
    with pytest.raises(ValueError, match="it is part of hyperparameters; give one of the two"):
        model.condition_tasks(x, y, noise=0.1, hyperparameters=each)
    for solver in (NTKGP(net, solver="cg"), NTKGP(net, space="parameter"), NTKGP(net, solver=Iterative())):
        with pytest.raises(ValueError, match='expected space="function" and solver="cholesky", got an iterative'):
            solver.condition_tasks(x, y, hyperparameters=each)
    with pytest.raises(ValueError, match=r"hyperparameters.noise: expected \(3,\) positive, .* got \(2,\)"):
        model.condition_tasks(x, y, hyperparameters=each._replace(noise=each.noise[:2]))
    with pytest.raises(ValueError, match=r"hyperparameters.outputscale: .* got some that are not"):
        model.condition_tasks(x, y, hyperparameters=each._replace(outputscale=-each.outputscale))
    with pytest.raises(ValueError, match=r'constant: expected \(3, 1\) and a GP with mean="constant", got \(3, 1\)'):
        model.condition_tasks(x, y, hyperparameters=each._replace(constant=draw(3, 1)))
    with pytest.raises(ValueError, match="for 3 of 3 tasks it is below the rounding of the Gram matrix"):
        model.condition_tasks(x, y, hyperparameters=each._replace(noise=each.noise * 1e-18))
    monkeypatch.setattr("ntkbook.memory.available_memory", lambda device: 3_000)
    with pytest.raises(MemoryError, match=r"patterns of missing values, at rank .* Give fewer tasks at a time"):
        model.condition_tasks(x, gaps(y.repeat(30, 1), 0.3), hyperparameters=hyperparameters(90))
    monkeypatch.setattr("ntkbook.memory.available_memory", lambda device: 100)
    with pytest.raises(MemoryError, match="Conditioning on 6 values"):
        model.fit_tasks(x, y)
