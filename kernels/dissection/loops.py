"""Compiled loops of dissection, in one file because numba's cache of a function only notices changes of its own file.

Maps come as the bits of float16 (numba has no float16 on the CPU), (n, units, h * w) int16. Every array is contiguous
and every input read-only (`kernels.dissection.upsample.frozen`), so each loop is compiled once. Nothing here uses
fastmath: multiplications and additions are rounded one by one, in the order written, as in
`kernels/dissection/on_device.py`.

A loop returns -1, or the number image * units + unit of the first map that holds a value that is not finite.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

ZERO = 32768
NOT_FINITE = 0x7C00
SMALLEST_NORMAL = 2.0**-14
SPACING = 2.0**-24  # of float16 below its smallest normal
INTEGERS = 2.0**52  # added to a float64 below 2**52, it rounds that to an integer, ties to even


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile a loop and cache it beside its source, else for this user; where neither can be written, in memory."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba: "no locator available"
        return njit(nogil=True)(function)


SLACK = 1e-12  # of the largest corner: far above what rounding can add to a value


@_compiled
def sample(bits, width, zeros, row_cell, row_fraction, column_cell, column_fraction, codes):  # type: ignore[no-untyped-def]
    """Write `codes` (n, units, rows, columns) uint16: maps of a given width, sampled at some rows and columns."""
    images, units, positions = bits.shape
    padded = np.empty((positions // width + 2, width + 2))
    for image in range(images):
        for unit in range(units):
            if extremes(bits[image, unit])[2] >= NOT_FINITE:
                return image * units + unit
            pad(bits[image, unit], zeros, padded)
            for y in range(len(row_cell)):
                i, down = row_cell[y], row_fraction[y]
                for x in range(len(column_cell)):
                    j = column_cell[x]
                    number = blend(
                        padded[i, j], padded[i, j + 1], padded[i + 1, j], padded[i + 1, j + 1], down, column_fraction[x]
                    )
                    codes[image, unit, y, x] = code_of(number)
    return -1


@_compiled
def tail(  # type: ignore[no-untyped-def]
    bits, cut, floor, ceiling, shift, offset, zeros, row_start, row_fraction, column_start, column_fraction, count
):
    """Add the values above each unit's floor to `count`, in bins of 2**shift codes; the last bin starts at the ceiling.

    `cut` (units,) float64 belongs to the floor. `floor`, `ceiling` and `shift` are (units,) int64, and unit u has the
    bins offset[u] .. offset[u + 1]. If the corners of a cell are equal, the whole cell has their value.
    """
    images, units, _ = bits.shape
    h, w = len(row_start) - 2, len(column_start) - 2
    padded = np.empty((h + 2, w + 2))
    area = len(row_fraction) * len(column_fraction)
    upper, fall = np.empty(len(column_fraction)), np.empty(len(column_fraction))
    passing, codes = np.empty(area + 1), np.empty(area + 1, np.int64)
    for unit in range(units):
        first, last, low, high = offset[unit], offset[unit + 1] - 1, floor[unit], ceiling[unit]
        bits_per_bin, least = shift[unit], cut[unit]
        for image in range(images):
            highest, lowest, largest = extremes(bits[image, unit])
            if largest >= NOT_FINITE:
                return image * units + unit
            if zeros:
                highest, lowest = max(highest, np.int16(0)), min(lowest, np.int16(0))
            if ZERO + highest < low:
                continue
            if highest == lowest:
                count[bin_of(ZERO + highest, first, last, low, high, bits_per_bin)] += area
                continue
            pad(bits[image, unit], zeros, padded)
            flat = low <= ZERO
            if flat:
                for i in range(h + 1):
                    for j in range(w + 1):
                        if is_flat(padded, i, j) and padded[i, j] > least:
                            block = (row_start[i + 1] - row_start[i]) * (column_start[j + 1] - column_start[j])
                            count[bin_of(code_of(padded[i, j]), first, last, low, high, bits_per_bin)] += block
            kept = scan(
                padded, least, row_start, row_fraction, column_start, column_fraction, upper, fall, flat, passing, None
            )
            for k in range(kept):
                codes[k] = code_of(passing[k])
            for k in range(kept):
                count[bin_of(codes[k], first, last, low, high, bits_per_bin)] += 1
    return -1


@njit(nogil=True)
def scan(  # type: ignore[no-untyped-def]
    padded, least, row_start, row_fraction, column_start, column_fraction, upper, fall, flat, numbers, positions
):
    """Find the outputs above `least`, and return how many there are.

    The loop writes either `numbers`, their values (flat cells excepted), or `positions`, y * W + x; the other is None.
    It interpolates only cells with a corner above `least`, and neighbouring ones in one stretch. It writes each value
    and keeps it by moving on, which is cheaper than a branch.
    """
    rows, columns = padded.shape[0] - 1, padded.shape[1] - 1
    wanted = np.empty(columns + 1, np.bool_)
    wanted[columns] = False
    kept = 0
    for i in range(rows):
        if row_start[i] == row_start[i + 1] or choose(padded, i, least, flat, wanted) == 0:
            continue
        start = 0
        while start < columns:
            end = start
            while wanted[end]:
                end += 1
            if end > start:
                width = edges(padded, i, start, end, column_start, column_fraction, upper, fall)
                for y in range(row_start[i], row_start[i + 1]):
                    down, position = row_fraction[y], y * len(column_fraction) + column_start[start]
                    for x in range(width):
                        number = upper[x] + down * fall[x]
                        if numbers is not None:
                            numbers[kept] = number
                        if positions is not None:
                            positions[kept] = position + x
                        kept += number > least
            start = end + 1
    return kept


@njit(nogil=True)
def choose(padded, i, least, flat, wanted):  # type: ignore[no-untyped-def]
    """Mark the cells of row i to interpolate, and return how many: no value in a cell exceeds its highest corner."""
    top, bottom = padded[i], padded[i + 1]
    columns = len(top) - 1
    left = (top[0] > least) | (bottom[0] > least)
    chosen = 0
    for j in range(columns):
        right = (top[j + 1] > least) | (bottom[j + 1] > least)
        wanted[j] = left | right
        chosen += left | right
        left = right
    if flat:
        for j in range(columns):
            wanted[j] &= not is_flat(padded, i, j)
    return chosen


@njit(nogil=True)
def is_flat(padded, i, j):  # type: ignore[no-untyped-def]
    """Return whether the corners of the cell (i, j), and therefore all its values, are equal."""
    corner = padded[i, j]
    return corner == padded[i, j + 1] and corner == padded[i + 1, j] and corner == padded[i + 1, j + 1]


@njit(nogil=True)
def edges(padded, i, start, end, column_start, column_fraction, upper, fall):  # type: ignore[no-untyped-def]
    """Interpolate along the upper edges of the cells (i, start .. end), and find the fall to the lower edges.

    Returns the number of outputs. At `down` of a cell's height, the values are upper + down * fall.
    """
    k = 0
    for j in range(start, end):
        a, b, c, d = padded[i, j], padded[i, j + 1], padded[i + 1, j], padded[i + 1, j + 1]
        for x in range(column_start[j], column_start[j + 1]):
            right = column_fraction[x]
            top = a + right * (b - a)
            upper[k] = top
            fall[k] = c + right * (d - c) - top
            k += 1
    return k


@_compiled
def label_columns(label_map, lookup, column, present, area):  # type: ignore[no-untyped-def]
    """Translate label maps (n, categories, H, W) uint16 into `column` (n, H * W, categories) uint16.

    `lookup` (categories, 65536) gives the column of each number in each category. The loop writes `present` (n,
    categories), whether there is any label, and adds the pixels of each column to `area` (n, columns).
    """
    images, categories, height, width = label_map.shape
    for image in range(images):
        for k in range(categories):
            nothing = 0
            for y in range(height):
                for x in range(width):
                    number = label_map[image, k, y, x]
                    chosen = lookup[k, number]
                    column[image, y * width + x, k] = chosen
                    area[image, chosen] += 1
                    nothing += number == 0
            present[image, k] = nothing < height * width


@_compiled
def intersections(  # type: ignore[no-untyped-def]
    bits,
    threshold,
    cut,
    column,
    present,
    partner,
    order,
    group_start,
    concepts,
    zeros,
    row_start,
    row_fraction,
    column_start,
    column_fraction,
    unit_area,
    unit_area_in_category,
):
    """Count the pixels where units and concepts meet, one group of images after another.

    `order` (n,) lists the images by group, group g at group_start[g] .. group_start[g + 1]. Image i meets the labels of
    partner[i]. The loop adds to `unit_area` (groups, units) and `unit_area_in_category` (groups, units, categories)
    int64. It returns (bad map or -1, keys int64, counts int32) without zero counts, by ascending key (group * units +
    unit) * concepts + concept.
    """
    units, categories = bits.shape[1], column.shape[2]
    padded = np.empty((len(row_start), len(column_start)))
    upper, fall = np.empty(len(column_fraction)), np.empty(len(column_fraction))
    active = np.empty(len(row_fraction) * len(column_fraction) + 1, np.int64)
    row = np.zeros(concepts + 1, np.int32)
    keys, counts, found = np.empty(1024, np.int64), np.empty(1024, np.int32), 0
    for group in range(len(group_start) - 1):
        if group_start[group] == group_start[group + 1]:
            continue
        for unit in range(units):
            fired = False
            for m in range(group_start[group], group_start[group + 1]):
                image = order[m]
                highest, _, largest = extremes(bits[image, unit])
                if largest >= NOT_FINITE:
                    return image * units + unit, keys, counts
                if zeros:
                    highest = max(highest, np.int16(0))
                if ZERO + highest <= threshold[unit]:
                    continue
                pad(bits[image, unit], zeros, padded)
                kept = scan(
                    padded,
                    cut[unit],
                    row_start,
                    row_fraction,
                    column_start,
                    column_fraction,
                    upper,
                    fall,
                    False,
                    None,
                    active,
                )
                if kept == 0:
                    continue
                fired = True
                labels = column[partner[image]]
                for k in range(kept):
                    for c in range(categories):
                        row[labels[active[k], c]] += 1
                unit_area[group, unit] += kept
                for c in range(categories):
                    if present[partner[image], c]:
                        unit_area_in_category[group, unit, c] += kept
            if fired:
                row[concepts] = 0
                for c in range(concepts):
                    if row[c] > 0:
                        if found == len(keys):
                            keys, counts = (
                                np.append(keys, np.empty_like(keys)),
                                np.append(counts, np.empty_like(counts)),
                            )
                        keys[found], counts[found] = (group * units + unit) * concepts + c, row[c]
                        found += 1
                        row[c] = 0
    return -1, keys[:found].copy(), counts[:found].copy()


@njit(nogil=True)
def bin_of(code, first, last, floor, ceiling, shift):  # type: ignore[no-untyped-def]
    """Return the bin of a code at or above the floor."""
    return last if code >= ceiling else first + ((code - floor) >> shift)


@njit(nogil=True)
def extremes(bits):  # type: ignore[no-untyped-def]
    """Return (highest, lowest, largest magnitude) of a map (h * w,) of int16 bits, as codes minus 32768.

    A magnitude of 0x7C00 or more is an infinity or a NaN. Everything stays int16, which makes it five times faster.
    """
    highest, lowest, largest = np.int16(-32768), np.int16(32767), np.int16(0)
    for k in range(len(bits)):
        sign = np.int16(bits[k] >> 15)
        magnitude = np.int16(bits[k] & 0x7FFF)
        key = np.int16((magnitude ^ sign) - sign)
        highest, lowest, largest = max(highest, key), min(lowest, key), max(largest, magnitude)
    return highest, lowest, largest


@njit(nogil=True)
def pad(bits, zeros, padded):  # type: ignore[no-untyped-def]
    """Write a map (h * w,) of int16 bits into `padded` (h + 2, w + 2) as float64, with its border."""
    h, w = padded.shape[0] - 2, padded.shape[1] - 2
    for y in range(h):
        for x in range(w):
            padded[y + 1, x + 1] = number_of(bits[y * w + x])
        padded[y + 1, 0] = 0.0 if zeros else padded[y + 1, 1]
        padded[y + 1, w + 1] = 0.0 if zeros else padded[y + 1, w]
    for x in range(w + 2):
        padded[0, x] = 0.0 if zeros else padded[1, x]
        padded[h + 1, x] = 0.0 if zeros else padded[h, x]


@njit(nogil=True)
def blend(a, b, c, d, down, right):  # type: ignore[no-untyped-def]
    """Interpolate in a cell with corners a b over c d, at fractions `down` and `right` from a: along the rows first."""
    top = a + right * (b - a)
    bottom = c + right * (d - c)
    return top + down * (bottom - top)


@njit(nogil=True)
def number_of(bits):  # type: ignore[no-untyped-def]
    """Convert one finite float16, given as int16 bits, to float64."""
    magnitude = np.int64(bits) & 0x7FFF
    small = np.float64(magnitude) * SPACING
    normal = np.int64((magnitude << 42) + (1008 << 52)).view(np.float64)
    size = small if magnitude < 1024 else normal
    return -size if bits < 0 else size


@njit(nogil=True)
def code_of(number):  # type: ignore[no-untyped-def]
    """Return the code of a float64 rounded to float16 (to nearest, ties to even; overflow to infinity); not for NaN."""
    size = np.float64(abs(number))
    exact: Any = size.view(np.int64)
    normal = min(((exact + 0x1FFFFFFFFFF + ((exact >> 42) & 1)) >> 42) - (1008 << 10), NOT_FINITE)
    subnormal = np.float64(size / SPACING + INTEGERS).view(np.int64) & 0x7FF
    magnitude = subnormal if size < SMALLEST_NORMAL else normal
    return ZERO - magnitude if number < 0 else ZERO + magnitude
