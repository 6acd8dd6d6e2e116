"""Gaussian processes whose kernel is the finite neural tangent kernel of a network."""

from collections.abc import Callable

import torch
from gpytorch.distributions import MultivariateNormal
from jaxtyping import Float
from torch import Tensor, nn

from ntkbook.checks import named, require_tensor, require_variance
from ntkbook.hyperparameters import ProfileLikelihood, fit_tasks, rounding
from ntkbook.iterative import Iterative
from ntkbook.linearize import Linearization
from ntkbook.memory import require_memory, total_memory
from ntkbook.moving import Movable
from ntkbook.nystrom import Nystrom, counted_costs
from ntkbook.posterior import Posterior, distribution
from ntkbook.tasks import Basis, TaskHyperparameters, TaskPosterior, rank_is_low

Mean = str | Callable[[Tensor], Tensor]
MANY_PATTERNS = 32
"""Patterns of missing values whose Cholesky factors cost about what an eigendecomposition of the Gram matrix does."""


class NTKGP(Movable):
    """y = m(x) + J(x) θ′ + ε with θ′ ~ N(0, s² I) and ε ~ N(0, σ²): the network's linearisation as a Gaussian process.

    Adapting to a task is conditioning on its data, in closed form. In function space that is the dual of the paper's
    Equation 3, with a Cholesky factorisation of s²K + σ²I at any size that fits in memory. In parameter space it is
    Equation 3 itself, by products with J and Jᵀ: conjugate gradients for the mean, a cached subspace of J's row space
    for variances, which errs upwards where it is truncated, stochastic Lanczos quadrature for the log-determinant.
    Both spaces give the same posterior. Parameters are `Linearization`'s.

    Args:
        net: a network, or a `Linearization` of one.
        outputscale: s², the prior variance of a parameter. 1 in the paper.
        noise: σ², the variance of an observation.
        mean: m(x). "zero" as in the paper; "constant", fitted by `fit`, zero until then; "network", f(x; θ₀);
            or a function from x (n, ...) to (n,) or (n, o).
        space: "function" or "parameter". A prediction's cost grows with the data in the one, with the cached subspace's
            rank in the other.
        solver: "cholesky", the default in function space; "cg", the only one in parameter space; or an
            `Iterative` that sets its tolerance, rank and so on; or a `Nystrom`, for up to millions of points, which
            works in both spaces at once; or "auto", `Nystrom` where Cholesky would take more than half of the memory or
            more multiplications (`ntkbook.nystrom.counted_costs`), else Cholesky. `Posterior.solver` says which it
            was, and `Posterior.report` what was reached.
        dtype: of all computations, whatever the network's: float32 loses the small eigenvalues.
    """

    def __init__(
        self,
        net: nn.Module | Linearization,
        *,
        outputscale: float = 1.0,
        noise: float = 1e-2,
        mean: Mean = "zero",
        space: str = "function",
        solver: str | Iterative | Nystrom | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if mean not in ("zero", "constant", "network") and not callable(mean):
            raise (ValueError if isinstance(mean, str) else TypeError)(
                f'mean: expected "zero", "constant" (which fit sets), "network" or a function of x, got {mean!r}. A '
                "number c is lambda x: torch.full((len(x),), c)."
            )
        if space not in ("function", "parameter"):
            raise ValueError(f'space: expected "function" or "parameter", got {space!r}.')
        if not isinstance(solver, Iterative | Nystrom) and solver not in (None, "cholesky", "cg", "auto"):
            raise ValueError(f'solver: expected "cholesky", "cg", "auto", an Iterative or a Nystrom, got {solver!r}.')
        if space == "parameter" and solver in ("cholesky", "auto"):
            raise ValueError(
                'solver: parameter space has "cg" alone: a Cholesky factor of a p × p matrix is what it avoids.'
            )
        require_variance("outputscale", outputscale)
        require_variance("noise", noise)
        if dtype not in (torch.float64, torch.float32):
            raise ValueError(
                f"dtype: expected torch.float64 or torch.float32, got {dtype}: no other has factorisations."
            )
        lin = net if isinstance(net, Linearization) else Linearization(net)
        self.lin = lin if lin.dtype == dtype else lin.to(dtype=dtype)
        self.outputscale, self.noise, self.mean = float(outputscale), float(noise), mean
        self.space, self._auto = space, solver == "auto"
        self.iterative = solver if isinstance(solver, Iterative | Nystrom) else None
        if self.iterative is None and (solver == "cg" or space == "parameter"):
            self.iterative = Iterative()
        self.constant: Float[Tensor, " o"] | None = None

    def __repr__(self) -> str:
        solver = "auto" if self._auto else self.iterative or "cholesky"
        mean = (
            repr(self.mean) if isinstance(self.mean, str) else getattr(self.mean, "__name__", type(self.mean).__name__)
        )
        return (
            f"NTKGP({type(self.lin.net).__name__} in {self.lin.num_params:,} parameters, "
            f"outputscale={self.outputscale:.4g}, noise={self.noise:.4g}, mean={mean}, space={self.space!r}, "
            f"solver={solver!r}, dtype={self.lin.dtype})"
        )

    def __call__(self, x: Tensor) -> MultivariateNormal:
        """The prior of the latent f at x."""
        require_variance("outputscale", self.outputscale)
        x = self._inputs(x)
        mean = self._mean(x)
        return distribution(mean, self.outputscale * self.lin.gram(x))

    def fit(self, x: Tensor, y: Tensor, noise: float | Tensor | None = None) -> "NTKGP":
        """Set outputscale, noise and a constant mean to those of the largest marginal likelihood of y at x.

        In either space and with any solver by one eigendecomposition of K (n·o × n·o): the likelihood of a ratio σ²/s²
        then costs n operations, and s² and the constant are closed-form, so one dimension is searched: a grid over 16
        decades, or as far as K is not lost in rounding, then Brent's method. A warning says when the best is at an end.
        Given `noise`, a variance for each point, only outputscale (and constant) are fitted.

        Args:
            x: (n, ...); y: (n,) or (n, o), NaN where not observed.
        """
        x, y = self._inputs(x), self._targets(x, y)[0]
        seen = ~torch.isnan(y).flatten()
        n, o = y.shape
        r = (y - self._mean(x, fitting=True)).flatten()[seen]
        if len(r) < 2:
            raise ValueError(f"fit: expected at least two observed values, got {len(r)}.")
        self._require_room(n * o, copies=4)
        gram = self.lin.gram(x)[seen][:, seen]
        basis = torch.eye(o, dtype=r.dtype, device=r.device).repeat(n, 1)[seen]
        used = basis.any(0) if self.mean == "constant" else torch.zeros(o, dtype=torch.bool, device=r.device)
        basis = basis[:, used]
        fixed = None if noise is None else self._noise(noise, y).flatten()[seen].rsqrt()
        if fixed is not None:
            gram, r, basis = fixed[:, None] * gram * fixed, fixed * r, fixed[:, None] * basis
        eigenvalues, vectors = torch.linalg.eigh(gram)
        data = eigenvalues.clamp_min(0), vectors.T @ r, vectors.T @ basis
        likelihood = ProfileLikelihood(*data, fixed is not None, rounding(gram.diagonal()))
        best = likelihood.maximise()
        scale, noise_, constant = likelihood.solution(best)
        self.outputscale = scale
        if fixed is None:
            self.noise = noise_
        if self.mean == "constant":
            self.constant = y.new_zeros(o)  # and stays so for an output that was never observed
            self.constant[used] = constant
        return self

    def condition(self, x: Tensor, y: Tensor, noise: float | Tensor | None = None) -> "Posterior":
        """The posterior given y (n,) or (n, o) at x (n, ...), NaN where not observed.

        `noise`: σ² of these points, a number or one per point, (n,) or (n, o); the GP's own unless given. A number is
        also what `Posterior.predictive` adds; NaN will do where y is NaN.
        """
        require_variance("outputscale", self.outputscale)
        x, y = self._inputs(x), self._targets(x, y)
        return Posterior(self, x, y, self._noise(noise, y), new_noise=self._shared(noise), tasks=False)

    def fit_tasks(self, x: Tensor, y: Tensor) -> TaskHyperparameters:
        """outputscale, noise and a constant mean for each of T tasks at the same inputs; the GP keeps its own.

        What `fit` finds for each task alone, to within its search, from one eigendecomposition of K (n·o × n·o) and,
        for every pattern of missing values, one of its rank's size. `condition_tasks` takes the result.

        A task with fewer than two observed values, or with values equal to the prior mean, determines nothing and gets
        the GP's own outputscale, noise and constant; `determined` is False there and where the likelihood grows up to
        the end of the search, and a warning says how many such tasks there are.

        Args:
            x: (n, ...); y: (T, n) or (T, n, o), NaN where not observed.
        """
        x, y = self._tasks(x, y)
        residuals = (y - self._mean(x, fitting=True)).detach()
        self._require_room(y[0].numel(), copies=6)
        gram = self.lin.gram(x.detach())
        return fit_tasks(Basis(gram), gram.diagonal(), residuals, self)

    def condition_tasks(
        self,
        x: Tensor,
        y: Tensor,
        noise: float | Tensor | None = None,
        hyperparameters: TaskHyperparameters | None = None,
    ) -> "Posterior":
        """The posteriors of T tasks at the same inputs: y (T, n) or (T, n, o), NaN where not observed.

        Tasks that were observed at the same points share one factorisation. Where more than `MANY_PATTERNS` patterns of
        missing values meet a kernel of low rank, all share one eigendecomposition, which gives the same to rounding
        but no gradients in the data: it is not used where x or y require some.

        Args:
            noise: as for `condition`.
            hyperparameters: each task's own, as from `fit_tasks`; in function space without an iterative solver.
        """
        require_variance("outputscale", self.outputscale)
        x, y = self._tasks(x, y)
        if hyperparameters is not None:
            if noise is not None:
                raise ValueError("noise: it is part of hyperparameters; give one of the two.")
            if self.iterative is not None:
                raise ValueError(
                    'hyperparameters: expected space="function" and solver="cholesky", got an iterative solver, which '
                    "solves for one outputscale and noise. Condition on the tasks one at a time, or use the default."
                )
            return TaskPosterior(self, x, y, self._basis(x), self._hyperparameters(hyperparameters, y))
        sigma2, shared = self._noise(noise, y), self._shared(noise)
        differentiated = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
        if shared is not None and self.iterative is None and not differentiated and len(y) > MANY_PATTERNS:
            patterns = torch.unique(y.flatten(1).isnan(), dim=0)
            if len(patterns) > MANY_PATTERNS and rank_is_low(basis := self._basis(x)):
                each = TaskHyperparameters(torch.full_like(y[:, 0, 0], self.outputscale), sigma2[0, 0].expand(len(y)))
                return TaskPosterior(self, x, y, basis, each)
        return Posterior(self, x, y, sigma2, new_noise=shared, tasks=True)

    def _tasks(self, x: Tensor, y: Tensor) -> tuple[Tensor, Float[Tensor, "t n o"]]:
        require_tensor(y, "y", "(T, n) or (T, n, o)")
        if y.ndim < 2 or len(y) == 0:
            raise ValueError(f"y: expected (T, n) or (T, n, o) with at least one task, got {tuple(y.shape)}.")
        x = self._inputs(x)
        return x, self._targets(x, y, tasks=True)

    def _basis(self, x: Tensor) -> Basis:
        self._require_room(len(x) * self.lin.num_outputs(x), copies=6)
        return Basis(self.lin.gram(x.detach()))

    def _hyperparameters(self, given: TaskHyperparameters, y: Float[Tensor, "t n o"]) -> TaskHyperparameters:
        """The same in the GP's dtype, checked."""
        tasks, _, o = y.shape
        if not isinstance(given, TaskHyperparameters) or not all(isinstance(value, Tensor) for value in given[:2]):
            raise TypeError(
                f"hyperparameters: expected a TaskHyperparameters of tensors ({tasks},), as fit_tasks returns, got "
                f"{type(given).__name__} of {', '.join(type(value).__name__ for value in given)}."
            )
        scale, noise = (value.detach().to(y) for value in given[:2])
        for name, value in (("outputscale", scale), ("noise", noise)):
            if value.shape != (tasks,) or not (value > 0).all() or torch.isinf(value).any():
                got = tuple(value.shape) if value.shape != (tasks,) else "some that are not"
                raise ValueError(f"hyperparameters.{name}: expected ({tasks},) positive, finite values, got {got}.")
        constant = given.constant
        if constant is not None and (self.mean != "constant" or constant.shape != (tasks, o)):
            raise ValueError(
                f'hyperparameters.constant: expected ({tasks}, {o}) and a GP with mean="constant", got '
                f"{tuple(constant.shape)} and {self.mean!r}."
            )
        return TaskHyperparameters(scale, noise, None if constant is None else constant.detach().to(y))

    def _inputs(self, x: Tensor) -> Tensor:
        require_tensor(x, "x", "(n, ...)")
        return x.to(self.lin.device, self.lin.dtype if x.is_floating_point() else None)

    def _targets(self, x: Tensor, y: Tensor, tasks: bool = False) -> Float[Tensor, "t n o"]:
        """Each task's observations, (T, n) or (T, n, o), or one's without T, checked."""
        require_tensor(y, "y", "(n,) or (n, o)")
        got, y = tuple(y.shape), (y if tasks else y[None]).to(self.lin.device, self.lin.dtype)
        o = self.lin.num_outputs(self._inputs(x))
        if y.shape[1:] == (len(x),) and o == 1:
            y = y[..., None]
        if y.shape[1:] != (len(x), o):
            first, last = ("T, ", "") if tasks else ("", ",")
            wanted = (f"({first}{len(x)}{last}) or " if o == 1 else "") + f"({first}{len(x)}, {o})"
            raise ValueError(f"y: expected {wanted} for {len(x)} examples of {o} outputs, got {got}.")
        if torch.isinf(y).any():
            raise ValueError("y: expected finite values, or NaN where nothing was observed; got an infinite one.")
        return y

    def _noise(self, noise: float | Tensor | None, y: Float[Tensor, "*t n o"]) -> Float[Tensor, "n o"]:
        """The variance of each value; it may be anything where no task has one."""
        n, o = y.shape[-2:]
        noise = torch.as_tensor(self.noise if noise is None else noise, dtype=y.dtype, device=y.device)
        if noise.shape == (n,):
            noise = noise[:, None]
        if noise.ndim not in (0, 2) or (noise.ndim == 2 and noise.shape not in ((n, 1), (n, o))):
            raise ValueError(f"noise: expected a number, ({n},) or ({n}, {o}), got {tuple(noise.shape)}.")
        noise = noise.expand(n, o)
        used = noise[~y.isnan().view(-1, n, o).all(0)]
        if not (used > 0).all() or torch.isinf(used).any():
            raise ValueError("noise: expected positive, finite variances.")
        return noise

    def _shared(self, noise: float | Tensor | None) -> float | Tensor | None:
        """The variance of every value, if it is one for all."""
        noise = self.noise if noise is None else noise
        return noise if torch.as_tensor(noise).ndim == 0 else None

    def _mean(self, x: Tensor, fitting: bool = False) -> Float[Tensor, "n o"]:
        outputs = self.lin.outputs(x)
        if self.mean in ("zero", "constant"):
            zero = torch.zeros_like(outputs)
            return zero if self.mean == "zero" or fitting or self.constant is None else zero + self.constant
        mean = outputs
        if callable(self.mean):
            with named("mean", x, self.lin.dtype):
                mean = self.mean(x)
            if not isinstance(mean, Tensor):
                raise TypeError(
                    f"mean: expected a function whose values are tensors (n,) or (n, o), got {mean!r} of it."
                )
            mean = mean.to(outputs)
        mean = mean[:, None] if mean.ndim == 1 else mean
        if mean.shape != outputs.shape:
            raise ValueError(f"mean: expected values of shape {tuple(outputs.shape)}, got {tuple(mean.shape)}.")
        if not torch.isfinite(mean).all():
            raise ValueError(f"mean: {int((~torch.isfinite(mean)).sum())} of {mean.numel()} values are not finite.")
        return mean

    def _solver(self, x: Tensor) -> Iterative | Nystrom | None:
        """How to condition on values at x; None is Cholesky."""
        if not self._auto:
            return self.iterative
        gram, landmarks = counted_costs(self.lin, x).values()
        fits = gram.memory <= total_memory(self.lin.device) / 2
        return None if fits and gram.multiplications <= landmarks.multiplications else Nystrom()

    def _require_room(self, n: int, copies: int = 3, instead: str = "Use fewer points.") -> None:
        what = f"Conditioning on {n:,} values (a Gram matrix and its factor)"
        require_memory(copies * n * n * self.lin.dtype.itemsize, self.lin.device, what, instead)
