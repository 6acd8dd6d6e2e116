"""Many tasks at the same inputs, from one eigendecomposition; `ntkbook.hyperparameters` fits theirs.

K = U Λ Uᵀ at the inputs is B Bᵀ with B = U Λ^½ (N × r), r its rank to rounding. A task that saw the values S has
K_SS = B_S B_Sᵀ, whose eigenvalues are those of B_SᵀB_S = Q diag(λ) Qᵀ (r × r), and zeros. With ρ = σ²/s²,
h = QᵀB_Sᵀy and w = Q (h / (λ + ρ)),

    (K_SS + ρI)⁻¹ y = (y − B_S w) / ρ,                log|K_SS + ρI| = Σ log(1 + λ/ρ) + |S| log ρ,
    q(ρ) = ρ yᵀ(K_SS + ρI)⁻¹ y = |y − B_S w|² + ρ|w|² = q(ε) + Σ h² (ρ − ε) / ((λ + ε)(λ + ρ)) for every ε < ρ.

The first form of q is a minimum over w, which forgives a rounded w; in the second nothing cancels, and a step costs r
operations. A kernel whose spectrum falls fast, as an NTK's does, has r ≪ N, and tasks with gaps of their own are cheap.
"""

import copy
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ntkbook.checks import place
from ntkbook.memory import require_memory, working_memory
from ntkbook.posterior import Posterior

if TYPE_CHECKING:
    from ntkbook.gp import NTKGP


class TaskHyperparameters(NamedTuple):
    """Hyperparameters for each of T tasks: what `NTKGP.fit_tasks` finds and `NTKGP.condition_tasks` takes.

    Attributes:
        outputscale: s², (T,). noise: σ², (T,).
        constant: the constant mean of each output, (T, o), of a GP with mean="constant".
        determined: (T,), whether the task's data determined them; True where they were given by hand.
    """

    outputscale: Float[Tensor, " T"]
    noise: Float[Tensor, " T"]
    constant: Float[Tensor, "T o"] | None = None
    determined: Bool[Tensor, " T"] | None = None


class Basis:
    """B of a Gram matrix K = B Bᵀ: an eigendecomposition, without what is below the rounding of K.

    What is left out changes K by less than rounding its largest eigenvalue does.
    """

    def __init__(self, gram: Float[Tensor, "N N"]) -> None:
        values, vectors = torch.linalg.eigh(gram)
        self.largest = float(values[-1])
        kept = values > torch.finfo(gram.dtype).eps * self.largest
        self.features: Float[Tensor, "N r"] = vectors[:, kept] * values[kept].sqrt()
        self.whiten: Float[Tensor, "N r"] = vectors[:, kept] / values[kept].sqrt()

    @property
    def rank(self) -> int:
        return self.features.shape[1]

    def decompose(self, observed: Bool[Tensor, "P N"]) -> tuple[Float[Tensor, "P r"], Float[Tensor, "P r r"]]:
        """λ and Q of each pattern of observed values."""
        b, r = self.features, self.rank
        require_memory(
            len(observed) * r * (r + 1) * b.element_size(),
            b.device,
            f"{len(observed):,} patterns of missing values, at rank {r:,},",
            "Give fewer tasks at a time.",
        )
        size = max(1, working_memory(b.device) // (4 * b.element_size() * max(1, b.numel())))
        parts = [torch.linalg.eigh((b * part[..., None]).mT @ b) for part in observed.split(size)]
        values, vectors = (torch.cat(part) for part in zip(*parts))
        return values.clamp_min(0), vectors


class Tasks:
    """Targets of tasks in the eigenbases of what each saw: h, and residuals y − B_S w.

    Args:
        observed: what each task saw. z: k targets a task, zero where not observed.
    """

    def __init__(self, basis: Basis, observed: Bool[Tensor, "T N"], z: Float[Tensor, "T N k"]) -> None:
        self.basis, self.observed, self.z = basis, observed, z
        patterns, self.pattern_of = torch.unique(observed, dim=0, return_inverse=True)
        self.spectra, self.vectors = basis.decompose(patterns)
        self.values: Float[Tensor, "T r"] = self.spectra[self.pattern_of]
        self.h: Float[Tensor, "T r k"] = self._rotate((z.mT @ basis.features).mT, back=False)

    def _rotate(self, v: Float[Tensor, "T r k"], back: bool) -> Float[Tensor, "T r k"]:
        """Q v, or Qᵀ v, with each task's own Q."""
        vectors = self.vectors if back else self.vectors.mT
        if len(vectors) == 1:
            return vectors[0] @ v
        size = max(1, working_memory(v.device) // (v.element_size() * max(1, vectors[0].numel())))
        return torch.cat([vectors[i] @ part for i, part in zip(self.pattern_of.split(size), v.split(size))])

    def solve(self, ratio: Float[Tensor, " T"]) -> tuple[Float[Tensor, "T N k"], Float[Tensor, "T k k"]]:
        """y − B_S w = ρ (K_SS + ρI)⁻¹ y, zero where not observed, and q(ρ), at each task's ratio ρ."""
        w = self._rotate(self.h / (self.values + ratio[:, None])[..., None], back=True)
        rest = (self.z - (w.mT @ self.basis.features.T).mT) * self.observed[..., None]
        return rest, rest.mT @ rest + ratio[:, None, None] * (w.mT @ w)


class TaskPosterior(Posterior):
    """T tasks at the same inputs, with hyperparameters for each. Differentiable in new inputs, not in the data."""

    def __init__(
        self,
        gp: "NTKGP",
        x: Tensor,
        y: Float[Tensor, "t n o"],
        basis: Basis,
        hyperparameters: TaskHyperparameters,
    ) -> None:
        self._gp = gp = copy.copy(gp)
        self._lin, self._x, self._tasks, self._o = gp.lin, x.detach().clone(), True, y.shape[2]
        self._hyperparameters, self._sigma2 = hyperparameters, hyperparameters.noise
        scale, noise = hyperparameters.outputscale, hyperparameters.noise
        self._ratio = noise / scale
        rounding = torch.finfo(y.dtype).eps * basis.largest
        if (self._ratio < rounding).any():
            raise ValueError(
                f"noise: for {int((self._ratio < rounding).sum())} of {len(y)} tasks it is below the rounding of the "
                f"Gram matrix in {y.dtype}, {rounding:.1e} times the outputscale. Use a larger noise, or "
                "dtype=torch.float64."
            )
        residuals = (y - self._prior_mean(x)).flatten(1).detach()
        observed = ~residuals.isnan()
        tasks = Tasks(basis, observed, residuals.nan_to_num()[..., None])
        self._whiten, self._group_of = basis.whiten, tasks.pattern_of
        self._spectra, self._vectors = tasks.spectra, tasks.vectors
        rest, squares = tasks.solve(self._ratio)
        self._weights, self._seen = rest[..., 0] / self._ratio[:, None], observed
        n, r = observed.sum(1).to(y), self._ratio
        log_determinant = (tasks.values / r[:, None]).log1p().sum(1) + n * noise.log()
        self._log_likelihood = -0.5 * (squares.flatten() / noise + log_determinant + n * math.log(2 * math.pi))

    def to(
        self,
        *where: torch.device | torch.dtype | str | int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "TaskPosterior":
        """As `Posterior.to`; directions of the kernel below the new dtype's rounding keep their prior variance."""
        device, dtype = place(where, device, dtype)
        other = super().to(device=device, dtype=dtype)
        if dtype not in (None, self._whiten.dtype) and self._whiten.shape[1]:
            inverse = self._whiten.square().sum(0)  # of each direction's eigenvalue
            seen = inverse * torch.finfo(dtype).eps < inverse.min()
            other._whiten = other._whiten * seen.to(other._whiten)
        return other

    @property
    def log_marginal_likelihood(self) -> Tensor:
        return self._log_likelihood

    @property
    def log_marginal_likelihood_error(self) -> Tensor:
        return torch.zeros_like(self._log_likelihood)

    @property
    def solver(self) -> str:
        """ "eigh": one eigendecomposition of the Gram matrix, and a small one for each pattern of missing values."""
        return "eigh"

    @property
    def weights(self) -> Tensor:
        scaled = self._weights / self._hyperparameters.outputscale[:, None]
        each = scaled.where(self._seen, torch.nan).view(len(scaled), len(self._x), self._o)
        return each if self._o > 1 else each[..., 0]

    def _prior_mean(self, x: Tensor) -> Float[Tensor, "t m o"]:
        constant = self._hyperparameters.constant
        mean = self._gp._mean(x, fitting=constant is not None)
        each = mean.expand(len(self._hyperparameters.noise), *mean.shape)
        return each if constant is None else each + constant[:, None]

    def _noise_at(self, noise: Tensor | float | None, m: int) -> Tensor:
        if noise is None:
            return self._sigma2[:, None].expand(-1, m * self._o)
        return super()._noise_at(noise, m)

    def _cross(self, x: Tensor) -> Float[Tensor, "mo no"]:
        return self._lin.gram(x, self._x)  # for each task to scale

    def _means(self, x: Tensor, cross: Float[Tensor, "mo no"]) -> Float[Tensor, "t m o"]:
        prior = self._prior_mean(x)
        return prior + (self._weights @ cross.T).view_as(prior)

    def _moments(self, x: Tensor, full: bool) -> tuple[Float[Tensor, "t m o"], Tensor]:
        """Means, and covariances (T, m·o, m·o) or variances (T, m, o).

        With features b* = Λ^-½ Uᵀ k*, the variance is s² (k** − |b*|²) + σ² b*ᵀ (B_SᵀB_S + ρI)⁻¹ b*: what no data at
        these inputs can tell, plus what these did not. Both are sums of squares, and rounding leaves them positive.
        """
        if full:
            self._require_covariances(x)
        cross = self._cross(x)
        mean, b = self._means(x, cross), cross @ self._whiten
        prior = self._lin.gram(x) if full else self._lin.diagonal(x)
        beyond = prior - b @ b.T if full else (prior - b.square().sum(1)).clamp_min(0)
        second = prior.new_empty(len(mean), *prior.shape)
        for g, (values, vectors) in enumerate(zip(self._spectra, self._vectors)):
            members, c = self._group_of == g, b @ vectors
            ratio = self._ratio[members, None]
            left = ratio / (values + ratio)
            known = (c * left[:, None]) @ c.T if full else left @ c.square().T
            second[members] = known + beyond
        second = second * self._hyperparameters.outputscale.view(-1, *[1] * prior.ndim)
        return mean, second if full else second.view_as(mean)


def rank_is_low(basis: Basis) -> bool:
    """Whether eigendecompositions of rank r, one a pattern, cost less than Cholesky factors of all its values."""
    return 4 * basis.rank <= len(basis.features)
