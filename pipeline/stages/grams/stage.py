"""The stage `grams`: minibatches of images through one network, of which only Gram matrices are kept.

Writes, for a network and data set that some comparison names,
    <network>/grams.zarr  gram (minibatch, layer, pair) float64, packed upper triangles of the Gram matrices of centred
                          features · image (minibatch, place) int64, their slots in images.zarr, -1 beyond a smaller
                          minibatch · layer, features (layer)
A few MB, from which every comparison with this network is made: when another network changes, this one is not asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import minibatches
from pipeline.data.minibatches import Batching
from pipeline.errors import MicrotomeError
from pipeline.networks.features import Arithmetic
from pipeline.plan import inspected
from pipeline.plan.cost import Cost, Store, rate_of
from pipeline.plan.counted import ingested
from pipeline.plan.job import Job
from pipeline.plan.stage import Draft, Stage, Wanted, require_layers
from pipeline.plan.step import Key
from pipeline.stages.grams.results import Kept
from pipeline.stages.grams.settings import Settings
from pipeline.stages.grams.tasks import GRAMS, entries_of, keep_grams, memory_need, prepare_layers, unreadable
from pipeline.stages.similarity.settings import SECTION, Similarity
from pipeline.storage.identity import digest
from pipeline.storage.manifest import within
from pipeline.storage.object_storage import size_of
from pipeline.workers.resumable import Parts
from pipeline.workers.tasks import run_tasks

VERSION = 2
CODE = (
    "kernels/images/grey.py",
    "kernels/images/whiten.py",
    "kernels/similarity/cka.py",
    "kernels/similarity/gram.py",
    "pipeline/data/minibatches.py",
    "pipeline/networks/build.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/features.py",
    "pipeline/networks/forward.py",
    "pipeline/networks/layer_id.py",
    "pipeline/networks/layers.py",
    "pipeline/networks/libraries",
    "pipeline/networks/positions.py",
    "pipeline/networks/prepare.py",
    "pipeline/networks/returned.py",
    "pipeline/stages/grams/results.py",
    "pipeline/stages/grams/settings.py",
    "pipeline/stages/grams/stage.py",
    "pipeline/stages/grams/tasks.py",
    "pipeline/stages/similarity/settings.py",
)
REMEDY = "lower `similarity.minibatch`"
GRAM = 1.15  # forwards that a forward with Gram matrices takes


def steps(draft: Draft) -> Iterator[Wanted]:
    asked: Similarity | None = draft.config.section(SECTION.key)
    if asked is None:
        return
    wanted: dict[Key, Wanted] = {}
    for name, comparison in asked.comparisons.items():
        data = asked.dataset_of(draft.config, name)
        for network in comparison.networks:
            settings = settings_of(draft, network, data, asked)
            summary = draft.summaries[data]
            summary.require(data, settings.split)
            count = min(summary.splits[settings.split], settings.images)
            minibatches.require(count, settings, f"similarity.{name}, split {settings.split!r} of {data!r}")
            parents = draft.step("ingest", data), draft.step("network", network=network)
            wanted[Key(data, network)] = Wanted(Key(data, network), settings, parents)
    yield from wanted.values()


def settings_of(draft: Draft, network: str, dataset: str, asked: Similarity) -> Settings:
    """Return what the id of a network's Gram matrices is made of; a copy has the layers of its network."""
    spec = draft.networks[network]
    layers = asked.layers.get(network) or asked.layers.get(asked.original(network)) or spec.layers
    require_layers(layers, network, SECTION.key)
    return Settings(
        layers=layers,
        features=asked.features,
        **spec.reading.settings,
        preprocessing=spec.preprocessing,
        numerics=Arithmetic.of(spec),
        split=asked.split or draft.config.datasets[dataset].examined_split,
        **{key: getattr(asked, key) for key in Batching.model_fields},
    )


def run(job: Job[Settings]) -> None:
    from pipeline.storage.store import Array, create, metadata_files, remove_partials, write

    job.begin()
    images, model, how = job.images, job.model, job.settings
    batches = minibatches.of_split(images, how.split, how, job.name)
    store = job.folder / "grams.zarr"
    with job.workers() as workers:
        asked = (model, images.size, how.layers, VERSION)
        (prepared,) = run_tasks(workers, prepare_layers, [asked], 1, f"{job.name}: layers")
        if why := next(unreadable(prepared.misplaced, how.features), None):
            raise MicrotomeError(f"{job.name}: {why}")
        size = max(len(batch.images) for batch in batches)
        entries = entries_of(prepared.layers, how.features)
        job.check_memory(memory_need(prepared.parameters, prepared.largest, size, len(entries), images.size), REMEDY)
        pixels = minibatches.pixel_digests(workers, images, batches, job.name)
        shape = (len(batches), len(entries), size * (size + 1) // 2)
        arrays = {
            "gram": Array(("minibatch", "layer", "pair"), shape, np.float64, (1, *shape[1:]), fill=np.nan),
            "image": Array(("minibatch", "place"), (len(batches), size), np.int64, (1, size), fill=-1),
            "epoch": Array(("minibatch",), (len(batches),), np.int64, (len(batches),)),
            "layer": Array(("layer",), (len(entries),), str, (len(entries),), fill=None),
            "features": Array(("layer",), (len(entries),), str, (len(entries),), fill=None),
        }
        create(store, arrays, how.batching)
        remove_partials(store)
        made_of = [VERSION, [[prepared.ids[each.info.name], each.features] for each in entries], size]
        parts = Parts(store, minibatches.ids_of(made_of, batches, pixels))

        def arguments(part: str, stores: list[str]) -> tuple[Any, ...]:
            batch = batches[int(part)]
            return model, minibatches.pixels_of(images, batch), part, batch, entries, size, store

        with job.finite(images):
            made = job.resumed(workers, keep_grams, {GRAMS: parts}, arguments, REMEDY)
    names: dict[str, tuple[tuple[int, ...], np.ndarray]] = {
        "layer": ((0,), np.array([each.info.name for each in entries], object)),
        "features": ((0,), np.array([each.features for each in entries], object)),
        "epoch": ((0,), np.array([batch.epoch for batch in batches])),
    }
    files = parts.files() | write(store, names)
    result = Kept(
        layers=[(each.info.name, each.features) for each in entries],
        minibatches=len(batches),
        images=digest([[pixels[slot] for slot in batch.images] for batch in batches]),
        count=len({slot for batch in batches for slot in batch.images}),
    )
    output = digest(files)
    job.finish(output, within("grams.zarr", files | metadata_files(store)), result, made=(len(made), len(batches)))


def pending(job: Job[Settings]) -> tuple[int, int]:
    """Count the minibatches that a run would put through the network at most, and all of them."""
    count = len(minibatches.of_split(job.images, job.settings.split, job.settings, job.name))
    return count, count


def made(job: Job) -> list[Path]:
    return [job.folder / "grams.zarr", job.folder / "grams.ledger"]


def requests(job: Job[Settings]) -> dict[str, Any]:
    """Return the layers that are compared, where they are others than those that are dissected."""
    layers = job.settings.layers
    return {"compare": layers} if layers != job.network_spec.layers else {}


def check(job: Job[Settings]) -> Iterator[str]:
    """Yield features that cannot be told of layers that are compared and not dissected."""
    for why in unreadable(inspected.found(job).misplaced, job.settings.features):
        yield f"network {job.network!r} on {job.dataset!r}: {why}"


def cost(job: Job[Settings], done: bool) -> Cost:
    how, found, speed = job.settings, inspected.found(job), inspected.speed(job)
    images = min(job.splits[how.split], how.images) * how.epochs
    layers = len(found.compared or found.layers) * len(how.features)
    minibatch = min(how.minibatch, images)
    tasks = max(1, images // minibatch)
    raw = 8.0 * tasks * layers * minibatch * (minibatch + 1) / 2
    store = Store("grams.zarr", raw, raw, raw if done else size_of(job.folder / "grams.zarr"))
    rate = speed.get("images_per_second")
    return Cost(
        (store,),
        images,
        tasks,
        GRAM * images / rate if rate else None,
        memory_need(found.parameters, found.largest, minibatch, layers, ingested(job)),
        rate_of(speed),
    )


STAGE = Stage(
    name="grams",
    version=VERSION,
    says="Gram matrices of {wildcards.network} on {wildcards.dataset}",
    place="pair",
    steps=steps,
    run=run,
    settings=Settings,
    code=CODE,
    requests=requests,
    check=check,
    cost=cost,
    pending=pending,
    counts="minibatches to put through the network",
    made=made,
)
