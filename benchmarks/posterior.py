"""The log marginal likelihood, and predictive means and variances: ours, GPyTorch's on explicit Jacobians, laplace's.

Inputs are (x, y, x*); a prediction's answer is (2, m): means and variances.
"""

import copy
import math
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import gpytorch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Competitor, Prepared, Skipped
from ntkbook import NTKGP, Linearization
from ntkbook.posterior import Posterior

NOISE = 0.1
LAPLACE = ("laplace-torch==0.3", "asdfghjkl==0.1a4", "torchmetrics==1.9.0", "lightning-utilities==0.15.3")


class Linear(gpytorch.models.ExactGP):
    """GPyTorch's exact GP with its linear kernel, on rows of the Jacobian."""

    def __init__(self, jacobian: Tensor, y: Tensor, likelihood: gpytorch.likelihoods.GaussianLikelihood) -> None:
        super().__init__(jacobian, y, likelihood)
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = gpytorch.kernels.LinearKernel().to(y.dtype)
        self.covar_module.variance = 1.0

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def gpytorch_model(net: nn.Module, inputs: tuple, size: int | None) -> Linear:
    x, y, _ = inputs
    likelihood = gpytorch.likelihoods.GaussianLikelihood().to(y.dtype)
    likelihood.noise = NOISE
    return Linear(Linearization(net).jacobian(x), y, likelihood)


# Cholesky: GPyTorch's conjugate gradients stop at a tolerance of 1
EXACT = partial(gpytorch.settings.fast_computations, False, False, False)


def gpytorch_likelihood(net: nn.Module, inputs: tuple, size: int | None) -> Tensor:
    model = gpytorch_model(net, inputs, size).train()
    with torch.no_grad(), EXACT():
        return model.likelihood(model(*model.train_inputs)).log_prob(inputs[1])[None]


def gpytorch_prediction(net: nn.Module, model: Linear, inputs: tuple) -> Tensor:
    with torch.no_grad(), EXACT():
        found = model.eval()(Linearization(net).jacobian(inputs[2]))
        return torch.stack([found.mean, found.variance])


def laplace(cache: Path, install: bool):
    """laplace-torch's module, from a folder of its own: the project does not depend on it."""
    folder = cache / "laplace-torch-0.3"
    if not (folder / "ready").exists():
        if not install:
            raise Skipped("laplace-torch is not here, and may not be installed")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*pip, *LAPLACE], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1][:150]
            raise Skipped(f"laplace-torch could not be installed: {last}")
        (folder / "ready").touch()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        from laplace import Laplace  # pyright: ignore[reportMissingImports]
    except ImportError as problem:
        raise Skipped(f"laplace-torch cannot be imported beside this torch: {problem}") from problem
    return Laplace


def laplace_model(net: nn.Module, cache: Path, install: bool, inputs: tuple, size: int | None):
    """Functional Laplace on all points."""
    x, y, _ = inputs
    net = copy.deepcopy(net)  # its hooks stay where a call was cut off
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"sigma_noise": math.sqrt(NOISE), "prior_precision": 1.0, "n_subset": len(x)}
        model = laplace(cache, install)(net, "regression", "all", "gp", **settings)
        model.fit(DataLoader(TensorDataset(x, y[:, None]), batch_size=size or len(x)), progress_bar=False)
    return model


def laplace_likelihood(net: nn.Module, cache: Path, install: bool, inputs: tuple, size: int | None) -> Tensor:
    """Its evidence is expanded around a mode: elsewhere another number than the marginal likelihood."""
    return laplace_model(net, cache, install, inputs, size).log_marginal_likelihood().detach().view(1)


def laplace_prediction(model, inputs: tuple, size: int | None) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [model(part) for part in inputs[2].split(size or len(inputs[2]))]
    return torch.stack([torch.cat([part[i].flatten() for part in parts]) for i in (0, 1)]).detach()


def likelihoods(net: nn.Module, cache: Path, install: bool) -> dict[str, Competitor]:
    gp = NTKGP(net, noise=NOISE)
    return {
        "ntkbook": Competitor(lambda inputs, size: gp.condition(*inputs[:2]).log_marginal_likelihood[None]),
        "GPyTorch on explicit J": Competitor(partial(gpytorch_likelihood, net)),
        "laplace-torch, functional": Competitor(partial(laplace_likelihood, net, cache, install), (64, 256)),
    }


def predictions(net: nn.Module, cache: Path, install: bool) -> dict[str, Competitor]:
    """Mean and variance at new points, the factorisation done before."""
    gp = NTKGP(net, noise=NOISE)

    def both(post: Posterior, inputs: tuple, size: int | None) -> Tensor:
        return torch.stack(post.marginals(inputs[2]))

    ways = {
        "ntkbook": Prepared(lambda inputs, size: gp.condition(*inputs[:2]), both),
        "GPyTorch on explicit J": Prepared(
            partial(gpytorch_model, net), lambda model, inputs, size: gpytorch_prediction(net, model, inputs)
        ),
        "laplace-torch, functional (variance)": Prepared(
            partial(laplace_model, net, cache, install), laplace_prediction
        ),
    }
    found = {name: Competitor(way, prepare=way.prepare) for name, way in ways.items()}
    theirs = found["laplace-torch, functional (variance)"]
    theirs.chunk_sizes, theirs.compare = (64, 256), slice(1, 2)  # its mean is the network's, whatever the data
    return found


def dense(net: nn.Module, inputs: tuple, predict: bool) -> Tensor:
    """The textbook's formulas on an explicit Jacobian."""
    x, y, new = inputs
    lin = Linearization(net)
    j, star = lin.jacobian(x), lin.jacobian(new)
    k = j @ j.T + NOISE * torch.eye(len(x), dtype=j.dtype)
    if not predict:
        return torch.distributions.MultivariateNormal(torch.zeros_like(y), k).log_prob(y)[None]
    cross = star @ j.T
    mean = cross @ torch.linalg.solve(k, y)
    return torch.stack([mean, (star * star).sum(1) - (cross * torch.linalg.solve(k, cross.T).T).sum(1)])
