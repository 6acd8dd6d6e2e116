"""Gradients in the parameters of any network: every example's own, and those of blocks of vectors.

The fast ways are torch.func's, and torch.func has wrong rules for some operations, without a word (torch 2.15: two
vmaps over nn.PReLU, any over the derivative of torch.cdist in a batch of vectors), and none for others. So each result
is compared with plain autograd on the same inputs, in one product with random numbers, and where it differs a slower
way is taken: in the end autograd itself, one example and one vector at a time.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.func import vjp, vmap

from ntkbook.checks import explained
from ntkbook.functional import FunctionalNetwork

Directions = Callable[[Float[Tensor, "n o"]], Float[Tensor, "k n o"]]
"""For outputs f, the vectors that gradients of products with f are wanted for."""


def units(f: Float[Tensor, "n o"], output: int | None = None) -> Float[Tensor, "k n o"]:
    """Every output alone, or one."""
    basis = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)[:, None].expand(-1, len(f), -1)
    return basis if output is None else basis[output, None]


def example_gradients(
    lin: FunctionalNetwork, names: Iterable[str], x: Shaped[Tensor, "n ..."], directions: Directions = units
) -> dict[str, Float[Tensor, "n k ..."]]:
    """Every example's gradients of its k products of f with the directions, in the parameters of these names."""
    params = {name: lin.params[name] for name in names}
    with explained("jacobian"), torch.no_grad():
        with torch.enable_grad():
            leaves = leaves_of(params)
            f = lin._call({**lin.params, **leaves}, x)
        basis = directions(f.detach())
        weights = random(basis[..., 0])
        sums = gradient(f, leaves, torch.einsum("kn,kno->no", weights, basis), retain_graph=False)
        del f
        for way in range(lin._way, len(WAYS)):
            try:
                with quiet():
                    found = WAYS[way](lin, params, x, basis)
            except RuntimeError as error:
                if WAYS[way] is _one_by_one or isinstance(error, torch.OutOfMemoryError):
                    raise
                continue
            if agree((torch.tensordot(weights.T, rows, dims=2) for rows in found.values()), sums.values()):
                if WAYS[way] is _one_by_one and lin._way < way:
                    _warn_that_it_is_slow()
                lin._way = way  # those before it are not tried again
                return found
    raise ValueError(
        "An example's gradients depend on the others in its batch, so the network has no Jacobian of one example. "
        "Usual causes: a statistic or a sum over dimension 0, a choice made for the whole batch, scale_grad_by_freq."
    )


def jacobian_rows(
    lin: FunctionalNetwork, names: Iterable[str], x: Shaped[Tensor, "n ..."], output: int | None = None
) -> Float[Tensor, "n o p"]:
    """Every example's Jacobian in the parameters of these names, of all outputs or of one."""
    found = example_gradients(lin, names, x, lambda f: units(f, output))
    return torch.cat([rows.reshape(*rows.shape[:2], -1) for rows in found.values()], dim=2)


def differentiable_rows(
    lin: FunctionalNetwork, x: Float[Tensor, "n ..."], output: int | None = None
) -> Float[Tensor, "n o p"]:
    """The same in all parameters and differentiable in x, by plain autograd.

    Not by torch.func, whose second derivatives of operations with several outputs, such as layer_norm and
    group_norm, are wrong without a word (torch 2.15, against finite differences), nor by batched gradients, which
    fail there (torch 2.11).
    """
    with torch.no_grad():
        basis = units(lin._call(lin.params, x), output)
    found = _one_by_one(lin, lin.params, x, basis, create_graph=True)
    return torch.cat([rows.reshape(*rows.shape[:2], -1) for rows in found.values()], dim=2)


def input_gradient(
    lin: FunctionalNetwork, x: Float[Tensor, "n ..."], u: Float[Tensor, "n o k"], v: Float[Tensor, "p k"], size: int
) -> Float[Tensor, "n ..."]:
    """The gradient of Σₖ uₖᵀ J(x) vₖ in x, `size` examples at a time.

    By plain autograd, as `differentiable_rows`, a vector at a time: nothing of n·p is held this way.
    """
    gradients = []
    for part, weights in zip(x.split(size), u.split(size)):
        part = part.detach().requires_grad_()
        total = torch.zeros_like(part)
        with explained("backward"), torch.enable_grad():
            leaves = leaves_of(lin.params)
            f = lin._call(leaves, part)
            for one, direction in zip(weights.unbind(-1), v.T):
                value = (lin.flatten(gradient(f, leaves, one, create_graph=True)) * direction).sum()
                if value.requires_grad:
                    total += torch.autograd.grad(value, part, retain_graph=True, materialize_grads=True)[0]
        gradients.append(total)
    return torch.cat(gradients)


def pull_back(
    lin: FunctionalNetwork, x: Shaped[Tensor, "n ..."], create_graph: bool = False
) -> Callable[[Float[Tensor, "n o"]], Float[Tensor, " p"]]:
    """u -> J(x)ᵀ u, by one run of the network; differentiable in u if asked."""
    with torch.enable_grad():
        leaves = leaves_of(lin.params)
        f = lin._call(leaves, x)
    return lambda u: lin.flatten(gradient(f, leaves, u, create_graph))


def push_forward(
    lin: FunctionalNetwork, x: Shaped[Tensor, "n ..."], create_graph: bool = False
) -> Callable[[Float[Tensor, " p"]], Float[Tensor, "n o"]]:
    """v -> J(x) v without forward mode: the derivative of the linear map u -> J(x)ᵀ u."""
    with torch.enable_grad():
        u = lin._call(lin.params, x).detach().zero_().requires_grad_()
        back = pull_back(lin, x, create_graph=True)(u)
    if not back.requires_grad:
        return lambda v: torch.zeros_like(u)
    options = {"retain_graph": True, "create_graph": create_graph, "materialize_grads": True}
    return lambda v: torch.autograd.grad(back, u, v, **options)[0]


def in_columns(
    lin: FunctionalNetwork, key: tuple, one: Callable[[Tensor], Tensor], block: Float[Tensor, "k ..."], chunk_size: int
) -> Float[Tensor, "k ..."]:
    """A linear map of every column of a block, vectorised where that is seen to be right: once for each key."""
    key = (*key, len(block))
    if len(block) > 1 and lin._vectorises.get(key, True):
        try:
            with quiet():
                found = vmap(one, chunk_size=chunk_size)(block)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            found = None
        if key not in lin._vectorises:
            with torch.no_grad():
                weights = random(block[(slice(None),) + (0,) * (block.ndim - 1)])
                want = one(torch.tensordot(weights, block.detach(), dims=1))
                right = found is not None and agree([torch.tensordot(weights, found.detach(), dims=1)], [want])
            lin._vectorises[key] = right
        if found is not None and lin._vectorises[key]:
            return found
    return torch.stack([one(column) for column in block])


# ------------------------------------------------------------------ ways to every example's gradients


def _all_at_once(
    lin: FunctionalNetwork, params: Mapping[str, Tensor], x: Tensor, basis: Float[Tensor, "k n o"]
) -> dict[str, Tensor]:
    def gradients(example: Tensor, directions: Float[Tensor, "k o"]) -> dict[str, Tensor]:
        pull = vjp(lambda p: lin._call({**lin.params, **p}, example[None])[0], dict(params))[1]
        return vmap(lambda u: pull(u)[0])(directions)

    return vmap(gradients, in_dims=(0, 1))(x, basis)


def _by_direction(
    lin: FunctionalNetwork, params: Mapping[str, Tensor], x: Tensor, basis: Float[Tensor, "k n o"]
) -> dict[str, Tensor]:
    def gradients(example: Tensor, u: Float[Tensor, " o"]) -> dict[str, Tensor]:
        return vjp(lambda p: lin._call({**lin.params, **p}, example[None])[0], dict(params))[1](u)[0]

    found = [vmap(gradients)(x, directions) for directions in basis]
    return {name: torch.stack([one[name] for one in found], dim=1) for name in params}


def _one_by_one(
    lin: FunctionalNetwork,
    params: Mapping[str, Tensor],
    x: Tensor,
    basis: Float[Tensor, "k n o"],
    create_graph: bool = False,
) -> dict[str, Tensor]:
    found = []
    for example, directions in zip(x.split(1), basis.split(1, dim=1)):
        with torch.enable_grad():
            leaves = leaves_of(params)
            f = lin._call({**lin.params, **leaves}, example)
            found += [gradient(f, leaves, u, create_graph=create_graph) for u in directions]
    return {name: torch.stack([one[name] for one in found]).unflatten(0, (len(x), -1)) for name in params}


WAYS = (_all_at_once, _by_direction, _one_by_one)


def _warn_that_it_is_slow() -> None:
    warnings.warn(
        "torch.func cannot differentiate this network, so the gradients of examples are taken one at a time by plain "
        "autograd, which is right but slow. Usual causes: nn.RNN, nn.GRU, nn.LSTM, an if on a tensor's value, rows "
        "chosen by a mask, an in-place operation. What needs no gradient of one example stays fast: vjp, jvp, and "
        'NTKGP(..., space="parameter").',
        stacklevel=2,
    )


# ------------------------------------------------------------------ plain autograd, and comparing with it


def leaves_of(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values, to differentiate in."""
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def gradient(
    f: Tensor, leaves: Mapping[str, Tensor], u: Tensor, create_graph: bool = False, retain_graph: bool = True
) -> dict[str, Tensor]:
    """The gradient of u·f in the leaves."""
    if not f.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    options = {"create_graph": create_graph, "retain_graph": retain_graph, "materialize_grads": True}
    return dict(zip(leaves, torch.autograd.grad(f, list(leaves.values()), u, **options)))


def random(like: Tensor) -> Tensor:
    """Normal numbers, the same in every run, that leave torch's own generator alone."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=generator).to(device=like.device, dtype=like.dtype)


def agree(got: Iterable[Tensor], want: Iterable[Tensor], ord: int | float = 2) -> bool:
    """Whether tensors are the same but for rounding: one by one, in a norm, where `want` is finite.

    An error in a rule is of the size of its result. What may differ between two ways of computing is less than the
    tolerance, also where a ReLU's input is rounded to the other side of 0, or where products have the 10 bits of TF32.
    """
    pairs = [(one - other, other) for one, other in zip(got, want)]
    if not pairs:
        return True
    return _small(pairs, ord) or _small(
        [tuple(torch.where(other.isfinite(), part, 0) for part in (difference, other)) for difference, other in pairs],
        ord,
    )


def _small(pairs: Iterable[tuple[Tensor, ...]], ord: int | float) -> bool:
    norms = torch.stack([torch.linalg.vector_norm(part, ord) for pair in pairs for part in pair]).view(-1, 2)
    (differences, sizes), eps = norms.T, torch.finfo(norms.dtype).eps
    bounds = min(0.1, 32 * eps**0.5) * sizes + 100 * eps * sizes.max()  # where one is all rounding, as of a key's bias
    return bool((differences <= bounds).all())


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings that vmap has to loop inside: nobody who sees them can do anything about them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield
