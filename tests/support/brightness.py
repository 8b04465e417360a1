"""A small stage in one file: the mean brightness of every image. docs/adding-a-stage.md follows it.

Writes brightness.zarr, brightness (image) float32: mean over channels and pixels, from 0 to 1; NaN where an image does
not count. In one file here; a real stage is a package, `pipeline/stages/brightness/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import Field

from pipeline.config.section import Chosen
from pipeline.plan.cost import Cost, Store
from pipeline.plan.job import Job
from pipeline.plan.stage import Draft, Stage, Wanted
from pipeline.plan.step import Key
from pipeline.storage.identity import digest
from pipeline.storage.manifest import within
from pipeline.storage.record import Record
from pipeline.storage.store import StoreRef
from pipeline.workers.resumable import Done, Parts

VERSION = 1
CODE = ("tests/support/brightness.py",)  # of a real stage: its settings.py, results.py, stage.py, tasks.py and kernels


# settings.py


class Brightness(Chosen):
    """How bright images are."""

    channel: int | None = Field(None, ge=0, le=2, description="one channel alone; default: the mean of all")


SECTION = Brightness.section("brightness", "with this section, the brightness of images is measured")


class Settings(Record):
    """What the id is made of: the images, and what is measured of them."""

    split: str
    channel: int | None


# results.py


class Measured(Record):
    """What the manifest says: shards with images that count."""

    shards: list[int]


# stage.py


def steps(draft: Draft) -> Iterator[Wanted]:
    section: Brightness | None = draft.config.section(SECTION.key)
    for name, dataset in draft.config.datasets.items():
        if section is not None and section.applies("", name):
            settings = Settings(split=dataset.dissect.split, channel=section.channel)
            yield Wanted(Key(dataset=name), settings, (draft.step("ingest", name),))


def run(job: Job[Settings]) -> None:
    from pipeline.storage.store import Array, create, metadata_files, remove_partials

    job.begin()
    images, parts = job.images, parts_of(job)
    store, step = parts.store, (images.shard_images,)
    create(store, {"brightness": Array(("image",), (images.count,), np.float32, step, fill=np.nan)}, {})
    remove_partials(store)

    def arguments(shard: str, _: list[str]) -> tuple:
        pixels, bounds = StoreRef(images.store, images.files_of(int(shard))), images.range(int(shard))
        return store, pixels, shard, bounds, job.settings.channel

    job.check_memory(12 * images.shard_images * images.size[0] * images.size[1], "lower `shard_images`")
    with job.workers() as workers:
        new = job.resumed(workers, measure_shard, {"": parts}, arguments, "lower `shard_images`")
    files = parts.files()
    described = within(store.name, files | metadata_files(store))
    result = Measured(shards=[int(shard) for shard in parts.ids])
    job.finish(digest(files), described, result, made=(len(new), len(parts.ids)))


def parts_of(job: Job[Settings]) -> Parts:
    """Return the shards with images that count, each with the id of what it is made from."""
    images, channel = job.images, job.settings.channel
    shards = images.shards(job.settings.split)
    ids = {str(shard): digest([VERSION, images.contents[shard], channel]) for shard in shards}
    return Parts(job.folder / "brightness.zarr", ids)


def pending(job: Job[Settings]) -> tuple[int, int]:
    """Count the shards that a run would measure now, and all of them."""
    parts = parts_of(job)
    return len(parts.missing()), len(parts.ids)


def made(job: Job) -> list[Path]:
    return [job.folder / "brightness.zarr", job.folder / "brightness.ledger"]


def cost(job: Job[Settings], done: bool) -> Cost:
    images = job.splits[job.settings.split]
    size = 4.0 * images
    tasks = -(-images // job.dataset_spec.shard_images)
    return Cost((Store("brightness.zarr", size, size, size if done else 0.0),), images, tasks, 1e-4 * images, 1 << 20)


# tasks.py


def measure_shard(store: Path, images: StoreRef, shard: str, bounds: tuple[int, int], channel: int | None) -> Done:
    """Measure and write one shard, on a worker."""
    from pipeline.storage.store import write

    start, stop = bounds
    pixels = images.open()["image"][start:stop]
    chosen = pixels if channel is None else pixels[:, channel : channel + 1]
    brightness = chosen.mean((1, 2, 3), dtype=np.float64).astype(np.float32) / np.float32(255)
    return Done(shard, {"": write(store, {"brightness": ((start,), brightness)})})


STAGE = Stage(
    name="brightness",
    version=VERSION,
    says="Brightness of {wildcards.dataset}",
    place="dataset",
    steps=steps,
    run=run,
    settings=Settings,
    code=CODE,
    section=SECTION,
    cost=cost,
    pending=pending,
    counts="shards to measure",
    made=made,
)
