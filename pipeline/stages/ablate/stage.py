"""The stage `ablate`: what each class loses when units of a layer are removed, one at a time and in sets.

Writes, for the network,
    ablation.zarr/<layer>  balanced_accuracy_loss, recall_loss, precision_loss (split, unit, class) · accuracy_loss,
                           top5_loss (split, unit) · the counts behind them, int64 · what sets of units do
    ablation.csv           per class its most important units: concept, IoU, and losses on both splits
    ablation-sets.csv      per class what removing its 1, 2, ... most important units does, and removing others
    ablation-units.csv     per unit its concept, and to how many classes it is important
    ablation-predictions/  what was predicted without each unit and set, by image: all of the above is counted from it

Definitions: Bau et al., "Understanding the role of individual units in a deep neural network" (PNAS 2020). See
docs/ablation.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.core import AnyDataset, Network
from pipeline.data.listing import derangement
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks.forward import Model, NonFiniteError, model_of
from pipeline.plan import job as stage
from pipeline.stages.ablate import tasks as ablate_tasks
from pipeline.stages.ablate.tasks import Part, Target
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Files, Manifest, write_file
from pipeline.workers.pool import check_memory, client, run_tasks

if TYPE_CHECKING:
    from kernels.ablation import Predictions
    from pipeline.data.images import Images
    from pipeline.data.kinds import Summary
    from pipeline.plan.step import Plan, Step

VERSION = 1
CODE = (
    "kernels/ablation.py",
    "kernels/images/grey.py",
    "kernels/images/whiten.py",
    "pipeline/stages/ablate/stage.py",
    "pipeline/stages/ablate/results.py",
    "pipeline/stages/ablate/tasks.py",
    "pipeline/networks/graph/channels.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/forward.py",
    "pipeline/networks/layers.py",
    "pipeline/data/listing.py",
    "pipeline/networks/build.py",
    "pipeline/networks/graph/tail.py",
    "pipeline/networks/graph/trace.py",
)


def wanted(spec: Network, dataset: str) -> bool:
    """Whether units of a network are removed on a data set."""
    return spec.ablate is not None and (spec.ablate.datasets is None or dataset in spec.ablate.datasets)


def settings(name: str, spec: Network, data: str, dataset: AnyDataset, found: Summary) -> dict[str, Any]:
    """What the id is made of beside the parents; images without classes or without the splits are refused here."""
    assert spec.ablate is not None
    how = spec.ablate.model_dump(exclude={"datasets"})
    how |= {"judge": spec.ablate.judge or dataset.dissect.split, "sizes": sorted(set(spec.ablate.sizes))}
    if not found.classes:
        raise MicrotomeError(
            f"network {name!r}, ablate: the images of data set {data!r} have no classes that could lose anything: "
            f"give it `labels`, or name other data sets in `ablate.datasets`"
        )
    for key in ("rank", "judge"):
        try:
            found.require(data, how[key])
        except MicrotomeError as error:
            raise MicrotomeError(f"network {name!r}, ablate.{key}: {error}") from None
    return {"ablate": how, "classes": found.classes}


@dataclass(frozen=True)
class Shared:
    """What all layers of one run share.

    `splits` : by split, the one to rank with first, the rows of each shard that count; `rows` the same of all splits
    together.
    """

    plan: Plan
    step: Step
    images: Images
    model: Model
    classes: list[str]
    label: np.ndarray
    image_id: np.ndarray
    splits: dict[str, dict[int, np.ndarray]]
    workers: Any

    @property
    def how(self) -> Mapping[str, Any]:
        return self.step.settings["ablate"]

    @property
    def rows(self) -> dict[int, np.ndarray]:
        shards = sorted({shard for rows in self.splits.values() for shard in rows})
        return {
            shard: np.sort(np.concatenate([rows[shard] for rows in self.splits.values() if shard in rows]))
            for shard in shards
        }

    def tasks(self, function: Any, tasks: Sequence[tuple], what: str) -> Iterator[Any]:
        """Run tasks that are given the model and the images' store before their own arguments."""
        given = [(self.model, self.images.store, *task) for task in tasks]
        try:
            yield from run_tasks(self.workers, function, given, len(given), f"{self.step.name}: {what}")
        except NonFiniteError as error:
            raise error.told(self.step, self.image_id) from None


def run(plan: Plan, step: Step) -> None:
    from pipeline.data.images import Images
    from pipeline.stages.ablate.results import layer_files, unit_labels, write_layer, write_tables
    from pipeline.storage.store import create, remove

    assert step.dataset is not None and step.network is not None
    began = stage.begin(plan, step)
    images = Images.of(plan, step)
    _, extracted = plan.parent(step, "extract")
    _, ingested = plan.parent(step, "ingest")
    _, dissected = plan.parent(step, "dissect")
    folder = plan.results / step.dataset / step.network
    reader = images.reader()
    label = np.asarray(reader["label"][:])
    labels = unit_labels(folder, dissected)
    store = folder / "ablation.zarr"
    remove(store)
    create(store, {}, {})
    files: Files = {}
    found = []
    with client(plan.config.cluster, plan.scratch) as workers:
        shared = Shared(
            plan,
            step,
            images,
            model_of(plan, step),
            ingested.result["classes"],
            label,
            images.image_ids(),
            counted_rows(images, label, step.settings["ablate"]),
            workers,
        )
        for target, parts in targets(shared, extracted, folder):
            one, written = ablate_layer(shared, target, parts)
            files |= written | write_layer(
                store / target.info.name, shared.classes, one, f"ablation.zarr/{target.info.name}"
            )
            found.append(one)
    create(store, {}, {"layers": [one.layer for one in found]})
    files |= layer_files(store)
    for name, data in write_tables(found, labels, shared.classes).items():
        files |= write_file(folder, name, data)
    stage.finish(plan, step, began, digest(files), files, {"layers": [one.facts for one in found]})


# What there is to do --------------------------------------------------------------------------------------------------


def counted_rows(images: Images, label: np.ndarray, how: Mapping[str, Any]) -> dict[str, dict[int, np.ndarray]]:
    """By split, the rows of each shard that count: valid images with a class. Alone in its shard, an image has no other
    whose values could replace its own, and does not count where they should."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for split in dict.fromkeys((how["rank"], how["judge"])):
        counts = images.counted(split) & (label >= 0)
        found[split] = {}
        for shard in images.shards(split, how["images"]):
            start, stop = images.range(shard)
            rows = np.flatnonzero(counts[start:stop])
            if len(rows) > (how["replace"] == "shuffled"):
                found[split][shard] = rows
        if not found[split]:
            raise MicrotomeError(
                f"{images.store.parent.name}: no image of split {split!r} is left to measure losses on"
                + (" (with `replace: shuffled` it takes two in one shard)" if how["replace"] == "shuffled" else "")
            )
    return found


def targets(shared: Shared, extracted: Manifest, folder: Path) -> Iterator[tuple[Target, dict[int, Part]]]:
    """Each layer with the shards, as tasks name them."""
    entries = {entry["name"]: entry for entry in extracted.result["layers"]}
    chosen = shared.how["layers"]
    names = [next(reversed(entries))] if chosen == "last" else chosen
    for name in names:
        if name not in entries:
            raise MicrotomeError(
                f"network {shared.step.network!r}, ablate.layers: {name!r} is not among its layers"
                f"{nearest(name, entries)}"
            )
    asked = shared.model, shared.images.size, list(dict.fromkeys(names)), shared.images.shard_images
    (prepared,) = run_tasks(shared.workers, ablate_tasks.prepare, [asked], 1, f"{shared.step.name}: tails")
    for each in prepared:
        what = f"{shared.step.name}: {each.info.name}"
        check_memory(shared.plan.config.cluster, each.memory, what, "lower `shard_images` of the data set")
    for each in prepared:
        if each.classes != len(shared.classes):
            raise MicrotomeError(
                f"network {shared.step.network!r} gives {each.classes} logits, and data set {shared.step.dataset!r} "
                f"has {len(shared.classes)} classes: they cannot be compared"
            )
        entry = entries[each.info.name]
        manifest = Manifest.read(shared.plan.results / entry["manifest"])
        target = Target(
            **vars(each),
            id=entry["id"],
            store=folder.parent / "layers" / entry["id"] / "activations.zarr",
            scale=entry["scale"],
            network=folder,
            replace=shared.how["replace"],
        )
        # A layer without stored maps: they are computed as those of images that were not extracted.
        stored = set() if "store" in entry else set(extracted.result["shards"])
        yield target, parts_of(shared, stored, manifest.files, extracted.files)


def parts_of(shared: Shared, stored: set[int], activations: Files, logits: Files) -> dict[int, Part]:
    """The shards with their rows, and the chunk files of what is stored of them."""
    held = stage.by_shard(activations, "activations.zarr", ("activation", "special"))
    heads = stage.by_shard(logits, "logits.zarr", ("logits",))
    parts = {}
    for shard, rows in shared.rows.items():
        start, stop = shared.images.range(shard)
        partner = np.arange(len(rows))
        for split in shared.splits.values():
            if shard in split:
                own = np.searchsorted(rows, split[shard])
                partner[own] = own[derangement(shared.image_id[start:stop][split[shard]])]
        parts[shard] = Part(
            shard,
            start,
            stop,
            rows,
            shared.label[start:stop][rows],
            partner,
            shared.images.files_of(shard),
            held[shard] if shard in stored else None,
            heads[shard] if shard in stored else None,
        )
    return parts


# One layer ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ablated:
    """What was counted for one layer.

    Attributes
    ----------
    how : the settings.
    whole, without : by split, counts with nothing removed (one variant) and with each unit removed.
    order : (class, unit), most important first, by the losses on the split that ranks.
    set_counts : true positives, predicted and correct x (kind, size, class), on the split that judges.
    random : counts on the same of the random sets, (draw, kind, size) in this order.
    facts : small numbers for the manifest.
    """

    layer: str
    how: Mapping[str, Any]
    whole: dict[str, Predictions]
    without: dict[str, Predictions]
    order: np.ndarray
    sizes: list[int]
    draws: int
    set_counts: np.ndarray
    random: Predictions
    facts: dict[str, Any]

    @property
    def loss(self) -> dict[str, np.ndarray]:
        """By split, (unit, class) of balanced accuracy."""
        return {
            split: self.whole[split].balanced_accuracy - without.balanced_accuracy
            for split, without in self.without.items()
        }


def ablate_layer(shared: Shared, target: Target, parts: dict[int, Part]) -> tuple[Ablated, Files]:
    from kernels.ablation import KINDS, ranking

    how = shared.how
    if target.replace == "mean":
        target = replace(target, mean=means(shared, target, parts))
    facts, files = predict_units(shared, target, parts)
    whole, without = count_units(shared, target, parts, files)
    written = manifest_files(target.predictions, files)
    order = ranking(whole[how["rank"]].balanced_accuracy - without[how["rank"]].balanced_accuracy)
    sizes = [size for size in how["sizes"] if size < target.units]
    sets = all_sets(order, sizes, how["draws"], target)
    ranked = len(KINDS) * len(sizes) * len(shared.classes)
    facts["set_pairs_that_differ"], files = predict_sets(shared, target, parts, sets)
    counts, random = count_sets(shared, target, parts, files, ranked, len(sets))
    if len(sets):
        written |= manifest_files(target.set_predictions, files)
    facts |= {
        "layer": target.info.name,
        "sets": len(sets),
        "whole_network": target.whole,
        "pair_flops": target.pair_flops,
        "counted": {split: int(counts.images.sum()) for split, counts in whole.items()},
        "notes": [
            f"class {shared.classes[c]!r} has no images in split {split!r}: its losses there are not defined"
            for split, counts in whole.items()
            for c in np.flatnonzero(counts.images == 0)
        ],
    }
    set_counts = counts.reshape(3, len(KINDS), len(sizes), len(shared.classes))
    found = Ablated(target.info.name, how, whole, without, order, sizes, how["draws"], set_counts, random, facts)
    return found, written


def discard(plan: Plan, step: Step) -> list[Path]:
    """The files and folders that this step made."""
    assert step.dataset is not None and step.network is not None
    folder = plan.results / step.dataset / step.network
    return [folder / "ablation.zarr", folder / "ablation-predictions", *folder.glob("ablation*.csv")]


def made_of(shared: Shared, target: Target, part: Part) -> list[Any]:
    """What the predictions for a shard depend on, beside the units that are removed."""
    return [
        VERSION,
        shared.model.architecture,
        shared.model.sha256,
        [target.id, target.scale, target.pairs, target.images, target.whole],
        [target.replace, None if target.mean is None else [each.tolist() for each in target.mean]],
        shared.images.contents[part.shard],
        [part.rows.tolist(), part.label.tolist(), part.partner.tolist() if target.replace == "shuffled" else None],
    ]


def means(shared: Shared, target: Target, parts: dict[int, Part]) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each unit over the images that rank, and that in each special token; summed in order of shards."""
    rows = shared.splits[shared.how["rank"]]
    tasks = [(target, parts[shard], np.searchsorted(parts[shard].rows, own)) for shard, own in rows.items()]
    sums = {shard: (unit, token) for shard, unit, token in shared.tasks(ablate_tasks.sum_shard, tasks, "means")}
    count = sum(map(len, rows.values()))
    unit, token = (sum(np.asarray(sums[shard][which]) for shard in sorted(sums)) / count for which in (0, 1))
    return np.asarray(unit), np.asarray(token)


def predict_units(shared: Shared, target: Target, parts: dict[int, Part]) -> tuple[dict[str, Any], Files]:
    """Have the predictions without each unit written, where they are not yet; facts over all, and the files."""
    from pipeline.storage.store import Array, Ledger, create, remove_partials

    images, step, path = shared.images, shared.images.shard_images, target.predictions
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
    ledger = Ledger(path.with_suffix(".ledger"))
    ids = {
        (shard, first): digest([*made_of(shared, target, part), first, target.block])
        for shard, part in parts.items()
        for first in range(0, target.units, target.block)
    }
    tasks = [
        (target, parts[shard], first)
        for (shard, first), id in ids.items()
        if not ledger.get(f"{shard}.{first}", id, path)
    ]
    for shard, first, files, facts in shared.tasks(ablate_tasks.without_units, tasks, f"units of {target.info.name}"):
        ledger.record(f"{shard}.{first}", ids[shard, first], files, **facts)
    keys = [f"{shard}.{first}" for shard, first in ids]
    entries = [ledger.entries[key] for key in keys]
    facts = {
        "units": target.units,
        "pairs": target.units * sum(len(part.rows) for part in parts.values()),
        "pairs_that_differ": sum(entry["pairs"] for entry in entries),
        "logits_difference": max(entry.get("difference", 0.0) for entry in entries),
        "logits_largest": max(entry.get("largest", 0.0) for entry in entries),
        "predictions_changed": sum(entry.get("changed", 0) for entry in entries),
    }
    return facts, ledger.files(keys)


def manifest_files(path: Path, files: Files) -> Files:
    """The files of a store of predictions, as the step's manifest names them."""
    from pipeline.storage.store import metadata_files

    return stage.within(f"{path.parent.name}/{path.name}", files | metadata_files(path))


def count_units(
    shared: Shared, target: Target, parts: dict[int, Part], files: Files
) -> tuple[dict[str, Predictions], dict[str, Predictions]]:
    """By split: counts with nothing removed, and without each unit."""
    from kernels.ablation import Predictions
    from pipeline.storage.store import Reader

    stored = Reader(target.predictions, files)
    arrays = {name: stored[name] for name in ("prediction", "above", "prediction_whole", "above_whole")}
    whole, without = {}, {}
    for split, shards in shared.splits.items():
        whole[split] = Predictions.zeros(1, target.classes)
        without[split] = Predictions.zeros(target.units, target.classes)
        for shard, rows in shards.items():
            part = parts[shard]
            label = shared.label[part.start : part.stop][rows]
            values = {name: np.asarray(array[part.start : part.stop])[rows] for name, array in arrays.items()}
            whole[split].update(label, values["prediction_whole"][:, None], values["above_whole"][:, None])
            without[split].update(label, values["prediction"], values["above"])
    return whole, without


# Sets of units --------------------------------------------------------------------------------------------------------


def all_sets(order: np.ndarray, sizes: list[int], draws: int, target: Target) -> np.ndarray:
    """(set, unit): those of each class, (kind, size, class), then the random ones, (draw, kind, size)."""
    from kernels.ablation import random_sets, ranked_sets

    seed = int(digest(["random sets", target.id]), 16) % 2**63
    ranked, drawn = ranked_sets(order, sizes), random_sets(target.units, sizes, draws, seed)
    return np.concatenate([ranked.reshape(-1, target.units), drawn.reshape(-1, target.units)])


def predict_sets(shared: Shared, target: Target, parts: dict[int, Part], sets: np.ndarray) -> tuple[int, Files]:
    """Have the predictions without each set written for the images that judge: pairs that differ, files."""
    from pipeline.storage.store import Array, Ledger, create, remove, remove_partials

    images, step, path = shared.images, shared.images.shard_images, target.set_predictions
    if not len(sets):
        remove(path)
        return 0, {}
    # A pair costs more than that of a unit, as all channels are mixed: never less than a block of units does.
    block = min(len(sets), max(ablate_tasks.TASK_UNITS, 4 * target.block))
    create(
        path,
        {"prediction": Array(("image", "set"), (images.count, len(sets)), target.dtype, (step, block), fill=-1)},
        {"layer": target.info.name, "replace": target.replace},
    )
    remove_partials(path)
    ledger = Ledger(path.with_suffix(".ledger"))
    packed = {first: np.packbits(sets[first : first + block], axis=1) for first in range(0, len(sets), block)}
    members = {first: digest(bits.tobytes().hex()) for first, bits in packed.items()}
    ids = {
        (shard, first): digest([*made_of(shared, target, parts[shard]), "sets", members[first], block])
        for shard in shared.splits[shared.how["judge"]]
        for first in packed
    }
    tasks = [
        (target, parts[shard], first, packed[first])
        for (shard, first), id in ids.items()
        if not ledger.get(f"{shard}.{first}", id, path)
    ]
    for shard, first, files, facts in shared.tasks(ablate_tasks.without_sets, tasks, f"sets of {target.info.name}"):
        ledger.record(f"{shard}.{first}", ids[shard, first], files, **facts)
    keys = [f"{shard}.{first}" for shard, first in ids]
    return sum(ledger.entries[key]["pairs"] for key in keys), ledger.files(keys)


def count_sets(
    shared: Shared, target: Target, parts: dict[int, Part], files: Files, ranked: int, sets: int
) -> tuple[np.ndarray, Predictions]:
    """Counts on the images that judge: (3, ranked set): true positives and predicted of the set's own class, correct
    predictions; and those of the random sets, for all classes."""
    from kernels.ablation import Predictions
    from pipeline.storage.store import Reader

    counts = np.zeros((3, ranked), np.int64)
    random = Predictions.zeros(sets - ranked, target.classes)
    if not sets:
        return counts, random
    stored = Reader(target.set_predictions, files)
    own = np.arange(ranked) % target.classes
    for shard, rows in shared.splits[shared.how["judge"]].items():
        part = parts[shard]
        label = shared.label[part.start : part.stop][rows]
        prediction = np.asarray(stored["prediction"][part.start : part.stop])[rows]
        mine = prediction[:, :ranked] == own
        counts[0] += (mine & (label[:, None] == own)).sum(0)
        counts[1] += mine.sum(0)
        counts[2] += (prediction[:, :ranked] == label[:, None]).sum(0)
        drawn = prediction[:, ranked:]
        random.update(label, drawn, np.where(drawn == label[:, None], 0, target.classes))
    return counts, random
