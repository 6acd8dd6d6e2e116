"""Whether products with a Gram matrix K = J J₂ᵀ form it, from counted multiply-adds and memory."""

import torch
from jaxtyping import Float
from torch import Tensor

from ntkbook.blocks import LayerBlocks
from ntkbook.linearize import Linearization
from ntkbook.memory import available_memory, total_memory

METHODS = ("auto", "gram", "products")


class KeptGram:
    """K, formed and kept as soon as the products would have cost as many multiply-adds without it.

    This product and those before it count, so one that is dearer than K forms it at once, and a series of any length
    costs at most about twice what the better of the two ways would have. K may take a quarter of the machine's memory
    and half of what is free; where it takes more, products do without it.

    Args:
        lin: the linearisation. x: (n, ...); x2: (m, ...), x itself if None. outputs: o.
        method: "auto", or what to do whatever it costs: "gram", "products".
    """

    def __init__(self, lin: Linearization, x: Tensor, x2: Tensor | None, outputs: int, method: str) -> None:
        if method not in METHODS:
            raise ValueError(f"method: expected one of {METHODS}, got {method!r}.")
        self.lin, self.x, self.x2, self.method = lin, x, x2, method
        self.shape = len(x) * outputs, len(x if x2 is None else x2) * outputs
        self.taken: str | None = None
        """How the last product was made, "gram" or "products"."""
        self.spent = 0
        """Multiply-adds of the products so far, all without K."""
        self._matrix: Tensor | None = None
        self._counts: LayerBlocks | None = None

    def belongs_to(self, lin: Linearization, x: Tensor, x2: Tensor | None, method: str) -> bool:
        """Whether it is that of the same linearisation and inputs, by identity."""
        return self.lin is lin and self.x is x and self.x2 is x2 and self.method == method

    def matrix(self) -> Float[Tensor, "rows columns"]:
        """K, without a graph."""
        matrix = self._matrix
        if matrix is None:
            with torch.no_grad():
                matrix = self._matrix = self.lin.gram(self.x, self.x2)
        return matrix

    def for_product(self, k: int) -> Float[Tensor, "rows columns"] | None:
        """K if a product with k vectors is to go by it, None if it is to do without."""
        forms = self.method == "gram" or (self.method == "auto" and (self._matrix is not None or self._pays(k)))
        self.taken = "gram" if forms else "products"
        return self.matrix() if forms else None

    def _pays(self, k: int) -> bool:
        (rows, columns), device = self.shape, self.lin.device
        nbytes = rows * columns * self.lin.dtype.itemsize
        if nbytes > min(total_memory(device) // 4, available_memory(device) // 2):
            return False
        if self._counts is None:
            self._counts = LayerBlocks(self.lin, self.x, *self.lin._inspect(self.x))
        n, m = len(self.x), len(self.x if self.x2 is None else self.x2)
        self.spent += (n + m) * self._counts.product_cost(k)
        return self.spent >= self._counts.gram_cost(n, m, self.x2 is None) + rows * columns * k
