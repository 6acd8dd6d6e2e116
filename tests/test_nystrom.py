"""Landmarks: Cholesky's posterior, a true residual, and variances that err upwards by a known bound only."""

import math
import warnings

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import accurate_gp
from oracles.largest import Largest

from ntkbook import NTKGP, ConvergenceWarning, Linearization, Nystrom
from ntkbook.blocks import LayerBlocks
from ntkbook.experiments.networks import mlp
from ntkbook.krylov import Whitened
from ntkbook.nystrom import Landmarks, counted_costs, pivots

ROUNDING = 1e-12  # of the prior variance: how far below the truth a variance may lie by rounding alone


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def network(outputs=1, width=9, inputs=2, seed=0):
    return mlp([inputs, width, width, outputs], "tanh", seed=seed, dtype=torch.double)


def check(net, x, y, noise, scale, star, solver):
    """Everything that a posterior reports, against QR of the explicit Jacobian."""
    lin = Linearization(net)
    j, j_star = lin.jacobian(x), lin.jacobian(star)
    mean, covariance, evidence = accurate_gp.posterior(j, j_star, y.flatten(), noise.flatten(), scale)
    exact = covariance.diagonal()
    posterior = NTKGP(lin, outputscale=scale, solver=solver).condition(x, y, noise=noise)
    report, variance = posterior.report, posterior.variance(star).flatten()
    prior = scale * j_star.square().sum(1)
    assert (variance >= exact - ROUNDING * prior).all()
    assert (variance <= prior * (1 + ROUNDING)).all()
    assert (variance / (1 + float(report.variance_slack)) <= exact + ROUNDING * prior).all()
    full = posterior(star).covariance_matrix
    assert torch.linalg.eigvalsh(full - covariance).min() >= -ROUNDING * float(prior.sum())
    assert (full.diagonal() / (1 + float(report.variance_slack)) <= exact + ROUNDING * prior).all()
    # The mean's error is bounded in posterior standard deviations, but for rounding of the condition number's size.
    kappa = 1 + scale * float(torch.linalg.matrix_norm(j, 2)) ** 2 / float(noise.min())
    rounding = 10 * torch.finfo(torch.double).eps * kappa * float(mean.abs().max() + prior.max().sqrt())
    error = (posterior.mean(star).flatten() - mean).abs()
    assert (error <= float(report.mean_error) * exact.clamp_min(0).sqrt() + rounding).all()
    assert (posterior(star).mean.flatten() - posterior.mean(star).flatten()).abs().max() <= 1e-12 * (
        1 + mean.abs().max()
    )
    within = float(posterior.log_marginal_likelihood_error) + 1e-8 * max(1.0, abs(float(evidence)))
    assert abs(posterior.log_marginal_likelihood - evidence) <= within
    return posterior


@pytest.mark.parametrize("noise", [10.0, 1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize(("n", "outputs", "width"), [(1, 1, 9), (20, 1, 9), (130, 1, 9), (400, 1, 6), (40, 3, 9)])
def test_agrees_with_an_accurate_oracle(noise, n, outputs, width):
    net, x = network(outputs, width), draw(n, 2, seed=1)
    star = torch.cat([draw(10, 2, seed=2), 100 * draw(3, 2, seed=3), x[:3]])  # near, far, and seen before
    y = torch.sin(x[:, :1]) + 0.1 * draw(n, outputs, seed=4)
    sigma2 = torch.full((n, outputs), noise, dtype=torch.double)
    posterior = check(net, x, y, sigma2, 0.7, star, Nystrom(tolerance=1e-9))
    assert posterior.report.converged
    assert posterior.report.residual <= 1e-9
    assert posterior.report.rank <= min(n * outputs, sum(value.numel() for value in net.parameters()))
    if n > 1:  # and as close to Cholesky as the tolerance says: the landmarks hold all there is
        want = NTKGP(net, outputscale=0.7, noise=noise).condition(x, y)
        sd = (want.variance(star) + noise).sqrt()
        assert ((posterior.mean(star) - want.mean(star)).abs() / sd).max() <= 1e-6
        assert ((posterior.variance(star) + noise).sqrt() / sd - 1).abs().max() <= 1e-3  # √δ, at κ of 1e7


@given(
    n=st.integers(1, 60),
    o=st.integers(1, 2),
    width=st.integers(2, 9),
    rank=st.integers(1, 25),
    log_noise=st.floats(-4, 1),
    per_point=st.booleans(),
    repeated=st.booleans(),
    missing=st.booleans(),
    pool=st.integers(10, 100),
    seed=st.integers(0, 10**6),
)
def test_few_landmarks_err_upwards_within_the_slack(
    n, o, width, rank, log_noise, per_point, repeated, missing, pool, seed
):
    net = mlp([2, width, width, o], "tanh", seed=seed, dtype=torch.double)
    x, y = draw(n, 2, seed=seed), draw(n, o, seed=seed + 1)
    if repeated:
        x[n // 2 :] = x[: n - n // 2].clone()
    if missing and n > 1:
        y[0] = torch.nan
        y[-1, -1] = torch.nan
        y[1, 0] = 0.5
    noise = torch.full((n, o), 10**log_noise, dtype=torch.double)
    if per_point:
        noise = noise * (1 + 10 * draw(n, o, seed=seed + 2).abs())
    star = torch.cat([draw(6, 2, seed=seed + 3), 100 * draw(3, 2, seed=seed + 4), x[:3]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what is reported must still be true
        posterior = check(net, x, y, noise, 0.5, star, Nystrom(rank=rank, pool=pool, max_iterations=300))
    assert posterior.report.rank <= rank


def test_the_residual_is_the_true_one():
    """Once more from α by the explicit kernel: as reported, and within the tolerance."""
    net, x = network(), draw(300, 2, seed=1)
    y, noise = torch.sin(3 * x[:, 0]), 0.01 * (1 + draw(300, seed=2).square())
    posterior = NTKGP(net, outputscale=2.0, solver=Nystrom(rank=5)).condition(x, y, noise=noise)
    alpha = posterior.weights
    j = Linearization(net).jacobian(x)
    true = (y - 2 * j @ (j.T @ alpha) - noise * alpha).norm() / y.norm()
    assert true <= 1e-6
    assert abs(true - posterior.report.residual) <= 1e-9


def test_fewer_landmarks_than_directions_take_more_iterations():
    net, x = network(), draw(200, 2, seed=1)
    y = torch.sin(x[:, 0])
    reports = [
        NTKGP(net, noise=1e-3, solver=Nystrom(rank=rank, max_iterations=300)).condition(x, y).report
        for rank in (2, 10, 40, 150)
    ]
    assert all(report.converged for report in reports)
    iterations = [int(report.iterations) for report in reports]
    assert iterations == sorted(iterations, reverse=True)
    assert iterations[-1] <= 2 < 10 < iterations[0]
    slacks = [float(report.variance_slack) for report in reports]
    assert slacks == sorted(slacks, reverse=True)
    assert slacks[-1] < 1e-2 < 1 < slacks[0]


def test_seen_through_landmarks_alone_a_variance_would_be_too_small():
    """What makes the safe form safe is not for nothing."""
    net, x = network(), draw(60, 2, seed=1)
    j = Linearization(net).jacobian(x)
    system = Whitened(Linearization(net), x, torch.ones(60, 1).bool(), torch.full((60,), 1e-2).double(), 1.0)
    landmarks = Landmarks(system, Nystrom(rank=4))
    u = torch.linalg.qr(landmarks._lin.jacobian(landmarks._x)[landmarks._columns].T)[0]
    inside = torch.linalg.inv(torch.eye(4) + u.T @ j.T @ j @ u / 1e-2)
    exact = u.T @ torch.linalg.inv(torch.eye(j.shape[1]) + j.T @ j / 1e-2) @ u
    assert torch.linalg.eigvalsh(exact - inside).max() > 0.01 * exact.diagonal().max()


def test_tasks_with_missing_values_are_the_tasks_one_by_one():
    net, x, star = network(2), draw(25, 2, seed=1), draw(6, 2, seed=2)
    y = draw(4, 25, 2, seed=3)
    y[1, 3:9] = torch.nan
    y[2] = torch.nan  # nothing observed
    y[3, 0, 0] = torch.nan
    gp = NTKGP(net, noise=0.05, mean="network", solver=Nystrom(tolerance=1e-10))
    many, want = gp.condition_tasks(x, y), NTKGP(net, noise=0.05, mean="network").condition_tasks(x, y)
    size = float(want.variance(star).max())
    assert (many.mean(star) - want.mean(star)).abs().max() <= 1e-8
    assert (many.variance(star) - want.variance(star)).abs().max() <= 1e-4 * size  # √δ of rounding
    for t in range(4):
        one = gp.condition(x, y[t])
        assert (one.mean(star) - many.mean(star)[t]).abs().max() <= 1e-8
        assert (one.variance(star) - many.variance(star)[t]).abs().max() <= 1e-8 * size
    assert many.report.converged.all()
    assert many.predictive(star).variance.shape == (4, 6, 2)


@pytest.mark.parametrize("space", ["function", "parameter"])
def test_nothing_of_n_by_n_or_n_by_p_is_formed_in_either_space(space):
    net, n, rank = mlp([2, 20, 20, 1], "tanh", dtype=torch.double), 3000, 12
    x = draw(n, 2)
    gp = NTKGP(Linearization(net, chunk_size=100), noise=1e-2, space=space, solver=Nystrom(rank=rank, pool=100))
    with Largest() as largest:
        posterior = gp.condition(x, x[:, 0])
        posterior.variance(x[:20])
    assert largest.numel <= 3 * rank * n < n * sum(value.numel() for value in net.parameters())


def test_the_chunks_do_not_matter(monkeypatch):
    net, x, star = network(), draw(120, 2), draw(9, 2, seed=1)
    gp = NTKGP(net, noise=1e-2, solver=Nystrom())
    whole = gp.condition(x, x[:, 0])
    monkeypatch.setattr("ntkbook.nystrom.working_memory", lambda device: 8 * 4 * 100)
    parts = gp.condition(x, x[:, 0])
    assert (whole.mean(star) - parts.mean(star)).abs().max() <= 1e-9
    assert (whole.variance(star) - parts.variance(star)).abs().max() <= 1e-10


def test_too_few_iterations_are_a_warning_with_the_residual_and_a_true_bound():
    net, x, star = network(), draw(80, 2, seed=1), draw(20, 2, seed=2)
    y = torch.sin(x[:, 0])
    gp = NTKGP(net, noise=1e-4, solver=Nystrom(rank=4, max_iterations=3))
    with pytest.warns(
        ConvergenceWarning, match="stopped after 3 iterations at a true relative residual of .* larger rank"
    ):
        posterior = gp.condition(x, y)
    assert not posterior.report.converged
    assert posterior.report.residual > 1e-6
    j, j_star = Linearization(net).jacobian(x), Linearization(net).jacobian(star)
    mean, exact, _ = accurate_gp.posterior(j, j_star, y, torch.full((80,), 1e-4, dtype=torch.double), 1.0)
    error = (posterior.mean(star) - mean).abs() / exact.diagonal().sqrt()
    assert 1e-3 < float(error.max()) <= float(posterior.report.mean_error)


@pytest.mark.parametrize("factor", [1e-200, 1e200])
def test_targets_of_any_size(factor):
    net, x, star = network(), draw(20, 2), draw(5, 2, seed=1)
    y = torch.sin(x[:, 0])
    want = NTKGP(net, noise=0.1).condition(x, y).mean(star)
    got = NTKGP(net, noise=0.1, solver=Nystrom(tolerance=1e-10)).condition(x, y * factor)
    assert (got.mean(star) / factor - want).abs().max() <= 1e-8 * want.abs().max()
    assert got.report.converged
    zero = NTKGP(net, noise=0.1, solver=Nystrom()).condition(x, 0 * y)
    assert torch.equal(zero.mean(star), torch.zeros(5, dtype=torch.double))
    assert zero.report.residual == 0


def test_constants_in_the_data_and_gradients_in_new_inputs():
    net, x, star = network(), draw(10, 2).requires_grad_(), draw(4, 2, seed=1).requires_grad_()
    got = NTKGP(net, solver=Nystrom(tolerance=1e-10)).condition(x, x[:, 0], noise=0.1)
    want = NTKGP(net).condition(x.detach(), x[:, 0].detach(), noise=0.1)
    assert not got.log_marginal_likelihood.requires_grad
    (one,) = torch.autograd.grad(want.mean(star).sum(), star)
    (other,) = torch.autograd.grad(got.mean(star).sum(), star)
    assert (one - other).abs().max() <= 1e-6 * one.abs().max()


def test_pivots_are_lapacks():
    root = draw(40, 12) * torch.logspace(0, -3, 12).double()
    gram = root @ root.T
    want = scipy.linalg.lapack.dpstrf(gram.numpy())[1][:12] - 1
    assert pivots(gram, 12, 0.0) == want.tolist()
    assert pivots(gram, 5, 0.0) == want[:5].tolist()
    assert len(pivots(gram, 40, 0.0)) <= 13  # rounding is no direction
    assert 1 < len(pivots(gram, 12, 1e-2 * float(gram.trace()))) < 12
    assert pivots(0 * gram, 12, 0.0) == []


def test_a_kernel_of_zero_is_refused():
    net = torch.nn.Linear(2, 1, bias=False, dtype=torch.double)
    with pytest.raises(ValueError, match="the kernel is zero"):
        NTKGP(net, solver=Nystrom()).condition(torch.zeros(5, 2), torch.ones(5))


def test_auto_takes_what_costs_less_and_says_which(monkeypatch):
    net, x = network(), draw(1000, 2)
    gp = NTKGP(net, noise=0.1, solver="auto")
    small, large = gp.condition(x[:20], x[:20, 0]), gp.condition(x, x[:, 0])
    assert (small.solver, large.solver) == ("cholesky", "nystrom")
    assert large.report.converged
    assert small.report is None
    assert NTKGP(net, solver="cg").condition(x[:9], x[:9, 0]).solver == "cg"
    gram, landmarks = (counted_costs(gp.lin, x)[name] for name in ("cholesky", "nystrom"))
    assert gram.multiplications > landmarks.multiplications
    small = counted_costs(gp.lin, x[:20], rank=10)
    counts = LayerBlocks(gp.lin, x, outputs=1, memory=0)
    assert small["cholesky"] == (counts.gram_cost(20, 20, True) + 20**3 / 6, 4 * 20**2 * 8)
    assert small["nystrom"] == (
        counts.gram_cost(20, 10, False) + 4 * 20 * 10**2 + 6 * 20 * counts.product_cost(1),
        3 * 10 * gp.lin.num_params * 8,
    )
    monkeypatch.setattr("ntkbook.gp.total_memory", lambda device: 4 * 20**2 * 8)  # twice of what it takes is too much
    assert gp.condition(x[:20], x[:20, 0]).solver == "nystrom"


@pytest.mark.parametrize(
    ("name", "value"),
    [("tolerance", 0.0), ("tolerance", math.inf), ("slack", 0.0), ("max_iterations", 0), ("rank", True), ("pool", 0)],
)
def test_options_that_make_no_sense(name, value):
    with pytest.raises(ValueError, match=f"{name}.*, got {value}"):
        Nystrom(**{name: value})


@pytest.mark.parametrize(("available", "message"), [(1000, "smaller pool"), (30_000, "smaller rank")])
def test_what_cannot_fit_is_refused(monkeypatch, available, message):
    monkeypatch.setattr("ntkbook.memory.available_memory", lambda device: available)
    gp = NTKGP(network(), solver=Nystrom(pool=40))
    with pytest.raises(MemoryError, match=message):
        gp.condition(draw(400, 2), draw(400))
