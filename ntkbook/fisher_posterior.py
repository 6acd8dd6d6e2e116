"""The linearised network's posterior over its parameters, by Fisher-vector products alone (Sections 2.1 and 2.2)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad

from ntkbook.fisher import FisherOperator
from ntkbook.krylov import orthonormal
from ntkbook.likelihoods import Gaussian
from ntkbook.memory import require_memory, total_memory
from ntkbook.moving import Movable


class FisherPosterior(Movable):
    """θ − θ₀ ~ N(φ, (F + I/s²)⁻¹), φ = (F + I/s²)⁻¹ Jᵀ∇log p(y | m), for the linear model f = m + J (θ − θ₀).

    For a Gaussian likelihood this is the Gaussian process of `NTKGP`. For any other it is one Newton step from θ₀ with
    the Fisher matrix in the Hessian's place: Laplace's approximation around θ₀, which should then be near a mode.

    The matrix is seen through `fisher @ v` alone, exact or by finite differences, on a Krylov subspace V of it:
    φ is the Galerkin solution in V, which is where conjugate gradients would be, and variances are
    min over a in V of |j − s²Fa|² + s² aᵀFa (times s²), which for exact products is never below the exact one. A
    product's error is an error of both, and nothing here can see it.

    Args:
        fisher: of the data that is given, with reduction "sum"; its likelihood is p(y | f).
        y: observations, as `Likelihood.log_prob` takes them.
        outputscale: s², the prior variance of a parameter.
        mean: m, "network" for f(x; θ₀), or "zero", as in the paper, for a Gaussian likelihood alone.
        rank: directions of V, at most; n·o unless given, or what an eighth of the memory holds. Each takes a product.
        block: directions that are multiplied at once; those after the first begin at random.
        seed: of these.

    Attributes:
        rank: of the directions that were found.
        residual: of the linear system for φ, relative, as far as the products can tell.

    Raises:
        ValueError: a mean that the likelihood does not go with, a Fisher matrix that is a mean over examples or in less
            than float32, settings out of range, observations that p(y | f) cannot take.
        MemoryError: the subspace cannot fit.
    """

    def __init__(
        self,
        fisher: FisherOperator,
        y: Tensor,
        *,
        outputscale: float = 1.0,
        mean: str = "network",
        rank: int | None = None,
        block: int = 1,
        seed: int = 0,
    ) -> None:
        if mean not in ("network", "zero"):
            raise ValueError(f'mean: expected "network" or "zero", got {mean!r}.')
        if mean == "zero" and not isinstance(fisher.likelihood, Gaussian):
            raise ValueError('mean: "zero" goes with a Gaussian likelihood; use "network", around which F is taken.')
        if fisher.reduction != "sum":
            raise ValueError('fisher: expected reduction="sum", whose size is that of the data; got a mean.')
        if not 0 < outputscale < math.inf:
            raise ValueError(f"outputscale: expected a positive, finite variance, got {outputscale}.")
        if block < 1 or (rank is not None and rank < 1):
            raise ValueError(f"expected at least one direction, got rank={rank} and block={block}.")
        self.lin, self.scale, self._zero = fisher.lin, outputscale, mean == "zero"
        lin, x = self.lin, fisher.x
        if torch.finfo(lin.dtype).bits < 32:
            raise ValueError(f"fisher: expected float32 or float64, for its decompositions; got {lin.dtype}.")
        p, itemsize = lin.num_params, lin.dtype.itemsize
        most = len(x) * fisher.outputs
        affordable = max(1, total_memory(lin.device) // (8 * 4 * p * itemsize))
        rank = min(rank or min(most, affordable), most, p)
        require_memory(4 * rank * p * itemsize, lin.device, f"A subspace of rank {rank:,}", "Use a smaller rank=.")

        m = self._prior_mean(x)
        score = grad(lambda f: fisher.likelihood.log_prob(f, y).sum())(m).detach()
        start = lin.vjp(x, score)[:, None]
        v, image, b = self._subspace(fisher, start, rank, min(block, rank), seed)
        # T = VᵀF V, symmetric but for the products' errors; its directions below rounding are none.
        t = outputscale * (v.T @ image)
        values, vectors = torch.linalg.eigh((t + t.T) / 2)
        inside = vectors @ ((vectors.T @ b) / (1 + values.clamp_min(0))[:, None])
        self.step = outputscale * (v @ inside)[:, 0]
        left = v @ (b - inside) - outputscale * (image @ inside)
        self.residual = float(left.norm() / b.norm()) if b.any() else 0.0
        keep = values > torch.finfo(lin.dtype).eps * values.abs().max() * len(values)
        self.rank = int(keep.sum())
        # [G; I] has G = s² F V T^(-1/2), and its QR the part of the prior that the data take away: as krylov.Subspace.
        g = outputscale * (image @ (vectors[:, keep] / values[keep].sqrt()))
        stacked = torch.cat([g, torch.eye(self.rank, dtype=lin.dtype, device=lin.device)])
        self._c = torch.linalg.qr(stacked)[0][:p]

    def mean(self, x: Tensor) -> Tensor:
        """The mean of f at x: (m,), or (m, o) with several outputs."""
        return _squeezed(self._prior_mean(x) + self.lin.jvp(x, self.step))

    def variance(self, x: Tensor) -> Tensor:
        """The variance of f at x, without the noise of an observation: (m,), or (m, o) with several outputs."""
        o = self.lin.num_outputs(x)
        size = max(1, total_memory(self.lin.device) // (64 * o * self.lin.num_params * self.lin.dtype.itemsize))
        parts = []
        for part in x.split(size):
            j = self.lin.jacobian(part)
            parts.append(j.square().sum(1) - (j @ self._c).square().sum(1))
        return _squeezed(self.scale * torch.cat(parts).clamp_min(0).view(len(x), o))

    def _prior_mean(self, x: Tensor) -> Float[Tensor, "n o"]:
        f = self.lin.outputs(x)
        return torch.zeros_like(f) if self._zero else f

    def _subspace(self, fisher: FisherOperator, start: Tensor, rank: int, block: int, seed: int):
        """V (p, r) orthonormal, F V, and start's coefficients in V."""
        lin = fisher.lin
        generator = torch.Generator().manual_seed(seed)

        def product(block: Tensor) -> Tensor:
            return fisher._matmul(block)

        def random(width: int) -> Tensor:
            drawn = torch.randn(lin.num_params, width, generator=generator, dtype=lin.dtype)
            return drawn.to(lin.device)

        new = start if block == 1 else torch.cat([start, product(random(block - 1))], 1)
        v, images = start.new_empty(lin.num_params, 0), []
        while v.shape[1] < rank:
            width = min(block, rank - v.shape[1])
            v = torch.cat([v, orthonormal(new[:, :width], random(width), v)], 1)
            new = product(v[:, -width:])
            images.append(new)
        return v, torch.cat(images, 1), v.T @ start


def _squeezed(values: Float[Tensor, "m o"]) -> Tensor:
    return values[:, 0] if values.shape[1] == 1 else values
