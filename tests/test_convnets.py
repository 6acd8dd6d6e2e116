"""convnets.py: parameters and forward passes by hand, and what torch.func and Linearization make of the networks."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from ntkbook import Linearization
from ntkbook.experiments.convnets import Residual, alexnet, preresnet, wide_resnet

TINY = {
    "preresnet": lambda **options: preresnet(8, width=2, outputs=3, **options),
    "bottleneck": lambda **options: preresnet(11, width=2, outputs=3, bottleneck=True, **options),
    "wide_resnet": lambda **options: wide_resnet(10, 2, width=2, outputs=3, **options),
    "alexnet": lambda **options: alexnet(3, width=2, **options),
}


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


def images(n, seed=0, dtype=torch.float64):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny(name, seed=0):
    """A small network in eval mode, its BatchNorms with statistics and weights of their own, as after training."""
    net = TINY[name](seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value in (layer.weight.data, layer.running_var):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            for value in (layer.bias.data, layer.running_mean):
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return net.eval()


def basic_count(k, first, w):
    """A network of 3k basic blocks with w, 2w and 4w channels, from `first` channels, counted stage by stage."""
    total, before = 27 * first, first
    for after in (w, 2 * w, 4 * w):
        total += 9 * before * after + (2 * k - 1) * 9 * after * after  # 3 x 3 convolutions
        total += 2 * before + (2 * k - 1) * 2 * after  # a BatchNorm before each
        total += before * after if before != after else 0  # the shortcut
        before = after
    return total + 2 * before + 10 * before + 10


def bottleneck_count(k, w):
    total, before = 27 * w, w
    for inner in (w, 2 * w, 4 * w):
        total += 2 * before + before * inner + before * 4 * inner  # the first block's first layer, and its shortcut
        total += (k - 1) * (2 * 4 * inner + 4 * inner * inner)  # the other blocks' first layer
        total += k * (2 * inner + 9 * inner * inner + 2 * inner + 4 * inner * inner)
        before = 4 * inner
    return total + 2 * before + 10 * before + 10


@pytest.mark.parametrize(("depth", "parameters"), [(20, 272_282), (56, 855_578), (110, 1_730_522)])
def test_the_preresnets_parameters(depth, parameters):
    assert count(preresnet(depth)) == basic_count((depth - 2) // 6, 16, 16) == parameters


@pytest.mark.parametrize(("depth", "parameters"), [(56, 590_426), (110, 1_146_842)])
def test_the_parameters_with_bottlenecks(depth, parameters):
    assert count(preresnet(depth, bottleneck=True)) == bottleneck_count((depth - 2) // 9, 16) == parameters


def test_wide_resnets_parameters():
    with torch.device("meta"):  # the count needs no numbers
        assert count(wide_resnet(10, 2)) == basic_count(1, 16, 32)
    assert count(wide_resnet()) == basic_count(4, 16, 160) == 36_479_194


def test_alexnets_parameters():
    layers = [(3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3)]
    assert count(alexnet()) == sum((a * k * k + 1) * b for a, b, k in layers) + 257 * 10 == 2_472_266


@pytest.mark.parametrize("name", ["preresnet", "wide_resnet"])
def test_basic_blocks_compute_what_they_say(name):
    net, x = tiny(name), images(3)

    def active(z, norm):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        return (z * scale[:, None, None] + shift[:, None, None]).relu()

    z = nn.functional.conv2d(x, net[0].weight, padding=1)
    blocks = [layer for layer in net if isinstance(layer, Residual)]
    for block, stride, side in zip(blocks, (1, 2, 2), (32, 16, 8), strict=True):
        (one, two), (first, second) = block.norms, block.convolutions
        inner = nn.functional.conv2d(active(z, one), first.weight, stride=stride, padding=1)
        inner = nn.functional.conv2d(active(inner, two), second.weight, padding=1)
        same = z.shape == inner.shape
        z = inner + (z if same else torch.einsum("oi,nihw->nohw", block.shortcut.weight[..., 0, 0], z)[
            :, :, ::stride, ::stride
        ])  # fmt: skip
        assert z.shape[2:] == (side, side)
    expected = active(z, net[-5]).mean((2, 3)) @ net[-1].weight.T + net[-1].bias
    torch.testing.assert_close(net(x), expected, rtol=1e-11, atol=1e-12)


def test_a_bottleneck_has_three_convolutions_and_four_times_the_channels():
    net = tiny("bottleneck")
    blocks = [layer for layer in net if isinstance(layer, Residual)]
    shapes = [[tuple(layer.weight.shape) + layer.stride for layer in block.convolutions] for block in blocks]
    assert shapes[1] == [(4, 8, 1, 1, 1, 1), (4, 4, 3, 3, 2, 2), (16, 4, 1, 1, 1, 1)]
    assert tuple(blocks[1].shortcut.weight.shape) + blocks[1].shortcut.stride == (16, 8, 1, 1, 2, 2)
    z = x = torch.rand(2, 8, 32, 32, dtype=torch.float64)
    for norm, layer in zip(blocks[1].norms, blocks[1].convolutions):
        z = layer(nn.functional.relu(norm(z)))
    torch.testing.assert_close(blocks[1](x), z + blocks[1].shortcut(x), rtol=0, atol=0)


def test_alexnet_computes_what_its_layers_do():
    net, z = tiny("alexnet"), images(3)
    x = z
    shapes = [(4, 5, 2), (1, 2, 2), (1, 1, 1), (1, 1, 1), (1, 1, 2)]  # stride, padding, and the maximum over how many
    layers = [layer for layer in net if isinstance(layer, nn.Conv2d)]
    for layer, (stride, padding, side) in zip(layers, shapes, strict=True):
        z = nn.functional.conv2d(z, layer.weight, layer.bias, stride, padding).relu()
        z = nn.functional.max_pool2d(z, side)
    assert z.shape == (3, 8, 1, 1)
    torch.testing.assert_close(net(x), z.flatten(1) @ net[-1].weight.T + net[-1].bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TINY)
def test_the_linearisation_takes_them(name):
    """J and Jᵀ are adjoint, a directional derivative is a difference quotient, and the Gram matrix is J Jᵀ."""
    lin, x = Linearization(tiny(name)), images(4, 1)
    generator = torch.Generator().manual_seed(2)
    v = torch.randn(lin.num_params, generator=generator, dtype=torch.float64)
    u = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    forward, backward = lin.jvp(x, v), lin.vjp(x, u)
    torch.testing.assert_close((u * forward).sum(), v @ backward, rtol=1e-11, atol=1e-11)
    jacobian = lin.jacobian(x)
    torch.testing.assert_close(forward.flatten(), jacobian @ v, rtol=1e-10, atol=1e-10)
    scale = jacobian.square().sum(1).max().item()
    torch.testing.assert_close(lin.gram(x), jacobian @ jacobian.T, rtol=1e-10, atol=1e-12 * scale)


@pytest.mark.parametrize("name", TINY)
def test_torch_func_over_examples_and_forward_over_reverse(name):
    net, x = tiny(name), images(3, 1)
    parameters = {key: value.detach() for key, value in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def loss(parameters, example):
        return functional_call(net, (parameters, buffers), (example[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    net(x).square().sum().backward()
    generator = torch.Generator().manual_seed(3)
    v = {key: torch.randn(value.shape, generator=generator, dtype=value.dtype) for key, value in parameters.items()}
    hessian_v = jvp(lambda p: grad(loss)(p, x[0]), (parameters,), (v,))[1]
    for key, parameter in net.named_parameters():
        torch.testing.assert_close(each[key].sum(0), parameter.grad, rtol=1e-9, atol=1e-10)
    trainable = {key: value.clone().requires_grad_() for key, value in parameters.items()}
    first = functional_call(net, (trainable, buffers), (x[:1],))
    gradient = torch.autograd.grad(first.square().sum(), list(trainable.values()), create_graph=True)
    along = sum((one * v[key]).sum() for one, key in zip(gradient, trainable))
    for twice, key in zip(torch.autograd.grad(along, list(trainable.values()), materialize_grads=True), trainable):
        torch.testing.assert_close(hessian_v[key], twice, rtol=1e-8, atol=1e-8 * float(twice.abs().max() + 1))


@pytest.mark.parametrize("name", TINY)
def test_one_seed_is_one_network_in_every_dtype_and_nothing_global_changes(name):
    before = torch.get_rng_state()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        single = TINY[name](seed=7)
    finally:
        torch.set_default_dtype(default)
    double, other = TINY[name](seed=7, dtype=torch.float64), TINY[name](seed=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert {parameter.dtype for parameter in single.parameters()} == {torch.float32}
    assert {buffer.dtype for buffer in double.buffers()} <= {torch.float64, torch.int64}
    assert all(torch.equal(a.double(), b) for a, b in zip(single.parameters(), double.parameters(), strict=True))
    assert not torch.equal(single[0].weight, other[0].weight)


def test_convolutions_are_drawn_by_hes_rule_and_batchnorm_begins_as_nothing():
    net = preresnet(56, seed=1)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            k, out = layer.kernel_size[0], layer.out_channels
            spread = layer.weight.std().item() / (2 / (k * k * out)) ** 0.5
            assert abs(spread - 1) < 6 / (2 * layer.weight.numel()) ** 0.5  # six standard errors of such a spread
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()
    assert net[-1].weight.abs().max() <= 1 / 8  # PyTorch's default: uniform up to 1 / √64


def test_alexnet_is_what_pytorch_makes_after_manual_seed():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = [nn.Conv2d(3, 64, 11, 4, 5), nn.Conv2d(64, 192, 5, padding=2), nn.Conv2d(192, 384, 3, padding=1)]
    made = [layer for layer in alexnet(seed=3) if isinstance(layer, nn.Conv2d)]
    for layer, other in zip(made, expected):
        assert str(layer) == str(other)
        assert torch.equal(layer.weight, other.weight)
        assert torch.equal(layer.bias, other.bias)


@pytest.mark.parametrize("depth", [2, 7, 21, 0, -4])
def test_depths_that_are_none(depth):
    with pytest.raises(ValueError, match=rf"6k \+ 2 with k = 1, 2, ... basic blocks a stage, got {depth}"):
        preresnet(depth)
    with pytest.raises(ValueError, match=r"6k \+ 4"):
        wide_resnet(depth)
    with pytest.raises(ValueError, match=r"9k \+ 2 with k = 1, 2, ... bottleneck"):
        preresnet(depth, bottleneck=True)


@pytest.mark.parametrize(
    "make",
    [lambda: preresnet(8, outputs=0), lambda: preresnet(8, width=0), lambda: alexnet(0), lambda: alexnet(width=0),
     lambda: wide_resnet(10, 0), lambda: wide_resnet(10, outputs=0)],
)  # fmt: skip
def test_sizes_are_checked(make):
    with pytest.raises(ValueError, match="at least 1"):
        make()
