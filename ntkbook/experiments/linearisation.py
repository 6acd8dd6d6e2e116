"""What chapter 1 needs to compare a network with its linearisation: wide networks, both trainings, many descents."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from ntkbook.experiments.networks import ACTIVATIONS
from ntkbook.linearize import Linearization


class Scale(nn.Module):
    """Multiplication by a fixed number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x

    def extra_repr(self) -> str:
        return f"{self.factor:.4g}"


def ntk_mlp(
    sizes: Sequence[int], activation: str = "tanh", *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    """A multilayer perceptron in the NTK parameterisation (Jacot et al., 2018): z = W a / √width + b, W, b ~ N(0, 1).

    A step of one learning rate then moves the function equally far at every width, and the kernel has a limit. The
    inputs are not scaled.

    Args:
        sizes: units a layer, from the inputs to the outputs: at least two numbers.
        activation: one of `networks.ACTIVATIONS`, between the layers.
        seed: of the initial parameters. The global random state is neither used nor changed.
        dtype: of the parameters.

    Raises:
        ValueError: fewer than two sizes, a size below 1, or an unknown activation.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must be at least two positive numbers, got {list(sizes)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=dtype)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        layers += [linear] if i == 0 else [ACTIVATIONS[activation](), Scale(inputs**-0.5), linear]
    return nn.Sequential(*layers)


def train_linearised(
    lin: Linearization, x: Float[Tensor, "n d"], y: Float[Tensor, "n"], x_star: Float[Tensor, "m d"], *, lr: float,
    epochs: int,
) -> Float[Tensor, " m"]:  # fmt: skip
    """What full-batch gradient descent on the mean squared error makes of a network's linearisation, at x_star.

    The linear counterpart of `training.train`, step for step. The parameters are θ₀ + J(x)ᵀα all the time, so the n
    numbers α are all there is to train: α ← α − (2 lr / n) (f₀ + K α − y), with K = J Jᵀ.

    Args:
        lin: the linearisation where training starts; one output.
        x, y: the training data.
        x_star: where the trained model is evaluated.
        lr: the learning rate.
        epochs: the number of steps.

    Raises:
        ArithmeticError: the learning rate is too large: 2 lr / n must not exceed 2 / (the largest eigenvalue of K).
    """
    gram = lin.gram(x)
    rate, limit = 2 * lr / len(y), 2 / float(torch.linalg.eigvalsh(gram)[-1])
    if rate > limit:
        raise ArithmeticError(f"lr = {lr} diverges: it must not exceed {limit * len(y) / 2:.3g} on these data")
    residual = lin.outputs(x)[:, 0] - y
    alpha = torch.zeros_like(y)
    for _ in range(epochs):
        alpha = alpha - rate * (residual + gram @ alpha)
    return lin.outputs(x_star)[:, 0] + lin.gram(x_star, x) @ alpha


def descend(
    loss: Callable[[Float[Tensor, " p"]], Float[Tensor, ""]],
    starts: Float[Tensor, "k p"],
    *,
    steps: int,
    every: int = 1,
) -> tuple[Float[Tensor, "stops k p"], Float[Tensor, "stops k"]]:
    """Gradient descent from k starts at once, each with a step size of its own.

    A step that lowers the loss is taken, and the next tries to go a tenth further; one that does not is not taken, and
    the next goes half as far. The loss never rises.

    Args:
        loss: of one parameter vector.
        starts: where to start.
        steps: how many steps to try.
        every: how many steps between two stops.

    Returns:
        Where each descent stood at the start, at every stop and at the end, and the loss there.
    """
    evaluate = vmap(grad_and_value(loss))
    theta = starts
    gradient, value = evaluate(theta)
    size = gradient.norm(dim=1, keepdim=True).reciprocal()  # a first step of length 1
    path, values = [theta], [value]
    for step in range(1, steps + 1):
        trial = theta - size * gradient
        trial_gradient, trial_value = evaluate(trial)
        better = (trial_value < value)[:, None]
        theta, gradient = torch.where(better, trial, theta), torch.where(better, trial_gradient, gradient)
        value = torch.where(better[:, 0], trial_value, value)
        size = size * torch.where(better, 1.1, 0.5)
        if step % every == 0 or step == steps:
            path.append(theta)
            values.append(value)
    return torch.stack(path), torch.stack(values)
