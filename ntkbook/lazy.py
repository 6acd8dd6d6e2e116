"""What the operators of `operators.py` share: batches, indexing, moves between devices and precisions.

A subclass says what its matrix's products are; its rows and columns are operators again, and nothing is formed.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from linear_operator import LinearOperator
from linear_operator.functions._matmul import Matmul
from linear_operator.utils.memoize import cached
from torch import Tensor

from ntkbook.linearize import Linearization
from ntkbook.memory import working_memory

Index = Int[Tensor, " _"]
Own = TypeVar("Own", bound="MatrixFree")


class MatrixFree(LinearOperator):
    """What the operators share: one matrix, the same for a whole batch; a subclass says what its products are.

    The tensors are keyword arguments of linear_operator's representation, so that (lin, x) can come in this order.
    """

    lin: Linearization

    def __init__(self, batch_shape: torch.Size = torch.Size(), **kwargs: Any) -> None:
        super().__init__(batch_shape=batch_shape, **kwargs)
        self._batch = torch.Size(batch_shape)

    # What a subclass defines:
    _shape: tuple[int, int]
    _product: Callable[[Tensor], Tensor]  # A v, for v (N, k)
    _derivatives: Callable[[Tensor, Tensor], tuple[Tensor | None, ...]]  # of Σₖ uₖᵀ A vₖ, by its tensors
    _dense: Callable[[], Tensor]  # A
    _entries: Callable[[Index, Index], Tensor]  # A[rows, columns], element by element

    def _chosen(self, rows: Index | None, columns: Index | None) -> "MatrixFree":
        return self if rows is None and columns is None else Selected(self, rows, columns)

    def _block(self, rows: Index, columns: Index) -> Tensor:
        """A[rows][:, columns], by products with unit vectors, some at a time."""
        if len(rows) < len(columns):
            return self._transpose_nonbatch()._block(columns, rows).T
        size = vectors_that_fit(self.lin, 4)
        units = (_scatter(eye(self.lin, len(part)), part, self._shape[1]) for part in columns.split(size))
        return torch.cat([self._matmul(unit)[rows] for unit in units], dim=1)

    # ------------------------------------------------------------------ what linear_operator asks for

    @property
    def dtype(self) -> torch.dtype:
        return self.lin.dtype

    @property
    def device(self) -> torch.device:
        return self.lin.device

    @abstractmethod
    def _transpose_nonbatch(self) -> "MatrixFree": ...

    def _size(self) -> torch.Size:
        return self._batch + self._shape

    def _matmul(self, rhs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.requires_grad:  # by _bilinear_derivative, not through a whole Jacobian
            return Matmul.apply(self.representation_tree(), rhs, *self.representation())
        block = (rhs[:, None] if rhs.ndim == 1 else rhs).movedim(-2, 0)  # (N, *batch, k)
        flat = block.flatten(1)
        product = self._product(flat) if flat.numel() else flat.new_zeros(self._shape[0], flat.shape[1])
        product = product.reshape(self._shape[0], *block.shape[1:]).movedim(0, -2)
        product = product.expand(*torch.broadcast_shapes(self._batch, product.shape[:-2]), *product.shape[-2:])
        return product[..., 0] if rhs.ndim == 1 else product

    def _bilinear_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> tuple[Tensor | None, ...]:
        if not self.requires_grad:
            return (None,) * len(self.representation())
        left, right = (vecs[:, None] if vecs.ndim == 1 else vecs for vecs in (left_vecs, right_vecs))
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        flat = (vecs.expand(*batch, *vecs.shape[-2:]).movedim(-2, 0).flatten(1) for vecs in (left, right))
        with torch.no_grad():
            return self._derivatives(*flat)

    @cached
    def to_dense(self) -> Tensor:
        """The matrix itself, differentiable in x; MemoryError if it cannot fit."""
        return self._dense().expand(self.shape)

    def __getitem__(self, index: Any) -> LinearOperator | Tensor:
        # linear_operator makes the slice i:i+1 of an integer i, which is empty for -1; masks it does not know.
        index = index if isinstance(index, tuple) else (index,)
        index = tuple(i.nonzero()[:, 0] if torch.is_tensor(i) and i.dtype == torch.bool else i for i in index)
        where = next((place for place, i in enumerate(index) if i is Ellipsis), len(index))
        missing = self.dim() - len(index) + (where < len(index))
        if missing < 0:
            raise IndexError(f"expected at most {self.dim()} indices, got {len(index)}.")
        filled = [*index[:where], *[slice(None)] * missing, *index[where + 1 :]]
        for dim, i in enumerate(filled):
            if torch.is_tensor(i) and i.ndim == 0:
                i = int(i)
            if isinstance(i, int):
                if not -self.shape[dim] <= i < self.shape[dim]:
                    raise IndexError(f"index {i} is out of range for dimension {dim} of shape {tuple(self.shape)}.")
                filled[dim] = i % self.shape[dim]
        return super().__getitem__(tuple(filled))

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> "MatrixFree":
        batch = torch.zeros((), device=self.device).expand(self._batch)[batch_indices].shape
        rows, columns = (
            None if isinstance(index, slice) and index == slice(None) else self._positions(index, dim)
            for index, dim in ((row_index, 0), (col_index, 1))
        )
        return self._with(batch_shape=torch.Size())._chosen(rows, columns)._with(batch_shape=batch)

    def _get_indices(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Tensor:
        shape = torch.broadcast_shapes(row_index.shape, col_index.shape, *(index.shape for index in batch_indices))
        rows = self._positions(row_index.expand(shape).reshape(-1), 0)
        columns = self._positions(col_index.expand(shape).reshape(-1), 1)
        entries = self._entries(rows, columns) if len(rows) else torch.zeros((), dtype=self.dtype, device=self.device)
        return entries.expand(len(rows)).view(shape)

    def _positions(self, index: slice | Tensor, dim: int) -> Index:
        size = self._shape[dim]
        if isinstance(index, slice):
            return torch.arange(size, device=self.device)[index]
        if ((index < -size) | (index >= size)).any():
            raise IndexError(f"index {index.tolist()} is out of range for {size} {('rows', 'columns')[dim]}.")
        return index.to(self.device) % size

    def _with(self: Own, **changes: Any) -> Own:
        return type(self)(**{**self._kwargs, **changes})

    def _expand_batch(self: Own, batch_shape: torch.Size | list[int]) -> Own:
        return self._with(batch_shape=torch.zeros(()).expand(self._batch).expand(batch_shape).shape)

    def _unsqueeze_batch(self: Own, dim: int) -> Own:
        return self._with(batch_shape=torch.Size((*self._batch[:dim], 1, *self._batch[dim:])))

    def _permute_batch(self: Own, *dims: int) -> Own:
        return self._with(batch_shape=torch.Size(self._batch[dim] for dim in dims))

    def repeat(self: Own, *sizes: Any) -> Own:
        """The same matrix in a batch: `op.repeat(b, 1, 1)`."""
        sizes = tuple(sizes[0]) if len(sizes) == 1 else sizes
        if sizes[-2:] != (1, 1):
            raise RuntimeError(f"repeat: expected (*batch, 1, 1), for copies in a batch; got {sizes}.")
        return self._with(batch_shape=torch.zeros(()).expand(self._batch).repeat(sizes[:-2] or ()).shape)

    def to(self: Own, *args: Any, **kwargs: Any) -> Own:
        """On another device or in another precision, as `Tensor.to`; inputs that are integers stay integers."""
        like = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        place = {"device": like.device, "dtype": like.dtype}

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor) and not value.is_floating_point():
                return value.to(device=like.device)
            return value.to(**place) if isinstance(value, Tensor | LinearOperator | Linearization) else value

        return self._with(**{name: moved(value) for name, value in self._kwargs.items()})

    def type(self: Own, dtype: torch.dtype) -> Own:
        """In another precision; `double()`, `float()` and `half()` come here."""
        return self.to(dtype=dtype)

    def cpu(self: Own) -> Own:
        return self.to(device="cpu")

    def cuda(self: Own, device_id: int | str | None = None) -> Own:
        return self.to(device="cuda" if device_id is None else torch.device(device_id))


class Selected(MatrixFree):
    """Rows and columns of another operator of this module, lazily: what slicing one gives.

    Args:
        base: (M, N); rows: indices (r,), all unless given; columns: (c,), all unless given.
        batch_shape: a batch of this same matrix.
    """

    def __init__(
        self,
        base: MatrixFree,
        rows: Index | None = None,
        columns: Index | None = None,
        batch_shape: torch.Size = torch.Size(),
    ) -> None:
        rows, columns = (
            torch.arange(size, device=base.device) if index is None else index
            for index, size in zip((rows, columns), base._shape)
        )
        super().__init__(base=base, rows=rows, columns=columns, batch_shape=batch_shape)
        self.base, self.rows, self.columns, self.lin = base, rows, columns, base.lin
        self._shape = len(rows), len(columns)

    def _transpose_nonbatch(self) -> "Selected":
        return self._with(base=self.base._transpose_nonbatch(), rows=self.columns, columns=self.rows)

    def _product(self, block: Tensor) -> Tensor:
        return self.base._product(_scatter(block, self.columns, self.base._shape[1]))[self.rows]

    def _derivatives(self, left: Tensor, right: Tensor) -> tuple[Tensor | None, ...]:
        size, size2 = self.base._shape
        spread = _scatter(left, self.rows, size), _scatter(right, self.columns, size2)
        return *self.base._derivatives(*spread), None, None

    def _dense(self) -> Tensor:
        if 0 in self._shape:
            return torch.zeros(self._shape, dtype=self.dtype, device=self.device)
        return self.base._block(self.rows, self.columns)

    def _entries(self, rows: Index, columns: Index) -> Tensor:
        return self.base._entries(self.rows[rows], self.columns[columns])

    def _chosen(self, rows: Index | None, columns: Index | None) -> MatrixFree:
        rows = self.rows if rows is None else self.rows[rows]
        return self.base._chosen(rows, self.columns if columns is None else self.columns[columns])


def vectors_that_fit(lin: Linearization, copies: int) -> int:
    """How many p-sized vectors fit the working memory, if each takes some copies."""
    return max(1, working_memory(lin.device) // (copies * lin.num_params * lin.dtype.itemsize))


def eye(lin: Linearization, size: int) -> Tensor:
    return torch.eye(size, dtype=lin.dtype, device=lin.device)


def _scatter(block: Float[Tensor, "c k"], columns: Index, size: int) -> Float[Tensor, "N k"]:
    """The block's rows at their places among `size` rows of zeros; those at one place are added."""
    return block.new_zeros(size, block.shape[1]).index_add(0, columns, block)
