"""The stage `ablate`: what each class loses when units of a layer are removed, one at a time and in sets.

Writes, for the network,
    ablation.zarr/<layer>  balanced_accuracy_loss, recall_loss, precision_loss (split, unit, class) · accuracy_loss,
                           top5_loss (split, unit) · the counts behind them, int64 · what sets of units do
    ablation.csv           per class its most important units: concept, IoU, and losses on both splits
    ablation-sets.csv      per class what removing its 1, 2, ... most important units does, and removing others
    ablation-units.csv     per unit its concept, and to how many classes it is important
    ablation-predictions/  what was predicted without each unit and set, by image: all of the above is counted from it

Definitions: Bau et al., "Understanding the role of individual units in a deep neural network" (PNAS 2020). See
docs/ablation.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.ablation import KINDS, RANDOM_KINDS
from pipeline.config.networks import Ablate
from pipeline.errors import MicrotomeError
from pipeline.plan import inspected
from pipeline.plan.cost import Cost, duration
from pipeline.plan.inspected import found
from pipeline.plan.job import Job
from pipeline.plan.question import Question
from pipeline.plan.stage import Draft, PageModule, Stage, Wanted
from pipeline.plan.step import Key
from pipeline.stages.ablate.layer import ablate_layer
from pipeline.stages.ablate.results import (
    Ablated,
    group_of,
    layer_files,
    open_groups,
    unit_labels,
    write_layer,
    write_tables,
)
from pipeline.stages.ablate.settings import Removal, Settings
from pipeline.stages.ablate.work import Work
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Files, unnamed_stores, write_file
from pipeline.storage.store import create, remove
from pipeline.workers import memory

LOGIT = 11e-9  # CPU seconds to look at one logit of a pair: `bench_ablation.py`, the last block of ResNet-18
LONG = 3600  # seconds of an ablation above which fewer images are proposed

VERSION = 1
CODE = (
    "kernels/ablation.py",
    "kernels/images/grey.py",
    "kernels/images/whiten.py",
    "pipeline/data/listing.py",
    "pipeline/networks/build.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/forward.py",
    "pipeline/networks/graph/channels.py",
    "pipeline/networks/graph/tail.py",
    "pipeline/networks/graph/trace.py",
    "pipeline/networks/layers.py",
    "pipeline/networks/positions.py",
    "pipeline/networks/prepare.py",
    "pipeline/networks/returned.py",
    "pipeline/stages/ablate/layer.py",
    "pipeline/stages/ablate/results.py",
    "pipeline/stages/ablate/settings.py",
    "pipeline/stages/ablate/stage.py",
    "pipeline/stages/ablate/tasks.py",
    "pipeline/stages/ablate/work.py",
)


def steps(draft: Draft) -> Iterator[Wanted]:
    for dataset, network in draft.pairs():
        section = draft.networks[network].ablate
        if section is None or (section.datasets is not None and dataset not in section.datasets):
            continue
        if not draft.config.dissects(draft.networks[network], dataset):
            raise MicrotomeError(
                f"network {network!r}, ablate: it is not dissected on {dataset!r}, and its units would have no labels: "
                f"give the network layers with maps and the data set `concepts`, or name other data sets in "
                f"`ablate.datasets`"
            )
        parents = (
            draft.step("ingest", dataset),
            draft.step("network", network=network),
            draft.step("extract", dataset, network),
            draft.step("dissect", dataset, network),
        )
        yield Wanted(Key(dataset, network), settings_of(draft, section, dataset, network), parents)


def settings_of(draft: Draft, section: Ablate, dataset: str, network: str) -> Settings:
    """Return what the id is made of; refuse images without classes, and splits that are not there."""
    summary = draft.summaries[dataset]
    if not summary.classes:
        raise MicrotomeError(
            f"network {network!r}, ablate: the images of data set {dataset!r} have no classes that could lose "
            f"anything: give it `labels`, or name other data sets in `ablate.datasets`"
        )
    judge = section.judge or draft.config.datasets[dataset].examined_split
    for key, split in (("rank", section.rank), ("judge", judge)):
        try:
            summary.require(dataset, split)
        except MicrotomeError as error:
            raise MicrotomeError(f"network {network!r}, ablate.{key}: {error}") from None
    given = section.model_dump(exclude={"datasets"}) | {"judge": judge, "sizes": sorted(set(section.sizes))}
    return Settings(ablate=Removal(**given), classes=summary.classes)


def run(job: Job[Settings]) -> None:
    job.begin()
    folder, classes = job.folder, job.images.classes
    labels = unit_labels(folder, job.parent("dissect"))
    store = folder / "ablation.zarr"
    remove(store)
    create(store, {}, {})
    files: Files = {}
    counted = []
    with job.workers() as workers:
        for target, shards in (work := Work.of(job, workers)).layers():
            one, predictions = ablate_layer(work, target, shards)
            group = group_of(one.layer)
            files |= open_groups(store, [one.layer]) | predictions
            files |= write_layer(store / group, classes, one, f"{store.name}/{group}")
            counted.append(one)
    names = [one.layer for one in counted]
    renamed = {name: group_of(name) for name in names if group_of(name) != name}
    create(store, {}, {"layers": names} | ({"groups": renamed} if renamed else {}))
    files |= layer_files(store)
    for name, data in write_tables(counted, labels, classes).items():
        files |= write_file(folder, name, data)
    job.finish(digest(files), files, Ablated(layers=[one.facts for one in counted]))


def made(job: Job) -> list[Path]:
    folder = job.folder
    return [folder / "ablation.zarr", folder / "ablation-predictions", *folder.glob("ablation*.csv")]


def unreferenced(results: Path, used: set[Path]) -> Iterator[Path]:
    """Find predictions that no finished ablation counted, of layers or weights that were replaced."""
    for folder in sorted(results.glob("*/*/ablation-predictions/")):
        yield from unnamed_stores(folder, "ablate")


def requests(job: Job[Settings]) -> dict[str, Any]:
    """Have the inspection find what a pair of a unit and an image costs, and refuse layers that are not there."""
    return {"ablate": {"layers": job.settings.ablate.layers, "classes": job.settings.classes}}


def check(job: Job[Settings]) -> Iterator[str]:
    """Refuse a network that cannot take one image alone: what a unit changes may be one image."""
    if why := found(job).alone:
        yield (
            f"network {job.network!r} on {job.dataset!r}, ablate: it cannot take one image alone ({why}), and a unit "
            "may change one image only: look for `squeeze()` without a dimension in its forward"
        )


def speeds(job: Job[Settings]) -> list[Question]:
    """Have the network timed, also where its extraction is finished."""
    return [inspected.speed_question(job.parent_job("extract"))]


@dataclass(frozen=True)
class Pairs:
    """What is removed from a layer, and the seconds of one worker that it takes at most; None if unknown.

    `flops` are those of a pair; None: each takes a whole forward pass. `sets` are counted at what a single unit costs,
    the least that they take.
    """

    layer: str
    units: int
    flops: float | None
    sets: int
    seconds: float | None
    set_seconds: float | None


def pairs_of(job: Job[Settings]) -> list[Pairs]:
    """Return the pairs of units and images of each layer, with their time from the probe of the network."""
    removal, classes, known = job.settings.ablate, job.settings.classes, found(job)
    images = {split: min(job.splits[split], removal.images or job.splits[split]) for split in removal.splits}
    speed = inspected.speed(job)
    rate, whole = speed.get("images_per_second"), speed.get("flops")
    units, made = {layer.name: layer.shape[0] for layer in known.layers}, []
    for layer, flops in known.ablation.items():
        sizes = sum(size < units[layer] for size in removal.sizes)
        sets = sizes * (len(KINDS) * classes + removal.draws * len(RANDOM_KINDS))
        one = None
        if rate and (flops is None or whole):
            one = classes * LOGIT + (1 / rate if flops is None else flops / (rate * whole))
        alone = None if one is None else one * units[layer] * sum(images.values())
        together = None if one is None else one * sets * images[removal.judge]
        made.append(Pairs(layer, units[layer], flops, sets, alone, together))
    return made


def sizes(job: Job[Settings]) -> Iterator[str]:
    """Say what removing each unit of a layer takes, and how many images would take an hour where all take more."""
    removal, workers = job.settings.ablate, memory.workers(job.cluster)
    splits = len(removal.splits)
    images = f"{removal.images:,} images of each of {splits} splits" if removal.images else f"all of {splits} splits"
    every = pairs_of(job)
    for one in every:
        cost = f"{one.flops / 1e6:.3g} MFLOP" if one.flops is not None else "a whole forward"
        times = ""
        if one.seconds is not None and one.set_seconds is not None:
            times = f", up to {duration(one.seconds / workers)}; {one.sets:,} sets of units"
            times += f", {duration(one.set_seconds / workers)} or more" if one.sets else ""
        yield (
            f"{job.network} on {job.dataset}: {one.units} units of {one.layer} removed from {images}, {cost} for each "
            f"pair{times}"
        )
    if not job.manifest.exists() and (seconds := total(every)) and seconds / workers > LONG:
        most = min(max(job.splits[split] for split in removal.splits), removal.images or sys.maxsize)
        fewer = int(most * LONG * workers / seconds)
        yield (
            f"{job.network} on {job.dataset}: the ablation takes about {duration(seconds / workers)} on {workers} "
            f"worker{'s' * (workers > 1)}; `ablate: {{images: {max(1, rounded(fewer))}}}` takes about an hour"
        )


def total(every: Sequence[Pairs]) -> float | None:
    """Return the seconds of one worker for all layers; None if unknown."""
    times = [each for one in every for each in (one.seconds, one.set_seconds)]
    known = [each for each in times if each is not None]
    return sum(known) if len(known) == len(times) else None


def rounded(count: int) -> int:
    """Return a number with its first two digits alone."""
    digits = max(0, len(str(count)) - 2)
    return count // 10**digits * 10**digits


def cost(job: Job[Settings], done: bool) -> Cost:
    """Return the time of the last ablation with these settings, or else that of all pairs."""
    removal, before = job.settings.ablate, job.before()
    images = sum(min(job.splits[split], removal.images or job.splits[split]) for split in removal.splits)
    seconds = total(pairs_of(job))
    if before is not None and before.settings.get("ablate") == job.identity["ablate"]:
        seconds = before.provenance.get("seconds", 0) * memory.workers(job.cluster) or seconds
    return Cost(images=images, seconds=seconds)


STAGE = Stage(
    name="ablate",
    version=VERSION,
    code=CODE,
    says="Ablate {wildcards.network} on {wildcards.dataset}",
    place="pair",
    settings=Settings,
    steps=steps,
    requests=requests,
    check=check,
    speeds=speeds,
    sizes=sizes,
    cost=cost,
    run=run,
    explains="units removed again only on shards of images that changed",
    made=made,
    unreferenced=unreferenced,
    pages=(PageModule("pipeline.stages.ablate.page", 30),),
)
