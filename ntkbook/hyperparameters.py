"""Outputscale and noise of a Gaussian process by marginal likelihood, from one eigendecomposition."""

import math
import warnings

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor


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
