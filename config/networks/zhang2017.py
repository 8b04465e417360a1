"""The small networks of Zhang et al., "Understanding deep learning requires rethinking generalization" (ICLR 2017).

For images of 28 x 28 pixels; to be named as `module: config/networks/zhang2017.py:inception`, with `arguments:` where
the classes are not ten. Their parameters are counted in tests against the paper's table 1.

Every activation module is one of its own, so that each layer can be dissected. `nn.Dropout(0)` stands where a run may
switch dropout on; it has no parameters.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d

SIZE = 28  # height and width of the images


def inception(num_classes: int = 10, norm: bool = True) -> nn.Module:
    """Small Inception, 1,649,402 parameters; without `norm` each convolution has a bias in place of BatchNorm."""
    blocks = OrderedDict(stem=_Conv(3, 96, 3, norm=norm))
    channels = 96
    for name, *units in (
        ("inception1", 32, 32), ("inception2", 32, 48), ("down1", 80),
        ("inception3", 112, 48), ("inception4", 96, 64), ("inception5", 80, 80), ("inception6", 48, 96), ("down2", 96),
        ("inception7", 176, 160), ("inception8", 176, 160),
    ):  # fmt: skip
        if len(units) == 2:
            blocks[name] = _Inception(channels, *units, norm=norm)
            channels = sum(units)
        else:
            blocks[name] = _Down(channels, *units, norm=norm)
            channels += units[0]
    return nn.Sequential(
        OrderedDict(
            blocks=nn.Sequential(blocks),
            pool=nn.AvgPool2d(7),
            flatten=nn.Flatten(),
            dropout=nn.Dropout(0.0),
            head=nn.Linear(channels, num_classes),
        )
    )


def alexnet(num_classes: int = 10) -> nn.Module:
    """Small AlexNet, 1,387,786 parameters: twice convolution, pooling and response normalisation, then three layers."""
    return nn.Sequential(
        OrderedDict(
            conv1=_Rectified(nn.Conv2d(3, 64, 5, padding=2)),
            pool1=nn.MaxPool2d(3, 2, 1),
            norm1=_ResponseNorm(64),
            conv2=_Rectified(nn.Conv2d(64, 64, 5, padding=2)),
            pool2=nn.MaxPool2d(3, 2, 1),
            norm2=_ResponseNorm(64),
            flatten=nn.Flatten(),
            hidden1=_Rectified(nn.Linear(64 * 7 * 7, 384)),
            dropout1=nn.Dropout(0.0),
            hidden2=_Rectified(nn.Linear(384, 192)),
            dropout2=nn.Dropout(0.0),
            head=nn.Linear(192, num_classes),
        )
    )


def mlp(hidden: int = 1, num_classes: int = 10) -> nn.Module:
    """Layers of 512 units: 1,209,866 parameters with one, 1,735,178 with three."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    values = 3 * SIZE * SIZE
    for number in range(1, hidden + 1):
        layers[f"hidden{number}"] = _Rectified(nn.Linear(values, 512))
        layers[f"dropout{number}"] = nn.Dropout(0.0)
        values = 512
    return nn.Sequential(OrderedDict(**layers, head=nn.Linear(values, num_classes)))


def tiny(num_classes: int = 10) -> nn.Module:
    """No network of the paper: three convolutions that fit a thousand images in seconds."""
    return nn.Sequential(
        OrderedDict(
            conv1=_Rectified(nn.Conv2d(3, 32, 5, stride=2, padding=2)),
            conv2=_Rectified(nn.Conv2d(32, 64, 3, stride=2, padding=1)),
            conv3=_Rectified(nn.Conv2d(64, 64, 3, padding=1)),
            pool=nn.MaxPool2d(2, 2, 1),
            flatten=nn.Flatten(),
            head=nn.Linear(64 * 4 * 4, num_classes),
        )
    )


class _Rectified(nn.Sequential):
    """A layer and its ReLU."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer, nn.ReLU())


class _Shift(nn.BatchNorm2d):
    """BatchNorm that learns a shift and no scale: one number a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(
            x, self.running_mean, self.running_var, None, self.bias, self.training, self.momentum or 0.0, self.eps
        )


class _Conv(nn.Sequential):
    def __init__(self, channels: int, units: int, size: int, stride: int = 1, norm: bool = True) -> None:
        conv = nn.Conv2d(channels, units, size, stride, size // 2, bias=not norm)
        super().__init__(conv, *([_Shift(units)] if norm else []), nn.ReLU())


class _Inception(nn.Module):
    """Convolutions of 1 x 1 and of 3 x 3 beside each other."""

    def __init__(self, channels: int, ones: int, threes: int, norm: bool) -> None:
        super().__init__()
        self.ones = _Conv(channels, ones, 1, norm=norm)
        self.threes = _Conv(channels, threes, 3, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.ones(x), self.threes(x)], 1)


class _Down(nn.Module):
    """A convolution of 3 x 3 with stride 2 beside a pooling."""

    def __init__(self, channels: int, units: int, norm: bool) -> None:
        super().__init__()
        self.threes = _Conv(channels, units, 3, stride=2, norm=norm)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.threes(x), self.pool(x)], 1)


class _ResponseNorm(nn.Module):
    """x / (1 + 0.001 / 9 * sum of squares over the nine channels around)^0.75, as in TensorFlow's tutorial of the time.

    `nn.LocalResponseNorm`, with the sum as a product with a band matrix: three times as fast.
    """

    def __init__(self, channels: int, size: int = 9, alpha: float = 0.001) -> None:
        super().__init__()
        at = torch.arange(channels)
        band = ((at[:, None] - at).abs() <= size // 2).float() * (alpha / size)
        self.register_buffer("band", band[:, :, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        divisor = 1 + conv2d(x * x, self.band).float()
        return x * (divisor * divisor.sqrt()).rsqrt()
