"""The segments of images: what black boxes show or cover, and what each segment is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata, util

import numpy as np

from kernels.attribution import segments as kernels
from pipeline.errors import MicrotomeError
from pipeline.stages.attribute.options import Grid, Labels, Options, Patches, Segmented, Segments, Slic
from pipeline.storage.identity import digest

MISSING = (
    "kind: slic needs scikit-image, which is not installed: install the extra, `pip install '.[segments]'` in "
    "Microtome's folder, or use `grid`"
)


def settings_of(methods: Mapping[str, Options]) -> dict[str, Segments]:
    """Return the different settings of methods by the name of their store, without `.zarr`."""
    found = [each.segments for each in methods.values() if isinstance(each, Segmented)]
    return {name_of(each): each for each in found}


def name_of(segments: Segments) -> str:
    """Return the name of the store of a setting, without `.zarr`."""
    return f"segments-{segments.kind}-{digest(segments.key)[:6]}"  # type: ignore[attr-defined]


def library(segments: Segments) -> str | None:
    """Return the versions of the libraries that the segments depend on, None without any."""
    if not isinstance(segments, Slic):
        return None
    return f"{metadata.version('scikit-image')}, scipy {metadata.version('scipy')}"


def lacking(segments: Segments, size: tuple[int, int]) -> str:
    """Return why images (y, x) cannot be parted so; empty if they can."""
    if isinstance(segments, Slic):
        if util.find_spec("skimage") is None:
            return MISSING
        if segments.count > size[0] * size[1]:
            return f"count: {segments.count} superpixels of {size[0]} x {size[1]} pixels"
    if isinstance(segments, Grid) and (segments.cells[0] > size[0] or segments.cells[1] > size[1]):
        return f"cells: {segments.cells[0]} x {segments.cells[1]} cells of {size[0]} x {size[1]} pixels"
    return ""


def part(
    segments: Segments,
    pixels: np.ndarray,
    labels: np.ndarray | None = None,
    patches: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the segments of images, int64 (image, y, x), and what each of them is, int64 (image, segment).

    What a segment is can be compared between images: the bin of its mean colour (`slic`), its place (`grid`,
    `patches`), or the number of its concept, 0 for the rest (`labels`). An image with fewer segments has -1 there.

    Parameters
    ----------
    pixels : floats from 0 to 1, (image, channel, y, x).
    labels : label maps (image, y, x) of the category, at any size. patches : (rows, columns) of the network.
    """
    size = (pixels.shape[2], pixels.shape[3])
    most = segments.most(patches)
    assert most is not None
    if isinstance(segments, (Grid, Patches)):
        cells = segments.cells if isinstance(segments, Grid) else patches
        assert cells is not None
        found = [(kernels.grid(size, cells), np.arange(most))] * len(pixels)
    elif isinstance(segments, Labels):
        assert labels is not None
        found = [kernels.labelled(kernels.enlarged(each, size), segments.count) for each in labels]
    else:
        assert isinstance(segments, Slic)
        if util.find_spec("skimage") is None:
            raise MicrotomeError(MISSING)
        parted = [kernels.slic(each, segments.count, segments.compactness, segments.sigma) for each in pixels]
        found = [(each, kernels.colours(image, each)) for each, image in zip(parted, pixels, strict=True)]
    return np.stack([each for each, _ in found]), _rows([what for _, what in found], most)


def _rows(values: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Return rows of different lengths as (row, width), filled up with -1."""
    found = np.full((len(values), width), -1, np.int64)
    for row, own in zip(found, values, strict=True):
        row[: len(own)] = own
    return found
