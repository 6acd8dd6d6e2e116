"""Layers' rules against the loop of autograd: every module, every way of calling it, by both kinds of products."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles.jacobian import loop_jacobian
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkbook import Linearization, gram
from ntkbook.experiments.convnets import preresnet, wide_resnet
from ntkbook.experiments.networks import lenet3, mlp
from ntkbook.finding import find_layers
from ntkbook.layers import gradient_rows, layer_features

# torch says that it has no batched derivative of weight_norm, and that padding "same" of even kernels takes a copy.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
TOLERANCE = 1e-12  # of the largest entry, in float64


@pytest.fixture(autouse=True)
def plain_attention():
    """Fused attention has no batched derivative, about which torch warns."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


class Words(nn.Module):
    """A small transformer: tokens, places, torch's encoder layer, and a block of attention written by hand."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(7, 8, padding_idx=2), nn.Parameter(torch.randn(5, 8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        z = self.encoder(self.embed(x) + self.place)
        q, k, v = self.qkv(self.norm(z)).chunk(3, dim=-1)
        z = z + self.out(torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v)
        return self.head(z.mean(1))


class TiedWords(nn.Module):
    """Words whose decoder is their embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(4, 5), nn.Linear(5, 5)
        self.decode = nn.Linear(5, 4)
        self.decode.weight = self.embed.weight

    def forward(self, x):
        return self.decode(torch.tanh(self.mix(self.embed(x).mean(1))))


class TwoSizes(nn.Module):
    """A convolution, a BatchNorm and a GroupNorm called on an image and on a smaller copy."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.group = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        features = [torch.tanh(self.group(self.norm(self.conv(z)))).mean((2, 3)) for z in (x, F.avg_pool2d(x, 2))]
        return self.head(features[0] * features[1])


class Reordered(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x.flip(0))).flip(0))


class Traded(nn.Module):
    """A layer whose one call counts for nothing and whose weight is read once elsewhere."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.tanh(F.linear(x, self.layer.weight)) + self.layer(x).detach()


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(input=x)))


class Overwritten(nn.Module):
    """A layer whose input is worked on in place after its call."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)

    def forward(self, x):
        z = self.first(x).detach().clone()
        y = self.layer(z)
        z.mul_(2)
        return self.head(y * z)


def frozen():
    net = lenet3(3)
    net[1].weight.requires_grad_(False)  # the bias alone
    net[4].bias.requires_grad_(False)
    return net


def weight_normed():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    nn.utils.parametrizations.weight_norm(net[0])
    return net


def image(*layers):
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))


IMAGE, SERIES, WORDS = (4, 7, 6), (4, 9), "words"
ATTENTION = tuple(
    f"encoder.self_attn.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
)
NETWORKS = {  # how to make it, an input's shape, the parameters without a rule
    "mlp": (lambda: mlp([4, 9, 8, 1]), (4,), ()),
    "lenet": (lambda: lenet3(3), (784,), ()),
    "frozen": (frozen, (784,), ()),
    "preresnet8": (lambda: preresnet(8, width=3, outputs=3), (3, 8, 8), ()),
    "preresnet20": (lambda: preresnet(20, width=2, outputs=2), (3, 8, 8), ()),
    "wide resnet": (lambda: wide_resnet(10, 2, width=2, outputs=2), (3, 8, 8), ()),
    "transformer": (Words, WORDS, ("place", *ATTENTION)),
    "tied words": (TiedWords, WORDS, ("embed.weight",)),
    "positions": (lambda: image(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)), (3, 6), ()),
    "norms": (
        lambda: image(nn.Conv2d(4, 6, 2), nn.GroupNorm(3, 6), nn.SiLU(), nn.LayerNorm([6, 6, 5], bias=False)), IMAGE, ()
    ),
    "two sizes": (TwoSizes, (2, 6, 6), ()),
    "series": (
        lambda: image(nn.Conv1d(4, 6, 3, 2, 1), nn.BatchNorm1d(6), nn.GELU(), nn.Conv1d(6, 6, 2, groups=3)), SERIES, ()
    ),
    "same series": (lambda: image(nn.Conv1d(4, 3, 4, padding="same", dilation=2, padding_mode="circular")), SERIES, ()),
    "depthwise": (lambda: image(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1)), IMAGE, ()),
    "dilated": (lambda: image(nn.Conv2d(4, 3, (3, 2), (2, 1), (2, 0), (1, 2), bias=False)), IMAGE, ()),
    "reordered": (Reordered, (4,), ("layer.weight", "layer.bias")),
    "traded": (Traded, (4,), ("layer.weight",)),
    "input by name": (Named, (4,), ("layer.weight", "layer.bias")),
    "weight norm": (
        weight_normed, (4,), ("0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1")
    ),
}  # fmt: skip
for mode in ("zeros", "reflect", "replicate", "circular"):
    for padding in (1, (2, 1), "same", "valid"):
        NETWORKS[f"{mode} {padding}"] = (
            lambda padding=padding, mode=mode: image(nn.Conv2d(4, 2, (3, 2), padding=padding, padding_mode=mode)),
            IMAGE,
            (),
        )


def build(name, n=3, seed=0):
    make, shape, _ = NETWORKS[name]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = make()
        x = torch.randint(7, (2, 5)) if shape == WORDS else torch.randn(2, *shape)
        if name == "tied words":
            x = x % 4
        net(x)  # a lazy layer takes its shape
        net.double().eval()
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.data.normal_()
                module.bias.data.normal_()
        torch.manual_seed(seed)
        x = torch.randint(7, (n, 5)) if shape == WORDS else torch.randn(n, *shape, dtype=torch.double)
    return net, x % 4 if name == "tied words" else x


def error(got, want):
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def take(monkeypatch, route):
    """Force one way of multiplying, for every layer that has a rule."""
    if route != "counted":
        monkeypatch.setattr(gram, "prefers_ghost", lambda *arguments: route == "ghost")
        monkeypatch.setattr(gram, "prefers_ghost_alone", lambda *arguments: route == "ghost")


@pytest.mark.parametrize("route", ["counted", "ghost", "rows"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_by_every_route(name, route, monkeypatch):
    net, x = build(name)
    _, x2 = build(name, n=2, seed=1)
    if name == "preresnet20" and route != "counted":
        x, x2 = x[:1], x2[:1]
    j, j2 = loop_jacobian(net, x), loop_jacobian(net, x2)
    n, m, o = len(x), len(x2), len(j) // len(x)
    take(monkeypatch, route)
    lin = Linearization(net)
    cross = (j @ j2.T).view(n, o, m, o)
    found = {
        "gram": error(lin.gram(x), j @ j.T),
        "cross": error(lin.gram(x, x2), j @ j2.T),
        "trace": error(lin.gram(x, x2, trace=True), torch.einsum("icjc->ij", cross)),
        "output": error(lin.gram(x, x2, output=o - 1), cross[:, -1, :, -1]),
        "one by one": error(Linearization(net, chunk_size=1).gram(x), j @ j.T),
        "one": error(lin.gram(x[:1]), (j @ j.T)[:o, :o]),
        "little memory": error(lin.gram(x, memory=1), j @ j.T),
        "diagonal": error(lin.diagonal(x), j.square().sum(1)),
    }
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("name", NETWORKS)
def test_which_parameters_go_by_rule(name):
    net, x = build(name)
    lin = Linearization(net)
    layers, rest = find_layers(lin, x[:1])
    ruled = [parameter for layer in layers for parameter in layer.parameters]
    assert tuple(rest) == NETWORKS[name][2]
    assert sorted(ruled + rest) == sorted(lin.params)


@pytest.mark.parametrize("name", ["lenet", "depthwise", "two sizes", "transformer", "norms", "series"])
def test_gradients_are_those_of_the_parameters(name):
    net, x = build(name)
    lin = Linearization(net)
    rows = [lin.unflatten(row) for row in loop_jacobian(net, x)]
    for feature in layer_features(lin, find_layers(lin, x[:1]), x):
        found = gradient_rows(feature).flatten(0, 1)
        module = feature.layer.module
        parts = {feature.layer.parameters[-1]: found[..., -1]} if feature.layer.bias else {}
        if feature.layer.weight:
            weight = found[..., :-1] if feature.layer.bias else found
            parts[feature.layer.parameters[0]] = weight.mT if isinstance(module, nn.Embedding) else weight
        for parameter, part in parts.items():
            expected = torch.stack([row[parameter].flatten() for row in rows])
            torch.testing.assert_close(part.flatten(1), expected, rtol=1e-11, atol=1e-13)


def test_inputs_of_two_sizes(monkeypatch):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = net.append(nn.Linear(3, 2)).double()
    x, x2 = torch.randn(3, 2, 7, 7, dtype=torch.double), torch.randn(4, 2, 5, 4, dtype=torch.double)
    expected = loop_jacobian(net, x) @ loop_jacobian(net, x2).T
    for route in ("counted", "ghost", "rows"):
        with monkeypatch.context() as patch:
            take(patch, route)
            assert error(Linearization(net).gram(x, x2), expected) < TOLERANCE


def test_an_input_that_is_overwritten_has_no_rule():
    net, x = Overwritten().double(), torch.randn(3, 4, dtype=torch.double)
    lin = Linearization(net, params=["head.weight", "layer.weight"])
    _, rest = find_layers(lin, x[:1])
    assert rest == ["layer.weight"]


def test_embeddings_whose_gradients_are_others_have_no_rule():
    x = torch.tensor([[0, 1]])
    for options in ({"sparse": True}, {"scale_grad_by_freq": True}):
        net = nn.Sequential(nn.Embedding(3, 2, **options), nn.Flatten())
        lin = Linearization(net)
        assert find_layers(lin, x) == ([], ["0.weight"])


def test_words_that_count_how_often_they_are_in_the_batch_are_refused():
    net = nn.Sequential(nn.Embedding(3, 2, scale_grad_by_freq=True), nn.Flatten()).double()
    lin, x = Linearization(net), torch.tensor([[0, 1], [0, 2]])
    with pytest.raises(ValueError, match=r"gradients depend on the others in its batch.*scale_grad_by_freq"):
        lin.gram(x)


def test_the_running_statistics_are_those_of_the_linearisation():
    net, x = build("depthwise")
    lin = Linearization(net)
    before = lin.gram(x)
    with torch.no_grad():
        for buffer in net.buffers():
            buffer.add_(1)
    assert torch.equal(lin.gram(x), before)


@given(
    dimensions=st.sampled_from([1, 2]),
    groups=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from(["same", "valid", 0, 1, 2]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    twice=st.booleans(),
    n=st.integers(1, 3),
    route=st.sampled_from(["counted", "ghost", "rows"]),
)
def test_random_convolutions(
    dimensions, groups, widths, kernel, stride, dilation, padding, mode, bias, twice, n, route
):
    stride = 1 if padding == "same" else stride
    with torch.random.fork_rng([]), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        take(patch, route)
        kind = (nn.Conv1d, nn.Conv2d)[dimensions - 1]
        options = {"stride": stride, "padding": padding, "dilation": dilation, "bias": bias, "padding_mode": mode}
        conv = kind(groups * widths[0], groups * widths[1], kernel[:dimensions], groups=groups, **options)
        inner = [nn.Tanh(), conv] if twice and widths[0] == widths[1] and padding == "same" else []
        net = nn.Sequential(conv, *inner, nn.SiLU(), nn.Flatten(2), nn.AdaptiveAvgPool1d(3), nn.Flatten()).double()
        x = torch.randn(n, groups * widths[0], *(6, 7)[:dimensions], dtype=torch.double)
        lin, j = Linearization(net), loop_jacobian(net, x)
        assert not find_layers(lin, x[:1])[1]
        assert error(lin.gram(x), j @ j.T) < TOLERANCE
        assert error(lin.diagonal(x), j.square().sum(1)) < TOLERANCE


@pytest.mark.parametrize("name", ["mlp", "lenet", "preresnet8", "transformer"])
def test_float32_is_accurate(name):
    net, x = build(name, n=4)
    expected = Linearization(net).gram(x)
    single = copy.deepcopy(net).float()
    found = Linearization(single).gram(x.float() if x.is_floating_point() else x)
    assert found.dtype == torch.float32
    assert error(found.double(), expected) < 1e-5
