"""Cards of the best units: the images on which a unit responds most, with the region above its threshold."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kernels.iou import mask
from pipeline.report.results import Dissection, Layer, Store, Unit, open_store
from pipeline.report.tables import by_iou

TILE = 112
"""Side of one thumbnail in pixels."""
GAP = 4
"""Transparent pixels between two thumbnails."""
ROWS_AT_ONCE = 8192
"""Images whose maxima are read at once: bounds memory at 50,000 images x thousands of units."""


@dataclass(frozen=True)
class Card:
    """One unit with its montage. `images` are (image id, class name or "") in the order of the thumbnails."""

    unit: Unit
    file: str
    images: list[tuple[str, str]]


def draw_cards(dissection: Dissection, images: Path, folder: Path, cards: int, top_images: int) -> list[Card]:
    """Draw the montages of the best units into `folder` and return their cards, highest IoU first.

    Parameters
    ----------
    images : path of `images.zarr`, whose pixels are shown.
    cards, top_images : how many units at most, and how many images of each at most.
    """
    chosen = best_units(dissection.units, cards)
    pictures = _Pictures.open(images)
    drawn: dict[Unit, Card] = {}
    for position, layer in enumerate(dissection.layers):
        of_layer = [unit for unit in chosen if unit.layer == layer.name]
        if of_layer:
            prefix = f"card-{dissection.dataset}-{dissection.network}-{position:02d}"
            drawn |= _draw_layer(layer, of_layer, pictures, folder, prefix, top_images)
    return [drawn[unit] for unit in chosen]


def best_units(units: Iterable[Unit], limit: int) -> list[Unit]:
    """At most `limit` detectors, highest IoU first: the best one of each concept, then, if there is room, the next."""
    best: list[Unit] = []
    others: list[Unit] = []
    seen: set[tuple[str, str]] = set()
    for unit in by_iou(unit for unit in units if unit.detector):
        concept = (unit.category, unit.concept)
        (others if concept in seen else best).append(unit)
        seen.add(concept)
    return by_iou((best + others)[:limit])


def top_images(maximum: Store, units: Sequence[int], shown: np.ndarray, count: int) -> list[list[int]]:
    """Images with the highest maxima of each unit, highest first, ties by image number.

    Parameters
    ----------
    maximum : store with `maximum` (image, unit) float32, NaN where an image was not extracted.
    shown : (image,) bool, the images that may be shown.
    """
    array = maximum["maximum"]
    columns = np.unique(np.asarray(units))
    found: dict[int, list[tuple[float, int]]] = {int(unit): [] for unit in columns}
    count_of_rows = min(array.shape[0], len(shown))
    for start in range(0, count_of_rows, ROWS_AT_ONCE):
        rows = np.flatnonzero(shown[start : min(start + ROWS_AT_ONCE, count_of_rows)])
        if not len(rows):
            continue
        # By row: a shard that holds none of them may not have been extracted.
        block = array[start + rows, int(columns[0]) : int(columns[-1]) + 1]
        for unit in columns:
            values = block[:, unit - columns[0]]
            candidates = np.flatnonzero(~np.isnan(values))
            # The sort is stable, so that equal maxima stay in image order.
            best = candidates[np.argsort(-values[candidates], kind="stable")[:count]]
            entries = found[int(unit)] + [(float(values[k]), start + int(rows[k])) for k in best]
            found[int(unit)] = sorted(entries, key=lambda entry: (-entry[0], entry[1]))[:count]
    return [[image for _, image in found[unit]] for unit in units]


def thumbnail(image: np.ndarray, region: np.ndarray) -> np.ndarray:
    """A square cut around the region, everything outside the region dimmed, its edge drawn as a line.

    Parameters
    ----------
    image : (channel, y, x) uint8, one or three channels
    region : (y, x) bool

    Returns
    -------
    (TILE, TILE, 3) uint8
    """
    top, left, side = square_around(region)
    cut = np.moveaxis(image[:, top : top + side, left : left + side], 0, -1)
    picture = Image.fromarray(np.repeat(cut, 3, axis=2) if cut.shape[2] == 1 else np.ascontiguousarray(cut[..., :3]))
    colours = np.asarray(picture.resize((TILE, TILE), Image.Resampling.BICUBIC), dtype=np.float32)
    small = Image.fromarray(region[top : top + side, left : left + side].astype(np.uint8) * 255)
    # Resampled smoothly and cut at one half, the outline follows the region without its staircase.
    inside = np.asarray(small.resize((TILE, TILE), Image.Resampling.BILINEAR)) >= 128
    grey = colours.mean(axis=2, keepdims=True)
    tile = np.where(inside[..., None], colours, 0.45 * (0.4 * colours + 0.6 * grey) + 15)
    near, wide = _grow(inside), _grow(_grow(inside))
    tile[wide & ~near] = (20, 20, 20)  # a dark line outside the yellow one: visible on snow as on asphalt
    tile[near & ~inside] = (255, 214, 10)
    return tile.round().clip(0, 255).astype(np.uint8)


def square_around(region: np.ndarray) -> tuple[int, int, int]:
    """Top, left and side of the square that shows a region: 1.5 times its extent, at least half the image, inside it.

    A region without any pixel gives the largest square at the image's centre.
    """
    height, width = region.shape
    largest = min(height, width)
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    if not len(rows):
        return (height - largest) // 2, (width - largest) // 2, largest
    extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    side = min(max(math.ceil(1.5 * extent), math.ceil(largest / 2)), largest)
    top = (rows[0] + rows[-1] + 1 - side) // 2
    left = (columns[0] + columns[-1] + 1 - side) // 2
    return int(np.clip(top, 0, height - side)), int(np.clip(left, 0, width - side)), int(side)


def montage(tiles: Sequence[np.ndarray], columns: int) -> Image.Image:
    """Thumbnails side by side with transparent gaps; places without a thumbnail stay transparent."""
    canvas = np.zeros((TILE, columns * (TILE + GAP) - GAP, 4), dtype=np.uint8)
    for position, tile in enumerate(tiles):
        left = position * (TILE + GAP)
        canvas[:, left : left + TILE, :3] = tile
        canvas[:, left : left + TILE, 3] = 255
    return Image.fromarray(canvas)


@dataclass(frozen=True)
class _Pictures:
    """The images of a data set: small columns read once, pixels when they are shown."""

    pixels: Any
    ids: np.ndarray
    classes: list[str]
    """Class name of every image, "" without a label."""
    valid: np.ndarray
    split: np.ndarray

    @classmethod
    def open(cls, path: Path) -> "_Pictures":
        store = open_store(path)
        names = [str(name) for name in store.attrs.get("classes") or []]
        labels = np.asarray(store["label"][:])
        return cls(
            pixels=store["image"],
            ids=np.asarray(store["image_id"][:]),
            classes=[names[label] if 0 <= label < len(names) else "" for label in labels],
            valid=np.asarray(store["valid"][:], dtype=bool),
            split=np.asarray(store["split"][:]),
        )


def _draw_layer(
    layer: Layer, units: Sequence[Unit], pictures: _Pictures, folder: Path, prefix: str, count: int
) -> dict[Unit, Card]:
    activations, thresholds = open_store(layer.activations), open_store(layer.thresholds)
    threshold = np.asarray(thresholds["threshold"][:])
    border = thresholds.attrs.get("border", "edge")
    of_split = pictures.split == thresholds.attrs.get("split")
    # A split that names no image is not a split of images (all of them, say).
    shown = pictures.valid & of_split if of_split.any() else pictures.valid
    tops = top_images(activations, [unit.unit for unit in units], shown, count)
    scale = np.float32(activations.attrs["scale"])  # a power of two: dividing a threshold by it is exact
    wanted: dict[int, list[Unit]] = {}
    for unit, images in zip(units, tops, strict=True):
        for image in images:
            wanted.setdefault(image, []).append(unit)
    tiles: dict[tuple[Unit, int], np.ndarray] = {}
    for image in sorted(wanted):  # in the order of the shards, so that each is read once
        pixels = np.asarray(pictures.pixels[image])
        for unit in wanted[image]:
            stored = np.asarray(activations["activation"][image, unit.unit])
            size = pixels.shape[1], pixels.shape[2]
            active = mask(stored, threshold[unit.unit] / scale, size, border)
            tiles[unit, image] = thumbnail(pixels, active)
    cards = {}
    for unit, images in zip(units, tops, strict=True):
        file = f"{prefix}-{unit.unit:04d}.png"
        montage([tiles[unit, image] for image in images], count).save(folder / file)
        cards[unit] = Card(unit, file, [(str(pictures.ids[image]), pictures.classes[image]) for image in images])
    return cards


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask and its four neighbours."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown
