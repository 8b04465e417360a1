"""Thresholds of units: the exact top quantile of activations rounded to float16, from counts that can be merged.

The threshold t of a unit is the smallest of its values for which count(a > t) <= floor(quantile * positions): of all
rates that do not exceed the quantile, the realised one is the largest that ties allow (Bau et al., CVPR 2017 and PNAS
2020: P(a > t) = quantile, over every position of every image).

Only values near the threshold matter. A `Bracket` says where to look, from a sample of the images; a `Tail` counts
each value inside it, and in one number all that lie above; the counts themselves prove afterwards whether the threshold
is inside. Where it is not, `refine` gives a bracket for another pass over those units: the next `BINS` codes towards
the threshold, then ever wider steps, or, inside a bin of several codes, that bin.

    bracket = sample_bracket(sample, size, border, quantile)
    units = np.arange(activation.shape[1])
    while len(units):
        tail = merge of count_tail(shard[:, units], bracket, size, border) over all shards
        found = tail.result(quantile)
        threshold[units[found.certified]] = found.threshold[found.certified]
        bracket = tail.refine(quantile)[~found.certified]
        units = units[~found.certified]
"""

from dataclasses import dataclass
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from kernels.dissection.half import HIGHEST, LOWEST, cut, value
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

BINS = 2048  # of a unit, at most: wider brackets get bins of several codes, and another pass inside one of them
MARGINS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0)  # a sampled bracket reaches from one of these times the quantile to a part
ERRORS = 3.0  # standard errors by which a sampled bracket must hold the quantile
SAMPLED_ROWS = 16  # and as many columns: the positions of each sampled map that the bracket is taken from


@dataclass(frozen=True)
class Bracket:
    """Codes between which each unit's threshold is looked for: floor <= code < ceiling; both (units,) int64.

    `bins` of a unit, at most: a wider bracket gets bins of several codes, and another pass inside one of them.
    """

    floor: NDArray[np.int64]
    ceiling: NDArray[np.int64]
    bins: int = BINS

    def __post_init__(self) -> None:
        if self.floor.shape != self.ceiling.shape or np.any(self.floor >= self.ceiling):
            raise ValueError("a bracket needs one floor and one ceiling per unit, the floor below the ceiling")

    def __getitem__(self, units: NDArray) -> "Bracket":
        return Bracket(self.floor[units], self.ceiling[units], self.bins)

    @property
    def shift(self) -> NDArray[np.int64]:
        """The binary logarithm of the codes in one bin: 0 unless the bracket is wider than `bins`."""
        bins = (self.ceiling - self.floor + self.bins - 1) // self.bins
        return np.ceil(np.log2(bins)).astype(np.int64)

    @property
    def offset(self) -> NDArray[np.int64]:
        """Where each unit's bins start, (units + 1,): those of its bracket, then one for all from the ceiling up."""
        width = self.ceiling - self.floor
        bins = ((width - 1) >> self.shift) + 2
        return np.concatenate([[0], np.cumsum(bins)]).astype(np.int64)


@dataclass(frozen=True)
class Thresholds:
    """What a tail says of each unit, each (units,): `threshold` float16, `active` int64 (values above the threshold),
    `certified` bool. Where not certified, the threshold is NaN and the count is -1: another pass is due."""

    threshold: NDArray[np.float16]
    active: NDArray[np.int64]
    certified: NDArray[np.bool_]


@dataclass(frozen=True)
class Tail:
    """Counted values of each unit: `count` by bins (see `Bracket.offset`) among `positions` values in all.

    Integers, so merging in any order gives the same bits. At most one more count than `Bracket.bins` a unit, whatever
    the data.
    """

    bracket: Bracket
    positions: int
    count: NDArray[np.integer]

    def merge(self, other: "Tail") -> "Tail":
        """The tail of both sets of images. Raises ValueError when they were counted in different brackets."""
        self._refuse_another_bracket(other)
        return Tail(self.bracket, self.positions + other.positions, self.count.astype(np.int64) + other.count)

    def without(self, other: "Tail") -> "Tail":
        """The tail of these images but those of `other`, which has to be of some of them."""
        self._refuse_another_bracket(other)
        left = self.count.astype(np.int64) - other.count
        if other.positions > self.positions or np.any(left < 0):
            raise ValueError("these tails are not those of some images and of a part of them")
        return Tail(self.bracket, self.positions - other.positions, left)

    def _refuse_another_bracket(self, other: "Tail") -> None:
        mine, its = self.bracket, other.bracket
        same = np.array_equal(mine.floor, its.floor) and np.array_equal(mine.ceiling, its.ceiling)
        if not same or mine.bins != its.bins:
            raise ValueError("these tails were counted in different brackets; count both shards in one bracket")

    def result(self, quantile: float) -> Thresholds:
        """The thresholds, with the proof of each: more than floor(quantile * positions) values at or above it, and no
        more than that above it."""
        low, high, above = self._locate(quantile)
        certified = (low >= 0) & (high - low == 1)
        threshold = np.where(certified, value(np.where(certified, low, 0)), np.float16(np.nan))
        return Thresholds(threshold, np.where(certified, above, -1), certified)

    def refine(self, quantile: float) -> Bracket:
        """Where each unit's threshold lies by these counts: below the floor, above the ceiling, or in one bin."""
        low, high, _ = self._locate(quantile)
        width = self.bracket.ceiling - self.bracket.floor
        step = np.where(width < BINS, BINS, 4 * width)
        low = np.where(low < 0, np.maximum(high - step, LOWEST), low)
        return Bracket(low, np.where(high > HIGHEST, np.minimum(low + step, HIGHEST + 1), high))

    def _locate(self, quantile: float) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Codes low <= t < high of each unit and its count from `high` up; low is -1 where t is below the floor."""
        limit = allowed(quantile, self.positions)
        floor, ceiling, shift, offset = (
            self.bracket.floor,
            self.bracket.ceiling,
            self.bracket.shift,
            self.bracket.offset,
        )
        units = len(floor)
        low, high, above = np.full(units, -1), floor.copy(), np.zeros(units, np.int64)
        for unit in range(units):
            at_or_above = np.cumsum(self.count[offset[unit] : offset[unit + 1]][::-1], dtype=np.int64)[::-1]
            passing = np.flatnonzero(at_or_above > limit)
            if len(passing) == 0:
                above[unit] = at_or_above[0]
                continue
            bin_ = passing[-1]
            if bin_ == len(at_or_above) - 1:
                low[unit], high[unit] = ceiling[unit], HIGHEST + 1
                continue
            low[unit] = floor[unit] + (bin_ << shift[unit])
            high[unit] = min(low[unit] + (1 << shift[unit]), ceiling[unit])
            above[unit] = at_or_above[bin_ + 1]
        return low, high, above


def sample_bracket(activation: NDArray[np.float16], size: Size, border: Border, quantile: float) -> Bracket:
    """Where the thresholds probably lie, from maps (n, units, h, w) float16 of some images: those of every 50th, say.

    It is `bracket_of` what `sampled` takes of each map.
    """
    return bracket_of(sampled(activation, size, border), quantile)


def sampled(activation: NDArray[np.float16], size: Size, border: Border, phase: float = 0.0) -> NDArray[np.uint16]:
    """The codes (units, n, positions) at some positions of maps (n, units, h, w) upsampled to `size`.

    Of each map `SAMPLED_ROWS` rows and columns are taken, at phases of the golden ratio, so that they fall on all parts
    of the cells: 512 bytes a unit and image. Another `phase`, from 0 to 1, takes others: images may be alike.
    """
    grid = geometry((activation.shape[2], activation.shape[3]), size)
    codes = sample_codes(activation, Geometry(_thinned(grid.rows, phase), _thinned(grid.columns, phase)), border)
    images, units, rows, columns = codes.shape
    return np.ascontiguousarray(codes.transpose(1, 0, 2, 3)).reshape(units, images, rows * columns)


def bracket_of(
    codes: NDArray[np.uint16], quantile: float, errors: float = ERRORS, bins: int = BINS, margin: float = MARGINS[0]
) -> Bracket:
    """Where the thresholds probably lie, by sampled codes (units, n, positions), within so many standard errors and at
    least from `margin` times the quantile to one part in it.

    The images should be spread over the data set: a sample from one class costs further passes, though never a wrong
    threshold. A hundred or two are enough; memory is some 2 kB a unit and image. A ceiling lies one code above the
    sample's value, so that a unit that is zero at most positions is certified at once.
    """
    allowed(quantile, codes[0].size)  # refuses what is no quantile, and no images
    return Bracket(*_reach(codes, quantile, errors, margin), bins)


def count_tail(
    activation: NDArray[np.float16], bracket: Bracket, size: Size, border: Border, device: str = "cpu"
) -> Tail:
    """Count the values of maps (n, units, h, w) float16, upsampled to `size`, in each unit's bracket.

    `size` = (h, w) counts the native positions. Images that do not belong to the data (invalid, other split) are left
    out by the caller. `device` other than "cpu" counts with torch there, to the same integers. Raises ValueError for a
    value that is not finite, naming the image and the unit by number.
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


def floor_cut(bracket: Bracket) -> NDArray[np.float64]:
    """The float64 above which a value rounds to the unit's floor or higher."""
    return cut(value(bracket.floor - 1))


def allowed(quantile: float, positions: int) -> int:
    """floor(quantile * positions), with the quantile as the decimal number that a person wrote: 0.29 of 100 is 29.

    Raises ValueError unless 0 < quantile < 1 and there are positions.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"the quantile is {quantile}; expected a number between 0 and 1, such as 0.01")
    if positions < 1:
        raise ValueError("no positions were counted; expected at least one image")
    return int(Decimal(repr(float(quantile))) * positions)


def _reach(
    codes: NDArray[np.uint16], quantile: float, errors: float, least: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Floor and ceiling of each unit, from sampled codes (units, images, positions).

    The floor is the first of some ever lower sample quantiles at which the share of values reaches the quantile by
    so many standard errors of the mean over images; the ceiling likewise from above. So a unit that fires on few
    images gets a wide bracket, one that fires on all a narrow one.
    """
    units, images, positions = codes.shape
    total = images * positions
    ordered = np.sort(codes.reshape(units, total), axis=1)
    floor, ceiling = ordered[:, 0].astype(np.int64), ordered[:, -1].astype(np.int64) + 1
    for margin in (margin for margin in reversed(MARGINS) if margin >= least):
        if margin * quantile < 1:
            candidate = ordered[:, total - 1 - allowed(margin * quantile, total)]
            mean, error = _rate(codes >= candidate[:, None, None])
            reached = (mean - errors * error > quantile) | (margin == MARGINS[-1])
            floor = np.where(reached, candidate, floor)
        candidate = ordered[:, total - 1 - allowed(quantile / margin, total)] + 1
        mean, error = _rate(codes >= candidate[:, None, None])
        ceiling = np.where(mean + errors * error < quantile, candidate, ceiling)
    return floor.astype(np.int64), ceiling.astype(np.int64)


def _rate(passes: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The share of positions that pass and its standard error over images, from (units, images, positions)."""
    share = passes.mean(axis=2)
    return share.mean(axis=1), share.std(axis=1) / max(passes.shape[1] - 1, 1) ** 0.5


def _thinned(axis: Axis, phase: float) -> Axis:
    """Some outputs of an axis, spread evenly but for their phase."""
    length = len(axis.cell)
    if length <= SAMPLED_ROWS:
        return axis
    spread = (np.arange(SAMPLED_ROWS) + (np.arange(SAMPLED_ROWS) * (5**0.5 - 1) / 2 + phase) % 1) / SAMPLED_ROWS
    chosen = (spread * length).astype(np.int64)
    return Axis(axis.cell[chosen], axis.fraction[chosen], axis.start)
