"""Training of an image classifier by stochastic gradient descent, BatchNorm in train mode: what Figure 5 goes through.

`training.train` is for many small networks at once and refuses BatchNorm in train mode; this is the usual loop for one.
"""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from tqdm.auto import tqdm

from ntkbook.experiments.training import DivergenceError

PADDING = 4  # pixels on each side, from which a crop is taken


def train_images(
    net: nn.Module,
    x: Float[Tensor, "n channels h w"],
    y: Int[Tensor, " n"],
    *,
    steps: int,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    decay_at: Sequence[float] = (0.5, 0.75),
    augment: bool = True,
    seed: int = 0,
    checkpoints: Sequence[int] = (),
    progress: bool | None = None,
    description: str = "training",
) -> tuple[dict[int, nn.Module], Float[Tensor, " steps"]]:
    """Trains a copy of a network on the mean cross-entropy by `torch.optim.SGD`, and keeps it as it was on the way.

    Every epoch goes through the images in a fresh random order; what is left over makes a last, smaller batch. An epoch
    is ⌈n / batch_size⌉ steps. Images are augmented as is usual on CIFAR-10: a random crop out of the image with 4 zeros
    on each side, mirrored or not. Results depend on the seed alone; the global random state is neither used nor
    changed.

    Args:
        net: maps (n, channels, h, w) to (n, classes). It is not changed. It is trained in train mode, whatever its own.
        x: images, standardised, so that a border of zeros is one of mean colour.
        y: their classes.
        steps: how many steps of the optimiser.
        lr: the learning rate.
        momentum: SGD's momentum.
        weight_decay: SGD's weight decay, of all parameters.
        batch_size: images a step.
        decay_at: divide the learning rate by 10 after these fractions of the steps.
        augment: whether to crop and mirror.
        seed: of the order and the augmentation.
        checkpoints: after which steps to keep the network, 0 for the beginning.
        progress: show a progress bar; None shows it on a terminal only.
        description: the progress bar's words.

    Returns:
        The network in eval mode after each of `checkpoints`, and after the last step in any case, by step in rising
        order; and the loss of every step's batch (steps,), at the parameters it was seen with.

    Raises:
        ValueError: arguments that do not fit each other, NaN in x, classes that are none of the network's.
        NotImplementedError: a network with Dropout, which draws from the global random state.
        DivergenceError: a loss or a parameter is no longer finite.
    """
    like = next(net.parameters())
    _check(net, x, y, steps, batch_size, decay_at, checkpoints)
    x, y = x.to(like), y.to(like.device)
    net = deepcopy(net).train()
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(len(x), batch_size, generator)
    losses, kept = like.new_empty(steps), {}
    if 0 in checkpoints:
        kept[0] = deepcopy(net).eval()
    bar = tqdm(range(1, steps + 1), desc=description, unit="step", disable=None if progress is None else not progress)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = lr / 10 ** sum(step > fraction * steps for fraction in decay_at)
        batch = next(batches).to(x.device)
        images = crop_and_mirror(x[batch], generator) if augment else x[batch]
        f = net(images)
        if step == 1 and (f.ndim != 2 or y.max() >= f.shape[1]):
            raise ValueError(f"the network must map to (n, classes), with classes to {y.max()}, got {tuple(f.shape)}")
        loss = cross_entropy(f, y[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses[step - 1] = loss.detach()
        keep = step in checkpoints or step == steps
        if not loss.isfinite() or (keep and not all(p.isfinite().all() for p in net.parameters())):
            raise DivergenceError(f"training diverged in step {step} of {steps} at learning rate {lr}: lower it")
        if keep:
            kept[step] = deepcopy(net).eval()
    return kept, losses


@torch.no_grad()
def settle(net: nn.Module, x: Float[Tensor, "n channels h w"], batch_size: int = 128) -> nn.Module:
    """A copy in eval mode whose BatchNorm statistics are those of the images: means over mini-batches.

    A network that has not been trained has statistics that fit no data, mean 0 and variance 1, and in eval mode its
    activations grow from block to block.
    """
    net = deepcopy(net).train()
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the mini-batches
    for part in x.split(batch_size):
        net(part)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return net.eval()


def crop_and_mirror(x: Float[Tensor, "n c h w"], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """A random crop of each image with 4 zeros on each side, mirrored left to right in half of the cases.

    What is drawn does not depend on the device: `generator` is one of the CPU.
    """
    n, _, height, width = x.shape
    top, left = torch.randint(2 * PADDING + 1, (2, n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    image, rows, columns = (
        index.to(x.device) for index in (torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None])
    )
    return pad(x, (PADDING,) * 4)[image, :, rows, columns].permute(0, 3, 1, 2).contiguous()


def _batches(n: int, size: int, generator: torch.Generator) -> Iterator[Int[Tensor, " batch"]]:
    while True:
        yield from torch.randperm(n, generator=generator).split(size)


def _check(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    steps: int,
    batch_size: int,
    decay_at: Sequence[float],
    checkpoints: Sequence[int],
) -> None:
    for name, module in net.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            raise NotImplementedError(
                f"{name} ({type(module).__name__}) draws from the global random state, which this loop leaves alone: "
                "set its p to 0, or leave it out"
            )
    if len(x) != len(y) or not len(x):
        raise ValueError(f"x has {len(x)} images and y has {len(y)} classes: they must be as many, and at least one")
    if not x.isfinite().all():
        raise ValueError("x has NaN or infinite entries: drop those images")
    if y.min() < 0:
        raise ValueError(f"y must be classes from 0 on, got {y.min()}")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    if not all(0 <= fraction <= 1 for fraction in decay_at):
        raise ValueError(f"decay_at must be fractions of the steps, from 0 to 1, got {list(decay_at)}")
    if not all(0 <= step <= steps and step == math.floor(step) for step in checkpoints):
        raise ValueError(f"checkpoints must be steps from 0 to {steps}, got {list(checkpoints)}")
