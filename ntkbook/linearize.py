"""A network linearised at its parameters: products with its Jacobian, and the finite neural tangent kernel."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

import torch
from jaxtyping import Float
from linear_operator import LinearOperator
from torch import Tensor, nn
from torch.func import jvp as func_jvp

from ntkbook.blocks import LayerBlocks
from ntkbook.checks import explained, outside_inference_mode, place, require_double, require_one_derivative
from ntkbook.finding import BrokenRule, find_layers
from ntkbook.functional import FunctionalNetwork
from ntkbook.gradients import differentiable_rows, in_columns, jacobian_rows, pull_back, push_forward
from ntkbook.gram import Factors, FeatureMaker, Features, differentiable_gram, gram, gram_diagonal, stacked
from ntkbook.layers import layer_features
from ntkbook.memory import require_memory, total_memory, working_memory


class Linearization(FunctionalNetwork):
    """The network f(x; θ) ≈ f(x; θ₀) + J(x)(θ − θ₀) at its present parameters θ₀ (Section 2.1 of the paper).

    J(x) is (n·o, p): row i·o + c belongs to example i and output c, the columns to the parameters in the order of
    `net.named_parameters()`, each flattened. (The paper writes the transpose.) Parameters and buffers are copied
    here: training the network afterwards changes nothing, and nothing here changes the network.

    Args:
        net: maps x (n, ...) to (n, o), or (n,) for one output, each example on its own, in eval mode if it has
            BatchNorm or Dropout.
        params: the names of the parameters to linearise in, or names with other values to linearise at.
            Those with `requires_grad` unless given; all others stay constants.
        chunk_size: examples at a time; chosen from the machine's memory unless given. No result depends on it
            beyond rounding.

    Raises:
        ValueError: no such parameters; train-mode BatchNorm or Dropout; inputs with NaN or infinities, or of the wrong
            shape, dtype or device; a network whose output is not (n,) or (n, o).
        NotImplementedError: an operation of the network that torch.func cannot differentiate in the way asked for.
        MemoryError: a result that cannot fit.
    """

    @outside_inference_mode
    def to(
        self,
        *where: torch.device | torch.dtype | str | int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Linearization":
        """The same linearisation on another device or in another precision; the network stays as it is.

        By name or not, as torch's: to("cuda"), to(torch.float64), to(device=..., dtype=...).

        Raises:
            ValueError: a dtype that is not real, or one that the device does not have: pass dtype=torch.float32.
        """
        device, dtype = place(where, device, dtype)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype: expected real numbers, such as torch.float64 or torch.float32, got {dtype}.")
        require_double(device or self.device, dtype or self.dtype)
        other = object.__new__(Linearization)
        vars(other).update(vars(self), _way=0, _vectorises={})
        for field in ("params", "constants"):
            values = getattr(self, field).items()
            moved = {k: v.to(device=device, dtype=dtype if v.is_floating_point() else None) for k, v in values}
            setattr(other, field, moved)
        return other

    @outside_inference_mode
    def outputs(self, x: Tensor) -> Float[Tensor, "n o"]:
        """f(x; θ₀), of shape (n, o)."""
        _, memory = self._inspect(x)
        with torch.set_grad_enabled(_differentiable(x)):
            return torch.cat([self._call(self.params, part) for part in x.split(self._size(len(x), memory))])

    @outside_inference_mode
    def jvp(self, x: Tensor, v: Tensor | Mapping[str, Tensor]) -> Float[Tensor, "n o"] | Float[Tensor, "n o k"]:
        """J(x) v by forward mode: (n, o) for v (p,) or a dict like the parameters, (n, o, k) for v (p, k).

        One pass forward for all k vectors of a chunk together (Appendix A); by the layers' rule (`ntkbook.blocks`)
        where that is counted cheaper. Through the whole Jacobian where x requires a gradient.
        """
        v = self.flatten(v) if isinstance(v, Mapping) else v
        if v.ndim not in (1, 2) or len(v) != self.num_params:
            raise ValueError(f"v: expected ({self.num_params},) or ({self.num_params}, k), got {tuple(v.shape)}.")
        self._require_same(v, "v")
        o, memory = self._inspect(x)
        if _differentiable(x):
            return (self.jacobian(x) @ v).view(len(x), -1, *v.shape[1:])
        push = self._forward(x[:1], _differentiable(v))
        k = v.shape[1:].numel()
        if (rule := self._block_rule(x, o, memory, v, k)) is not None:
            with suppress(BrokenRule):
                return rule.jvp(x, v, self._pass_size(len(x), rule.work, self._budget(None)))
        columns = v.reshape(len(v), -1).T.contiguous()
        size = self._size(len(x), memory * min(k, 64) * (1 if self._one_derivative else 3))
        with explained("jvp"), torch.set_grad_enabled(_differentiable(v)):
            blocks = [in_columns(self, ("jvp", part.shape), push(part), columns, 64) for part in x.split(size)]
        product = torch.cat(blocks, dim=1)
        return product[0] if v.ndim == 1 else product.movedim(0, -1)

    @outside_inference_mode
    def vjp(self, x: Tensor, u: Tensor) -> Float[Tensor, " p"] | Float[Tensor, "p k"]:
        """J(x)ᵀ u by reverse mode: (p,) for u (n, o), or (n,) with one output; (p, k) for u (n, o, k).

        Blocks of vectors, and x that requires a gradient, as in `jvp`.
        """
        o, memory = self._inspect(x)
        if u.ndim == 1 and o == 1:
            u = u[:, None]
        if u.ndim not in (2, 3) or u.shape[:2] != (len(x), o):
            raise ValueError(f"u: expected ({len(x)}, {o}) or ({len(x)}, {o}, k), got {tuple(u.shape)}.")
        self._require_same(u, "u")
        if _differentiable(x):
            return self.jacobian(x).T @ u.flatten(0, 1)
        k = u.shape[2:].numel()
        if (rule := self._block_rule(x, o, memory, u, k)) is not None:
            with suppress(BrokenRule):
                return rule.vjp(x, u, self._pass_size(len(x), rule.work, self._budget(None)))
        size = self._size(len(x), memory * min(k, 64))
        columns = max(1, min(k, 64, working_memory(x.device) // (2 * self.num_params * u.element_size())))
        total = u.new_zeros(k, self.num_params)
        with explained("vjp"), torch.set_grad_enabled(_differentiable(u)):
            for part, weights in zip(x.split(size), u.reshape(len(x), o, k).split(size)):
                back = pull_back(self, part, _differentiable(u))
                total = total + in_columns(self, ("vjp", part.shape), back, weights.movedim(-1, 0), columns)
        return total[0] if u.ndim == 2 else total.T

    @outside_inference_mode
    def jacobian(self, x: Tensor) -> Float[Tensor, "no p"]:
        """J(x), (n·o, p), in chunks of examples. For tests and small networks: nothing else here forms it whole."""
        o, memory = self._inspect(x)
        shape = (len(x) * o, self.num_params)
        self._require_room(shape, "The Jacobian", "Use jvp, vjp or gram, which never form it.")
        jacobian = x.new_empty(shape, dtype=self.dtype)
        size = self._size(len(x), self._jacobian_bytes(o, memory))
        for start in range(0, len(x), size):
            rows = self._jacobian_chunk(x[start : start + size], None)
            jacobian[start * o : start * o + rows.shape[0] * o] = rows.flatten(0, 1)
        return jacobian

    @outside_inference_mode
    def gram(
        self,
        x: Tensor,
        x2: Tensor | None = None,
        *,
        output: int | None = None,
        trace: bool = False,
        memory: int | None = None,
    ) -> Float[Tensor, "rows columns"]:
        """The finite neural tangent kernel J(x) J(x2)ᵀ (Section 2.1), layer by layer.

        Every kind of layer in `ntkbook.layers` has a rule, and the cheaper of two ways is counted out for each; the
        parameters without one go by rows of the Jacobian. Where x or x2 requires a gradient, the rule is that of
        Linear layers on vectors, or none.

        Args:
            x: (n, ...); x2: (m, ...), x itself unless given: then only one half is computed.
            output: one output's kernel alone, (n, m).
            trace: the sum of the outputs' kernels, (n, m).
            memory: bytes to use beside the result, at least what two examples need; from the machine's unless given.
                More of it means fewer passes through the network where the features of all examples do not fit.

        Returns:
            (n·o, m·o), row i·o + c for example i and output c. Differentiable in x and x2 if they require
            gradients.
        """
        if trace and output is not None:
            raise ValueError("output and trace: give one of them; trace sums over all outputs.")
        o, saved = self._inspect(x)
        if x2 is not None:
            self._inspect(x2)
        output = self._index(output, o)
        per = o if output is None and not trace else 1  # rows of the result an example
        shape = (len(x) * per, len(x if x2 is None else x2) * per)
        self._require_room(shape, "The Gram matrix", "Use fewer points, or one output.")
        if _differentiable(x, *([] if x2 is None else [x2])):
            left = self._differentiable_features(x, output, trace)
            right = left if x2 is None else self._differentiable_features(x2, output, trace)
            return differentiable_gram(left, right)
        memory = self._budget(memory)
        out = x.new_empty(shape, dtype=self.dtype)

        def write(rules: bool) -> Tensor:
            maker = FeatureMaker(self, x, x if x2 is None else x2, o, saved, output, trace, rules)
            size = self._pass_size(max(shape) // per, maker.work, memory)
            gram(maker, x, x2, out.zero_(), size, memory - size * maker.work)
            return out

        return by_rules(write)

    @outside_inference_mode
    def diagonal(self, x: Tensor, *, output: int | None = None, memory: int | None = None) -> Float[Tensor, " rows"]:
        """The diagonal of J(x) J(x)ᵀ: the squared norms of the outputs' gradients, (n·o,), or one output's, (n,).

        `memory` as for `gram`.
        """
        o, saved = self._inspect(x)
        output = self._index(output, o)
        if _differentiable(x):
            return gram_diagonal(self._differentiable_features(x, output, False)).reshape(-1)
        memory = self._budget(memory)

        def squares(rules: bool) -> Tensor:
            maker = FeatureMaker(self, x, None, o, saved, output, rules=rules)
            size = self._pass_size(len(x), maker.work + 2 * maker.kept, memory)
            return torch.cat([gram_diagonal(maker(part, size)) for part in x.split(size)]).reshape(-1)

        return by_rules(squares)

    def operator(self, x: Tensor, x2: Tensor | None = None, *, method: str = "auto") -> LinearOperator:
        """J(x) J(x2)ᵀ, (n·o, m·o), as a `linear_operator.LinearOperator`: formed for products if that pays.

        With the method "gram" or "products" they always or never form it; the operator's `taken` says what they did.
        `ntkbook.operators` has the others: JacobianOperator(lin, x), its `.mT`, and GaussNewtonOperator(lin, x) for
        JᵀJ; and what to set before a solve with more than 800 rows, where linear_operator turns to conjugate gradients
        with a tolerance of 1.
        """
        from ntkbook.operators import NTKOperator

        return NTKOperator(self, x, x2, method=method)

    # ------------------------------------------------------------------ inside

    def _directional(self, x: Tensor, v: Float[Tensor, " p"]) -> Float[Tensor, "n o"]:
        return func_jvp(lambda p: self._call(p, x), (self.params,), (self.unflatten(v),))[1]

    def _forward(
        self, example: Tensor, create_graph: bool
    ) -> Callable[[Tensor], Callable[[Float[Tensor, " p"]], Float[Tensor, "n o"]]]:
        """x -> (v -> J(x) v), by forward mode; without, where an operation has none."""
        try:
            self._require_one_derivative(example)
        except NotImplementedError as error:
            if error.__cause__ is not None:  # and not that the two modes differ
                with suppress(RuntimeError):
                    push_forward(self, example)(self.flatten(self.params))
                    return partial(push_forward, self, create_graph=create_graph)
            raise
        return lambda x: partial(self._directional, x)

    def _block_rule(self, x: Tensor, o: int, memory: int, block: Tensor, k: int) -> LayerBlocks | None:
        """The layers' rule for products with k vectors, if that is the cheaper way and no gradient is wanted."""
        rule = None if k == 1 or _differentiable(block) else LayerBlocks(self, x, o, memory)
        return rule if rule and rule.prefers_rule(k) else None

    def _require_one_derivative(self, example: Tensor) -> None:
        """Once, on one example (1, ...)."""
        if not self._one_derivative:
            v = torch.arange(self.num_params, dtype=self.dtype, device=self.device).cos()
            with explained("jvp"), torch.no_grad():
                require_one_derivative(partial(self._directional, example), pull_back(self, example), v)
            self._one_derivative = True

    def _jacobian_chunk(self, x: Tensor, output: int | None = None) -> Float[Tensor, "n o p"]:
        if _differentiable(x):
            return differentiable_rows(self, x, output)
        return jacobian_rows(self, self.params, x, output)

    def _differentiable_features(self, x: Tensor, output: int | None, trace: bool) -> Features:
        """Those of Linear layers on vectors, or else rows: batched second derivatives of norms are wrong."""
        found = find_layers(self, x[:1])
        if found.layers and not found.rest and all(isinstance(layer.module, nn.Linear) for layer in found.layers):
            with suppress(BrokenRule):
                features = list(layer_features(self, found, x, output))
                if all(feature.inputs.shape[2] == 1 for feature in features):
                    factors = [Factors(a, stacked(d) if trace else d) for _, a, d in features]
                    return Features(factors, [x.new_zeros(len(x), factors[0].derivatives.shape[1], 0)])
        rows = self._jacobian_chunk(x, output)
        return Features([], [rows.flatten(1)[:, None] if trace else rows])

    def _jacobian_bytes(self, o: int, memory: int) -> int:
        """Working memory of one example's Jacobian: the rows, torch's own copy of them, and o backward passes."""
        return 3 * o * self.num_params * next(iter(self.params.values())).element_size() + (o + 1) * memory

    def _budget(self, memory: int | None) -> int:
        if memory is not None and memory < 1:
            raise ValueError(f"memory: expected a positive number of bytes, got {memory}.")
        return working_memory(self.device) + total_memory(self.device) // 8 if memory is None else memory

    def _pass_size(self, n: int, work: int, memory: int) -> int:
        """How many of n examples to take through the network at a time: on a CPU fewer, nearer the caches."""
        share = min(memory // 4, working_memory(self.device) // (4 if self.device.type == "cpu" else 1))
        return min(n, self.chunk_size or max(1, share // work))

    def _size(self, n: int, bytes_per_example: int) -> int:
        return self.chunk_size or max(1, min(n, working_memory(self.device) // max(1, bytes_per_example)))

    def _index(self, output: int | None, o: int) -> int | None:
        if output is not None and not -o <= output < o:
            raise ValueError(f"output: the network has {o} outputs, got index {output}.")
        return None if output is None else output % o

    def _require_room(self, shape: tuple[int, int], what: str, instead: str) -> None:
        nbytes = shape[0] * shape[1] * next(iter(self.params.values())).element_size()
        require_memory(nbytes, self.device, f"{what} of {shape[0]:,} x {shape[1]:,} {self.dtype}", instead)


def _differentiable(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def by_rules(make: Callable[[bool], Tensor]) -> Tensor:
    """A result by the layers' rules, or without them where they turn out not to hold."""
    with torch.no_grad():
        with suppress(BrokenRule):
            return make(True)
        return make(False)
