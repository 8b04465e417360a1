"""The stage `probes`: how well the classes can be read off each layer by a linear classifier.

Writes, for the network,
    probe-features/<layer id>.zarr  feature (image, vector, unit) float32: class token, mean over the positions, single
                                    positions; taken from the stored activations, else from a forward pass of its own
    probes.zarr                     accuracy, low, high (layer, features, shots) and the accuracy and penalty of every
                                    single probe (layer, features, shots, draw, position)
    probes.csv                      a row for each layer, features and shots

Images are fitted on, or choose the penalty, or judge: none does two of these. See docs/probes.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.core import UNTRAINED, Probes
from pipeline.errors import MicrotomeError
from pipeline.networks.forward import Model, NonFiniteError, model_of
from pipeline.plan import job as stage
from pipeline.stages.probes import tasks as probes_tasks
from pipeline.stages.probes.tasks import PARTS, Layer, Task
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Files, Manifest, write_file
from pipeline.workers.pool import check_memory, client, run_tasks

if TYPE_CHECKING:
    from pipeline.data.images import Images
    from pipeline.data.kinds import Summary
    from pipeline.plan.step import Plan, Step
    from pipeline.storage.store import Ledger

VERSION = 1
CODE = (
    "kernels/images/grey.py",
    "kernels/images/whiten.py",
    "kernels/ridge.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/forward.py",
    "pipeline/networks/layers.py",
    "pipeline/networks/libraries",
    "pipeline/networks/build.py",
    "pipeline/stages/probes/stage.py",
    "pipeline/stages/probes/results.py",
    "pipeline/stages/probes/tasks.py",
)
REMEDY = "lower `probes.images`, `probes.draws` or `probes.shots`"
FORWARD_REMEDY = "lower `shard_images` of the data set or `numerics.micro_batch` of the network"


def wanted(asked: Probes, network: str, dataset: str, found: Summary) -> bool:
    """Whether the layers of a network are probed on a data set; untrained controls only where they are named."""
    named = not network.endswith(UNTRAINED) if asked.networks is None else network in asked.networks
    return named and (found.classes > 0 if asked.datasets is None else dataset in asked.datasets)


def settings(asked: Probes, name: str, split: str, found: Summary) -> dict[str, Any]:
    """What the id is made of beside the parents; splits that are not there are refused here."""
    how = asked.model_dump(exclude={"networks", "datasets"}) | {"test": asked.test or split}
    if asked.choose == how["test"]:
        raise MicrotomeError(
            f"probes.choose, data set {name!r}: split {asked.choose!r} is judged on: name another, or leave `choose` "
            f"out for a share of `fit`"
        )
    for key in ("fit", "choose", "test"):
        if how[key] is None:
            continue
        try:
            found.require(name, how[key])
        except MicrotomeError as error:
            also = "; with `fit` as the split that is dissected, its images are divided" if key == "fit" else ""
            raise MicrotomeError(f"probes.{key}: {error}{also}") from None
    how["shots"], how["penalties"] = sorted(how["shots"]), sorted(how["penalties"])
    return {"probes": how, "classes": found.classes}


@dataclass(frozen=True)
class Division:
    """Which images are fitted on, which choose the penalty, and which judge.

    Attributes
    ----------
    part : (image) uint8, place in `PARTS` plus one; 0: none of them.
    label : (image) int32.
    picks : (draw, class, shot) slots of images to fit on, -1 where a class has no more.
    shots : those that all classes with an image to fit on have enough images for.
    notes : what a reader has to know.
    """

    part: np.ndarray
    label: np.ndarray
    picks: np.ndarray
    shots: list[int]
    notes: list[str]

    def slots(self, part: str) -> np.ndarray:
        return np.flatnonzero(self.part == PARTS.index(part) + 1)

    @property
    def counts(self) -> dict[str, int]:
        return {part: len(self.slots(part)) for part in PARTS}


def run(plan: Plan, step: Step) -> None:
    from pipeline.data.images import Images
    from pipeline.stages.probes import results as probes_results

    assert step.dataset is not None and step.network is not None
    began = stage.begin(plan, step)
    images, model = Images.of(plan, step), model_of(plan, step)
    how = step.settings["probes"]
    _, ingested = plan.parent(step, "ingest")
    _, extracted = plan.parent(step, "extract")
    classes = ingested.result["classes"]
    label = np.asarray(images.reader()["label"][:])
    division = divide(images, label, how, classes, step.name)
    folder = plan.results / step.dataset / step.network
    entries = extracted.result["layers"]
    with client(plan.config.cluster, plan.scratch) as workers:
        names = [entry["name"] for entry in entries]
        (prepared,) = run_tasks(workers, probes_tasks.prepare, [(model, images.size, names)], 1, f"{step.name}: layers")
        need = probes_tasks.forward_need(prepared, model.spec, images.shard_images, images.size)
        check_memory(plan.config.cluster, need, step.name, FORWARD_REMEDY)
        layers = layers_of(plan, step, prepared.infos, entries, folder)
        made, held = gather(plan, step, workers, images, model, layers)
        own = network_accuracy(folder, extracted, images, division)
        attrs = {
            **{key: how[key] for key in ("fit", "choose", "test", "share", "images", "draws", "penalties", "seed")},
            "classes": classes,
            "counted": division.counts,
            "network_accuracy": own,
            "notes": division.notes,
        }
        files = probe(plan, step, workers, images, layers, held, division, attrs)
    store = folder / "probes.zarr"
    table = probes_results.table(store, files)
    output = digest([files, table.decode()])
    files = stage.within(store.name, files)
    for id, kept in held.items():
        files |= stage.within(f"probe-features/{id}.zarr", kept)
    files |= write_file(folder, "probes.csv", table)
    facts = {"counted": division.counts, "network_accuracy": own, "notes": division.notes}
    stage.finish(plan, step, began, output, files, facts, made=(len(made), len(shards_of(images, how))))


def pending(plan: Plan, step: Step) -> tuple[int, int]:
    """How many shards would have to be read, or put through the network, for features that are not kept."""
    from pipeline.data.images import Images
    from pipeline.storage.store import Ledger

    assert step.dataset is not None and step.network is not None
    images, how = Images.of(plan, step), step.settings["probes"]
    _, extracted = plan.parent(step, "extract")
    folder = plan.results / step.dataset / step.network / "probe-features"
    missing = set()
    for entry in extracted.result["layers"]:
        store = folder / f"{entry['id']}.zarr"
        ledger = Ledger(store.with_suffix(".ledger"))
        missing |= {
            shard
            for shard in shards_of(images, how)
            if not ledger.get(str(shard), shard_id(images, shard, entry["scale"], how), store)
        }
    return len(missing), len(shards_of(images, how))


def discard(plan: Plan, step: Step) -> list[Path]:
    """The files and folders that this step made."""
    assert step.dataset is not None and step.network is not None
    folder = plan.results / step.dataset / step.network
    return [folder / name for name in ("probes.zarr", "probes.ledger", "probes.csv", "probe-features")]


# Which images do what -------------------------------------------------------------------------------------------------


def shards_of(images: Images, how: Mapping[str, Any]) -> list[int]:
    """The shards with images that are fitted on, choose or judge."""
    splits = {how[key] for key in ("fit", "choose", "test") if how[key] is not None}
    return sorted({shard for split in splits for shard in images.shards(split, how["images"])})


def divide(images: Images, label: np.ndarray, how: Mapping[str, Any], classes: Sequence[str], what: str) -> Division:
    """Give every image its part: by its split, and where a split has two purposes by a hash of the image's id, so that
    images that come or go move no other."""
    image_id = images.image_ids()
    counts = {}
    for split in {how[key] for key in ("fit", "choose", "test") if how[key] is not None}:
        held = np.zeros(images.count, bool)
        for shard in images.shards(split, how["images"]):
            held[slice(*images.range(shard))] = True
        counts[split] = images.counted(split) & (label >= 0) & held
    place = probes_tasks.ranks(image_id, how["seed"], "part") / 2.0**64
    part = np.zeros(images.count, np.uint8)
    fit, choose, test = (PARTS.index(name) + 1 for name in PARTS)
    part[counts[how["fit"]]] = fit
    below = 0.0
    if how["test"] == how["fit"]:
        part[counts[how["fit"]] & (place < how["share"])] = test
        below = how["share"]
    else:
        part[counts[how["test"]]] = test
    if how["choose"] is None:
        part[counts[how["fit"]] & (place >= below) & (place < below + how["share"])] = choose
    else:
        part[counts[how["choose"]]] = choose
    for at, name in enumerate(PARTS, start=1):
        if not (part == at).any():
            raise MicrotomeError(
                f"{what}: no image with a class is left to {name} on (fit: {how['fit']!r}, choose: "
                f"{how['choose'] or 'a share of it'}, test: {how['test']!r}): use more images or another `probes.share`"
            )
    slots = np.flatnonzero(part == fit)
    there = np.bincount(label[slots], minlength=len(classes))
    if (there > 0).sum() < 2:
        raise MicrotomeError(
            f"{what}: the {len(slots)} images to fit on are all of class {classes[int(there.argmax())]!r}, and a probe "
            f"takes two"
        )
    notes = [f"class {name!r} has no image to fit on, and is never predicted" for name in compress(classes, there == 0)]
    fewest = int(there[there > 0].min())
    shots = [k for k in how["shots"] if k <= fewest]
    if left_out := [k for k in how["shots"] if k > fewest]:
        said = ", ".join(map(str, left_out))
        name = classes[int(np.where(there > 0, there, there.max() + 1).argmin())]
        notes.append(f"probes of {said} images a class are left out: class {name!r} has {fewest} to fit on")
    picks = probes_tasks.picks(
        slots, label[slots], image_id[slots], len(classes), max(shots, default=0), how["draws"], how["seed"]
    )
    return Division(part, label.astype(np.int32), picks, shots, notes)


# The features ---------------------------------------------------------------------------------------------------------


def layers_of(
    plan: Plan, step: Step, infos: Sequence[Any], entries: Sequence[Mapping[str, Any]], folder: Path
) -> list[Layer]:
    """The layers in execution order, as tasks name them."""
    how = step.settings["probes"]
    by_name = {info.name: info for info in infos}
    found = []
    for entry in entries:
        info = by_name[entry["name"]]
        found.append(
            Layer(
                info,
                entry["id"],
                entry["scale"],
                folder.parent / "layers" / entry["id"] / "activations.zarr",
                folder / "probe-features" / f"{entry['id']}.zarr",
                probes_tasks.vectors_of(info, how["features"], how["grid"]),
            )
        )
    return found


def gather(
    plan: Plan, step: Step, workers: Any, images: Images, model: Model, layers: Sequence[Layer]
) -> tuple[set[int], dict[str, Files]]:
    """Have the features of all images that count kept: the shards that were made now, and the files by layer id."""
    from pipeline.storage.store import Array, Ledger, create, metadata_files, remove_partials

    how = step.settings["probes"]
    _, extracted = plan.parent(step, "extract")
    shards = shards_of(images, how)
    distinct = {layer.id: layer for layer in layers if layer.vectors}
    if not distinct:
        raise MicrotomeError(
            f"{step.name}: none of its layers has a {' or a '.join(how['features'])}: `pooled` every layer has; or "
            f"name other networks in `probes.networks`"
        )
    held: dict[str, dict[int, Files]] = {}
    ledgers: dict[str, Ledger] = {}
    for entry in extracted.result["layers"]:
        layer = distinct.get(entry["id"])
        if layer is None:
            continue
        spatial = any(vector.y is not None for vector in layer.vectors)
        if not ("store" in entry and spatial):
            manifest = Manifest.read(plan.results / entry["manifest"])
            stored = stage.by_shard(manifest.files, "activations.zarr", layer.arrays)
            held[layer.id] = {shard: stored[shard] for shard in extracted.result["shards"]}
        units = layer.info.shape[0]
        shape = (images.count, len(layer.vectors), units)
        feature = Array(("image", "vector", "unit"), shape, np.float32, (images.shard_images, *shape[1:]), fill=np.nan)
        create(layer.features, {"feature": feature}, {"vectors": [vector.name for vector in layer.vectors]})
        remove_partials(layer.features)
        ledgers[layer.id] = Ledger(layer.features.with_suffix(".ledger"))
    ids = {(id, shard): shard_id(images, shard, layer.scale, how) for id, layer in distinct.items() for shard in shards}
    tasks = []
    for shard in shards:
        missing = [
            (layer, held.get(id, {}).get(shard))
            for id, layer in distinct.items()
            if not ledgers[id].get(str(shard), ids[id, shard], layer.features)
        ]
        if missing:
            tasks.append((model, images.store, images.files_of(shard), shard, images.range(shard), missing))
    made = set()
    try:
        label = f"{step.name}: features"
        for shard, written in run_tasks(workers, probes_tasks.gather, tasks, len(tasks), label, FORWARD_REMEDY):
            made.add(shard)
            for id, files in written.items():
                ledgers[id].record(str(shard), ids[id, shard], files)
    except NonFiniteError as error:
        raise error.told(step, images.image_ids()) from None
    files = {id: ledgers[id].files(map(str, shards)) | metadata_files(each.features) for id, each in distinct.items()}
    return made, files


def shard_id(images: Images, shard: int, scale: float, how: Mapping[str, Any]) -> str:
    """What the features of a shard were made from; the layer id, their store's name, says the rest."""
    return digest([VERSION, images.contents[shard], scale, how["features"], how["grid"]])


def network_accuracy(folder: Path, extracted: Manifest, images: Images, division: Division) -> float | None:
    """The network's own accuracy on the images that judge; None where its logits of them are not stored, or are not of
    their classes."""
    from pipeline.storage.store import Reader

    files = stage.below("logits.zarr", extracted.files)
    slots = division.slots("test")
    if not files or not set((slots // images.shard_images).tolist()) <= set(extracted.result["shards"]):
        return None
    logits = Reader(folder / "logits.zarr", files)["logits"]
    if logits.shape[1] != division.picks.shape[1]:
        return None
    right = 0
    for shard in np.unique(slots // images.shard_images):
        start, stop = images.range(int(shard))
        own = slots[(slots >= start) & (slots < stop)]
        right += int((logits[start:stop][own - start].argmax(1) == division.label[own]).sum())
    return right / len(slots)


# The probes -----------------------------------------------------------------------------------------------------------


def probe(
    plan: Plan,
    step: Step,
    workers: Any,
    images: Images,
    layers: Sequence[Layer],
    held: Mapping[str, Files],
    division: Division,
    attrs: Mapping[str, Any],
) -> Files:
    """Have every probe of every layer fitted and judged, where it is not yet; the files of probes.zarr."""
    from pipeline.stages.probes import results as probes_results
    from pipeline.storage.store import Ledger, create, metadata_files, remove_partials, write

    assert step.dataset is not None and step.network is not None
    how = step.settings["probes"]
    store = plan.results / step.dataset / step.network / "probes.zarr"
    shots = [*(str(k) for k in how["shots"]), probes_tasks.FULL]
    layout = probes_results.layout(len(layers), len(how["features"]), shots, how["draws"], how["grid"])
    create(store, layout, attrs)
    remove_partials(store)
    ledger = Ledger(store.with_suffix(".ledger"))
    ranges = {shard: images.range(shard) for shard in shards_of(images, how)}
    arrays = (division.part, division.label, division.picks)
    made_of = [VERSION, how, attrs["classes"], *(hashlib.blake2b(each.tobytes()).hexdigest() for each in arrays)]
    tasks, ids = [], {}
    for row, layer in enumerate(layers):
        for column, features in enumerate(how["features"]):
            key = f"{row}.{column}"
            files = held.get(layer.id, {})
            ids[key] = digest([*made_of, layer.id, features, files])
            if ledger.get(key, ids[key], store):
                continue
            one = Task(
                store, row, column, features, layer, files, ranges, division.part, division.label, division.picks,
                tuple(division.shots), tuple(how["shots"]), how["grid"], tuple(how["penalties"]), len(attrs["classes"]),
            )  # fmt: skip
            check_memory(plan.config.cluster, one.memory_need(division.counts), f"{step.name}: {layer.name}", REMEDY)
            tasks.append((one,))
    for key, files in run_tasks(workers, probes_tasks.probe, tasks, len(tasks), f"{step.name}: probes", REMEDY):
        ledger.record(key, ids[key], files)
    names = probes_results.names(layers, how["features"], shots, how["grid"])
    return ledger.files(ids) | write(store, names) | metadata_files(store)
