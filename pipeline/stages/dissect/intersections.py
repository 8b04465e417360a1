"""Intersections of units with concepts, for stored layers; and how counts are combined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.stages.dissect.results import Arrays
from pipeline.stages.dissect.settings import Method
from pipeline.stages.dissect.work import Concepts, CountedShard, LayerResult, LayerSource, Threshold, activation, runs
from pipeline.workers.devices import device
from pipeline.workers.tasks import run_tasks

if TYPE_CHECKING:
    from kernels.dissection.counts import Counts, Labels


ACCUMULATOR_BYTES = 2 << 30  # counts that a worker holds at once; further layers need another pass over the images


def count_stored(
    client: Any,
    label: str,
    thresholds: Mapping[str, Threshold],
    method: Method,
    batch: list[LayerResult],
    chosen: Concepts,
) -> tuple[dict[tuple[str, bool], Counts], dict[str, Arrays]]:
    """Return the counts of stored layers."""
    shards = {one.shard: one for wanted in batch for one in wanted.counted}
    tasks = []
    for part in runs(list(shards.values()), client):
        wanted = [
            (
                w.layer.at(part),
                w.permuted,
                {one.shard for one in w.counted} & {one.shard for one in part},
                thresholds[w.layer.id].threshold,
            )
            for w in batch
        ]
        tasks.append((wanted, part, chosen.at(part), method.border))
    totals: dict[tuple[str, bool], Counts] = {}
    for counts in run_tasks(client, count_run, tasks, len(tasks), f"{label}: IoU"):
        for key, part in counts.items():
            totals[key] = add(totals[key], part) if key in totals else part
    return totals, {}


def only(concepts: Concepts, categories: list[str]) -> Concepts:
    """Return the concepts of some categories."""
    places = [concepts.categories.index(name) for name in categories]
    columns = [at for at, place in enumerate(concepts.category_index) if place in places]
    return replace(
        concepts,
        categories=tuple(categories),
        axis=tuple(concepts.axis[place] for place in places),
        names=tuple(concepts.names[at] for at in columns),
        numbers=tuple(concepts.numbers[at] for at in columns),
        category_index=tuple(places.index(concepts.category_index[at]) for at in columns),
    )


def joined(concepts: Concepts, sources: Mapping[str, tuple[Counts, Concepts]]) -> Counts:
    """Combine counts of all concepts in order, each category from its source; areas and pixels are in every source."""
    from kernels.dissection.counts import Counts

    columns, places = [], []
    for name in concepts.categories:
        counts, source = sources[name]
        place = source.categories.index(name)
        own = np.flatnonzero(np.asarray(source.category_index) == place)
        columns.append((counts.intersection[:, :, own], counts.concept_area[:, own]))
        places.append((counts.unit_area_in_category[:, :, place], counts.pixels_in_category[:, place]))
    counts, _ = next(iter(sources.values()))
    return Counts(
        intersection=np.concatenate([part for part, _ in columns], axis=2),
        unit_area=counts.unit_area,
        unit_area_in_category=np.stack([part for part, _ in places], axis=2),
        concept_area=np.concatenate([part for _, part in columns], axis=1),
        pixels=counts.pixels,
        pixels_in_category=np.stack([part for _, part in places], axis=1),
    )


def memory_need(layer: LayerSource, images: int, size: tuple[int, int], concepts: Concepts) -> int:
    """Return the bytes of a task: maps as stored and decompressed, counts, and prepared label maps.

    The counts are those of thresholds or those of IoU.
    """
    from kernels.dissection.counts import GROUPS

    units, height, width = layer.shape
    maps = 2 * 3 * images * units * height * width
    labels = 2 * 3 * images * size[0] * size[1] * len(concepts.categories)
    return maps + labels + 2 * 8 * units * max(2049, GROUPS * len(concepts.names))


def counting_need(units: int, concepts: Concepts, images: int, size: tuple[int, int]) -> int:
    """Return the bytes of counting a batch's units besides a forward pass.

    They are the counts, twice, and the label maps of a shard.
    """
    from kernels.dissection.counts import GROUPS

    return 16 * GROUPS * units * len(concepts.names) + 6 * images * size[0] * size[1] * len(concepts.categories)


def batches(missing: list[LayerResult], concepts: int, accumulator: int) -> Iterator[list[LayerResult]]:
    """Yield batches of layers whose counts fit into `accumulator` bytes; a larger layer is a batch of its own."""
    from kernels.dissection.counts import GROUPS

    batch: list[LayerResult] = []
    held = 0
    for wanted in missing:
        size = 8 * GROUPS * wanted.layer.shape[0] * concepts
        if batch and held + size > accumulator:
            yield batch
            batch, held = [], 0
        batch.append(wanted)
        held += size
    yield batch


def count_run(
    wanted: list[tuple[LayerSource, bool, set[int], np.ndarray]],
    part: list[CountedShard],
    concepts: Concepts,
    border: Any,
) -> dict[tuple[str, bool], Counts]:
    """Count some shards and merge the counts, by (layer id, permuted), on a worker."""
    from kernels.dissection.counts import GROUPS, Counts
    from kernels.dissection.iou import count_shard

    label_maps = concepts.store.open()["label_map"]
    totals: dict[tuple[str, bool], Counts] = {}
    for one in part:
        labels = labels_of(concepts, label_maps, one)
        read: dict[str, np.ndarray] = {}
        for layer, permuted, shards, threshold in wanted:
            if one.shard not in shards:
                continue
            if layer.id not in read:
                read = {layer.id: activation(layer, one)}
            shard = count_shard(
                read[layer.id],
                threshold,
                labels,
                one.group,
                border,
                permutation=one.partner if permuted else None,
                device=device(),
            )
            key = layer.id, permuted
            if key not in totals:
                totals[key] = Counts.zeros(GROUPS, len(threshold), len(concepts.names), len(concepts.categories))
            totals[key].add(shard)
    return totals


def labels_of(concepts: Concepts, label_maps: Any, one: CountedShard) -> Labels:
    """Return a shard's label maps of the images that count, prepared for counting."""
    from kernels.dissection.counts import label_columns

    step = label_maps.chunks[0]
    start = one.shard * step
    maps = np.stack([np.asarray(label_maps[start : start + step, axis]) for axis in concepts.axis], axis=1)
    return label_columns(maps[one.rows], concepts.numbers, concepts.category_index)


def add(total: Counts, part: Counts) -> Counts:
    for one in fields(total):
        mine = getattr(total, one.name)
        mine += getattr(part, one.name)
    return total
