"""J(x), its transpose, the NTK J(x) J(x2)ᵀ and JᵀJ as `linear_operator.LinearOperator`s, which need not form them.

They behave as the matrices would (products, slices, sums, solves, decompositions), and hold no more than the inputs x
and the linearisation, whose parameters are constants, and for the NTK its Gram matrix where that pays: gradients flow
to x and to right-hand sides. Right-hand sides may come in batches; an operator expanded to a batch is the same matrix
in all of it.

Mind the solves: above `linear_operator.settings.max_cholesky_size` (800) rows linear_operator goes from Cholesky to
conjugate gradients, and from exact log-determinants and roots to estimates, without a word, and it stops at
`cg_tolerance` = 1, which is no solution; relative residuals below some 1e-5 it cannot reach at all, for it takes
squares below 1e-10 for zero. `NTKGP` never switches on its own. Around a `solve`, `inv_quad_logdet` or `logdet` of
these operators set what you want:

    with linear_operator.settings.max_cholesky_size(10_000):  # Cholesky, of a Gram matrix that fits
    with linear_operator.settings.cg_tolerance(1e-5), linear_operator.settings.max_cg_iterations(10_000):
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from linear_operator import LinearOperator
from linear_operator.operators import RootLinearOperator
from torch import Tensor

from ntkbook.choice import KeptGram
from ntkbook.gradients import input_gradient
from ntkbook.lazy import Index, MatrixFree, eye, vectors_that_fit
from ntkbook.linearize import Linearization


class _InputsOperator(MatrixFree):
    """An operator made from a linearisation and inputs."""

    def __init__(self, lin: Linearization, x: Tensor, outputs: int | None, **kwargs: Any) -> None:
        # The number of outputs is kept, for it takes a run of the network to know it.
        outputs = lin.num_outputs(x) if outputs is None else outputs
        super().__init__(lin=lin, x=x, outputs=outputs, **kwargs)
        self.lin, self.x, self.outputs = lin, x, outputs

    def _push(self, x: Tensor, v: Float[Tensor, "p k"]) -> Float[Tensor, "no k"]:
        return self.lin.jvp(x, v).flatten(0, 1)

    def _pull(self, x: Tensor, u: Float[Tensor, "no k"]) -> Float[Tensor, "p k"]:
        return self.lin.vjp(x, u.unflatten(0, (len(x), self.outputs)))

    def _row_chunks(self, x: Tensor) -> Iterator[Float[Tensor, "r p"]]:
        """The rows of J(x) in their order, as many at a time as the working memory holds."""
        fit, o = vectors_that_fit(self.lin, 3), self.outputs
        for part in x.split(max(1, fit // o)):
            if fit >= o:
                yield self.lin.jacobian(part)
            else:
                yield from (self.lin.vjp(part, units.T[None]).T for units in eye(self.lin, o).split(fit))


class JacobianOperator(_InputsOperator):
    """J(x), (n·o, p), or its transpose: products by forward and reverse mode, Appendix A of the paper.

    Row i·o + c belongs to example i and output c. Slices are operators again: whole examples are the Jacobian of
    those examples, and other rows and columns are taken from products and from the rows that are needed.

    Args:
        lin: the linearisation.
        x: inputs (n, ...), as for `lin.jvp`.
        transposed: J(x)ᵀ, (p, n·o), which `op.mT` gives too.
        outputs: o, found out unless given.
        batch_shape: a batch of this same matrix.

    Raises:
        ValueError, NotImplementedError: as `Linearization`, for inputs or a network that it cannot work with.
        MemoryError: `to_dense` of what cannot fit.
    """

    def __init__(
        self,
        lin: Linearization,
        x: Tensor,
        *,
        transposed: bool = False,
        outputs: int | None = None,
        batch_shape: torch.Size = torch.Size(),
    ) -> None:
        super().__init__(lin, x, outputs, transposed=transposed, batch_shape=batch_shape)
        self.transposed = transposed
        rows = len(x) * self.outputs
        self._shape = (lin.num_params, rows) if transposed else (rows, lin.num_params)

    def _transpose_nonbatch(self) -> "JacobianOperator":
        return self._with(transposed=not self.transposed)

    def _product(self, block: Tensor) -> Tensor:
        return self._pull(self.x, block) if self.transposed else self._push(self.x, block)

    def _derivatives(self, left: Tensor, right: Tensor) -> tuple[Tensor | None, ...]:
        u, v = (right, left) if self.transposed else (left, right)
        return (_input_gradient(self.lin, self.x, u, v),)

    def _dense(self) -> Tensor:
        jacobian = self.lin.jacobian(self.x)
        return jacobian.T if self.transposed else jacobian

    def _block(self, rows: Index, columns: Index) -> Tensor:
        if self.transposed:
            return self._transpose_nonbatch()._block(columns, rows).T
        examples, places = _examples(rows, self.outputs)
        return torch.cat([part[:, columns] for part in self._row_chunks(self.x[examples])])[places]

    def _entries(self, rows: Index, columns: Index) -> Tensor:
        if self.transposed:
            rows, columns = columns, rows
        examples, places = _examples(rows, self.outputs)
        entries, start = torch.zeros(len(rows), dtype=self.dtype, device=self.device), 0
        for part in self._row_chunks(self.x[examples]):
            here = ((places >= start) & (places < start + len(part))).nonzero()[:, 0]
            entries = entries.index_add(0, here, part[places[here] - start, columns[here]])
            start += len(part)
        return entries

    def _chosen(self, rows: Index | None, columns: Index | None) -> MatrixFree:
        if self.transposed:
            return self._transpose_nonbatch()._chosen(columns, rows)._transpose_nonbatch()
        if rows is None or not len(rows):
            return super()._chosen(rows, columns)
        examples, rows = _whole_examples(rows, self.outputs)
        return super(JacobianOperator, self._with(x=self.x[examples]))._chosen(rows, columns)


class NTKOperator(_InputsOperator):
    """The finite neural tangent kernel J(x) J(x2)ᵀ (Section 2.1), (n·o, m·o): products by vjp, then jvp, or by itself.

    By itself, formed and kept, as soon as the products so far would have cost as many multiply-adds as forming it, if
    the memory is there: `ntkbook.choice.KeptGram`. So x is not to be changed in place afterwards.

    `to_dense` is `lin.gram` and the diagonal `lin.diagonal`: exact, and fast where the layer rule applies. Slices are
    operators again, on the examples that they need.

    Above 800 rows linear_operator's own `solve` and `inv_quad_logdet` leave Cholesky for conjugate gradients with a
    tolerance of 1: see the top of this module, or use `NTKGP`.

    Args:
        lin: the linearisation.
        x: inputs (n, ...); x2: (m, ...), x itself unless given.
        method: of products: "gram", "products" (the matrix is never formed for them), or "auto", the cheaper.
        outputs: o, found out unless given.
        batch_shape: a batch of this same matrix.
        kept: what an operator of the same inputs has counted and kept.

    Raises: as `JacobianOperator`; ValueError for another method.
    """

    def __init__(
        self,
        lin: Linearization,
        x: Tensor,
        x2: Tensor | None = None,
        *,
        method: str = "auto",
        outputs: int | None = None,
        batch_shape: torch.Size = torch.Size(),
        kept: KeptGram | None = None,
    ) -> None:
        if outputs is None and x2 is not None and lin.num_outputs(x2) != lin.num_outputs(x):
            raise ValueError(f"x2: the network has {lin.num_outputs(x)} outputs at x, and {lin.num_outputs(x2)} at x2.")
        if kept is None or not kept.belongs_to(lin, x, x2, method):
            kept = KeptGram(lin, x, x2, lin.num_outputs(x) if outputs is None else outputs, method)
        # linear_operator makes the operator anew for every product: all of them share what was counted and kept.
        super().__init__(lin, x, kept.shape[0] // len(x), x2=x2, method=method, batch_shape=batch_shape, kept=kept)
        self.x2, self._kept = x2, kept
        self._shape = self._kept.shape

    def __repr__(self) -> str:
        rows, columns = self._shape
        return f"NTKOperator({rows} x {columns}, method={self._kept.method!r}, taken={self.taken!r})"

    @property
    def taken(self) -> str | None:
        """How the last product was made, "gram" or "products"; None before the first."""
        return self._kept.taken

    @property
    def _columns_x(self) -> Tensor:
        return self.x if self.x2 is None else self.x2

    def _transpose_nonbatch(self) -> "NTKOperator":
        return self if self.x2 is None else self._with(x=self.x2, x2=self.x)

    def _product(self, block: Tensor) -> Tensor:
        gram = self._kept.for_product(block.shape[1])
        if gram is not None:
            return gram @ block
        # The p-sized vectors in between fit the working memory.
        parts = block.split(vectors_that_fit(self.lin, 2), dim=1)
        return torch.cat([self._push(self.x, self._pull(self._columns_x, part)) for part in parts], dim=1)

    def _derivatives(self, left: Tensor, right: Tensor) -> tuple[Tensor | None, ...]:
        x, x2 = self.x, self._columns_x
        by_x = _input_gradient(self.lin, x, left, self._pull(x2, right))
        by_x2 = _input_gradient(self.lin, x2, right, self._pull(x, left))
        if self.x2 is not None:
            return by_x, by_x2
        return (None if by_x is None or by_x2 is None else by_x + by_x2,)

    def _dense(self) -> Tensor:
        with_graph = torch.is_grad_enabled() and self.requires_grad
        return self.lin.gram(self.x, self.x2) if with_graph else self._kept.matrix()

    def _diagonal(self) -> Tensor:
        if self.x2 is None:
            diagonal = self.lin.diagonal(self.x)
        else:
            pairs = zip(self._row_chunks(self.x), self._row_chunks(self.x2))
            diagonal = torch.cat([(one * two).sum(1) for one, two in pairs])
        return diagonal.expand(*self._batch, -1)

    def _block(self, rows: Index, columns: Index) -> Tensor:
        return self._dense()[rows][:, columns]  # of the examples that are needed: _chosen took care of that

    def _entries(self, rows: Index, columns: Index) -> Tensor:
        (examples, places), (examples2, places2) = (_examples(index, self.outputs) for index in (rows, columns))
        if self.x2 is None and torch.equal(rows, columns):
            return self.lin.diagonal(self.x[examples])[places]
        return self.lin.gram(self.x[examples], self._columns_x[examples2])[places, places2]

    def _chosen(self, rows: Index | None, columns: Index | None) -> MatrixFree:
        same = self.x2 is None and (
            rows is columns or (rows is not None and columns is not None and torch.equal(rows, columns))
        )
        x, x2 = self.x, self._columns_x
        if rows is not None and len(rows):
            examples, rows = _whole_examples(rows, self.outputs)
            x = x[examples]
        if columns is not None and len(columns):
            examples, columns = _whole_examples(columns, self.outputs)
            x2 = x2[examples]
        return super(NTKOperator, self._with(x=x, x2=None if same else x2))._chosen(rows, columns)


class GaussNewtonOperator(_InputsOperator):
    """J(x)ᵀ J(x), (p, p), the Gauss–Newton matrix of the squared error: products by jvp, then vjp.

    The diagonal is summed over chunks of Jacobian rows, rows and columns are products with unit vectors, and the root
    is J(x)ᵀ, exact and lazy; only `to_dense` forms (p, p), and with it whatever linear_operator does by Cholesky.

    The rank is at most n·o, so solves need a jitter or a diagonal, and above 800 parameters linear_operator makes them
    by conjugate gradients with a tolerance of 1: see the top of this module.

    Args:
        lin: the linearisation.
        x: inputs (n, ...).
        outputs: o, found out unless given.
        batch_shape: a batch of this same matrix.

    Raises: as `JacobianOperator`.
    """

    def __init__(
        self,
        lin: Linearization,
        x: Tensor,
        *,
        outputs: int | None = None,
        batch_shape: torch.Size = torch.Size(),
    ) -> None:
        super().__init__(lin, x, outputs, batch_shape=batch_shape)
        self._shape = lin.num_params, lin.num_params

    def _transpose_nonbatch(self) -> "GaussNewtonOperator":
        return self

    def _product(self, block: Tensor) -> Tensor:
        return self._pull(self.x, self._push(self.x, block))

    def _derivatives(self, left: Tensor, right: Tensor) -> tuple[Tensor | None, ...]:
        pushed = self._push(self.x, torch.cat([left, right], dim=1))
        return (_input_gradient(self.lin, self.x, pushed, torch.cat([right, left], dim=1)),)

    def _dense(self) -> Tensor:
        self.lin._require_room(self._shape, "JᵀJ", "Use its products, its diagonal, or some of its columns.")
        dense = torch.zeros(self._shape, dtype=self.dtype, device=self.device)
        for part in self._row_chunks(self.x):
            dense.addmm_(part.T, part)
        return dense

    def _diagonal(self) -> Tensor:
        total = torch.zeros(self._shape[0], dtype=self.dtype, device=self.device)
        for part in self._row_chunks(self.x):
            total = total + part.square().sum(0)
        return total.expand(*self._batch, -1)

    def _entries(self, rows: Index, columns: Index) -> Tensor:
        (some, place), (others, place2) = (torch.unique(index, return_inverse=True) for index in (rows, columns))
        if len(some) * len(others) <= len(rows):  # a row, say, as pivoted Cholesky asks for it
            return self._block(some, others)[place, place2]
        total = torch.zeros(len(rows), dtype=self.dtype, device=self.device)
        for part in self._row_chunks(self.x):
            total = total + (part[:, rows] * part[:, columns]).sum(0)
        return total

    def root_decomposition(self, method: str | None = None) -> LinearOperator:
        """R with R Rᵀ = JᵀJ: R = Jᵀ itself, or by the method asked for, "lanczos" among them."""
        if method is not None:
            return super().root_decomposition(method)
        root = JacobianOperator(self.lin, self.x, transposed=True, outputs=self.outputs, batch_shape=self._batch)
        return RootLinearOperator(root)


def _input_gradient(
    lin: Linearization, x: Tensor, u: Float[Tensor, "no k"], v: Float[Tensor, "p k"]
) -> Float[Tensor, "n ..."] | None:
    """The gradient of Σₖ uₖᵀ J(x) vₖ in x, or None where x requires none."""
    if not x.requires_grad:
        return None
    o, memory = lin._inspect(x)
    return input_gradient(lin, x, u.unflatten(0, (len(x), o)), v, lin._size(len(x), 3 * memory))


def _examples(rows: Index, o: int) -> tuple[Index, Index]:
    """The examples that rows of J belong to, each once, and the rows' places among the rows of those."""
    examples, where = torch.unique(rows // o, return_inverse=True)
    return examples, where * o + rows % o


def _whole_examples(rows: Index, o: int) -> tuple[Index, Index | None]:
    """The same, in the order given and without places, where the rows are whole examples."""
    starts = rows[::o]
    whole = (starts[:, None] + torch.arange(o, device=rows.device)).flatten()
    return (starts // o, None) if torch.equal(rows, whole) and not (starts % o).any() else _examples(rows, o)
