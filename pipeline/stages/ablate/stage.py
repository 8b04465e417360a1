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

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.networks import Ablate
from pipeline.errors import MicrotomeError
from pipeline.plan.inspected import found
from pipeline.plan.job import Job
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


def sizes(job: Job[Settings]) -> Iterator[str]:
    """Say what removing each unit of a layer costs, sets of units aside; units that make no difference cost nothing."""
    inspected, removal = found(job), job.settings.ablate
    splits = len(removal.splits)
    images = f"{removal.images:,} images of each of {splits} splits" if removal.images else f"all of {splits} splits"
    units = {layer.name: layer.shape[0] for layer in inspected.layers}
    for layer, flops in inspected.ablation.items():
        cost = f"{flops / 1e6:.3g} MFLOP" if flops is not None else "a whole forward"
        yield (
            f"{job.network} on {job.dataset}: {units[layer]} units of {layer} removed from {images}, {cost} for each "
            f"pair"
        )


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
    sizes=sizes,
    run=run,
    explains="units removed again only on shards of images that changed",
    made=made,
    unreferenced=unreferenced,
    pages=(PageModule("pipeline.stages.ablate.page", 30),),
)
