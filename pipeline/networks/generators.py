"""Generators: networks that make images of latents, loaded once per worker."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config.networks import Generator, Latent
from pipeline.errors import MicrotomeError
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


def latent_of(latent: Latent, seed: int, image_id: str, size: int, without: Sequence[str] = ()) -> np.ndarray:
    """Return the latent of one image of a data set, float32, from the seed and the image's id alone.

    Parameters
    ----------
    image_id : `<split>/<index>`.
    size : of the images, for compositions of scenes.
    without : kinds of objects to leave out, of scenes.
    """
    import numpy as np

    split, _, index = image_id.partition("/")
    if latent.kind == "scenes":
        from pipeline.data.scenes import draw_scene
        from pipeline.data.scenes.composed import composition

        return composition(draw_scene(seed, split, int(index), size), without)
    source = np.random.default_rng([seed, zlib.crc32(split.encode()), int(index)])
    if latent.kind == "normal":
        return source.standard_normal(tuple(latent.shape), np.float32)
    return source.uniform(-1, 1, tuple(latent.shape)).astype(np.float32)


def of_scenes(name: str, latent: Latent, size: tuple[int, int], splits: Iterable[str]) -> dict[str, int]:
    """Return what ids hold of compositions of scenes, their version; nothing of other latents.

    Raises
    ------
    MicrotomeError
        A shape, a size or a split that compositions do not have, with the key of the generator `name`.
    """
    if latent.kind != "scenes":
        return {}
    from pipeline.data.scenes import SPLITS, VERSION
    from pipeline.data.scenes.composed import GRID, SHAPE

    if tuple(latent.shape) != SHAPE:
        raise MicrotomeError(
            f"generators.{name}.latent.shape: compositions of scenes have shape {list(SHAPE)}, found {latent.shape}"
        )
    if size[0] % GRID:
        raise MicrotomeError(f"size: compositions lie on a grid of {GRID} x {GRID}, which does not divide {size[0]}")
    if others := [split for split in splits if split not in SPLITS]:
        raise MicrotomeError(f"images: scenes have the splits {' and '.join(SPLITS)}, found {others[0]!r}")
    return {"scenes": VERSION}


def rounded(made: torch.Tensor) -> np.ndarray:
    """Return pixels from 0 to 1 as a data set holds them, uint8; values beyond are cut."""
    return (made.clamp(0, 1) * 255).round().byte().cpu().numpy()


def image_of(maker: Maker, latent: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Return the image of one latent, uint8 (3, y, x), and the share of its values that were cut, on a worker.

    It runs alone, so that its bits do not depend on other images.
    """
    import torch

    from pipeline.workers.tasks import computing

    with computing, torch.inference_mode():
        network = generator_of(maker)
        torch.set_num_threads(1)
        made = pixels_of(network, maker.generator, torch.from_numpy(latent)[None].to(device()), 3)[0].float()
        if tuple(made.shape) != (3, *size):
            raise MicrotomeError(
                f"generator {maker.name!r} makes images of shape {tuple(made.shape)}, expected {(3, *size)}: set the "
                f"data set's `size`"
            )
        if not bool(made.isfinite().all()):
            raise MicrotomeError(f"generator {maker.name!r} gives values that are not finite (NaN or infinity)")
        beyond = float(((made < -1 / 510) | (made > 1 + 1 / 510)).float().mean())
        return rounded(made), beyond


def drawn(generator: Generator, seed: Sequence[int]) -> np.ndarray:
    """Return one latent, float32, from its seed alone."""
    import numpy as np

    source, shape = np.random.default_rng(list(seed)), tuple(generator.latent.shape)
    if generator.latent.kind == "normal":
        return source.standard_normal(shape, np.float32)
    return source.uniform(-1, 1, shape).astype(np.float32)


def why_not(maker: Maker, size: tuple[int, int], channels: int) -> str:
    """Return why a generator makes no images for a network; empty if it does."""
    generator = maker.generator
    if generator.latent.kind == "scenes":
        return "its latents are compositions of scenes, which no ascent moves"
    return refused_images(generator_of(maker), generator, size, channels)


def refused_images(network: torch.nn.Module, generator: Generator, size: tuple[int, int], channels: int) -> str:
    """Return why a loaded generator makes no images of this size and these channels; empty if it does."""
    import torch

    latents = torch.zeros((2, *generator.latent.shape), device=next(network.parameters()).device)
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
