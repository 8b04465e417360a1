"""Upsample activation maps bilinearly with half-pixel centres, exactly and cell by cell.

Output row `r` of H samples the input of h rows at `(r + 1/2) h / H - 1/2`. The map is padded by one on each side, with
its edge values (`border="edge"`: torch's `interpolate(align_corners=False)`) or with zeros (`border="zeros"`: what lies
outside counts as 0 and blends in, as in the code of Bau et al., PNAS 2020, which samples with `padding_mode="zeros"`).
Four neighbours of the padded map are the corners of a cell. Each cell owns a block of output positions, whose values do
not exceed the highest corner. There is no antialiasing if H < h.

The arithmetic is float64 in one fixed order, followed by one rounding to float16 (to nearest, ties to even). For
float16 input and a ratio of sizes that is a power of two up to 32, every step before the rounding is exact. For other
ratios, the fixed order makes two implementations agree bit for bit.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kernels.dissection.half import value

Border = Literal["edge", "zeros"]
Size = tuple[int, int]


def upsample(maps: NDArray[np.float16], size: Size, border: Border = "edge") -> NDArray[np.float16]:
    """Upsample maps (..., h, w) float16 to `size` = (H, W), float16. Raises ValueError if a value is not finite."""
    stack = np.asarray(maps, np.float16)
    batch = stack.reshape(-1, 1, *stack.shape[-2:])
    grid = geometry((batch.shape[2], batch.shape[3]), size)
    return value(sample_codes(batch, grid, border)).reshape(*stack.shape[:-2], *size)


@dataclass(frozen=True)
class Axis:
    """How the outputs along one axis lie in the cells of the padded input; cell `c` is between its items c and c + 1.

    Attributes
    ----------
    cell : (outputs,) int64, the cell of each output.
    fraction : (outputs,) float64, how far into the cell the output lies.
    start : (cells + 1,) int64; cell `c` owns the outputs start[c] .. start[c + 1].
    """

    cell: NDArray[np.int64]
    fraction: NDArray[np.float64]
    start: NDArray[np.int64]


@dataclass(frozen=True)
class Geometry:
    """Where the outputs of an upsampling lie: an `Axis` for the rows and one for the columns."""

    rows: Axis
    columns: Axis


def geometry(size_in: Size, size_out: Size) -> Geometry:
    """Compute the geometry of (h, w) -> (H, W)."""
    if min(*size_in, *size_out) < 1:
        raise ValueError(f"cannot upsample {size_in} to {size_out}: every side must be at least 1")
    return Geometry(axis(size_in[0], size_out[0]), axis(size_in[1], size_out[1]))


@lru_cache(maxsize=64)
def axis(length_in: int, length_out: int) -> Axis:
    """Compute one axis of a geometry.

    Positions are ratios of integers, so each fraction is rounded once and is never near 1.
    """
    position = (2 * np.arange(length_out, dtype=np.int64) + 1) * length_in - length_out
    below = position // (2 * length_out)
    fraction = (position - below * 2 * length_out) / (2 * length_out)
    cell = below + 1
    start = np.searchsorted(cell, np.arange(length_in + 2)).astype(np.int64)
    for array in (cell, fraction, start):
        array.flags.writeable = False
    return Axis(cell, fraction, start)


def sample_codes(activation: NDArray[np.float16], grid: Geometry, border: Border) -> NDArray[np.uint16]:
    """Return codes (n, units, rows, columns) of maps (n, units, h, w) at the outputs of `grid`, or any part of them."""
    shape = (*activation.shape[:2], len(grid.rows.cell), len(grid.columns.cell))
    codes = np.empty(shape, np.uint16)
    rows, columns = grid.rows, grid.columns
    from kernels.dissection import loops  # numba takes a second to import

    bad = loops.sample(
        bits_of(activation),
        activation.shape[3],
        blends_zeros(border),
        frozen(rows.cell),
        frozen(rows.fraction),
        frozen(columns.cell),
        frozen(columns.fraction),
        codes,
    )
    refuse_non_finite(bad, activation.shape[1])
    return codes


def blends_zeros(border: str) -> bool:
    """Return whether a border setting blends with zeros; any setting but the two is refused."""
    if border not in ("edge", "zeros"):
        raise ValueError(f"border {border!r} is not known; expected 'edge' or 'zeros'")
    return border == "zeros"


def bits_of(activation: NDArray[np.float16]) -> NDArray[np.int16]:
    """View maps (n, units, h, w) float16 as int16 bits (n, units, h * w), without a copy if they are contiguous."""
    if activation.dtype != np.float16 or activation.ndim != 4:
        raise ValueError(
            f"activations are {activation.dtype} of shape {activation.shape}; expected float16 (image, unit, y, x)"
        )
    images, units, h, w = activation.shape
    return frozen(activation.reshape(images, units, h * w)).view(np.int16)


def frozen(array: NDArray) -> NDArray:
    """Return a contiguous, read-only view: numba compiles another version of a loop for arrays that can be written."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def refuse_non_finite(bad: int, units: int) -> None:
    """Raise ValueError for the map number `bad` of a kernel, given the number of units; -1: all maps are finite."""
    if bad >= 0:
        image, unit = divmod(int(bad), units)
        raise ValueError(
            f"the map of image {image}, unit {unit} holds a value that is not finite; "
            "expected finite float16 activations (a larger scale keeps values below 65504)"
        )
