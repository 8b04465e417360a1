"""Pictures of units: the images on which each responds most, cropped around the region above its threshold.

A card also shows what only the stores know: the concepts with the next highest IoU, and a histogram of the activation.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kernels.dissection.iou import mask
from pipeline.report.experiment import Experiment
from pipeline.report.pictures import JPEG, Pictures, montage, open_pictures, picture
from pipeline.stages.attribute.found import UnitRelevance, unit_relevance_of
from pipeline.stages.dissect.found import DissectedLayer, Dissection, Unit
from pipeline.stages.dissect.tables import by_iou
from pipeline.stages.extract.pictures import BINS, KEPT, SAMPLE, bins_of, facts, top_images
from pipeline.storage.read_back import Store, open_store

TILE = 112
"""Side of one image of a unit, in pixels."""
UNITS_AT_ONCE = 256
"""Units of one task: bounds its memory, and how often the files of a wide layer are read."""
RUNNERS_UP = 5
"""Concepts listed per unit, including the best one."""
OUTLINE, EDGE = (255, 214, 10), (20, 20, 20)
DIM = Image.new("RGB", (TILE, TILE), (27, 27, 27))


@dataclass(frozen=True)
class Card:
    """What is known about one unit besides its row in `units.csv`.

    Attributes
    ----------
    file : its pictures side by side, relative to the report's folder.
    images : their numbers in `images.zarr`, highest maximum first.
    concepts : (column of the IoU store, IoU) of the best concepts, best first.
    relevant : images on which the unit speaks most for what the network says, most first; none where that is unknown.
    histogram : positions of the maps in `BINS` equal bins from `low` to `high`, in units of the activation.
    """

    file: str
    images: list[int]
    concepts: list[tuple[int, float]]
    histogram: list[int]
    low: float
    high: float
    relevant: list[int]


def draw_cards(experiment: Experiment, dissection: Dissection) -> dict[tuple[str, int], Card]:
    """Draw the pictures of a network's units, as many as the configuration wants; return the cards by (layer, unit)."""
    name = experiment.name(dissection.dataset, dissection.network)
    chosen = best_units(dissection.units, experiment.report.cards)
    (experiment.out / "units" / name).mkdir(exist_ok=True)
    images = experiment.results / dissection.dataset / "images.zarr"
    relevance = unit_relevance_of(experiment, dissection.dataset, dissection.network)
    top = experiment.report.top_images
    tasks = [
        (experiment.out, f"units/{name}/{position:02d}", images, layer, part, top, relevance.get(layer.name))
        for position, layer in enumerate(dissection.layers)
        for part in parts(sorted(unit.unit for unit in chosen if unit.layer == layer.name))
    ]
    drawn = experiment.map(draw_units, tasks, f"report {dissection.network}: pictures of units")
    return {(layer, unit): card for layer, of_layer in drawn for unit, card in of_layer.items()}


def best_units(units: Iterable[Unit], limit: int) -> list[Unit]:
    """Return at most `limit` units: the best detector of each concept, then the other detectors, then the rest."""
    best: list[Unit] = []
    others: list[Unit] = []
    seen: set[tuple[str, str]] = set()
    for unit in by_iou(units):
        concept = (unit.category, unit.concept)
        (others if not unit.detector or concept in seen else best).append(unit)
        seen.add(concept)
    return (best + others)[:limit]


def parts(units: Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield the units of one layer, in parts of one task each."""
    return (units[at : at + UNITS_AT_ONCE] for at in range(0, len(units), UNITS_AT_ONCE))


def draw_units(
    out: Path,
    prefix: str,
    images: Path,
    layer: DissectedLayer,
    units: Sequence[int],
    top: int,
    relevance: UnitRelevance | None = None,
) -> tuple[str, dict[int, Card]]:
    """Draw some units of one layer, on a worker; return the layer's name and the cards by unit."""
    pictures = open_pictures(images)
    activations, thresholds = open_store(layer.activations), open_store(layer.thresholds)
    scale = np.float32(activations.attrs["scale"])  # a power of two: dividing a threshold by it is exact
    threshold = np.asarray(thresholds["threshold"][:]) / scale
    shown = pictures.shown(thresholds.attrs.get("split"))
    tops, highest = top_images(activations["maximum"], units, shown, top if layer.shown is None else min(top, KEPT))
    relevant = relevance.most_relevant(units, shown, top) if relevance is not None else [[] for _ in units]
    border = thresholds.attrs.get("border", "edge")
    if layer.shown is None:
        both = [list(dict.fromkeys([*most, *others])) for most, others in zip(tops, relevant, strict=True)]
        tiles = draw_tiles(pictures, activations, threshold, border, units, both)
        histograms = histogram(activations, units, shown, highest / scale)
    else:
        kept = open_store(layer.shown)
        tiles = draw_plain(pictures, units, relevant) | draw_kept(pictures, kept, threshold, border, units, tops)
        stored = {name: np.asarray(kept[name][:]) for name in ("histogram", "low", "high")}
        histograms = [facts(stored, unit) for unit in units]
    iou = np.asarray(open_store(layer.iou)["iou"][:])
    cards = {}
    for place, unit in enumerate(units):
        file = f"{prefix}-{unit:04d}.jpg"
        if tops[place]:
            montage([tiles[unit, image] for image in tops[place]]).save(out / file, **JPEG)
        if relevant[place]:
            montage([tiles[unit, image] for image in relevant[place]]).save(out / relevance_file(file), **JPEG)
        counts, low, high = histograms[place]
        best, ends = best_concepts(iou[unit]), (low * float(scale), high * float(scale))
        cards[unit] = Card(file, tops[place], best, counts, *ends, relevant[place])
    return layer.name, cards


def relevance_file(file: str) -> str:
    """Return the file beside a unit's pictures that shows the images of its highest relevance."""
    return file.replace(".jpg", "-relevance.jpg")


def draw_plain(
    pictures: Pictures, units: Sequence[int], of_units: Sequence[Sequence[int]]
) -> dict[tuple[int, int], Image.Image]:
    """Draw whole images, where the maps of a streamed layer are not kept."""
    whole = np.ones(pictures.pixels.shape[2:], bool)
    drawn = {
        image: tile(np.asarray(pictures.pixels[image]), whole)
        for image in sorted({image for of in of_units for image in of})
    }
    return {(unit, image): drawn[image] for unit, of in zip(units, of_units, strict=True) for image in of}


def draw_tiles(
    pictures: Pictures,
    activations: Store,
    threshold: np.ndarray,
    border: Any,
    units: Sequence[int],
    tops: Sequence[Sequence[int]],
) -> dict[tuple[int, int], Image.Image]:
    """Draw a picture of every unit on each of its images, by (unit, image), with thresholds for the stored values."""
    array = activations["activation"]
    images_a_chunk, units_a_chunk = array.chunks[:2]
    wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for unit, images in zip(units, tops, strict=True):
        for image in images:
            wanted.setdefault((image // images_a_chunk, unit // units_a_chunk), []).append((image, unit))
    size = pictures.pixels.shape[2], pictures.pixels.shape[3]
    tiles = {}
    shard, pixels = -1, np.empty(0)
    for (row, column), pairs in sorted(wanted.items()):  # in file order, so that each file is read once
        first, start = row * images_a_chunk, column * units_a_chunk
        if row != shard:
            shard, pixels = row, np.asarray(pictures.pixels[first : first + images_a_chunk])
        block = np.asarray(array[first : first + images_a_chunk, start : start + units_a_chunk])
        of_image, of_unit = (np.array(column) for column in zip(*pairs, strict=True))
        active = mask(block[of_image - first, of_unit - start], threshold[of_unit, None, None], size, border)
        for region, (image, unit) in zip(active, pairs, strict=True):
            tiles[unit, image] = tile(pixels[image - first], region)
    return tiles


def draw_kept(
    pictures: Pictures,
    kept: Store,
    threshold: np.ndarray,
    border: Any,
    units: Sequence[int],
    tops: Sequence[Sequence[int]],
) -> dict[tuple[int, int], Image.Image]:
    """Draw the pictures of a streamed layer, as `draw_tiles` does, from the maps that were kept for them."""
    first, last = units[0], units[-1] + 1
    images, maps = np.asarray(kept["image"][first:last]), np.asarray(kept["map"][first:last])
    size = pictures.pixels.shape[2], pictures.pixels.shape[3]
    wanted = sorted((image, unit) for unit, top in zip(units, tops, strict=True) for image in top)
    tiles = {}
    step = pictures.pixels.chunks[0]
    shard, pixels = -1, np.empty(0)
    for image, unit in wanted:
        if image // step != shard:
            shard = image // step
            pixels = np.asarray(pictures.pixels[shard * step : (shard + 1) * step])
        place = int(np.flatnonzero(images[unit - first] == image)[0])
        region = mask(maps[unit - first, place], threshold[unit], size, border)
        tiles[unit, image] = tile(pixels[image - shard * step], region)
    return tiles


def histogram(
    activations: Store, units: Sequence[int], shown: np.ndarray, highest: np.ndarray
) -> list[tuple[list[int], float, float]]:
    """Count each unit's stored values over the sample's maps, in `BINS` bins with the ends of their range.

    The range goes from the lowest value of the sample to the highest of all images. Units without values have no
    counts.
    """
    array = activations["activation"]
    step = array.chunks[0]
    rows = np.flatnonzero(shown[: array.shape[0]])[:SAMPLE]
    blocks = []
    for shard in np.unique(rows // step):
        block = np.asarray(array[shard * step : (shard + 1) * step, units[0] : units[-1] + 1])
        blocks.append(block[rows[rows // step == shard] - shard * step][:, np.asarray(units) - units[0]])
    found: list[tuple[list[int], float, float]] = []
    for place in range(len(units)):
        values = np.concatenate([block[:, place].ravel() for block in blocks] or [np.empty(0)]).astype(np.float32)
        values = values[~np.isnan(values)]
        if not len(values):
            found.append(([], math.nan, math.nan))
            continue
        low, high = values.min(), max(values.max(), np.float32(highest[place]))
        counts = np.bincount(bins_of(values, low, high), minlength=BINS)
        found.append((counts.tolist(), float(low), float(high)))
    return found


def best_concepts(iou: np.ndarray) -> list[tuple[int, float]]:
    """Return (column, IoU) of the best concepts, ties by column; concepts without overlap are left out."""
    order = np.argsort(np.where(np.isnan(iou), np.inf, -iou), kind="stable")[:RUNNERS_UP]
    return [(int(column), float(iou[column])) for column in order if iou[column] > 0]


def tile(image: np.ndarray, region: np.ndarray) -> Image.Image:
    """Draw a square around a region, with everything outside the region dimmed and its edge as a line.

    Parameters
    ----------
    image : (channel, y, x) uint8, one or three channels
    region : (y, x) bool

    Returns
    -------
    an RGB picture, TILE x TILE
    """
    top, left, side = square_around(region)
    cut = picture(image[:, top : top + side, left : left + side])
    bright = cut.resize((TILE, TILE), Image.Resampling.BICUBIC)
    dim = Image.blend(DIM, Image.blend(bright.convert("L").convert("RGB"), bright, 0.4), 0.45)
    small = Image.fromarray(region[top : top + side, left : left + side].astype(np.uint8) * 255)
    # Smooth resampling, cut at one half, gives an outline without the region's staircase.
    inside = np.asarray(small.resize((TILE, TILE), Image.Resampling.BILINEAR)) >= 128
    near = _grow(inside)
    wide = _grow(near)
    drawn = Image.composite(bright, dim, _stencil(inside))
    drawn.paste(EDGE, mask=_stencil(wide & ~near))  # a dark line outside the yellow one: visible on snow and on asphalt
    drawn.paste(OUTLINE, mask=_stencil(near & ~inside))
    return drawn


def square_around(region: np.ndarray) -> tuple[int, int, int]:
    """Return top, left and side of a region's square: 1.5 times its extent, at least half the image, inside it.

    An empty region gives the largest square at the image's centre.
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
    return min(max(int(top), 0), height - side), min(max(int(left), 0), width - side), int(side)


def _stencil(where: np.ndarray) -> Image.Image:
    return Image.fromarray(where.astype(np.uint8) * 255)


def _grow(mask: np.ndarray) -> np.ndarray:
    """Return the mask and its four neighbours."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown
