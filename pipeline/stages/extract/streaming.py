"""Streamed layers (`store: none`): count their maps while the network computes them.

Two forward passes over the images replace the stored maps. The first, in the stage `extract`, counts the tail of every
unit (`kernels.dissection.threshold`) in a bracket from a sample of the images. The second, in `dissect`, compares maps
above the thresholds with the label maps. Both round the maps as a store would hold them, in the same micro-batches, so
thresholds and IoU equal those of a stored layer to the bit.

Writes, beside the layer's `activations.zarr`,
    layers/<layer id>/tails-<id>.zarr  count (block, bin) int64: values of each unit by bins of float16 codes ·
                                       positions (block) int64 · lowest (block, unit) float32 ·
                                       floor, ceiling, offset (unit) int64: codes of the bracket, first bin
A block is a run of shards: there are at most `BLOCKS`, whatever the number of images, and one task counts each.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.networks.forward import HALF_MAX, Model, forward_in_batches, half
from pipeline.stages.extract.settings import Tails
from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import crc32c, digest
from pipeline.storage.manifest import Files
from pipeline.workers.devices import device
from pipeline.workers.resumable import Done, Parts
from pipeline.workers.tasks import overlapping

if TYPE_CHECKING:
    import torch

    from kernels.dissection.brackets import Bracket, Tail
    from pipeline.data.images import Images
    from pipeline.networks.layer import LayerInfo
    from pipeline.storage.store import Ledger

TAIL = 2000  # bytes of a unit's counters in a block, compressed
BLOCKS = 64
SAMPLE_SHARDS, SAMPLE_IMAGES = 4, 32  # first shards, and images of each: a sample that brackets the thresholds
# A missed unit costs another forward pass, so the brackets, and with them the bins, are wider than for stored maps.
ERRORS, MARGIN = 6.0, 3.0
ALIKE = 4  # images whose maps are sampled at the same positions
BINS = 1 << 16  # one per code
COUNTERS = 1 << 25  # of all layers of a network, as int64


@dataclass(frozen=True)
class Streamed:
    """A streamed layer, as tasks name it.

    Attributes
    ----------
    store : of its tails.
    size, border, quantile : of the thresholds: where positions are counted, and the share of them above a threshold.
    bracket : the range in which they are counted; None before the sample.
    """

    id: str
    info: LayerInfo
    scale: float
    store: Path
    size: tuple[int, int]
    border: Any
    quantile: float
    bracket: Bracket | None = None

    @property
    def counters(self) -> Bracket:
        if self.bracket is None:
            raise RuntimeError(f"layer {self.info.name} has no bracket yet")
        return self.bracket


@dataclass(frozen=True)
class Part:
    """One shard of a pass: its chunk files, its images in the store, and the rows that count."""

    shard: int
    files: Files
    bounds: tuple[int, int]
    rows: np.ndarray


def streamed(folder: Path, id: str, info: LayerInfo, scale: float, settings: Tails) -> Streamed:
    """Return a layer with the store of its tails, in `folder`; `settings` hold the size of the label maps."""
    height, width = settings.counted_at(info.shape[1:])
    name = digest([settings.version, settings.quantile, settings.border, [height, width], scale])
    store = folder / f"tails-{name}.zarr"
    return Streamed(id, info, scale, store, (height, width), settings.border, settings.quantile)


def blocks(shards: Iterable[int], total: int) -> dict[int, list[int]]:
    """Group the shards of a data set into blocks.

    Blocks have a power of two of shards, so they stay the same when images are added.
    """
    length = 1
    while -(-total // length) > BLOCKS:
        length *= 2
    found: dict[int, list[int]] = {}
    for shard in sorted(shards):
        found.setdefault(shard // length, []).append(shard)
    return found


def parts(images: Images, shards: Iterable[int], counts: np.ndarray) -> dict[int, Part]:
    """Return the shards of a pass, with the rows at which `counts` (image,) is true."""
    found = {}
    for shard in shards:
        start, stop = images.range(shard)
        found[shard] = Part(shard, images.files_of(shard), (start, stop), np.flatnonzero(counts[start:stop]))
    return found


def block_id(layer: Streamed, images: Images, block: Iterable[Part], shown: Mapping[int, np.ndarray]) -> str:
    """Return the id of a block's tail; the store's folder and name cover the rest."""
    bracket = layer.counters
    made_of = [[images.contents[part.shard], part.rows.tolist(), shown[part.shard].tolist()] for part in block]
    return digest([made_of, bracket.bins, bracket.floor.tolist(), bracket.ceiling.tolist()])


# The bracket ----------------------------------------------------------------------------------------------------------


def with_bracket(layer: Streamed, ledger: Ledger) -> Streamed:
    """Return the layer with the bracket in its store; unchanged if there is none.

    Every bracket gives the same thresholds, so an existing one stays, whatever happened to its sample images.
    """
    from kernels.dissection.brackets import Bracket
    from pipeline.storage.store import Reader, attributes

    entry = ledger.get("bracket", "", layer.store)
    bins = attributes(layer.store).get("bins")
    if entry is None or bins is None:
        return layer
    stored = Reader(layer.store, ledger.files(["bracket"]))
    floor, ceiling = (np.asarray(stored[name][:]) for name in ("floor", "ceiling"))
    return replace(layer, bracket=Bracket(floor, ceiling, bins))


def open_store(layer: Streamed, count: int, ledger: Ledger) -> None:
    """Create the store of a layer's tails, or resize it, to `count` blocks; write the bracket."""
    from pipeline.storage.store import Array, create, remove_partials, write

    bracket = layer.counters
    units, bins = len(bracket.floor), int(bracket.offset[-1])
    arrays = {
        "count": Array(("block", "bin"), (count, bins), np.int64, (1, bins)),
        "positions": Array(("block",), (count,), np.int64, (1,)),
        "lowest": Array(("block", "unit"), (count, units), np.float32, (1, units), fill=np.inf),
        **{name: Array(("unit",), (units,), np.int64, (units,)) for name in ("floor", "ceiling", "offset")},
    }
    attrs = {"quantile": layer.quantile, "border": layer.border, "size": list(layer.size), "scale": layer.scale}
    create(layer.store, arrays, attrs | {"bins": bracket.bins})
    remove_partials(layer.store)
    if ledger.get("bracket", "", layer.store) is None:
        values = {"floor": bracket.floor, "ceiling": bracket.ceiling, "offset": bracket.offset[:-1]}
        ledger.record("bracket", "", write(layer.store, {name: ((0,), value) for name, value in values.items()}))


def sample(
    model: Model, images: Path, shards: Sequence[Part], layers: Sequence[Streamed]
) -> tuple[dict[str, Bracket], dict[str, float]]:
    """Find the layers' brackets, by id, from some images of some shards, on a worker.

    A layer that exceeds float16 gets its largest value instead, and its bracket has to be taken again. Images with
    values that are not finite are left out: the pass over all images names them.
    """
    import torch

    from kernels.dissection.brackets import Bracket, bracket_of
    from kernels.dissection.half import HIGHEST, LOWEST
    from kernels.dissection.threshold import sampled
    from pipeline.networks.layers import to_maps
    from pipeline.storage.store import Reader

    by_name = {layer.info.name: layer for layer in layers}
    codes: dict[str, list[np.ndarray]] = {name: [] for name in by_name}
    overflow: dict[str, float] = {}

    def take(name: str, at: int, output: torch.Tensor) -> None:
        layer = by_name[name]
        maps, special = to_maps(output.float(), layer.info)
        largest = maps.abs().amax((1, 2, 3))
        if special is not None:
            largest = torch.maximum(largest, special.abs().amax((1, 2)))
        finite = largest.isfinite()
        if bool(finite.any()) and float(largest[finite].amax()) > HALF_MAX * layer.scale:
            overflow[layer.id] = max(overflow.get(layer.id, 0.0), float(largest[finite].amax()))
        good = finite & (largest <= HALF_MAX * layer.scale)
        rows = np.flatnonzero(good.cpu().numpy())
        if len(rows):
            chosen = as_stored(maps, rows, layer.scale)
            chosen = chosen if isinstance(chosen, np.ndarray) else chosen.cpu().numpy()
            for some in range(0, len(chosen), ALIKE):
                phase = len(codes[name]) * (5**0.5 - 1) / 2 % 1
                codes[name].append(sampled(chosen[some : some + ALIKE], layer.size, layer.border, phase))

    for part in shards:
        start, stop = part.bounds
        some = part.rows[:: -(-len(part.rows) // SAMPLE_IMAGES)]
        pixels = torch.from_numpy(Reader(images, part.files)[model.reads][start:stop][some])
        forward_in_batches(model, pixels, list(by_name), take, stop_early=True)
    brackets = {}
    for name, layer in by_name.items():
        if layer.id in overflow:
            continue
        if codes[name]:
            brackets[layer.id] = bracket_of(
                np.concatenate(codes.pop(name), axis=1), layer.quantile, ERRORS, BINS, MARGIN
            )
        else:
            everything = np.full((2, layer.info.shape[0]), [[LOWEST], [HIGHEST + 1]])
            brackets[layer.id] = Bracket(everything[0], everything[1], BINS)
    bins = BINS
    while bins > 256 and sum(int(bracket.offset[-1]) for bracket in brackets.values()) > COUNTERS:
        bins //= 2
        brackets = {id: replace(bracket, bins=bins) for id, bracket in brackets.items()}
    return brackets, overflow


# The first pass -------------------------------------------------------------------------------------------------------


class Counter:
    """Count a layer's tail over the shards of a block, from each output as soon as it is ready, on a worker."""

    def __init__(self, layer: Streamed) -> None:
        from kernels.dissection.brackets import Tail

        self.layer = layer
        bracket = layer.counters
        self.tail = Tail(bracket, 0, np.zeros(int(bracket.offset[-1]), np.int64))
        self.lowest = np.full(len(bracket.floor), np.inf, np.float32)
        self.rows = self.shown = np.empty(0, np.int64)

    def begin(self, part: Part, shown: np.ndarray) -> None:
        """Start a shard: later outputs belong to it; `shown` are its rows whose lowest values are wanted."""
        self.rows, self.shown = part.rows, shown

    def take(self, at: int, maps: torch.Tensor) -> None:
        """Count maps (image, unit, y, x) float32 that fit float16, of the shard's images from `at` on."""
        from kernels.dissection.threshold import count_tail

        rows = within(self.rows, at, len(maps))
        if len(rows):
            layer, chosen = self.layer, as_stored(maps, rows, self.layer.scale)
            found: Any = count_tail(chosen, layer.counters, layer.size, layer.border, device=device())  # type: ignore[arg-type]
            np.add(self.tail.count, found.count, out=self.tail.count)
            self.tail = replace(self.tail, positions=self.tail.positions + found.positions)
        rows = within(self.shown, at, len(maps))
        if len(rows):
            lowest = maps[rows].amin((0, 2, 3)).cpu().numpy()
            np.minimum(self.lowest, lowest, out=self.lowest)

    def write(self, block: int) -> Files:
        from pipeline.storage.store import write

        values = {
            "count": ((block, 0), self.tail.count[None]),
            "positions": ((block,), np.array([self.tail.positions])),
            "lowest": ((block, 0), self.lowest[None]),
        }
        return write(self.layer.store, values)


def within(rows: np.ndarray, at: int, count: int) -> np.ndarray:
    """Return the ascending rows of a shard that lie in `count` images from `at` on, relative to `at`."""
    first, last = np.searchsorted(rows, [at, at + count])
    return rows[first:last] - at


def as_stored(maps: torch.Tensor, rows: np.ndarray, scale: float) -> np.ndarray | torch.Tensor:
    """Return the maps of some rows, as float16 like in a store: an array, or on a GPU a tensor, which stays there."""
    chosen = maps if len(rows) == len(maps) else maps[rows]
    halved = half(chosen, scale).contiguous()
    return halved if halved.is_cuda else halved.numpy()


# What the tails say ---------------------------------------------------------------------------------------------------


def read_tail(layer: Streamed, files: Files, wanted: Iterable[int]) -> tuple[Tail, np.ndarray]:
    """Read the tail over some blocks, and each unit's lowest stored value over the sample images of pictures."""
    from kernels.dissection.brackets import Bracket, Tail
    from pipeline.storage.store import Reader

    stored = Reader(layer.store, files)
    bracket = Bracket(np.asarray(stored["floor"][:]), np.asarray(stored["ceiling"][:]), stored.attrs["bins"])
    total = Tail(bracket, 0, np.zeros(int(bracket.offset[-1]), np.int64))
    lowest = np.full(len(bracket.floor), np.inf, np.float32)
    for block in wanted:
        one = Tail(bracket, int(stored["positions"][block]), np.asarray(stored["count"][block]))
        total = total.merge(one)
        lowest = np.minimum(lowest, np.asarray(stored["lowest"][block]))
    return total, (lowest / np.float32(layer.scale)).astype(np.float16).astype(np.float32)


def forward(
    model: Model,
    images: Path,
    part: Part,
    layers: Sequence[Streamed],
    take: Callable[[Streamed, int, torch.Tensor], None],
) -> None:
    """Run a shard through the network, on a worker.

    `take(layer, at, maps)` gets the maps (image, unit, y, x) float32 of its images from `at` on.
    """
    import torch

    from pipeline.networks.layers import to_maps
    from pipeline.storage.store import Reader

    by_name = {layer.info.name: layer for layer in layers}
    start, stop = part.bounds

    def taken(name: str, at: int, output: torch.Tensor) -> None:
        take(by_name[name], at, to_maps(output.float(), by_name[name].info)[0])

    pixels = torch.from_numpy(Reader(images, part.files)[model.reads][start:stop])
    forward_in_batches(model, pixels, list(by_name), taken, stop_early=True)


# Finished blocks of a pass --------------------------------------------------------------------------------------------


class Finished(Parts):
    """The finished blocks of a pass, one file each in the scratch folder: an interrupted run resumes after them.

    The folder is named after all that a block is made from, so that blocks need no id.
    """

    def __init__(self, scratch: Path, id: str, blocks: Iterable[int]) -> None:
        super().__init__(blocks_folder(scratch) / id, dict.fromkeys(map(str, blocks), ""))

    def read(self, block: int) -> Mapping[str, np.ndarray]:
        """Read the arrays of a block, if the file is intact."""
        from pipeline.storage.store import verified_bytes

        files = self.ledger.files([str(block)])
        data = verified_bytes(self.store, name_of(block), files)
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            return dict(stored)

    def remove(self) -> None:
        import shutil

        shutil.rmtree(self.store, ignore_errors=True)
        self.ledger.clear()


def blocks_folder(scratch: Path) -> Path:
    """Return the folder that holds counted blocks until the results are written."""
    return scratch / "blocks"


def name_of(block: int) -> str:
    return f"{block}.npz"


def save(folder: Path, block: int, arrays: Mapping[str, np.ndarray]) -> Files:
    """Write the counts of a block, on a worker; return its file with size and crc32c."""
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)  # type: ignore[arg-type]
    write_atomically(folder / name_of(block), data.getvalue())
    return {name_of(block): (data.tell(), crc32c(data.getvalue()))}


@overlapping
def tail_block(
    model: Model,
    images: Path,
    shards: Sequence[Part],
    layers: Sequence[tuple[Streamed, np.ndarray]],
) -> dict[str, Tail]:
    """Count tails of some units of layers over some shards, by layer id, in the layers' brackets, on a worker."""
    from kernels.dissection.threshold import count_tail

    units = {layer.id: chosen for layer, chosen in layers}
    tails: dict[str, Tail] = {}
    rows = np.empty(0, np.int64)

    def take(layer: Streamed, at: int, maps: torch.Tensor) -> None:
        some = within(rows, at, len(maps))
        if not len(some):
            return
        if len(units[layer.id]) < maps.shape[1]:
            maps = maps[:, units[layer.id]]
        chosen: Any = as_stored(maps, some, layer.scale)
        tail = count_tail(chosen, layer.counters, layer.size, layer.border, device=device())
        tails[layer.id] = tails[layer.id].merge(tail) if layer.id in tails else tail

    for part in shards:
        rows = part.rows
        forward(model, images, part, [layer for layer, _ in layers], take)
    return tails


@overlapping
def save_tails(
    model: Model,
    images: Path,
    block: int,
    shards: Sequence[Part],
    layers: Sequence[tuple[Streamed, np.ndarray]],
    folders: Mapping[str, Path],
) -> Done:
    """Count tails as `tail_block` does over a block, and write each to the folder of its layer id, on a worker."""
    files = {}
    for id, tail in tail_block(model, images, shards, layers).items():
        values = {"count": np.asarray(tail.count, np.int64), "positions": np.array(tail.positions, np.int64)}
        files[id] = save(folders[id], block, values)
    return Done(str(block), files)


def memory_need(layers: Iterable[Streamed], micro_batch: int) -> int:
    """Return the bytes of counting besides a forward pass.

    They are a few copies of one layer's maps of a micro-batch, and the counters of all layers, merged in int64.
    """
    layers = list(layers)
    largest = max((math.prod(layer.info.shape) for layer in layers), default=0)
    counters = sum(int(layer.counters.offset[-1]) for layer in layers if layer.bracket is not None)
    return micro_batch * 12 * largest + 24 * counters
