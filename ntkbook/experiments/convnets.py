"""The convolutional networks of Figures 5 and 6, for colour images of 32 x 32 pixels given as (n, 3, 32, 32).

The paper names AlexNet, PreResNets and a WideResNet and defines none of them: these are the variants usual on CIFAR-10.
"""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntkbook.experiments.networks import seeded


class Residual(nn.Module):
    """A pre-activation residual block: x plus convolutions, each after a BatchNorm and a ReLU (He et al., 2016b).

    Where the block changes the channels or the resolution, x is brought to the new shape by a 1 x 1 convolution
    without bias.
    """

    def __init__(self, *convolutions: nn.Conv2d):
        super().__init__()
        dtype = convolutions[0].weight.dtype
        self.norms = nn.ModuleList(nn.BatchNorm2d(layer.in_channels, dtype=dtype) for layer in convolutions)
        self.convolutions = nn.ModuleList(convolutions)
        inputs, outputs = convolutions[0].in_channels, convolutions[-1].out_channels
        stride = max(layer.stride[0] for layer in convolutions)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False, dtype=dtype)

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n outputs h2 w2"]:
        z = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            z = convolution(norm(z).relu())
        return z + self.shortcut(x)


def preresnet(
    depth: int,
    *,
    outputs: int = 10,
    width: int = 16,
    bottleneck: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """A pre-activation ResNet: PreResNet20, 56 and 110 are `preresnet(20)`, `preresnet(56)` and `preresnet(110)`.

    A 3 x 3 convolution to 16 channels, three stages of `Residual` blocks with 16, 32 and 64 channels at 32, 16 and 8
    pixels a side, BatchNorm, ReLU, the mean over the pixels, and a linear layer. A basic block has two 3 x 3
    convolutions, and depth = 6k + 2 for k blocks a stage; a bottleneck block has 1 x 1, 3 x 3 and 1 x 1 with four times
    the channels at its end, and depth = 9k + 2. The paper does not say which it used. Basic blocks are what He et al.
    (2016) have at these depths on CIFAR-10; bottlenecks from depth 44 on are what public code of the paper's first
    author has (wjmaddox/swa_gaussian).

    Convolutions are drawn by He's rule, N(0, 2 / (k² · channels out)); the linear layer is PyTorch's default.

    Args:
        depth: layers of weights, those of the shortcuts not counted.
        outputs: classes, or whatever the outputs stand for.
        width: channels of the first stage; the others have twice and four times as many.
        bottleneck: bottleneck blocks in place of basic ones.
        seed: of the initial parameters. The global random state is neither used nor changed.
        dtype: of the parameters. They are drawn in float32 and converted, so that one seed is one network.
        device: where the parameters live.

    Raises:
        ValueError: a depth that no number of blocks gives, no channels or no outputs.
    """
    step = 9 if bottleneck else 6
    if depth < step + 2 or (depth - 2) % step:
        kind = "bottleneck" if bottleneck else "basic"
        raise ValueError(f"depth must be {step}k + 2 with k = 1, 2, ... {kind} blocks a stage, got {depth}")
    widths = (width, width, 2 * width, 4 * width)
    return _residual_net(widths, (depth - 2) // step, bottleneck, outputs, seed).to(device=device, dtype=dtype)


def wide_resnet(
    depth: int = 28,
    widen: int = 10,
    *,
    outputs: int = 10,
    width: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """A Wide ResNet without dropout (Zagoruyko and Komodakis, 2016): WideResNet28-10 as it stands.

    As `preresnet` with basic blocks, but the stages have `widen` times the channels, the first convolution's are not
    widened, and depth = 6k + 4, since the shortcuts that change the shape are counted.

    Args:
        depth: layers of weights.
        widen: the widening factor.
        width: channels of the first convolution.
        outputs, seed, dtype, device: as for `preresnet`.

    Raises:
        ValueError: a depth that no number of blocks gives, no channels, no outputs, or a factor below 1.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6k + 4 with k = 1, 2, ... blocks a stage, got {depth}")
    widths = (width, widen * width, 2 * widen * width, 4 * widen * width)
    return _residual_net(widths, (depth - 4) // 6, False, outputs, seed).to(device=device, dtype=dtype)


def alexnet(
    outputs: int = 10,
    *,
    width: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """AlexNet as it is usually cut down to CIFAR-10: five convolutions and one linear layer, 2,472,266 parameters.

    Convolutions of 11 x 11 (stride 4), 5 x 5 and three of 3 x 3 with 64, 192, 384, 256 and 256 channels, ReLU after
    each and a maximum over 2 x 2 after the first, second and fifth; no dropout; PyTorch's default initialisation.

    Args:
        outputs: classes, or whatever the outputs stand for.
        width: channels of the first convolution; the others have 3, 6, 4 and 4 times as many.
        seed, dtype, device: as for `preresnet`.

    Raises:
        ValueError: no channels or no outputs.
    """
    _check_sizes(outputs, width)
    channels = (3, width, 3 * width, 6 * width, 4 * width, 4 * width)
    shapes = ((11, 4, 5), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))  # kernel, stride, padding
    layers: list[nn.Module] = []
    with seeded(seed), torch.device("cpu"):
        for number, ((before, after), shape) in enumerate(zip(pairwise(channels), shapes, strict=True)):
            layers += [nn.Conv2d(before, after, *shape, dtype=torch.float32), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if number in (0, 1, 4) else []
        last = nn.Linear(4 * width, outputs, dtype=torch.float32)
    return nn.Sequential(*layers, nn.Flatten(), last).to(device=device, dtype=dtype)


def _check_sizes(outputs: int, *widths: int) -> None:
    if outputs < 1 or min(widths) < 1:
        raise ValueError(f"outputs and channels must be at least 1, got {outputs} outputs and channels {list(widths)}")


def _residual_net(widths: tuple[int, ...], blocks: int, bottleneck: bool, outputs: int, seed: int) -> nn.Sequential:
    _check_sizes(outputs, *widths)
    expansion = 4 if bottleneck else 1

    def conv(before: int, after: int, kernel: int, stride: int = 1) -> nn.Conv2d:
        return nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False, dtype=torch.float32)

    with seeded(seed), torch.device("cpu"):
        layers: list[nn.Module] = [conv(3, widths[0], 3)]
        before = widths[0]
        for stage, inner in enumerate(widths[1:]):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                if bottleneck:
                    parts = [conv(before, inner, 1), conv(inner, inner, 3, stride), conv(inner, expansion * inner, 1)]
                else:
                    parts = [conv(before, inner, 3, stride), conv(inner, inner, 3)]
                layers.append(Residual(*parts))
                before = expansion * inner
        norm = nn.BatchNorm2d(before, dtype=torch.float32)
        last = nn.Linear(before, outputs, dtype=torch.float32)
        net = nn.Sequential(*layers, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return net
