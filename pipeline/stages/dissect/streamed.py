"""Dissect streamed layers: thresholds from their tails, IoU in a second forward pass.

See `pipeline.stages.extract.streaming`. If the tails do not prove a unit's threshold, it is counted again in another
bracket, in a forward pass of its layer alone. Passes are cut into blocks of shards. The scratch folder keeps a block's
counts until the results are written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.networks.forward import Model, half
from pipeline.stages.dissect.intersections import counting_need, labels_of
from pipeline.stages.dissect.results import Arrays
from pipeline.stages.dissect.settings import Method
from pipeline.stages.dissect.work import Concepts, CountedShard, LayerResult, LayerSource, Threshold
from pipeline.stages.extract import pictures
from pipeline.stages.extract import streaming as stream
from pipeline.stages.extract.results import Extracted
from pipeline.stages.extract.streaming import Finished, Part, Streamed
from pipeline.storage.identity import digest
from pipeline.workers.devices import device
from pipeline.workers.resumable import Done
from pipeline.workers.tasks import overlapping, run_tasks

if TYPE_CHECKING:
    import torch

    from kernels.dissection.brackets import Tail
    from kernels.dissection.counts import Counts
    from pipeline.plan.job import Job

REMEDY = "lower `numerics.micro_batch` of the network, count fewer concepts, or name fewer layers"
AREAS = ("unit_area", "unit_area_in_category", "concept_area", "pixels", "pixels_in_category")


@dataclass(frozen=True)
class Shown:
    """What the second pass keeps of a layer's maps: those of each unit's top images, and a histogram.

    Attributes
    ----------
    image : (unit, place) int64, highest maximum first; -1 fills up.
    sample : (image,) int64, those of the histogram.
    low, high : (unit,) float32, the histogram's range, in stored values; NaN without a value.
    """

    image: np.ndarray
    sample: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def at(self, start: int, stop: int) -> Shown:
        """Return the same for some images only, numbered from the first of them."""
        inside = (self.image >= start) & (self.image < stop)
        sample = self.sample[(self.sample >= start) & (self.sample < stop)] - start
        return replace(self, image=np.where(inside, self.image - start, -1), sample=sample)


@dataclass(frozen=True)
class OfLayer:
    """What one task counts for a layer.

    It counts true and permuted labels (by id of the result, with the shards of each), and pictures, by shard.
    """

    layer: Streamed
    threshold: np.ndarray
    results: tuple[tuple[str, bool, frozenset[int], Path], ...]
    shown: Mapping[int, Shown]


class Passes:
    """The forward passes of one dissection."""

    def __init__(
        self,
        job: Job,
        workers: Any,
        extracted: Extracted,
        counted: list[CountedShard],
        method: Method,
        size: tuple[int, int],
    ) -> None:
        images = job.images
        self.job, self.workers, self.images = job, workers, images
        self.method, self.size, self.extracted = method, size, extracted
        self.model = job.model
        self.shards = extracted.shards
        self.blocks = stream.blocks(self.shards, len(images.contents))
        self.counted = {one.shard: one for one in counted}
        self.may_count = images.counted(method.split)
        self.may_count &= np.isin(np.arange(images.count) // images.shard_images, self.shards)
        self.finished: list[Finished] = []

    def part(self, shard: int, rows: np.ndarray) -> Part:
        return Part(shard, self.images.files_of(shard), self.images.range(shard), rows)

    def parts(self, block: int) -> list[Part]:
        """Return the shards of a block that hold counted images."""
        members = [shard for shard in self.blocks[block] if shard in self.counted]
        return [self.part(shard, self.counted[shard].rows) for shard in members]

    def check(self, layers: list[Streamed], beside: int) -> None:
        assert self.extracted.forward_bytes is not None
        need = self.extracted.forward_bytes + beside
        need += stream.memory_need(layers, self.model.spec.numerics.micro_batch)
        self.job.check_memory(need, REMEDY)

    # Thresholds -------------------------------------------------------------------------------------------------------

    def thresholds(self, layers: Mapping[str, LayerSource]) -> dict[str, Threshold]:
        """Return thresholds by layer id, from the tails; units whose tails do not prove them get another pass."""
        found: dict[str, Threshold] = {}
        pending: dict[str, tuple[Streamed, np.ndarray]] = {}
        tails = self._without_refused(layers)
        every = {id: np.arange(layer.shape[0]) for id, layer in layers.items()}
        for id, layer in layers.items():
            count = layer.shape[0]
            found[id] = Threshold(np.full(count, np.nan, np.float16), np.zeros(count, np.int64), tails[id].positions)
        number = 0
        while tails:
            pending = {}
            for id, tail in tails.items():
                units = every[id]
                result = tail.result(self.method.quantile)
                done = units[result.certified]
                found[id].threshold[done] = result.threshold[result.certified]
                found[id].active[done] = result.active[result.certified]
                if not result.certified.all():
                    again = tail.refine(self.method.quantile)[~result.certified]
                    streamed = layers[id].streamed
                    assert streamed is not None
                    pending[id] = replace(streamed, bracket=again), units[~result.certified]
            number += 1
            tails = self._tails(pending, {id: layers[id].digest for id in pending}, number)
            every = {id: units for id, (_, units) in pending.items()}
        return found

    def _without_refused(self, layers: Mapping[str, LayerSource]) -> dict[str, Tail]:
        """Return the tails that the extraction counted, minus images whose label maps were refused since."""
        tails: dict[str, Tail] = {}
        for id, layer in layers.items():
            assert layer.streamed is not None and layer.tails is not None
            tails[id], _ = stream.read_tail(layer.streamed, layer.tails.files, self.blocks)
        refused = []
        for shard in self.shards:
            start, stop = self.images.range(shard)
            rows = np.flatnonzero(self.may_count[start:stop])
            counts = self.counted[shard].rows if shard in self.counted else np.empty(0, np.int64)
            rows = np.setdiff1d(rows, counts)
            if len(rows):
                refused.append(self.part(shard, rows))
        if refused and layers:
            wanted = []
            for id, layer in layers.items():
                assert layer.streamed is not None
                one = replace(layer.streamed, bracket=tails[id].bracket)
                wanted.append((one, np.arange(layer.shape[0])))
            self.check([one for one, _ in wanted], 0)
            tasks = [(self.model, self.images.store, [part], wanted) for part in refused]
            label = f"{self.job.name}: images without label maps"
            for less in run_tasks(self.workers, stream.tail_block, tasks, len(tasks), label, REMEDY):
                tails = {id: tail.without(less[id]) for id, tail in tails.items()}
        return tails

    def _tails(
        self, pending: Mapping[str, tuple[Streamed, np.ndarray]], digests: Mapping[str, str], number: int
    ) -> dict[str, Tail]:
        """Return the tails of some units in their brackets, over all images."""
        from kernels.dissection.brackets import Tail

        if not pending:
            return {}
        done = {}
        blocks = [block for block in self.blocks if self.parts(block)]
        for id, (layer, units) in pending.items():
            bracket = layer.counters
            made_of = [digests[id], units.tolist(), bracket.floor.tolist(), bracket.ceiling.tolist()]
            done[id] = Finished(self.job.scratch, digest([*made_of, [part.tolist() for part in self._rows()]]), blocks)
        self.check([layer for layer, _ in pending.values()], 0)

        def arguments(block: str, missing: list[str]) -> tuple:
            folders = {id: done[id].store for id in missing}
            wanted = [pending[id] for id in missing]
            return self.model, self.images.store, int(block), self.parts(int(block)), wanted, folders

        self.job.resumed(self.workers, stream.save_tails, done, arguments, REMEDY, f"thresholds, pass {number + 1}")
        found: dict[str, Tail] = {}
        self.finished += done.values()
        for id, (layer, _) in pending.items():
            for block in blocks:
                stored = done[id].read(block)
                one = Tail(layer.counters, int(stored["positions"]), stored["count"])
                found[id] = found[id].merge(one) if id in found else one
        return found

    def _rows(self) -> list[np.ndarray]:
        return [np.array([one.shard, *one.rows]) for one in self.counted.values()]

    def remove(self) -> None:
        """Remove the counted blocks, once the results are written."""
        for one in self.finished:
            one.remove()
        with contextlib.suppress(OSError):  # it holds those of another step
            stream.blocks_folder(self.job.scratch).rmdir()

    # IoU --------------------------------------------------------------------------------------------------------------

    def count(
        self, thresholds: Mapping[str, Threshold]
    ) -> Callable[[list[LayerResult], Concepts], tuple[dict[tuple[str, bool], Counts], dict[str, Arrays]]]:
        """Return the function that counts a batch of layers; see `dissect.count_and_write`."""

        def counted(batch: list[LayerResult], chosen: Concepts) -> tuple[Any, Any]:
            return self._count(batch, chosen, thresholds)

        return counted

    def _count(
        self, batch: list[LayerResult], chosen: Concepts, thresholds: Mapping[str, Threshold]
    ) -> tuple[dict[tuple[str, bool], Counts], dict[str, Arrays]]:
        from kernels.dissection.counts import GROUPS, Counts, ShardCounts

        shown = {w.layer.id: self._shown(w.layer) for w in batch if not w.permuted}
        done = {w.id: Finished(self.job.scratch, digest([w.id, chosen.categories]), self.blocks) for w in batch}
        layers = {w.layer.id: w.layer.streamed for w in batch if w.layer.streamed is not None}
        units = sum(w.layer.shape[0] for w in batch)
        self.check(list(layers.values()), counting_need(units, chosen, self.images.shard_images, self.size))

        def arguments(block: str, missing: list[str]) -> tuple:
            shards = self.blocks[int(block)]
            of_layers = []
            for id, layer in layers.items():
                own = [w for w in batch if w.layer.id == id and w.id in missing]
                results = tuple(
                    (w.id, w.permuted, frozenset(one.shard for one in w.counted), done[w.id].store) for w in own
                )
                keep = {}
                if any(not w.permuted for w in own):
                    keep = {shard: shown[id].at(*self.images.range(shard)) for shard in shards}
                if results:
                    of_layers.append(OfLayer(layer, thresholds[id].threshold, results, keep))
            members = [(self.part(shard, np.empty(0, np.int64)), self.counted.get(shard)) for shard in shards]
            at = chosen.at(one for _, one in members if one is not None)
            return self.model, self.images.store, int(block), members, of_layers, at, self.method.border

        self.job.resumed(self.workers, count_block, done, arguments, REMEDY, "IoU, not stored")
        totals: dict[tuple[str, bool], Counts] = {}
        pictures_of: dict[str, Arrays] = {}
        for w in batch:
            units = w.layer.shape[0]
            total = Counts.zeros(GROUPS, units, len(chosen.names), len(chosen.categories))
            kept = Kept.empty(w.layer, shown[w.layer.id]) if not w.permuted else None
            for block in self.blocks:
                stored = done[w.id].read(block)
                total.add(ShardCounts(**{field.name: stored[field.name] for field in fields(ShardCounts)}))
                if kept is not None:
                    kept.add(stored)
            totals[w.layer.id, w.permuted] = total
            if kept is not None:
                pictures_of[w.layer.id] = kept.arrays()
        self.finished += done.values()
        return totals, pictures_of

    def _shown(self, layer: LayerSource) -> Shown:
        assert layer.streamed is not None and layer.tails is not None
        units = range(layer.shape[0])
        maximum = layer.store.open()["maximum"]
        tops, highest = pictures.top_images(maximum, units, self.may_count, pictures.KEPT)
        image = np.full((len(units), pictures.KEPT), -1, np.int64)
        for unit, top in enumerate(tops):
            image[unit, : len(top)] = top
        sample = pictures.sample_of(self.may_count)
        _, low = stream.read_tail(layer.streamed, layer.tails.files, self.blocks)
        largest = np.asarray(maximum[sample, 0 : len(units)]).max(0)
        scale = np.float32(layer.scale)
        stored = (largest / scale).astype(np.float16).astype(np.float32)
        return Shown(image, sample, low, np.maximum(stored, highest / scale))


class Kept:
    """The pictures of a layer, assembled from blocks."""

    def __init__(self, shown: Shown, maps: np.ndarray, histogram: np.ndarray) -> None:
        self.shown, self.maps, self.histogram = shown, maps, histogram

    @classmethod
    def empty(cls, layer: LayerSource, shown: Shown) -> Kept:
        units, height, width = layer.shape
        maps = np.full((units * pictures.KEPT, height, width), np.nan, np.float16)
        return cls(shown, maps, np.zeros((units, pictures.BINS), np.int64))

    def add(self, stored: Mapping[str, np.ndarray]) -> None:
        self.maps[stored["place"]] = stored["map"]
        self.histogram += stored["histogram"]

    def arrays(self) -> Arrays:
        units = len(self.shown.low)
        return {
            "image": (("unit", "place"), self.shown.image),
            "map": (("unit", "place", "y", "x"), self.maps.reshape(units, pictures.KEPT, *self.maps.shape[1:])),
            "histogram": (("unit", "bin"), self.histogram),
            "low": (("unit",), self.shown.low),
            "high": (("unit",), self.shown.high),
        }


@overlapping
def count_block(
    model: Model,
    images: Path,
    block: int,
    members: list[tuple[Part, CountedShard | None]],
    wanted: list[OfLayer],
    concepts: Concepts,
    border: Any,
) -> Done:
    """Run a block of shards through the network, and count and write every wanted result, on a worker."""
    from kernels.dissection.counts import GROUPS, Counts
    from kernels.dissection.iou import count_shard

    label_maps = concepts.store.open()["label_map"]
    by_id = {one.layer.id: one for one in wanted}
    totals = {
        id: Counts.zeros(GROUPS, len(one.threshold), len(concepts.names), len(concepts.categories))
        for one in wanted
        for id, _, _, _ in one.results
    }
    kept = {one.layer.id: Pieces(one) for one in wanted if one.shown}
    labels: Any = None
    counted: CountedShard | None = None
    shard = 0

    def take(layer: Streamed, at: int, maps: torch.Tensor) -> None:
        own = by_id[layer.id]
        if layer.id in kept:
            kept[layer.id].take(shard, at, maps)
        results = [result for result in own.results if shard in result[2]]
        if counted is None or not results:
            return
        first, last = np.searchsorted(counted.rows, [at, at + len(maps)])
        if first == last:
            return
        halves: Any = stream.as_stored(maps, counted.rows[first:last] - at, layer.scale)
        every = np.arange(len(counted.rows))
        for id, permuted, _, _ in results:
            met = (counted.partner if permuted else every)[first:last]
            group = counted.group[first:last]
            totals[id].add(count_shard(halves, own.threshold, labels, group, border, permutation=met, device=device()))

    for part, counted in members:
        shard = part.shard
        labels = labels_of(concepts, label_maps, counted) if counted is not None else None
        stream.forward(model, images, part, [one.layer for one in wanted], take)
    files = {}
    for one in wanted:
        for id, permuted, _, folder in one.results:
            arrays = sparse(totals.pop(id))
            if not permuted:
                arrays |= kept[one.layer.id].arrays()
            files[id] = stream.save(folder, block, arrays)
    return Done(str(block), files)


def sparse(counts: Counts) -> dict[str, np.ndarray]:
    """Return counts as those of one shard, by name, without the zeros of the intersection."""
    flat = counts.intersection.reshape(-1)
    key = np.flatnonzero(flat)
    return {"key": key, "count": flat[key]} | {name: getattr(counts, name) for name in AREAS}


class Pieces:
    """What is kept of a layer's maps over a block, on a worker."""

    def __init__(self, one: OfLayer) -> None:
        self.layer, self.shown = one.layer, one.shown
        units, height, width = self.layer.info.shape
        self.place: list[np.ndarray] = []
        self.maps = [np.empty((0, height, width), np.float16)]
        self.histogram = np.zeros((units, pictures.BINS), np.int64)

    def take(self, shard: int, at: int, maps: torch.Tensor) -> None:
        """Take the maps (image, unit, y, x) float32 of the shard's images from `at` on."""
        shown = self.shown[shard]
        unit, place = np.nonzero((shown.image >= at) & (shown.image < at + len(maps)))
        if len(unit):
            chosen = maps[shown.image[unit, place] - at, unit]
            self.maps.append(half(chosen, self.layer.scale).contiguous().cpu().numpy())
            self.place.append(unit * pictures.KEPT + place)
        rows = stream.within(shown.sample, at, len(maps))
        if len(rows):
            halves: Any = stream.as_stored(maps, rows, self.layer.scale)
            values = (halves if isinstance(halves, np.ndarray) else halves.cpu().numpy()).astype(np.float32)
            bins = pictures.bins_of(values, shown.low[:, None, None], shown.high[:, None, None])
            units = len(self.histogram)
            key = (np.arange(units)[:, None, None] * pictures.BINS + bins).ravel()
            self.histogram += np.bincount(key, minlength=units * pictures.BINS).reshape(units, pictures.BINS)

    def arrays(self) -> dict[str, np.ndarray]:
        place = np.concatenate([np.empty(0, np.int64), *self.place])
        return {"place": place, "map": np.concatenate(self.maps), "histogram": self.histogram}
