"""NTKGP: its means, noises, outputs, tasks, samples, fits and errors. (test_gp_agreement.py: against the formula.)"""

import math

import gpytorch
import pytest
import torch
from oracles import dense_gp
from oracles.jacobian import loop_jacobian
from oracles.networks import build
from torch import nn

from ntkbook import NTKGP, Linearization, Nystrom, TaskHyperparameters
from ntkbook import posterior as posterior_module
from ntkbook.experiments.networks import mlp

TOLERANCE = 1e-8  # of the prior's size


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def network(outputs=1, width=9, inputs=2, seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def dense(gp, net, x, y, x_star, noise, mean=None, mean_star=None):
    """The formula, from a Jacobian made by loops; all vectors, outputs running fastest."""
    j, j_star = loop_jacobian(net, x), loop_jacobian(net, x_star)
    mean = torch.zeros(len(j), dtype=torch.double) if mean is None else mean.flatten()
    mean_star = torch.zeros(len(j_star), dtype=torch.double) if mean_star is None else mean_star.flatten()
    noise = torch.as_tensor(noise, dtype=torch.double).expand(y.shape).flatten()
    return dense_gp.posterior(j, j_star, y.flatten(), noise, gp.outputscale, mean, mean_star)


def assert_agrees(posterior, x_star, want, prior):
    mean, covariance, evidence = want
    latent = posterior(x_star)
    assert (latent.mean.flatten() - mean).abs().max() <= TOLERANCE * max(prior, float(mean.abs().max()))
    assert (latent.covariance_matrix - covariance).abs().max() <= TOLERANCE * prior
    assert (posterior.mean(x_star) - latent.mean).abs().max() <= TOLERANCE * prior
    assert (posterior.variance(x_star).flatten() - covariance.diagonal()).abs().max() <= TOLERANCE * prior
    assert abs(float(posterior.log_marginal_likelihood - evidence)) <= TOLERANCE * abs(float(evidence))


# ------------------------------------------------------------------ means, outputs, noises


def curve(x):
    return 2 + torch.sin(x[:, 0])


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("mean", ["zero", "constant", "network", "function"])
def test_every_mean_with_one_and_several_outputs(mean, outputs):
    net, x, x_star = network(outputs), draw(20, 2), draw(7, 2, seed=1)
    y = curve(x)[:, None] + 0.2 * draw(20, outputs, seed=2)
    function = lambda x: curve(x)[:, None] * torch.arange(1.0, outputs + 1, dtype=torch.double)  # noqa: E731
    gp = NTKGP(net, outputscale=0.6, noise=0.05, mean=function if mean == "function" else mean)
    if mean == "constant":
        gp.fit(x, y)
        assert gp.constant.shape == (outputs,)
    means = {
        "zero": lambda x: torch.zeros(len(x), outputs, dtype=torch.double),
        "constant": lambda x: torch.zeros(len(x), outputs, dtype=torch.double) + gp.constant,
        "network": lambda x: net(x).detach(),
        "function": function,
    }[mean]
    want = dense(gp, net, x, y, x_star, gp.noise, means(x), means(x_star))
    posterior = gp.condition(x, y if outputs > 1 else y[:, 0])
    prior = gp(x_star)
    size = float(prior.covariance_matrix.diagonal().max())
    assert_agrees(posterior, x_star, want, size)
    j_star = loop_jacobian(net, x_star)
    assert (prior.covariance_matrix - gp.outputscale * j_star @ j_star.T).abs().max() <= TOLERANCE * size
    shape = (7,) if outputs == 1 else (7, outputs)
    for got in (prior.mean, posterior(x_star).mean, posterior.mean(x_star), posterior.variance(x_star)):
        assert got.shape == shape
    assert posterior(x_star).variance.shape == shape
    assert torch.equal(prior.mean, means(x_star).view(shape))
    if mean == "function" and outputs == 1:  # a function may give (n,)
        flat = NTKGP(net, outputscale=0.6, noise=0.05, mean=lambda x: curve(x)).condition(x, y[:, 0])
        assert torch.equal(flat.mean(x_star), posterior.mean(x_star))


@pytest.mark.parametrize("outputs", [1, 2])
def test_noise_per_point(outputs):
    net, x, x_star = network(outputs), draw(12, 2), draw(5, 2, seed=1)
    y, noise = draw(12, outputs, seed=2), draw(12, outputs, seed=3).exp()
    gp = NTKGP(net)
    size = float(gp(x_star).covariance_matrix.diagonal().max())
    target = y if outputs > 1 else y[:, 0]
    own = gp.condition(x, target, noise=noise if outputs > 1 else noise[:, 0])
    assert_agrees(own, x_star, dense(gp, net, x, y, x_star, noise), size)
    shared = gp.condition(x, target, noise=noise[:, 0])  # one a point, for all its outputs
    assert_agrees(shared, x_star, dense(gp, net, x, y, x_star, noise[:, :1]), size)
    number = gp.condition(x, target, noise=0.3)
    assert_agrees(number, x_star, dense(gp, net, x, y, x_star, 0.3), size)
    same = gp.condition(x, target, noise=torch.tensor(0.3, dtype=torch.double))
    assert torch.equal(number.mean(x_star), same.mean(x_star))


@pytest.mark.parametrize("outputs", [1, 2])
def test_predictive_adds_the_noise(outputs):
    net, x, x_star = network(outputs), draw(12, 2), draw(5, 2, seed=1)
    y = draw(12, outputs, seed=2)
    gp = NTKGP(net, noise=0.4)
    posterior = gp.condition(x, y)
    latent = posterior(x_star).covariance_matrix
    eye = torch.eye(5 * outputs, dtype=torch.double)
    torch.testing.assert_close(posterior.predictive(x_star).covariance_matrix, latent + 0.4 * eye, rtol=0, atol=1e-15)
    assert torch.equal(posterior.predictive(x_star).mean, posterior(x_star).mean)
    per_point = draw(5, seed=4).exp()
    spread = per_point.repeat_interleave(outputs).diag()
    got = posterior.predictive(x_star, noise=per_point).covariance_matrix
    torch.testing.assert_close(got, latent + spread, rtol=0, atol=1e-15)
    own = gp.condition(x, y, noise=torch.full((12,), 0.1))
    with pytest.raises(ValueError, match="say which noise= the new points have"):
        own.predictive(x_star)
    assert own.predictive(x_star, noise=0.1).mean.shape == posterior(x_star).mean.shape
    for number in (0.1, torch.tensor(0.1, dtype=torch.double)):  # which is that of new points too
        other = gp.condition(x, y, noise=number)
        want = other(x_star).covariance_matrix + 0.1 * eye
        torch.testing.assert_close(other.predictive(x_star).covariance_matrix, want, rtol=0, atol=1e-15)
        got = gp.condition_tasks(x, y[None], noise=number).predictive(x_star).covariance_matrix[0]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    many = gp.condition_tasks(x, torch.stack([y, -y]))
    both = many.predictive(x_star)
    assert both.mean.shape == (2, *posterior(x_star).mean.shape)
    torch.testing.assert_close(both.covariance_matrix[1], latent + 0.4 * eye, rtol=0, atol=1e-14)


def test_a_gpytorch_likelihood_takes_the_posterior():
    net, x = network(), draw(8, 2)
    posterior = NTKGP(net, noise=0.2).condition(x, draw(8, seed=1))
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = 0.2
    theirs, ours = likelihood(posterior(x[:3])), posterior.predictive(x[:3])
    torch.testing.assert_close(theirs.variance, ours.variance, rtol=1e-6, atol=0)
    assert posterior(x[:3]).rsample(torch.Size([4])).shape == (4, 3)
    assert torch.isfinite(ours.log_prob(torch.zeros(3, dtype=torch.double)))


# ------------------------------------------------------------------ tasks


@pytest.mark.parametrize("outputs", [1, 2])
def test_each_task_sees_only_what_it_observed(outputs):
    net, x, x_star = network(outputs), draw(10, 2), draw(4, 2, seed=1)
    y, noise = draw(6, 10, outputs, seed=2), draw(10, outputs, seed=3).exp()
    y[1, 2] = y[1, 5, 0] = y[3, 2] = y[3, 5, 0] = torch.nan  # tasks 1 and 3 alike
    y[2, 1:] = torch.nan
    y[4] = torch.nan  # nothing at all
    gp = NTKGP(net, outputscale=0.8, mean="network")
    many = gp.condition_tasks(x, y if outputs > 1 else y[..., 0], noise=noise)
    latent, mean, variance = many(x_star), many.mean(x_star), many.variance(x_star)
    assert latent.mean.shape == mean.shape == variance.shape == ((6, 4) if outputs == 1 else (6, 4, outputs))
    assert latent.covariance_matrix.shape == (6, 4 * outputs, 4 * outputs)
    size = float(gp(x_star).covariance_matrix.diagonal().max())
    for t in range(6):
        want = dense(gp, net, x, y[t], x_star, noise, net(x).detach(), net(x_star).detach())
        assert (latent.mean[t].flatten() - want[0]).abs().max() <= TOLERANCE * size
        assert (latent.covariance_matrix[t] - want[1]).abs().max() <= TOLERANCE * size
        assert (variance[t].flatten() - want[1].diagonal()).abs().max() <= TOLERANCE * size
        assert abs(float(many.log_marginal_likelihood[t] - want[2])) <= TOLERANCE * max(1, abs(float(want[2])))
        alone = gp.condition(x, y[t] if outputs > 1 else y[t, :, 0], noise=noise)
        torch.testing.assert_close(alone(x_star).mean, latent.mean[t], rtol=1e-12, atol=1e-13)
        # and it equals never having been given the points
        seen = ~y[t].isnan().any(1)
        if seen.any() and not y[t, seen].isnan().any() and torch.equal(y[t].isnan().any(1), y[t].isnan().all(1)):
            fewer = gp.condition(x[seen], y[t, seen], noise=noise[seen])
            torch.testing.assert_close(fewer(x_star).mean, latent.mean[t], rtol=1e-10, atol=1e-12)
    assert many.log_marginal_likelihood[4] == 0
    torch.testing.assert_close(latent.covariance_matrix[4], gp(x_star).covariance_matrix, rtol=0, atol=1e-14)
    assert torch.equal(latent.mean[4], gp(x_star).mean)


def test_tasks_of_one_pattern_cost_one_factorisation(monkeypatch):
    sizes, real = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: sizes.append(len(a)) or real(a))
    net, x = network(), draw(30, 2)
    many = NTKGP(net).condition_tasks(x, draw(50, 30, seed=1))
    assert sizes == [30]
    many(x)
    many.variance(x)
    many.predictive(x)
    assert sizes == [30]  # nothing is factorised again


# ------------------------------------------------------------------ time, dtype, device


def test_a_posterior_stays_as_it_was_made():
    net, x, x_star = network(), draw(15, 2), draw(4, 2, seed=2)
    y = curve(x) + 0.1 * draw(15, seed=1)
    gp = NTKGP(net, mean="constant")
    posterior = gp.condition(x, y)
    before = [posterior(x_star).mean, posterior.predictive(x_star).covariance_matrix, posterior.variance(x_star)]
    gp.fit(x, y)
    gp.noise = 7.0
    gp.outputscale = 9.0
    gp.constant = None
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    after = [posterior(x_star).mean, posterior.predictive(x_star).covariance_matrix, posterior.variance(x_star)]
    for one, two in zip(before, after):
        assert torch.equal(one, two)


def test_conditioning_again_replaces_what_was_there():
    x, y, x_star = draw(15, 2), draw(15, seed=1), draw(4, 2, seed=2)
    gp = NTKGP(network())
    gp.condition(x, y)
    assert torch.equal(gp.condition(x[:3], y[:3]).mean(x_star), NTKGP(network()).condition(x[:3], y[:3]).mean(x_star))


def test_a_float32_network_is_worked_in_float64():
    net = network(width=6)
    single = network(width=6).float()
    x, y, x_star = draw(40, 2), draw(40, seed=1), draw(5, 2, seed=2)
    widened = network(width=6).float().double()  # its rounded parameters, in float64
    gp = NTKGP(single, noise=1e-6)
    assert gp.lin.dtype == torch.double
    assert next(single.parameters()).dtype == torch.float32
    posterior = gp.condition(x.float(), y.float())
    want = dense(gp, widened, x.float().double(), y.float().double(), x_star, 1e-6)
    got = posterior(x_star)
    assert got.mean.dtype == torch.double
    prior = gp(x_star).covariance_matrix.diagonal().max()
    assert (got.covariance_matrix - want[1]).abs().max() <= TOLERANCE * prior
    assert (got.mean - want[0]).abs().max() <= 1e-7 * want[0].abs().max()  # κ is 1e9
    narrow = NTKGP(net, noise=1e-2, dtype=torch.float32).condition(x, y)
    assert narrow(x_star).mean.dtype == narrow.log_marginal_likelihood.dtype == torch.float32
    exact = NTKGP(net, noise=1e-2).condition(x, y)
    assert (narrow.variance(x_star) - exact.variance(x_star)).abs().max() < 1e-4 * prior


def test_integers_and_images_are_inputs_too():
    net, x = build("embedding")
    y = draw(6, 3)
    gp = NTKGP(net, noise=0.1)
    size = float(gp(x).covariance_matrix.diagonal().max())
    assert_agrees(gp.condition(x, y), x[:2], dense(gp, net, x, y, x[:2], 0.1), size)
    net, x = build("convolutions")
    gp = NTKGP(net.float(), noise=0.1)
    size = float(gp(x).covariance_matrix.diagonal().max())
    assert_agrees(gp.condition(x, y), x[:2], dense(gp, net.double(), x, y, x[:2], 0.1), size)


def test_derivatives_by_where_to_look():
    net, x, y = network(2), draw(6, 2), draw(6, 2, seed=1)
    posterior = NTKGP(net, noise=0.1).condition(x, y)
    x_star = draw(2, 2, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: posterior(a).mean, (x_star,))
    assert torch.autograd.gradcheck(lambda a: posterior(a).covariance_matrix, (x_star,))
    assert torch.autograd.gradcheck(posterior.variance, (x_star,))


def test_chunks_of_test_points_do_not_matter(monkeypatch):
    net, x, y, x_star = network(2), draw(6, 2), draw(6, 2, seed=1), draw(9, 2, seed=2)
    posterior = NTKGP(net, noise=0.1).condition(x, y)
    mean, variance = posterior.mean(x_star), posterior.variance(x_star)
    monkeypatch.setattr(posterior_module, "working_memory", lambda device: 1)
    torch.testing.assert_close(posterior.mean(x_star), mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(posterior.variance(x_star), variance, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------ samples


@pytest.mark.parametrize("outputs", [1, 2])
def test_samples_have_the_posteriors_moments(outputs):
    """Also where the covariance is singular: 12 points, 2 outputs, and a network of 12 parameters or less."""
    net = network(outputs, width=2 if outputs == 1 else 1)
    x, y, x_star = draw(3, 2), draw(3, outputs, seed=1), draw(12, 2, seed=2)
    posterior = NTKGP(net, noise=0.1).condition(x, y if outputs > 1 else y[:, 0])
    latent = posterior(x_star)
    covariance, n = latent.covariance_matrix, 20_000
    assert torch.linalg.matrix_rank(covariance, rtol=1e-10) < len(covariance)
    draws = posterior.sample(x_star, n, generator=torch.Generator().manual_seed(0))
    assert draws.shape == (n, *latent.mean.shape)
    flat = draws.reshape(n, -1) - latent.mean.reshape(-1)
    deviation = covariance.diagonal().sqrt()
    # Standard errors: σ/√n of a mean, √((σ²σ′² + c²)/n) of a covariance. Five of them, at fewer than 500 entries.
    assert (flat.mean(0).abs() <= 5 * deviation / math.sqrt(n) + 1e-12).all()
    bound = 5 * ((deviation[:, None] * deviation).square() + covariance.square()).div(n).sqrt()
    assert ((flat.T @ flat / n - covariance).abs() <= bound + 1e-12).all()
    # Each draw lies in the space of the covariance: J* times some parameters.
    j = Linearization(net).jacobian(x_star)
    outside = flat.T - j @ torch.linalg.lstsq(j, flat.T, driver="gelsd").solution
    assert outside.abs().max() < 1e-6


def test_samples_are_seeded_and_batched():
    net, x, x_star = network(2), draw(5, 2), draw(4, 2, seed=1)
    many = NTKGP(net).condition_tasks(x, draw(3, 5, 2, seed=2))
    before = torch.get_rng_state()
    one = many.sample(x_star, 6, generator=torch.Generator().manual_seed(1))
    two = many.sample(x_star, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(before, torch.get_rng_state())
    assert one.shape == (6, 3, 4, 2)
    assert torch.equal(one, two)
    centred = many.sample(x_star, 4000, generator=torch.Generator().manual_seed(2)).mean(0)
    assert (centred - many(x_star).mean).abs().max() < 5 * many(x_star).variance.max().sqrt() / math.sqrt(4000)


# ------------------------------------------------------------------ fits


@pytest.mark.parametrize("mean", ["zero", "constant"])
def test_fit_with_given_noise_finds_the_largest_marginal_likelihood(mean):
    net, x = network(inputs=1, width=12), torch.linspace(-2, 2, 25, dtype=torch.double)[:, None]
    noise = 0.01 + 0.1 * draw(25, seed=1).square()
    y = torch.sin(2 * x[:, 0]) + noise.sqrt() * draw(25, seed=2) + 3
    gp = NTKGP(net, mean=mean, noise=0.5)
    assert gp.fit(x, y, noise=noise) is gp
    brute = dense_gp.fitted(loop_jacobian(net, x), y, mean == "constant", noise)
    assert gp.noise == 0.5  # no part of this fit
    assert gp.outputscale == pytest.approx(brute["outputscale"], rel=1e-4)
    if mean == "constant":
        assert float(gp.constant) == pytest.approx(brute["constant"], abs=1e-3)
    own = float(gp.condition(x, y, noise=noise).log_marginal_likelihood)
    assert own >= brute["log_likelihood"] - 1e-8


def test_fit_of_several_outputs_and_missing_values():
    net, x = network(2), draw(20, 2)
    y = torch.stack([curve(x), -curve(x)], dim=1) + 0.2 * draw(20, 2, seed=1)
    y[3] = y[5, 1] = torch.nan
    gp = NTKGP(net, mean="constant").fit(x, y)
    best = gp.condition(x, y).log_marginal_likelihood
    for attribute in ("outputscale", "noise", "constant"):
        value = getattr(gp, attribute)
        for factor in (0.99, 1.01):
            setattr(gp, attribute, value * factor)
            assert gp.condition(x, y).log_marginal_likelihood < best
        setattr(gp, attribute, value)
    y[:, 1] = torch.nan  # an output that was never seen
    gp.fit(x, y)
    assert gp.constant[1] == 0
    first = nn.Sequential(net, nn.Linear(2, 1, bias=False)).double()  # the first output as a network of its own
    with torch.no_grad():
        first[1].weight.copy_(torch.tensor([[1.0, 0.0]]))
    first[1].requires_grad_(False)
    alone = NTKGP(first, mean="constant").fit(x, y[:, 0])
    assert gp.outputscale == pytest.approx(alone.outputscale, rel=1e-6)
    assert float(gp.constant[0]) == pytest.approx(float(alone.constant), rel=1e-6)


def test_fit_says_when_the_data_determine_nothing():
    net, x = network(), draw(100, 2)
    draw_of_prior = loop_jacobian(net, x) @ draw(37, seed=1)
    with pytest.warns(UserWarning, match=r"grows up to the end of the search, 10\^-.* noise / outputscale") as caught:
        assert NTKGP(net).fit(x, draw_of_prior).noise < 1e-9
    assert len(caught) == 1
    x = x[:30]
    with pytest.warns(UserWarning, match=r"grows up to the end of the search, 10\^[0-9].* noise / outputscale"):
        NTKGP(net, mean="constant").fit(x, draw(30, seed=1))
    with pytest.warns(UserWarning, match=r"10\^-.* for the outputscale"):
        NTKGP(net).fit(x, 1e-3 * draw(30, seed=1), noise=1.0)
    with pytest.raises(ValueError, match="the observations equal the prior mean"):
        NTKGP(net).fit(x, torch.zeros(30))
    with pytest.raises(ValueError, match="the observations equal the prior mean"):
        NTKGP(net, mean="constant").fit(x, torch.full((30,), 2.5))
    with pytest.raises(ValueError, match="the observations equal the prior mean"):
        NTKGP(net, mean="network").fit(x, net(x).detach()[:, 0])
    with pytest.raises(ValueError, match="at least two observed values, got 1"):
        NTKGP(net).fit(x[:2], torch.tensor([1.0, torch.nan]))
    dead = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False)).double()
    with torch.no_grad():
        dead[0].bias.fill_(-100)
    with pytest.raises(ValueError, match="the kernel is zero at these inputs"):
        NTKGP(dead).fit(x, draw(30))


@pytest.mark.filterwarnings("ignore:fit.*determine:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("points", ["a line", "few, often"])
def test_condition_takes_what_fit_finds_where_there_is_no_noise(points, dtype):
    """Also in float32, whose rounding of the Gram matrix is larger than the noise that fits best."""
    net = network(inputs=1, width=50).to(dtype)
    x = torch.linspace(-3, 3, 100, dtype=dtype)[:, None]
    x = x if points == "a line" else x[::10].repeat(10, 1)
    y, noise = torch.sin(2 * x[:, 0]), torch.full((100,), 1e-9, dtype=dtype)
    gp = NTKGP(net, dtype=dtype).fit(x, y)
    posterior = gp.condition(x, y)
    assert (posterior.mean(x) - y).abs().max() < 0.1
    evidence = float(posterior.log_marginal_likelihood)
    many = gp.condition_tasks(x, y[None], hyperparameters=gp.fit_tasks(x, y[None]))
    assert float(many.log_marginal_likelihood) == pytest.approx(evidence, rel=0.01)
    gp = NTKGP(net, dtype=dtype).fit(x, y, noise=noise)
    assert (gp.condition(x, y, noise=noise).mean(x) - y).abs().max() < 0.1
    if dtype == torch.float32:
        for given in (None, noise):
            with pytest.warns(UserWarning, match="Beyond lies the kernel's rounding in torch.float32; that in"):
                gp.fit(x, y, noise=given)


# ------------------------------------------------------------------ errors


def test_errors_say_what_to_do():
    net, x, y = network(), draw(6, 2), draw(6, seed=1)
    gp = NTKGP(net)
    with pytest.raises(ValueError, match=r'"zero", "constant" .*, "network" or a function of x, got .linear'):
        NTKGP(net, mean="linear")
    for name, value in (("outputscale", 0.0), ("noise", -1.0), ("noise", math.nan), ("outputscale", math.inf)):
        with pytest.raises(ValueError, match=f"{name}: expected a positive number"):
            NTKGP(net, **{name: value})
    with pytest.raises(ValueError, match=r"y: expected \(6,\) or \(6, 1\) for 6 examples .* got \(5,\)"):
        gp.condition(x, y[:5])
    with pytest.raises(ValueError, match=r"y: expected \(6, 2\) for 6 examples of 2 outputs, got \(6,\)"):
        NTKGP(network(2)).condition(x, y)
    with pytest.raises(ValueError, match=r"y: expected \(T, n\) or \(T, n, o\) with at least one task, got \(6,\)"):
        gp.condition_tasks(x, y)
    with pytest.raises(ValueError, match="or NaN where nothing was observed; got an infinite one"):
        gp.condition(x, y / 0)
    with pytest.raises(ValueError, match=r"noise: expected a number, \(6,\) or \(6, 1\), got \(5,\)"):
        gp.condition(x, y, noise=y[:5])
    for bad in (0.0, -y.abs(), math.inf, math.nan):
        with pytest.raises(ValueError, match="noise: expected positive, finite variances"):
            gp.condition(x, y, noise=bad)
    with pytest.raises(ValueError, match="x: 6 of 6 examples hold NaN"):
        gp.condition(x * math.nan, y)
    with pytest.raises(ValueError, match="x: 1 of 2 examples hold NaN"):
        gp.condition(x, y)(torch.tensor([[1.0, 2.0], [math.nan, 0.0]]))
    with pytest.raises(ValueError, match=r"mean: expected values of shape \(6, 1\), got \(2, 1\)"):
        NTKGP(net, mean=lambda x: x[0]).condition(x, y)
    with pytest.raises(ValueError, match="mean: 6 of 6 values are not finite"):  # not: nothing was observed
        NTKGP(net, mean=lambda x: x[:, 0] * math.nan).condition(x, y)
    with pytest.raises(ValueError, match="in train mode"):
        NTKGP(nn.Sequential(net, nn.Dropout())).condition(x, y)


def test_noise_may_be_missing_where_values_are():
    net, x, star = network(2), draw(8, 2), draw(3, 2, seed=1)
    y, noise = 3 * draw(2, 8, 2, seed=2), 0.01 * draw(8, 2, seed=3).exp()
    y[:, 2], y[0, 3, 1] = torch.nan, torch.nan
    holes = noise.clone()
    holes[2] = torch.nan
    gp = NTKGP(net)
    for call in (gp.condition_tasks, lambda x, y, noise: gp.condition(x, y[0], noise=noise)):
        torch.testing.assert_close(call(x, y, noise=holes).mean(star), call(x, y, noise=noise).mean(star))
    want = NTKGP(net).fit(x, y[0], noise=noise).outputscale
    assert NTKGP(net).fit(x, y[0], noise=holes).outputscale == want
    holes[3, 1] = torch.nan  # which the second task has seen
    gp.condition(x, y[0], noise=holes)
    with pytest.raises(ValueError, match="noise: expected positive, finite"):
        gp.condition_tasks(x, y, noise=holes)


@pytest.mark.parametrize("kind", [{}, {"solver": "cg"}, {"space": "parameter"}, {"solver": Nystrom()}])
@pytest.mark.parametrize("outputs", [1, 2])
def test_no_points_have_no_moments(kind, outputs):
    net, x = network(outputs), draw(8, 2)
    posterior = NTKGP(net, **kind).condition(x, draw(8, outputs, seed=1))
    shape = (0,) if outputs == 1 else (0, 2)
    assert posterior.mean(x[:0]).shape == posterior.variance(x[:0]).shape == shape
    assert NTKGP(net).condition_tasks(x, draw(3, 8, outputs)).mean(x[:0]).shape == (3, *shape)


def test_what_they_are_in_a_line():
    net, x = network(2), draw(8, 2)
    gp = NTKGP(net, noise=0.1)
    want = "NTKGP(Sequential in 47 parameters, outputscale=1, noise=0.1, mean='zero', space='function', "
    assert repr(gp) == want + "solver='cholesky', dtype=torch.float64)"
    assert "mean=Sequential, space" in repr(NTKGP(net, mean=net))
    assert "solver='auto'" in repr(NTKGP(net, solver="auto"))
    assert "solver=Nystrom(tolerance=1e-06" in repr(NTKGP(net, solver=Nystrom()))
    assert repr(gp.condition(x, draw(8, 2))) == f"Posterior(8 examples, solver='cholesky', of {gp!r})"
    assert repr(gp.condition_tasks(x, draw(3, 8, 2))).startswith("Posterior(3 tasks, 8 examples, ")


def test_a_network_in_train_mode_after_conditioning_is_named():
    net, x = nn.Sequential(network(), nn.Dropout()).eval(), draw(6, 2)
    posterior = NTKGP(net).condition(x, draw(6, seed=1))
    net.train()
    with pytest.raises(ValueError, match=r"Dropout '1' is in train mode, .* Call net.eval\(\) first"):
        posterior.mean(x)


def test_noise_below_rounding_is_an_error_and_not_jitter():
    net, x = network(width=3), draw(200, 2)
    with pytest.raises(ValueError, match=r"definite in torch.float32: the noise, 1.0e-10, .* Use a larger"):
        NTKGP(net, noise=1e-10, dtype=torch.float32).condition(x, draw(200))


def test_what_cannot_fit_is_refused_before_it_is_made(monkeypatch):
    net, x, y = network(), draw(100, 2), draw(100, seed=1)
    gp = NTKGP(net)
    posterior = gp.condition(x, y)
    many = gp.condition_tasks(x, draw(20, 100))
    formed = []
    real = Linearization.gram
    monkeypatch.setattr(Linearization, "gram", lambda *a, **k: formed.append(0) or real(*a, **k))
    monkeypatch.setattr("ntkbook.memory.available_memory", lambda device: 300_000)
    for call in (lambda: gp.condition(x, y), lambda: gp.fit(x, y)):
        with pytest.raises(MemoryError, match=r"Conditioning on 100 values .* takes 0.0 GiB, and 0.0 GiB are"):
            call()
    with pytest.raises(MemoryError, match=r"covariances of 20 tasks at 50 points .*Use mean\(x\) and"):
        many(x[:50])
    assert not formed
    assert posterior(x[:50]).mean.shape == (50,)
    assert many.variance(x[:50]).shape == (20, 50)
    # Patterns that differ need a factor each.
    gaps = draw(30, 10, seed=3)
    gaps[torch.arange(30), torch.arange(30) % 10] = torch.nan
    gp.condition(x[:10], gaps[0])
    monkeypatch.setattr("ntkbook.memory.available_memory", lambda device: 6_000)
    with pytest.raises(MemoryError, match="Conditioning on 10 values"):
        gp.condition_tasks(x[:10], gaps)
    gp.condition_tasks(x[:10], draw(30, 10))


@pytest.mark.parametrize("kind", [{}, {"solver": "cg"}, {"space": "parameter"}, {"solver": Nystrom(tolerance=1e-10)}])
@pytest.mark.parametrize("outputs", [1, 2])
def test_weights_solve_the_system_and_give_the_mean(kind, outputs):
    net = mlp([2, 9, 9, outputs], "tanh", dtype=torch.double)
    x, star, y = draw(20, 2), draw(6, 2, seed=1), draw(20, outputs, seed=2)
    y[3] = torch.nan
    posterior = NTKGP(net, outputscale=0.7, noise=0.1, **kind).condition(x, y)
    alpha, lin = posterior.weights, Linearization(net)
    assert alpha.shape == ((20, 2) if outputs == 2 else (20,))
    assert torch.equal(alpha.isnan().flatten(), y.isnan().flatten())
    weights = alpha.nan_to_num().flatten()
    left = (y.flatten() - 0.7 * lin.gram(x) @ weights - 0.1 * weights)[~y.isnan().flatten()]
    assert left.norm() <= 1e-6 * y.nan_to_num().norm()  # parameter space solves for something else, to 1e-8
    assert (0.7 * lin.gram(star, x) @ weights - posterior.mean(star).flatten()).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", [{}, {"solver": "cg"}, {"space": "parameter"}, {"solver": Nystrom()}, {"each": True}])
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_mean_alone_costs_no_variance(kind, outputs, monkeypatch):
    net, x, star = network(outputs), draw(20, 2), draw(6, 2, seed=1)
    y = draw(3, 20, outputs, seed=2)
    y[1, 3] = y[2] = torch.nan
    if kind.pop("each", False):
        each = TaskHyperparameters(torch.ones(3), torch.full((3,), 0.1))
        posterior = NTKGP(net, mean="network").condition_tasks(x, y, hyperparameters=each)
    else:
        posterior = NTKGP(net, noise=0.1, mean="network", **kind).condition_tasks(x, y)
    want, variance = posterior.marginals(star)
    assert torch.equal(posterior.variance(star), variance)

    def refuse(*args, **kwargs):
        raise AssertionError("part of a variance")

    monkeypatch.setattr(torch.linalg, "solve_triangular", refuse)
    monkeypatch.setattr(Linearization, "diagonal", refuse)
    torch.testing.assert_close(posterior.mean(star), want, rtol=1e-13, atol=1e-14)
