"""Count where units and concepts meet, for their intersection over union (IoU).

A unit is active where its map, upsampled to the size of the label maps and rounded to float16, exceeds its threshold.
IoU(unit, concept) = |active and labelled| / |active or labelled|, with pixels counted over all images (Bau et al., CVPR
2017 and PNAS 2020). With `union="category"`, as in the code of 2017, the union covers only the images in which the
concept's category is labelled at all. If the union is empty, the IoU is 0.

A thousandth to a hundredth of the positions are active, so the work goes there: only cells with a corner above the
threshold are interpolated, and only active pixels look up their labels.

    labels = label_columns(label_map, concept, category)                     # once per shard, for all layers
    counts = Counts.zeros(groups, units, concepts, categories)
    counts.add(count_shard(activation, threshold, labels, group, border))    # one per shard and layer, in any order
    iou(counts, category)
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.dissection.counts import GROUPS, Labels, ShardCounts
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

    Parameters
    ----------
    group : (n,), each image's jackknife group, below `groups`.
    permutation : (n,); image i meets the labels of image permutation[i]. This is the control in which maps and labels
        are unrelated. Areas of concepts are then those of the labels met.
    device : with any device but "cpu", torch counts there, to the same integers.

    Raises
    ------
    ValueError
        If a value is not finite, naming image and unit by number, or if shapes do not fit.
    """
    images, units = activation.shape[:2]
    partner = np.arange(images) if permutation is None else np.asarray(permutation, np.int64)
    membership = np.asarray(group, np.int64)
    if np.shape(threshold) != (units,):
        raise ValueError(f"{np.shape(threshold)} thresholds for {units} units; expected one per unit")
    if (
        membership.shape != (images,)
        or partner.shape != (images,)
        or (permutation is None and images != len(labels.area))
    ):
        raise ValueError(
            f"{images} images, {len(labels.area)} label maps, {membership.shape} groups and {partner.shape} "
            "partners; expected one of each per image"
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
    """Sum values (n, ...) over the images of each group: (groups, ...) int64."""
    sums = np.zeros((groups, *values.shape[1:]), np.int64)
    np.add.at(sums, group, values)
    return sums


def mask(
    activation: NDArray[np.float16], threshold: ArrayLike, size: Size, border: Border = "edge"
) -> NDArray[np.bool_]:
    """Return where one map (h, w) is active at `size`, (H, W) bool, exactly as it is counted; for pictures."""
    return code(upsample(activation, size, border)) > code(np.asarray(threshold, np.float16))
