"""Conditioning on up to millions of points: landmarks, Gram columns of theirs, and a handful of products with all data.

A smooth network's kernel has few directions above rounding, whatever the number of points. The span of so many
Jacobian rows r, the landmarks', then holds all that the data can say but for a remainder whose size is known. What is
kept is (n, r): nothing of n × n or n × p is formed.
"""

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ntkbook.blocks import LayerBlocks
from ntkbook.iterative import ConvergenceWarning, Report
from ntkbook.krylov import Whitened, conjugate_gradients, inverse
from ntkbook.linearize import Linearization
from ntkbook.memory import require_memory, working_memory
from ntkbook.moving import Movable

CHUNK = 8192
"""Examples whose Gram columns are asked for at once, as `Linearization.gram` keeps the features of those."""


@dataclass(frozen=True)
class Nystrom:
    """How `NTKGP` conditions on very many points, in either of its spaces.

    Against `Iterative`: its Krylov space takes two products with all the data for each block of directions, and is the
    better one a direction; landmarks take none, and Gram columns at p / (sum of the layers' inputs and outputs) times
    less cost than products. So: `Iterative` where n is small or the spectrum falls slowly, `Nystrom` where a product
    takes seconds.

    Attributes:
        tolerance: of the true residual, ‖y − m − (s²K + Σ)α‖ relative to ‖y − m‖.
        max_iterations: of conjugate gradients, all restarts together; each takes two products with the data.
        rank: landmarks, at most.
        pool: observed values, drawn at random, that the landmarks are chosen from. Their Gram matrix is formed.
        slack: enough of the trace that is left outside the landmarks' space, which bounds all errors, as
            `ntkbook.nystrom.Landmarks` derives; fewer than `rank` do then, and where rounding leaves more, no more
            are taken.
        seed: of the pool.
    """

    tolerance: float = 1e-6
    max_iterations: int = 30
    rank: int = 300
    pool: int = 8000
    slack: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tolerance", "slack"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"Nystrom: expected a positive, finite {name}, got {value}.")
        for name in ("max_iterations", "rank", "pool"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value is True or value < 1:
                raise ValueError(f"Nystrom: expected a whole number of {name}, at least 1, got {value}.")


class Cost(NamedTuple):
    """Multiplications, and bytes of memory."""

    multiplications: float
    memory: float


def counted_costs(lin: Linearization, x: Tensor, rank: int = 100) -> dict[str, Cost]:
    """What conditioning on the outputs at x takes by "cholesky" and by "nystrom" with `rank` landmarks, counted.

    Three products with JJᵀ serve a kernel whose directions the landmarks hold (the start's residual, an iteration, the
    last residual); orthogonalising the landmarks' features takes 4 rank² a value.
    """
    blocks, n = LayerBlocks(lin, x, *lin._inspect(x)), len(x)
    values, itemsize = n * blocks.outputs, lin.dtype.itemsize
    gram, columns = blocks.gram_cost(n, n, symmetric=True), blocks.gram_cost(n, min(n, rank), symmetric=False)
    products = 6 * n * blocks.product_cost(1)
    return {
        "cholesky": Cost(gram + values**3 / 6, 4 * values**2 * itemsize),
        "nystrom": Cost(columns + 4 * values * rank**2 + products, 3 * rank * max(values, lin.num_params) * itemsize),
    }


class Landmarks(Movable):
    """The span V (p, r) of r Jacobian rows, and what all data say in it, in units of prior and noise (see `Whitened`).

    AᵀA is seen as T = ΦᵀΦ on V, Φ = AV, and as nothing outside. E = A(I − VVᵀ) is what that leaves, and
    δ = |E|² = tr(AAᵀ) − |Φ|² is known and bounds everything. By 2 (Φu)ᵀ(Ew) ≤ t |Φu|² + |Ew|²/t at t = √δ,

        I + AᵀA ≤ (1 + √δ + δ) (I + VTVᵀ),        so (I + VTVᵀ)⁻¹ ≤ (1 + √δ + δ) (I + AᵀA)⁻¹.

    The left side alone would err downwards too. The posterior variance of jᵀφ is the error of the best linear estimate,
    min over b of |j − Aᵀb|² + |b|², so any b gives something safe. With j = Vu + w, w outside V, and b = Φc for
    c = (I + T)⁻¹u, that is |w − EᵀΦc|² + |u − Tc|² + |Φc|² and at most

        (|w| + √δ |Φc|)² + uᵀ(I + T)⁻¹u,        itself at most (1 + √δ + δ) (|w|² + uᵀ(I + T)⁻¹u),

    a sum of terms that are not negative: never below the exact variance, and at most (1 + √δ + δ)² times it. And
    log det(I + AAᵀ) is between log det(I + T) and log det(I + T) + δ, as what is left is a Schur complement below EᵀE.

    Attributes:
        rank: r. left: δ.
        root: upper triangular S, SᵀS = I + T.
    """

    def __init__(self, system: Whitened, options: Nystrom) -> None:
        self._lin, (self._x, self._columns) = system.lin, _choose(system, options)
        self.rank = r = len(self._columns)
        (n, p), device, itemsize = system.shape, system.x.device, system.x.element_size()
        require_memory(3 * r * max(n, p) * itemsize, device, f"Features of {r:,} landmarks", "Use a smaller rank=.")
        # QR and not Cholesky factors of Gram matrices, which would square the condition number: here, and below.
        self._factor = torch.linalg.qr(self._lin.jacobian(self._x)[self._columns].T, mode="r")[1]
        phi, start = system.x.new_empty(n, r), 0
        size = max(1, working_memory(device) // (4 * itemsize * system.seen.shape[1] * (len(self._x) + r)))
        for x, seen, weight in system.parts(size):
            phi[start : start + len(weight)] = self.features(x)[seen] * weight[:, None]
            start += len(weight)
        rounding = 4 * torch.finfo(phi.dtype).eps * system.squares
        self.left = max(system.squares - float(phi.square().sum()), 0.0) + rounding
        self._q, triangle = torch.linalg.qr(phi)
        eye = torch.eye(r, dtype=phi.dtype, device=device)
        self.root, self._other = (torch.linalg.qr(torch.cat([t, eye]), mode="r")[1] for t in (triangle, triangle.T))
        self.log_determinant = 2 * float(self.root.diagonal().abs().log().sum())

    def features(self, x: Tensor) -> Float[Tensor, "mo r"]:
        """J(x) V, by Gram columns of the landmarks."""
        parts = (self._lin.gram(part, self._x)[:, self._columns] for part in x.split(CHUNK))
        solve = torch.linalg.solve_triangular
        return torch.cat([solve(self._factor, part, upper=True, left=False) for part in parts])

    def precondition(self, r: Float[Tensor, "N t"]) -> tuple[Float[Tensor, "N t"], Float[Tensor, " t"]]:
        """z = (I + ΦΦᵀ)⁻¹ r, and rᵀz."""
        return inverse(self._q, self._other, r)


def _choose(system: Whitened, options: Nystrom) -> tuple[Tensor, Tensor]:
    """Landmarks by pivoted Cholesky of a random pool's whitened Gram matrix: their examples, and their rows of J."""
    n, o = system.seen.shape
    generator = torch.Generator().manual_seed(options.seed)
    pool = torch.randperm(n, generator=generator)[: max(1, options.pool // o)].sort().values.to(system.x.device)
    itemsize, size = system.x.element_size(), len(pool) * o
    require_memory(2 * size**2 * itemsize, system.x.device, f"A pool of {size:,} values", "Use a smaller pool=.")
    weight = system.weights[pool].flatten()  # zero where nothing was observed, so that it is not chosen
    gram = system.lin.gram(system.x[pool])
    gram.mul_(weight).mul_(weight[:, None])
    enough = options.slack * float((weight > 0).sum()) / system.shape[0]
    chosen = pivots(gram, min(options.rank, system.shape[1]), enough)
    if not chosen:
        raise ValueError("Nystrom: the kernel is zero at these inputs: the outputs depend on no parameter.")
    picked = torch.tensor(chosen, device=pool.device)
    examples, where = torch.unique(picked // o, return_inverse=True)
    return system.x[pool[examples]], where * o + picked % o


def pivots(gram: Float[Tensor, "k k"], rank: int, enough: float) -> list[int]:
    """At most `rank` pivots of a Cholesky factorisation, greedily by what is left of the diagonal.

    Until its sum is at most `enough`; what is left below the rounding of the entry is taken for none.
    """
    left, chosen = gram.diagonal().clone(), []
    rounding = 16 * torch.finfo(gram.dtype).eps * left
    rows = gram.new_empty(min(rank, len(gram)), len(gram))
    for k in range(len(rows)):
        left = torch.where(left > rounding, left, 0.0)
        if left.sum() <= enough:
            break
        i = int(left.argmax())
        rows[k] = (gram[i] - rows[:k, i] @ rows[:k]) / left[i].sqrt()
        left = left - rows[k].square()
        left[i] = 0
        chosen.append(i)
    return chosen


class NystromConditioning(Movable):
    """One pattern of observed values, conditioned on through landmarks, for the tasks that share it.

    (I + AAᵀ) a = b for the targets b in units of the noise by conjugate gradients on products with all data,
    preconditioned by the landmarks and begun at their answer: `a` and not the parameters Aᵀa is solved for, as rounding
    of those comes back in the residual with the condition number. Results are constants: no gradient flows to x,
    residuals or noise.

    Args: as `IterativeConditioning`.
    """

    def __init__(
        self,
        lin: Linearization,
        x: Tensor,
        seen: Bool[Tensor, "n o"],
        noise: Float[Tensor, " N"],
        residuals: Float[Tensor, "t N"],
        scale: float,
        options: Nystrom,
    ) -> None:
        x, noise, residuals = x.detach(), noise.detach(), residuals.detach()
        self._lin, self._scale = lin, scale
        self._deviation = deviation = noise.sqrt()
        largest = residuals.abs().amax(1)
        self._unit = torch.where(largest > 0, largest, 1.0)
        self._target = target = (residuals / self._unit[:, None]).T / deviation[:, None]
        self._system = system = Whitened(lin, x, seen, noise, scale)
        self._landmarks = landmarks = Landmarks(system, options)
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None
        size = lambda r, energy=None: (r * deviation[:, None]).norm(dim=0)  # noqa: E731  in the units of y
        self._solution, _, relative, used = conjugate_gradients(
            lambda a: system.forward(system.adjoint(a)) + a,
            lambda a: self._residual(a)[1],
            landmarks.precondition(target)[0],
            landmarks.precondition,
            size,
            tolerance=options.tolerance,
            max_iterations=options.max_iterations,
            relative_to=size(target),
        )
        self._parameters, left = self._residual(self._solution)
        everywhere = torch.ones_like(relative)
        self.report = report = Report(
            residual=relative,
            mean_error=left.norm(dim=0) * self._unit,
            variance_slack=everywhere * ((1 + landmarks.left**0.5 + landmarks.left) ** 2 - 1),
            iterations=(everywhere * used).long(),
            rank=everywhere.long() * landmarks.rank,
            converged=relative <= options.tolerance,
        )
        if not report.converged.all():
            warnings.warn(
                f"Conjugate gradients stopped after {used} iterations at a true relative residual of "
                f"{float(relative.max()):.1e}, above the tolerance of {options.tolerance:.1e}: the mean is within "
                f"{float(report.mean_error.max()):.1e} posterior standard deviations. {landmarks.rank} landmarks leave "
                f"a trace of {landmarks.left:.1e} of {system.squares:.1e}. Use a larger rank or more max_iterations in "
                "solver=Nystrom(...), or, where rounding ends it, a smaller outputscale / noise.",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _residual(self, a: Float[Tensor, "N t"]) -> tuple[Tensor, Tensor]:
        """Aᵀa, and b − (I + AAᵀ) a; those of the last call again without products."""
        if self._latest is None or not torch.equal(self._latest[0], a):
            parameters = self._system.adjoint(a)
            self._latest = a, parameters, self._target - (self._system.forward(parameters) + a)
        return self._latest[1:]

    def mean(self, x: Tensor, cross: Tensor) -> Float[Tensor, "t m"]:
        """Each task's mean at x less the prior mean."""
        return self._scale**0.5 * self._unit[:, None] * self._lin.jvp(x, self._parameters).flatten(0, 1).T

    def covariance(self, x: Tensor, cross: Tensor, prior: Tensor) -> Tensor:
        """The covariance at x, or its diagonal where `prior` is one."""
        landmarks = self._landmarks
        u = self._scale**0.5 * landmarks.features(x).T
        half = torch.linalg.solve_triangular(landmarks.root.T, u, upper=False)
        if prior.ndim == 2:
            return (1 + landmarks.left**0.5 + landmarks.left) * (prior - u.T @ u + half.T @ half)
        inside, c = half.square().sum(0), torch.linalg.solve_triangular(landmarks.root, half, upper=True)
        outside = (prior - u.square().sum(0)).clamp_min(0).sqrt()
        estimate = (landmarks.left * (inside - c.square().sum(0)).clamp_min(0)).sqrt()
        return torch.minimum((outside + estimate).square() + inside, prior)

    @property
    def weights(self) -> Float[Tensor, "t N"]:
        """α of (s²K + Σ) α = y − m for each task."""
        return (self._solution / self._deviation[:, None] * self._unit).T

    @cached_property
    def log_likelihood(self) -> tuple[Float[Tensor, " t"], float]:
        """log p(y) of each task, and a bound on its error, which is the log-determinant's."""
        # bᵀ(I + AAᵀ)⁻¹b as an extreme value, whose error is the square of the solution's.
        quadratic = (self._solution * (self._target + self._residual(self._solution)[1])).sum(0) * self._unit.square()
        n, others = len(self._target), max(1, len(self._target) - self._landmarks.rank)
        unseen = others * math.log1p(self._landmarks.left / others)
        log_determinant = self._landmarks.log_determinant + unseen / 2 + 2 * float(self._deviation.log().sum())
        return -0.5 * (quadratic + log_determinant + n * math.log(2 * math.pi)), unseen / 4
