"""What an iterative conditioning is made of: products with a whitened Jacobian, a subspace, conjugate gradients."""

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ntkbook.linearize import Linearization
from ntkbook.moving import Movable

Product = Callable[[Tensor], Tensor]


class Whitened(Movable):
    """A = s Σ^(-1/2) J(x) of the observed values, (N, p), by its products alone; Σ is the noise, s² the outputscale.

    I + AᵀA is the posterior's precision in the parameters divided by s, I + AAᵀ the data's covariance in units of the
    noise.

    Attributes:
        lin, x, seen: of the examples that have an observed value.
        shape: (N, p).
        squares: the sum of A's squared entries, which is the trace of AAᵀ.
    """

    def __init__(
        self, lin: Linearization, x: Tensor, seen: Bool[Tensor, "n o"], noise: Float[Tensor, " N"], scale: float
    ) -> None:
        some = seen.any(1)
        self.lin, self.x, self.seen = lin, x[some], seen[some]
        self._weight = (scale / noise).sqrt()
        self.shape = (len(noise), lin.num_params)
        self.squares = float((self._weight.square() * lin.diagonal(self.x)[self.seen.flatten()]).sum())

    @property
    def weights(self) -> Float[Tensor, "n o"]:
        """s Σ^(-1/2) of every value, 0 where it was not observed."""
        weights = self._weight.new_zeros(self.seen.shape)
        weights[self.seen] = self._weight
        return weights

    def parts(self, size: int) -> Iterator[tuple[Tensor, Bool[Tensor, " no"], Float[Tensor, " N"]]]:
        """`size` examples at a time: inputs, which of their values were observed, and s Σ^(-1/2) of those."""
        start = 0
        for x, seen in zip(self.x.split(size), self.seen.split(size)):
            count = int(seen.sum())
            yield x, seen.flatten(), self._weight[start : start + count]
            start += count

    def forward(self, v: Float[Tensor, "p k"]) -> Float[Tensor, "N k"]:
        """A v."""
        return self.lin.jvp(self.x, v)[self.seen] * self._weight[:, None]

    def adjoint(self, u: Float[Tensor, "N k"]) -> Float[Tensor, "p k"]:
        """Aᵀu."""
        spread = u.new_zeros(*self.seen.shape, u.shape[1])
        spread[self.seen] = u * self._weight[:, None]
        return self.lin.vjp(self.x, spread)


class Subspace(Movable):
    """Directions Q (N, r) for linear estimates: a block Krylov space of AAᵀ, with orthonormal columns.

    In units of prior and noise, the posterior variance of jᵀφ is the error of the best linear estimate of it,
    min over b of |j − Aᵀb|² + |b|². The minimum over b = Qc is |j|² − |Cᵀj|² with C = G (I + GᵀG)^(-1/2) and G = AᵀQ.
    It is never below the exact variance, whatever Q is, and at most 1 + slack times it: slack = tr(AAᵀ) − tr(QᵀAAᵀQ).

    Args:
        start: (N, k), whose products begin the first block; the rest of it is random.
        rank: directions at most. slack: enough of it. block: directions at a time.
        keep: keep C, (p, r), the parameter-space cache; else Q alone serves, (N, r).
    """

    def __init__(
        self,
        system: Whitened,
        start: Float[Tensor, "N k"],
        *,
        rank: int,
        slack: float,
        block: int,
        seed: int,
        keep: bool,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        n, rounding = system.shape[0], 4 * torch.finfo(start.dtype).eps * system.squares
        q, product, kept, trace, r = start.new_empty(n, rank), start.new_empty(n, rank), [], 0.0, 0
        # From AAᵀ times the first vectors, which lies in A's range: with fewer parameters than data, most does not.
        fresh = torch.randn(n, max(block - start.shape[1], 0), generator=generator, dtype=start.dtype).to(start.device)
        image = system.forward(system.adjoint(torch.cat([start[:, :block], fresh], 1)))
        while True:
            width = min(block, rank - r)
            fresh = torch.randn(n, width, generator=generator, dtype=start.dtype).to(start.device)
            new = orthonormal(image[:, :width], fresh, q[:, :r])
            g = system.adjoint(new)
            image = system.forward(g)
            q[:, r : r + width], product[:, r : r + width] = new, image
            r += width
            kept += [g] if keep else []
            gained = float(g.square().sum())
            trace += gained
            # What is left of the trace bounds what is left to explain. Where rounding hides it, what the last block
            # gained estimates it: by then its directions are random.
            self.left = left = max(system.squares - trace, 0.0)
            if left <= rounding:
                self.left = min(left, gained * (n - r) / width)
            if r >= rank or self.left <= slack:
                break
        self.q, product, self.rank = q[:, :r], product[:, :r], r
        self.slack = 0.0 if r == n else left + rounding
        eye = torch.eye(r, dtype=q.dtype, device=q.device)
        self.c: Tensor | None = None
        if keep:
            # QR of [G; I] and not a Cholesky factor of I + GᵀG, which would square the condition number.
            stacked = torch.cat([torch.cat(kept, 1), eye])
            kept.clear()
            orthogonal, self.root = torch.linalg.qr(stacked)
            self.c = orthogonal[: system.shape[1]].T.contiguous().T  # columns one after the other, and the rest freed
        else:
            small = self.q.T @ product
            self.root = torch.linalg.cholesky((small + small.T) / 2 + eye, upper=True)
        # RᵀR = I + QᵀAAᵀQ for the root R, and AC = AAᵀQ R⁻¹.
        self.image = torch.linalg.solve_triangular(self.root, product, upper=True, left=False)
        self.log_determinant = 2 * float(self.root.diagonal().abs().log().sum())

    def precondition(self, r: Float[Tensor, "k t"]) -> tuple[Float[Tensor, "k t"], Float[Tensor, " t"]]:
        """z, (I + AᵀA)⁻¹ r in parameter space and (I + AAᵀ)⁻¹ r in function space as far as the subspace knows; rᵀz.

        rᵀz is a sum of squares: as a difference it would be lost where the condition number reaches 1 / rounding.
        """
        if self.c is not None:
            inside = self.c.T @ r
            z = r - self.c @ inside
            inside = torch.linalg.solve_triangular(self.root, inside, upper=True)
            return z, z.square().sum(0) + inside.square().sum(0)
        return inverse(self.q, self.root, r)

    def outside(self, system: Whitened, probes: int, seed: int) -> tuple[float, float]:
        """log det(I + AAᵀ) less `log_determinant`, which lies between 0 and the slack: an estimate and its error.

        It is the log-determinant of a Schur complement, I + B with B positive semi-definite and of trace at most the
        slack, by stochastic Lanczos quadrature: the error is the probes' standard error and half the distance between
        the quadrature's bounds. Where 1e-6 a value or less is left, it is half of that, within half the slack.
        """
        n = system.shape[0]
        if self.left <= 1e-6 * n or self.rank == n:
            return min(self.left, self.slack) / 2, self.slack / 2

        def complement(z: Tensor) -> Tensor:
            z = self._without(z)
            return z + self._without(system.forward(system.adjoint(z)) - self.image @ (self.image.T @ z))

        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(n, probes, generator=generator, dtype=self.q.dtype).to(self.q.device)
        z = self._without(self._without(z))
        # To about 1e-8 on [1, 1 + slack], where that takes at most a hundred steps.
        steps = min(n - self.rank, 100, math.ceil(5 * math.sqrt(1 + self.slack)))
        # Dividing by |z|², whose mean is n − r, takes out the spread of the lengths, which says nothing.
        low, high = (part / z.square().sum(0) * (n - self.rank) for part in quadrature(complement, z, steps))
        middle = (low + high) / 2
        return float(middle.mean()), float(middle.std() / math.sqrt(probes) + (high - low).mean() / 2)

    def _without(self, z: Tensor) -> Tensor:
        return z - self.q @ (self.q.T @ z)


def inverse(
    q: Float[Tensor, "N r"], root: Float[Tensor, "r r"], b: Float[Tensor, "N t"]
) -> tuple[Float[Tensor, "N t"], Float[Tensor, " t"]]:
    """z = (I + Q (RᵀR − I) Qᵀ)⁻¹ b, and bᵀz as a sum of squares; Q has orthonormal columns, and R is triangular."""
    inside = q.T @ b
    outside = b - q @ inside
    half = torch.linalg.solve_triangular(root.T, inside, upper=False)
    z = outside + q @ torch.linalg.solve_triangular(root, half, upper=True)
    return z, outside.square().sum(0) + half.square().sum(0)


def conjugate_gradients(
    apply: Product,
    residual: Product,
    start: Float[Tensor, "k t"],
    precondition: Callable[[Tensor], tuple[Tensor, Tensor]],
    size: Callable[[Tensor, Tensor], Tensor],
    *,
    tolerance: float,
    max_iterations: int,
    relative_to: Float[Tensor, " t"] | None = None,
) -> tuple[Float[Tensor, "k t"], Float[Tensor, " t"], Float[Tensor, " t"], int]:
    """Preconditioned conjugate gradients for t right-hand sides, restarted from true residuals.

    (linear_operator's `linear_cg` has no tolerance a column and no true residual to report.)

    Args:
        apply: the product with a symmetric positive definite matrix.
        residual: b − matrix · v, in the most accurate form there is.
        precondition: of a residual r, z close to the solution and rᵀz, one number a column.
        size: of a residual r and its rᵀz, one number a column.
        tolerance: of the size of the residual, relative to the start's.
        relative_to: sizes to take for the start's, one a column.

    Returns:
        The solution; the size of its true residual, and that relative to the start's; the number of iterations.
    """
    solution, used, r = start, 0, residual(start)
    error = size(r, precondition(r)[1])
    first = error if relative_to is None else relative_to
    while used < max_iterations and bool((error > tolerance * first).any()):
        target = 0.1 * torch.minimum(tolerance * first, error)
        step, used = _inner(apply, r, precondition, size, target, max_iterations, used)
        moved = solution + step
        r = residual(moved)
        reached = size(r, precondition(r)[1])
        better = reached < error
        stalled = not bool((reached < 0.5 * error)[error > tolerance * first].any())
        solution, error = torch.where(better, moved, solution), torch.where(better, reached, error)
        if stalled:
            break
        r = r if bool(better.all()) else residual(solution)
    return solution, error, torch.where(first == 0, 0.0, error / first), used


def _inner(
    apply: Product, r: Tensor, precondition: Callable, size: Callable, target: Tensor, max_iterations: int, used: int
) -> tuple[Tensor, int]:
    """Conjugate gradients from zero until the recursive residuals reach their targets."""
    solution = torch.zeros_like(r)
    direction, gamma = precondition(r)
    while used < max_iterations:
        image, used = apply(direction), used + 1
        alpha = _ratio(gamma, (direction * image).sum(0))
        solution, r = solution + alpha * direction, r - alpha * image
        z, new = precondition(r)
        if bool((size(r, new) <= target).all()) or not bool(alpha.any()):
            break
        direction, gamma = z + _ratio(new, gamma) * direction, new
    return solution, used


def quadrature(matrix: Product, z: Float[Tensor, "n k"], steps: int) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """A lower and an upper bound on zᵀ log(matrix) z for each column, for a matrix that is at least I.

    Lanczos steps make a Gauss quadrature, which is above, as the even derivatives of log are negative; with a node
    at 1 (Gauss–Radau) it is below. (linear_operator's `lanczos_tridiag` divides by zero where one column's Krylov space
    ends before the others'.)
    """
    length = z.norm(dim=0)
    before, q, beta = torch.zeros_like(z), z / length, torch.zeros_like(length)
    t = z.new_zeros(z.shape[1], steps, steps)
    for i in range(steps):
        w = matrix(q) - beta * before
        alpha = (w * q).sum(0)
        w = w - alpha * q
        t[:, i, i] = alpha
        beta = w.norm(dim=0)
        ended = beta <= 1e2 * torch.finfo(z.dtype).eps * alpha
        beta = beta.masked_fill(ended, 0)  # and its further rows and columns of t stay zero
        before, q = q, torch.where(ended, 0.0, w / beta.masked_fill(ended, 1))
        if i + 1 < steps:
            t[:, i, i + 1] = t[:, i + 1, i] = beta
    high = _gauss(t)
    if steps == 1:
        return torch.zeros_like(high), length.square() * high
    values, vectors = torch.linalg.eigh(t[:, :-1, :-1])
    gap = (values - 1).clamp_min(torch.finfo(z.dtype).eps)
    last = t[:, -1, -2]
    radau = t.clone()
    radau[:, -1, -1] = 1 + last.square() * (vectors[:, -1, :].square() / gap).sum(1)
    low = torch.where(last == 0, high, torch.minimum(_gauss(radau), high))  # ended: exact
    return length.square() * low, length.square() * high


def _gauss(t: Float[Tensor, "k m m"]) -> Float[Tensor, " k"]:
    values, vectors = torch.linalg.eigh(t)
    return (vectors[:, 0, :].square() * values.clamp_min(1).log()).sum(1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and zero where either is: a column that has converged stays."""
    sound = (a > 0) & (b > 0)
    return torch.where(sound, a / b.where(sound, torch.ones_like(b)), 0.0)


def orthonormal(block: Tensor, fresh: Tensor, q: Tensor) -> Tensor:
    """As many orthonormal columns as fresh has, orthogonal to q: block's, and fresh's where block has no more."""
    size = block.norm(dim=0)
    block = torch.cat([block / size.where(size > 0, torch.ones_like(size)), fresh[:, block.shape[1] :]], 1)
    block = block + torch.finfo(block.dtype).eps * fresh  # where nothing new is left, a random direction and no 0 / 0
    for _ in range(3):
        block = torch.linalg.qr(block - q @ (q.T @ block))[0]
    return block
