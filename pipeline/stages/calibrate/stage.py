"""The stage `calibrate`: whether a network knows when it is wrong, and what each method makes of its probabilities.

Writes, for the network, from its logits alone,
    calibration.zarr       score (split, calibration, measure) · count, correct, confidence (split, calibration, bin) ·
                           all_count, all_correct, all_confidence (bin): the network as it is, over all images
    calibration.csv        one row a method: means over the splits with the range of 95 % of them
    calibration-bins.csv   the reliability diagrams of the first split, and of the network over all images

Definitions: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017). See docs/calibration.md.

    python -P -m pipeline.calibrate logits.npz ...     of plain files: see `pipeline.stages.calibrate.plain_files`
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import MicrotomeError
from pipeline.plan.inspected import found
from pipeline.plan.job import Job
from pipeline.plan.stage import Draft, PageModule, Stage, Wanted
from pipeline.plan.step import Key
from pipeline.stages.calibrate.results import (
    Calibrated,
    Whole,
    network_facts,
    open_store,
    write_tables,
    write_whole_network,
)
from pipeline.stages.calibrate.settings import SECTION, Calibrate, Fitting, Settings
from pipeline.stages.calibrate.tasks import (
    STORE,
    Judged,
    Scores,
    chosen,
    fitted_on,
    keys,
    measure,
    memory_need,
    one_split,
)
from pipeline.stages.extract.results import Extracted, logits
from pipeline.storage.identity import digest
from pipeline.storage.manifest import within, write_file
from pipeline.storage.store import StoreRef, metadata_files, remove_partials
from pipeline.workers.resumable import Parts
from pipeline.workers.tasks import run_tasks

VERSION = 3
CODE = (
    "kernels/calibration/reliability.py",
    "kernels/calibration/binning.py",
    "kernels/calibration/methods.py",
    "kernels/calibration/uncertainty.py",
    "kernels/calibration/scaling.py",
    "pipeline/stages/calibrate/results.py",
    "pipeline/stages/calibrate/scores.py",
    "pipeline/stages/calibrate/settings.py",
    "pipeline/stages/calibrate/stage.py",
    "pipeline/stages/calibrate/tasks.py",
)
IMAGES_AT_ONCE = 16384  # of one task that measures the network as it is
REMEDY = "lower `max_images` of the data set, or take `matrix` and `matrix_odir` out of `calibrate.methods`"


def steps(draft: Draft) -> Iterator[Wanted]:
    section = draft.config.section(SECTION.key)
    for dataset, network in draft.chosen(SECTION, classes=True):
        parents = (
            draft.step("ingest", dataset),
            draft.step("network", network=network),
            draft.step("extract", dataset, network),
        )
        yield Wanted(Key(dataset, network), settings_of(draft, section, dataset), parents)


def settings_of(draft: Draft, section: Calibrate, dataset: str) -> Settings:
    """Return what the id is made of; refuse too few images."""
    summary = draft.summaries[dataset]
    images = summary.splits[draft.config.datasets[dataset].examined_split]
    few = fitted_on(section.share, images)
    if few < summary.classes:
        raise MicrotomeError(
            f"calibrate, data set {dataset!r}: {few} of its {images} images are to be fitted on, and there are "
            f"{summary.classes} classes: at least as many images are needed; raise `max_images` or `calibrate.share`"
        )
    given = section.model_dump(exclude={"networks", "datasets"})
    given["methods"] = chosen(section.methods, summary.classes)
    return Settings(calibrate=Fitting(**given), classes=summary.classes)


def check(job: Job[Settings]) -> Iterator[str]:
    """Say what is wrong with the logits of a network that is to be calibrated."""
    given, classes = found(job).classes, job.settings.classes
    if given != classes and (given, classes) != (1, 2):
        yield (
            f"network {job.network!r} on {job.dataset!r} cannot be calibrated: "
            + (f"it gives {given} logits" if given else "it has no head")
            + f", and the images have {classes} classes: name other networks or data sets in `calibrate`"
        )


@dataclass(frozen=True)
class Work:
    """What a job is about to do.

    Attributes
    ----------
    rows, label, image_id : of the images that count, in their order: place, class and id.
    shards : {first image: one past the last} of the shards that hold them.
    """

    settings: Fitting
    logits: StoreRef
    rows: np.ndarray
    label: np.ndarray
    image_id: np.ndarray
    shards: dict[int, int]

    @property
    def fit(self) -> int:
        """Images that methods are fitted on."""
        return fitted_on(self.settings.share, len(self.rows))

    @cached_property
    def made_of(self) -> str:
        """Digest of what every split depends on: the logits, the images that count, and the settings."""
        settings = {key: value for key, value in self.settings.written().items() if key != "splits"}
        images = [self.rows.tolist(), self.label.tolist(), self.image_id.tolist()]
        return digest([VERSION, settings, self.logits.files, *images])

    def scores(self, job: Job[Settings]) -> Scores:
        """Return the logits as tasks name them."""
        return Scores(
            digest([str(self.logits.path), job.name, self.made_of]),
            self.logits,
            self.shards,
            job.settings.classes,
            self.rows,
            self.label,
            keys(self.image_id.tolist()),
        )


def work_of(job: Job[Settings]) -> Work:
    """Choose the images that count; refuse too few of them, and those of one class alone."""
    images, extraction, settings = job.images, job.parent("extract"), job.settings
    split = job.parent_job("extract").settings.split
    label = np.asarray(images.reader()["label"][:])
    stored = np.zeros(images.count, bool)
    for shard in Extracted.of(extraction).shards:
        stored[slice(*images.range(shard))] = True
    rows = np.flatnonzero(images.counted(split) & (label >= 0) & stored)
    shards = dict(images.range(shard) for shard in sorted(set((rows // images.shard_images).tolist())))
    work = Work(settings.calibrate, logits(job.folder, extraction), rows, label[rows], images.image_ids()[rows], shards)
    if work.fit < settings.classes:
        raise MicrotomeError(
            f"{job.name}: of {len(rows)} images with a class in split {split!r} {work.fit} are to be fitted on, and "
            f"there are {settings.classes} classes: at least as many images are needed"
        )
    if (work.label == work.label[0]).all():
        raise MicrotomeError(
            f"{job.name}: all {len(rows)} images with a class in split {split!r} have the class {work.label[0]}: "
            f"calibration takes images of two classes; see `max_images` and the labels of the data set"
        )
    return work


def run(job: Job[Settings]) -> None:
    job.begin()
    work = work_of(job)
    store = job.folder / "calibration.zarr"
    settings, methods = work.settings, ["uncalibrated", *work.settings.methods]
    parts = Parts(store, {str(split): digest([split, work.made_of]) for split in range(settings.splits)})
    open_store(store, methods, settings.splits, settings.bins)
    remove_partials(store)
    scores = work.scores(job)
    job.check_memory(memory_need(len(work.rows), job.settings.classes, methods), REMEDY)

    def arguments(part: str, _: list[str]) -> tuple:
        return scores, int(part), work.fit, methods, settings, store

    with job.workers() as workers:
        whole, remarks = as_it_is(job, workers, scores, settings.bins)
        fitted = job.resumed(workers, one_split, {STORE: parts}, arguments, REMEDY)
    facts = Calibrated(
        images=len(work.rows),
        fit=work.fit,
        test=len(work.rows) - work.fit,
        all=whole.measures,
        network=network_facts(job.parent_job("network").folder, job.parent("network")),
        **({"remarks": tuple(remarks)} if remarks else {}),
    )
    for remark in remarks:
        print(f"{job.name}: {remark}", file=sys.stderr)
    files = parts.files() | write_whole_network(store, methods, whole, settings, facts)
    tables = write_tables(store, files | metadata_files(store), methods, whole)
    output = digest([files, {name: table.decode() for name, table in tables.items()}])
    files = within(store.name, files | metadata_files(store))
    for name, data in tables.items():
        files |= write_file(job.folder, name, data)
    job.finish(output, files, facts, made=(len(fitted), settings.splits))


def as_it_is(job: Job, workers: Any, scores: Scores, bins: int) -> tuple[Whole, list[str]]:
    """Measure the network as it is, over all images, in parts merged in their order; return the remarks, too."""
    parts = [slice(at, at + IMAGES_AT_ONCE) for at in range(0, len(scores.rows), IMAGES_AT_ONCE)]
    tasks = [(scores, at, part, bins) for at, part in enumerate(parts)]
    judged: dict[int, tuple[Judged, list[str]]] = dict(
        run_tasks(workers, measure, tasks, len(tasks), f"{job.name}: as it is", REMEDY)
    )
    return Whole.of([judged[at][0] for at in range(len(parts))]), judged[0][1]


def made(job: Job) -> list[Path]:
    folder = job.folder
    return [folder / "calibration.zarr", folder / "calibration.ledger", *folder.glob("calibration*.csv")]


STAGE = Stage(
    name="calibrate",
    version=VERSION,
    code=CODE,
    says="Calibrate {wildcards.network} on {wildcards.dataset}",
    place="pair",
    section=SECTION,
    settings=Settings,
    steps=steps,
    check=check,
    run=run,
    explains="methods fitted again on the splits that are missing, from stored logits",
    made=made,
    pages=(PageModule("pipeline.stages.calibrate.page", 40),),
)
