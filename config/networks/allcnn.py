"""The networks of Springenberg et al., "Striving for simplicity: the all convolutional net" (ICLR workshop 2015).

Models A, B and C of their table 1 and, of each, the variants of table 2 without max pooling; for images of 32 x 32
pixels. To be named as `module: config/networks/allcnn.py:all_cnn`, with `arguments: {model: c}`.

    plain            max pooling, 3 x 3 at stride 2
    strided          no pooling: the convolution before it gets stride 2
    conv_pool        plain, with one more convolution before each pooling
    all_cnn          that convolution at stride 2, in place of the pooling

With ten classes they have 839,242 (A), 885,610 (B) and 954,730 (C) parameters, plain and strided alike, and 1,254,250,
1,300,618 and 1,369,738 with the further convolutions. The paper's table 3 prints about 1.3 M for model C and its
strided variant; its own layers count 954,730.

`pooling` of `plain` and `conv_pool` is `max`, or a number p for the p-norm of abs f, or `learnt` for a p that is
learnt, from 2 on.
"""

from collections import OrderedDict

import torch
from torch import nn

from kernels.visualization.pooling import p_norm_pool

# Of each model: kernel and units of the convolutions before the first and the second pooling.
_BLOCKS = {
    "a": (((5, 96),), ((5, 192),)),
    "b": (((5, 96), (1, 96)), ((5, 192), (1, 192))),
    "c": (((3, 96), (3, 96)), ((3, 192), (3, 192))),
}
LEARNT = "learnt"


def plain(model: str = "c", num_classes: int = 10, pooling: str | float = "max") -> nn.Module:
    """Return model `a`, `b` or `c` of table 1, the reference with pooling."""
    return _network(model, num_classes, pooling, stride=1, further=0)


def strided(model: str = "c", num_classes: int = 10) -> nn.Module:
    """Return it without pooling: the convolution before each has stride 2."""
    return _network(model, num_classes, None, stride=2, further=0)


def conv_pool(model: str = "c", num_classes: int = 10, pooling: str | float = "max") -> nn.Module:
    """Return it with one more convolution, 3 x 3, before each pooling: as many parameters as `all_cnn`."""
    return _network(model, num_classes, pooling, stride=1, further=1)


def all_cnn(model: str = "c", num_classes: int = 10) -> nn.Module:
    """Return it with a convolution, 3 x 3 at stride 2, in place of each pooling."""
    return _network(model, num_classes, None, stride=1, further=2)


class PNormPool(nn.Module):
    """The p-norm of abs f over windows of 3 x 3 at stride 2, with zeros around the maps; p is learnt if it is `learnt`.

    A learnt p is 1 plus the softplus of its parameter, so it stays a norm.
    """

    def __init__(self, p: str | float) -> None:
        super().__init__()
        self.fixed = None if p == LEARNT else float(p)
        if self.fixed is None:
            self.above_one = nn.Parameter(torch.tensor(1.0).expm1().log())  # so that p is 2

    @property
    def p(self) -> float | torch.Tensor:
        return 1 + nn.functional.softplus(self.above_one) if self.fixed is None else self.fixed

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return p_norm_pool(maps, self.p, 3, 2)


def _network(model: str, classes: int, pooling: str | float | None, stride: int, further: int) -> nn.Module:
    """Build a network; `further` is the stride of a convolution beside each pooling, 0 if there is none."""
    if model not in _BLOCKS:
        raise ValueError(f"model {model!r}: expected one of {', '.join(_BLOCKS)}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(dropout0=nn.Dropout(0.2))
    units, number = 3, 0
    for at, block in enumerate(_BLOCKS[model], 1):
        for place, (kernel, wide) in enumerate(block, 1):
            number += 1
            layers[f"conv{number}"] = _conv(units, wide, kernel, stride if place == len(block) else 1)
            units = wide
        if further:
            layers[f"down{at}"] = _conv(units, units, 3, further)
        if pooling is not None:
            layers[f"pool{at}"] = nn.MaxPool2d(3, 2, 1) if pooling == "max" else PNormPool(pooling)
        layers[f"dropout{at}"] = nn.Dropout(0.5)
    layers[f"conv{number + 1}"] = _conv(192, 192, 3, padding=0)
    layers[f"conv{number + 2}"] = _conv(192, 192, 1)
    layers[f"conv{number + 3}"] = _conv(192, classes, 1)
    return nn.Sequential(
        OrderedDict(features=nn.Sequential(layers), mean=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    )


def _conv(channels: int, units: int, kernel: int, stride: int = 1, padding: int | None = None) -> nn.Sequential:
    """Return a convolution and its ReLU; maps keep their size but for the stride."""
    conv = nn.Conv2d(channels, units, kernel, stride, kernel // 2 if padding is None else padding)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.ReLU())
