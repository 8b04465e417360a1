"""Worker tasks of the stage `concepts`: the label maps of one shard, from every source."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config.base import PIXELS, TRUTH
from pipeline.config.datasets import AnyDataset
from pipeline.data import kinds
from pipeline.errors import MicrotomeError
from pipeline.networks import segmenters
from pipeline.storage.store import StoreRef
from pipeline.workers.resumable import Done

if TYPE_CHECKING:
    from pipeline.data.decode import Stamp


# The id of an image, None if it is gone; by category, the paths of its label maps, and their sizes and times as listed.
Item = tuple[str | None, dict[str, Path | None], dict[str, "Stamp"]]


@dataclass(frozen=True)
class Numbering:
    """One category as tasks name it: its index on the category axis and the number of each of its concepts."""

    name: str
    place: int
    numbers: tuple[int, ...]  # of the concepts, in the order of the source's own numbers 1, 2, ...

    @property
    def source(self) -> str:
        return self.name.partition("/")[0]

    @property
    def own_name(self) -> str:
        """Its name within the source."""
        return self.name.partition("/")[2]


def label_shard(
    dataset: AnyDataset,
    store: Path,
    images: StoreRef,
    shard: str,
    start: int,
    items: list[Item],
    categories: list[Numbering],
    networks: Mapping[str, segmenters.Model],
    image_size: tuple[int, int],
    size: tuple[int, int],
) -> Done:
    """Write the numbered label maps of one shard, in the given categories, on a worker.

    They are made at the size of the images. Another size takes the label under the centre of each position.
    """
    from pipeline.storage.store import write

    maps: dict[str, np.ndarray] = {}  # in the source's own numbers
    refused: dict[str, str] = {}
    for source in dict.fromkeys(category.source for category in categories):
        names = [category.own_name for category in categories if category.source == source]
        if source == TRUTH:
            own, refused = _truth(dataset, items, names, image_size)
        else:
            pixels = np.asarray(images.open()["image"][start : start + len(items)])
            own = _colours(pixels) if source == PIXELS else _segmented(networks[source], pixels, names, items)
        maps |= {f"{source}/{name}": block for name, block in own.items()}
    files, contents = {}, {}
    for category in categories:
        block = np.array([0, *category.numbers], np.uint16)[resized(maps[category.name], size)][:, None]
        files[category.name] = write(store, {"label_map": ((start, category.place, 0, 0), block)})
        # Only truth's digest covers refusals: the others must not depend on whether this task read truth.
        missing = sorted(refused) if category.source == TRUTH else []
        contents[category.name] = hashlib.blake2b(block.tobytes() + repr(missing).encode(), digest_size=16).hexdigest()
    facts = {
        category.name: {
            "content": contents[category.name],
            "refused": refused if category.source == TRUTH else {},
        }
        for category in categories
    }
    return Done(shard, files, own=facts)


def resized(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize label maps (image, y, x): position i of n takes the label at floor((i + 1/2) m / n) of m."""
    if maps.shape[1:] == size:
        return maps
    rows, columns = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip(size, maps.shape[1:], strict=True))
    return maps[:, rows[:, None], columns]


def _truth(
    dataset: AnyDataset,
    items: list[Item],
    names: Sequence[str],
    size: tuple[int, int],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the data set's own label maps, uint16 (image, y, x) by category; also return why images were refused."""
    from pipeline.data.decode import Refused

    maps = {name: np.zeros((len(items), *size), np.uint16) for name in names}
    refused: dict[str, str] = {}
    for at, (image_id, paths, stamps) in enumerate(items):
        if image_id is None:
            continue
        try:
            own = kinds.read_label_maps(dataset, image_id, paths, size, stamps)
        except Refused as error:
            refused[image_id] = error.reason
            continue
        for name in names:
            maps[name][at] = own[name]
    return maps, refused


def _colours(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Return the colour name of every pixel, uint16 (image, y, x), numbered from 1 in the order of `COLOURS`."""
    from kernels.images.colour_names import colour_names

    return {"colour": colour_names(np.moveaxis(pixels, 1, -1)).astype(np.uint16) + 1}


def _segmented(
    model: segmenters.Model,
    pixels: np.ndarray,
    names: Sequence[str],
    items: list[Item],
) -> dict[str, np.ndarray]:
    try:
        return segmenters.label_maps(model, pixels, names)
    except segmenters.NonFiniteScoresError as error:
        (at,) = error.args
        raise MicrotomeError(
            f"segmenter {model.name!r}: the scores for image {items[at][0]!r} are not finite (NaN or infinity)"
        ) from None
