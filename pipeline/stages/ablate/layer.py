"""The ablation of one layer: what is predicted without each of its units and without sets of them, and the counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kernels.ablation import KINDS, Predictions, random_sets, ranked_sets, ranking
from pipeline.stages.ablate.results import AblatedLayer, AblationCounts
from pipeline.stages.ablate.tasks import (
    SETS,
    TASK_UNITS,
    UNITS,
    Shard,
    Target,
    sum_shard,
    without_sets,
    without_units,
)
from pipeline.stages.ablate.work import REMEDY, Work
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Files, within
from pipeline.storage.store import Array, Reader, create, metadata_files, remove, remove_partials
from pipeline.workers.resumable import Parts
from pipeline.workers.tasks import run_tasks


def ablate_layer(work: Work, target: Target, shards: Mapping[int, Shard]) -> tuple[AblationCounts, Files]:
    """Remove the units of a layer; return the counts, and the files of the predictions behind them."""
    settings, measure = work.settings, work.settings.measure
    if target.replace == "mean":
        target = replace(target, mean=means(work, target, shards))
    units = predict_units(work, target, shards)
    whole, without = count_units(work, target, units.files())
    files = manifest_files(target.predictions, units.files())
    order = ranking(whole[measure.rank].balanced_accuracy - without[measure.rank].balanced_accuracy)
    sizes = [size for size in settings.sizes if size < target.units]
    sets = all_sets(order, sizes, measure.draws, target)
    predicted = predict_sets(work, target, shards, sets)
    ranked = len(KINDS) * len(sizes) * len(work.classes)
    counts, random = count_sets(work, target, predicted, ranked, len(sets))
    if predicted is not None:
        files |= manifest_files(target.set_predictions, predicted.files())
    facts = facts_of(work, target, shards, units, predicted, len(sets), whole)
    set_counts = counts.reshape(3, len(KINDS), len(sizes), len(work.classes))
    return AblationCounts(target.info.name, measure, whole, without, order, sizes, set_counts, random, facts), files


def facts_of(
    work: Work,
    target: Target,
    shards: Mapping[int, Shard],
    units: Parts,
    sets: Parts | None,
    set_count: int,
    whole: Mapping[str, Predictions],
) -> AblatedLayer:
    """Return the small facts of a layer, those that tasks noted among them."""
    entries = units.entries().values()
    return AblatedLayer(
        units=target.units,
        pairs=target.units * sum(len(shard.rows) for shard in shards.values()),
        pairs_that_differ=pairs_of(units),
        logits_difference=max(entry.get("difference", 0.0) for entry in entries),
        logits_largest=max(entry.get("largest", 0.0) for entry in entries),
        predictions_changed=sum(entry.get("changed", 0) for entry in entries),
        set_pairs_that_differ=pairs_of(sets) if sets is not None else 0,
        layer=target.info.name,
        sets=set_count,
        whole_network=target.whole,
        pair_flops=target.pair_flops,
        counted={split: int(counts.images.sum()) for split, counts in whole.items()},
        notes=[
            f"class {work.classes[c]!r} has no images in split {split!r}: its losses there are not defined"
            for split, counts in whole.items()
            for c in np.flatnonzero(counts.images == 0)
        ],
    )


def pairs_of(parts: Parts) -> int:
    """Return how many pairs were computed."""
    return sum(entry["pairs"] for entry in parts.entries().values())


def made_of(work: Work, target: Target, shard: Shard) -> list[Any]:
    """Return what the predictions for a shard depend on, beside the units that are removed."""
    return [
        work.job.stage.version,
        work.model.architecture,
        work.model.sha256,
        [target.id, target.scale, target.pairs, target.images, target.whole],
        [target.replace, None if target.mean is None else [each.tolist() for each in target.mean]],
        work.images.contents[shard.number],
        [shard.rows.tolist(), shard.label.tolist(), shard.partner.tolist() if target.replace == "shuffled" else None],
    ]


def means(work: Work, target: Target, shards: Mapping[int, Shard]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of each unit over the images that rank, and that in each special token.

    Shards are added in their order.
    """
    rows = work.splits[work.settings.rank]
    tasks = [
        (work.model, target, shards[number], np.searchsorted(shards[number].rows, own)) for number, own in rows.items()
    ]
    with work.job.finite(work.images):
        done = run_tasks(work.workers, sum_shard, tasks, len(tasks), f"{work.job.name}: means")
        sums = {number: (unit, token) for number, unit, token in done}
    count = sum(map(len, rows.values()))
    unit, token = (sum(np.asarray(sums[number][which]) for number in sorted(sums)) / count for which in (0, 1))
    return np.asarray(unit), np.asarray(token)


def manifest_files(path: Path, files: Files) -> Files:
    """Return the files of a store of predictions, as the job's manifest names them."""
    return within(f"{path.parent.name}/{path.name}", files | metadata_files(path))


# Single units ---------------------------------------------------------------------------------------------------------


def predict_units(work: Work, target: Target, shards: Mapping[int, Shard]) -> Parts:
    """Have the predictions without each unit written, where they are not yet: parts are blocks of units of a shard."""
    images, step, path = work.images, work.images.shard_images, target.predictions
    chunk = (step, target.block)
    create(
        path,
        {
            "prediction": Array(("image", "unit"), (images.count, target.units), target.dtype, chunk, fill=-1),
            "above": Array(("image", "unit"), (images.count, target.units), target.dtype, chunk, fill=-1),
            "prediction_whole": Array(("image",), (images.count,), target.dtype, (step,), fill=-1),
            "above_whole": Array(("image",), (images.count,), target.dtype, (step,), fill=-1),
        },
        {"layer": target.info.name, "replace": target.replace},
    )
    remove_partials(path)
    ids = {
        f"{number}.{first}": digest([*made_of(work, target, shard), first, target.block])
        for number, shard in shards.items()
        for first in range(0, target.units, target.block)
    }

    def arguments(part: str, _: list[str]) -> tuple:
        number, first = map(int, part.split("."))
        return work.model, target, shards[number], first

    parts = Parts(path, ids)
    with work.job.finite(images):
        what = f"units of {target.info.name}"
        work.job.resumed(work.workers, without_units, {UNITS: parts}, arguments, REMEDY, what)
    return parts


def count_units(work: Work, target: Target, files: Files) -> tuple[dict[str, Predictions], dict[str, Predictions]]:
    """Count by split: predictions with nothing removed, and without each unit."""
    stored = Reader(target.predictions, files)
    arrays = {name: stored[name] for name in ("prediction", "above", "prediction_whole", "above_whole")}
    whole, without = {}, {}
    for split, shards in work.splits.items():
        whole[split] = Predictions.zeros(1, target.classes)
        without[split] = Predictions.zeros(target.units, target.classes)
        for number, rows in shards.items():
            start, stop = work.images.range(number)
            label = work.label[start:stop][rows]
            values = {name: np.asarray(array[start:stop])[rows] for name, array in arrays.items()}
            whole[split].update(label, values["prediction_whole"][:, None], values["above_whole"][:, None])
            without[split].update(label, values["prediction"], values["above"])
    return whole, without


# Sets of units --------------------------------------------------------------------------------------------------------


def all_sets(order: np.ndarray, sizes: list[int], draws: int, target: Target) -> np.ndarray:
    """(set, unit): those of each class, (kind, size, class), then the random ones, (draw, kind, size)."""
    seed = int(digest(["random sets", target.id]), 16) % 2**63
    ranked, drawn = ranked_sets(order, sizes), random_sets(target.units, sizes, draws, seed)
    return np.concatenate([ranked.reshape(-1, target.units), drawn.reshape(-1, target.units)])


def predict_sets(work: Work, target: Target, shards: Mapping[int, Shard], sets: np.ndarray) -> Parts | None:
    """Have the predictions without each set written for the images that judge; None where there are no sets."""
    images, step, path = work.images, work.images.shard_images, target.set_predictions
    if not len(sets):
        remove(path)
        return None
    # A pair costs more than that of a unit, as all channels are mixed: never less than a block of units does.
    block = min(len(sets), max(TASK_UNITS, 4 * target.block))
    create(
        path,
        {"prediction": Array(("image", "set"), (images.count, len(sets)), target.dtype, (step, block), fill=-1)},
        {"layer": target.info.name, "replace": target.replace},
    )
    remove_partials(path)
    packed = {first: np.packbits(sets[first : first + block], axis=1) for first in range(0, len(sets), block)}
    members = {first: digest(bits.tobytes().hex()) for first, bits in packed.items()}
    ids = {
        f"{number}.{first}": digest([*made_of(work, target, shards[number]), "sets", members[first], block])
        for number in work.splits[work.settings.judge]
        for first in packed
    }

    def arguments(part: str, _: list[str]) -> tuple:
        number, first = map(int, part.split("."))
        return work.model, target, shards[number], first, packed[first]

    parts = Parts(path, ids)
    with work.job.finite(images):
        what = f"sets of {target.info.name}"
        work.job.resumed(work.workers, without_sets, {SETS: parts}, arguments, REMEDY, what)
    return parts


def count_sets(
    work: Work, target: Target, parts: Parts | None, ranked: int, sets: int
) -> tuple[np.ndarray, Predictions]:
    """Count on the images that judge.

    Returns (3, ranked set): true positives and predicted of the set's own class, correct predictions; and the counts
    of the random sets, for all classes.
    """
    counts = np.zeros((3, ranked), np.int64)
    random = Predictions.zeros(sets - ranked, target.classes)
    if parts is None:
        return counts, random
    stored = Reader(target.set_predictions, parts.files())
    own = np.arange(ranked) % target.classes
    for number, rows in work.splits[work.settings.judge].items():
        start, stop = work.images.range(number)
        label = work.label[start:stop][rows]
        prediction = np.asarray(stored["prediction"][start:stop])[rows]
        mine = prediction[:, :ranked] == own
        counts[0] += (mine & (label[:, None] == own)).sum(0)
        counts[1] += mine.sum(0)
        counts[2] += (prediction[:, :ranked] == label[:, None]).sum(0)
        drawn = prediction[:, ranked:]
        random.update(label, drawn, np.where(drawn == label[:, None], 0, target.classes))
    return counts, random
