"""A generator of scenes: from a composition (`pipeline/data/scenes/composed.py`) to its picture.

The picture is the stage without objects, painted from its thumbnail, over which the objects lie with colour and
opacity. `l1` to `l6` are the layers to dissect. Planted, the first three keep the kinds of objects apart: units 6 k to
6 k + 5 see and paint kind k alone. Free, every layer mixes all of them.
"""

import torch
from torch import nn

KINDS = 22
EACH = 8  # numbers of an object
UNITS = 6  # of a kind, planted


def block(before: int, after: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(after), nn.ReLU()
    )


class Apart(nn.Conv2d):
    """A convolution whose groups of channels, one for each kind, do not mix: dense arithmetic, masked weights."""

    def __init__(self, before: int, after: int, kernel: int) -> None:
        super().__init__(before, after, kernel, padding=kernel // 2, bias=False)
        own = torch.ones(after // KINDS, before // KINDS)
        self.register_buffer("mask", torch.kron(torch.eye(KINDS), own)[:, :, None, None])
        with torch.no_grad():
            self.weight *= KINDS**0.5  # as many inputs as a group has

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight * self.mask, padding=self.padding)


def apart(before: int, after: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(Apart(before, after, kernel), nn.BatchNorm2d(after), nn.ReLU())


class Decoder(nn.Module):
    def __init__(self, planted: bool, width: int) -> None:
        super().__init__()
        self.planted = planted
        self.s1, self.s2, self.s3 = block(3, 32, 5), block(32, 32), block(32, 24)
        self.stage = nn.Conv2d(24, 3, 3, padding=1)
        units = UNITS * KINDS
        if planted:
            self.l1, self.l2, self.l3 = apart(EACH * KINDS, units, 5), apart(units, units), apart(units, units)
        else:
            self.l1, self.l2, self.l3 = block(EACH * KINDS, units, 5), block(units, units), block(units, units)
        self.l4, self.l5, self.l6 = block(units + 3, width), block(width, 64), block(64, 48)
        self.out = nn.Conv2d(48, 4, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        nn.init.constant_(self.out.bias[3:], -3.0)

    def forward(self, composition: torch.Tensor) -> torch.Tensor:
        empty = composition[:, -3:]
        stage = torch.sigmoid(self.stage(self.s3(self.up(self.s2(self.up(self.s1(empty)))))))
        things = self.l3(self.l2(self.l1(composition[:, :-3])))
        x = self.l5(self.l4(self.up(torch.cat([things, empty], 1))))
        x = torch.sigmoid(self.out(self.l6(self.up(x))))
        return x[:, 3:] * x[:, :3] + (1 - x[:, 3:]) * stage


def decoder(planted: bool = True, width: int = 96) -> Decoder:
    return Decoder(planted, width)
