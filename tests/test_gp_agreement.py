"""NTKGP against the dense float64 formula, to 1e-8 of the prior variance, and against GPyTorch."""

import gpytorch
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import dense_gp

from ntkbook import NTKGP, Linearization, NTKKernel
from ntkbook.experiments.networks import mlp


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check(gp: NTKGP, net, x, y, x_star, noise: torch.Tensor, given_noise=None) -> None:
    """Mean, covariance, variance and log marginal likelihood against the formula, relative to the prior's size."""
    lin = Linearization(net)
    j, j_star = lin.jacobian(x), lin.jacobian(x_star)
    zero = torch.zeros(len(j), dtype=j.dtype)
    mean, covariance, evidence = dense_gp.posterior(
        j, j_star, y.flatten(), noise, gp.outputscale, zero, torch.zeros(len(j_star), dtype=j.dtype)
    )
    posterior = gp.condition(x, y, noise=given_noise)
    latent = posterior(x_star)
    prior = float(gp.outputscale * (j_star @ j_star.T).diagonal().max())
    unit = max(prior, float(y.nan_to_num().square().max()))
    assert float((latent.mean.flatten() - mean).abs().max()) <= 1e-8 * unit
    assert float((latent.covariance_matrix - covariance).abs().max()) <= 1e-8 * prior
    assert float((posterior.variance(x_star).flatten() - covariance.diagonal()).abs().max()) <= 1e-8 * prior
    assert float(posterior.log_marginal_likelihood) == pytest.approx(float(evidence), rel=1e-8)


@pytest.mark.parametrize("n", [1, 2, 50, 799, 800, 801, 802])
def test_nothing_changes_at_any_number_of_points(n: int) -> None:
    net = mlp([2, 10, 10, 1], "tanh", seed=1, dtype=torch.float64)
    x, y, x_star = draw(n, 2), draw(n, seed=1), 2 * draw(20, 2, seed=2)
    check(NTKGP(net, outputscale=0.7, noise=0.03), net, x, y, x_star, torch.full((n,), 0.03, dtype=torch.float64))


@given(
    n=st.integers(1, 30),
    o=st.integers(1, 3),
    width=st.integers(1, 12),
    log_noise=st.floats(-4, 1),
    log_scale=st.floats(-2, 2),
    per_point=st.booleans(),
    missing=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_random_networks_sizes_and_noises(n, o, width, log_noise, log_scale, per_point, missing, seed) -> None:
    net = mlp([3, width, o], "relu" if seed % 2 else "tanh", seed=seed, dtype=torch.float64)
    x, y, x_star = draw(n, 3, seed=seed), draw(n, o, seed=seed + 1), draw(7, 3, seed=seed + 2)
    if missing and n > 1:
        y[0] = torch.nan
        y[-1, -1] = torch.nan
    noise = torch.full((n, o), 10**log_noise, dtype=torch.float64)
    if per_point:
        noise = noise * (1 + draw(n, o, seed=seed + 3).square())
    if y.isnan().all():
        return
    gp = NTKGP(net, outputscale=10**log_scale, noise=10**log_noise)
    check(gp, net, x, y if o > 1 else y[:, 0], x_star, noise.flatten(), noise if per_point else None)


def test_tasks_share_one_factorisation_and_each_is_what_it_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp([2, 8, 1], "tanh", dtype=torch.float64)
    x, y, x_star = draw(15, 2), draw(6, 15, seed=1), draw(4, 2, seed=2)
    y[2, 3] = y[4, 3] = torch.nan  # one pattern for two tasks
    y[5] = torch.nan  # nothing seen: the prior
    gp, calls, real = NTKGP(net, noise=0.1), [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: calls.append(len(a)) or real(a))
    many = gp.condition_tasks(x, y)
    assert sorted(calls) == [0, 14, 15]
    batch = many(x_star)
    for t in range(5):
        seen = ~y[t].isnan()
        alone = gp.condition(x[seen], y[t, seen])
        torch.testing.assert_close(batch.mean[t], alone(x_star).mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(many.variance(x_star)[t], alone.variance(x_star), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(many.log_marginal_likelihood[t], alone.log_marginal_likelihood, rtol=1e-10, atol=0)
    torch.testing.assert_close(many.variance(x_star)[5], gp(x_star).covariance_matrix.diagonal(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("constant", [False, True])
def test_fit_finds_the_largest_marginal_likelihood(constant: bool) -> None:
    net = mlp([1, 12, 1], "tanh", seed=2, dtype=torch.float64)
    x = torch.linspace(-2, 2, 25, dtype=torch.float64)[:, None]
    y = torch.sin(2 * x[:, 0]) + 0.2 * draw(25) + 3 * constant
    gp = NTKGP(net, mean="constant" if constant else "zero").fit(x, y)
    brute = dense_gp.fitted(Linearization(net).jacobian(x), y, constant)
    assert gp.outputscale == pytest.approx(brute["outputscale"], rel=1e-3)
    assert gp.noise == pytest.approx(brute["noise"], rel=1e-3)
    own = float(gp.condition(x, y).log_marginal_likelihood)
    assert own >= brute["log_likelihood"] - 1e-7  # a flat maximum: the value is sharp where the arguments are not


def test_gpytorch_says_the_same_of_the_same_kernel() -> None:
    net = mlp([2, 9, 1], "tanh", dtype=torch.float64)
    x, y, x_star = draw(30, 2), draw(30, seed=1), draw(6, 2, seed=2)

    class Model(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood().double())
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(NTKKernel(net)).double()

        def forward(self, x: torch.Tensor) -> gpytorch.distributions.MultivariateNormal:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    model = Model()
    model.covar_module.outputscale, model.likelihood.noise = 1.3, 0.2
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    evidence = float(mll(model(x), y).detach()) * len(y)
    model.eval()
    with torch.no_grad():
        theirs = model(x_star)
        mean, covariance = theirs.mean, theirs.covariance_matrix
    # Read back: GPyTorch rounds what it is given to float32.
    scale, noise = model.covar_module.outputscale.item(), model.likelihood.noise.item()
    posterior = NTKGP(net, outputscale=scale, noise=noise).condition(x, y)
    ours = posterior(x_star)
    torch.testing.assert_close(ours.mean, mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours.covariance_matrix, covariance, rtol=1e-8, atol=1e-9)
    assert float(posterior.log_marginal_likelihood) == pytest.approx(evidence, rel=1e-9)
