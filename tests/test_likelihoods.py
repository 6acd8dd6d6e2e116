"""Likelihoods against autograd, enumeration, torch.distributions and sixty decimal digits."""

import math
from decimal import Decimal, getcontext, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td
from torch.func import grad, hessian, jvp, vmap

from ntkbook.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
    get_likelihood,
)

getcontext().prec = 60
TOLERANCE = 1e-13  # of the largest entry, in float64
NOISES = torch.tensor([0.3, 2.0, 1e-4], dtype=torch.double)
CASES: dict[str, tuple[Likelihood, int]] = {
    "one Gaussian": (Gaussian(0.3), 1),
    "Gaussian": (Gaussian(torch.tensor(0.7)), 3),
    "noise per output": (Gaussian(NOISES), 3),
    "heteroscedastic": (HeteroscedasticGaussian(), 2),
    "categorical": (Categorical(), 5),
    "two classes": (Categorical(), 2),
    "Bernoulli": (Bernoulli(), 1),
    "Poisson": (Poisson(), 1),
}
every_case = pytest.mark.parametrize("name", CASES)


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def outputs(name, n=4, seed=0, scale=1.5):
    return draw(n, CASES[name][1], seed=seed, scale=scale)


def error(got, want):
    """The largest difference, relative to the largest entry."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def distribution(likelihood, f):
    """The same likelihood in torch.distributions, of event shape y's."""
    match likelihood:
        case Gaussian():
            normal = td.Normal(f, torch.as_tensor(likelihood.noise, dtype=f.dtype).sqrt().expand_as(f))
            return td.Independent(normal, 1)
        case HeteroscedasticGaussian():
            variance = likelihood.floor + (1 + f[:, 1].exp()).log()
            return td.Normal(f[:, 0], variance.sqrt())
        case Categorical():
            return td.Categorical(logits=f)
        case Bernoulli():
            return td.Bernoulli(logits=f[:, 0])
        case Poisson():
            return td.Poisson(f[:, 0].exp())
    raise AssertionError(likelihood)


# ------------------------------------------------------------------ H by its definitions


@every_case
def test_h_is_the_hessian_of_kl(name):
    likelihood, _ = CASES[name]
    f = outputs(name)

    def kl(f1, f2):
        return likelihood.kl(f1[None], f2[None])[0]

    want = torch.stack([hessian(kl, argnums=1)(row, row) for row in f])
    assert error(likelihood.hessian(f), want) < TOLERANCE
    assert error(vmap(hessian(kl, argnums=1))(f, f), want) < TOLERANCE


def expectation(likelihood, f, ys, values):
    """Σ_y p(y | f) values(y) for one f (o,), values a function of (f, y)."""
    return sum(likelihood.log_prob(f[None], y).exp() * values(f, y) for y in ys)


def score_product(likelihood):
    def value(f, y):
        score = grad(lambda f: likelihood.log_prob(f[None], y)[0])(f)
        return torch.outer(score, score)

    return value


@pytest.mark.parametrize("name", ["categorical", "two classes", "Bernoulli", "Poisson"])
def test_h_is_the_expected_product_of_scores_over_every_y(name):
    likelihood, o = CASES[name]
    # A Poisson variable of rate e^1.5 = 4.5 or less exceeds 80 with a probability below 1e-60.
    count = {"Poisson": 80, "Bernoulli": 2}.get(name, o)
    f = outputs(name).clamp(max=1.5)
    ys = list(torch.arange(count)[:, None])
    total = torch.stack([expectation(likelihood, row, ys, lambda f, y: torch.ones(())) for row in f])
    assert error(total, torch.ones_like(total)) < TOLERANCE
    want = torch.stack([expectation(likelihood, row, ys, score_product(likelihood)) for row in f])
    assert error(likelihood.hessian(f), want) < TOLERANCE


@pytest.mark.parametrize("name", ["one Gaussian", "Gaussian", "noise per output", "heteroscedastic"])
@pytest.mark.parametrize("definition", ["score", "curvature"])
def test_h_of_gaussians_is_the_expectation_by_quadrature(name, definition):
    likelihood, o = CASES[name]
    # Both integrands are polynomials in each y of degree at most 4, so that three points, ±√3 and 0 deviations with
    # weights 1/6 and 2/3, integrate exactly.
    nodes = torch.tensor([-math.sqrt(3), 0, math.sqrt(3)], dtype=torch.double)
    weights = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.double)
    columns = 1 if name == "heteroscedastic" else o
    grid = torch.cartesian_prod(*[torch.arange(3)] * columns).reshape(-1, columns)

    def curvature(f, y):
        return -hessian(lambda f: likelihood.log_prob(f[None], y)[0])(f)

    value = score_product(likelihood) if definition == "score" else curvature
    for row in outputs(name):
        if columns == 1 and o == 2:
            mean, deviation = row[:1], (likelihood.floor + row[1:].exp().log1p()).sqrt()
        else:
            mean, deviation = row, torch.as_tensor(likelihood.noise, dtype=row.dtype).sqrt().expand(o)
        want = sum(weights[i].prod() * value(row, (mean + deviation * nodes[i])[None]) for i in grid)
        assert error(likelihood.hessian(row[None])[0], want) < TOLERANCE


@pytest.mark.parametrize("noise", [torch.tensor(0.4, dtype=torch.double), NOISES], ids=["one", "per output"])
def test_the_information_of_log_noise_is_the_hessian_of_kl(noise):
    f = draw(5, 3)

    def kl(f2, log_noise):
        return Gaussian(noise).kl(f, f2, other=Gaussian(log_noise.exp())).sum()

    (_, cross), (_, own) = hessian(kl, argnums=(0, 1))(f, noise.log())
    want = torch.diag(own) if noise.ndim else own
    found = Gaussian(noise).log_noise_fisher(f)
    assert error(found, want) < TOLERANCE
    assert float(found.sum()) == 5 * 3 / 2
    assert cross.abs().max() < 1e-12 / noise.min()
    assert noise.ndim == 0 or (own - own.diag().diag()).abs().max() < TOLERANCE


# ------------------------------------------------------------------ products


@given(
    name=st.sampled_from(sorted(CASES)),
    n=st.integers(1, 4),
    k=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_products_agree_with_the_matrices(name, n, k, seed, scale):
    likelihood, o = CASES[name]
    f, u, w = outputs(name, n, seed, scale), draw(n, o, k, seed=seed + 1), draw(n, o, k, seed=seed + 2)
    h, root = likelihood.hessian(f), likelihood.root(f)
    assert error(root @ root.mT, h) < TOLERANCE
    assert error(likelihood.apply(f, u), h @ u) < TOLERANCE
    assert error(likelihood.apply_root(f, u), root @ u) < TOLERANCE
    assert error(likelihood.apply_root_transpose(f, u), root.mT @ u) < TOLERANCE
    left, right = (likelihood.apply_root(f, u) * w).sum((1, 2)), (u * likelihood.apply_root_transpose(f, w)).sum((1, 2))
    size = likelihood.root(f).abs().sum((1, 2)) * u.abs().amax((1, 2)) * w.abs().amax((1, 2))
    assert ((left - right).abs() <= TOLERANCE * size).all()
    for product in (likelihood.apply, likelihood.apply_root, likelihood.apply_root_transpose):
        assert torch.equal(product(f, u[..., 0]), product(f, u[..., :1])[..., 0])
    assert torch.equal(h, h.mT)


def test_products_with_many_classes_take_no_square_matrix():
    o = 50_000  # a float64 square would take 20 GB
    f, u = draw(1, o), draw(1, o)
    p = f.softmax(1)
    likelihood = Categorical()
    assert error(likelihood.apply(f, u), p * u - p * (p * u).sum()) < TOLERANCE
    assert error(likelihood.apply_root(f, likelihood.apply_root_transpose(f, u)), likelihood.apply(f, u)) < TOLERANCE


# ------------------------------------------------------------------ log_prob, KL, samples


@every_case
def test_log_prob_and_kl_are_those_of_torch_distributions(name):
    likelihood, _ = CASES[name]
    f, f2 = outputs(name, 20), outputs(name, 20, seed=1)
    p, q = distribution(likelihood, f), distribution(likelihood, f2)
    y = p.sample()
    assert error(likelihood.log_prob(f, y), p.log_prob(y)) < TOLERANCE
    assert error(likelihood.kl(f, f2), td.kl_divergence(p, q)) < TOLERANCE
    if name not in ("categorical", "two classes") and f.shape[1] < 3:
        assert torch.equal(likelihood.log_prob(f, y.reshape(-1)), likelihood.log_prob(f, y.reshape(-1, 1)))


def test_kl_between_two_noises():
    f, f2 = draw(6, 3), draw(6, 3, seed=1)
    one, two = Gaussian(NOISES), Gaussian(0.02)
    want = td.kl_divergence(distribution(one, f), distribution(two, f2))
    assert error(one.kl(f, f2, other=two), want) < TOLERANCE
    assert torch.equal(one.kl(f, f2, other=one), one.kl(f, f2))


@given(
    name=st.sampled_from(sorted(CASES)),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([1.0, 10.0, 100.0]),
    step=st.sampled_from([1e-300, 1e-9, 1e-3, 0.3, 1.0, 3.0, 100.0]),
)
def test_kl_is_not_negative_and_is_zero_without_a_change(name, seed, scale, step):
    likelihood, o = CASES[name]
    f = outputs(name, 3, seed, scale)
    assert torch.equal(likelihood.kl(f, f), torch.zeros(3, dtype=torch.double))
    assert (likelihood.kl(f, f + step * draw(3, o, seed=seed + 1)) >= 0).all()


def exact_kl(likelihood, f, f2):
    """KL of one example, from float outputs, with sixty digits."""
    f, f2 = ([Decimal(v) for v in row.tolist()] for row in (f, f2))
    match likelihood:
        case HeteroscedasticGaussian():
            v, v2 = (Decimal(likelihood.floor) + (1 + s.exp()).ln() for s in (f[1], f2[1]))
            return ((f2[0] - f[0]) ** 2 / v2 + v / v2 - 1 - (v / v2).ln()) / 2
        case Poisson():
            return f2[0].exp() - f[0].exp() - f[0].exp() * (f2[0] - f[0])
        case Bernoulli():
            f, f2 = [Decimal(0), *f], [Decimal(0), *f2]
    total, total2 = (sum(v.exp() for v in row) for row in (f, f2))
    return sum(a.exp() / total * (a - b + total2.ln() - total.ln()) for a, b in zip(f, f2))


@pytest.mark.parametrize("name", ["heteroscedastic", "categorical", "two classes", "Bernoulli", "Poisson"])
@pytest.mark.parametrize("step", [1e-10, 1e-6, 1e-3, 0.5, 1.0, 2.0, 20.0])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_kl_keeps_its_digits_for_steps_of_every_size(name, step, scale):
    likelihood, o = CASES[name]
    f = outputs(name, 10, seed=3, scale=scale)
    f2 = f + step * draw(10, o, seed=4)
    exact = [exact_kl(likelihood, *rows) for rows in zip(f, f2)]
    found = [Decimal(v) for v in likelihood.kl(f, f2).tolist()]
    worst = max(abs(a / b - 1) for a, b in zip(found, exact))
    assert worst < 5e-14, worst


def test_kl_of_noises_keeps_its_digits():
    for ratio in (1e-12, 1e-6, 0.4, 0.6, 1e3, -1e-6, -0.9):
        noise = torch.tensor(0.3, dtype=torch.double)
        noise2 = noise * (1 + ratio)
        a, b = Decimal(noise.item()), Decimal(noise2.item())
        exact = (a / b - 1 - (a / b).ln()) / 2
        f = torch.zeros(1, 1, dtype=torch.double)
        found = Gaussian(noise).kl(f, f, other=Gaussian(noise2)).item()
        assert abs(Decimal(found) / exact - 1) < 1e-14, ratio


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_of_kl_at_a_small_step_is_h_times_the_step(name, dtype):
    # A Fisher product by finite differences. The error is that of the second-order term, of the size of the step, plus
    # rounding: f is a multiple of 1/8 and the step's entries powers of two, so that f + step is exact.
    likelihood, _ = CASES[name]
    f = (outputs(name) * 8).round().to(dtype) / 8
    step = 2.0 ** (-30 if dtype == torch.float64 else -14) * outputs(name, seed=1).sign().to(dtype)
    found = grad(lambda f2: likelihood.kl(f, f2).sum())(f + step)
    second_order = 4 * float(step.abs().max())
    assert error(found, likelihood.apply(f, step)) < second_order + 20 * torch.finfo(dtype).eps


@every_case
def test_samples_have_the_moments_of_the_likelihood(name):
    # Means of N draws lie within 6 standard errors: by the normal approximation each of at most 30 comparisons a case
    # raises a false alarm with a probability of 2e-9. The standard errors are those of the sample itself.
    likelihood, o = CASES[name]
    f = outputs(name, 3)
    count = 20_000
    y = likelihood.sample(f.repeat_interleave(count, 0), torch.Generator().manual_seed(0))
    assert torch.equal(y, likelihood.sample(f.repeat_interleave(count, 0), torch.Generator().manual_seed(0)))
    assert y.dtype == (torch.long if isinstance(likelihood, Categorical) else f.dtype)
    likelihood.log_prob(f.repeat_interleave(count, 0), y)
    p = distribution(likelihood, f)
    if isinstance(likelihood, Categorical):
        statistics = torch.nn.functional.one_hot(y, o).to(f).view(3, count, o)
        mean = f.softmax(1)
    else:
        draws = y.view(3, count, -1)
        mean = p.mean.reshape(3, -1)
        variance = p.variance.reshape(3, -1)
        statistics, mean = torch.cat([draws, (draws - mean[:, None]).square()], 2), torch.cat([mean, variance], 1)
    deviation = statistics.std(1) / math.sqrt(count)
    assert ((statistics.mean(1) - mean).abs() <= 6 * deviation).all()


# ------------------------------------------------------------------ extremes


def extreme(likelihood, dtype):
    """Outputs of one likelihood at the edges of their range, alone and together."""
    if isinstance(likelihood, Poisson):
        # KL is λ times up to 1e4 here, and log λ at most its largest value minus 10.
        return torch.tensor([[-1e4], [-200.0], [0.0], [math.log(torch.finfo(dtype).max) - 10]], dtype=dtype)
    values = torch.tensor([-1e4, -200.0, -30.0, 0.0, 30.0, 200.0, 1e4], dtype=dtype)
    if likelihood.num_outputs == 1:
        return values[:, None]
    return torch.cartesian_prod(values, values, *[values[:1]] * (not likelihood.num_outputs))


@pytest.mark.parametrize("likelihood", [get_likelihood(name) for name in LIKELIHOODS], ids=list(LIKELIHOODS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_outputs_are_finite_with_finite_gradients(likelihood, dtype):
    rows = extreme(likelihood, dtype)
    first = rows.repeat_interleave(len(rows), 0).requires_grad_()
    second = rows.repeat(len(rows), 1).requires_grad_()
    y = likelihood.sample(second, torch.Generator().manual_seed(0)) if not isinstance(likelihood, Poisson) else None
    u = torch.ones_like(first)
    values = {
        "kl": likelihood.kl(first, second),
        "log_prob": likelihood.log_prob(first, torch.ones(len(first)) if y is None else y),
        "hessian": likelihood.hessian(first),
        "root": likelihood.root(first),
        "apply": likelihood.apply(first, u),
        "apply_root": likelihood.apply_root(first, u),
        "apply_root_transpose": likelihood.apply_root_transpose(first, u),
    }
    for what, value in values.items():
        assert value.dtype == dtype
        assert value.isfinite().all(), what
        if value.requires_grad:  # a Gaussian's H is constant
            found = torch.autograd.grad(value, [first, second], torch.ones_like(value), allow_unused=True)
            assert all(gradient is None or gradient.isfinite().all() for gradient in found), what
    assert (values["kl"] >= 0).all()
    h = values["hessian"].detach()
    assert (torch.linalg.eigvalsh(h).amin(1) >= -4 * torch.finfo(dtype).eps * h.abs().amax((1, 2))).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_poisson_rate_at_the_limit_of_its_dtype(dtype):
    f = torch.tensor([[math.log(torch.finfo(dtype).max) - 0.1]], dtype=dtype)
    rate = f.double().exp()
    eps = torch.finfo(dtype).eps
    likelihood = Poisson()
    tolerance = 4 * eps
    assert error(likelihood.hessian(f)[0].double(), rate) < tolerance
    assert error((likelihood.root(f)[0].double()).square(), rate) < tolerance
    assert error(likelihood.log_prob(f, torch.zeros(1)).double(), -rate[0]) < tolerance
    assert (
        error(likelihood.kl(f, f - 1).double(), rate[0] * math.exp(-1)) < 8 * f.item() * eps
    )  # of the rounding of f − 1


def test_h_keeps_its_digits_where_one_class_takes_all():
    # π = (1 − 2ε, ε, ε) with ε = e^-60 up to a factor: 1 − π₀ is zero in floating point.
    f = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.double)
    e = math.exp(-60)
    want = torch.tensor([[2 * e, -e, -e], [-e, e, 0], [-e, 0, e]], dtype=torch.double)
    likelihood = Categorical()
    got = {
        "hessian": likelihood.hessian(f)[0],
        "apply": likelihood.apply(f, torch.eye(3, dtype=torch.double)[None])[0],
        "root": (likelihood.root(f) @ likelihood.root(f).mT)[0],
    }
    for what, h in got.items():
        assert error(h, want) < TOLERANCE, what


def test_softplus_and_its_derivative_keep_their_digits():
    likelihood = HeteroscedasticGaussian(floor=1e-300)
    for s in (-600.0, -40.0, -1.0, 19.9, 20.1, 36.0):  # torch's own softplus changes its formula at 20
        f = torch.tensor([[0.0, s]], dtype=torch.double)
        with localcontext(prec=400):  # 1 + e⁻⁶⁰⁰ needs 261
            e = Decimal(s).exp()
            v, slope = Decimal("1e-300") + (1 + e).ln(), e / (1 + e)
        h = likelihood.hessian(f)[0].diagonal().tolist()
        assert abs(Decimal(h[0]) * v - 1) < 1e-14, s
        assert abs(Decimal(h[1]) / ((slope / v) ** 2 / 2) - 1) < 1e-14, s


# ------------------------------------------------------------------ derivatives, transforms, dtypes


@every_case
def test_gradients_are_those_of_finite_differences(name):
    likelihood, o = CASES[name]
    f, f2, u = outputs(name, 2).requires_grad_(), outputs(name, 2, seed=1).requires_grad_(), draw(2, o, seed=2)
    y = likelihood.sample(f, torch.Generator().manual_seed(0))
    functions = [(lambda f: likelihood.log_prob(f, y), (f,)), (likelihood.kl, (f, f2))]
    if not isinstance(likelihood, Gaussian):  # whose H is constant
        functions += [
            (likelihood.hessian, (f,)),
            (likelihood.root, (f,)),
            (lambda f: likelihood.apply(f, u), (f,)),
            (lambda f: likelihood.apply_root(f, u), (f,)),
            (lambda f: likelihood.apply_root_transpose(f, u), (f,)),
        ]
    for function, arguments in functions:
        assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, arguments)


def test_a_learnt_noise_has_gradients():
    f, f2, y = draw(4, 3), draw(4, 3, seed=1), draw(4, 3, seed=2)
    noise = NOISES.clamp_min(0.1).clone().requires_grad_()
    for function in (
        lambda noise: Gaussian(noise).log_prob(f, y),
        lambda noise: Gaussian(noise).kl(f, f2),
        lambda noise: Gaussian(noise).kl(f, f2, other=Gaussian(0.5)),
        lambda noise: Gaussian(0.5).kl(f, f2, other=Gaussian(noise)),
        lambda noise: Gaussian(noise).apply(f, y),
    ):
        assert torch.autograd.gradcheck(function, (noise,))


@every_case
def test_transforms_of_torch_func(name):
    likelihood, o = CASES[name]
    f, u = outputs(name), draw(4, o, seed=1)
    y = likelihood.sample(f, torch.Generator().manual_seed(0))

    def one(f, y):
        return likelihood.log_prob(f[None], y[None])[0]

    leaf = f.clone().requires_grad_()
    (want,) = torch.autograd.grad(likelihood.log_prob(leaf, y).sum(), leaf)
    assert error(vmap(grad(one))(f, y), want) < TOLERANCE
    value, tangent = jvp(lambda f: likelihood.log_prob(f, y), (f,), (u,))
    assert error(value, likelihood.log_prob(f, y)) < TOLERANCE
    assert error(tangent, (want * u).sum(1)) < TOLERANCE
    for product in (likelihood.apply, likelihood.apply_root, likelihood.apply_root_transpose):
        assert error(vmap(lambda a, b, c=product: c(a[None], b[None])[0])(f, u), product(f, u)) < TOLERANCE


@every_case
def test_float32_follows_f_and_nothing_is_mutated(name):
    likelihood, o = CASES[name]
    single = [outputs(name).float(), outputs(name, seed=1).float(), draw(4, o, seed=2).float()]
    f, f2, u = [value.double() for value in single]
    kept = [value.clone() for value in single]
    y = likelihood.sample(single[0], torch.Generator().manual_seed(0))
    assert y.dtype in (torch.long, torch.float32)
    for got, want in [
        (likelihood.log_prob(single[0], y), likelihood.log_prob(f, y)),
        (likelihood.kl(*single[:2]), likelihood.kl(f, f2)),
        (likelihood.hessian(single[0]), likelihood.hessian(f)),
        (likelihood.root(single[0]), likelihood.root(f)),
        (likelihood.apply(single[0], single[2]), likelihood.apply(f, u)),
    ]:
        assert got.dtype == torch.float32
        assert error(got.double(), want) < 3e-6  # float32: 25 times its rounding
    assert all(torch.equal(a, b) for a, b in zip(single, kept))


@every_case
def test_results_are_on_the_device_of_f(name):
    likelihood, _ = CASES[name]
    f = outputs(name).to("meta")
    for got in (likelihood.kl(f, f), likelihood.hessian(f), likelihood.root(f), likelihood.apply_root_transpose(f, f)):
        assert got.device.type == "meta"


# ------------------------------------------------------------------ names and errors


def test_names_and_instances():
    for name, kind in LIKELIHOODS.items():
        assert type(get_likelihood(name)) is kind
    instance = Gaussian(0.1)
    assert get_likelihood(instance) is instance
    with pytest.raises(ValueError, match=r"one of 'gaussian', 'heteroscedastic', .* 'poisson', or an .* got 'softmax'"):
        get_likelihood("softmax")


F = {o: draw(4, o) for o in (1, 2, 3)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Gaussian(0.0), "noise: expected positive, finite variances, .* got 0.0"),
        (lambda: Gaussian(math.nan), "noise: expected positive"),
        (lambda: Gaussian(torch.tensor([1.0, -1.0])), r"got a tensor \(2,\)"),
        (lambda: Gaussian(torch.ones(2, 2)), r"got a tensor \(2, 2\)"),
        (lambda: Gaussian(torch.ones(2)).hessian(F[3]), r"one variance, or \(3,\) as f has outputs, got \(2,\)"),
        (lambda: Gaussian(torch.ones(2)).log_noise_fisher(F[3]), r"or \(3,\) as f has outputs"),
        (lambda: Gaussian().log_prob(F[3], torch.zeros(4)), r"y: expected \(4, 3\), got \(4,\)"),
        (lambda: Gaussian().log_prob(F[1], torch.zeros(1, 4)), r"y: expected \(4,\) or \(4, 1\), got \(1, 4\)"),
        (lambda: Gaussian().log_prob(F[1], torch.full((4,), math.nan)), "Gaussian expects finite numbers"),
        (lambda: Gaussian().kl(F[3], F[1]), r"f2: expected the shape of f, \(4, 3\), got \(4, 1\)"),
        (
            lambda: Categorical().hessian(F[1]),
            r'two classes, got one, .* Two classes by one logit are "bernoulli"',
        ),
        (lambda: Categorical().kl(F[3], F[1]), r"f2: expected the shape of f, \(4, 3\), got \(4, 1\)"),
        (lambda: HeteroscedasticGaussian(0.0), "floor: expected a positive, finite variance, got 0.0"),
        (lambda: HeteroscedasticGaussian().hessian(F[3]), r"expects floating-point outputs \(n, 2\), got \(4, 3\)"),
        (lambda: HeteroscedasticGaussian().log_prob(F[2], F[2]), r"y: expected \(4,\) or \(4, 1\), got \(4, 2\)"),
        (lambda: Bernoulli().sample(F[2]), r"Bernoulli expects floating-point outputs \(n, 1\), got \(4, 2\)"),
        (lambda: Bernoulli().log_prob(F[1], torch.full((4,), 2)), "Bernoulli expects zeros and ones"),
        (lambda: Poisson().kl(F[2], F[2]), r"Poisson expects floating-point outputs \(n, 1\)"),
        (lambda: Poisson().log_prob(F[1], torch.tensor([0, 1, 2, -1])), "Poisson expects counts"),
        (lambda: Poisson().log_prob(F[1], torch.full((4,), 0.5)), "Poisson expects counts"),
        (lambda: Categorical().log_prob(F[3], torch.tensor([0, 1, 2, 3])), "classes from 0 to 2, as f has outputs"),
        (lambda: Categorical().log_prob(F[3], torch.tensor([0, 1, 2, -1])), "classes from 0 to 2"),
        (lambda: Categorical().log_prob(F[3], torch.zeros(4)), r"integer classes \(4,\), got \(4,\) of torch.float32"),
        (lambda: Categorical().log_prob(F[3], torch.zeros(4, 1).long()), r"integer classes \(4,\), got \(4, 1\)"),
        (lambda: Categorical().apply(F[3], F[2]), r"u: expected \(4, 3\) or \(4, 3, k\), got \(4, 2\)"),
        (lambda: Poisson().apply_root(F[1], torch.zeros(4)), r"u: expected \(4, 1\) or \(4, 1, k\), got \(4,\)"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
