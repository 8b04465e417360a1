"""Pictures on the page: what excites a unit, and its projections beside the images that they are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.images import pixels as pixels_of
from pipeline.report.pictures import JPEG, montage, picture
from pipeline.stages.visualize.found import FirstLayer, read_rows
from pipeline.storage.read_back import open_store
from pipeline.storage.store import StoreRef

TILE, SMALL = 160, 72
"""Longer side of a picture that excites a unit, and of a projection, in pixels."""
UNITS_AT_ONCE = 16
"""Units of one task."""
GAP = 2
QUANTILE = 0.99
"""Quantile of the magnitudes of a projection that gets the full colour."""
NOTHING = (160, 160, 160)


@dataclass(frozen=True)
class Source:
    """A group's store, and by unit or class the row in it."""

    store: StoreRef
    rows: dict[int, int]


@dataclass(frozen=True)
class Task:
    """Some units of a layer, or classes.

    Attributes
    ----------
    out : the report's folder. prefix : of the files. images : the store of the data set's images.
    numbers : units or classes. ways : groups of pictures, one a way. projected : projections, if there are any.
    size : (y, x) of the images.
    """

    out: Path
    prefix: str
    images: Path
    numbers: tuple[int, ...]
    ways: tuple[Source, ...]
    projected: Source | None
    size: tuple[int, int]


def draw(task: Task) -> tuple[str, list[str]]:
    """Draw the pictures of some units or classes; return the prefix and the files. Runs on a worker."""
    files = []
    size = scaled(task.size, TILE)
    for number in task.numbers:
        tiles = [tile_of(source, number, size) for source in task.ways]
        if any(tile is not None for tile in tiles):
            file = f"{task.prefix}{number:04d}.jpg"
            whole = [tile if tile is not None else Image.new("RGB", size, NOTHING) for tile in tiles]
            montage(whole).save(task.out / file, **JPEG)
            files.append(file)
        if task.projected is not None and number in task.projected.rows:
            file = f"{task.prefix}{number:04d}-projections.jpg"
            strips_of(task, number).save(task.out / file, **JPEG)
            files.append(file)
    return task.prefix, files


def tile_of(source: Source, number: int, size: tuple[int, int]) -> Image.Image | None:
    """Return the picture of a unit or class at (width, height); None if it has none."""
    if number not in source.rows:
        return None
    pixels = read_rows(source.store, "picture", [source.rows[number]])[0]
    return picture(pixels).resize(size, Image.Resampling.BICUBIC)


def strips_of(task: Task, number: int) -> Image.Image:
    """Return the images of a unit, cropped to its receptive field, above what each method projects of them."""
    assert task.projected is not None
    store, row = task.projected.store, [task.projected.rows[number]]
    slots, fields, maps = (read_rows(store, name, row)[0] for name in ("image", "field", "projection"))
    there = np.flatnonzero(slots >= 0)
    shown = pixels_of(open_store(task.images), slots[there])  # type: ignore[arg-type]
    width, height = scaled((maps.shape[-2], maps.shape[-1]), SMALL)
    rows = 1 + maps.shape[1]
    canvas = Image.new("RGB", (len(slots) * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for place, pixels in zip(there.tolist(), shown, strict=True):
        top, left, bottom, right = fields[place].tolist()
        crop = np.full((pixels.shape[0], *maps.shape[-2:]), 128, np.uint8)
        crop[:, : bottom - top, : right - left] = pixels[:, top:bottom, left:right]
        for at, each in enumerate([crop, *map(contrasted, maps[place])]):
            tile = picture(each).resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(tile, (place * (width + GAP), at * (height + GAP)))
    return canvas


def contrasted(values: np.ndarray) -> np.ndarray:
    """Return a stored projection (channel, y, x) uint8 with the 99th percentile of its magnitudes in full colour."""
    away = values.astype(np.float32) - 128
    full = float(np.quantile(np.abs(away), QUANTILE))
    return np.rint(128 + 127 * (away / max(full, 1.0)).clip(-1, 1)).astype(np.uint8)


def strips_size(crop: tuple[int, int], images: int, methods: int) -> tuple[int, int]:
    """Return (width, height) of what `strips_of` draws."""
    width, height = scaled(crop, SMALL)
    return images * (width + GAP) - GAP, (1 + methods) * (height + GAP) - GAP


def scaled(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return (width, height) of a picture of something of (height, width), whose longer side is `side`."""
    height, width = size
    return max(1, round(side * width / max(size))), max(1, round(side * height / max(size)))


def filters_mosaic(first: FirstLayer) -> Image.Image:
    """Return the filters of a convolution side by side, each scaled by its own largest magnitude about grey."""
    values = first.filters
    side = max(1, 40 // max(first.kernel)) * np.array(first.kernel)
    across = int(np.ceil(np.sqrt(2 * len(values))))
    down = -(-len(values) // across)
    canvas = Image.new("RGB", (across * (int(side[1]) + GAP) - GAP, down * (int(side[0]) + GAP) - GAP), "white")
    for at, own in enumerate(values):
        largest = np.abs(own).max()
        shown = np.rint(128 + 127 * own / (largest if largest > 0 else 1)).astype(np.uint8)
        tile = picture(shown if shown.shape[0] in (1, 3) else shown[:1])
        tile = tile.resize((int(side[1]), int(side[0])), Image.Resampling.NEAREST)
        canvas.paste(tile, ((at % across) * (int(side[1]) + GAP), (at // across) * (int(side[0]) + GAP)))
    return canvas


def parts(numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """Return units or classes in parts of one task each."""
    return [tuple(numbers[at : at + UNITS_AT_ONCE]) for at in range(0, len(numbers), UNITS_AT_ONCE)]
