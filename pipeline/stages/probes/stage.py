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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import MicrotomeError
from pipeline.networks.prepare import Prepared
from pipeline.plan.cost import Cost, Store
from pipeline.plan.counted import ingested
from pipeline.plan.inspected import found, speed
from pipeline.plan.job import Job
from pipeline.plan.stage import Draft, PageModule, Stage, Wanted, require_layers
from pipeline.plan.step import Key
from pipeline.stages.extract.results import Extracted, StoredLayer, logits
from pipeline.stages.probes import results
from pipeline.stages.probes.division import Division, divide, shards_of
from pipeline.stages.probes.results import Probed
from pipeline.stages.probes.settings import SECTION, Probes, Probing, Settings
from pipeline.stages.probes.tasks import (
    FULL,
    STORE,
    ProbedLayer,
    Task,
    forward_need,
    gather,
    prepare_layers,
    probe,
    vectors_of,
)
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Files, unnamed_stores, within, write_file
from pipeline.storage.object_storage import size_of
from pipeline.storage.store import Array, StoreRef, create, metadata_files, remove_partials, write
from pipeline.workers.resumable import Parts
from pipeline.workers.tasks import run_tasks

VERSION = 1
CODE = (
    "kernels/images/grey.py",
    "kernels/images/whiten.py",
    "kernels/ridge.py",
    "pipeline/networks/build.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/forward.py",
    "pipeline/networks/layers.py",
    "pipeline/networks/libraries",
    "pipeline/networks/positions.py",
    "pipeline/networks/prepare.py",
    "pipeline/networks/returned.py",
    "pipeline/stages/probes/division.py",
    "pipeline/stages/probes/results.py",
    "pipeline/stages/probes/settings.py",
    "pipeline/stages/probes/stage.py",
    "pipeline/stages/probes/tasks.py",
)
REMEDY = "lower `probes.images`, `probes.draws` or `probes.shots`"
FORWARD_REMEDY = "lower `shard_images` of the data set or `numerics.micro_batch` of the network"


def steps(draft: Draft) -> Iterator[Wanted]:
    section = draft.config.section(SECTION.key)
    for dataset, network in draft.chosen(SECTION, classes=True):
        require_layers(draft.networks[network].layers, network, SECTION.key)
        parents = (
            draft.step("ingest", dataset),
            draft.step("network", network=network),
            draft.step("extract", dataset, network),
        )
        yield Wanted(Key(dataset, network), settings_of(draft, section, dataset), parents)


def settings_of(draft: Draft, section: Probes, dataset: str) -> Settings:
    """Return what the id is made of; refuse splits that are not there."""
    summary, test = draft.summaries[dataset], section.test or draft.config.datasets[dataset].examined_split
    if section.choose == test:
        raise MicrotomeError(
            f"probes.choose, data set {dataset!r}: split {test!r} is judged on: name another, or leave `choose` out "
            f"for a share of `fit`"
        )
    for key, split in (("fit", section.fit), ("choose", section.choose), ("test", test)):
        if split is None:
            continue
        try:
            summary.require(dataset, split)
        except MicrotomeError as error:
            also = "; with `fit` as the split that is dissected, its images are divided" if key == "fit" else ""
            raise MicrotomeError(f"probes.{key}: {error}{also}") from None
    given = section.model_dump(exclude={"networks", "datasets"}) | {"test": test}
    given |= {"shots": sorted(section.shots), "penalties": sorted(section.penalties)}
    return Settings(probes=Probing(**given), classes=summary.classes)


def run(job: Job[Settings]) -> None:
    job.begin()
    images, probing = job.images, job.settings.probes
    division = divide(images, probing, job.name)
    with job.workers() as workers:
        stored = Extracted.of(job.parent("extract")).layers
        task = job.model, images.size, [layer.name for layer in stored]
        (prepared,) = run_tasks(workers, prepare_layers, [task], 1, f"{job.name}: layers")
        job.check_memory(forward_need(prepared, job.model.spec, images.shard_images, images.size), FORWARD_REMEDY)
        layers = layers_of(job, prepared, stored)
        gathered, features = gather_features(job, workers, layers)
        facts = Probed(
            counted=division.counts,
            network_accuracy=network_accuracy(job, division),
            notes=division.notes,
        )
        files = fit_probes(job, workers, layers, features, division, facts)
    store = job.folder / "probes.zarr"
    table = results.table(store, files)
    output = digest([files, table.decode()])
    files = within(store.name, files)
    for id, kept in features.items():
        files |= within(f"probe-features/{id}.zarr", kept)
    files |= write_file(job.folder, "probes.csv", table)
    job.finish(output, files, facts, made=(len(gathered), len(shards_of(images, probing))))


def made(job: Job) -> list[Path]:
    return [job.folder / name for name in ("probes.zarr", "probes.ledger", "probes.csv", "probe-features")]


def unreferenced(results: Path, used: set[Path]) -> Iterator[Path]:
    """Find features that no finished probes were fitted on, of layers or weights that were replaced."""
    for folder in sorted(results.glob("*/*/probe-features/")):
        yield from unnamed_stores(folder, "probes")


# The features ---------------------------------------------------------------------------------------------------------


def layers_of(job: Job[Settings], prepared: Prepared, stored: Sequence[StoredLayer]) -> list[ProbedLayer]:
    """Return the layers in execution order, as tasks name them."""
    probing = job.settings.probes
    infos = {info.name: info for info in prepared.layers}
    return [
        ProbedLayer(
            infos[layer.name],
            layer.id,
            layer.scale,
            features_of(job, layer.id),
            vectors_of(infos[layer.name], probing.features, probing.grid),
        )
        for layer in stored
    ]


def features_of(job: Job, layer: str) -> Path:
    """Return the store of the features of a layer, by its id."""
    return job.folder / "probe-features" / f"{layer}.zarr"


def feature_parts(job: Job[Settings], layer: str, scale: float) -> Parts:
    """Return the shards whose features are needed, with what they are made from.

    The layer's id, their store's name, says the rest.
    """
    images, probing = job.images, job.settings.probes
    kinds = probing.features, probing.grid
    ids = {str(shard): digest([VERSION, images.contents[shard], scale, *kinds]) for shard in shards_of(images, probing)}
    return Parts(features_of(job, layer), ids)


def pending(job: Job[Settings]) -> tuple[int, int]:
    """Count the shards that would be read, or put through the network, for features that are not kept."""
    layers = Extracted.of(job.parent("extract")).layers
    missing = {shard for layer in layers for shard in feature_parts(job, layer.id, layer.scale).missing()}
    return len(missing), len(shards_of(job.images, job.settings.probes))


def gather_features(
    job: Job[Settings], workers: Any, layers: Sequence[ProbedLayer]
) -> tuple[set[str], dict[str, Files]]:
    """Have the features of all images that count kept: the shards that were read now, and the files by layer id."""
    images, features = job.images, job.settings.probes.features
    distinct = {layer.id: layer for layer in layers if layer.vectors}
    if not distinct:
        raise MicrotomeError(
            f"{job.name}: none of its layers has a {' or a '.join(features)}: `pooled` every layer has; or "
            f"name other networks in `probes.networks`"
        )
    extracted = Extracted.of(job.parent("extract"))
    shards = set(extracted.shards)
    stored = {
        each.id: each.activations(job.results, job.dataset_folder)
        for each in extracted.layers
        if each.id in distinct and is_stored(each, distinct[each.id])
    }
    for layer in distinct.values():
        shape = (images.count, len(layer.vectors), layer.info.shape[0])
        feature = Array(("image", "vector", "unit"), shape, np.float32, (images.shard_images, *shape[1:]), fill=np.nan)
        create(layer.features, {"feature": feature}, {"vectors": [vector.name for vector in layer.vectors]})
        remove_partials(layer.features)
    parts = {id: feature_parts(job, id, layer.scale) for id, layer in distinct.items()}

    def arguments(part: str, missing: list[str]) -> tuple:
        shard = int(part)
        sources = {
            id: stored[id].of(distinct[id].arrays, [shard]) if id in stored and shard in shards else None
            for id in missing
        }
        pixels = StoreRef(images.store, images.files_of(shard))
        return job.model, pixels, part, images.range(shard), [(distinct[id], ref) for id, ref in sources.items()]

    with job.finite(images):
        gathered = job.resumed(workers, gather, parts, arguments, FORWARD_REMEDY, "features")
    return gathered, {id: own.files() | metadata_files(distinct[id].features) for id, own in parts.items()}


def is_stored(stored: StoredLayer, layer: ProbedLayer) -> bool:
    """Whether what a layer's features are made from is stored: single positions are read off its maps."""
    return stored.store is None or "activation" not in layer.arrays


def network_accuracy(job: Job, division: Division) -> float | None:
    """Return the network's own accuracy on the images that judge.

    None where its logits of them are not stored, or are not of their classes.
    """
    images, extraction = job.images, job.parent("extract")
    heads, slots = logits(job.folder, extraction), division.slots("test")
    shards = np.unique(slots // images.shard_images).tolist()
    if not heads.files or not set(shards) <= set(Extracted.of(extraction).shards):
        return None
    values = heads.open()["logits"]
    if values.shape[1] != division.picks.shape[1]:
        return None
    right = 0
    for shard in shards:
        start, stop = images.range(shard)
        own = slots[(slots >= start) & (slots < stop)]
        right += int((values[start:stop][own - start].argmax(1) == division.label[own]).sum())
    return right / len(slots)


# The probes -----------------------------------------------------------------------------------------------------------


def fit_probes(
    job: Job[Settings],
    workers: Any,
    layers: Sequence[ProbedLayer],
    features: Mapping[str, Files],
    division: Division,
    facts: Probed,
) -> Files:
    """Have every probe of every layer fitted and judged, where it is not yet; return the files of probes.zarr."""
    images, probing = job.images, job.settings.probes
    store = job.folder / "probes.zarr"
    shots = [*map(str, probing.shots), FULL]
    layout = results.layout(len(layers), len(probing.features), shots, probing.draws, probing.grid)
    create(store, layout, probing.fitting.written() | {"classes": images.classes} | facts.written())
    remove_partials(store)
    arrays = (division.part, division.label, division.picks)
    contents = [hashlib.blake2b(each.tobytes()).hexdigest() for each in arrays]
    made_of = [VERSION, probing.written(), images.classes, *contents]
    ranges = {shard: images.range(shard) for shard in shards_of(images, probing)}
    tasks, ids = {}, {}
    for row, layer in enumerate(layers):
        files = features.get(layer.id, {})
        for column, kind in enumerate(probing.features):
            task = Task(
                store,
                row,
                column,
                kind,
                layer,
                StoreRef(layer.features, files),
                ranges,
                *arrays,
                tuple(division.shots),
                tuple(probing.shots),
                probing.grid,
                tuple(probing.penalties),
                len(images.classes),
            )
            tasks[task.key], ids[task.key] = task, digest([*made_of, layer.id, kind, files])
    parts = Parts(store, ids)
    for part in parts.missing():
        task = tasks[part]
        job.check_memory(task.memory_need(division.counts), REMEDY, f"{job.name}: {task.layer.name}")
    job.resumed(workers, probe, {STORE: parts}, lambda part, _: (tasks[part],), REMEDY, "probes")
    names = results.names(layers, probing.features, shots, probing.grid)
    return parts.files() | write(store, names) | metadata_files(store)


def cost(job: Job[Settings], done: bool) -> Cost:
    """Features of images that are not extracted take a forward; those of others are read."""
    probing, dataset, size = job.settings.probes, job.dataset_spec, ingested(job)
    counts = {split: min(job.splits[split], probing.images or job.splits[split]) for split in probing.splits}
    images, computed = sum(counts.values()), sum(counts.values()) - counts.get(dataset.examined_split, 0)
    inspected = found(job)
    vectors = sum(info.shape[0] * len(vectors_of(info, probing.features, probing.grid)) for info in inspected.layers)
    name, raw = "probe-features", 4.0 * images * vectors
    there = raw if done else size_of(job.folder / name)
    prepared = Prepared(inspected.layers, inspected.parameters, inspected.largest)
    rate = speed(job).get("images_per_second")
    return Cost(
        stores=(Store(name, raw, raw, there),),
        images=images,
        tasks=-(-images // dataset.shard_images),
        seconds=computed / rate if rate else None,
        memory=forward_need(prepared, job.network_spec, dataset.shard_images, size),
        rate=f"{rate:.3g}" if rate else "",
    )


STAGE = Stage(
    name="probes",
    version=VERSION,
    code=CODE,
    says="Probe the layers of {wildcards.network} on {wildcards.dataset}",
    place="pair",
    section=SECTION,
    settings=Settings,
    steps=steps,
    run=run,
    cost=cost,
    pending=pending,
    counts="shards of features to keep",
    made=made,
    unreferenced=unreferenced,
    pages=(PageModule("pipeline.stages.probes.page", 50),),
)
