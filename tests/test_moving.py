"""Posteriors and GPs that are saved, loaded, copied and moved are the same afterwards."""

import copy
import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ntkbook import (
    NTKGP,
    FisherOperator,
    FisherPosterior,
    Iterative,
    Linearization,
    NTKKernel,
    Nystrom,
    TaskHyperparameters,
)
from ntkbook.moving import Movable

ROOT = Path(__file__).parents[1]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def network(outputs=1, inputs=2):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(inputs, 9), nn.Tanh(), nn.Linear(9, outputs)).double()


X, X_STAR = draw(25, 2), draw(6, 2, seed=1)
Y = X[:, 0].sin()
NOISY = Y + 0.3 * draw(25, seed=6)
TASKS = torch.stack([Y, Y.cos(), Y - X[:, 1]])
GAPS = TASKS.repeat(30, 1).where(draw(90, 25, seed=2) > -0.5, torch.nan)


def smooth(x):
    return x.sum(1).cos()


def tasks_of_their_own():
    own = TaskHyperparameters(1 + draw(5, seed=3).square(), 0.1 + draw(5, seed=4).square(), draw(5, 1, seed=5))
    return NTKGP(network(), mean="constant").condition_tasks(X, GAPS[:5], hyperparameters=own)


def fisher():
    operator = FisherOperator(network(3), X, likelihood="categorical")
    return FisherPosterior(operator, (X[:, 0] > 0).long(), outputscale=0.5, rank=20)


def module_mean():
    mean = nn.Sequential(nn.Linear(2, 1)).double().requires_grad_(False)
    nn.init.constant_(mean[0].weight, 0.3)
    return NTKGP(network(), noise=0.1, mean=mean).condition(X, Y)


MAKERS = {
    "cholesky": lambda: NTKGP(network(), noise=0.1).condition(X, Y),
    "several outputs": lambda: NTKGP(network(3), noise=0.1, mean="network").condition(X, TASKS.T),
    "noise per point": lambda: NTKGP(network(), noise=0.1).condition(X, Y, noise=0.1 + Y.square()),
    "cg, function": lambda: NTKGP(network(), noise=0.1, solver=Iterative(rank=12)).condition(X, Y),
    "cg, parameter": lambda: NTKGP(network(), noise=0.1, space="parameter", solver=Iterative(rank=9)).condition(X, Y),
    "nystrom": lambda: NTKGP(network(), noise=0.1, solver=Nystrom()).condition(X, Y),
    "auto": lambda: NTKGP(network(), noise=0.1, solver="auto", mean=smooth).condition(X, Y),
    "fitted constant": lambda: NTKGP(network(), noise=0.1, mean="constant").fit(X, NOISY).condition(X, NOISY),
    "mean of a module": module_mean,
    "tasks": lambda: NTKGP(network(), noise=0.1).condition_tasks(X, TASKS),
    "tasks with gaps": lambda: NTKGP(network(), noise=0.1).condition_tasks(X, GAPS[:4]),
    "tasks by cg": lambda: NTKGP(network(), noise=0.1, solver="cg").condition_tasks(X, GAPS[:2]),
    "tasks by nystrom": lambda: NTKGP(network(), noise=0.1, solver=Nystrom()).condition_tasks(X, GAPS[:2]),
    "many patterns": lambda: NTKGP(network(inputs=1), noise=0.1).condition_tasks(X[:, :1] / 9, GAPS),
    "tasks of their own": tasks_of_their_own,
    "a Fisher posterior": fisher,
}


def facts(posterior, dtype=torch.double):
    """All that a posterior says."""
    x = X_STAR.to(dtype)
    if isinstance(posterior, FisherPosterior):
        return {
            "mean": posterior.mean(x),
            "variance": posterior.variance(x),
            "residual": torch.tensor(posterior.residual),
        }
    x = x[:, : next(iter(posterior._lin.params.values())).shape[1]]
    found = {"mean": posterior.mean(x), "variance": posterior.variance(x), "weights": posterior.weights}
    found |= {"covariance": posterior(x).covariance_matrix, "evidence": posterior.log_marginal_likelihood}
    found |= {"draws": posterior.sample(x, 2, torch.Generator().manual_seed(0))}
    if posterior._sigma2 is not None:
        found["predictive"] = posterior.predictive(x).covariance_matrix
    return found | ({} if posterior.report is None else posterior.report._asdict())


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert torch.equal(got[name].nan_to_num(9e9), want[name].nan_to_num(9e9)), name


def loaded(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def tensors(thing, seen=None):
    """Every tensor that can be reached, but those of networks, which are structure alone."""
    seen = {} if seen is None else seen
    if id(thing) in seen or isinstance(thing, nn.Module):
        return
    seen[id(thing)] = thing
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from tensors(part, seen)
    elif isinstance(thing, dict) or hasattr(thing, "__dict__"):
        for part in (thing if isinstance(thing, dict) else vars(thing)).values():
            yield from tensors(part, seen)


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_a_saved_a_copied_and_a_moved_posterior_say_the_same_to_the_bit(name, asked):
    posterior = MAKERS[name]()
    before = facts(posterior) if asked else None  # what is computed when asked for, before or after
    others = [
        loaded(posterior),
        copy.deepcopy(posterior),
        posterior.to(),
        posterior.to(device="cpu", dtype=torch.double),
    ]
    for other in others:
        assert other is not posterior
        assert type(other) is type(posterior)
        assert_same(facts(other), before or facts(posterior))


def test_posteriors_are_loaded_in_a_fresh_process(tmp_path):
    posteriors = {name: make() for name, make in MAKERS.items() if name != "auto"}  # whose mean is of this module
    x, file, out = X_STAR, tmp_path / "posteriors.pt", tmp_path / "means.pt"
    torch.save((posteriors, NTKKernel(network())), file)
    code = f"""
import torch
torch.set_num_threads(1)
posteriors, kernel = torch.load({str(file)!r}, weights_only=False)
x = torch.load({str(tmp_path / "x.pt")!r})
def moments(p):
    part = x[:, :1] if p.lin_inputs == 1 else x
    return p.mean(part), p.variance(part)
for name, p in posteriors.items():
    p.lin_inputs = 1 if name == "many patterns" else 2
torch.save(({{name: moments(p) for name, p in posteriors.items()}}, kernel(x).to_dense()), {str(out)!r})
"""
    torch.save(x, tmp_path / "x.pt")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, gram = torch.load(out)
    assert torch.equal(gram, NTKKernel(network())(x).to_dense())
    for name, posterior in posteriors.items():
        part = x[:, :1] if name == "many patterns" else x
        assert torch.equal(found[name][0], posterior.mean(part)), name
        assert torch.equal(found[name][1], posterior.variance(part)), name


@pytest.mark.parametrize("name", MAKERS)
def test_a_posterior_moves_to_another_precision_without_a_factorisation(name, monkeypatch):
    posterior = MAKERS[name]()
    want = facts(posterior)

    def none(*args, **kwargs):
        raise AssertionError("moving computes nothing")

    with monkeypatch.context() as patch:
        for function in ("cholesky", "cholesky_ex", "qr", "eigh", "solve_triangular", "svd"):
            patch.setattr(torch.linalg, function, none)
        patch.setattr(Linearization, "gram", none)
        patch.setattr(Linearization, "vjp", none)
        single = posterior.to(dtype=torch.float32)
    kinds = {tensor.dtype for tensor in tensors(single) if tensor.is_floating_point()}
    assert kinds == {torch.float32}
    got = facts(single, torch.float32)
    for field in ("mean", "variance"):
        size = float(want[field].abs().max())
        # Float32's rounding, 6e-8, times the condition number, the Gram matrix's size over the noise.
        assert (got[field].double() - want[field]).abs().max() <= 1e-3 * size, field
    assert_same(facts(posterior), want)  # it stayed as it was
    assert single.to(dtype=torch.double).mean(X_STAR[:, : 1 if name == "many patterns" else 2]).dtype == torch.double


def test_directions_that_rounding_hides_keep_their_prior_variance():
    posterior = MAKERS["many patterns"]()  # whose smallest eigenvalues are below float32
    x = X_STAR[:, :1] / 3
    want, plain = posterior.variance(x), Movable.to(posterior, dtype=torch.float32)
    got = posterior.to(dtype=torch.float32).variance(x.float()).double()
    # Rounding of variances that are 1e-3 of the prior's.
    assert ((got - want).abs() <= 1e-3 * want).all()
    assert (plain.variance(x.float()) > 2 * want).any()  # dividing by what is noise in float32


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_is_left_on_the_old_device(name):
    moved = MAKERS[name]().to(device="meta")
    found = list(tensors(moved))
    assert len(found) > 5
    assert {tensor.device.type for tensor in found} == {"meta"}
    if name == "mean of a module":
        assert {value.device.type for value in moved._gp.mean.parameters()} == {"meta"}


def test_a_gp_is_saved_and_moved():
    gp = NTKGP(network(), noise=0.1, mean="constant", solver="cg").fit(X, Y)
    single = gp.to(dtype=torch.float32)
    assert (single.lin.dtype, single.constant.dtype) == (torch.float32, torch.float32)
    assert gp.lin.dtype == torch.double
    assert (single.outputscale, single.noise, single.iterative) == (gp.outputscale, gp.noise, gp.iterative)
    for other in (loaded(gp), copy.deepcopy(gp), gp.to()):
        assert_same(facts(other.condition(X, Y)), facts(gp.condition(X, Y)))


def test_what_the_first_knows_the_other_does_not_compute_again(monkeypatch):
    posterior = MAKERS["cg, parameter"]()
    want = posterior.log_marginal_likelihood
    monkeypatch.setattr(Linearization, "jvp", None)
    for other in (posterior.to(), loaded(posterior), copy.deepcopy(posterior)):
        assert torch.equal(other.log_marginal_likelihood, want)


class NoDouble(TorchDispatchMode):
    """The meta device without float64, as Apple's MPS is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type == "meta" and out.dtype == torch.double:
            raise TypeError("Cannot convert a Meta Tensor to float64 dtype")
        return out


def test_where_to_is_said_as_to_torch():
    gp = NTKGP(network(), noise=0.1)
    many = gp.condition_tasks(X, GAPS)
    for thing in (gp, gp.lin, gp.condition(X, Y), many, many.to(torch.float32)):
        for where in (("cpu",), (torch.device("cpu"), torch.float64), (torch.float64,)):
            moved = thing.to(*where)
            assert type(moved) is type(thing)
    single = many.to("cpu", torch.float32)
    assert single.mean(X_STAR).dtype == torch.float32
    assert torch.equal(single.mean(X_STAR), many.to(device="cpu", dtype=torch.float32).mean(X_STAR))
    assert gp.lin.to(torch.float32).dtype == torch.float32
    with pytest.raises(RuntimeError, match="device string: everywhere"):
        gp.to("everywhere")


def test_a_device_without_float64_is_a_clear_error():
    gp = NTKGP(network(), noise=0.1)
    posterior = gp.condition(X, Y)
    with NoDouble():
        for thing in (gp, posterior, gp.lin):
            with pytest.raises(ValueError, match=r"device: meta has no torch.float64.*pass dtype=torch\.float32"):
                thing.to(device="meta")
            assert thing.to(device="meta", dtype=torch.float32) is not thing
        net = network().float().to("meta")
        with pytest.raises(ValueError, match=r"pass dtype=torch\.float32"):
            NTKGP(net)
        assert NTKGP(net, dtype=torch.float32).lin.device.type == "meta"


def test_moving_to_what_is_no_real_number_is_an_error():
    posterior = MAKERS["cholesky"]()
    for thing in (posterior, posterior._gp, posterior._lin):
        with pytest.raises(ValueError, match=r"dtype: expected real numbers.*got torch\.int64"):
            thing.to(dtype=torch.long)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MAKERS)
def test_a_posterior_moves_to_a_gpu_and_back(name):
    posterior = MAKERS[name]()
    want = facts(posterior)
    away = posterior.to(device="cuda")
    assert {tensor.device.type for tensor in tensors(away)} == {"cuda"}
    x = X_STAR[:, : 1 if name == "many patterns" else 2]
    for got, field in ((away.mean(x.cuda()), "mean"), (away.variance(x.cuda()), "variance")):
        assert (got.cpu() - want[field]).abs().max() <= 1e-9 * want[field].abs().max()
    with warnings.catch_warnings():
        assert_same(facts(away.to(device="cpu")), want)
    file = io.BytesIO()
    torch.save(away, file)
    file.seek(0)
    assert_same(facts(torch.load(file, map_location="cpu", weights_only=False)), want)
