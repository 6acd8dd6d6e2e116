"""The networks of the experiments."""

from collections.abc import Sequence
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
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs, device="cpu", dtype=torch.float32), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1]).to(device=device, dtype=dtype)


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
