"""The one training loop: stochastic gradient descent with momentum, for any number of networks at once.

Networks of one architecture are stacked, and every step is taken for all of them by one call (`torch.func.vmap`):
ninety small networks take little longer than one. Each network sees its own data in its own order, and ends up where
it would have ended alone.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from tqdm.auto import tqdm

from ntkbook.experiments.networks import split_last
from ntkbook.likelihoods import Likelihood

Nets = TypeVar("Nets", bound=nn.Module | Sequence[nn.Module])


class DivergenceError(ArithmeticError):
    """Training left the finite numbers; the message says which network did, and in which epoch."""


def train(
    nets: Nets,
    x: Float[Tensor, "*tasks n d"],
    y: Real[Tensor, "*others n o"],
    *,
    lr: float,
    epochs: int,
    momentum: float = 0.0,
    decay_every: int | None = None,
    batch_size: int | None = None,
    likelihood: Likelihood | None = None,
    seed: int | Sequence[int] = 0,
    only: str | Iterable[str] | None = None,
    on_divergence: str = "raise",
    progress: bool | None = None,
    description: str = "training",
) -> tuple[Nets, Float[Tensor, "*networks epochs"]]:
    """Train copies of networks by SGD with momentum (Appendix F's training), on the mean squared error or a likelihood.

    The update is that of `torch.optim.SGD(lr=lr, momentum=momentum)`. Every epoch goes through the points in a fresh
    random order; what is left over makes a last, smaller batch. The loss of a batch is the mean over its observed
    targets (0 if it has none), so in a full batch a NaN target is as good as a point left out.

    Args:
        nets: a network, or T of one architecture. They are not changed.
        x: inputs, (n, d) for all networks or (T, n, d). Data are converted to the networks' dtype and device.
        y: targets, (n, o) for all networks or (T, n, o); NaN = not observed. Integers are classes.
        lr: the learning rate.
        epochs: how often each network sees each point.
        momentum: SGD's momentum.
        decay_every: divide the learning rate by 10 after every so many epochs; None keeps it.
        likelihood: p(y | f) of one target a point, whose mean −log p(y | f) is the loss. None: the squared error.
        batch_size: points a step; None for all of them at once, which needs no order.
        seed: of the order of the points: one number a network, or one number from which all are derived.
        only: the parameters to train: "last" for the last layer's, or their names. None: all that require a gradient.
        on_divergence: "raise", or "mark": train the others on, and return those that diverged with all their trained
            parameters NaN, so that whatever is computed from them is NaN too.
        progress: show a progress bar; None shows it on a terminal only.
        description: the progress bar's words.

    Returns:
        The trained network(s), and the loss (epochs,) or (T, epochs): mean over the observed targets of an epoch, each
        at the parameters it was seen with. `~loss.isfinite().all(-1)` are those that diverged.

    Raises:
        ValueError: shapes that do not fit, NaN inputs, a task without any target, targets that the likelihood cannot
            take, an unknown parameter, decay_every below 1.
        NotImplementedError: a network with Dropout or BatchNorm in train mode.
        DivergenceError: a loss or a parameter is no longer finite.
    """
    single = isinstance(nets, nn.Module)
    originals = [nets] if isinstance(nets, nn.Module) else list(nets)
    _check_modes(originals)
    if on_divergence not in ("raise", "mark"):
        raise ValueError(f'on_divergence must be "raise" or "mark", got {on_divergence!r}')
    template, count = originals[0], len(originals)
    like = next(template.parameters())
    if decay_every is not None and decay_every < 1:
        raise ValueError(f"decay_every must be a positive number of epochs, got {decay_every}: None keeps the rate")
    classes = not y.is_floating_point()
    x, y, observed = check_data(count, x.to(like), y.to(like))
    if likelihood is not None and y.shape[-1] != 1:
        raise ValueError(f"y must have one target a point, (n, 1) or (T, n, 1), for a likelihood, got {tuple(y.shape)}")
    if likelihood is not None:  # vmap hides values: what y may be is checked here
        with torch.no_grad():
            for t, net in enumerate(originals):
                seen = observed[t, :, 0]
                likelihood.log_prob(net(x[t, seen][:1]).expand(int(seen.sum()), -1), _as_targets(y[t, seen], classes))
    n = x.shape[1]
    batch_size = n if batch_size is None else min(batch_size, n)
    generators = _generators(seed, count)

    parameters, buffers = stack_module_state(originals)
    names = _trained_names(template, only)
    trained = {name: parameters[name].detach().clone() for name in names}
    fixed = {name: p.detach() for name, p in parameters.items() if name not in trained} | buffers

    def batch_loss(trained, fixed, x, y, weight):
        f = functional_call(template, trained | fixed, (x,))
        if likelihood is None:
            return (weight * (f - y).square()).sum()
        return -(weight[:, 0] * likelihood.log_prob(f, _as_targets(y, classes))).sum()

    gradient = vmap(grad_and_value(batch_loss))
    velocity = {name: torch.zeros_like(p) for name, p in trained.items()}
    loss = like.new_empty(count, epochs)
    rows = torch.arange(count, device=x.device)[:, None]
    total = observed.sum((1, 2), dtype=like.dtype)
    bar = tqdm(range(epochs), desc=description, unit="epoch", disable=None if progress is None else not progress)
    for epoch in bar:
        rate = lr / 10 ** (epoch // (decay_every or epochs))
        x_epoch, y_epoch, seen = x, y, observed
        if batch_size < n:
            order = torch.stack([torch.randperm(n, generator=g) for g in generators]).to(x.device)
            x_epoch, y_epoch, seen = x[rows, order], y[rows, order], observed[rows, order]
        summed = like.new_zeros(count)
        for batch in zip(*(part.split(batch_size, dim=1) for part in (x_epoch, y_epoch, seen))):
            counted = batch[2].sum((1, 2), dtype=like.dtype)
            weight = batch[2] / counted.clamp(min=1)[:, None, None]
            gradients, value = gradient(trained, fixed, batch[0], batch[1], weight)
            for name, parameter in trained.items():
                velocity[name].mul_(momentum).add_(gradients[name])
                parameter.sub_(velocity[name], alpha=rate)
            summed += value * counted
        loss[:, epoch] = summed / total
        if on_divergence == "raise" and not loss[:, epoch].isfinite().all():
            _raise_divergence(~loss[:, epoch].isfinite(), f"in epoch {epoch + 1} of {epochs}", lr)

    finite = torch.stack([v.flatten(1).isfinite().all(1) for v in trained.values()]).all(0) & loss.isfinite().all(1)
    if on_divergence == "raise" and not finite.all():
        _raise_divergence(~finite, f"in the last step of epoch {epochs}", lr)
    copies = [deepcopy(net) for net in originals]
    with torch.no_grad():
        for t, copy in enumerate(copies):
            for name, value in trained.items():
                copy.get_parameter(name).copy_(torch.where(finite[t], value[t], torch.nan))
    return cast(tuple[Nets, Tensor], (copies[0], loss[0]) if single else (copies, loss))


def _check_modes(nets: Sequence[nn.Module]) -> None:
    if not nets:
        raise ValueError("there is no network to train: the list is empty")
    for name, module in (item for net in nets for item in net.named_modules()):
        if module.training and isinstance(module, _NormBase | _DropoutNd):
            raise NotImplementedError(
                f"{name} ({type(module).__name__}) is in train mode, which makes networks random or changes their "
                "buffers: this loop does neither. Call net.eval() first, or leave such layers out"
            )


def _as_targets(y: Float[Tensor, "n 1"], classes: bool) -> Tensor:
    return y[:, 0].long() if classes else y


def check_data(
    tasks: int, x: Float[Tensor, "*tasks n d"], y: Float[Tensor, "*others n o"]
) -> tuple[Float[Tensor, "T n d"], Float[Tensor, "T n o"], Bool[Tensor, "T n o"]]:
    for name, value in (("x", x), ("y", y)):
        if value.ndim not in (2, 3) or (value.ndim == 3 and value.shape[0] != tasks) or value.shape[-2] == 0:
            raise ValueError(
                f"{name} must be (n, columns) or (T, n, columns) with T = {tasks} networks and n > 0, got "
                f"{tuple(value.shape)}: a single column needs unsqueeze(-1)"
            )
    if x.shape[-2] != y.shape[-2]:
        raise ValueError(f"x has {x.shape[-2]} points and y has {y.shape[-2]}: they must be the same points")
    if not x.isfinite().all():
        raise ValueError("x has NaN or infinite entries: drop those points. Only y may have NaN, for not observed")
    if y.isinf().any():
        raise ValueError("y has infinite entries: only finite values and NaN, for not observed, are possible")
    x, y = (value.expand(tasks, *value.shape[-2:]) for value in (x, y))
    observed = ~y.isnan()
    empty = (~observed.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"no target is observed for network(s) {empty}: leave these tasks out")
    return x, y.nan_to_num(), observed


def _generators(seed: int | Sequence[int], tasks: int) -> list[torch.Generator]:
    seeds = list(seed) if isinstance(seed, Sequence) else np.random.SeedSequence(seed).generate_state(tasks).tolist()
    if len(seeds) != tasks:
        raise ValueError(f"seed must be one number, or one for each of the {tasks} networks, got {len(seeds)} numbers")
    return [torch.Generator().manual_seed(int(s)) for s in seeds]


def _trained_names(net: nn.Module, only: str | Iterable[str] | None) -> list[str]:
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    if only == "last":
        last = {id(p) for p in split_last(net)[1].parameters()}
        names = [name for name, p in net.named_parameters() if id(p) in last]
    elif only is not None:
        only = [only] if isinstance(only, str) else list(only)
        unknown = set(only) - {name for name, _ in net.named_parameters()}
        if unknown:
            known = [name for name, _ in net.named_parameters()]
            raise ValueError(f"the network has no parameters {sorted(unknown)}: it has {known}")
        names = only
    if not names:
        raise ValueError("there is nothing to train: the network has no parameter that requires a gradient")
    return names


def _raise_divergence(diverged: Bool[Tensor, "T"], when: str, lr: float) -> None:
    which = diverged.nonzero().flatten().tolist()
    raise DivergenceError(
        f"network(s) {which} of {len(diverged)} diverged {when} at learning rate {lr}: lower it or rescale the "
        'targets, or pass on_divergence="mark" to train the others on and get these back as NaN'
    )
