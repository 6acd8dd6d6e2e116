"""How alike the Jacobians of two tasks are: diagonals of their Fisher and Gram matrices, and the cosine between them.

All diagonals are exact, of one form: of the mean over examples of Jᵀ U Uᵀ J, J (o, p) an example's Jacobian. U is a
root of the likelihood's H for the Fisher matrix, the gradient of log p(y | f) for the empirical one, 1 for JᵀJ.
Entry j is thus the mean of the squared j-th entries of the gradients Jᵀu, u a column of U. A Linear layer that runs
once per example, on a vector a, has ∂/∂W of f·u = d aᵀ, whose squares summed over examples are (D²)ᵀ A²: no
example's gradient is formed. Those of other layers with a rule (`ntkbook.layers`) are formed, a layer at a time, by one
product of matrices an example, and those of parameters without one by torch.func.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, product

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad

from ntkbook.checks import outside_inference_mode
from ntkbook.finding import BrokenRule, Found, find_layers
from ntkbook.gradients import Directions, example_gradients, units
from ntkbook.layers import LayerFeatures, gradient_rows, layer_features
from ntkbook.likelihoods import Likelihood, get_likelihood
from ntkbook.linearize import Linearization
from ntkbook.memory import require_memory, working_memory

LabelledDirections = Callable[[Float[Tensor, "n o"], Tensor | None], Float[Tensor, "r n o"]]


def fisher_diagonal(
    net: nn.Module | Linearization,
    x: Tensor,
    likelihood: str | Likelihood = "categorical",
    *,
    chunk_size: int | None = None,
) -> Float[Tensor, " p"]:
    """The diagonal of the Fisher matrix, the mean over examples of Jᵀ H J (Section 2.2 of the paper).

    The true Fisher: the expectation over p(y | f) in closed form, no labels and no sampling.

    Args:
        net: a network, in its parameters with `requires_grad`, or a linearisation, in whatever it linearises in.
        x: inputs (n, ...), as for `Linearization`.
        likelihood: p(y | f), by its name in `ntkbook.likelihoods.LIKELIHOODS`, or an instance. One name is one set of
            arguments: "gaussian" has noise 1.
        chunk_size: examples at a time; the linearisation's, or from the machine's memory, unless given. No result
            depends on it beyond rounding.

    Returns:
        (p,), in the order of the Jacobian's columns and the network's dtype, a constant; no gradient flows to x. Sums
        over examples are taken in float64.

    Raises:
        ValueError, NotImplementedError: as `Linearization`, for inputs or a network that it cannot work with; an
            unknown likelihood, or one for another number of outputs.
        MemoryError: one example's gradient by one direction cannot fit.
    """
    likelihood = get_likelihood(likelihood)
    return _mean_squares(_linearised(net), x, None, lambda f, _: likelihood.root(f).permute(2, 0, 1), None, chunk_size)


def empirical_fisher_diagonal(
    net: nn.Module | Linearization,
    x: Tensor,
    y: Tensor,
    likelihood: str | Likelihood = "categorical",
    *,
    chunk_size: int | None = None,
) -> Float[Tensor, " p"]:
    """The diagonal of the empirical Fisher matrix: the mean over examples of the squared gradients of log p(y | f).

    It takes the labels there are in place of an expectation over p(y | f), and vanishes where they are fitted.

    Args:
        net, x, likelihood, chunk_size: as for `fisher_diagonal`.
        y: labels or targets, as `Likelihood.log_prob` takes them: (n,) classes for "categorical".

    Returns: as `fisher_diagonal`.

    Raises:
        ValueError: also for a y of another length than x, or with values that p(y | f) cannot take.
    """
    likelihood = get_likelihood(likelihood)
    if len(y) != len(x):
        raise ValueError(f"y: expected {len(x)} of them, as many as inputs x; got {len(y)}.")
    return _mean_squares(
        _linearised(net), x, y, lambda f, y: grad(lambda f: likelihood.log_prob(f, y).sum())(f)[None], 1, chunk_size
    )


def jacobian_diagonal(
    net: nn.Module | Linearization, x: Tensor, *, chunk_size: int | None = None
) -> Float[Tensor, " p"]:
    """The diagonal of JᵀJ / n, the mean over examples of squared derivatives, summed over all outputs (H = 1).

    Arguments, result and errors as for `fisher_diagonal`.
    """
    return _mean_squares(_linearised(net), x, None, lambda f, _: units(f), None, chunk_size)


def cosine_similarity(a: Float[Tensor, " p"], b: Float[Tensor, " p"]) -> float:
    """aᵀb / (‖a‖ ‖b‖), from −1 to 1, computed in float64.

    Diagonals are nowhere negative, so theirs is 0 to 1, and 0 only where no entry is positive in both. How large a
    value means nothing is for a baseline to say: two networks of one task.

    Raises:
        ValueError: other shapes than (p,) twice; NaN or infinite entries; a vector of zeros, which has no direction.
    """
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"a and b: expected two vectors of one length, got {tuple(a.shape)} and {tuple(b.shape)}.")
    for name, v in (("a", a), ("b", b)):
        if not v.isfinite().all():
            raise ValueError(f"{name}: expected finite entries, got {int((~v.isfinite()).sum())} others.")
        if not v.any():
            raise ValueError(f"{name}: all {len(v)} entries are zero, so it has no direction.")
    one, other = (v.double() / v.abs().max().double() for v in (a, b))  # so that no square underflows
    cosine = (one @ other) / (one.norm() * other.norm())
    return min(1.0, max(-1.0, cosine.item()))


def by_layer(net: nn.Module | Linearization, v: Float[Tensor, " p"]) -> dict[str, Float[Tensor, " q"]]:
    """A vector like the parameters in parts, one a module that has parameters of its own, weight and bias together.

    The keys are the modules' names, "" for the network itself.

    Raises:
        ValueError: v is not (p,).
    """
    lin = _linearised(net)
    if v.shape != (lin.num_params,):
        raise ValueError(f"v: expected ({lin.num_params},), one entry a parameter, got {tuple(v.shape)}.")
    parts: dict[str, list[Tensor]] = {}
    for name, part in lin.unflatten(v).items():
        parts.setdefault(name.rpartition(".")[0], []).append(part.reshape(-1))
    return {name: torch.cat(part) for name, part in parts.items()}


def cosine_by_layer(net: nn.Module | Linearization, a: Float[Tensor, " p"], b: Float[Tensor, " p"]) -> dict[str, float]:
    """`cosine_similarity` of each of the parts of `by_layer`.

    Raises:
        ValueError: as those two, with the layer's name.
    """
    cosines = {}
    for (name, one), other in zip(by_layer(net, a).items(), by_layer(net, b).values()):
        try:
            cosines[name] = cosine_similarity(one, other)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    return cosines


# ------------------------------------------------------------------ inside


def _linearised(net: nn.Module | Linearization) -> Linearization:
    return net if isinstance(net, Linearization) else Linearization(net)


@outside_inference_mode
def _mean_squares(
    lin: Linearization,
    x: Tensor,
    y: Tensor | None,
    directions: LabelledDirections,
    rows: int | None,
    chunk_size: int | None,
) -> Float[Tensor, " p"]:
    """The mean over examples of (Jᵀu)², summed over the directions u of each: `rows` of them, or one an output."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected a positive number of examples, got {chunk_size}.")
    o, memory = lin._inspect(x)
    x, rows = x.detach(), o if rows is None else rows

    def summed(found: Found) -> dict[str, Tensor]:
        totals = {name: torch.zeros_like(value, dtype=torch.double) for name, value in lin.params.items()}
        fixed, each = _bytes(lin, found, x, rows * o, memory)
        what = f"One gradient of {lin.num_params:,} parameters"
        require_memory(fixed + each, x.device, what, "Linearise in fewer: params=[...].")
        budget = working_memory(x.device)
        # On a CPU, a quarter of the memory at a time stays nearer the caches: LeNet3 took half the time.
        share = budget // 4 if x.device.type == "cpu" else budget
        size = min(len(x), chunk_size or lin.chunk_size or max(1, share // (fixed + rows * each)))
        columns = max(1, min(rows, (budget // size - fixed) // each))  # directions at a time, where not all fit
        for start, first in product(range(0, len(x), size), range(0, rows, columns)):
            part = x[start : start + size]
            targets = None if y is None else y[start : start + size]
            block = partial(_block, directions, targets, slice(first, first + columns))
            examples = _by_examples(lin, found.rest, part, block) if found.rest else ()
            for name, square in chain(_by_layers(lin, found, part, block), examples):
                totals[name] += square.view_as(totals[name])
        return totals

    with torch.no_grad():
        totals = None
        with suppress(BrokenRule):
            totals = summed(find_layers(lin, x[:1]))
        totals = totals or summed(Found([], list(lin.params)))
    return lin.flatten(totals).div(len(x)).to(lin.dtype)


def _block(
    directions: LabelledDirections, y: Tensor | None, rows: slice, f: Float[Tensor, "n o"]
) -> Float[Tensor, "r n o"]:
    return directions(f, y)[rows]


def _by_examples(
    lin: Linearization, names: list[str], x: Tensor, directions: Directions
) -> Iterator[tuple[str, Tensor]]:
    """Parameter name -> sum over examples and directions of squares, for any network: every gradient is formed."""
    for name, gradient in example_gradients(lin, names, x, directions).items():
        yield name, gradient.square().sum(1).sum(0, dtype=torch.double)


def _by_layers(lin: Linearization, found: Found, x: Tensor, directions: Directions) -> Iterator[tuple[str, Tensor]]:
    """The same for the parameters of layers with a rule."""
    for feature in layer_features(lin, found, x, directions=directions):
        layer, squares = feature.layer, _squares(feature)
        if isinstance(layer.module, nn.Embedding):
            squares = squares.mT
        elif layer.weight and layer.bias:
            squares, bias = squares[..., :-1], squares[..., -1]
            yield layer.parameters[1], bias.flatten()
        yield layer.parameters[0], squares.flatten()


def _squares(feature: LayerFeatures) -> Float[Tensor, "g z i"]:
    _, a, d = feature
    if _forms_none(feature):
        return d[:, :, :, 0].square().sum(1, dtype=torch.double).permute(1, 2, 0) @ a[
            :, :, 0
        ].square().double().transpose(0, 1)
    return gradient_rows(feature).square_().sum((0, 1), dtype=torch.double)


def _forms_none(feature: LayerFeatures) -> bool:
    """Whether there is one position, so that squares of gradients are products of squares."""
    return feature.inputs.shape[2] == 1 and feature.inputs.is_floating_point()


def _bytes(lin: Linearization, found: Found, x: Tensor, entries: int, memory: int) -> tuple[int, int]:
    """Working memory of one example: of its pass forward and the directions' entries, and of each direction.

    That is a pass backward, and the gradients that are formed, with their copies in float64 for the sums.
    """
    itemsize = lin.dtype.itemsize
    p = sum(lin.params[name].numel() for name in found.rest)
    inputs = gradients = 0
    for feature in layer_features(lin, found, x[:1], 0):
        if not _forms_none(feature):
            inputs = max(inputs, feature.inputs.numel())
            gradients = max(gradients, gradient_rows(feature).numel())
    fixed = 2 * (memory + entries * itemsize) + max(2 * inputs * itemsize, (8 + itemsize) * p)
    copied = 0 if lin.dtype == torch.double else 8
    return fixed, 2 * memory + max(gradients * (itemsize + copied), 2 * p * itemsize)
