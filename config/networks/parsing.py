"""A small segmentation network with several heads, as `module: config/networks/parsing.py:parsing` of a segmenter."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import interpolate


def parsing(channels: Mapping[str, int], width: int = 16) -> nn.Module:
    """(batch, 3, y, x) -> {head: (batch, channels, y, x)}, with y and x divisible by 8: a U-Net of four scales.

    `channels` has the classes of each head, those that mean nothing included.
    """
    return Parsing(channels, width)


class Parsing(nn.Module):
    def __init__(self, channels: Mapping[str, int], width: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.down = nn.ModuleList(
            nn.Sequential(_block(before, own), _block(own, own))
            for before, own in zip([3, *widths[:-1]], widths, strict=True)
        )
        self.up = nn.ModuleList(
            _block(above + own, own) for above, own in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.heads = nn.ModuleDict({name: nn.Conv2d(width, count, 1) for name, count in channels.items()})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        kept = []
        for level, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for block, own in zip(self.up, kept[-2::-1], strict=True):
            x = block(torch.cat([interpolate(x, scale_factor=2.0, mode="nearest"), own], 1))
        return {name: head(x) for name, head in self.heads.items()}


def _block(channels: int, units: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, units, 3, padding=1, bias=False), nn.BatchNorm2d(units), nn.ReLU())
