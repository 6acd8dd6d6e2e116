"""The networks of the experiments; those for colour images are in `convnets`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
}


def mlp(
    sizes: Sequence[int],
    activation: str = "tanh",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """A multilayer perceptron with PyTorch's default initialisation.

    The paper's are `mlp([1, 40, 40, 1])` for sinusoids and `mlp([1, 400, 1])` for precipitation (Appendix F).

    Args:
        sizes: units a layer, from the inputs to the outputs: at least two numbers.
        activation: name of the function between the layers; one of `ACTIVATIONS`. There is none after the last.
        seed: of the initial parameters. The global random state is neither used nor changed.
        dtype: of the parameters. They are drawn in float32 and converted, so that one seed is one network.
        device: where the parameters live.

    Raises:
        ValueError: fewer than two sizes, a size below 1, or an unknown activation.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(
            f"sizes must be at least two positive numbers (inputs, hidden units, ..., outputs), got {list(sizes)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    layers: list[nn.Module] = []
    with seeded(seed):
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs, device="cpu", dtype=torch.float32), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1]).to(device=device, dtype=dtype)


def lenet3(
    outputs: int = 10,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """A LeNet with three layers of weights for 28 x 28 images, given flat, (n, 784): 5,142 parameters with 10 outputs.

    The talk names "LeNet3" and does not define it. This is our definition: LeNet-5's two convolutions (6 and 16 of
    5 x 5), each followed by a maximum over 2 x 2, and one linear layer in place of its three; ReLU, no padding, and
    PyTorch's default initialisation.

    Args:
        outputs: classes, or whatever the outputs stand for.
        seed, dtype, device: as for `mlp`.

    Raises:
        ValueError: no outputs.
    """
    if outputs < 1:
        raise ValueError(f"outputs must be at least 1, got {outputs}")
    with seeded(seed):
        first, second, last = (
            nn.Conv2d(1, 6, 5, device="cpu", dtype=torch.float32),
            nn.Conv2d(6, 16, 5, device="cpu", dtype=torch.float32),
            nn.Linear(256, outputs, device="cpu", dtype=torch.float32),
        )
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        first, nn.ReLU(), nn.MaxPool2d(2),
        second, nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), last,
    ).to(device=device, dtype=dtype)  # fmt: skip


def split_last(net: nn.Module) -> tuple[nn.Sequential, nn.Linear]:
    """A network as its features and its last layer: `net(x) == last(features(x))`. Both share its parameters.

    Raises:
        TypeError: not an `nn.Sequential` that ends in an `nn.Linear`.
    """
    last = net[-1] if isinstance(net, nn.Sequential) and len(net) else None
    if not isinstance(net, nn.Sequential) or not isinstance(last, nn.Linear):
        raise TypeError(
            "the last layer can be told apart only in an nn.Sequential that ends in an nn.Linear, got "
            f"{type(net).__name__}: wrap the network as nn.Sequential(features, nn.Linear(...))"
        )
    return net[:-1], last


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global random state set by `seed` inside, and afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        yield
