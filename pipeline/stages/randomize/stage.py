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

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.core import Randomize
from pipeline.errors import MicrotomeError
from pipeline.networks.build import NetworkSpec
from pipeline.plan import job as stage
from pipeline.storage.identity import FileDigests, digest
from pipeline.workers.pool import check_memory, client, run_tasks

if TYPE_CHECKING:
    from pipeline.data.images import Images
    from pipeline.data.kinds import Summary
    from pipeline.plan.step import Plan, Step
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
    from pipeline.stages.network.stage import architecture

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


def run_settings(step: Step, name: str) -> dict[str, Any]:
    """All that a run of an experiment depends on, as far as a plan knows it: other runs are no part of it."""
    shared = {key: value for key, value in step.settings.items() if key != "runs"}
    return shared | {"run": step.settings["runs"][name]}


def run(plan: Plan, step: Step) -> None:
    from pipeline.data.images import Images
    from pipeline.stages.randomize import results as results
    from pipeline.stages.randomize.tasks import train_runs
    from pipeline.storage.store import Ledger, remove_partials

    assert step.comparison is not None
    began = stage.begin(plan, step)
    images = Images.of(plan, step)
    data = data_of(images, step)
    folder = plan.results / "randomization" / step.comparison
    runs = runs_of(plan, step, data, folder)
    stage.refers_to(plan, step, [run.folder for run in runs.values()])
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    remove_partials(folder)
    ledger = Ledger(folder / "runs.ledger")
    by_id = {run.id: run for run in runs.values()}
    missing = [run for id, run in by_id.items() if not ledger.get(id, id, folder / "runs")]
    together = plan.config.randomize[step.comparison].together if plan.config.cluster.kind == "gpu" else 1
    tasks = [(data, missing[at : at + together]) for at in range(0, len(missing), together)]
    if tasks:
        pixels = 3 * images.size[0] * images.size[1] * (len(data.rows) + len(data.test_rows))
        check_memory(plan.config.cluster, (3 * pixels + WORKING) * together, step.name, REMEDY)
        with client(plan.config.cluster, plan.scratch) as workers:
            for finished in run_tasks(workers, train_runs, tasks, len(tasks), step.name, REMEDY):
                for id, files in finished:
                    ledger.record(id, id, files)
    for one in runs.values():
        (one.folder / "checkpoint.pt").unlink(missing_ok=True)
    found = {name: results.Outcome.read(one, ledger.entries[one.id]["files"]) for name, one in runs.items()}
    own = {**step.settings, "dataset": step.dataset}
    files = results.write(folder, found, data, own)
    files |= stage.within("runs", ledger.files(by_id))
    told = {name: one.told() for name, one in found.items()}
    facts = {"dataset": step.dataset, "runs": told, "images": len(data.rows), "test_images": len(data.test_rows)}
    stage.finish(plan, step, began, results.output(files), files, facts, made=(len(missing), len(by_id)))


def data_of(images: Images, step: Step) -> Data:
    """The images that are trained and tested on: the first of their splits that have a class."""
    from pipeline.stages.randomize.tasks import Data

    how = step.settings
    label = np.asarray(images.reader()["label"][:]).astype(np.int64)
    rows, test_rows = (
        np.flatnonzero(images.counted(how[split]) & (label >= 0))[: how[limit]]
        for split, limit in (("split", "images"), ("test", "test_images"))
    )
    if len(np.unique(label[rows])) < 2 or not len(test_rows):
        raise MicrotomeError(
            f"{step.name}: {len(rows)} images with a class in split {how['split']!r}, of "
            f"{len(np.unique(label[rows]))} classes, and {len(test_rows)} in {how['test']!r}: runs need two classes "
            "or more to train on, and images to test on"
        )
    shards = sorted({int(row) // images.shard_images for row in (*rows, *test_rows)})
    labels, test_labels = label[rows], label[test_rows]
    made_of = [images.contents[shard] for shard in shards]
    id = digest([made_of, *(each.tolist() for each in (rows, labels, test_rows, test_labels))])
    return Data(id, images.store, images.files, how["classes"], rows, labels, test_rows, test_labels)


def runs_of(plan: Plan, step: Step, data: Data, folder: Path) -> dict[str, Run]:
    """The runs by name, each with its id."""
    from pipeline.stages.randomize.tasks import Run

    assert step.comparison is not None
    asked = plan.config.randomize[step.comparison]
    found = {}
    for name, how in step.settings["runs"].items():
        id = digest([VERSION, how, step.settings["crop"], step.settings["classes"], data.id])
        spec = NetworkSpec.of(asked.networks[asked.runs[name].network])
        settings = {key: value for key, value in how.items() if key != "network"} | {"crop": step.settings["crop"]}
        found[name] = Run(id, name, spec, settings, folder / "runs" / id, asked.checkpoint_seconds)
    return found


def weights_of(plan: Plan, step: Step, run: str) -> tuple[Path, Mapping[str, Any]]:
    """File and facts of the weights that a run of a finished experiment came to."""
    from pipeline.storage.store import verified_bytes

    assert step.comparison is not None
    manifest = plan.manifest(step)
    facts = manifest.result["runs"][run]
    folder = plan.results / "randomization" / step.comparison
    name = f"runs/{facts['id']}/model.safetensors"
    if name not in manifest.files:
        raise MicrotomeError(
            f"run {run!r} of {step.comparison!r} diverged and has no weights: lower its `learning_rate`, or name "
            "another run"
        )
    verified_bytes(folder, name, manifest.files)
    return folder / name, facts


def discard(plan: Plan, step: Step) -> list[Path]:
    """The files and folders that this step made."""
    assert step.comparison is not None
    folder = plan.results / "randomization" / step.comparison
    return [folder / name for name in ("runs", "runs.ledger", "runs.csv", "curves.zarr")]
