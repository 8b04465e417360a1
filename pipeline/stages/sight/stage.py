"""The stage `sight`: how a network looks at images. How far its layers and its attention reach, what its skip
connections pass on, and whether its last layer still knows where things are.

Writes, for a network and data set,
    <network>/sight-minibatches.zarr  what was measured of each minibatch
    <network>/sight.zarr              receptive_field (layer, y, x) · attention_distance (attention, head) ·
                                      skip_ratio, accuracy_loss (skip) · cka_without_skip (skip, layer) ·
                                      localisation (output, input); all with standard errors
    <network>/sight-receptive-fields.csv, sight-attention.csv, sight-skips.csv, sight-localisation.csv
Questions of Raghu et al., "Do vision transformers see like convolutional neural networks?" (NeurIPS 2021). See
docs/sight.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.networks import Reading
from pipeline.data import minibatches
from pipeline.networks.features import Arithmetic
from pipeline.networks.forward import platform_numerics
from pipeline.plan.cost import Cost
from pipeline.plan.job import Job
from pipeline.plan.stage import Draft, PageModule, Stage, Wanted, require_layers
from pipeline.plan.step import Key
from pipeline.stages.sight.results import TABLES, Looked
from pipeline.stages.sight.settings import SECTION, Settings, Sight
from pipeline.storage.identity import digest
from pipeline.storage.manifest import within, write_file
from pipeline.workers.resumable import Parts
from pipeline.workers.tasks import run_tasks

VERSION = 2
CODE = (
    "kernels/images/grey.py",
    "kernels/images/whiten.py",
    "kernels/locality/attention.py",
    "kernels/locality/localisation.py",
    "kernels/locality/receptive_field.py",
    "kernels/locality/skips.py",
    "kernels/similarity/cka.py",
    "kernels/similarity/gram.py",
    "pipeline/data/minibatches.py",
    "pipeline/networks/build.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/features.py",
    "pipeline/networks/forward.py",
    "pipeline/networks/graph/arithmetic.py",
    "pipeline/networks/graph/gradient_flow.py",
    "pipeline/networks/graph/operations.py",
    "pipeline/networks/layer_id.py",
    "pipeline/networks/layers.py",
    "pipeline/networks/libraries",
    "pipeline/networks/positions.py",
    "pipeline/networks/prepare.py",
    "pipeline/networks/returned.py",
    "pipeline/stages/sight/averages.py",
    "pipeline/stages/sight/results.py",
    "pipeline/stages/sight/settings.py",
    "pipeline/stages/sight/stage.py",
    "pipeline/stages/sight/tasks.py",
)
REMEDY = "lower `sight.minibatch` or `sight.gradients`"


def steps(draft: Draft) -> Iterator[Wanted]:
    asked: Sight = draft.config.section(SECTION.key)
    for data, name in draft.chosen(SECTION):
        settings, summary = settings_of(draft, name, data, asked), draft.summaries[data]
        summary.require(data, settings.split)
        count = summary.splits[settings.split]
        minibatches.require(count, settings.batching, f"sight, split {settings.split!r} of {data!r}")
        parents = draft.step("ingest", data), draft.step("network", network=name)
        yield Wanted(Key(data, name), settings, parents)


def settings_of(draft: Draft, network: str, dataset: str, asked: Sight) -> Settings:
    """Return what the id is made of; a control has the layers of its network."""
    spec = draft.networks[network]
    layers = asked.layers.get(network) or asked.layers.get(draft.originals.get(network, network)) or spec.layers
    require_layers(layers, network, SECTION.key)
    return Settings(
        layers=layers,
        measures=sorted(set(asked.measures)),
        images=asked.images,
        minibatch=asked.minibatch,
        gradients=asked.gradients,
        seed=asked.seed,
        split=asked.split or draft.config.datasets[dataset].examined_split,
        **spec.reading.settings,
        preprocessing=spec.preprocessing,
        numerics=Arithmetic.of(spec),
    )


def run(job: Job[Settings]) -> None:
    from pipeline.stages.sight import averages, tasks
    from pipeline.storage.store import StoreRef, create, metadata_files, remove_partials, write_whole

    job.begin()
    images, model, how = job.images, job.model, job.settings
    batches = minibatches.of_split(images, how.split, how.batching, job.name)
    folder = job.folder
    store = folder / "sight-minibatches.zarr"
    with job.workers() as workers:
        asked = (model, images.size, how.layers)
        (prepared,) = run_tasks(workers, tasks.prepare_seen, [asked], 1, f"{job.name}: layers")
        places = max(len(batch.images) for batch in batches)
        job.check_memory(tasks.memory_need(prepared, places, how.gradients, images.size), REMEDY)
        pixels = minibatches.pixel_digests(workers, images, batches, job.name)
        work = tasks.Work(model, images.size, prepared, tuple(how.measures), how.gradients, store, places)
        create(store, tasks.arrays(work, len(batches)), {})
        remove_partials(store)
        numerics = how.numerics.written() | platform_numerics(VERSION)
        names = [layer.name for layer in prepared.layers]
        network = [model.sha256, model.architecture, job.identity["preprocessing"], numerics, list(images.size)]
        read = {key: job.identity[key] for key in Reading.model_fields if key in job.identity}
        kept = [how.measures, how.gradients, read.pop("special_tokens"), names, places, *([read] if read else [])]
        parts = Parts(store, minibatches.ids_of([network, kept], batches, pixels))

        def arguments(part: str, stores: list[str]) -> tuple[Any, ...]:
            batch = batches[int(part)]
            return work, minibatches.pixels_of(images, batch), part, batch

        with job.finite(images):
            made = job.resumed(workers, tasks.look, {tasks.MINIBATCHES: parts}, arguments, REMEDY)
    own = parts.files() | metadata_files(store)
    found = averages.put_together(work, batches, images, StoreRef(store, own))
    attributes = found.attributes
    files = within(store.name, own)
    told = {"dataset": job.dataset, "network": job.network} | attributes.written()
    files |= within("sight.zarr", write_whole(folder / "sight.zarr", found.arrays, told))
    for name, table in found.tables.items():
        files |= write_file(folder, name, table)
    for name in set(TABLES) - set(found.tables):  # of an earlier run that measured more
        (folder / name).unlink(missing_ok=True)
    result = Looked(**{key: getattr(attributes, key) for key in Looked.model_fields})
    job.finish(digest(files), files, result, made=(len(made), len(batches)))


def pending(job: Job[Settings]) -> tuple[int, int]:
    """Count the minibatches that a run would put through the network at most, and all of them."""
    count = len(minibatches.of_split(job.images, job.settings.split, job.settings.batching, job.name))
    return count, count


def made(job: Job) -> list[Path]:
    names = ("sight.zarr", "sight-minibatches.zarr", "sight-minibatches.ledger")
    return [*(job.folder / name for name in names), *job.folder.glob("sight-*.csv")]


def requests(job: Job[Settings]) -> dict[str, Any]:
    """Return the layers that are looked at, where they are others than those that are dissected."""
    layers = job.settings.layers
    return {"look": layers} if layers != job.network_spec.layers else {}


def cost(job: Job[Settings], done: bool) -> Cost:
    """How often the images go through the network depends on its skips, which are found on the way."""
    how = job.settings
    images = min(job.splits[how.split], how.images)
    return Cost(images=images, tasks=max(1, -(-images // how.minibatch)))


STAGE = Stage(
    name="sight",
    version=VERSION,
    says="How {wildcards.network} looks at {wildcards.dataset}",
    place="pair",
    steps=steps,
    run=run,
    settings=Settings,
    code=CODE,
    section=SECTION,
    requests=requests,
    cost=cost,
    pending=pending,
    counts="minibatches to put through the network",
    made=made,
    pages=(PageModule("pipeline.stages.sight.page", 70),),
)
