"""The stage `randomize`: how easily networks fit noise. Each run is a training on true or on corrupted data.

Writes, for each experiment of the configuration,
    randomization/<name>/runs.csv     one row a run: what it was, and what came out
    randomization/<name>/curves.zarr  train_loss, train_accuracy, test_accuracy, test_loss, test_ece, seconds
                                      (run, epoch) · label (run, image): what was trained on
    randomization/<name>/runs/<id>/   weights and facts of each run
A run is known by its own settings and data: another line of the configuration trains its own run and no other.
See docs/randomization.md; after Zhang et al., "Understanding deep learning requires rethinking generalization" (2017).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.networks import NetworkSpec
from pipeline.errors import MicrotomeError
from pipeline.plan import job as stage
from pipeline.plan.inspected import _classifiers
from pipeline.plan.job import Job
from pipeline.stages.randomize.settings import Randomize
from pipeline.storage import manifest
from pipeline.storage.identity import FileDigests, digest
from pipeline.workers.client import client
from pipeline.workers.memory import check_memory
from pipeline.workers.tasks import run_tasks

if TYPE_CHECKING:
    from pipeline.data.images import Images
    from pipeline.data.kinds import Summary
    from pipeline.plan.job import Job
    from pipeline.stages.randomize.tasks import Data, Run

VERSION = 2
CODE = (
    "kernels/calibration/reliability.py",
    "kernels/images/corruption.py",
    "kernels/images/whiten.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/libraries",
    "pipeline/networks/build.py",
    "pipeline/stages/randomize/stage.py",
    "pipeline/stages/randomize/results.py",
    "pipeline/stages/randomize/tasks.py",
    "pipeline/stages/randomize/training.py",
    "pipeline/networks/training/repeatable.py",
)
REMEDY = "lower `batch_size`, `images` or `test_images` of the experiment"
WORKING = 400 << 20  # bytes of a run beside its images: weights, gradients, momentum, a minibatch in the network


def settings(name: str, asked: Randomize, found: Summary, digests: FileDigests) -> dict[str, Any]:
    """What the id is made of beside the parents; what cannot be trained is refused here."""
    from pipeline.networks.identity import architecture

    refuse(name, asked, found)
    networks = {each: architecture(spec, digests) for each, spec in asked.networks.items()}
    return {
        "split": asked.split,
        "test": asked.test,
        "images": asked.images,
        "test_images": asked.test_images,
        "crop": asked.crop,
        "classes": found.classes,
        "runs": {
            each: asked.fitting(each)
            | {"corruption": run.corruption, "share": run.share, "seed": run.seed, "network": networks[run.network]}
            for each, run in asked.runs.items()
        },
    }


def refuse(name: str, asked: Randomize, found: Summary) -> None:
    """Refuse data that no run of an experiment can be trained on."""
    who = f"randomize.{name}"
    for split in (asked.split, asked.test):
        found.require(asked.dataset, split)
    if found.classes < 2:
        raise MicrotomeError(
            f"{who}: a classifier needs images of two classes or more, and data set {asked.dataset!r} has "
            f"{found.classes}: give it `labels`, or name another"
        )
    count = min(found.splits[asked.split], asked.images or found.splits[asked.split])
    if count < found.classes:
        raise MicrotomeError(
            f"{who}: {count} images of split {asked.split!r} and {found.classes} classes: at least one image a class "
            "is needed; raise `images`"
        )
    height, width = found.settings["size"]
    if asked.crop > min(height, width):
        raise MicrotomeError(f"{who}: crop: {asked.crop} is larger than the images of {height} x {width}")
    for each in asked.runs:
        if asked.fitting(each)["random_crop"] and asked.crop == height == width:
            raise MicrotomeError(
                f"{who}.runs.{each}: images of {height} x {width} leave no room for a random crop of {asked.crop}: "
                "lower `crop`, or give the data set larger images"
            )


def run(job: Job) -> None:
    from pipeline.data.images import Images
    from pipeline.stages.randomize import results as results
    from pipeline.stages.randomize.tasks import train_runs
    from pipeline.storage.store import Ledger, remove_partials

    job.begin()
    images = job.images
    data = data_of(images, step)
    folder = job.folder
    runs = runs_of(job, data, folder)
    job.refers_to([run.folder for run in runs.values()])
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    remove_partials(folder)
    ledger = Ledger(folder / "runs.ledger")
    by_id = {run.id: run for run in runs.values()}
    missing = [run for id, run in by_id.items() if not ledger.get(id, id, folder / "runs")]
    together = job.config.randomize[job.experiment].together if job.cluster.kind == "gpu" else 1
    tasks = [(data, missing[at : at + together]) for at in range(0, len(missing), together)]
    if tasks:
        pixels = 3 * images.size[0] * images.size[1] * (len(data.rows) + len(data.test_rows))
        check_memory(job.cluster, (3 * pixels + WORKING) * together, job.name, REMEDY)
        with job.workers() as workers:
            for finished in run_tasks(workers, train_runs, tasks, len(tasks), job.name, REMEDY):
                for id, files in finished:
                    ledger.record(id, id, files)
    for one in runs.values():
        (one.folder / "checkpoint.pt").unlink(missing_ok=True)
    found = {name: results.Outcome.read(one, ledger.entries[one.id]["files"]) for name, one in runs.items()}
    own = {**job.settings, "dataset": job.dataset}
    files = results.write(folder, found, data, own)
    files |= manifest.within("runs", ledger.files(by_id))
    told = {name: one.told() for name, one in found.items()}
    facts = {"dataset": job.dataset, "runs": told, "images": len(data.rows), "test_images": len(data.test_rows)}
    job.finish(results.output(files), files, facts, made=(len(missing), len(by_id)))


def data_of(images: Images, job: Job) -> Data:
    """The images that are trained and tested on: the first of their splits that have a class."""
    from pipeline.stages.randomize.tasks import Data

    how = job.settings
    label = np.asarray(images.reader()["label"][:]).astype(np.int64)
    rows, test_rows = (
        np.flatnonzero(images.counted(how[split]) & (label >= 0))[: how[limit]]
        for split, limit in (("split", "images"), ("test", "test_images"))
    )
    if len(np.unique(label[rows])) < 2 or not len(test_rows):
        raise MicrotomeError(
            f"{job.name}: {len(rows)} images with a class in split {how['split']!r}, of "
            f"{len(np.unique(label[rows]))} classes, and {len(test_rows)} in {how['test']!r}: runs need two classes "
            "or more to train on, and images to test on"
        )
    shards = sorted({int(row) // images.shard_images for row in (*rows, *test_rows)})
    labels, test_labels = label[rows], label[test_rows]
    made_of = [images.contents[shard] for shard in shards]
    id = digest([made_of, *(each.tolist() for each in (rows, labels, test_rows, test_labels))])
    return Data(id, images.store, images.files, how["classes"], rows, labels, test_rows, test_labels)


def runs_of(job: Job, data: Data, folder: Path) -> dict[str, Run]:
    """The runs by name, each with its id."""
    from pipeline.stages.randomize.tasks import Run

    asked = job.config.randomize[job.experiment]
    found = {}
    for name, how in job.settings["runs"].items():
        id = digest([VERSION, how, job.settings["crop"], job.settings["classes"], data.id])
        spec = NetworkSpec.of(asked.networks[asked.runs[name].network])
        settings = {key: value for key, value in how.items() if key != "network"} | {"crop": job.settings["crop"]}
        found[name] = Run(id, name, spec, settings, folder / "runs" / id, asked.checkpoint_seconds)
    return found


def discard(job: Job) -> list[Path]:
    """The files and folders that this step made."""
    folder = job.folder
    return [folder / name for name in ("runs", "runs.ledger", "runs.csv", "curves.zarr")]


def _logits(job: Job) -> Iterator[str]:
    """What is wrong with the logits of networks that runs are to train."""
    wanted = job.settings["classes"]
    for question in _classifiers(job):
        given = json.loads(question.kept.read_text())["classes"]
        if given is None or given < wanted:
            yield (
                f"{question.name}: it gives {given or 'no'} logits, and the images have {wanted} classes: "
                "build it with as many, by `arguments`"
            )
