"""NTKKernel inside GPyTorch and BoTorch models, against the dense formula."""

import copy
import io
import math
import pickle

import gpytorch
import pytest
import torch
from botorch.acquisition import qLogExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from oracles import dense_gp
from oracles.jacobian import loop_jacobian
from oracles.networks import Words, build
from torch import nn

from ntkbook import NTKGP, Linearization, NTKKernel
from ntkbook import kernel as kernel_module


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def network(outputs=1, inputs=2, width=9):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).double()


class Model(gpytorch.models.ExactGP):
    """An ExactGP with any kernel, and a zero mean."""

    def __init__(self, x, y, kernel, noise=0.1):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood().to(y.dtype))
        self.covar_module = kernel.to(y.dtype)
        self.likelihood.noise = noise

    def forward(self, x):
        return MultivariateNormal(x.new_zeros(x.shape[:-1]), self.covar_module(x))


def formula(net, x, y, x_star, scale, noise):
    j, j_star = loop_jacobian(net, x), loop_jacobian(net, x_star)
    zeros = [torch.zeros(len(j), dtype=torch.double), torch.zeros(len(j_star), dtype=torch.double)]
    return dense_gp.posterior(j, j_star, y.flatten(), torch.full((len(j),), noise, dtype=torch.double), scale, *zeros)


# ------------------------------------------------------------------ the matrix itself


@pytest.mark.parametrize("outputs", [1, 3])
def test_values_diagonals_and_batches(outputs):
    net = network(outputs)
    kernel = NTKKernel(net)
    x, x2 = draw(4, 5, 2), draw(4, 3, 2, seed=1)
    j = loop_jacobian(net, x.reshape(-1, 2)).view(4, 5 * outputs, -1)
    j2 = loop_jacobian(net, x2.reshape(-1, 2)).view(4, 3 * outputs, -1)
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(kernel(x[0]).to_dense(), j[0] @ j[0].T, **close)
    torch.testing.assert_close(kernel(x[0], x2[0]).to_dense(), j[0] @ j2[0].T, **close)
    torch.testing.assert_close(kernel(x, x2).to_dense(), j @ j2.mT, **close)
    torch.testing.assert_close(kernel(x).to_dense(), j @ j.mT, **close)
    torch.testing.assert_close(kernel(x, x2[0]).to_dense(), j @ j2[0].T, **close)  # broadcast
    torch.testing.assert_close(kernel(x[None], x2[:, None]).to_dense(), j[None] @ j2[:, None].mT, **close)
    torch.testing.assert_close(kernel(x, diag=True), j.square().sum(-1), **close)
    torch.testing.assert_close(kernel(x).diagonal(dim1=-1, dim2=-2), j.square().sum(-1), **close)
    torch.testing.assert_close(kernel(x[:, :3], x2, diag=True), (j[:, : 3 * outputs] * j2).sum(-1), **close)
    assert kernel(x, x2).shape == (4, 5 * outputs, 3 * outputs)
    one, last = NTKKernel(net, output=outputs - 1), j[:, outputs - 1 :: outputs]
    torch.testing.assert_close(one(x).to_dense(), last @ last.mT, **close)
    torch.testing.assert_close(one(x, diag=True), last.square().sum(-1), **close)


class Tokens(nn.Module):
    """Words by number, where numbers are of a Gaussian process's inputs."""

    def __init__(self):
        super().__init__()
        self.words = Words()

    def forward(self, x):
        return self.words(x.long().abs() % 5)


BATCHED = ["tanh", "vector output", "frozen", "called twice", "convolutions", "batch norm", "layer norm", "group norm"]
BATCHED += ["recurrent", "tied", "constant image", "parameter of its own", "tokens"]


@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_of_small_matrices_is_made_at_once_and_equals_each_alone(name, monkeypatch):
    """Entries that differ, and entries that are equal, in either place; as many at a time as fit."""
    if name == "tokens":
        net, shape = Tokens().double(), (3,)
    else:
        net, x = build(name)
        shape = x.shape[1:]
    size = math.prod(shape)
    x, x2 = 3 * draw(2, 3, 4, size), 3 * draw(2, 3, 5, size, seed=1)
    real, grams = Linearization.gram, []
    lin = Linearization(net)
    outputs = lin.num_outputs(x[0, 0].view(-1, *shape))

    def alone(a, b, output):
        a, b = (v.expand(2, 3, *v.shape[-2:]).reshape(6, -1, *shape) for v in (a, b))
        each = torch.stack([real(lin, one, two, output=output) for one, two in zip(a, b)])
        return each.view(2, 3, *each.shape[1:])

    monkeypatch.setattr(Linearization, "gram", lambda *a, **k: grams.append(0) or real(*a, **k))
    for output in {None, outputs - 1}:
        kernel = NTKKernel(net, input_shape=shape, output=output)
        close = {"rtol": 1e-11, "atol": 1e-12}
        torch.testing.assert_close(kernel.forward(x, x2), alone(x, x2, output), **close)
        torch.testing.assert_close(kernel.forward(x, x), alone(x, x, output), **close)
        torch.testing.assert_close(kernel.forward(x, x.clone()), alone(x, x, output), **close)
        with monkeypatch.context() as patch:  # no room for more than one at a time
            patch.setattr(Linearization, "_budget", lambda self, memory: memory or 1)
            torch.testing.assert_close(kernel.forward(x, x2), alone(x, x2, output), **close)
        assert not grams
        with monkeypatch.context() as patch:
            patch.setattr(kernel_module, "SMALL", 0)
            torch.testing.assert_close(kernel.forward(x, x2), alone(x, x2, output), **close)
        assert len(grams) == 6
        grams.clear()
        same, same2 = x[:1, :1].repeat(2, 3, 1, 1), x2[0, 1].expand(2, 3, -1, -1)
        for a, b in ((x, same2), (same, x2), (same, same2), (same, same.clone()), (x, x2[0, 0]), (x[0, 0], x2)):
            torch.testing.assert_close(kernel.forward(a, b), alone(a, b, output), **close)
        assert len(grams) == 6
        torch.testing.assert_close(kernel.forward(x[:, :1], same2), alone(x[:, :1], same2, output), **close)
        torch.testing.assert_close(kernel.forward(same, x2[:, :1]), alone(same, x2[:, :1], output), **close)
        grams.clear()


@pytest.mark.parametrize("name", ["tanh", "convolutions"])
def test_derivatives_of_a_batch(name):
    """Each entry's, also where entries are equal, as those of its own matrix: gradients of weighted sums."""
    net, x = build(name)
    lin, shape, size = Linearization(net), x.shape[1:], x[0].numel()
    kernel = NTKKernel(net, input_shape=shape, output=0)
    x, x2 = draw(2, 2, size).requires_grad_(), draw(2, 1, size, seed=1).requires_grad_()
    equal = draw(1, 2, size).repeat(2, 1, 1).requires_grad_()
    one, constant = x2[0].detach().requires_grad_(), x2[0].detach()
    for a, b in ((x, x2), (x, x), (equal, x2), (x, one), (one, x), (x, constant)):
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        pairs = zip(*(v.expand(*batch, *v.shape[-2:]).reshape(*batch, -1, *shape) for v in (a, b)))
        want = torch.stack([lin.gram(v, None if a is b else w, output=0) for v, w in pairs])
        wanted = {id(v): v for v in (a, b) if v.requires_grad}.values()
        weights = draw(*want.shape, seed=3)
        got = torch.autograd.grad((kernel.forward(a, b) * weights).sum(), list(wanted))
        for left, right in zip(got, torch.autograd.grad((want * weights).sum(), list(wanted))):
            torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)
    if name == "tanh":
        assert torch.autograd.gradcheck(kernel.forward, (x, x2))


def test_the_last_matrix_is_kept_for_the_same_inputs(monkeypatch):
    """Fitting hyperparameters calls for one matrix again and again, and the network's has none."""
    net, x, x2 = network(), draw(5, 2), draw(5, 2, seed=1)
    kernel, grams, real = NTKKernel(net), [], Linearization.gram
    monkeypatch.setattr(Linearization, "gram", lambda *a, **k: grams.append(0) or real(*a, **k))
    first = kernel(x).to_dense()
    want = first.clone()
    first.zero_()  # a caller's own
    assert torch.equal(kernel(x.clone()).to_dense(), want)
    assert len(grams) == 1
    assert len(pickle.dumps(kernel)) == len(pickle.dumps(NTKKernel(net)))
    assert torch.equal(copy.deepcopy(kernel)(x).to_dense(), want)
    assert len(grams) == 2  # it is not copied
    x[0] += 1  # in place
    changed = kernel(x).to_dense()
    assert len(grams) == 3
    torch.testing.assert_close(changed, real(Linearization(net), x), rtol=1e-12, atol=1e-13)
    kernel(x2).to_dense()
    assert torch.equal(kernel(x).to_dense(), changed)
    single = kernel(x.float()).to_dense()
    assert single.dtype == torch.float32
    assert kernel(x.clone().requires_grad_()).to_dense().requires_grad
    wide = NTKKernel(network(3))
    assert wide(x).to_dense().shape == (15, 15)
    wide.output = 1
    assert wide(x).to_dense().shape == (5, 5)
    monkeypatch.setattr(kernel_module, "working_memory", lambda device: 100)  # too large to keep
    before = len(grams)
    assert torch.equal(kernel(x2).to_dense(), kernel(x2).to_dense())
    assert len(grams) == before + 2


def test_equal_inputs_of_different_origin_have_their_own_derivatives():
    """k(x, x′) at x = x′ is not k(x, x): its derivative by x is half as large."""
    kernel, x = NTKKernel(network()), draw(3, 2)
    other, weights = x.clone(), draw(3, 3, seed=1)
    moving = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((weights * kernel(moving, other).to_dense()).sum(), moving)
    step, numeric = 1e-6, torch.zeros_like(x)
    for i in range(3):
        for j in range(2):
            shift = torch.zeros_like(x)
            shift[i, j] = step
            change = kernel(x + shift, other).to_dense() - kernel(x - shift, other).to_dense()
            numeric[i, j] = (weights * change).sum() / (2 * step)
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-8)
    (diagonal,) = torch.autograd.grad(kernel(moving, other, diag=True).sum(), moving)
    (twice,) = torch.autograd.grad(kernel(moving, moving, diag=True).sum(), moving)
    torch.testing.assert_close(2 * diagonal, twice, rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(kernel(moving).to_dense().sum(), moving)
    assert torch.autograd.gradcheck(lambda a: kernel(a).to_dense(), (moving,))
    assert torch.autograd.gradcheck(lambda a, b: kernel(a, b).to_dense(), (moving, other.requires_grad_()))


@pytest.mark.parametrize("net_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("data_dtype", [torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_data(net_dtype, data_dtype):
    net = network().to(net_dtype)
    x, y, x_star = draw(10, 2).to(data_dtype), draw(10, seed=1).to(data_dtype), draw(3, 2, seed=2).to(data_dtype)
    kernel = NTKKernel(net)
    assert kernel(x).to_dense().dtype == data_dtype
    assert kernel.dtype == data_dtype
    model = Model(x, y, ScaleKernel(kernel)).eval()
    model.covar_module.outputscale = 1.0
    with torch.no_grad(), gpytorch.settings.fast_pred_var():  # LOVE asks the kernel for its dtype
        got = model(x_star)
        assert got.mean.dtype == got.variance.dtype == data_dtype
    wide = copy.deepcopy(net).double()
    want = formula(wide, x.double(), y.double(), x_star.double(), 1.0, model.likelihood.noise.item())
    close = 1e-7 if data_dtype == torch.double else 1e-3
    prior = float(Linearization(wide).diagonal(x_star.double()).max())
    assert (got.mean.double() - want[0]).abs().max() < close * prior
    assert (got.variance.double() - want[1].diagonal()).abs().max() < close * prior
    assert next(net.parameters()).dtype == net_dtype


def test_it_has_no_parameters_and_survives_copies():
    net, x = network(), draw(4, 2)
    kernel = ScaleKernel(NTKKernel(net)).double()
    assert [name for name, _ in kernel.named_parameters()] == ["raw_outputscale"]
    assert not kernel.base_kernel.state_dict()
    assert not kernel.base_kernel.is_stationary
    want = kernel(x).to_dense()
    other = copy.deepcopy(kernel)
    torch.testing.assert_close(other(x).to_dense(), want)
    other.load_state_dict(kernel.state_dict())
    stored = io.BytesIO()
    torch.save(kernel, stored)
    stored.seek(0)
    torch.testing.assert_close(torch.load(stored, weights_only=False)(x).to_dense(), want)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    torch.testing.assert_close(kernel(x).to_dense(), want)
    torch.testing.assert_close(NTKKernel(Linearization(net, ["0.weight"]))(x).to_dense(), torch.zeros(4, 4).double())


def test_errors():
    with pytest.raises(ValueError, match="x: 1 of 4 examples hold NaN"):
        NTKKernel(network())(torch.cat([draw(3, 2), torch.full((1, 2), torch.nan).double()])).to_dense()
    with pytest.raises(ValueError, match="the network has 1 outputs, got index 2"):
        NTKKernel(network(), output=2)(draw(3, 2)).to_dense()
    with pytest.raises(ValueError, match="last_dim_is_batch splits an input"):
        NTKKernel(network()).forward(draw(3, 2), draw(3, 2), last_dim_is_batch=True)
    with pytest.raises(RuntimeError, match="shape"):
        NTKKernel(network(), input_shape=(3,))(draw(4, 2)).to_dense()
    with pytest.raises(ValueError, match="in train mode"):
        NTKKernel(nn.Sequential(network(), nn.Dropout()))(draw(4, 2)).to_dense()


# ------------------------------------------------------------------ with other kernels, on images


def test_active_dimensions_alone_scaled_and_in_sums():
    net, x = network(), draw(5, 4)
    columns = [3, 1]
    want = loop_jacobian(net, x[:, columns])
    want = want @ want.T
    kernel = NTKKernel(net, active_dims=columns)
    rbf = RBFKernel().double()
    smooth = rbf(x).to_dense().detach()
    scaled = ScaleKernel(kernel).double()
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(kernel(x).to_dense(), want, **close)
    torch.testing.assert_close(scaled(x).to_dense(), scaled.outputscale * want, **close)
    torch.testing.assert_close((kernel + rbf)(x).to_dense(), want + smooth, **close)
    torch.testing.assert_close((rbf * kernel)(x).to_dense(), want * smooth, **close)
    assert (kernel + rbf)(x).shape == (5, 5)
    torch.testing.assert_close((kernel + rbf)(x, diag=True), want.diagonal() + 1, **close)


def test_flattened_images():
    net, x = build("convolutions")
    kernel = NTKKernel(net, input_shape=(2, 5, 5), output=1)
    flat = x.flatten(1)
    j = loop_jacobian(net, x)[1::3]
    torch.testing.assert_close(kernel(flat).to_dense(), j @ j.T, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(kernel(flat, diag=True), j.square().sum(1), rtol=1e-11, atol=1e-12)
    batched = kernel(flat.view(2, 3, -1)).to_dense()
    torch.testing.assert_close(batched[1], (j @ j.T)[3:, 3:], rtol=1e-11, atol=1e-12)
    y = draw(6)
    model = Model(flat, y, ScaleKernel(kernel)).eval()
    with torch.no_grad():
        got = model(flat[:2])
    gram = j @ j.T * model.covar_module.outputscale.item()
    want = gram[:2] @ torch.linalg.solve(gram + model.likelihood.noise.item() * torch.eye(6).double(), y)
    torch.testing.assert_close(got.mean, want, rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------ GPyTorch models


@pytest.mark.parametrize("n", [30, 801])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_exact_gp_is_the_formula(scaled, n):
    net, x, y, x_star = network(), draw(n, 2), draw(n, seed=1), draw(6, 2, seed=2)
    kernel = ScaleKernel(NTKKernel(net)) if scaled else NTKKernel(net)
    model = Model(x, y, kernel)
    if scaled:
        model.covar_module.outputscale = 1.7
    scale = model.covar_module.outputscale.item() if scaled else 1.0
    noise = model.likelihood.noise.item()
    want = formula(net, x, y, x_star, scale, noise)
    with gpytorch.settings.max_cholesky_size(1000), torch.no_grad():
        evidence = ExactMarginalLogLikelihood(model.likelihood, model)(model(x), y) * n
        latent = model.eval()(x_star)
        assert (latent.mean - want[0]).abs().max() < 1e-8
        assert (latent.covariance_matrix - want[1]).abs().max() < 1e-8
    assert float(evidence) == pytest.approx(float(want[2]), rel=1e-10)
    ours = NTKGP(net, outputscale=scale, noise=noise).condition(x, y)  # the same without raising anything
    assert (ours(x_star).covariance_matrix - want[1]).abs().max() < 1e-8


def test_training_moves_the_outputscale_and_not_the_network():
    net, x = network(), draw(20, 2)
    y, before = torch.sin(2 * x[:, 0]) + 0.1 * draw(20, seed=1), copy.deepcopy(net.state_dict())
    model = Model(x, y, ScaleKernel(NTKKernel(net)))
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    optimiser = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", max_iter=100, tolerance_grad=1e-9)

    def step():
        optimiser.zero_grad()
        loss = -mll(model(x), y)
        loss.backward()
        return loss

    optimiser.step(step)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    assert model.covar_module.outputscale.item() != pytest.approx(0.693, abs=0.01)  # where it started
    with torch.no_grad():
        climbed = 20 * float(mll(model(x), y))
    fitted = NTKGP(net).fit(x, y)  # over the whole range: never worse than a climb from one start
    assert float(fitted.condition(x, y).log_marginal_likelihood) >= climbed - 1e-6


def test_a_network_of_several_outputs_is_a_multitask_kernel():
    net, x, y, x_star = network(3), draw(8, 2), draw(8, 3, seed=1), draw(4, 2, seed=2)

    class Multitask(gpytorch.models.ExactGP):
        def __init__(self):
            likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=3, has_task_noise=False).double()
            super().__init__(x, y, likelihood)
            self.covar_module = NTKKernel(net)
            likelihood.noise = 0.2

        def forward(self, x):
            return MultitaskMultivariateNormal(x.new_zeros(*x.shape[:-1], 3), self.covar_module(x))

    model = Multitask()
    with torch.no_grad():
        got = model.eval()(x_star)
    noise = model.likelihood.noise.item()
    want = formula(net, x, y, x_star, 1.0, noise)
    ours = NTKGP(net, noise=noise).condition(x, y)(x_star)
    for latent in (got, ours):
        torch.testing.assert_close(latent.mean, want[0].view(4, 3), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(latent.covariance_matrix, want[1], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(latent.variance, want[1].diagonal().view(4, 3), rtol=1e-7, atol=1e-9)


# ------------------------------------------------------------------ BoTorch


def single_task(net, outputs=1, **kwargs):
    x = torch.rand(15, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    y = torch.stack([torch.sin(3 * x[:, 0]) + c * x[:, 1] for c in range(outputs)], dim=1)
    y = y + 0.05 * draw(15, outputs, seed=1)
    return SingleTaskGP(x, y, covar_module=ScaleKernel(NTKKernel(net)), **kwargs), x, y


@pytest.mark.filterwarnings("ignore::botorch.exceptions.warnings.InputDataWarning")
@pytest.mark.parametrize("transforms", [False, True])
def test_single_task_gp(transforms):
    net = network()
    if transforms:
        model, x, y = single_task(net, input_transform=Normalize(d=2), outcome_transform=Standardize(m=1))
    else:
        model, x, y = single_task(net, outcome_transform=None)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    state = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    twin.load_state_dict(state)
    stars = torch.rand(5, 3, 2, dtype=torch.double, generator=torch.Generator().manual_seed(2))  # (b, q, d)
    posterior = model.posterior(stars)
    assert posterior.mean.shape == posterior.variance.shape == (5, 3, 1)
    assert posterior.rsample(torch.Size([4])).shape == (4, 5, 3, 1)
    torch.testing.assert_close(twin.posterior(stars).mean, posterior.mean)
    for b in range(5):
        alone = model.posterior(stars[b])
        torch.testing.assert_close(posterior.mean[b], alone.mean, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(posterior.variance[b], alone.variance, rtol=1e-6, atol=1e-9)
    if not transforms:
        scale, noise = model.covar_module.outputscale.item(), model.likelihood.noise.item()
        constant = model.mean_module.constant.item()
        want = formula(net, x, y - constant, stars.reshape(-1, 2), scale, noise)
        torch.testing.assert_close(posterior.mean.flatten(), want[0] + constant, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(posterior.variance.flatten(), want[1].diagonal(), rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore::botorch.exceptions.warnings.InputDataWarning")
def test_gradients_of_the_posterior_by_where_to_look():
    model, x, _ = single_task(network(), outcome_transform=None)
    model.eval()
    # Also at training points, where equal inputs come from two places.
    for stars in (x[:2].clone(), draw(2, 2, seed=3), draw(2, 2, 2, seed=4)):
        stars.requires_grad_()
        assert torch.autograd.gradcheck(lambda a: model.posterior(a).mean, (stars,), atol=1e-6)
        assert torch.autograd.gradcheck(lambda a: model.posterior(a).variance, (stars,), atol=1e-5)
    acquisition = qLogExpectedImprovement(model, best_f=0.0)
    stars = torch.rand(3, 2, 2, dtype=torch.double, requires_grad=True)
    acquisition(stars).sum().backward()
    assert torch.isfinite(stars.grad).all()
    assert stars.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore::botorch.exceptions.warnings.InputDataWarning")
def test_single_task_gp_of_several_outcomes():
    """BoTorch batches its outcomes: the same kernel for each."""
    net = network()
    model, x, y = single_task(net, outputs=2, outcome_transform=None)
    model.eval()
    stars = torch.rand(4, 2, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        mean = model.posterior(stars).mean
    noise = model.likelihood.noise.flatten()
    for c in range(2):
        want = formula(net, x, y[:, c], stars, model.covar_module.outputscale.item(), noise[c].item())
        torch.testing.assert_close(mean[:, c], want[0], rtol=1e-7, atol=1e-8)


@pytest.mark.filterwarnings("ignore::botorch.exceptions.warnings.InputDataWarning")
def test_conditioning_a_botorch_model_on_more_data():
    net = network()
    model, x, y = single_task(net, outcome_transform=None)
    model.eval()
    model.posterior(x[:1])
    more, values = draw(3, 2, seed=5), draw(3, 1, seed=6)
    with torch.no_grad():
        got = model.condition_on_observations(more, values).posterior(x[:2]).mean
    scale, noise = model.covar_module.outputscale.item(), model.likelihood.noise.item()
    want = formula(net, torch.cat([x, more]), torch.cat([y, values]), x[:2], scale, noise)
    torch.testing.assert_close(got.flatten(), want[0], rtol=1e-6, atol=1e-7)
