"""Outputscale and noise by marginal likelihood, of one task or of many, from one eigendecomposition."""

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from scipy.optimize import minimize_scalar
from torch import Tensor

from ntkbook.memory import working_memory
from ntkbook.tasks import Basis, TaskHyperparameters, Tasks

if TYPE_CHECKING:
    from ntkbook.gp import NTKGP


def rounding(diagonal: Tensor) -> float:
    """ε n max k(x, x): the noise from which on a Gram matrix (n × n) in floating point has a Cholesky factor.

    In the norm, n entries in a row that are off by ε each. Higham's condition (Accuracy and Stability of Numerical
    Algorithms, Theorem 10.7) has n² for n, with all signs at their worst; of the kernels that were tried, up to
    n = 1000, all had factors from a quarter of this on.
    """
    return torch.finfo(diagonal.dtype).eps * len(diagonal) * float(diagonal.max())


class ProfileLikelihood:
    """log p(y) under N(H c, s²Λ + σ²I) in K's eigenbasis, as a function of log10 of one free number.

    Free noise: the number is σ²/s², and s² is its maximiser in closed form. Fixed noise, already divided out: it is s².
    The search ends where noise is lost in the `rounding` of s²K: beyond, its likelihood is that of rounding errors.
    """

    def __init__(self, eigenvalues: Tensor, y: Tensor, basis: Tensor, fixed_noise: bool, rounding: float) -> None:
        self.eigenvalues, self.y, self.basis, self.fixed = eigenvalues, y, basis, fixed_noise
        # An s² that explains y alone, or a ratio that weighs noise and kernel alike: the middle of the search.
        level = float(eigenvalues.mean())
        if not level > 0:
            raise ValueError("fit: the kernel is zero at these inputs: the network's outputs depend on no parameter.")
        rest = y - basis @ (torch.linalg.pinv(basis) @ y)
        if rest.norm() <= 1e-13 * y.norm():
            raise ValueError("fit: the observations equal the prior mean: they determine no outputscale and no noise.")
        limit = math.log10(rounding)
        if fixed_noise:
            middle = math.log10(float(y.square().mean()) / level)
            self.low, self.high = min(middle - 8, -limit), min(middle + 8, -limit)
        else:
            middle = math.log10(level)
            self.low, self.high = max(middle - 12, limit), middle + 4
        self.limit = -limit if fixed_noise else limit

    def _parts(self, number: float) -> tuple[Tensor, Tensor, Tensor]:
        free = 10.0**number
        spectrum = free * self.eigenvalues + 1 if self.fixed else self.eigenvalues + free
        constant = self.y.new_zeros(self.basis.shape[1])
        if self.basis.shape[1]:
            weighted = self.basis / spectrum[:, None]
            constant = torch.linalg.solve(self.basis.T @ weighted, weighted.T @ self.y)
        return spectrum, (self.y - self.basis @ constant).square() / spectrum, constant

    def value(self, number: float) -> float:
        spectrum, squares, _ = self._parts(number)
        if self.fixed:
            return float(-0.5 * (squares.sum() + spectrum.log().sum()))
        n = len(spectrum)
        return float(-0.5 * (n * squares.mean().log() + n + spectrum.log().sum()))

    def maximise(self) -> float:
        step = (self.high - self.low) / 160
        grid = [self.low + i * step for i in range(161)]
        best = max(grid, key=self.value)
        if best in (grid[0], grid[-1]):
            limited = math.isclose(best, self.limit, abs_tol=step / 2)
            better = "" if self.y.dtype == torch.double else "; that in torch.float64 is smaller"
            rounded = f" Beyond lies the kernel's rounding in {self.y.dtype}{better}." if limited else ""
            warnings.warn(
                "fit: the marginal likelihood grows up to the end of the search, 10^"
                f"{best:.1f} for {'the outputscale' if self.fixed else 'noise / outputscale'}: these data do not "
                f"determine it.{rounded} (With the network as mean, its own training data say that nothing is left to "
                "explain.)",
                stacklevel=3,
            )
            return best
        found = minimize_scalar(
            lambda t: -self.value(t), bounds=(best - step, best + step), method="bounded", options={"xatol": 1e-10}
        )
        return float(found.x)

    def solution(self, number: float) -> tuple[float, float, Tensor]:
        """outputscale, noise, constant."""
        _, squares, constant = self._parts(number)
        if self.fixed:
            return 10.0**number, math.nan, constant
        scale = float(squares.mean())
        return scale, scale * 10.0**number, constant


def fit(
    basis: Basis,
    observed: Bool[Tensor, "T N"],
    y: Float[Tensor, "T N"],
    level: Float[Tensor, " T"],
    outputs: int,
    constant: bool,
    least: float,
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"], Float[Tensor, "T o"], Bool[Tensor, " T"], Bool[Tensor, " T"]]:
    """s², σ², constants, which tasks determine them, and which cannot be fitted at all: these hold no numbers to use.

    Args:
        y: zero where not observed. level: the mean of each task's prior variances for s² = 1. least: of σ²/s².
    """
    n = observed.sum(1).to(y)
    units = torch.eye(outputs if constant else 0, outputs, dtype=y.dtype, device=y.device)
    columns = units.T.repeat(y.shape[1] // outputs, 1) * observed[..., None]  # one for each constant, (T, N, k)
    counts = columns.sum(1)
    # The likelihood does not change if a constant is taken off y; without its mean less of y cancels against c.
    centre = (columns.mT @ y[..., None])[..., 0] / counts.clamp_min(1)
    z = y - (columns @ centre[..., None])[..., 0]
    impossible = (n < 2) | ~(level > 0) | (z.norm(dim=1) <= 1e-13 * y.norm(dim=1))
    middle = level.where(level > 0, 1).log10()
    low = (middle - 12).clamp_min(math.log10(least))  # where NTKGP.fit looks
    high = (middle + 4).maximum(low)
    tasks = Tasks(basis, observed, torch.cat([z[..., None], columns], dim=2))
    unseen = torch.diag_embed((counts == 0).to(y))

    def profile(anchor: Float[Tensor, " T"]) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        """log p as a function of log10 ρ, up to a constant, with the best s² and constants; from q at an anchor ε."""
        base, values, h = tasks.solve(anchor)[1], tasks.values, tasks.h

        def at(number: Float[Tensor, " T"]) -> tuple[Tensor, Tensor, Tensor]:
            ratio = 10**number
            gain = (ratio - anchor)[:, None] / ((values + anchor[:, None]) * (values + ratio[:, None]))
            q = base + (gain[..., None] * h).mT @ h
            c = torch.linalg.solve(q[:, 1:, 1:] + unseen, q[:, 1:, :1])
            squares = (q[:, :1, :1] - q[:, :1, 1:] @ c).flatten()
            scale = squares / (ratio * n)
            log_determinant = (values / ratio[:, None]).log1p().sum(1) + n * ratio.log()
            return -0.5 * (n * scale.log() + log_determinant), scale, c[..., 0]

        return at

    step = (high - low) / 160
    coarse = profile(10**low)
    best, index = _best_of_grid(lambda number: coarse(number)[0], low, step)
    inside = (index > 0) & (index < 160)
    # λ and h are known to the rounding of K, which an anchor at the low end is close to: once more from a closer one.
    fine = profile(10 ** (best - step))
    best = best.where(~inside, _golden_section(lambda number: fine(number)[0], best - step, best + step))
    _, scale, c = fine(best)
    return scale, scale * 10**best, c + centre, inside & ~impossible, impossible


def _best_of_grid(
    function: Callable[[Tensor], Tensor], low: Float[Tensor, " T"], step: Float[Tensor, " T"]
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """Each task's best of 161 numbers, and its index."""
    best, index, most = low, torch.zeros_like(low), function(low)
    for i in range(1, 161):
        number = low + i * step
        value = function(number)
        better = value > most
        best, index, most = best.where(~better, number), index.where(~better, i), most.where(~better, value)
    return best, index


def _golden_section(
    function: Callable[[Tensor], Tensor], left: Float[Tensor, " T"], right: Float[Tensor, " T"]
) -> Float[Tensor, " T"]:
    """Each task's maximiser between two numbers, to 1e-10."""
    for _ in range(45):
        width = (math.sqrt(5) - 1) / 2 * (right - left)
        lower = function(right - width) > function(left + width)
        left, right = left.where(lower, right - width), (left + width).where(lower, right)
    return (left + right) / 2


def fit_tasks(
    basis: Basis, level: Float[Tensor, " N"], residuals: Float[Tensor, "T n o"], gp: "NTKGP"
) -> TaskHyperparameters:
    """`NTKGP.fit_tasks`, for residuals that are NaN where not observed. level: the Gram matrix's diagonal."""
    tasks, _, o = residuals.shape
    constant = gp.mean == "constant"
    each = (basis.rank**2 + basis.features.shape[0] * (3 + 2 * o * constant)) * residuals.element_size()
    least = max(rounding(level), torch.finfo(level.dtype).tiny)  # a kernel may be zero
    parts = []
    for part in residuals.flatten(1).split(max(1, working_memory(residuals.device) // (4 * each))):
        observed = ~part.isnan()
        mean_level = (observed.to(level) @ level) / observed.sum(1).clamp_min(1)
        parts.append(fit(basis, observed, part.nan_to_num(), mean_level, o, constant, least))
    scale, noise, c, determined, impossible = (torch.cat(part) for part in zip(*parts))
    if not determined.all():
        warnings.warn(
            f"fit_tasks: {int((~determined).sum())} of {tasks} tasks do not determine outputscale and noise: "
            f"{int(impossible.sum())} of them have fewer than two observed values, or values equal to the prior mean, "
            "and keep the GP's own; at the others the marginal likelihood grows up to the end of the search for "
            "noise / outputscale.",
            stacklevel=3,
        )
    own = residuals.new_zeros(o) if gp.constant is None else gp.constant
    return TaskHyperparameters(
        scale.where(~impossible, gp.outputscale),
        noise.where(~impossible, gp.noise),
        c.where(~impossible[:, None], own) if constant else None,
        determined,
    )
