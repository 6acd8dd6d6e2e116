"""Fisher matrices as their definition says: dense, an example at a time, in float64."""

import copy

import torch
from oracles.jacobian import loop_jacobian
from torch import Tensor, nn

from ntkbook.likelihoods import Likelihood


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    f = net(x.clone()).detach()
    return f[:, None] if f.ndim == 1 else f


def dense_fisher(net: nn.Module, x: Tensor, likelihood: Likelihood) -> Tensor:
    """The sum of JᵀHJ, H by differentiating KL(p(y | f) ‖ p(y | f₂)) twice in f₂, not by the library's closed form."""
    jacobian, f = loop_jacobian(net, x), outputs(net, x)
    rows = jacobian.unflatten(0, f.shape)
    total = jacobian.new_zeros(jacobian.shape[1], jacobian.shape[1])
    for one, row in zip(f.split(1), rows):
        h = torch.autograd.functional.hessian(lambda g, one=one: likelihood.kl(one, g[None]).sum(), one[0])
        total += row.T @ h @ row
    return total


def dense_empirical(net: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood) -> Tensor:
    """The sum of g gᵀ, one backward pass an example."""
    net = copy.deepcopy(net)
    chosen = [value for value in net.parameters() if value.requires_grad]
    total = 0
    for i in range(len(x)):
        f = net(x[i : i + 1].clone())
        value = likelihood.log_prob(f[:, None] if f.ndim == 1 else f, y[i : i + 1]).sum()
        g = torch.cat([part.flatten() for part in torch.autograd.grad(value, chosen, materialize_grads=True)])
        total = total + g.outer(g)
    return total
