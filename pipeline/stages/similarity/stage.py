"""The stage `similarity`: how alike layers are, within networks and between them, from their Gram matrices.

Writes, for each comparison of the configuration,
    similarity/<name>/cka.zarr  cka, standard_error, influence, most_influential, cka_biased, neighbours, procrustes and
                                others (layer_a, layer_b) · hsic (minibatch, layer_a, layer_b)
    similarity/<name>/cka.csv   the same, a row for each pair of layers
No network is asked: what is read is what the stage `grams` kept of each. See docs/similarity.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import MicrotomeError
from pipeline.plan.job import Job
from pipeline.plan.stage import Copy, Draft, PageModule, Stage, Wanted
from pipeline.plan.step import Key
from pipeline.stages.grams.results import Kept, gram_matrices
from pipeline.stages.similarity.averages import COLUMNS, Grams, arrays, facts, plain, put_together, rows
from pipeline.stages.similarity.settings import SECTION, Settings, Similarity
from pipeline.stages.similarity.tasks import compare
from pipeline.storage.identity import digest
from pipeline.storage.manifest import within, write_file
from pipeline.storage.tables import csv_bytes
from pipeline.workers.tasks import run_tasks

VERSION = 1
CODE = (
    "kernels/similarity/alignment.py",
    "kernels/similarity/cka.py",
    "pipeline/data/minibatches.py",
    "pipeline/stages/grams/results.py",
    "pipeline/stages/similarity/averages.py",
    "pipeline/stages/similarity/results.py",
    "pipeline/stages/similarity/settings.py",
    "pipeline/stages/similarity/stage.py",
    "pipeline/stages/similarity/tasks.py",
)


def networks(draft: Draft) -> dict[str, Copy]:
    """Return the copies of networks that are trained on parts of the images."""
    asked: Similarity | None = draft.config.section(SECTION.key)
    if asked is None:
        return {}
    copies = asked.trained_on_parts(draft.config.networks)
    return {name: Copy(spec, asked.original(name)) for name, spec in copies.items()}


def steps(draft: Draft) -> Iterator[Wanted]:
    asked: Similarity | None = draft.config.section(SECTION.key)
    if asked is None:
        return
    for name, comparison in asked.comparisons.items():
        data = asked.dataset_of(draft.config, name)
        copied = {"fractions": asked.data_fraction[name].copies} if name in asked.data_fraction else {}
        settings = Settings(
            networks=comparison.networks, neighbours=asked.neighbours, procrustes=asked.procrustes, **copied
        )
        parents = tuple(draft.step("grams", data, network) for network in comparison.networks)
        yield Wanted(Key(dataset=data, experiment=name), settings, parents)


def run(job: Job[Settings]) -> None:
    from pipeline.storage.store import write_whole

    job.begin()
    how = job.settings
    parents, manifests = job.parents, [parent.read() for parent in job.parents]
    kept = [Kept.of(manifest) for manifest in manifests]
    check_images(job, kept)
    compared = [
        Grams(parent.network, gram_matrices(parent.folder, manifest), own.layers)
        for parent, manifest, own in zip(parents, manifests, kept, strict=True)
    ]
    count, first = kept[0].minibatches, parents[0].settings
    tasks = [
        ([one.store.of(("gram", "image"), [number]) for one in compared], number, how.neighbours, how.procrustes)
        for number in range(count)
    ]
    with job.workers() as workers:
        measured = sorted(run_tasks(workers, compare, tasks, count, job.name), key=lambda one: one.number)
    found = put_together(compared, measured, first, how)
    attributes: dict[str, Any] = {
        **first.batching,
        "minibatches": count,
        "counted": kept[0].count,
        **job.identity,
        "dataset": job.dataset,
        "neighbours_chance": plain(found.neighbours_chance),
        "estimator": "unbiased",
    }
    files = within("cka.zarr", write_whole(job.folder / "cka.zarr", arrays(found), attributes))
    files |= write_file(job.folder, "cka.csv", csv_bytes(COLUMNS, rows(found)))
    job.finish(digest(files), files, facts(found, job.dataset, how.networks))


def made(job: Job) -> list[Path]:
    return [job.folder / "cka.zarr", job.folder / "cka.csv"]


def check_images(job: Job, kept: Sequence[Kept]) -> None:
    """Refuse networks whose minibatches are not of the same images, in the same order."""
    first, *_ = job.parents
    for parent, own in zip(job.parents, kept, strict=True):
        if own.images != kept[0].images:
            raise MicrotomeError(
                f"{job.name}: the layers of {parent.network} and {first.network} are of different images; "
                f"`make recompute STAGE=grams` recomputes them"
            )


STAGE = Stage(
    name="similarity",
    version=VERSION,
    says="Similarity of the layers of {wildcards.experiment}",
    place="comparison",
    folder="similarity",
    steps=steps,
    run=run,
    settings=Settings,
    code=CODE,
    section=SECTION,
    networks=networks,
    explains="compared from the Gram matrices, without a forward pass",
    made=made,
    pages=(PageModule("pipeline.stages.similarity.page", 60),),
)
