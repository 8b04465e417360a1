"""EfficientNet-Lite0, to be named in a config as `module: config/networks/efficientnet_lite.py:lite0`."""

import torch
from torch import nn

# Of each stage: blocks, kernel, stride of the first block, expansion, units.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def lite0(classes: int = 1000) -> nn.Module:
    """EfficientNet-Lite0 for images whose sides are multiples of 32, with TensorFlow's padding."""
    return Lite0(classes)


class Lite0(nn.Module):
    """Inverted residual blocks with ReLU6 and no squeeze-and-excitation; (batch, 3, y, x) -> (batch, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_convolution(3, 32, 3, 2), nn.ReLU6())
        stages, units = [], 32
        for blocks, kernel, stride, expansion, wide in _STAGES:
            stages.append(
                nn.Sequential(
                    *(
                        Block(units if at == 0 else wide, wide, kernel, stride if at == 0 else 1, expansion)
                        for at in range(blocks)
                    )
                )
            )
            units = wide
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(*_pointwise(units, 1280), nn.ReLU6())
        self.fc = nn.Linear(1280, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.head(self.stages(self.stem(x))).mean((2, 3)))


class Block(nn.Module):
    """Expand, convolve each unit on its own, project; with a skip where the shape stays."""

    def __init__(self, given: int, wide: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = given * expansion
        expand = [*_pointwise(given, inner), nn.ReLU6()] if expansion > 1 else []
        depthwise = [*_convolution(inner, inner, kernel, stride, groups=inner), nn.ReLU6()]
        self.conv = nn.Sequential(*expand, *depthwise, *_pointwise(inner, wide))
        self.skips = stride == 1 and given == wide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.skips else self.conv(x)


def _pointwise(given: int, wide: int) -> list[nn.Module]:
    return [nn.Conv2d(given, wide, 1, bias=False), nn.BatchNorm2d(wide, 1e-3)]


def _convolution(given: int, wide: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    """Return padding, convolution and normalisation: where the stride divides the side, more is padded at the end."""
    total = kernel - stride if stride > 1 else kernel - 1
    before, after = total // 2, total - total // 2
    padding = nn.ZeroPad2d((before, after, before, after))
    return [
        padding,
        nn.Conv2d(given, wide, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(wide, 1e-3),
    ]
