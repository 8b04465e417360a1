"""Bracket each unit's threshold from a sample, count the tail above it, and certify the threshold from the counts.

`kernels.dissection.threshold` describes the method and counts the values.
"""

from dataclasses import dataclass
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from kernels.dissection.half import HIGHEST, LOWEST, cut, value

BINS = 2048  # per unit, at most: a wider bracket gets bins of several codes, then another pass inside one of them
# A sampled bracket reaches from the quantile times one of these to the quantile divided by it.
MARGINS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
ERRORS = 3.0  # standard errors by which a sampled bracket must enclose the quantile


@dataclass(frozen=True)
class Bracket:
    """The codes among which each unit's threshold is sought: floor <= code < ceiling, both (units,) int64.

    A unit has at most `bins` bins: a wider bracket gets bins of several codes, and another pass inside one of them.
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
        """Binary logarithm of the number of codes in one bin: 0 unless the bracket is wider than `bins`."""
        bins = (self.ceiling - self.floor + self.bins - 1) // self.bins
        return np.ceil(np.log2(bins)).astype(np.int64)

    @property
    def offset(self) -> NDArray[np.int64]:
        """Start of each unit's bins, (units + 1,): those of its bracket, then one for all codes from the ceiling up."""
        width = self.ceiling - self.floor
        bins = ((width - 1) >> self.shift) + 2
        return np.concatenate([[0], np.cumsum(bins)]).astype(np.int64)


@dataclass(frozen=True)
class Thresholds:
    """What a tail proves about each unit, as arrays (units,).

    Attributes
    ----------
    threshold : float16; NaN where not certified.
    active : int64, number of values above the threshold; -1 where not certified.
    certified : bool; a unit that is not certified needs another pass.
    """

    threshold: NDArray[np.float16]
    active: NDArray[np.int64]
    certified: NDArray[np.bool_]


@dataclass(frozen=True)
class Tail:
    """Counted values of each unit: `count` by bins (see `Bracket.offset`), among `positions` values in all.

    The counts are integers, so merging in any order gives the same bits. Whatever the data, a unit has at most one more
    count than `Bracket.bins`.
    """

    bracket: Bracket
    positions: int
    count: NDArray[np.integer]

    def merge(self, other: "Tail") -> "Tail":
        """Return the tail of both sets of images. Raises ValueError if they were counted in different brackets."""
        self._refuse_another_bracket(other)
        return Tail(self.bracket, self.positions + other.positions, self.count.astype(np.int64) + other.count)

    def without(self, other: "Tail") -> "Tail":
        """Return the tail of these images without those of `other`, which must be some of them.

        Raises ValueError if the brackets differ, or if `other` cannot be a part of these images.
        """
        self._refuse_another_bracket(other)
        left = self.count.astype(np.int64) - other.count
        if other.positions > self.positions or np.any(left < 0):
            raise ValueError("cannot take one tail from the other: it was not counted on a part of the same images")
        return Tail(self.bracket, self.positions - other.positions, left)

    def _refuse_another_bracket(self, other: "Tail") -> None:
        mine, its = self.bracket, other.bracket
        same = np.array_equal(mine.floor, its.floor) and np.array_equal(mine.ceiling, its.ceiling)
        if not same or mine.bins != its.bins:
            raise ValueError("these tails were counted in different brackets; count both shards in one bracket")

    def result(self, quantile: float) -> Thresholds:
        """Return the thresholds that the counts prove.

        A threshold is certified if more than floor(quantile * positions) values are at or above it, and no more than
        that are above it.
        """
        low, high, above = self._locate(quantile)
        certified = (low >= 0) & (high - low == 1)
        threshold = np.where(certified, value(np.where(certified, low, 0)), np.float16(np.nan))
        return Thresholds(threshold, np.where(certified, above, -1), certified)

    def refine(self, quantile: float) -> Bracket:
        """Return the bracket of the next pass: below the floor, above the ceiling, or inside one bin."""
        low, high, _ = self._locate(quantile)
        width = self.bracket.ceiling - self.bracket.floor
        step = np.where(width < BINS, BINS, 4 * width)
        low = np.where(low < 0, np.maximum(high - step, LOWEST), low)
        return Bracket(low, np.where(high > HIGHEST, np.minimum(low + step, HIGHEST + 1), high))

    def _locate(self, quantile: float) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Find codes low <= t < high of each unit, and its count from `high` up; low is -1 if t is below the floor."""
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


def bracket_of(
    codes: NDArray[np.uint16], quantile: float, errors: float = ERRORS, bins: int = BINS, margin: float = MARGINS[0]
) -> Bracket:
    """Estimate where the thresholds lie, from sampled codes (units, n, positions).

    The bracket reaches `errors` standard errors to either side, and at least from `margin` times the quantile to the
    quantile divided by `margin`. The images should be spread over the data set: a sample from one class costs further
    passes, though never a wrong threshold. A hundred or two images suffice; memory is some 2 kB per unit and image. A
    ceiling lies one code above the sample's value, so a unit that is zero at most positions is certified at once.
    """
    allowed(quantile, codes[0].size)  # refuses an invalid quantile and an empty sample
    return Bracket(*_reach(codes, quantile, errors, margin), bins)


def floor_cut(bracket: Bracket) -> NDArray[np.float64]:
    """Return the float64 above which a value rounds to the unit's floor or higher."""
    return cut(value(bracket.floor - 1))


def allowed(quantile: float, positions: int) -> int:
    """Compute floor(quantile * positions), reading the quantile as the decimal that a person wrote: 0.29 of 100 is 29.

    Raises ValueError unless 0 < quantile < 1 and there is at least one position.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"the quantile is {quantile}; expected a number between 0 and 1, such as 0.01")
    if positions < 1:
        raise ValueError("no positions were counted; expected at least one image")
    return int(Decimal(repr(float(quantile))) * positions)


def _reach(
    codes: NDArray[np.uint16], quantile: float, errors: float, least: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the floor and ceiling of each unit, from sampled codes (units, images, positions).

    The floor is the first of several ever lower sample quantiles at which the share of values exceeds the quantile by
    `errors` standard errors of the mean over images. The ceiling is found in the same way from above. A unit that fires
    on few images therefore gets a wide bracket, and a unit that fires on all of them a narrow one.
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
    """Compute the share of positions that pass and its standard error over images, from (units, images, positions)."""
    share = passes.mean(axis=2)
    return share.mean(axis=1), share.std(axis=1) / max(passes.shape[1] - 1, 1) ** 0.5
