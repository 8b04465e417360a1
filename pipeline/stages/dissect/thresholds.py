"""Exact thresholds of stored layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.stages.dissect.settings import Method
from pipeline.stages.dissect.work import CountedShard, LayerSource, Threshold, activation, runs
from pipeline.workers.devices import device
from pipeline.workers.tasks import run_tasks

if TYPE_CHECKING:
    from kernels.dissection.brackets import Bracket, Tail


SAMPLE_SHARDS = 4  # the first shards are a random sample of the images that brackets the thresholds


def find_thresholds(
    client: Any,
    label: str,
    layers: Mapping[str, LayerSource],
    counted: list[CountedShard],
    method: Method,
    size: tuple[int, int],
) -> dict[str, Threshold]:
    """Find the exact top quantile of every unit.

    Brackets come from a sample, and positions are counted in them; units that a bracket missed are counted again.
    """
    quantile, border = method.quantile, method.border
    counted_at = {id: method.counted_at(layer.size, size) for id, layer in layers.items()}
    found: dict[str, Threshold] = {}
    sample = counted[:SAMPLE_SHARDS]
    tasks: list[tuple] = [(layer.at(sample), sample, counted_at[id], border, quantile) for id, layer in layers.items()]
    brackets: dict[str, tuple[Bracket, np.ndarray]] = {}
    for id, bracket in run_tasks(client, sample_layer, tasks, len(tasks), f"{label}: samples"):
        count = len(bracket.floor)
        brackets[id] = (bracket, np.arange(count))
        found[id] = Threshold(np.full(count, np.nan, np.float16), np.zeros(count, np.int64), 0)
    while brackets:
        tasks = [
            (layers[id].at(part), units, bracket, part, counted_at[id], border)
            for id, (bracket, units) in brackets.items()
            for part in runs(counted, client)
        ]
        tails: dict[str, Tail] = {}
        for id, tail in run_tasks(client, tail_layer, tasks, len(tasks), f"{label}: thresholds"):
            tails[id] = tails[id].merge(tail) if id in tails else tail
        for id, tail in tails.items():
            _, units = brackets.pop(id)
            result = tail.result(quantile)
            done = units[result.certified]
            found[id].threshold[done] = result.threshold[result.certified]
            found[id].active[done] = result.active[result.certified]
            found[id] = replace(found[id], positions=tail.positions)
            if not result.certified.all():
                brackets[id] = (tail.refine(quantile)[~result.certified], units[~result.certified])
    return found


def sample_layer(
    layer: LayerSource, sample: list[CountedShard], size: tuple[int, int], border: Any, quantile: float
) -> tuple[str, Bracket]:
    from kernels.dissection.threshold import sample_bracket

    maps = np.concatenate([activation(layer, one) for one in sample])
    return layer.id, sample_bracket(maps, size, border, quantile)


def tail_layer(
    layer: LayerSource,
    units: np.ndarray,
    bracket: Bracket,
    part: list[CountedShard],
    size: tuple[int, int],
    border: Any,
) -> tuple[str, Tail]:
    from kernels.dissection.threshold import count_tail

    total = None
    for one in part:
        maps = activation(layer, one)
        if len(units) < maps.shape[1]:
            maps = np.ascontiguousarray(maps[:, units])
        tail = count_tail(maps, bracket, size, border, device=device())
        total = tail if total is None else total.merge(tail)
    assert total is not None
    return layer.id, total
