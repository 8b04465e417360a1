"""Intersection over union of units and concepts, from integer counts that can be merged.

A unit is active where its map, upsampled to the size of the label maps and rounded to float16, exceeds its threshold.
IoU(unit, concept) = |active and labelled| / |active or labelled|, pixels counted over all images (Bau et al., CVPR 2017
and PNAS 2020); with `union="category"`, as in the code of 2017, the union runs only over the images in which the
concept's category is labelled at all. Where the union is empty, the IoU is 0.

A thousandth to a hundredth of the positions are active, so the work goes where they are: only cells with a corner above
the threshold are interpolated, and only active pixels look up their labels.

    labels = label_columns(label_map, concept, category)                     # once per shard, for all layers
    counts = Counts.zeros(groups, units, concepts, categories)
    counts.add(count_shard(activation, threshold, labels, group, border))    # one per shard and layer, in any order
    iou(counts, category)
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.dissection.half import code, cut
from kernels.dissection.upsample import (
    Border,
    Size,
    bits_of,
    blends_zeros,
    frozen,
    geometry,
    refuse_non_finite,
    upsample,
)

Union = Literal["all", "category"]
GROUPS = 20  # of images by hash, for the jackknife and the halves
ALL = slice(None)


def iou(counts: "Counts", category: ArrayLike, union: Union = "all", groups: slice = ALL) -> NDArray[np.float64]:
    """IoU (units, concepts) float64 of counts over some of their groups, or all; 0 where the union is empty.

    `category` (concepts,) is the category of each concept, as its place on the label maps' axis.
    """
    together = counts.intersection[groups].sum(axis=0)
    unit = area_seen(counts, union)[groups].sum(axis=0)[:, np.asarray(category, np.int64)]
    return ratio(together, unit + counts.concept_area[groups].sum(axis=0) - together, 0.0)


def area_seen(counts: "Counts", union: Union) -> NDArray[np.int64]:
    """Active pixels of each unit in the images of a union, (groups, units, categories) int64."""
    if union == "all":
        return np.broadcast_to(counts.unit_area[:, :, None], counts.unit_area_in_category.shape)
    if union == "category":
        return counts.unit_area_in_category
    raise ValueError(f"union {union!r} is not known; expected 'all' or 'category'")


def ratio(part: NDArray, whole: NDArray, undefined: float) -> NDArray[np.float64]:
    """part / whole in float64, and `undefined` where the whole is 0."""
    shape = np.broadcast_shapes(np.shape(part), np.shape(whole))
    return np.divide(part, whole, out=np.full(shape, undefined), where=np.broadcast_to(whole, shape) != 0)


@dataclass(frozen=True)
class Labels:
    """The label maps of a shard, prepared for counting.

    Attributes: `column` (n, H * W, categories) uint16, the concept's column at each pixel, or `concepts` for none;
    `present` (n, categories) bool, whether any pixel is labelled; `area` (n, concepts) int64, pixels of each concept;
    `size` (H, W).
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
    """What one shard adds to `Counts`, small enough to send: `count` (m,) int32 pixels of the intersection at `key`
    (m,) int64 = (group * units + unit) * concepts + concept, ascending, zeros left out; the rest as in `Counts`."""

    key: NDArray[np.int64]
    count: NDArray[np.int32]
    unit_area: NDArray[np.int64]
    unit_area_in_category: NDArray[np.int64]
    concept_area: NDArray[np.int64]
    pixels: NDArray[np.int64]
    pixels_in_category: NDArray[np.int64]


@dataclass(frozen=True)
class Counts:
    """Pixels by jackknife group, int64, so that the order of adding does not matter.

    Attributes: `intersection` (groups, units, concepts); `unit_area` (groups, units), active pixels;
    `unit_area_in_category` (groups, units, categories), those in images where the category is labelled;
    `concept_area` (groups, concepts); `pixels` (groups,); `pixels_in_category` (groups, categories), all pixels of the
    images where the category is labelled.
    """

    intersection: NDArray[np.int64]
    unit_area: NDArray[np.int64]
    unit_area_in_category: NDArray[np.int64]
    concept_area: NDArray[np.int64]
    pixels: NDArray[np.int64]
    pixels_in_category: NDArray[np.int64]

    @classmethod
    def zeros(cls, groups: int, units: int, concepts: int, categories: int) -> "Counts":
        """Counts of no image."""
        return cls(
            np.zeros((groups, units, concepts), np.int64),
            np.zeros((groups, units), np.int64),
            np.zeros((groups, units, categories), np.int64),
            np.zeros((groups, concepts), np.int64),
            np.zeros(groups, np.int64),
            np.zeros((groups, categories), np.int64),
        )

    def add(self, shard: ShardCounts) -> None:
        """Add a shard, in place. Raises ValueError when it was counted for other groups, units, or concepts."""
        mine = (*self.intersection.shape, self.pixels_in_category.shape[1])
        its = (*shard.unit_area.shape, shard.concept_area.shape[1], shard.pixels_in_category.shape[1])
        if mine != its:
            raise ValueError(
                f"these are counts of (groups, units, concepts, categories) = {mine}, the shard's of {its}"
            )
        self.intersection.reshape(-1)[shard.key] += shard.count
        for name in ("unit_area", "unit_area_in_category", "concept_area", "pixels", "pixels_in_category"):
            total = getattr(self, name)
            total += getattr(shard, name)


def label_columns(label_map: NDArray[np.uint16], concept: ArrayLike, category: ArrayLike) -> Labels:
    """Prepare label maps (n, categories, H, W) uint16 of concept numbers, 0 = nothing, for counting some concepts.

    `concept` (concepts,) are the numbers to count, in the order of the columns, and `category` (concepts,) the place of
    each one's category on the second axis. Other numbers are not counted, but they make their category present. Raises
    ValueError for a concept found in another category than its own.
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
                    f"it was declared to belong to category {right}"
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


def count_shard(
    activation: NDArray[np.float16],
    threshold: NDArray[np.float16],
    labels: Labels,
    group: ArrayLike,
    border: Border,
    permutation: ArrayLike | None = None,
    groups: int = GROUPS,
    device: str = "cpu",
) -> ShardCounts:
    """Count where maps (n, units, h, w) float16 exceed the thresholds (units,), and which concepts are there.

    `group` (n,) is each image's jackknife group, below `groups`. With a `permutation` (n,), image i meets the labels of
    image permutation[i]: the control in which maps and labels have nothing to do with each other; areas of concepts are
    then those of the labels met. `device` other than "cpu" counts with torch there, to the same integers. Raises
    ValueError for a value that is not finite, naming image and unit by number, and for shapes that do not fit.
    """
    images, units = activation.shape[:2]
    partner = np.arange(images) if permutation is None else np.asarray(permutation, np.int64)
    membership = np.asarray(group, np.int64)
    if np.shape(threshold) != (units,):
        raise ValueError(f"{np.shape(threshold)} thresholds for {units} units; expected one each")
    if (
        membership.shape != (images,)
        or partner.shape != (images,)
        or (permutation is None and images != len(labels.area))
    ):
        raise ValueError(
            f"{images} images, {len(labels.area)} label maps, {membership.shape} groups and {partner.shape} "
            "partners; expected one each per image"
        )
    if images and not (membership.min() >= 0 and membership.max() < groups):
        raise ValueError(
            f"groups of images go from {membership.min()} to {membership.max()}; expected 0 to {groups - 1}"
        )
    if images and not (partner.min() >= 0 and partner.max() < len(labels.area)):
        raise ValueError(
            f"the permutation goes from {partner.min()} to {partner.max()}, of {len(labels.area)} label maps"
        )
    if images * labels.size[0] * labels.size[1] >= 2**31:
        raise ValueError(f"{images} images of {labels.size} pixels overflow int32; use smaller shards")
    if device != "cpu":
        from kernels.dissection import on_device as dissection_torch

        counted = dissection_torch.intersections(
            activation, threshold, labels, membership, border, partner, groups, device
        )
    else:
        counted = _intersections(activation, threshold, labels, membership, border, partner, groups)
    key, count, area, area_in_category = counted
    pixels = labels.size[0] * labels.size[1]
    return ShardCounts(
        key,
        count,
        area,
        area_in_category,
        _by_group(labels.area[partner], membership, groups),
        np.bincount(membership, minlength=groups) * pixels,
        _by_group(labels.present[partner], membership, groups) * pixels,
    )


def _intersections(
    activation: NDArray[np.float16],
    threshold: NDArray[np.float16],
    labels: Labels,
    group: NDArray[np.int64],
    border: Border,
    partner: NDArray[np.int64],
    groups: int,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    units, categories = activation.shape[1], labels.column.shape[2]
    grid = geometry((activation.shape[2], activation.shape[3]), labels.size)
    area = np.zeros((groups, units), np.int64)
    area_in_category = np.zeros((groups, units, categories), np.int64)
    from kernels.dissection import loops  # numba takes a second to import

    bad, key, count = loops.intersections(
        bits_of(activation),
        frozen(code(threshold).astype(np.int64)),
        frozen(cut(threshold)),
        frozen(labels.column),
        frozen(labels.present),
        frozen(partner),
        frozen(np.argsort(group, kind="stable")),
        frozen(np.searchsorted(np.sort(group), np.arange(groups + 1))),
        labels.concepts,
        blends_zeros(border),
        frozen(grid.rows.start),
        frozen(grid.rows.fraction),
        frozen(grid.columns.start),
        frozen(grid.columns.fraction),
        area,
        area_in_category,
    )
    refuse_non_finite(bad, activation.shape[1])
    return key, count, area, area_in_category


def _by_group(values: NDArray, group: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
    """Sums (groups, ...) int64 of values (n, ...) over the images of each group."""
    sums = np.zeros((groups, *values.shape[1:]), np.int64)
    np.add.at(sums, group, values)
    return sums


def mask(
    activation: NDArray[np.float16], threshold: ArrayLike, size: Size, border: Border = "edge"
) -> NDArray[np.bool_]:
    """Where one map (h, w) is active at `size`, (H, W) bool, as it is counted: for pictures."""
    return code(upsample(activation, size, border)) > code(np.asarray(threshold, np.float16))
