"""Parameter space and conjugate gradients: Cholesky's posterior, and where truncated, errors upwards only."""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import accurate_gp
from oracles.largest import Largest

from ntkbook import NTKGP, ConvergenceWarning, Iterative, Linearization
from ntkbook.experiments.networks import mlp
from ntkbook.krylov import Subspace, Whitened, conjugate_gradients, quadrature

SPACES = [
    pytest.param({"space": "parameter"}, id="parameter"),
    pytest.param({"solver": "cg"}, id="function"),
]
ROUNDING = 1e-12  # of the prior variance: how far below the truth a variance may lie by rounding alone


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def network(outputs=1, width=9, inputs=2, seed=0):
    return mlp([inputs, width, width, outputs], "tanh", seed=seed, dtype=torch.double)


def jacobians(net, *inputs):
    lin = Linearization(net)
    return [lin.jacobian(x) for x in inputs]


def condition_number(jacobian, scale, noise):
    return 1 + scale * float(torch.linalg.matrix_norm(jacobian, 2)) ** 2 / float(noise.min())


def with_solver(kind, **options):
    return {**kind, "solver": Iterative(**options)}


# ------------------------------------------------------------------ the oracle itself


@pytest.mark.parametrize("noise", [1e-1, 1e-6])
def test_the_oracle_is_accurate_where_the_dense_formula_is_not(noise):
    net, x, x_star = network(width=4), draw(12, 2), draw(3, 2, seed=1)
    j, j_star = jacobians(net, x, x_star)
    y, sigma2 = draw(12, seed=2), torch.full((12,), noise, dtype=torch.double)
    mean, covariance, evidence = accurate_gp.posterior(j, j_star, y, sigma2, 0.7)
    want = accurate_gp.fifty_digits(j, j_star, y, sigma2, 0.7)
    prior = 0.7 * float(j_star.square().sum(1).max())
    assert (mean - want[0]).abs().max() <= 1e-12 * max(float(want[0].abs().max()), prior**0.5)
    assert (covariance.diagonal() - want[1]).abs().max() <= 1e-14 * prior
    assert abs(evidence - want[2]) <= 1e-12 * abs(want[2])


# ------------------------------------------------------------------ full rank: the same in both spaces


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("noise", [10.0, 1e-1, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize(
    ("n", "outputs", "width"), [(1, 1, 9), (20, 1, 9), (130, 1, 9), (300, 1, 6), (40, 3, 9), (60, 1, 30)]
)
def test_both_spaces_agree_with_an_accurate_oracle(kind, noise, n, outputs, width):
    net, scale = network(outputs, width), 0.7
    x = draw(n, 2, seed=1)
    x_star = torch.cat([draw(10, 2, seed=2), 100 * draw(3, 2, seed=3), x[:3]])  # near, far, and seen before
    y = torch.sin(x[:, :1]) + 0.1 * draw(n, outputs, seed=4)
    j, j_star = jacobians(net, x, x_star)
    sigma2 = torch.full((n * outputs,), noise, dtype=torch.double)
    mean, covariance, evidence = accurate_gp.posterior(j, j_star, y.flatten(), sigma2, scale)
    posterior = NTKGP(net, outputscale=scale, noise=noise, **kind).condition(x, y)
    prior = scale * float(j_star.square().sum(1).max())
    # The tolerance on the mean, 1e-8 at moderate condition numbers, and their rounding beyond.
    allowed = max(1e-8, 10 * torch.finfo(torch.double).eps * condition_number(j, scale, sigma2))
    assert (posterior.mean(x_star).flatten() - mean).abs().max() <= allowed * max(prior**0.5, float(mean.abs().max()))
    assert (posterior.variance(x_star).flatten() - covariance.diagonal()).abs().max() <= 1e-8 * prior
    latent = posterior(x_star)
    assert (latent.mean - posterior.mean(x_star)).abs().max() <= 1e-12 * (1 + float(mean.abs().max()))
    assert (latent.covariance_matrix - covariance).abs().max() <= 1e-8 * prior
    assert abs(posterior.log_marginal_likelihood - evidence) <= 1e-8 * abs(evidence)
    assert posterior.report.converged
    assert posterior.report.rank <= min(n * outputs, j.shape[1])


@pytest.mark.parametrize("n", [30, 200])
def test_cholesky_loses_digits_at_small_noise_and_iterations_do_not(n):
    """What the spaces differ by at noise 1e-6 is the Gram matrix's condition number, not the other space."""
    net, x, x_star = network(), draw(n, 2, seed=1), draw(20, 2, seed=2)
    y, sigma2 = torch.sin(x[:, 0]), torch.full((n,), 1e-6, dtype=torch.double)
    j, j_star = jacobians(net, x, x_star)
    mean, *_ = accurate_gp.posterior(j, j_star, y, sigma2, 1.0)
    errors = {
        space: float(
            (NTKGP(net, noise=1e-6, space=space, solver=solver).condition(x, y).mean(x_star) - mean).abs().max()
        )
        for space, solver in (("function", "cholesky"), ("parameter", Iterative(tolerance=1e-10)))
    }
    assert errors["parameter"] <= 1e-9
    assert errors["function"] <= 10 * torch.finfo(torch.double).eps * condition_number(j, 1.0, sigma2)


@given(
    n=st.integers(1, 40),
    o=st.integers(1, 3),
    width=st.integers(1, 8),
    log_noise=st.floats(-6, 1),
    log_scale=st.floats(-2, 2),
    per_point=st.booleans(),
    missing=st.booleans(),
    repeated=st.booleans(),
    parameter=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_random_networks_sizes_and_noises(
    n, o, width, log_noise, log_scale, per_point, missing, repeated, parameter, seed
):
    net = mlp([3, width, o], "relu" if seed % 2 else "tanh", seed=seed, dtype=torch.double)
    x, y, x_star = draw(n, 3, seed=seed), draw(n, o, seed=seed + 1), draw(7, 3, seed=seed + 2)
    if repeated:
        x[n // 2 :] = x[: n - n // 2].clone()
    if missing and n > 1:
        y[0] = torch.nan
        y[-1, -1] = torch.nan
    noise = torch.full((n, o), 10**log_noise, dtype=torch.double)
    if per_point:
        noise = noise * (1 + draw(n, o, seed=seed + 3).abs())
    j, j_star = jacobians(net, x, torch.cat([x_star, 50 * x_star[:2]]))
    scale = 10**log_scale
    want = accurate_gp.posterior(j, j_star, y.flatten(), noise.flatten(), scale)
    gp = NTKGP(net, outputscale=scale, **({"space": "parameter"} if parameter else {"solver": "cg"}))
    posterior = gp.condition(x, y, noise=noise)
    star = torch.cat([x_star, 50 * x_star[:2]])
    prior = scale * float(j_star.square().sum(1).max())
    kappa = condition_number(j, scale, noise)
    allowed = max(1e-8, 10 * torch.finfo(torch.double).eps * kappa)
    assert (posterior.mean(star).flatten() - want[0]).abs().max() <= allowed * max(
        prior**0.5, float(want[0].abs().max())
    )
    assert (posterior.variance(star).flatten() - want[1].diagonal()).abs().max() <= 1e-8 * prior
    assert abs(posterior.log_marginal_likelihood - want[2]) <= 1e-8 * max(1.0, abs(float(want[2])))


# ------------------------------------------------------------------ truncated: upwards only, by a known bound


@given(
    n=st.integers(1, 60),
    o=st.integers(1, 2),
    width=st.integers(2, 9),
    rank=st.integers(1, 25),
    log_noise=st.floats(-6, 1),
    per_point=st.booleans(),
    repeated=st.booleans(),
    parameter=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_truncated_variances_err_upwards_within_the_slack(
    n, o, width, rank, log_noise, per_point, repeated, parameter, seed
):
    net = mlp([2, width, width, o], "tanh", seed=seed, dtype=torch.double)
    x, y = draw(n, 2, seed=seed), draw(n, o, seed=seed + 1)
    if repeated:
        x[n // 2 :] = x[: n - n // 2].clone()
    noise = torch.full((n, o), 10**log_noise, dtype=torch.double)
    if per_point:
        noise = noise * (1 + 10 * draw(n, o, seed=seed + 2).abs())
    star = torch.cat([draw(6, 2, seed=seed + 3), 100 * draw(3, 2, seed=seed + 4), x[:3]])
    j, j_star = jacobians(net, x, star)
    mean, exact, evidence = accurate_gp.posterior(j, j_star, y.flatten(), noise.flatten(), 0.5)
    options = {"rank": rank, "max_iterations": 5000}
    kind = with_solver({"space": "parameter"} if parameter else {}, **options)
    with warnings.catch_warnings():
        # Far from every kernel's directions CG may stop short of 1e-8: then the reported error must still be true.
        warnings.simplefilter("ignore", ConvergenceWarning)
        posterior = NTKGP(net, outputscale=0.5, **kind).condition(x, y, noise=noise)
    report, variance = posterior.report, posterior.variance(star).flatten()
    prior = 0.5 * j_star.square().sum(1)
    assert report.rank <= rank
    assert (variance >= exact.diagonal() - ROUNDING * prior).all()
    assert (variance <= prior * (1 + ROUNDING)).all()
    assert (variance / (1 + float(report.variance_slack)) <= exact.diagonal() + ROUNDING * prior).all()
    # The same for every combination of points: the difference of the covariances is positive semi-definite.
    more = posterior(star).covariance_matrix - exact
    assert torch.linalg.eigvalsh(more).min() >= -ROUNDING * float(prior.sum())
    # The mean's error, in posterior standard deviations, and rounding of the predictions.
    error = (posterior.mean(star).flatten() - mean).abs()
    kappa = condition_number(j, 0.5, noise)
    rounding = 10 * torch.finfo(torch.double).eps * kappa * float(mean.abs().max() + prior.max().sqrt())
    assert (error <= float(report.mean_error) * exact.diagonal().clamp_min(0).sqrt() + rounding).all()
    # The log-determinant's unseen part is between 0 and the slack.
    low, high = -0.5 * float(report.variance_slack), 0.0
    floor = posterior._groups[0]._subspace.log_determinant  # what is certain of it
    certain = float(posterior.log_marginal_likelihood) + 0.5 * unseen(posterior, floor)
    assert low - 1e-6 * max(1, abs(certain)) <= float(evidence) - certain <= high + 1e-6 * max(1, abs(certain))


def unseen(posterior, floor):
    """The estimated share of the log-determinant outside the subspace."""
    group = posterior._groups[0]
    return group._subspace.outside(group._system, group._options.probes, group._options.seed + 1)[0]


@pytest.mark.parametrize("kind", SPACES)
def test_the_krylov_part_alone_would_be_overconfident(kind):
    """A projected JᵀJ, inverted, forgets the prior outside the subspace, which is what keeps the variance safe."""
    net, x, far = network(), draw(60, 2, seed=1), 5 * draw(20, 2, seed=2)
    posterior = NTKGP(net, noise=1e-2, **with_solver(kind, rank=6)).condition(x, torch.sin(x[:, 0]))
    j, j_star = jacobians(net, x, far)
    exact = accurate_gp.posterior(j, j_star, torch.sin(x[:, 0]), torch.full((60,), 1e-2, dtype=torch.double), 1.0)[
        1
    ].diagonal()
    vectors = torch.linalg.svd(j, full_matrices=False)[2][:6].T  # even the best six directions
    inside = j_star @ vectors
    krylov = (inside @ torch.linalg.inv(torch.eye(6) + vectors.T @ j.T @ j @ vectors / 1e-2) * inside).sum(1)
    assert (krylov < 0.9 * exact).any()
    assert (posterior.variance(far) >= exact * (1 - 1e-10)).all()


def test_the_subspace_grows_with_the_rank_and_the_variance_falls():
    net, x, star = network(), draw(80, 2, seed=1), draw(20, 2, seed=2)
    y = torch.sin(x[:, 0])
    slacks, variances = [], []
    for rank in (4, 16, 40, 80):
        posterior = NTKGP(net, noise=1e-2, space="parameter", solver=Iterative(rank=rank)).condition(x, y)
        slacks.append(float(posterior.report.variance_slack))
        variances.append(float(posterior.variance(star).mean()))
    assert slacks == sorted(slacks, reverse=True)
    assert slacks[-1] < 1e-6 < 1 < slacks[0]
    assert all(a > b - 1e-12 for a, b in itertools.pairwise(variances))


# ------------------------------------------------------------------ several tasks, outputs, means


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("mean", ["zero", "network", "function"])
def test_tasks_with_missing_values_are_the_tasks_one_by_one(kind, outputs, mean):
    net, x, star = network(outputs), draw(25, 2, seed=1), draw(6, 2, seed=2)
    y = draw(5, 25, outputs, seed=3)
    y[1, 3:9] = torch.nan
    y[2, 3:9] = torch.nan
    y[3] = torch.nan  # nothing observed
    y[4, 0, 0] = torch.nan
    mean = (lambda x: x[:, :1].expand(-1, outputs)) if mean == "function" else mean
    gp, exact = (NTKGP(net, noise=0.05, mean=mean, **k) for k in (kind, {}))
    many, want = gp.condition_tasks(x, y), exact.condition_tasks(x, y)
    size = float(want.variance(star).max())
    assert (many.mean(star) - want.mean(star)).abs().max() <= 1e-8 * size
    assert (many.variance(star) - want.variance(star)).abs().max() <= 1e-8 * size
    assert (many(star).covariance_matrix - want(star).covariance_matrix).abs().max() <= 1e-8 * size
    assert (many.log_marginal_likelihood - want.log_marginal_likelihood).abs().max() <= 1e-8 * 1e3
    assert many.log_marginal_likelihood[3] == 0
    for t in range(5):
        one = gp.condition(x, y[t])
        assert (one.mean(star) - many.mean(star)[t]).abs().max() <= 1e-8 * size
        assert (one.variance(star) - many.variance(star)[t]).abs().max() <= 1e-8 * size
    assert many.report.residual.shape == many.log_marginal_likelihood.shape == (5,)
    assert many.report.converged.all()
    assert (many.predictive(star).variance - want.predictive(star).variance).abs().max() <= 1e-8 * size


def test_fitting_and_a_fitted_constant_mean_are_the_same_in_both_spaces():
    net, x, star = network(), draw(30, 2, seed=1), draw(6, 2, seed=2)
    y = 3 + torch.sin(x[:, 0])
    gps = [NTKGP(net, mean="constant", space=space).fit(x, y) for space in ("function", "parameter")]
    assert gps[0].outputscale == gps[1].outputscale
    assert torch.equal(gps[0].constant, gps[1].constant)
    one, other = (gp.condition(x, y) for gp in gps)
    assert (one.mean(star) - other.mean(star)).abs().max() <= 1e-7  # a fitted noise of 1e-9: the condition number
    assert (one.variance(star) - other.variance(star)).abs().max() <= 1e-8 * float(gps[0](star).variance.max())


def test_the_cache_serves_all_tasks_and_all_predictions(monkeypatch):
    net, x = network(), draw(50, 2, seed=1)
    y = draw(40, 50, seed=2)
    made, calls = [], {"jvp": 0, "vjp": 0, "gram": 0}
    original = Subspace.__init__
    monkeypatch.setattr(Subspace, "__init__", lambda self, *a, **k: (made.append(1), original(self, *a, **k))[1])
    for name in calls:
        method = getattr(Linearization, name)
        count = lambda self, *a, method=method, name=name: (calls.update({name: calls[name] + 1}), method(self, *a))[1]  # noqa: E731
        monkeypatch.setattr(Linearization, name, count)
    posterior = NTKGP(net, noise=0.1, space="parameter").condition_tasks(x, y)
    assert len(made) == 1
    after = dict(calls)
    for i in range(10):
        posterior.mean(draw(3, 2, seed=i))
    assert calls["vjp"] == after["vjp"]
    assert calls["gram"] == 0
    assert calls["jvp"] == after["jvp"] + 10  # the mean's vectors, and no product with the data


# ------------------------------------------------------------------ no p × p, no n × p


@pytest.mark.parametrize("kind", SPACES)
def test_neither_square_nor_jacobian_is_formed(kind):
    net = mlp([3, 80, 80, 1], "tanh", dtype=torch.double)
    x, y, p, rank = draw(60, 3), draw(60, seed=1), 6881, 8
    with Largest() as largest:
        posterior = NTKGP(net, noise=1.0, **with_solver(kind, rank=rank)).condition(x, y)
        posterior.variance(draw(5, 3, seed=2))
    assert sum(value.numel() for value in net.parameters()) == p
    assert p < largest.numel <= (rank + 1) * p + rank**2 < 60 * p


# ------------------------------------------------------------------ what is said when it does not do


@pytest.mark.parametrize("kind", SPACES)
def test_too_few_iterations_are_a_warning_with_the_residual_and_a_true_bound(kind):
    net, x, star = network(), draw(80, 2, seed=1), draw(20, 2, seed=2)
    y = torch.sin(x[:, 0])
    gp = NTKGP(net, noise=1e-4, **with_solver(kind, rank=4, max_iterations=3))
    with pytest.warns(ConvergenceWarning, match="stopped after 3 iterations at a relative residual of .* larger rank"):
        posterior = gp.condition(x, y)
    assert not posterior.report.converged
    assert posterior.report.residual > 1e-8
    assert posterior.report.iterations == 3
    j, j_star = jacobians(net, x, star)
    mean, exact, _ = accurate_gp.posterior(j, j_star, y, torch.full((80,), 1e-4, dtype=torch.double), 1.0)
    error = (posterior.mean(star) - mean).abs() / exact.diagonal().sqrt()
    assert 1e-3 < float(error.max()) <= float(posterior.report.mean_error)


def test_a_small_cache_that_nobody_asked_for_is_a_warning(monkeypatch):
    monkeypatch.setattr("ntkbook.iterative.total_memory", lambda device: 8 * 8 * (3 * 127 + 2 * 60) * 10)
    net, x = network(), draw(60, 2, seed=1)
    with pytest.warns(ConvergenceWarning, match="rank 10 leaves variances that may be up to"):
        posterior = NTKGP(net, noise=1e-4, space="parameter").condition(x, x[:, 0])
    assert posterior.report.rank == 10


def test_float32_is_possible_and_says_when_it_is_not_enough():
    net, x, star = network(), draw(40, 2, seed=1), draw(5, 2, seed=2)
    y = torch.sin(x[:, 0])
    want = NTKGP(net, noise=0.1).condition(x, y)
    gp = NTKGP(net, noise=0.1, space="parameter", solver=Iterative(tolerance=1e-4), dtype=torch.float32)
    got = gp.condition(x, y)
    assert got.mean(star).dtype == torch.float32
    assert (got.mean(star) - want.mean(star)).abs().max() <= 1e-3  # float32's rounding times the condition number, 1e4
    with pytest.warns(ConvergenceWarning, match="float64"):
        NTKGP(net, noise=1e-6, space="parameter", dtype=torch.float32).condition(x, y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": "weights"}, "function.*parameter.*weights"),
        ({"solver": "lu"}, "cholesky.*cg.*auto.*Iterative.*Nystrom.*lu"),
        ({"space": "parameter", "solver": "cholesky"}, "parameter space has"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        NTKGP(network(), **arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("tolerance", 0.0), ("tolerance", math.inf), ("slack", 0.0)],
        *[("max_iterations", 0), ("rank", 0), ("rank", True), ("block", 0), ("probes", 1)],
    ],
)
def test_options_that_make_no_sense(name, value):
    with pytest.raises(ValueError, match=f"{name}.*, got {value}"):
        Iterative(**{name: value})


def test_a_cache_that_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr("ntkbook.memory.available_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"rank 30.*smaller rank"):
        NTKGP(network(), space="parameter", solver=Iterative(rank=30)).condition(draw(40, 2), draw(40))


def test_cholesky_needs_no_report():
    posterior = NTKGP(network(), noise=0.1).condition(draw(5, 2), draw(5))
    assert posterior.report is None
    assert posterior.log_marginal_likelihood_error == 0


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("factor", [1e-200, 1e200])
def test_targets_of_any_size(kind, factor):
    net, x, star = network(), draw(20, 2), draw(5, 2, seed=1)
    y = torch.sin(x[:, 0])
    want = NTKGP(net, noise=0.1).condition(x, y).mean(star)
    got = NTKGP(net, noise=0.1, **kind).condition(x, y * factor)
    assert (got.mean(star) / factor - want).abs().max() <= 1e-8 * want.abs().max()
    assert got.report.converged


@pytest.mark.parametrize("seed", range(5))
def test_no_silent_zero_where_the_condition_number_is_one_over_rounding(seed):
    """At n = 1 with κ about 1e16: the mean at the data is the data, or the report says that it is not."""
    net, x = network(seed=seed), draw(1, 2, seed=seed)
    y = torch.ones(1, dtype=torch.double)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        posterior = NTKGP(net, noise=1e-12, outputscale=1e3, space="parameter").condition(x, y)
        single = NTKGP(net, noise=1e-5, space="parameter", dtype=torch.float32).condition(x, y)
    assert not posterior.report.converged or abs(posterior.mean(x) - 1) <= 1e-6
    assert not single.report.converged or abs(single.mean(x) - 1) <= 1e-2


@pytest.mark.parametrize("kind", SPACES)
def test_the_bound_on_the_mean_is_no_idle_one(kind):
    """It is above the error, and not by orders of magnitude: a solve stopped early, some hundred new points."""
    net, x, star = network(), draw(60, 2, seed=1), draw(200, 2, seed=2)
    y = torch.sin(x[:, 0])
    posterior = NTKGP(net, noise=1e-2, **with_solver(kind, rank=12, tolerance=1e-3)).condition(x, y)
    j, j_star = jacobians(net, x, star)
    mean, exact, _ = accurate_gp.posterior(j, j_star, y, torch.full((60,), 1e-2, dtype=torch.double), 1.0)
    error = float(((posterior.mean(star) - mean).abs() / exact.diagonal().sqrt()).max())
    assert error <= float(posterior.report.mean_error) <= 100 * error


def test_gradients_in_the_data_are_refused_and_those_in_new_inputs_flow():
    net, x, star = network(), draw(10, 2).requires_grad_(), draw(4, 2, seed=1).requires_grad_()
    noise = torch.tensor(0.1, dtype=torch.double, requires_grad=True)
    want = NTKGP(net).condition(x.detach(), x[:, 0].detach(), noise=0.1)
    got = NTKGP(net, space="parameter").condition(x, x[:, 0], noise=noise)
    assert not got.log_marginal_likelihood.requires_grad
    (one,) = torch.autograd.grad(want.mean(star).sum() + want.variance(star).sum(), star)
    (other,) = torch.autograd.grad(got.mean(star).sum() + got.variance(star).sum(), star)
    assert (one - other).abs().max() <= 1e-6 * one.abs().max()
    assert not got.mean(star.detach()).requires_grad


def test_patterns_share_the_memory(monkeypatch):
    monkeypatch.setattr("ntkbook.iterative.total_memory", lambda device: 8 * 8 * (3 * 127 + 2 * 30) * 24)
    net, x, y = network(), draw(30, 2), draw(3, 30, seed=1)
    y[0, 0] = y[1, 1] = torch.nan
    with pytest.warns(ConvergenceWarning, match="rank 8"):
        posterior = NTKGP(net, noise=1e-3, space="parameter").condition_tasks(x, y)
    assert (posterior.report.rank == 8).all()


# ------------------------------------------------------------------ the parts


def test_the_quadrature_bounds_the_value_and_is_exact_in_enough_steps():
    root = draw(30, 30)
    matrix = root @ root.T + torch.eye(30)
    values, vectors = torch.linalg.eigh(matrix)
    z = draw(30, 4, seed=1)
    want = ((vectors.T @ z).square() * values.log()[:, None]).sum(0)
    for got in quadrature(lambda v: matrix @ v, z, 30):
        assert (got - want).abs().max() <= 1e-9 * want.max()
    for steps in (1, 2, 4, 8):
        low, high = quadrature(lambda v: matrix @ v, z, steps)
        assert (low <= want).all()
        assert (want <= high).all()
    assert ((high - low) / want).max() < 0.1
    for same in quadrature(lambda v: v.clone(), z, 30):  # the identity: Lanczos ends after one step
        assert same.abs().max() <= 1e-10


@pytest.mark.parametrize("kind", SPACES)
def test_the_standard_error_of_the_log_marginal_likelihood_is_true(kind):
    """Forty seeds: their mean is the exact value, their spread the reported one. (Student's t, 16 probes: sd 1.07.)"""
    net, x = network(), draw(80, 2, seed=1)
    y = torch.sin(x[:, 0])
    exact = NTKGP(net, noise=1e-2).condition(x, y).log_marginal_likelihood
    z = []
    for seed in range(40):
        posterior = NTKGP(net, noise=1e-2, **with_solver(kind, rank=12, seed=seed)).condition(x, y)
        z.append((posterior.log_marginal_likelihood - exact) / posterior.log_marginal_likelihood_error)
        assert posterior.log_marginal_likelihood_error > 1e-3
    z = torch.stack(z)
    assert abs(z.mean()) <= 4 * 1.07 / math.sqrt(40)
    assert 0.7 <= z.std() <= 1.6


def test_conjugate_gradients_solve_every_column_to_its_tolerance():
    root = draw(40, 40)
    matrix, b = root @ root.T + torch.eye(40), draw(40, 3, seed=1) * torch.tensor([1.0, 1e6, 0.0])
    solution, error, relative, used = conjugate_gradients(
        lambda v: matrix @ v,
        lambda v: b - matrix @ v,
        torch.zeros_like(b),
        lambda r: (r, r.square().sum(0)),
        lambda r, energy: r.norm(dim=0),
        tolerance=1e-10,
        max_iterations=500,
    )
    want = torch.linalg.solve(matrix, b)
    assert ((solution - want).norm(dim=0) <= 1e-8 * want.norm(dim=0)).all()
    assert (relative <= 1e-10).all()
    assert torch.equal(solution[:, 2], torch.zeros(40, dtype=torch.double))
    assert (error[:2] / b.norm(dim=0)[:2] - relative[:2]).abs().max() < 1e-15
    assert 0 < used < 500


def test_conjugate_gradients_keep_the_better_solution():
    """A residual that lies makes a restart worse: what was better before is what is returned."""
    matrix, b, calls = torch.diag(torch.tensor([1.0, 2.0, 3.0])).double(), torch.ones(3, 1, dtype=torch.double), []

    def residual(v):
        calls.append(1)
        return b - matrix @ v if len(calls) == 1 else 1e3 * b

    solution, error, relative, _ = conjugate_gradients(
        lambda v: matrix @ v,
        residual,
        torch.zeros_like(b),
        lambda r: (r, r.square().sum(0)),
        lambda r, energy: r.norm(dim=0),
        tolerance=1e-10,
        max_iterations=50,
    )
    assert torch.equal(solution, torch.zeros_like(b))
    assert error == b.norm()
    assert relative == 1


class Diagonal(Whitened):
    """Stands for a `Whitened` with AAᵀ of a given spectrum."""

    def __init__(self, spectrum):
        self.root = spectrum.sqrt()[:, None]
        self.shape, self.squares = (len(spectrum), len(spectrum)), float(spectrum.sum())

    def forward(self, v):
        return self.root * v

    adjoint = forward


@pytest.mark.parametrize(("top", "rank"), [(2, 10), (6, 100), (10, 100)])
def test_the_rest_of_the_log_determinant_within_its_error_for_wide_spectra(top, rank):
    spectrum = torch.logspace(top, -2, 400, dtype=torch.double)
    system = Diagonal(spectrum)
    space = Subspace(system, draw(400, 1), rank=rank, slack=1e-8, block=8, seed=0, keep=False)
    value, error = space.outside(system, 64, 1)
    want = float((1 + spectrum).log().sum()) - space.log_determinant
    assert 0 <= want <= space.slack
    assert abs(value - want) <= 4 * error
    assert error < 0.2 * want  # it says something


def test_a_small_rest_of_the_log_determinant_is_taken_as_half():
    spectrum = torch.cat([torch.logspace(3, 0, 20), torch.full((20,), 1e-8)]).double()
    space = Subspace(Diagonal(spectrum), draw(40, 1), rank=24, slack=1e-30, block=4, seed=0, keep=False)
    value, error = space.outside(Diagonal(spectrum), 4, 1)
    assert 0 < value <= 2e-7
    assert error == space.slack / 2
    assert abs(float((1 + spectrum).log().sum()) - space.log_determinant - value) <= error


def test_whitened_products_are_those_of_the_scaled_jacobian():
    net, x = network(2), draw(9, 2)
    seen = torch.ones(9, 2, dtype=torch.bool)
    seen[0] = seen[4, 1] = False
    noise = 0.1 + draw(15, seed=1).square()
    system = Whitened(Linearization(net), x, seen, noise, 0.3)
    a = (0.3 / noise).sqrt()[:, None] * jacobians(net, x)[0][seen.flatten()]
    v, u = draw(a.shape[1], 3, seed=2), draw(15, 4, seed=3)
    assert system.shape == a.shape
    assert (system.forward(v) - a @ v).abs().max() <= 1e-12
    assert (system.adjoint(u) - a.T @ u).abs().max() <= 1e-12
    assert abs(system.squares - float(a.square().sum())) <= 1e-12 * system.squares
