"""Everybody's way to Gram matrices and to products, each as its own documentation does it."""

import copy
import warnings
from collections.abc import Callable
from functools import partial

import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact
from curvlinops import GGNLinearOperator, JacobianLinearOperator
from gpytorch.kernels import LinearKernel
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from benchmarks.harness import Competitor, Prepared
from ntkbook import FisherOperator, Linearization, fisher_diagonal, fisher_vector_product
from ntkbook.likelihoods import get_likelihood
from ntkbook.operators import NTKOperator

CHUNKS = (256, 64, 16)  # the largest first: it is the one most likely to keep within the time limit
HOOKS = "Full backward hook is firing"  # what BackPACK's hooks make torch warn of, and needs nothing done


def tensors(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in net.named_parameters()}


# ------------------------------------------------------------------ Gram matrices


def contracted(jacobians: Callable[[Tensor], list[Tensor]], inputs: tuple, size: int | None) -> Tensor:
    """Per-example Jacobians of two chunks, (n, o, ...) a parameter, contracted a parameter at a time; one half only."""
    (x,) = inputs
    size = size or len(x)
    out = x.new_empty(0)
    for i in range(0, len(x), size):
        left = jacobians(x[i : i + size])
        o = left[0].shape[1]
        out = out if len(out) else x.new_empty(len(x) * o, len(x) * o)
        for j in range(i, len(x), size):
            right = left if j == i else jacobians(x[j : j + size])
            pairs = zip(left, right)
            block = sum(torch.einsum("nap,mbp->namb", a.flatten(2), b.flatten(2)) for a, b in pairs)
            block = block.flatten(2).flatten(0, 1)
            rows, columns = slice(i * o, i * o + block.shape[0]), slice(j * o, j * o + block.shape[1])
            out[rows, columns] = block
            out[columns, rows] = block.T
    return out


def func_jacobians(net: nn.Module, x: Tensor) -> list[Tensor]:
    """vmap over jacrev, as in torch.func's tutorial."""
    one = jacrev(lambda p, e: functional_call(net, p, (e[None],))[0])
    return [part.detach() for part in vmap(one, (None, 0))(tensors(net), x).values()]


def backpack_jacobians(net: nn.Module, x: Tensor) -> list[Tensor]:
    """BackPACK's gradients of single examples, an output after the other; `net` is extended."""
    outputs: list[list[Tensor]] = []
    for c in range(net(x[:1]).shape[1]):
        with backpack(BatchGrad()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", HOOKS)
            warnings.filterwarnings("ignore", ".*does not have an extension for Module")  # a container of others
            net(x)[:, c].sum().backward()
        outputs.append([value.grad_batch for value in net.parameters()])
    net.zero_grad(set_to_none=True)
    return [torch.stack(parts, 1) for parts in zip(*outputs)]


def vector_products(net: nn.Module, inputs: tuple, size: int | None) -> Tensor:
    """torch.func's second way: J(x₁) J(x₂)ᵀ e for every pair of examples by a vjp and a jvp, vectorised over chunks."""
    (x,) = inputs
    params = tensors(net)

    def call(example: Tensor, p: dict[str, Tensor]) -> Tensor:
        return functional_call(net, p, (example[None],))[0]

    def pair(one: Tensor, other: Tensor) -> Tensor:
        f, pull = vjp(partial(call, one), params)

        def push(u: Tensor) -> Tensor:
            return jvp(partial(call, other), (params,), pull(u))[1]

        return vmap(push)(torch.eye(len(f), dtype=f.dtype))

    block = vmap(vmap(pair, (None, 0)), (0, None))
    rows = [torch.cat([block(a, b) for b in x.split(size or len(x))], 1) for a in x.split(size or len(x))]
    return torch.cat(rows).transpose(1, 2).flatten(2).flatten(0, 1)  # (n, n, o, o): the order of rows


def linear_operator(net: nn.Module, x: Tensor) -> JacobianLinearOperator:
    """(Its targets are ignored.)"""
    return JacobianLinearOperator(net, list(net.parameters()), [(x, x)], check_deterministic=False)


def identity_products(net: nn.Module, inputs: tuple, size: int | None) -> Tensor:
    """curvlinops: J (Jᵀ I), a chunk of the identity's columns at a time."""
    operator = linear_operator(net, inputs[0])
    eye = torch.eye(operator.shape[0], dtype=inputs[0].dtype)
    return torch.cat([operator @ (operator.adjoint() @ part) for part in eye.split(size or len(eye), 1)], 1)


def explicit(net: nn.Module, inputs: tuple, size: int | None) -> Tensor:
    jacobian = Linearization(net).jacobian(inputs[0])
    return jacobian @ jacobian.T


def gpytorch_linear(net: nn.Module, inputs: tuple, size: int | None) -> Tensor:
    kernel = LinearKernel().to(inputs[0].dtype)
    kernel.variance = 1.0
    with torch.no_grad():
        return kernel(Linearization(net).jacobian(inputs[0])).to_dense()


def gram(net: nn.Module, output: int | None = None) -> dict[str, Competitor]:
    extended = extend(copy.deepcopy(net), use_converter=False)  # its hooks stay
    lin = Linearization(net)
    return {
        "ntkbook": Competitor(lambda inputs, size: lin.gram(inputs[0], output=output)),
        "torch.func contraction": Competitor(partial(contracted, partial(func_jacobians, net)), (1024, *CHUNKS)),
        "torch.func NTK-vector products": Competitor(partial(vector_products, net), (32, 8)),
        "curvlinops J (Jᵀ I)": Competitor(partial(identity_products, net), CHUNKS),
        "BackPACK contraction": Competitor(partial(contracted, partial(backpack_jacobians, extended)), (1024, *CHUNKS)),
        "GPyTorch LinearKernel on J": Competitor(partial(gpytorch_linear, net)),
        "explicit J Jᵀ": Competitor(partial(explicit, net)),
    }


# ------------------------------------------------------------------ products; inputs are (x, V)


def ours(lin: Linearization, inputs: tuple, size: int | None) -> Tensor:
    x, v = inputs
    return lin.jvp(x, lin.vjp(x, v.view(len(x), -1, v.shape[1]))).flatten(0, 1)


def double_backward(net: nn.Module, inputs: tuple, size: int | None) -> Tensor:
    """Appendix A's three backward calls, a column at a time."""
    x, v = inputs
    parameters, columns = list(net.parameters()), []
    for u in v.T:
        f = net(x)
        dummy = torch.zeros_like(f, requires_grad=True)
        back = torch.autograd.grad(f, parameters, dummy, create_graph=True)
        w = torch.autograd.grad(f, parameters, u.view_as(f), retain_graph=True)
        columns.append(torch.autograd.grad(back, dummy, w)[0].flatten())
    return torch.stack(columns, 1)


def products(net: nn.Module) -> dict[str, Competitor]:
    lin = Linearization(net)

    def operator(inputs: tuple, size: int | None) -> Tensor:
        jacobian = linear_operator(net, inputs[0])
        return jacobian @ (jacobian.adjoint() @ inputs[1])

    return {
        "ntkbook": Competitor(partial(ours, lin)),
        "ntkbook, by the Gram matrix": Competitor(lambda inputs, size: lin.gram(inputs[0]) @ inputs[1]),
        "ntkbook, automatic choice": Competitor(lambda inputs, size: NTKOperator(lin, inputs[0]) @ inputs[1]),
        "double backward, column by column": Competitor(partial(double_backward, net)),
        "curvlinops J (Jᵀ V)": Competitor(operator),
    }


# ------------------------------------------------------------------ Fisher-vector products; inputs are (x, V)


def gradient(net: nn.Module, forward: bool, inputs: tuple, size: int | None) -> Tensor:
    """One gradient of the cross-entropy, and one pass forward more where wanted: the units of Figures 5 and 6."""
    f = torch.empty(0)
    for part in inputs[0].split(size or len(inputs[0])):
        f = net(part)
        nn.functional.cross_entropy(f, torch.zeros(len(part), dtype=torch.long), reduction="sum").backward()
        if forward:
            with torch.no_grad():
                net(part)
    net.zero_grad(set_to_none=True)
    return f.detach()


def fisher(net: nn.Module, sizes: tuple[int | None, ...]) -> dict[str, Competitor]:
    """Ratios are in gradients: the first row."""
    lin, other = Linearization(net), copy.deepcopy(net)

    def method(name: str, inputs: tuple, size: int | None) -> Tensor:
        return fisher_vector_product(lin, *inputs, method=name, chunk_size=size)

    def operator(name: str, inputs: tuple, size: int | None) -> FisherOperator:
        return FisherOperator(lin, inputs[0], method=name)

    def ggn(inputs: tuple, size: int | None) -> Tensor:
        x, v = inputs
        data = [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(size or len(x))]
        loss = nn.CrossEntropyLoss(reduction="sum")
        return GGNLinearOperator(net, loss, list(net.parameters()), data, check_deterministic=False) @ v

    rough = 0.05  # by differences: the step's own error, and rounding over a step in float32
    series = {  # products with one operator, which keeps what does not depend on the vector
        name: Prepared(partial(operator, f"{name}_difference"), lambda made, inputs, size: made @ inputs[1])
        for name in ("forward", "central")
    }
    return {
        "one gradient": Competitor(partial(gradient, other, False), sizes, agrees=False),
        "one gradient and forward": Competitor(partial(gradient, other, True), sizes, agrees=False),
        "ntkbook, exact": Competitor(partial(method, "exact"), sizes),
        "ntkbook, double backward": Competitor(partial(method, "double_backward"), sizes),
        "ntkbook, forward difference": Competitor(partial(method, "forward_difference"), sizes, rough),
        "ntkbook, central difference": Competitor(partial(method, "central_difference"), sizes, rough),
        **{
            f"ntkbook, {name} difference, of a series": Competitor(way, tolerance=rough, prepare=way.prepare)
            for name, way in series.items()
        },
        "curvlinops GGN": Competitor(ggn, sizes),
    }


# ------------------------------------------------------------------ the Fisher matrix's diagonal


def diagonal(net: nn.Module) -> dict[str, Competitor]:
    params, extended = tensors(net), extend(copy.deepcopy(net))
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))

    def per_sample(inputs: tuple, size: int | None) -> Tensor:
        """vmap over grad as in torch's tutorial, for one column of the root of H after the other."""
        (x,) = inputs
        one = grad(lambda p, e, u: functional_call(net, p, (e[None],))[0] @ u)
        total: Tensor | float = 0.0
        for part in x.split(size or len(x)):
            for u in get_likelihood("categorical").root(net(part).detach()).unbind(2):
                found = vmap(one, (None, 0, 0))(params, part, u).values()
                total = total + torch.cat([g.square().sum(0, dtype=torch.double).flatten() for g in found])
        return total / len(x)

    def by_backpack(inputs: tuple, size: int | None) -> Tensor:
        """DiagGGNExact of the cross-entropy, whose Hessian in the logits needs no labels."""
        (x,) = inputs
        total: Tensor | float = 0.0
        for part in x.split(size or len(x)):
            with backpack(DiagGGNExact()), warnings.catch_warnings():
                warnings.filterwarnings("ignore", HOOKS)
                loss(extended(part), torch.zeros(len(part), dtype=torch.long)).backward()
            total = total + torch.cat([p.diag_ggn_exact.double().flatten() for p in extended.parameters()])
        extended.zero_grad(set_to_none=True)
        return total / len(x)

    return {
        "ntkbook, by layers": Competitor(lambda inputs, size: fisher_diagonal(net, inputs[0])),
        "torch.func per-sample gradients": Competitor(per_sample, CHUNKS),
        "BackPACK DiagGGNExact": Competitor(by_backpack, CHUNKS),
    }
