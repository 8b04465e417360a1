"""Compute thresholds of units: the exact top quantile of activations rounded to float16, from mergeable counts.

The threshold t of a unit is the smallest of its values for which count(a > t) <= floor(quantile * positions). Of all
rates that do not exceed the quantile, the realised one is then the largest that ties allow (Bau et al., CVPR 2017 and
PNAS 2020: P(a > t) = quantile, over every position of every image).

Only values near the threshold matter. A `Bracket`, from a sample of the images, says where to look. A `Tail` counts
each value inside the bracket, and all values above it in one number. The counts then prove whether the threshold is
inside. If it is not, `refine` gives a bracket for another pass over those units: the next `BINS` codes towards the
threshold, then ever wider steps, or, inside a bin of several codes, that bin.

    bracket = sample_bracket(sample, size, border, quantile)
    units = np.arange(activation.shape[1])
    while len(units):
        tail = merge of count_tail(shard[:, units], bracket, size, border) over all shards
        found = tail.result(quantile)
        threshold[units[found.certified]] = found.threshold[found.certified]
        bracket = tail.refine(quantile)[~found.certified]
        units = units[~found.certified]
"""

import numpy as np
from numpy.typing import NDArray

from kernels.dissection.brackets import Bracket, Tail, bracket_of, floor_cut
from kernels.dissection.upsample import (
    Axis,
    Border,
    Geometry,
    Size,
    bits_of,
    blends_zeros,
    frozen,
    geometry,
    refuse_non_finite,
    sample_codes,
)

SAMPLED_ROWS = 16  # and as many columns: the positions of each sampled map from which the bracket is taken


def sample_bracket(activation: NDArray[np.float16], size: Size, border: Border, quantile: float) -> Bracket:
    """Estimate where the thresholds lie, from maps (n, units, h, w) float16 of some images, for example every 50th.

    The result is `bracket_of` the positions that `sampled` takes from each map.
    """
    return bracket_of(sampled(activation, size, border), quantile)


def sampled(activation: NDArray[np.float16], size: Size, border: Border, phase: float = 0.0) -> NDArray[np.uint16]:
    """Return the codes (units, n, positions) at some positions of maps (n, units, h, w) upsampled to `size`.

    The positions of a map are `SAMPLED_ROWS` rows and columns, at phases of the golden ratio, so that they fall on all
    parts of the cells: 512 bytes per unit and image. Another `phase`, from 0 to 1, takes other positions, in case
    images are alike.
    """
    grid = geometry((activation.shape[2], activation.shape[3]), size)
    codes = sample_codes(activation, Geometry(_thinned(grid.rows, phase), _thinned(grid.columns, phase)), border)
    images, units, rows, columns = codes.shape
    return np.ascontiguousarray(codes.transpose(1, 0, 2, 3)).reshape(units, images, rows * columns)


def count_tail(
    activation: NDArray[np.float16], bracket: Bracket, size: Size, border: Border, device: str = "cpu"
) -> Tail:
    """Count the values of maps (n, units, h, w) float16, upsampled to `size`, in each unit's bracket.

    `size` = (h, w) counts the native positions. The caller leaves out images that do not belong to the data (invalid,
    or of another split). With any `device` but "cpu", torch counts there, to the same integers. Raises ValueError if a
    value is not finite, naming the image and the unit by number.
    """
    images, units, h, w = activation.shape
    if len(bracket.floor) != units:
        raise ValueError(f"the bracket is for {len(bracket.floor)} units, the activations have {units}")
    if images * size[0] * size[1] >= 2**31:
        raise ValueError(f"{images} images of {size[0]} x {size[1]} positions overflow int32; use smaller shards")
    if device != "cpu":
        from kernels.dissection import on_device as dissection_torch

        return dissection_torch.count_tail(activation, bracket, size, border, device)
    grid = geometry((h, w), size)
    offset = bracket.offset
    count = np.zeros(offset[-1], np.int32)
    from kernels.dissection import loops  # numba takes a second to import

    bad = loops.tail(
        bits_of(activation),
        frozen(floor_cut(bracket)),
        frozen(bracket.floor),
        frozen(bracket.ceiling),
        frozen(bracket.shift),
        frozen(offset),
        blends_zeros(border),
        frozen(grid.rows.start),
        frozen(grid.rows.fraction),
        frozen(grid.columns.start),
        frozen(grid.columns.fraction),
        count,
    )
    refuse_non_finite(bad, activation.shape[1])
    return Tail(bracket, images * size[0] * size[1], count)


def _thinned(axis: Axis, phase: float) -> Axis:
    """Thin an axis to some of its outputs, spread evenly but for their phase."""
    length = len(axis.cell)
    if length <= SAMPLED_ROWS:
        return axis
    spread = (np.arange(SAMPLED_ROWS) + (np.arange(SAMPLED_ROWS) * (5**0.5 - 1) / 2 + phase) % 1) / SAMPLED_ROWS
    chosen = (spread * length).astype(np.int64)
    return Axis(axis.cell[chosen], axis.fraction[chosen], axis.start)
