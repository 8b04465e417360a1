"""Part an image into segments: superpixels, the cells of a grid, or the concepts of a label map.

Segments are numbered from 0 on, int64 (y, x), and there are at most as many as wanted.
"""

from __future__ import annotations

import warnings

import numpy as np

LEVELS = 4
"""Levels of each colour channel by which superpixels of different images are compared."""


def grid(size: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """Return the cells (rows, columns) of an image (y, x), row by row, as equal as whole pixels allow.

    Raises
    ------
    ValueError
        For more cells along a side than pixels.
    """
    if cells[0] > size[0] or cells[1] > size[1] or min(cells) < 1:
        raise ValueError(f"{cells[0]} x {cells[1]} cells for {size[0]} x {size[1]} pixels")
    rows, columns = (np.arange(side) * parts // side for side, parts in zip(size, cells, strict=True))
    return rows[:, None] * cells[1] + columns


def slic(pixels: np.ndarray, count: int, compactness: float, sigma: float) -> np.ndarray:
    """Part an image into superpixels that are alike in colour and near in place.

    Achanta et al., "SLIC superpixels" (TPAMI 2012), as scikit-image computes them, in Lab for three channels. Where it
    gives more than `count`, the smallest joins the neighbour with the longest common border, until there are so many.

    Parameters
    ----------
    pixels : floats from 0 to 1, (channel, y, x).
    compactness : how much place weighs against colour. sigma : of the Gaussian that smooths first, in pixels.

    Raises
    ------
    ImportError
        Without scikit-image.
    """
    from skimage.segmentation import slic as superpixels

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = superpixels(
            np.ascontiguousarray(pixels.transpose(1, 2, 0), np.float64),
            n_segments=count,
            compactness=compactness,
            sigma=sigma,
            start_label=0,
            channel_axis=-1,
            convert2lab=len(pixels) == 3,
        )
    return joined(_numbered(found.astype(np.int64)), count)


def joined(segments: np.ndarray, count: int) -> np.ndarray:
    """Join the smallest segment with the neighbour with the longest common border, until there are at most `count`."""
    found = segments.copy()
    while (present := int(found.max()) + 1) > count:
        smallest = int(np.bincount(found.ravel()).argmin())
        inside = found == smallest
        borders = np.zeros(present, np.int64)
        for a, b in ((found[1:], found[:-1]), (found[:, 1:], found[:, :-1])):
            for own, other in ((a, b), (b, a)):
                borders += np.bincount(other[(own == smallest) & (other != smallest)], minlength=present)
        found[inside] = int(borders.argmax())
        found = _numbered(found)
    return found


def _numbered(segments: np.ndarray) -> np.ndarray:
    """Number segments without gaps, in the order of their numbers."""
    return np.unique(segments, return_inverse=True)[1].reshape(segments.shape)


def labelled(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Make a segment of each label that is present: the largest `count` - 1 and the rest, or all if there are no more.

    Label 0, no label at all, is part of the rest.

    Parameters
    ----------
    labels : integers from 0 up (y, x).

    Returns
    -------
    segments (y, x) and the label of each segment, int64 (segment,), 0 for the rest, which comes last where there is
    one.
    """
    numbers, areas = np.unique(labels[labels > 0], return_counts=True)
    order = np.lexsort((numbers, -areas))
    rest = bool((labels == 0).any())
    if len(numbers) + rest > count:
        order, rest = order[: count - 1], True
    kept = np.sort(numbers[order]).astype(np.int64)
    place = np.searchsorted(kept, labels).clip(max=max(len(kept) - 1, 0))
    own = kept[place] == labels if len(kept) else np.zeros(labels.shape, bool)
    return np.where(own, place, len(kept)), np.append(kept, 0) if rest else kept


def enlarged(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a label map at another size (y, x): each pixel has the label of the nearest place."""
    rows, columns = (
        ((2 * np.arange(side) + 1) * own) // (2 * side) for side, own in zip(size, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def colours(pixels: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Return the bin of each segment's mean colour, int64 (segment,): `LEVELS` of each channel, the last one fastest.

    Parameters
    ----------
    pixels : floats from 0 to 1, (channel, y, x).
    """
    area = np.bincount(segments.ravel())
    found = np.zeros(len(area), np.int64)
    for channel in pixels:
        mean = np.bincount(segments.ravel(), channel.ravel()) / np.maximum(area, 1)
        found = found * LEVELS + np.minimum((mean * LEVELS).astype(np.int64), LEVELS - 1)
    return found
