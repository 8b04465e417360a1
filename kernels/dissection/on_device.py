"""Run the loops of dissection in torch, on a GPU or any device with float64, to the same integers as the CPU's.

Maps with a value above the threshold are upsampled whole, several at a time. The float64 operations are those of
`kernels.dissection.loops`, in the same order, each rounded by itself. Rounding to float16 works on the bits, because
torch goes from float64 through float32 and so rounds twice.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from kernels.dissection.brackets import Bracket, Tail, floor_cut
from kernels.dissection.counts import Labels
from kernels.dissection.half import INFINITY, ZERO, cut
from kernels.dissection.upsample import Border, Geometry, Size, blends_zeros, geometry, refuse_non_finite

BLOCK = 2**25  # upsampled values held at once: 256 MB in float64, and briefly a few times that


@torch.no_grad()
def count_tail(
    activation: NDArray[np.float16] | Tensor, bracket: Bracket, size: Size, border: Border, device: str
) -> Tail:
    """Run `kernels.dissection.threshold.count_tail` on a device."""
    maps = _load(activation, device)
    grid = geometry((maps.shape[2], maps.shape[3]), size)
    floor, ceiling, shift, offset = (
        torch.from_numpy(array).to(device) for array in (bracket.floor, bracket.ceiling, bracket.shift, bracket.offset)
    )
    least = torch.from_numpy(floor_cut(bracket)).to(device)
    count = torch.zeros(int(offset[-1]), dtype=torch.int64, device=device)
    for _, unit, values in _upsampled(maps, least, grid, border):
        which, y, x = (values > least[unit, None, None]).nonzero(as_tuple=True)
        codes, owner = round_codes(values[which, y, x]), unit[which]
        inside = offset[owner] + ((codes - floor[owner]) >> shift[owner])
        bins = torch.where(codes >= ceiling[owner], offset[owner + 1] - 1, inside)
        count += torch.bincount(bins, minlength=len(count))
    return Tail(bracket, len(maps) * size[0] * size[1], count.to(torch.int32).cpu().numpy())


@torch.no_grad()
def intersections(
    activation: NDArray[np.float16] | Tensor,
    threshold: NDArray[np.float16],
    labels: Labels,
    group: NDArray[np.int64],
    border: Border,
    partner: NDArray[np.int64],
    groups: int,
    device: str,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Return keys, counts, unit area and unit area by category, for `kernels.dissection.iou.count_shard`."""
    maps = _load(activation, device)
    units, categories, concepts = maps.shape[1], labels.column.shape[2], labels.concepts
    grid = geometry((maps.shape[2], maps.shape[3]), labels.size)
    least = torch.from_numpy(cut(threshold)).to(device)
    column = torch.from_numpy(labels.column.astype(np.int32)).to(device)
    present = torch.from_numpy(labels.present).to(device)
    membership, met = torch.from_numpy(group).to(device), torch.from_numpy(partner).to(device)
    area = torch.zeros(groups * units, dtype=torch.int64, device=device)
    area_in_category = torch.zeros(groups * units, categories, dtype=torch.int64, device=device)
    keys: list[Tensor] = [torch.zeros(0, dtype=torch.int64, device=device)]
    counts: list[Tensor] = [torch.zeros(0, dtype=torch.int64, device=device)]
    for image, unit, values in _upsampled(maps, least, grid, border):
        active = values > least[unit, None, None]
        row = membership[image] * units + unit
        kept = active.sum(dim=(1, 2))
        area.index_add_(0, row, kept)
        area_in_category.index_add_(0, row, kept[:, None] * present[met[image]])
        which, pixel = active.flatten(1).nonzero(as_tuple=True)
        found = column[met[image[which]], pixel].long()
        key = (row[which, None] * concepts + found)[found < concepts]
        unique, times = torch.unique(key, return_counts=True)
        keys.append(unique)
        counts.append(times)
    key, inverse = torch.unique(torch.cat(keys), return_inverse=True)
    count = torch.zeros(len(key), dtype=torch.int64, device=device).index_add_(0, inverse, torch.cat(counts))
    return (
        key.cpu().numpy(),
        count.to(torch.int32).cpu().numpy(),
        area.reshape(groups, units).cpu().numpy(),
        area_in_category.reshape(groups, units, categories).cpu().numpy(),
    )


def round_codes(values: Tensor) -> Tensor:
    """Return the int64 codes of float64 values rounded to float16, as `kernels.dissection.loops.code_of` does."""
    size = values.abs()
    bits = size.view(torch.int64)
    normal = ((bits + 0x1FFFFFFFFFF + ((bits >> 42) & 1)) >> 42) - (1008 << 10)
    subnormal = (size * 2.0**24).round().long()
    magnitude = torch.where(size < 2.0**-14, subnormal, normal.clamp(max=INFINITY - ZERO))
    return torch.where(values < 0, ZERO - magnitude, ZERO + magnitude)


def _load(activation: NDArray[np.float16] | Tensor, device: str) -> Tensor:
    """Load maps (n, units, h, w) onto the device, unless they are a tensor there already.

    Raises ValueError if a value is not finite.
    """
    if isinstance(activation, Tensor):
        maps = activation
    else:
        maps = torch.from_numpy(np.array(activation, np.float16, order="C")).to(device)
    strange = (~torch.isfinite(maps)).any(dim=(2, 3)).flatten().nonzero()
    refuse_non_finite(int(strange[0]) if len(strange) else -1, maps.shape[1])
    return maps


def _upsampled(maps: Tensor, least: Tensor, grid: Geometry, border: Border):  # type: ignore[no-untyped-def]
    """Yield (image, unit, values (m, H, W) float64) of the maps that hold a value above `least`, border included."""
    highest = maps.amax(dim=(2, 3)).double()
    zeros = blends_zeros(border)
    if zeros:
        highest = highest.clamp(min=0)
    image, unit = (highest > least).nonzero(as_tuple=True)
    rows, down, columns, right = (
        torch.from_numpy(array.copy()).to(maps.device)
        for array in (grid.rows.cell, grid.rows.fraction, grid.columns.cell, grid.columns.fraction)
    )
    block = max(1, BLOCK // (len(rows) * len(columns)))
    for some in torch.arange(len(image), device=maps.device).split(block):
        padded = pad(
            maps[image[some], unit[some]].double()[:, None], (1, 1, 1, 1), "constant" if zeros else "replicate"
        )
        left = padded[:, 0, :, columns]
        along = left + right * (padded[:, 0, :, columns + 1] - left)
        top = along[:, rows]
        yield image[some], unit[some], top + down[:, None] * (along[:, rows + 1] - top)
