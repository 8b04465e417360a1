"""Rendering of surface numbers to pictures and label maps."""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.images.colour_names import colour_names
from pipeline.data.scenes.canvas import Canvas, Colour, Draw, Surface
from pipeline.data.scenes.composition import paint_scene
from pipeline.data.scenes.layers import Recorder
from pipeline.data.scenes.textures import NOISE_PERIOD, PERIOD, noise_table, textures
from pipeline.data.scenes.vocabulary import CATEGORIES, CLASSES
from pipeline.errors import MicrotomeError

SPLITS = ("train", "validation")
SMALLEST, LARGEST = 16, 1024
WHITE_BALANCE = 0.06  # of the camera: the largest error of a channel


class Scenes(NamedTuple):
    """Consecutive images of a split with everything that is known about them."""

    image: NDArray[np.uint8]  # (n, 3, size, size) sRGB; n = 0 if it was not requested
    label: NDArray[np.int64]  # (n,) index into CLASSES
    label_map: NDArray[
        np.uint8
    ]  # (n, 4, size, size) concept numbers by category, 0 = nothing; n = 0 if it was not requested
    instance_map: NDArray[np.uint8]  # (n, size, size) k + 1 where object k is seen, 0 elsewhere; n = 0 likewise


def generate(
    seed: int,
    start: int,
    count: int,
    size: int,
    split: str = "train",
    *,
    image: bool = True,
    label_map: bool = True,
    instance_map: bool = False,
) -> Scenes:
    """Draw images `start` to `start + count` of a split.

    Image i depends on (seed, split, i) and the size alone, and not on the number of images per call, the process or the
    machine. The classes come in turn. Every size draws the same scene.

    Parameters
    ----------
    seed, start, count : int
        Any seed; the first image's index and the number of images, both at least 0.
    size : int
        Side of the square pictures in pixels, 16 to 1024.
    split : {"train", "validation"}
        The splits share no scene.
    image, label_map : bool
        Skip the half that is not needed.
    instance_map : bool
        Say of every pixel which object it shows: they are numbered from 1 in the order of painting, far ones first. A
        shadow is not part of its object.
    """
    check(split, size)
    if start < 0 or count < 0:
        raise MicrotomeError(f"scenes are numbered from 0, found start {start} and count {count}")
    pictures = np.empty((count if image else 0, 3, size, size), np.uint8)
    maps = np.empty((count if label_map else 0, len(CATEGORIES), size, size), np.uint8)
    instances = np.empty((count if instance_map else 0, size, size), np.uint8)
    label = np.arange(start, start + count, dtype=np.int64) % len(CLASSES)
    for i in range(count):
        draw = Draw(key(seed, split, start + i))
        canvas = Recorder(size, draw) if instance_map else Canvas(size, draw)
        light = paint_scene(canvas, CLASSES[label[i]])
        if image:
            pictures[i] = (
                film(canvas.surfaces, size, light, draw).exposed(canvas.map.reshape(-1)).reshape(3, size, size)
            )
        if label_map:
            _label(canvas, maps[i])
        if isinstance(canvas, Recorder):
            instances[i] = canvas.instances()
    return Scenes(pictures, label, maps, instances)


def check(split: str, size: int) -> None:
    """Refuse a split that there is not, and a size that is not drawn."""
    if split not in SPLITS:
        raise MicrotomeError(f"scenes have no split {split!r}; expected one of: {', '.join(SPLITS)}")
    if not SMALLEST <= size <= LARGEST:
        raise MicrotomeError(f"scenes are drawn {SMALLEST} to {LARGEST} pixels wide, found size {size}")


def key(seed: int, split: str, index: int) -> int:
    """Return the random key of one image."""
    return int.from_bytes(blake2b(f"scenes/{seed}/{split}/{index}".encode(), digest_size=16).digest(), "big")


def _label(canvas: Canvas, out: NDArray[np.uint8]) -> None:
    """Fill the label maps (4, size, size) by one look-up per category."""
    table = np.array([surface[:3] for surface in canvas.surfaces], np.uint8).T
    for category in range(3):
        np.take(table[category], canvas.map, out=out[category], mode="clip")
    colours = np.array([surface.colour for surface in canvas.surfaces])
    names = 1 + colour_names(np.round(colours * 255).astype(np.uint8))
    np.take(names, canvas.map, out=out[3], mode="clip")


class Film(NamedTuple):
    """How the surfaces of a scene look at every pixel: all that is drawn once they are painted."""

    seen: NDArray[np.float32]  # (3, surface) colour with light and haze, 0 to 255
    material: NDArray[np.int32]  # (surface,) where its texture begins in the table
    tile: NDArray[np.int32]  # (pixel,) place in a texture
    ramp: NDArray[np.float32]  # (pixel,) brightness across the picture
    noise: NDArray[np.float32]  # (3, pixel)

    def exposed(self, surfaces: NDArray[np.integer], at: NDArray[np.intp] | None = None) -> NDArray[np.uint8]:
        """Return pixels (3, pixel) that show these surfaces (pixel,): surface colour x texture x ramp + noise.

        `at` says which pixels of the picture they are; None: all.
        """
        tile, ramp, noise = self.tile, self.ramp, self.noise
        if at is not None:
            tile, ramp, noise = tile[at], ramp[at], noise[:, at]
        grain = textures().reshape(-1).take(self.material.take(surfaces) + tile)
        grain += 1
        grain *= ramp
        out = np.empty((3, len(surfaces)), np.uint8)
        for channel in range(3):
            plane = self.seen[channel].take(surfaces)
            plane *= grain
            plane += noise[channel]
            np.clip(plane, 0, 255, out=plane)
            out[channel] = plane
        return out


def film(surfaces: Sequence[Surface], size: int, light: Colour, draw: Draw) -> Film:
    """Draw how surfaces look as a camera sees them."""
    exposure = draw.between(0.75, 1.15)
    camera = [exposure * draw.between(1 - WHITE_BALANCE, 1 + WHITE_BALANCE) for _ in range(3)]
    seen = _lit(surfaces, light) * np.array(camera, np.float32)[:, None]
    material = np.array([surface.material * PERIOD * PERIOD for surface in surfaces], np.int32)
    down, across = int(draw.random() * PERIOD), int(draw.random() * PERIOD)
    tile = _tile(size)[down : down + size, across : across + size].reshape(-1)
    ramp = _ramp(size)
    ramp = (1 + draw.between(-0.1, 0.1) * ramp)[:, None] + draw.between(-0.12, 0.12) * ramp
    strength = np.float32(255 * draw.between(0.01, 0.035))
    top, left = int(draw.random() * NOISE_PERIOD), int(draw.random() * NOISE_PERIOD)
    noise = strength * noise_table(size)[:, top : top + size, left : left + size]
    return Film(seen, material, tile, ramp.reshape(-1), noise.reshape(3, -1))


def _lit(surfaces: Sequence[Surface], light: Colour) -> NDArray[np.float32]:
    """Return the visible colour of every surface, shape (3, surfaces), 0 to 255: lit, shaded, hazy in the distance."""
    table = np.array([(*surface.colour, *surface[4:]) for surface in surfaces])
    colour, (lit, glow, haze) = table[:, :3], table[:, 3:, None].swapaxes(0, 1)
    shone = colour * (lit * np.array(light))
    sky = colour[0]  # already as seen: the sky's palette belongs to the hour
    seen = (1 - haze) * shone + haze * sky
    seen = (1 - glow) * seen + glow * colour
    seen[0] = sky
    return (255 * seen.T).astype(np.float32)


@lru_cache(maxsize=4)
def _ramp(size: int) -> NDArray[np.float32]:
    """Return values from -1 to 1 across the picture."""
    return np.linspace(-1, 1, size, dtype=np.float32)


@lru_cache(maxsize=4)
def _tile(size: int) -> NDArray[np.int32]:
    """Return the position in a texture of every pixel of a picture of this size, at every offset."""
    place = np.arange(PERIOD + size, dtype=np.int32) % PERIOD
    return place[:, None] * PERIOD + place
