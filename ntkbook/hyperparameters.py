"""Outputscale and noise of a Gaussian process by marginal likelihood, from one eigendecomposition."""

import math
import warnings

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor


class ProfileLikelihood:
    """log p(y) under N(H c, s²Λ + σ²I) in K's eigenbasis, as a function of log10 of one free number.

    Free noise: the number is σ²/s², and s² is its maximiser in closed form. Fixed noise, already divided out: it is s².
    """

    def __init__(self, eigenvalues: Tensor, y: Tensor, basis: Tensor, fixed_noise: bool) -> None:
        self.eigenvalues, self.y, self.basis, self.fixed = eigenvalues, y, basis, fixed_noise
        # An s² that explains y alone, or a ratio that weighs noise and kernel alike: the middle of the search.
        level = float(eigenvalues.mean())
        if not level > 0:
            raise ValueError("fit: the kernel is zero at these inputs: the network's outputs depend on no parameter.")
        rest = y - basis @ (torch.linalg.pinv(basis) @ y)
        if rest.norm() <= 1e-13 * y.norm():
            raise ValueError("fit: the observations equal the prior mean: they determine no outputscale and no noise.")
        centre = float(y.square().mean()) / level if fixed_noise else level
        self.low, self.high = (
            math.log10(centre) - (8 if fixed_noise else 12),
            math.log10(centre) + (8 if fixed_noise else 4),
        )

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
            warnings.warn(
                "fit: the marginal likelihood grows up to the end of the search, 10^"
                f"{best:.1f} for {'the outputscale' if self.fixed else 'noise / outputscale'}: these data do not "
                "determine it. (With the network as mean, its own training data say that nothing is left to explain.)",
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
