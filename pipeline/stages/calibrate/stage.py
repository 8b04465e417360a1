"""The stage `calibrate`: whether a network knows when it is wrong, and what each method makes of its probabilities.

Writes, for the network, from its logits alone,
    calibration.zarr       score (split, calibration, measure) · count, correct, confidence (split, calibration, bin) ·
                           all_count, all_correct, all_confidence (bin): the network as it is, over all images
    calibration.csv        one row a method: means over the splits with the range of 95 % of them
    calibration-bins.csv   the reliability diagrams of the first split, and of the network over all images

Definitions: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017). See docs/calibration.md.

    python -m pipeline.calibrate logits.npz ...     the same of plain files, see `pipeline.stages.calibrate.plain_files`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.core import UNTRAINED, Calibrate
from pipeline.errors import MicrotomeError
from pipeline.plan import job as stage
from pipeline.stages.calibrate import tasks as calibrate_tasks
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Files, write_file
from pipeline.workers.pool import check_memory, client, run_tasks

if TYPE_CHECKING:
    from pipeline.data.images import Images
    from pipeline.data.kinds import Summary
    from pipeline.plan.step import Plan, Step

VERSION = 2
CODE = (
    "kernels/calibration/reliability.py",
    "kernels/calibration/binning.py",
    "kernels/calibration/methods.py",
    "kernels/calibration/uncertainty.py",
    "kernels/calibration/scaling.py",
    "pipeline/stages/calibrate/stage.py",
    "pipeline/stages/calibrate/results.py",
    "pipeline/stages/calibrate/tasks.py",
)
IMAGES_AT_ONCE = 16384  # of one task that measures the network as it is
REMEDY = "lower `max_images` of the data set, or take `matrix` and `matrix_odir` out of `calibrate.methods`"


def wanted(asked: Calibrate, network: str, dataset: str, found: Summary) -> bool:
    """Whether a network is calibrated on a data set; an untrained control is not."""
    return (
        not network.endswith(UNTRAINED)
        and (asked.networks is None or network in asked.networks)
        and (found.classes > 0 if asked.datasets is None else dataset in asked.datasets)
    )


def settings(asked: Calibrate, name: str, split: str, found: Summary) -> dict[str, Any]:
    """What the id is made of beside the parents; too few images are refused here."""
    few = calibrate_tasks.fitted_on(asked.share, found.splits[split])
    if few < found.classes:
        raise MicrotomeError(
            f"calibrate, data set {name!r}: {few} of its {found.splits[split]} images are to be fitted on, and there "
            f"are {found.classes} classes: at least as many images are needed; raise `max_images` or `calibrate.share`"
        )
    how = asked.model_dump(exclude={"networks", "datasets"})
    return {
        "calibrate": how | {"methods": calibrate_tasks.chosen(how["methods"], found.classes)},
        "classes": found.classes,
    }


@dataclass(frozen=True)
class Work:
    """What a step is about to do: the images that count, and the id of what each split is made from."""

    images: Images
    rows: np.ndarray
    label: np.ndarray
    image_id: np.ndarray
    logits: Files
    how: Mapping[str, Any]

    @property
    def fit(self) -> int:
        """Images that methods are fitted on."""
        return calibrate_tasks.fitted_on(self.how["share"], len(self.rows))

    @cached_property
    def made_of(self) -> str:
        """Digest of what every split depends on: the logits, the images that count, and the settings."""
        how = {key: value for key, value in self.how.items() if key != "splits"}
        return digest([VERSION, how, self.logits, self.rows.tolist(), self.label.tolist(), self.image_id.tolist()])


def work_of(plan: Plan, step: Step) -> Work:
    from pipeline.data.images import Images

    images = Images.of(plan, step)
    _, extracted = plan.parent(step, "extract")
    split, shards = extracted.settings["split"], extracted.result["shards"]
    label = np.asarray(images.reader()["label"][:])
    counts = images.counted(split) & (label >= 0)
    held = np.zeros(images.count, bool)
    for shard in shards:
        held[slice(*images.range(shard))] = True
    rows = np.flatnonzero(counts & held)
    logits = stage.below("logits.zarr", extracted.files)
    how = step.settings["calibrate"]
    found = Work(images, rows, label[rows], images.image_ids()[rows], logits, how)
    if found.fit < step.settings["classes"]:
        raise MicrotomeError(
            f"{step.name}: of {len(rows)} images with a class in split {split!r} {found.fit} are to be fitted on, and "
            f"there are {step.settings['classes']} classes: at least as many images are needed"
        )
    if (found.label == found.label[0]).all():
        raise MicrotomeError(
            f"{step.name}: all {len(rows)} images with a class in split {split!r} have the class {found.label[0]}: "
            f"calibration takes images of two classes; see `max_images` and the labels of the data set"
        )
    return found


def run(plan: Plan, step: Step) -> None:
    from pipeline.stages.calibrate import results as calibrate_results
    from pipeline.storage.store import Ledger, metadata_files, remove_partials

    assert step.dataset is not None and step.network is not None
    began = stage.begin(plan, step)
    work = work_of(plan, step)
    folder = plan.results / step.dataset / step.network
    store = folder / "calibration.zarr"
    methods = ["uncalibrated", *work.how["methods"]]
    ledger = Ledger(store.with_suffix(".ledger"))
    splits = work.how["splits"]
    ids = {split: digest([split, work.made_of]) for split in range(splits)}
    calibrate_results.open_store(store, methods, splits, work.how["bins"])
    remove_partials(store)
    scores = scores_of(folder, step, work)
    missing = [split for split in range(splits) if not ledger.get(str(split), ids[split], store)]
    parts = [slice(at, at + IMAGES_AT_ONCE) for at in range(0, len(work.rows), IMAGES_AT_ONCE)]
    need = calibrate_tasks.memory_need(len(work.rows), step.settings["classes"], methods)
    check_memory(plan.config.cluster, need, step.name, REMEDY)
    with client(plan.config.cluster, plan.scratch) as workers:
        measured: dict[int, Any] = {}
        tasks = [(scores, at, part, work.how["bins"]) for at, part in enumerate(parts)]
        for at, one in run_tasks(workers, calibrate_tasks.measure, tasks, len(tasks), f"{step.name}: as it is", REMEDY):
            measured[at] = one
        fits = [(scores, split, work.fit, methods, work.how, store) for split in missing]
        for split, files in run_tasks(workers, calibrate_tasks.one_split, fits, len(fits), step.name, REMEDY):
            ledger.record(str(split), ids[split], files)
    whole = calibrate_results.Whole.of([measured[at] for at in range(len(parts))])
    facts = {
        "images": len(work.rows),
        "fit": work.fit,
        "test": len(work.rows) - work.fit,
        "all": whole.measures,
        "network": calibrate_results.network_facts(plan, step),
    }
    files = ledger.files(map(str, range(splits)))
    files |= calibrate_results.write_whole_network(store, methods, whole, {**work.how, **facts})
    tables = calibrate_results.write_tables(store, files | metadata_files(store), methods, whole)
    output = digest([files, {name: table.decode() for name, table in tables.items()}])
    files = stage.within(store.name, files | metadata_files(store))
    for name, data in tables.items():
        files |= write_file(folder, name, data)
    stage.finish(plan, step, began, output, files, facts, made=(len(missing), splits))


def scores_of(folder: Path, step: Step, work: Work) -> calibrate_tasks.Scores:
    shards = {}
    for shard in sorted(set((work.rows // work.images.shard_images).tolist())):
        start, stop = work.images.range(shard)
        shards[start] = stop
    return calibrate_tasks.Scores(
        digest([step.name, work.made_of]),
        folder / "logits.zarr",
        work.logits,
        shards,
        step.settings["classes"],
        work.rows,
        work.label,
        calibrate_tasks.keys(work.image_id.tolist()),
    )


def discard(plan: Plan, step: Step) -> list[Path]:
    """The files and folders that this step made."""
    assert step.dataset is not None and step.network is not None
    folder = plan.results / step.dataset / step.network
    return [folder / "calibration.zarr", folder / "calibration.ledger", *folder.glob("calibration*.csv")]
