"""The posterior by Fisher-vector products against NTKGP and against dense formulas."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ntkbook import NTKGP, FisherOperator, FisherPosterior, Linearization
from ntkbook.experiments.networks import mlp
from ntkbook.likelihoods import Gaussian, get_likelihood


def data(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64), generator


def dense(lin, x, y, likelihood, scale, mean, x_star):
    """Mean and variance by the formula, with a (p, p) matrix."""
    f = lin.outputs(x)
    prior = torch.zeros_like(f) if mean == "zero" else f
    j = lin.jacobian(x)
    h = torch.block_diag(*likelihood.hessian(f))
    leaf = prior.clone().requires_grad_()
    score = torch.autograd.grad(likelihood.log_prob(leaf, y).sum(), leaf)[0].flatten()
    precision = j.T @ h @ j + torch.eye(lin.num_params, dtype=f.dtype) / scale
    j_star = lin.jacobian(x_star)
    m_star = lin.outputs(x_star).flatten() if mean == "network" else 0
    return (
        m_star + j_star @ torch.linalg.solve(precision, j.T @ score),
        (j_star * torch.linalg.solve(precision, j_star.T).T).sum(1),
        lin.diagonal(x_star) * scale,
    )


@given(
    n=st.integers(1, 12),
    seed=st.integers(0, 100),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    noise=st.sampled_from([1e-2, 1e-1, 1.0]),
    mean=st.sampled_from(["zero", "network"]),
    block=st.integers(1, 4),
)
def test_gaussian_posterior_is_that_of_ntkgp(n, seed, scale, noise, mean, block):
    net = mlp([2, 7, 1], seed=seed, dtype=torch.float64)
    x, generator = data(n, 2, seed)
    y, x_star = torch.randn(n, generator=generator, dtype=torch.float64), data(6, 2, seed + 1)[0]
    ours = FisherPosterior(FisherOperator(net, x, Gaussian(noise)), y, outputscale=scale, mean=mean, block=block)
    theirs = NTKGP(net, outputscale=scale, noise=noise, mean=mean).condition(x, y)
    # condition number: up to about 1e5 times rounding
    prior = scale * Linearization(net).diagonal(x_star)
    size = (prior.sqrt() + theirs.mean(x_star).abs()).max()
    assert (ours.mean(x_star) - theirs.mean(x_star)).abs().max() < 1e-9 * size
    assert ((ours.variance(x_star) - theirs.variance(x_star)).abs() / prior).max() < 1e-9
    assert ours.residual < 1e-9


@pytest.mark.parametrize(
    ("name", "outputs"), [("categorical", 3), ("bernoulli", 1), ("poisson", 1), ("heteroscedastic", 2)]
)
@pytest.mark.parametrize("block", [1, 3])
def test_other_likelihoods_take_one_newton_step(name, outputs, block):
    likelihood = get_likelihood(name)
    net = mlp([2, 6, outputs], seed=1, dtype=torch.float64)
    x, generator = data(9, 2)
    lin = Linearization(net)
    y = likelihood.sample(lin.outputs(x), generator)
    x_star = data(5, 2, 3)[0]
    posterior = FisherPosterior(FisherOperator(lin, x, likelihood), y, outputscale=0.7, block=block)
    mean, variance, prior = dense(lin, x, y, likelihood, 0.7, "network", x_star)
    assert torch.allclose(posterior.mean(x_star).flatten(), mean, rtol=0, atol=1e-10 * float(mean.abs().max()))
    assert ((posterior.variance(x_star).flatten() - variance).abs() / prior).max() < 1e-10


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_a_small_subspace_only_adds_variance(rank):
    net, (x, generator) = mlp([2, 9, 1], seed=2, dtype=torch.float64), data(30, 2)
    y, x_star = torch.randn(30, generator=generator, dtype=torch.float64), data(40, 2, 5)[0]
    fisher = FisherOperator(net, x, Gaussian(1e-2))
    exact = NTKGP(net, noise=1e-2).condition(x, y).variance(x_star)
    prior = Linearization(net).diagonal(x_star)
    previous = prior
    for r in range(1, rank + 1):
        posterior = FisherPosterior(fisher, y, mean="zero", rank=r)
        variance = posterior.variance(x_star)
        assert posterior.rank == r
        assert (variance >= exact - 1e-12 * prior).all()
        assert (variance <= previous + 1e-12 * prior).all()
        previous = variance
    assert (previous > 1.001 * exact).any()  # so that the bounds above had something to bound
    complete = FisherPosterior(fisher, y, mean="zero").variance(x_star)
    assert ((complete - exact).abs() / prior).max() < 1e-10


def test_differences_come_close_in_float64_and_the_residual_shows_what_is_left():
    net, (x, generator) = mlp([2, 9, 1], seed=2, dtype=torch.float64), data(8, 2)
    y, x_star = torch.randn(8, generator=generator, dtype=torch.float64), data(20, 2, 5)[0]
    exact = FisherPosterior(FisherOperator(net, x, Gaussian(0.1)), y, mean="zero")
    sd = (exact.variance(x_star) + 0.1).sqrt()
    gaps = {}
    for epsilon in (1e-2, 1e-4):
        fisher = FisherOperator(net, x, Gaussian(0.1), method="central_difference", epsilon=epsilon)
        gaps[epsilon] = float(
            ((FisherPosterior(fisher, y, mean="zero").mean(x_star) - exact.mean(x_star)) / sd).abs().max()
        )
    # errors of central differences fall with ε²; rounding at 1e-4 leaves less than 1 % of that
    assert gaps[1e-4] == pytest.approx(1e-4 * gaps[1e-2], rel=0.5)
    one = FisherPosterior(FisherOperator(net, x, Gaussian(0.1)), y, mean="zero", rank=1)
    assert one.residual > 1e-3 > exact.residual


def test_no_data_to_speak_of_leaves_the_prior():
    net, (x, _) = mlp([2, 5, 1], dtype=torch.float64), data(3, 2)
    lin = Linearization(net)
    posterior = FisherPosterior(
        FisherOperator(net, x, Gaussian(1e12)), torch.zeros(3, dtype=torch.float64), mean="zero"
    )
    assert torch.equal(posterior.mean(x), torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(posterior.variance(x), lin.diagonal(x), rtol=1e-10)


def test_several_outputs_and_shapes():
    net, (x, generator) = mlp([2, 5, 3], dtype=torch.float64), data(4, 2)
    y = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    ours = FisherPosterior(FisherOperator(net, x, Gaussian(0.1)), y)
    theirs = NTKGP(net, noise=0.1, mean="network").condition(x, y)
    assert ours.mean(x).shape == ours.variance(x).shape == (4, 3)
    assert torch.allclose(ours.mean(x), theirs.mean(x), rtol=0, atol=1e-10)
    assert torch.allclose(ours.variance(x), theirs.variance(x), rtol=0, atol=1e-10)


def test_it_is_a_constant_whatever_is_learnt():
    """No part of a gradient flows to the noise or the observations: a part would be a wrong one."""
    net, (x, generator) = mlp([2, 5, 1], dtype=torch.float64), data(4, 2)
    y = torch.randn(4, generator=generator, dtype=torch.float64)
    noise = torch.tensor(0.3, dtype=torch.float64)
    want = FisherPosterior(FisherOperator(net, x, Gaussian(noise)), y)
    learnt = Gaussian(noise.clone().requires_grad_())
    found = FisherPosterior(FisherOperator(net, x, learnt), y.clone().requires_grad_())
    for ours, theirs in ((found.mean(x), want.mean(x)), (found.variance(x), want.variance(x))):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad


def test_errors_say_what_was_expected():
    net, (x, _) = mlp([2, 5, 2], dtype=torch.float64), data(4, 2)
    y = torch.zeros(4, dtype=torch.long)
    fisher = FisherOperator(net, x)
    for arguments, words in (
        ({"mean": "none"}, "network"),
        ({"mean": "zero"}, "Gaussian"),
        ({"outputscale": 0.0}, "positive"),
        ({"rank": 0}, "at least one"),
        ({"block": 0}, "at least one"),
    ):
        with pytest.raises(ValueError, match=words):
            FisherPosterior(fisher, y, **arguments)
    with pytest.raises(ValueError, match="sum"):
        FisherPosterior(FisherOperator(net, x, reduction="mean"), y)
    with pytest.raises(ValueError, match=r"float64, .*got torch.bfloat16"):
        FisherPosterior(fisher.to(torch.bfloat16), y)
    with pytest.raises(ValueError, match="classes"):
        FisherPosterior(fisher, y + 7)
