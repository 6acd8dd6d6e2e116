"""What the method is compared with: networks adapted by training, and Gaussian processes with an RBF kernel.

Every baseline (`ntkbook.experiments.ablr.ABLR` too) has one face, `predict(x, y, x_star)`: the context of T tasks in,
the predictive mean and variance of y at new inputs out. Everything is computed in float64 except training, which keeps
the network's dtype.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import gpytorch
import torch
from botorch.exceptions import ModelFittingError
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ConstantMean
from gpytorch.mlls import ExactMarginalLogLikelihood
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from ntkbook.experiments.networks import split_last
from ntkbook.experiments.training import check_data, train

NOISE_FLOOR = 1e-6
"""The smallest noise variance a baseline may find: a model that goes through its points would be infinitely sure."""


class Prediction(NamedTuple):
    """Predictive mean and predictive variance of y (noise included), both (T, m) and float64."""

    mean: Float[Tensor, "T m"]
    variance: Float[Tensor, "T m"]

    @property
    def failed(self) -> list[int]:
        """The tasks whose prediction is NaN: their fit failed or their network diverged."""
        return self.mean.isnan().any(-1).nonzero().flatten().tolist()


class Group(NamedTuple):
    """Tasks observed at the same inputs: their rows, inputs (k, d), targets (G, k), and inputs to predict at (m, d)."""

    rows: list[int]
    x: Float[Tensor, "k d"]
    y: Float[Tensor, "G k"]
    x_star: Float[Tensor, "m d"]


def groups(
    x: Float[Tensor, "*tasks n d"], y: Float[Tensor, "T n"], x_star: Float[Tensor, "*others m d"]
) -> Iterator[Group]:
    """Tasks sorted by what they have observed, in float64, so that those with the same inputs share their work.

    Args:
        x: inputs of the context, (n, d) for all tasks or (T, n, d).
        y: targets (T, n); NaN = not observed.
        x_star: inputs to predict at, (m, d) for all tasks or (T, m, d).

    Raises:
        ValueError: shapes that do not fit, NaN inputs, or a task with nothing observed.
    """
    if y.ndim != 2:
        raise ValueError(f"y must be (T, n), one row a task, got {tuple(y.shape)}: use squeeze(-1) or unsqueeze(0)")
    if x_star.ndim not in (2, 3) or (x_star.ndim == 3 and len(x_star) != len(y)) or x_star.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"x_star must be (m, {x.shape[-1]}) or ({len(y)}, m, {x.shape[-1]}) like x, got {tuple(x_star.shape)}"
        )
    if not x_star.isfinite().all():
        raise ValueError("x_star has NaN or infinite entries: drop those points")
    shared = x.ndim == x_star.ndim == 2
    xs, ys, observed = check_data(len(y), x.double(), y.double()[..., None])
    ys, observed, x_star = ys[..., 0], observed[..., 0], x_star.double().expand(len(y), *x_star.shape[-2:])
    patterns: dict[tuple[bool, ...] | int, list[int]] = {}
    for t, seen in enumerate(observed.tolist()):
        patterns.setdefault(tuple(seen) if shared else t, []).append(t)
    for rows in patterns.values():
        seen = observed[rows[0]]
        yield Group(rows, xs[rows[0], seen], ys[rows][:, seen], x_star[rows[0]])


class SourceNetwork:
    """The network as it is, the same for every task. Its variance is a task's mean squared error on its context."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def predict(
        self, x: Float[Tensor, "*tasks n d"], y: Float[Tensor, "T n"], x_star: Float[Tensor, "*others m d"]
    ) -> Prediction:
        """Predictions (T, m) without adaptation. Arguments and errors as for `groups`; y only sets the variance."""
        return _predict_networks([self.net] * len(y), x, y, x_star)


class FineTuning:
    """Trains on for each task from the source network, with `ntkbook.experiments.training.train`.

    `FineTuning(net, lr=1e-4, epochs=1000)` is full fine-tuning; with `only="last"`, the last layer is retrained. The
    variance is a task's mean squared error on its context, which a network that fits its context makes far too small:
    that is what a point prediction has to say.
    """

    def __init__(self, net: nn.Module, **settings) -> None:
        """Args:
        net: the source network, which is not changed.
        settings: passed on to `train`: lr, epochs, momentum, batch_size, seed, only, on_divergence, progress.
        """
        self.net, self.settings = net, settings

    def predict(
        self, x: Float[Tensor, "*tasks n d"], y: Float[Tensor, "T n"], x_star: Float[Tensor, "*others m d"]
    ) -> Prediction:
        """Predictions (T, m) after training on the context. Arguments and errors as for `groups` and `train`."""
        net, settings = self.net, dict(self.settings)
        if settings.get("only") == "last":  # what comes before stays as it is: compute it once, and train the rest
            features, net = split_last(self.net)
            del settings["only"]
            like = next(self.net.parameters())
            with torch.no_grad():
                x, x_star = features(x.to(like)), features(x_star.to(like))
        nets, _ = train([net] * len(y), x, y[..., None], **settings)
        return _predict_networks(nets, x, y, x_star)


@torch.no_grad()
def _predict_networks(nets: Sequence[nn.Module], x: Tensor, y: Tensor, x_star: Tensor) -> Prediction:
    mean = y.new_full((len(y), x_star.shape[-2]), torch.nan, dtype=torch.float64)
    variance = mean.clone()
    like = next(nets[0].parameters())
    for group in groups(x, y, x_star):
        for t, target in zip(group.rows, group.y):
            residual = target - nets[t](group.x.to(like)).squeeze(-1).to(target)
            mean[t] = nets[t](group.x_star.to(like)).squeeze(-1)
            variance[t] = residual.square().mean().clamp(min=NOISE_FLOOR)
    return Prediction(mean, variance)


def fit_rbf(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n"],
    *,
    lengthscales: Sequence[float] = (0.3, 1.0, 3.0),
    noise_floor: float = NOISE_FLOOR,
) -> SingleTaskGP:
    """A Gaussian process with a scaled RBF kernel and a constant mean, fitted as in Appendix F: by BoTorch, in float64.

    Hyperparameters (mean, output scale, lengthscale, noise) maximise the marginal likelihood, without priors on them.

    Args:
        x: inputs.
        y: targets, all observed.
        lengthscales: where to start from; the best optimum wins.
        noise_floor: lower bound of the noise variance.

    Raises:
        ModelFittingError: BoTorch's optimiser converged from none of the starts.
    """
    x, y = x.double(), y.double()
    best, best_value, errors = None, -torch.inf, []
    for lengthscale in lengthscales:
        likelihood = GaussianLikelihood(noise_constraint=GreaterThan(noise_floor)).to(x)
        kernel = ScaleKernel(RBFKernel()).to(x)
        gp = SingleTaskGP(x, y[:, None], None, likelihood, kernel, ConstantMean().to(x), outcome_transform=None)
        variance = y.var(correction=0).clamp(min=100 * noise_floor)
        gp.initialize(
            **{
                "covar_module.outputscale": variance,
                "covar_module.base_kernel.lengthscale": lengthscale,
                "likelihood.noise": 0.1 * variance,
                "mean_module.constant": y.mean(),
            }
        )
        mll = ExactMarginalLogLikelihood(likelihood, gp)
        with _dense():
            try:
                fit_gpytorch_mll(mll)
            except ModelFittingError as error:
                errors.append(f"{lengthscale}: {error}")
                continue
            with torch.no_grad():
                mll.train()
                value = float(cast(Tensor, mll(gp(*gp.train_inputs), gp.train_targets)))
        if best is None or value > best_value:
            best, best_value = gp.eval(), value
    if best is None:
        raise ModelFittingError(
            f"no RBF GP could be fitted to {len(y)} points from the lengthscales {'; '.join(errors)}: are the inputs "
            "and targets about standardised? Other starts can be given as lengthscales"
        )
    return best


class IndependentRBF:
    """An RBF GP of its own for every task, fitted on its context by `fit_rbf`.

    A task whose fit failed is warned about, and its prediction is NaN.
    """

    def __init__(self, *, progress: bool | None = None, **settings) -> None:
        """Args:
        progress: show a progress bar; None shows it on a terminal only.
        settings: passed on to `fit_rbf`.
        """
        self.progress, self.settings = progress, settings

    def predict(
        self, x: Float[Tensor, "*tasks n d"], y: Float[Tensor, "T n"], x_star: Float[Tensor, "*others m d"]
    ) -> Prediction:
        """Predictions (T, m), hyperparameters fitted a task. Arguments and errors as for `groups`."""
        mean = y.new_full((len(y), x_star.shape[-2]), torch.nan, dtype=torch.float64)
        variance, failed = mean.clone(), []
        with tqdm(total=len(y), desc="RBF GPs", disable=None if self.progress is None else not self.progress) as bar:
            for group in groups(x, y, x_star):
                for t, target in zip(group.rows, group.y):
                    try:
                        gp = fit_rbf(group.x, target, **self.settings)
                        mean[t], variance[t] = _predict_gp(gp, group.x_star)
                    except ModelFittingError:
                        failed.append(t)
                    bar.update()
        if failed:
            warnings.warn(
                f"the RBF GPs of {len(failed)} of {len(y)} tasks could not be fitted, and their predictions are NaN: "
                f"task(s) {failed}. fit_rbf on one of them says more",
                RuntimeWarning,
                stacklevel=2,
            )
        return Prediction(mean, variance)


class SharedRBF:
    """One RBF GP: hyperparameters fitted on the source, training data reset for each task (Appendix F)."""

    gp: SingleTaskGP | None = None

    def fit(self, x: Float[Tensor, "n d"], y: Float[Tensor, "n"], **settings) -> "SharedRBF":
        """Fit the hyperparameters on the source task. Arguments and errors as for `fit_rbf`; NaN in y is left out."""
        observed = ~y.isnan()
        self.gp = fit_rbf(x[observed], y[observed], **settings)
        return self

    def predict(
        self, x: Float[Tensor, "*tasks n d"], y: Float[Tensor, "T n"], x_star: Float[Tensor, "*others m d"]
    ) -> Prediction:
        """Predictions (T, m) with the source's hyperparameters. Arguments and errors as for `groups`."""
        if self.gp is None:
            raise RuntimeError("the shared GP has no hyperparameters yet: call fit(x_source, y_source) first")
        mean = y.new_full((len(y), x_star.shape[-2]), torch.nan, dtype=torch.float64)
        variance = mean.clone()
        for group in groups(x, y, x_star):
            for t, target in zip(group.rows, group.y):
                self.gp.set_train_data(group.x, target, strict=False)
                mean[t], variance[t] = _predict_gp(self.gp, group.x_star)
        return Prediction(mean, variance)


@torch.no_grad()
def _predict_gp(gp: SingleTaskGP, x_star: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "m"], Float[Tensor, "m"]]:
    gp.eval()
    with _dense():
        # in parts, since GPyTorch forms the covariance between all points of one call
        parts = [gp.likelihood(gp(part)) for part in x_star.split(2000)]
        return torch.cat([y.mean for y in parts]), torch.cat([y.variance for y in parts])


def _dense():
    """Cholesky at any size: from 800 points on, GPyTorch would change to conjugate gradients without a word."""
    return gpytorch.settings.fast_computations(covar_root_decomposition=False, log_prob=False, solves=False)
