"""All of Africa: chapter 4's kind of network, trained on 2,000 pixels, conditioned on every pixel of the later map.

    python -m ntkbook.experiments.africa --data-dir FOLDER --out book/results/04_malaria.africa.json

writes the numbers there and the coarse maps beside it (.npz). No choice is made after a result: the network and its
training are chapter 4's, for draw 0; hyperparameters are fitted on a random subset; the residual and the timings are
of conditioning on all pixels; errors are measured on a random tenth that a second conditioning, with all else the same,
does not see. (Pixels at random are never far from a given one: it is interpolation that they measure.)
"""

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkbook import NTKGP, Nystrom
from ntkbook.experiments import metrics
from ntkbook.experiments.baselines import Prediction, fit_rbf
from ntkbook.experiments.data.malaria import Malaria, load_malaria
from ntkbook.experiments.heteroscedastic import LIKELIHOOD, diverged, mean_network, predict
from ntkbook.experiments.networks import mlp
from ntkbook.experiments.streamed import FeatureGP, inducing_rbf, last_layer
from ntkbook.experiments.training import train
from ntkbook.hyperparameters import ProfileLikelihood, rounding


@dataclass(frozen=True)
class Settings:
    """What is fixed beforehand; the first six are chapter 4's.

    Attributes:
        n_train, hidden, epochs, lr, batch_size, momenta: of the network; the first momentum that does not diverge.
        subset: pixels of the later map that hyperparameters are fitted to. rbf_points: of them, for the RBF kernel.
        condition: the largest n · mean k(x, x) · s² / σ². Rounding of α alone leaves a relative residual of some
            1e-16 / √n times it (seen: up to ten times that; with 1e12 all pixels stopped at a residual of 1.3e-6):
            float64 cannot tell more of whether it is solved.
        held_out: share of the pixels that errors are measured on.
        dense: pixels on which Cholesky is compared with. compared: points where.
        sizes: numbers of pixels for the costs, those on all apart.
        inducing: of the RBF GP, beside as many as `solver.rank`.
        coarsen: pixels a side that the maps average over.
    """

    n_train: int = 2000
    hidden: int = 500
    epochs: int = 500
    lr: float = 1e-3
    batch_size: int = 200
    momenta: tuple[float, ...] = (0.9, 0.5, 0.0)
    subset: int = 3000
    rbf_points: int = 1000
    condition: float = 3e11
    held_out: float = 0.1
    dense: int = 10_000
    compared: int = 5000
    sizes: tuple[int, ...] = (10_000, 30_000, 100_000, 300_000)
    inducing: int = 1000
    coarsen: int = 8
    seed: int = 0
    solver: Nystrom = field(default_factory=Nystrom)


def trained(x: Tensor, y: Tensor, s: Settings) -> tuple[nn.Sequential, float]:
    """The network, and the momentum it was trained with."""
    start = mlp([2, s.hidden, s.hidden, 2], "tanh", seed=s.seed)
    for momentum in s.momenta:
        (net,), loss = train(
            [start], x.float(), y[:, None].float(), lr=s.lr, epochs=s.epochs, decay_every=max(1, s.epochs // 5),
            momentum=momentum, batch_size=s.batch_size, likelihood=LIKELIHOOD, seed=[s.seed], on_divergence="mark",
            description=f"training, momentum {momentum}",
        )  # fmt: skip
        if not diverged(loss).any():
            return net, momentum
    raise ArithmeticError(f"the network diverged with each of the momenta {s.momenta}: lower lr")


def fitted(mean: nn.Module, x: Tensor, y: Tensor, n: int, s: Settings) -> dict[str, float]:
    """s² and σ² by marginal likelihood: as they are, and with the condition number on n points limited."""
    gram = NTKGP(mean).lin.gram(x)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    target = vectors.T @ y
    data = eigenvalues.clamp_min(0), target, target.new_zeros(len(y), 0)
    likelihood = ProfileLikelihood(*data, False, rounding(gram.diagonal()))
    best = likelihood.maximise()
    least = math.log10(n * float(gram.diagonal().mean()) / s.condition)
    (free_scale, free_noise, _), (scale, noise, _) = (likelihood.solution(at) for at in (best, max(best, least)))
    return {
        "outputscale": scale, "noise": noise, "free_outputscale": free_scale, "free_noise": free_noise,
        "log_likelihood": likelihood.value(max(best, least)), "free_log_likelihood": likelihood.value(best),
        "free_condition": s.condition * 10 ** (least - best),
    }  # fmt: skip


def independent_residual(gp: NTKGP, alpha: Tensor, x: Tensor, y: Tensor) -> float:
    """‖y − (s²K + σ²)α‖ / ‖y‖, from nothing but α and products with the Jacobian."""
    back = gp.lin.jvp(x, gp.lin.vjp(x, alpha))[:, 0]
    return float((y - gp.outputscale * back - gp.noise * alpha).norm() / y.norm())


def row(prediction: Prediction, y: Tensor) -> dict[str, float]:
    """1000 × MSE, nats a point, 95 % coverage."""
    (one,) = metrics.table(*prediction, y[None])
    return {"mse": 1000 * one["rmse"] ** 2, "nll": one["nll"], "coverage": one["coverage"]}


def peak() -> float:
    """The largest memory of this process until now, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def run(data: Malaria, s: Settings, say: Callable[[str], None] = print) -> tuple[dict[str, Any], dict[str, Any]]:
    """The numbers, and the coarse maps. Memory is the process's peak, so sizes grow; Cholesky comes last."""
    x, (before, after) = data.unit(), data.rate
    n = len(x)
    generator = torch.Generator().manual_seed(s.seed)
    early = torch.randperm(n, generator=generator)[: s.n_train]  # as in chapter 4
    late = torch.randperm(n, generator=generator)
    test, rest = late[: int(n * s.held_out)], late[int(n * s.held_out) :]
    subset = rest[: s.subset]  # of the points that are given in either conditioning, never of the test points
    out: dict[str, Any] = {
        "data": asdict(data.provenance), "settings": asdict(s), "threads": torch.get_num_threads(), "n": n,
        "torch": torch.__version__, "variance": 1000 * float(after.var()),
    }  # fmt: skip

    def timed(what: str, work: Callable[[], Any]) -> tuple[Any, float]:
        say(f"{what} …")
        start = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
        say(f"{what}: {seconds:.1f} s, memory so far {peak():.2f} GB")
        return result, seconds

    (net, out["momentum"]), out["training_seconds"] = timed("training", lambda: trained(x[early], before[early], s))
    mean = mean_network(net)
    found, _ = timed("hyperparameters", lambda: fitted(mean, x[subset], after[subset], n, s))
    out["hyperparameters"] = found
    gp = NTKGP(mean, outputscale=found["outputscale"], noise=found["noise"], solver=s.solver)
    out["parameters"] = gp.lin.num_params

    def cost(chosen: Tensor) -> Any:
        """Condition on some pixels, and note what it took."""
        where, target = x[chosen], after[chosen]
        posterior, seconds = timed(f"conditioning on {len(chosen):,} pixels", lambda: gp.condition(where, target))
        report = posterior.report
        assert report is not None  # it is no Cholesky
        out.setdefault("costs", []).append(
            {"n": len(chosen), "seconds": seconds, "memory": peak(), "residual": float(report.residual),
             "iterations": int(report.iterations), "rank": int(report.rank), "mean_error": float(report.mean_error),
             "slack": float(report.variance_slack)}
        )  # fmt: skip
        say(f"    {out['costs'][-1]}")
        return posterior

    for size in s.sizes:
        if size < n:
            cost(late[:size])
            less, last = ([{"n": 0, "seconds": 0.0}] + out["costs"])[-2:]
            rate = (last["seconds"] - less["seconds"]) / (last["n"] - less["n"])
            expected = last["seconds"] + rate * (n - last["n"])
            say(
                f"    at this rate all {n:,} pixels take {expected / 60:.1f} minutes; all that follows, four times that"
            )
    every = torch.arange(n)
    posterior = cost(every)
    (mean_map, sd_map), seconds = timed("predictions", lambda: posterior.marginals(x))
    sd_map = sd_map.sqrt()
    residual, _ = timed("the residual once more", lambda: independent_residual(gp, posterior.weights, x, after))
    out["all"] = {
        **out["costs"][-1], "independent_residual": residual, "prediction_seconds": seconds,
        "degrees": float(sd_map.square().sum()) / gp.noise,  # tr K(K + σ²)⁻¹ is the sum of the variances over σ²
        "log_likelihood": float(posterior.log_marginal_likelihood),
        "log_likelihood_error": float(posterior.log_marginal_likelihood_error),
        "sd": [float(q) for q in np.quantile(sd_map.numpy(), [0.05, 0.5, 0.95])],
    }  # fmt: skip
    say(f"    {out['all']}")
    blind = Prediction(*(torch.cat(m, 1) for m in zip(*(predict([net], part) for part in x.split(50_000)))))
    maps = {"truth": after, "blind": blind.mean[0], "mean": mean_map, "sd": sd_map}
    coarse = {name: data.grid(value, coarsen=s.coarsen) for name, value in maps.items()}
    images = {name: picture.values.numpy().astype(np.float16) for name, picture in coarse.items()}
    images["extent"] = np.array(coarse["truth"].extent)
    del posterior

    def ntk(x: Tensor, y: Tensor, x_star: Tensor) -> Prediction:
        mean, variance = gp.condition(x, y).marginals(x_star)
        return Prediction(mean[None], variance[None] + gp.noise)

    rbf, _ = timed(
        "fitting the RBF kernel",
        lambda: fit_rbf(x[subset[: s.rbf_points]], after[subset[: s.rbf_points]], lengthscales=(0.03, 0.1, 0.3)),
    )
    pool = rest[s.subset : s.subset + s.solver.pool]
    layer = last_layer(mean, x[subset], after[subset])
    ways: dict[str, Callable[[], FeatureGP]] = {"last_layer_exact": lambda: layer}
    for m in (s.solver.rank, s.inducing):
        ways[f"rbf_{m}"] = lambda m=m: inducing_rbf(rbf, x[pool], m)
    out["errors"] = {"blind": row(Prediction(*(moment[:, test] for moment in blind)), after[test])}
    prediction, seconds = timed("NTK, given nine tenths", lambda: ntk(x[rest], after[rest], x[test]))
    out["errors"]["ntk"] = {**row(prediction, after[test]), "seconds": seconds, "degrees": out["all"]["degrees"]}
    for name, make in ways.items():
        model, seconds = timed(name, lambda make=make: make().condition(x[rest], after[rest]))
        errors = row(model.predict(x[test]), after[test])
        out["errors"][name] = {**errors, "seconds": seconds, "degrees": model.degrees()}
    for name, values in out["errors"].items():
        say(f"    {name:20s} {values}")

    some, star = late[: min(s.dense, n // 2)], late[-s.compared :]
    cholesky = NTKGP(gp.lin, outputscale=gp.outputscale, noise=gp.noise)
    exact, seconds = timed(f"Cholesky, {len(some):,} pixels", lambda: cholesky.condition(x[some], after[some]))
    quick = gp.condition(x[some], after[some])
    (m, v), (m_quick, v_quick) = exact.marginals(x[star]), quick.marginals(x[star])
    sd, latent, difference = (v + gp.noise).sqrt(), v.sqrt(), (m - m_quick).abs()
    out["dense"] = {
        "n": len(some), "seconds": seconds,
        "mean_in_predictive_sd": float((difference / sd).max()), "mean_in_sd": float((difference / latent).max()),
        "predictive_sd": float((((v_quick + gp.noise) / (v + gp.noise)).sqrt() - 1).abs().max()),
        "sd": [float(q(v_quick.sqrt() / latent - 1)) for q in (torch.min, torch.max)],
        "log_likelihood_difference": float(quick.log_marginal_likelihood - exact.log_marginal_likelihood),
    }  # fmt: skip
    say(f"    {out['dense']}")
    out["memory"] = out["all"]["memory"]
    return out, images


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", help="the folder with the maps; otherwise as load_malaria looks for them")
    parser.add_argument("--source", default="real", choices=["real", "auto", "embedded"])
    parser.add_argument("--out", type=Path, default=Path("book/results/04_malaria.africa.json"))
    parser.add_argument("--pixels", type=int, help="only so many pixels, at random: a rehearsal")
    parser.add_argument("--condition", type=float, help="of Settings, instead of its default")
    chosen = parser.parse_args(arguments)
    data = load_malaria((2012, 2015), "africa", source=chosen.source, data_dir=chosen.data_dir)
    settings = Settings()
    settings = replace(settings, condition=chosen.condition or settings.condition)
    if chosen.pixels:
        shuffled = torch.randperm(len(data.longitude), generator=torch.Generator().manual_seed(1))
        kept = shuffled[: chosen.pixels].sort().values
        data = replace(data, longitude=data.longitude[kept], latitude=data.latitude[kept], rate=data.rate[:, kept])
    out, images = run(data, settings, lambda line: print(line, flush=True))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(out, indent=1) + "\n")
    np.savez_compressed(chosen.out.with_suffix(".npz"), **images)
    print(f"wrote {chosen.out} and {chosen.out.with_suffix('.npz')}")


if __name__ == "__main__":
    main()
