"""A figure to play with: the reader's own observations, and the posteriors of several priors, in the browser.

What the page gets of a prior is an eigen-truncation of its Gram matrix on a grid, K ≈ Φ Φᵀ, and its mean there;
`book/_static/posterior.js` does the rest, a Cholesky factorisation of as many rows as there are observations. Their
inputs snap to the grid, so nothing is interpolated.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkbook.publish import figures

TRUNCATION = 1e-13
"""Eigenvalues below this share of the trace are left out. What is left out is divided by σ² in a posterior mean."""
PRECISION = 1e-13
"""What Φ is rounded to, relative to the largest prior standard deviation."""
SMALLEST_NOISE = 0.01
"""The smallest σ that a reader can set."""
HELP = (
    "Click or tap to add an observation, drag it, tap it twice to remove it. Keys: Tab to the plot or a point, arrows "
    "move (with Shift by ten steps), Enter adds, Delete removes. In x, observations snap to the grid of {n} points. "
    "Bands are 95 % of a new observation, noise included; σ and s² act on both. {noise}"
)
OWN_NOISE = "Choosing a network sets σ to that network's own."
ONE_NOISE = "σ stays as it is when another network is chosen."


class Prior(NamedTuple):
    """A Gaussian process before any data, on the grid: its Gram matrix K (n, n) and its mean, a number or (n,).

    A network's `noise` is the σ² that choosing it sets; None leaves it as it is.
    """

    gram: ArrayLike
    mean: ArrayLike = 0.0
    noise: float | None = None


class Task(NamedTuple):
    """What a reader can start from: inputs x (k,), the noiseless curve on the grid (n,).

    An observation is the curve's value at the point of the grid that is nearest to its x.
    """

    x: ArrayLike
    truth: ArrayLike


def features(gram: ArrayLike, truncation: float = TRUNCATION) -> dict[str, Any]:
    """Φ of K ≈ Φ Φᵀ, as it is stored: ``columns`` of integers, (m, n), in units of ``unit``.

    Args:
        gram: K, (n, n).
        truncation: the smallest eigenvalue that is kept, over the trace.

    Raises:
        ValueError: K is not square, not finite, not symmetric, or has an eigenvalue below -truncation·trace.
    """
    K = np.asarray(gram, dtype=np.float64)
    if K.ndim != 2 or len(K) != K.shape[-1] or not np.isfinite(K).all():
        raise ValueError(f"gram: expected a finite square matrix, got shape {K.shape}")
    trace = float(np.trace(K))
    if not np.allclose(K, K.T, rtol=0, atol=1e-10 * trace):
        raise ValueError("gram: expected a symmetric matrix")
    values, vectors = np.linalg.eigh(0.5 * (K + K.T))
    rounding = len(K) * np.finfo(float).eps  # of eigh, relative to the trace
    if not trace > 0 or values[0] < -max(truncation, rounding) * trace:
        raise ValueError(f"gram: expected a positive semidefinite matrix, got an eigenvalue of {values[0]:.2g}")
    keep = values > truncation * trace
    phi = (vectors[:, keep] * np.sqrt(values[keep]))[:, ::-1].T
    phi *= np.sign(phi[np.arange(len(phi)), np.abs(phi).argmax(1)])[:, None]  # a column's sign is free: fix it
    unit = 10.0 ** math.floor(math.log10(PRECISION * math.sqrt(K.diagonal().max())))
    return {"unit": unit, "columns": np.rint(phi / unit).astype(np.int64).tolist()}


def posterior(
    prior: Prior, at: Sequence[int], y: ArrayLike, outputscale: float, noise: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of the latent f on the grid, (n,) both, given y (k,) at these indices: for the static figure.

    Args:
        prior: K and m.
        at: indices into the grid.
        y: observations.
        outputscale: s², which multiplies K.
        noise: σ², the variance of an observation.
    """
    K = outputscale * np.asarray(prior.gram, dtype=np.float64)
    mean = np.broadcast_to(np.asarray(prior.mean, dtype=np.float64), len(K))
    where = np.asarray(at, dtype=int)
    known = K[where]
    solved = np.linalg.solve(known[:, where] + noise * np.eye(len(where)), known)
    return mean + solved.T @ (np.asarray(y) - mean[where]), K.diagonal() - np.einsum("ks,ks->s", known, solved)


def payload(
    x: ArrayLike,
    networks: Mapping[str, Prior],
    compared: Mapping[str, Prior],
    tasks: Mapping[str, Task],
    *,
    noise: float,
    title: str,
    alt: str,
) -> dict[str, Any]:
    """What the page gets. Arguments and errors as for `widget`, but that the title is shown as it is."""
    grid = np.asarray(x, dtype=np.float64).squeeze()
    if grid.ndim != 1 or len(grid) < 2 or not np.allclose(np.diff(grid), (grid[-1] - grid[0]) / (len(grid) - 1)):
        raise ValueError(f"x: expected an even, increasing grid (n,), got shape {grid.shape}")
    if not networks or len(compared) != 1 or not tasks or set(networks) & set(compared):
        raise ValueError("expected at least one network, one prior of another name to compare with, at least one task")
    own = {name: prior.noise for name, prior in networks.items() if prior.noise is not None}
    for value in (noise, *own.values()):
        if not SMALLEST_NOISE**2 <= value <= 1:
            raise ValueError(f"noise: expected a variance between {SMALLEST_NOISE**2:g} and 1, got {value:g}")
    priors = []
    for name, prior in {**networks, **compared}.items():
        if np.shape(prior.gram) != (len(grid), len(grid)) or np.shape(prior.mean) not in ((), (len(grid),)):
            raise ValueError(
                f"{name}: expected gram ({len(grid)}, {len(grid)}) and a mean of shape () or ({len(grid)},), got "
                f"{np.shape(prior.gram)} and {np.shape(prior.mean)}"
            )
        mean = np.broadcast_to(np.asarray(prior.mean, dtype=np.float64), len(grid)).round(12).tolist()
        priors.append({"name": name, "mean": mean, "features": features(prior.gram)})
        if name in own:
            priors[-1]["noise"] = round(math.sqrt(own[name]), 4)
    starts = []
    for name, task in tasks.items():
        truth = np.asarray(task.truth, dtype=np.float64).round(4)
        at = sorted({int(np.abs(grid - v).argmin()) for v in np.ravel(task.x)})
        starts.append({"name": name, "at": at, "y": truth[at].tolist(), "truth": truth.tolist()})
    return {
        "title": title, "alt": alt, "x": grid.round(10).tolist(),
        "help": HELP.format(n=len(grid), noise=OWN_NOISE if own else ONE_NOISE),
        "noise": round(math.sqrt(noise), 4), "noiseRange": [SMALLEST_NOISE, 1.0],
        "networks": priors[:-1], "compared": priors[-1], "tasks": starts,
    }  # fmt: skip


def widget(
    x: ArrayLike,
    networks: Mapping[str, Prior],
    compared: Mapping[str, Prior],
    tasks: Mapping[str, Task],
    *,
    noise: float,
    profile: str = "cpu",
) -> Any:
    """The figure, with a static one of the first network and task under it for where no script runs.

    Args:
        x: an even grid, (n,) or (n, 1); observations snap to it.
        networks: a button each, name → prior; with a noise of its own, the button sets it.
        compared: the one prior that is shown beside them, name → prior.
        tasks: what a reader can start from, name → task.
        noise: σ² at the start, from 1e-4 to 1; the slider sets σ.
        profile: *quick* is added to the title.

    Returns:
        An object to leave as a cell's last expression.

    Raises:
        ValueError: an uneven grid, arrays that do not fit it, a Gram matrix that is none, noise out of range.
    """
    network, task = next(iter(networks)), next(iter(tasks))
    other = next(iter(compared), "")
    title = "Your observations, and the posteriors given them"
    alt = (
        f"Posterior mean and 95 % band of a Gaussian process with a network's tangent kernel, and of {other}, given "
        "observations that the reader adds, drags and removes"
    )
    fig, ax = plt.subplots()
    figures.title(ax, title, profile)
    data = payload(x, networks, compared, tasks, noise=noise, title=ax.get_title(), alt=alt)
    first = data["tasks"][0]
    for method, prior in (("ntk", networks[network]), ("rbf", compared[other])):
        mean, variance = posterior(prior, first["at"], first["y"], 1.0, data["noise"] ** 2)
        sd = np.sqrt(variance + data["noise"] ** 2)
        figures.posterior_panel(ax, data["x"], mean, 0.98 * sd, method=method)  # a panel's band is 2 sd: 95 % is 1.96
    ax.plot(data["x"], first["truth"], "--", color=figures.TRUTH, linewidth=1, label=f"truth of {task}")
    ax.plot(np.asarray(data["x"])[first["at"]], first["y"], "o", color=figures.CONTEXT, label="observations")
    reach = 1.7 * float(np.abs(first["truth"]).max())
    ax.set(xlabel="x", ylabel="y", ylim=(-reach, reach))
    ax.legend(ncols=2)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return figures.live("ntk-posterior", text, fig, alt)
