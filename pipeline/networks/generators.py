"""Generators: networks that make images of latents, loaded once per worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config.networks import Generator
from pipeline.networks import beside
from pipeline.storage.identity import FileDigests
from pipeline.workers.devices import device

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Maker:
    """A generator as tasks name it: small, picklable, and equal only for equal networks and weights."""

    name: str
    json: str
    weights: str

    @staticmethod
    def of(name: str, generator: Generator, weights: str) -> Maker:
        return Maker(name, generator.model_dump_json(), weights)

    @property
    def generator(self) -> Generator:
        return Generator.model_validate_json(self.json)


def settings_of(generator: Generator, digests: FileDigests) -> dict[str, Any]:
    """Return what ids hold of a generator: what builds it, its weights, and how it is used."""
    used = {"latent": generator.latent.model_dump(), "output": list(generator.output)}
    return beside.made_of(generator.spec, digests) | used


def generator_of(maker: Maker) -> torch.nn.Module:
    """Return this worker's copy of a generator; refuse weights that changed since the run began."""
    return beside.network(maker.generator.spec, maker.weights)


def pixels_of(network: torch.nn.Module, generator: Generator, latents: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the images that a generator makes of latents, as pixels from 0 to 1, (image, channel, y, x).

    Grey ones are repeated for a network of colour images.
    """
    low, high = generator.output
    made = (network(latents) - low) / (high - low)
    return made.expand(-1, channels, -1, -1) if made.shape[1] == 1 < channels else made


def drawn(generator: Generator, seed: Sequence[int]) -> np.ndarray:
    """Return one latent, float32, from its seed alone."""
    import numpy as np

    source, shape = np.random.default_rng(list(seed)), tuple(generator.latent.shape)
    if generator.latent.kind == "normal":
        return source.standard_normal(shape, np.float32)
    return source.uniform(-1, 1, shape).astype(np.float32)


def why_not(maker: Maker, size: tuple[int, int], channels: int) -> str:
    """Return why a generator makes no images for a network; empty if it does."""
    import torch

    generator = maker.generator
    network = generator_of(maker)
    latents = torch.zeros((2, *generator.latent.shape), device=device())
    try:
        with torch.no_grad():
            made = network(latents)
    except Exception as error:  # shapes that do not fit fail in many ways
        return f"it cannot take latents of shape {list(generator.latent.shape)}: {type(error).__name__}: {error}"
    shape = tuple(made.shape) if isinstance(made, torch.Tensor) else None
    if shape is None or len(shape) != 4 or shape[0] != 2:
        return f"it gives {shape} for 2 latents, expected images (image, channel, y, x)"
    if shape[2:] != tuple(size):
        return f"it makes images of {shape[2]} x {shape[3]} pixels, and the data set's have {size[0]} x {size[1]}"
    if shape[1] not in (1, channels):
        return f"it makes images of {shape[1]} channels, and the network takes {channels}"
    return ""
