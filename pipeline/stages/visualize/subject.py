"""What is maximised or projected: a unit of each image at its strongest or at one position; and pixels as inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kernels.images.whiten import whiten
from pipeline.config.networks import Network
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import to_maps
from pipeline.workers.devices import device


@dataclass(frozen=True)
class Strongest:
    """The highest value of a unit of each image over all positions; `units` is int64 (image,)."""

    info: LayerInfo
    units: torch.Tensor

    @property
    def layer(self) -> str:
        return self.info.name

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        maps, _ = to_maps(output, self.info)
        return maps[torch.arange(len(maps), device=maps.device), self.units.to(maps.device)].flatten(1).amax(1)

    def at(self, rows: torch.Tensor) -> Strongest:
        return replace(self, units=self.units[rows])


@dataclass(frozen=True)
class Single:
    """The value of a unit of each image at one position; `units` is int64 (image,), `places` (image, 2): y and x."""

    info: LayerInfo
    units: torch.Tensor
    places: torch.Tensor

    @property
    def layer(self) -> str:
        return self.info.name

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        maps, _ = to_maps(output, self.info)
        units, places = self.units.to(maps.device), self.places.to(maps.device)
        return maps[torch.arange(len(maps), device=maps.device), units, places[:, 0], places[:, 1]]

    def at(self, rows: torch.Tensor) -> Single:
        return replace(self, units=self.units[rows], places=self.places[rows])


class Space:
    """Pictures as pixels from 0, black, to 1, white, (image, channel, y, x), and what a network takes of them.

    Priors judge x = (pixel - centre) / spread: the network's input, or pixels about the middle grey for a network that
    whitens each image by itself.
    """

    def __init__(self, spec: Network) -> None:
        given = spec.preprocessing
        self.whitens, self.channels_last = given.per_image, spec.numerics.channels_last
        mean = [0.5] * given.channels if given.per_image else list(given.mean)
        std = [1.0] * given.channels if given.per_image else list(given.std)
        self.centre, self.spread = (torch.tensor(values, device=device()).view(1, -1, 1, 1) for values in (mean, std))

    def relative(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what priors judge."""
        return (pixels - self.centre) / self.spread

    def inputs(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what the network takes, with a gradient."""
        made = whiten(255 * pixels) if self.whitens else self.relative(pixels)
        return made.contiguous(memory_format=torch.channels_last) if self.channels_last else made
