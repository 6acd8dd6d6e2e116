"""Parts of log probabilities and divergences, written so that nothing cancels or overflows."""

import math

import torch
from torch import Tensor


def centre(log_p: Tensor, u: Tensor) -> Tensor:
    """u − E_π[u], u (n, o, k). First u is made zero at the likeliest class: nothing cancels where π → 1 there."""
    u = u - u.take_along_dim(log_p.argmax(1, keepdim=True)[..., None], 1)
    return u - (log_p.exp()[..., None] * u).sum(1, keepdim=True)


def excess(log_w: Tensor, d: Tensor) -> Tensor:
    """w (eᵈ − 1 − d) >= 0, with a small relative error for every d: below |d| = 1 by its series."""
    small = d.abs() < 1
    x, y = d.where(small, 0), d.where(~small, 0)
    series = torch.ones_like(d)
    for k in range(20, 2, -1):  # two times the sum of xʲ / (j + 2)!, to rounding in its third derivative too
        series = 1 + series * x / k
    w = log_w.exp()
    return (w * x.square() * series / 2).where(small, (log_w + y).exp() - w * (1 + y))


def normal_log_prob(y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return -((y - mean).square() / variance + variance.log() + math.log(2 * math.pi)) / 2


def normal_kl(difference: Tensor, variance: Tensor, variance2: Tensor, change: Tensor) -> Tensor:
    """KL(N(m, v) ‖ N(m + difference, v₂)), where change = v₂ − v holds more digits than the subtraction would."""
    relative = change / variance
    small = relative.abs() < 0.5
    log_ratio = relative.where(small, 0).log1p().where(small, variance2.log() - variance.log())
    return (difference.square() / variance2 + excess(torch.zeros_like(log_ratio), -log_ratio)) / 2


def normal_sample(mean: Tensor, variance: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + variance.sqrt() * noise
