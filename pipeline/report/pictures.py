"""The images of a data set as pictures on pages, and the numbers of a page's script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.storage.read_back import open_store

JPEG: dict[str, Any] = {"quality": 85, "subsampling": 0}


@dataclass(frozen=True)
class Pictures:
    """The images of a data set: small columns read once, pixels on demand."""

    pixels: Any
    ids: np.ndarray
    labels: np.ndarray
    names: list[str]
    """Names of the classes, by label."""
    valid: np.ndarray
    split: np.ndarray

    @cached_property
    def classes(self) -> list[str]:
        """Class name of every image, "" without a label."""
        return [self.names[label] if 0 <= label < len(self.names) else "" for label in self.labels]

    def shown(self, split: str | None) -> np.ndarray:
        """Return (image,) bool: the images that may be shown. If no image has this split, all may be shown."""
        of_split = self.split == split
        return self.valid & of_split if of_split.any() else self.valid


def open_pictures(path: Path) -> Pictures:
    """Open the images of a data set."""
    store = open_store(path)
    return Pictures(
        pixels=store["image"],
        ids=np.asarray(store["image_id"][:]),
        labels=np.asarray(store["label"][:]),
        names=[str(name) for name in store.attrs.get("classes") or []],
        valid=np.asarray(store["valid"][:], dtype=bool),
        split=np.asarray(store["split"][:]),
    )


def picture(image: np.ndarray) -> Image.Image:
    """Return an image (channel, y, x) uint8 of one, three or more channels as an RGB picture of its size."""
    cut = np.moveaxis(image[:3], 0, -1)
    return Image.fromarray(np.repeat(cut[..., :1], 3, axis=2) if cut.shape[2] < 3 else np.ascontiguousarray(cut))


def montage(tiles: Sequence[Image.Image]) -> Image.Image:
    """Put pictures of one size side by side; the page draws the gaps, in the colour of its background."""
    width, height = tiles[0].size
    canvas = Image.new("RGB", (len(tiles) * width, height))
    for place, tile in enumerate(tiles):
        canvas.paste(tile, (place * width, 0))
    return canvas


class Numbers:
    """Numbers for items, in order of first use."""

    def __init__(self) -> None:
        self.known: dict[Any, int] = {}

    def number(self, item: Any) -> int:
        return self.known.setdefault(item, len(self.known))

    @property
    def items(self) -> list[Any]:
        return list(self.known)


def rounded(value: float) -> float | None:
    """Round to five digits, more than a screen shows; None for NaN, which JSON has not."""
    return None if math.isnan(value) else float(f"{value:.5g}")
