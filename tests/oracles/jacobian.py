"""The Jacobian as its definition says: one autograd call an example and output, on a copy of the network."""

import copy

import torch
from torch import Tensor, nn


def loop_jacobian(net: nn.Module, x: Tensor, names: list[str] | None = None) -> Tensor:
    """(n·o, p): the derivatives of output c of example i in row i·o + c, parameters in the network's order."""
    net = copy.deepcopy(net)
    own = dict(net.named_parameters())
    chosen = [value for name, value in own.items() if (value.requires_grad if names is None else name in names)]
    for value in chosen:
        value.requires_grad_()
    rows = []
    for i in range(len(x)):
        outputs = net(x[i : i + 1].clone()).reshape(-1)
        for c in range(len(outputs)):
            if outputs.requires_grad:
                gradients = torch.autograd.grad(outputs[c], chosen, retain_graph=True, allow_unused=True)
            else:
                gradients = [None] * len(chosen)
            parts = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, chosen)]
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows).detach()
