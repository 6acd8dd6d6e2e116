"""Sinusoidal regression tasks (Section 3 and Appendix F of the paper), by the process of Kim et al. (2018).

Appendix F says that it follows Kim et al. (Bayesian Model-Agnostic Meta-Learning), but prints other distributions. The
default here is Kim et al.'s process, which the authors' code uses as well; the printed one is `ranges="appendix-f"`.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .registry import REGISTRY
from .sources import Provenance

DESCRIPTIONS = {
    "kim": "sinusoids drawn by the process of Kim et al. (2018), which the paper names and its authors' code uses",
    "appendix-f": "sinusoids drawn from the distributions that the paper's Appendix F prints, its misprints included",
}


@dataclass(frozen=True)
class SinusoidTasks:
    """T regression tasks y = A sin(w x + b) + noise, float64.

    Attributes:
        x, y: the observed points of each task.
        x_test: an even grid, the same for all tasks; y_test: the noiseless values there.
        amplitude, frequency, phase: A, w and b.
        noise_sd: standard deviation of the noise in y.
        provenance: which process the tasks were drawn by.
    """

    x: Float[Tensor, "tasks n 1"]
    y: Float[Tensor, "tasks n 1"]
    x_test: Float[Tensor, "m 1"]
    y_test: Float[Tensor, "tasks m"]
    amplitude: Float[Tensor, " tasks"]
    frequency: Float[Tensor, " tasks"]
    phase: Float[Tensor, " tasks"]
    noise_sd: Float[Tensor, " tasks"]
    provenance: Provenance

    def truth(self, x: Float[Tensor, "*tasks k 1"]) -> Float[Tensor, "tasks k"]:
        """Noiseless values of every task at `x`: (k, 1), the same for all tasks, or (T, k, 1)."""
        return _sinusoid(x, self.amplitude, self.frequency, self.phase)


def sinusoid_tasks(
    seed: int, n_tasks: int = 10, n_points: int = 10, ranges: str = "kim", n_test: int = 200
) -> SinusoidTasks:
    """Draws tasks; the global random state is neither used nor changed.

    Task t depends on `seed` and t alone: more tasks leave the first ones as they were.

    Args:
        seed: not negative.
        n_tasks: number of tasks T.
        n_points: observed points n a task.
        ranges: "kim": x ~ U(-5, 5), A ~ U(0.1, 5), b ~ U(0, 2 pi), w ~ U(0.5, 2), noise ~ N(0, (0.01 A)^2).
            "appendix-f", as printed: x ~ N(0, 1), A ~ U(0.1, 5), w ~ U(0, 2 pi), noise ~ N(0, 0.01 A) with 0.01 A the
            variance, as in the same line's N(0, I). It gives no distribution for b: here b = 0.
        n_test: points m of the even test grid, on [-5, 5] ("kim") or [-3, 3] ("appendix-f", which draws few x outside).

    Raises:
        ValueError: an unknown `ranges`, a negative seed, or no task, point or test point.
    """
    if ranges not in DESCRIPTIONS:
        raise ValueError(f"expected ranges to be one of {', '.join(DESCRIPTIONS)}; got {ranges!r}")
    if seed < 0 or min(n_tasks, n_points, n_test) < 1:
        raise ValueError(
            f"expected seed >= 0 and at least one task, point and test point; got seed={seed}, n_tasks={n_tasks}, "
            f"n_points={n_points}, n_test={n_test}"
        )
    kim = ranges == "kim"
    rows, xs, errors = [], [], []
    for task in range(n_tasks):
        draw = np.random.default_rng([seed, task])
        amplitude = draw.uniform(0.1, 5.0)
        frequency = draw.uniform(0.5, 2.0) if kim else draw.uniform(0.0, 2 * math.pi)
        phase = draw.uniform(0.0, 2 * math.pi) if kim else 0.0
        rows.append((amplitude, frequency, phase, 0.01 * amplitude if kim else math.sqrt(0.01 * amplitude)))
        xs.append(draw.uniform(-5.0, 5.0, n_points) if kim else draw.standard_normal(n_points))
        errors.append(draw.standard_normal(n_points))
    amplitude, frequency, phase, noise_sd = torch.tensor(rows, dtype=torch.float64).T
    x = torch.from_numpy(np.stack(xs))[..., None]
    y = _sinusoid(x, amplitude, frequency, phase) + noise_sd[:, None] * torch.from_numpy(np.stack(errors))
    edge = 5.0 if kim else 3.0
    x_test = torch.linspace(-edge, edge, n_test, dtype=torch.float64)[:, None]
    entry = REGISTRY["sinusoids"]
    return SinusoidTasks(
        x=x,
        y=y[..., None],
        x_test=x_test,
        y_test=_sinusoid(x_test, amplitude, frequency, phase),
        amplitude=amplitude,
        frequency=frequency,
        phase=phase,
        noise_sd=noise_sd,
        provenance=Provenance(
            entry.name, "real", DESCRIPTIONS[ranges], 0, "", "none needed", entry.citation, entry.url
        ),
    )


def _sinusoid(x: Tensor, amplitude: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
    return amplitude[:, None] * torch.sin(frequency[:, None] * x[..., 0] + phase[:, None])
