"""The stage `randomize`: how easily networks fit noise. Each run is a training on true or on corrupted data.

Writes, for each experiment of the configuration,
    randomization/<name>/runs.csv           one row a run: what it was, and what came out
    randomization/<name>/curves.zarr        train_loss, train_accuracy, test_accuracy, test_loss, test_ece, seconds
                                            (run, epoch) · label (run, image): what was trained on
    randomization/<name>/runs/<id>/         weights and facts of each run
    randomization/<name>/expressivity.json  a network that is written down, not trained: its weights, its largest error,
                                            and the lemma's eigenvalue. In no digest; nor is seconds.json beside it
A run is known by its own settings and data: another line of the configuration trains its own run and no other.
See docs/randomization.md; after Zhang et al., "Understanding deep learning requires rethinking generalization" (2017).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.config.networks import NetworkSpec
from pipeline.data.images import Images
from pipeline.data.kinds import Summary
from pipeline.errors import MicrotomeError
from pipeline.networks.identity import architecture
from pipeline.plan.inspected import Question, inspected
from pipeline.plan.job import Job
from pipeline.plan.stage import Draft, PageModule, Stage, Wanted
from pipeline.plan.step import Key
from pipeline.stages.randomize.results import Runs
from pipeline.stages.randomize.runs import EXPRESSIVITY, SECONDS, Data, Run
from pipeline.stages.randomize.settings import SECTION, Randomize, RunSettings, Settings
from pipeline.storage.identity import FileDigests, digest
from pipeline.storage.manifest import Manifest, within
from pipeline.workers.resumable import Parts
from pipeline.workers.tasks import run_tasks

VERSION = 2
CODE = (
    "kernels/calibration/reliability.py",
    "kernels/expressivity.py",
    "kernels/images/corruption.py",
    "kernels/images/whiten.py",
    "pipeline/networks/build.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/libraries",
    "pipeline/networks/returned.py",
    "pipeline/networks/training/repeatable.py",
    "pipeline/stages/randomize/expressivity.py",
    "pipeline/stages/randomize/outcomes.py",
    "pipeline/stages/randomize/results.py",
    "pipeline/stages/randomize/runs.py",
    "pipeline/stages/randomize/settings.py",
    "pipeline/stages/randomize/stage.py",
    "pipeline/stages/randomize/tasks.py",
    "pipeline/stages/randomize/training.py",
)
REMEDY = "lower `batch_size`, `images` or `test_images` of the experiment"
WORKING = 400 << 20  # bytes of a run beside its images: weights, gradients, momentum, a minibatch in the network


def steps(draft: Draft) -> Iterator[Wanted]:
    asked: dict[str, Randomize] = draft.config.section(SECTION.key)
    for name, experiment in asked.items():
        summary = draft.summaries[experiment.dataset]
        refuse(name, experiment, summary)
        settings = settings_of(experiment, summary, draft.digests)
        parents = (draft.step("ingest", experiment.dataset),)
        yield Wanted(Key(dataset=experiment.dataset, experiment=name), settings, parents)


def settings_of(asked: Randomize, summary: Summary, digests: FileDigests) -> Settings:
    """Return what the id of an experiment is made of beside the images."""
    networks = {name: architecture(spec, digests) for name, spec in asked.networks.items()}
    runs = {
        name: RunSettings(
            **asked.hyperparameters(name).written(),
            corruption=run.corruption,
            share=run.share,
            seed=run.seed,
            network=networks[run.network],
        )
        for name, run in asked.runs.items()
    }
    return Settings(
        split=asked.split,
        test=asked.test,
        images=asked.images,
        test_images=asked.test_images,
        crop=asked.crop,
        classes=summary.classes,
        runs=runs,
    )


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
        if asked.hyperparameters(each).random_crop and asked.crop == height == width:
            raise MicrotomeError(
                f"{who}.runs.{each}: images of {height} x {width} leave no room for a random crop of {asked.crop}: "
                "lower `crop`, or give the data set larger images"
            )


def run(job: Job[Settings]) -> None:
    from pipeline.stages.randomize import outcomes
    from pipeline.stages.randomize.tasks import express, train_runs
    from pipeline.storage.store import remove_partials

    job.begin()
    images, folder = job.images, job.folder
    data = data_of(images, job)
    runs = runs_of(job, data, folder)
    job.refers_to([run.folder for run in runs.values()])
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    remove_partials(folder)
    by_id = {run.id: run for run in runs.values()}
    parts = Parts(folder / "runs", {id: id for id in by_id})
    missing = [by_id[id] for id in parts.missing()]
    together = job.section[job.experiment].together if job.cluster.kind == "gpu" else 1
    tasks = [(data, missing[at : at + together]) for at in range(0, len(missing), together)]
    pixels = 3 * images.size[0] * images.size[1] * (len(data.rows) + len(data.test_rows))
    job.check_memory((3 * pixels + WORKING) * together, REMEDY)
    with job.workers() as workers:
        for finished in run_tasks(workers, train_runs, tasks, len(tasks), job.name, REMEDY):
            for id, files in finished:
                parts.record(id, files)
        asked = (data, job.settings.crop, folder)
        (expressed,) = run_tasks(workers, express, [asked], 1, f"{job.name}: expressivity", REMEDY)
    for one in runs.values():
        (one.folder / "checkpoint.pt").unlink(missing_ok=True)
    entries = parts.entries()
    found = {name: outcomes.Outcome.read(one, entries[one.id]["files"]) for name, one in runs.items()}
    files = outcomes.write(folder, found, data, {**job.identity, "dataset": job.dataset})
    files |= within("runs", parts.files())
    result = Runs(
        dataset=job.dataset,
        runs={name: one.told() for name, one in found.items()},
        images=len(data.rows),
        test_images=len(data.test_rows),
    )
    job.finish(outcomes.output(files), files | expressed, result, made=(len(missing), len(by_id)))


def data_of(images: Images, job: Job[Settings]) -> Data:
    """Return the images that are trained and tested on: the first of their splits that have a class."""
    from pipeline.storage.store import StoreRef

    how = job.settings
    label = np.asarray(images.reader()["label"][:]).astype(np.int64)
    rows, test_rows = (
        np.flatnonzero(images.counted(split) & (label >= 0))[:limit]
        for split, limit in ((how.split, how.images), (how.test, how.test_images))
    )
    if len(np.unique(label[rows])) < 2 or not len(test_rows):
        raise MicrotomeError(
            f"{job.name}: {len(rows)} images with a class in split {how.split!r}, of "
            f"{len(np.unique(label[rows]))} classes, and {len(test_rows)} in {how.test!r}: runs need two classes "
            "or more to train on, and images to test on"
        )
    shards = sorted({int(row) // images.shard_images for row in (*rows, *test_rows)})
    labels, test_labels = label[rows], label[test_rows]
    made_of = [images.contents[shard] for shard in shards]
    id = digest([made_of, *(each.tolist() for each in (rows, labels, test_rows, test_labels))])
    store = StoreRef(images.store, images.files).of(("image",), shards)
    return Data(id, store, how.classes, rows, labels, test_rows, test_labels)


def runs_of(job: Job[Settings], data: Data, folder: Path) -> dict[str, Run]:
    """Return the runs by name, each with its id."""
    asked, crop, classes = job.section[job.experiment], job.settings.crop, job.settings.classes
    found = {}
    for name, own in job.settings.runs.items():
        id = digest([VERSION, own.written(), crop, classes, data.id])
        spec = NetworkSpec.of(asked.networks[asked.runs[name].network])
        found[name] = Run(id, name, spec, own.how(crop), folder / "runs" / id, asked.checkpoint_seconds)
    return found


def made(job: Job) -> list[Path]:
    names = ("runs", "runs.ledger", "runs.csv", "curves.zarr", EXPRESSIVITY, SECONDS)
    return [job.folder / name for name in names]


def questions(job: Job) -> list[Question]:
    """Return what the inspection is asked about the networks that runs train, each once."""
    asked: Randomize = job.section[job.experiment]
    found = {}
    for name, run in asked.runs.items():
        request = {
            "classifier": NetworkSpec.of(asked.networks[run.network]).model_dump(),
            "input_shape": [3, asked.crop, asked.crop],
        }
        kept = inspected(job.scratch, [job.identity["runs"][name]["network"], request])
        found[kept] = Question(f"network {run.network!r} of randomize.{job.experiment}", kept, request)
    return list(found.values())


def check(job: Job[Settings]) -> Iterator[str]:
    """Say which networks give too few logits for the images' classes."""
    wanted = job.settings.classes
    for question in questions(job):
        given = question.answer["classes"]
        if given is None or given < wanted:
            yield (
                f"{question.name}: it gives {given or 'no'} logits, and the images have {wanted} classes: "
                "build it with as many, by `arguments`"
            )


def owned(manifest: Manifest, path: Path) -> set[Path]:
    """Return the folders of the runs of an experiment."""
    # By key: manifests of version 1 lack some of what `Runs` reads.
    return {path.parent.parent / "runs" / run["id"] for run in manifest.result["runs"].values()}


def unreferenced(results: Path, used: set[Path]) -> Iterator[Path]:
    """Yield the folders of runs that no experiment has."""
    return (folder for folder in sorted(results.glob("randomization/*/runs/*/")) if folder not in used)


STAGE = Stage(
    name="randomize",
    version=VERSION,
    says="Runs of {wildcards.experiment}",
    place="comparison",
    folder="randomization",
    steps=steps,
    run=run,
    settings=Settings,
    code=CODE,
    section=SECTION,
    questions=questions,
    check=check,
    explains="only runs whose configuration or images changed are trained",
    made=made,
    owned=owned,
    unreferenced=unreferenced,
    pages=(PageModule("pipeline.stages.randomize.page", 80),),
    priority=1,  # long, and networks may wait for the weights of a run
)
