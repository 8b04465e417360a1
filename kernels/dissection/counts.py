"""Count pixels of units, concepts and their intersections, in integers that can be merged, and compute IoU from them.

Counts are kept by group of images, for the jackknife and for held-out IoU.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.dissection.upsample import Size, frozen

Union = Literal["all", "category"]
GROUPS = 20  # of images, by hash, for the jackknife and the halves
ALL = slice(None)


def iou(counts: "Counts", category: ArrayLike, union: Union = "all", groups: slice = ALL) -> NDArray[np.float64]:
    """Compute IoU (units, concepts) float64 over all groups or some of them; 0 where the union is empty.

    `category` (concepts,) is the category of each concept, as its index on the label maps' axis.
    """
    together = counts.intersection[groups].sum(axis=0)
    unit = area_seen(counts, union)[groups].sum(axis=0)[:, np.asarray(category, np.int64)]
    return ratio(together, unit + counts.concept_area[groups].sum(axis=0) - together, 0.0)


def area_seen(counts: "Counts", union: Union) -> NDArray[np.int64]:
    """Count the active pixels of each unit in the images of a union, (groups, units, categories) int64."""
    if union == "all":
        return np.broadcast_to(counts.unit_area[:, :, None], counts.unit_area_in_category.shape)
    if union == "category":
        return counts.unit_area_in_category
    raise ValueError(f"union {union!r} is not known; expected 'all' or 'category'")


def ratio(part: NDArray, whole: NDArray, undefined: float) -> NDArray[np.float64]:
    """Compute part / whole in float64, with `undefined` where the whole is 0."""
    shape = np.broadcast_shapes(np.shape(part), np.shape(whole))
    return np.divide(part, whole, out=np.full(shape, undefined), where=np.broadcast_to(whole, shape) != 0)


@dataclass(frozen=True)
class Labels:
    """The label maps of a shard, prepared for counting.

    Attributes
    ----------
    column : (n, H * W, categories) uint16, the concept's column at each pixel, or `concepts` for none.
    present : (n, categories) bool, whether any pixel is labelled.
    area : (n, concepts) int64, pixels of each concept.
    size : (H, W).
    """

    column: NDArray[np.uint16]
    present: NDArray[np.bool_]
    area: NDArray[np.int64]
    size: Size

    @property
    def concepts(self) -> int:
        return self.area.shape[1]


@dataclass(frozen=True)
class ShardCounts:
    """What one shard adds to `Counts`, small enough to send.

    Attributes
    ----------
    key : (m,) int64, (group * units + unit) * concepts + concept, ascending, without zero counts.
    count : (m,) int32, pixels of the intersection at each key.
    unit_area, unit_area_in_category, concept_area, pixels, pixels_in_category : as in `Counts`.
    """

    key: NDArray[np.int64]
    count: NDArray[np.int32]
    unit_area: NDArray[np.int64]
    unit_area_in_category: NDArray[np.int64]
    concept_area: NDArray[np.int64]
    pixels: NDArray[np.int64]
    pixels_in_category: NDArray[np.int64]


@dataclass(frozen=True)
class Counts:
    """Pixel counts by jackknife group, in int64, so the order of addition does not matter.

    Attributes
    ----------
    intersection : (groups, units, concepts).
    unit_area : (groups, units), active pixels.
    unit_area_in_category : (groups, units, categories), active pixels in images where the category is labelled.
    concept_area : (groups, concepts).
    pixels : (groups,).
    pixels_in_category : (groups, categories), all pixels of the images where the category is labelled.
    """

    intersection: NDArray[np.int64]
    unit_area: NDArray[np.int64]
    unit_area_in_category: NDArray[np.int64]
    concept_area: NDArray[np.int64]
    pixels: NDArray[np.int64]
    pixels_in_category: NDArray[np.int64]

    @classmethod
    def zeros(cls, groups: int, units: int, concepts: int, categories: int) -> "Counts":
        """Return the counts of no image."""
        return cls(
            np.zeros((groups, units, concepts), np.int64),
            np.zeros((groups, units), np.int64),
            np.zeros((groups, units, categories), np.int64),
            np.zeros((groups, concepts), np.int64),
            np.zeros(groups, np.int64),
            np.zeros((groups, categories), np.int64),
        )

    def add(self, shard: ShardCounts) -> None:
        """Add a shard in place. Raises ValueError if its groups, units, concepts or categories differ."""
        mine = (*self.intersection.shape, self.pixels_in_category.shape[1])
        its = (*shard.unit_area.shape, shard.concept_area.shape[1], shard.pixels_in_category.shape[1])
        if mine != its:
            raise ValueError(f"these counts have (groups, units, concepts, categories) = {mine}, the shard has {its}")
        self.intersection.reshape(-1)[shard.key] += shard.count
        for name in ("unit_area", "unit_area_in_category", "concept_area", "pixels", "pixels_in_category"):
            total = getattr(self, name)
            total += getattr(shard, name)


def label_columns(label_map: NDArray[np.uint16], concept: ArrayLike, category: ArrayLike) -> Labels:
    """Prepare label maps (n, categories, H, W) uint16 of concept numbers, 0 = nothing, for counting some concepts.

    Other numbers are not counted, but they make their category present. Raises ValueError if a concept is found in a
    category other than its own.

    Parameters
    ----------
    concept : (concepts,), the numbers to count, in the order of the columns.
    category : (concepts,), index of each concept's category on the second axis.
    """
    if label_map.dtype != np.uint16 or label_map.ndim != 4:
        raise ValueError(
            f"label maps are {label_map.dtype} of shape {label_map.shape}; expected uint16 (image, category, y, x)"
        )
    images, categories, height, width = label_map.shape
    number, place = np.asarray(concept, np.int64), np.asarray(category, np.int64)
    concepts = len(number)
    _check_concepts(number, place, categories)
    elsewhere = concepts + 1
    lookup = np.full((categories, 65536), concepts, np.uint16)
    lookup[:, number] = elsewhere
    lookup[place, number] = np.arange(concepts)
    column = np.empty((images, height * width, categories), np.uint16)
    present = np.zeros((images, categories), np.bool_)
    area = np.zeros((images, concepts + 2), np.int64)
    from kernels.dissection import loops  # numba takes a second to import

    loops.label_columns(frozen(label_map), frozen(lookup), column, present, area)
    if area[:, elsewhere].any():
        image = int(np.flatnonzero(area[:, elsewhere])[0])
        for k in range(categories):
            strange = np.intersect1d(label_map[image, k], number[place != k])
            if len(strange):
                right = int(place[number == strange[0]][0])
                raise ValueError(
                    f"the label map of image {image} holds concept {strange[0]} in category {k}; "
                    f"it was declared in category {right}"
                )
    return Labels(column, present, area[:, :concepts].copy(), (height, width))


def _check_concepts(number: NDArray[np.int64], place: NDArray[np.int64], categories: int) -> None:
    if number.shape != place.shape or number.ndim != 1:
        raise ValueError(f"{number.shape} concepts and {place.shape} categories; expected one category per concept")
    if len(number) and not (number.min() >= 1 and number.max() <= 65535 and len(np.unique(number)) == len(number)):
        raise ValueError("concept numbers must be unique, from 1 to 65535; 0 stands for nothing")
    if len(number) > 65533:
        raise ValueError(f"{len(number)} concepts; at most 65533 can be counted at once")
    if len(place) and not (place.min() >= 0 and place.max() < categories):
        raise ValueError(f"categories of concepts go from {place.min()} to {place.max()}; the maps have {categories}")
