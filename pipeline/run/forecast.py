"""What a run would take, before anything runs: bytes on the disk, images a second, time, memory of a worker, tasks.

Sizes come from the layers that the inspection found, the speed of networks from a probe (`pipeline.networks.speed`), that of
other stages from rates measured by `make bench` or, for decoding and label maps, assumed; where a stage has run before,
from what it took then. A run whose results the disk cannot hold is refused.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.core import UNTRAINED
from pipeline.data import kinds as datasets
from pipeline.errors import MicrotomeError
from pipeline.networks.layer import LayerInfo
from pipeline.plan import inspected as preflight
from pipeline.plan import job as stage
from pipeline.plan.step import Plan, Step, outdated
from pipeline.stages.concepts import stage as concepts
from pipeline.stages.dissect import stage as dissect
from pipeline.stages.extract import stage as extract
from pipeline.stages.extract import streaming as stream
from pipeline.stages.extract.pictures import KEPT
from pipeline.stages.grams import stage as grams
from pipeline.stages.ingest import stage as ingest
from pipeline.stages.probes import tasks as probes_tasks
from pipeline.storage.manifest import latest
from pipeline.storage.object_storage import size_of
from pipeline.workers import pool as cluster

# Bytes on the disk for each byte before compression, on the cautious side of what was measured: activations of the demo
# 0.48 to 0.67, of a random VGG-16 0.79; images of the demo 0.96; its label maps 0.04.
SHRINKS = {"maps": 0.8, "pixels": 1.0, "labels": 0.15}
# CPU seconds on one core; docs/performance.md has what they go by.
IMAGE = 6e-3  # to decode an image and bring it to size: assumed, until ingest has run once
LABELS = 2e-3  # for the label maps of a category of an image: assumed, until they have been made once
STORED = 19e-9  # to keep, compress and write one value of a layer
COUNTED = 3.8e-6, 0.6e-9  # to dissect a unit on an image: constant, and for each position of the label map
TAIL = 2000  # bytes of the counters of a unit in a block, compressed
GRAM = 1.15  # forwards that a forward with Gram matrices takes
SHARE = 0.95  # of the free bytes that a run may plan to fill
LITTLE = 50e6  # bytes that are not worth a refusal before the disk gives its own: such estimates say little


Splits = Mapping[str, Mapping[str, int]]  # images by data set and split


@dataclass(frozen=True)
class Store:
    """A store, or a layer of one: bytes before compression, as they are expected on the disk, and there already."""

    name: str
    raw: float
    expected: float
    there: float
    kept: str = "full"
    unstored: float = 0.0  # bytes before compression that `store: none` saves

    @property
    def missing(self) -> float:
        return max(0.0, self.expected - self.there)


@dataclass(frozen=True)
class Cost:
    """What one step takes. `seconds` are those of one worker, and None where nothing says how many."""

    step: Step
    stores: tuple[Store, ...]
    images: int
    tasks: int
    seconds: float | None
    memory: int | None
    rate: str = ""
    done: bool = False


def lines(plan: Plan, costs: Sequence[Cost]) -> list[str]:
    """The forecast as text: a line a step, a line a layer below its network's, and the sums."""
    workers, allowed = cluster.workers(plan.config.cluster), cluster.memory(plan.config.cluster)
    head = ("", "GB", "on disk", "missing", "images", "images/s", "time", "tasks", "GB/worker")
    rows: list[tuple[str, ...]] = [head]
    for cost in costs:
        if cost.stores or cost.seconds is not None or cost.memory is not None:
            rows.append(_row(cost, workers, allowed))
        if len(cost.stores) > 1 and not (cost.step.network or "").endswith(UNTRAINED):
            rows += [_layer(store) for store in cost.stores]
    missing = sum(store.missing for cost in costs for store in cost.stores)
    known = [cost.seconds for cost in costs if cost.seconds is not None and not cost.done]
    room = plan.config.stores or f"{_gb(_free(plan.results))} GB free"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    found = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    found.append(
        f"{_gb(missing)} GB to write, {room}; about {_time(sum(known) / workers)} on {workers} "
        f"worker{'s' * (workers > 1)} of {allowed / 1e9:.1f} GB, beside steps that were never timed"
    )
    left_out = {store.name for cost in costs for store in cost.stores if store.kept == "pooled"}
    if left_out:
        found.append(f"stored pooled, without maps, and left out of dissect: {', '.join(sorted(left_out))}")
    streamed = {store.name: 0.0 for cost in costs for store in cost.stores if store.kept == "none"}
    if streamed:
        saved = sum(store.unstored for cost in costs for store in cost.stores)
        found.append(
            f"not stored, and counted in two forward passes in place of one: {', '.join(sorted(streamed))}; saves "
            f"{_gb(saved * SHRINKS['maps'])} GB on disk"
        )
    return found


def check_disk(plan: Plan, costs: Sequence[Cost]) -> None:
    """Refuse a run whose results the file system cannot hold, beside what is there already.

    Raises
    ------
    MicrotomeError
        With both figures and what to change.
    """
    if plan.config.stores is not None:
        return
    stores = [store for cost in costs for store in cost.stores]
    missing, free = sum(store.missing for store in stores), _free(plan.results)
    if missing > max(SHARE * free, LITTLE):
        largest = max(stores, key=lambda store: store.missing)
        raise MicrotomeError(
            f"the results need about {_gb(missing)} GB more, {_gb(largest.missing)} GB of it for {largest.name}, and "
            f"the file system of {plan.results} has {_gb(free)} GB free: name fewer layers, have some counted "
            f"without being stored (`store: {{{largest.name.split(' ')[0]}: none}}`), bound the data set with "
            "`max_images`, or put `results` on a larger disk"
        )


def forecast(plan: Plan) -> list[Cost]:
    """What each step takes, in the plan's order; steps of training, ablation and the report where they were timed."""
    gone = outdated(plan)
    splits = {
        name: datasets.summary(dataset, plan.scratch, ingest.VERSION).splits
        for name, dataset in plan.config.datasets.items()
    }
    found = []
    for step in plan.steps.values():
        done = (plan.results / step.manifest).exists() and step.manifest not in gone
        before = latest((plan.results / step.manifest).parent, step.stage)
        estimate = ESTIMATES.get(step.stage)
        cost = estimate(plan, step, splits, done) if estimate else Cost(step, (), 0, 1, None, None)
        provenance = before.provenance if before is not None else {}
        seconds = cost.seconds
        if provenance.get("made") and provenance.get("shards"):  # the clock's, with as many workers as there were
            seconds = provenance["seconds"] / provenance["made"] * cost.tasks * cluster.workers(plan.config.cluster)
        elif not estimate and provenance:
            seconds = provenance["seconds"] * cluster.workers(plan.config.cluster)
        memory = None if cost.memory is None else cost.memory * cluster.threads(plan.config.cluster)
        found.append(replace(cost, seconds=seconds, memory=memory, done=done))
    return found


def _ingest(plan: Plan, step: Step, splits: Splits, done: bool) -> Cost:
    assert step.dataset is not None
    dataset = plan.config.datasets[step.dataset]
    images, (height, width) = step.settings["images"], step.settings["size"]
    raw = 3 * height * width * images
    name = "images.zarr"
    expected = raw * SHRINKS["pixels"]
    store = Store(name, raw, expected, expected if done else size_of(plan.results / step.dataset / name))
    memory = ingest.memory_need(dataset, (height, width))
    return Cost(step, (store,), images, -(-images // dataset.shard_images), images * IMAGE, memory)


def _concepts(plan: Plan, step: Step, splits: Splits, done: bool) -> Cost:
    images, dataset, size, categories = _counted(plan, step, splits)
    height, width = step.settings["label_map_size"] or size
    raw = 2 * height * width * len(categories) * images
    name = "concepts.zarr"
    expected = raw * SHRINKS["labels"]
    store = Store(name, raw, expected, expected if done else size_of(plan.results / str(step.dataset) / name))
    tasks = -(-images // dataset.shard_images)
    networks = preflight.segmenters(plan, step)
    probes = [probe for _, probe in networks]
    rates: list[float] = [probe.get("images_per_second", 0.0) for probe in probes]  # 0: not known
    known = all(rates)
    seconds = images * len(categories) * LABELS + sum(images / rate for rate in rates if rate)
    memory = concepts.memory_need(dataset.shard_images, size, len(categories))
    memory += max((found["memory"] for found, _ in networks), default=0)
    together = {"images_per_second": 1 / sum(1 / rate for rate in rates)} if rates and known else {}
    together |= {"images": min((probe.get("images", 0) for probe in probes), default=0)}
    return Cost(step, (store,), images, tasks, seconds if known else None, memory, _rate(together) if rates else "")


def _extract(plan: Plan, step: Step, splits: Splits, done: bool) -> Cost:
    assert step.network is not None and step.dataset is not None
    images, dataset, size, _ = _counted(plan, step, splits)
    network = plan.networks[step.network]
    found = preflight.found(plan, step)
    infos = [LayerInfo(**{**layer, "shape": tuple(layer["shape"])}) for layer in found["layers"]]
    there = {} if done else _layers_there(plan, step, [info.name for info in infos])
    tasks = -(-images // dataset.shard_images)
    count = tasks * dataset.shard_images  # shards are whole
    stores, kept = [], []
    for info in infos:
        units, height, width = info.shape
        wish = network.kept(info.name)
        kept.append(extract.Layer("", Path(), info, 1.0, wish != "full", streamed=wish == "none"))
        all_maps = 2 * count * units * height * width
        maps = all_maps if wish == "full" else 0
        beside = count * units * (2 * info.special + 8)
        if wish == "none":
            beside += units * (TAIL * min(tasks, stream.BLOCKS) + 2 * KEPT * height * width)
        expected = maps * SHRINKS["maps"] + beside
        stored = expected if done else there.get(info.name, 0)
        saved = max(0, all_maps - beside) if wish == "none" else 0
        stores.append(Store(info.name, maps + beside, expected, stored, wish, saved))
    values = sum(store.raw for store in stores) / 2
    speed = preflight.speed(plan, step)
    rate = speed.get("images_per_second")
    prepared = extract.Prepared([], 0, {}, found["parameters"], found["largest"])
    return Cost(
        step,
        tuple(stores),
        images,
        tasks,
        count / rate + values * STORED if rate else None,
        extract.memory_need(kept, prepared, network, dataset.shard_images, size),
        _rate(speed),
    )


def _rate(speed: Mapping[str, Any]) -> str:
    """Images a second as the table shows them, `~` where they are estimated."""
    if "images_per_second" not in speed:
        return speed.get("skipped", "not measured")
    return f"{'' if speed['images'] else '~'}{speed['images_per_second']:.3g}"


def _dissect(plan: Plan, step: Step, splits: Splits, done: bool) -> Cost:
    assert step.network is not None
    images, dataset, size, categories = _counted(plan, step, splits)
    height, width = dataset.label_map_size or size
    network = plan.networks[step.network]
    found = preflight.found(plan, step)
    layers = [layer for layer in found["layers"] if network.kept(layer["name"]) != "pooled"]
    units = sum(layer["shape"][0] for layer in layers)
    constant, position = COUNTED
    names = tuple(name for concept_names in categories.values() for name in concept_names)
    counted = dissect.Concepts(Path(), {}, tuple(categories), (), names, (), ())
    memory = max(
        dissect.memory_need(
            dissect.Layer(layer["name"], "", Path(), {}, tuple(layer["shape"]), 1.0, ""),
            dataset.shard_images,
            (height, width),
            counted,
        )
        for layer in layers
    )
    seconds: float | None = images * units * (constant + position * height * width)
    shown = ""
    if streamed := [layer for layer in layers if network.kept(layer["name"]) == "none"]:
        speed = preflight.speed(plan, step)
        rate, shown = speed.get("images_per_second"), _rate(speed)
        seconds = seconds + images / rate if rate and seconds is not None else None
        prepared = extract.Prepared([], 0, {}, found["parameters"], found["largest"])
        # As many of them are counted together as a worker has room for, with true labels and with permuted ones.
        room = min(dissect.ACCUMULATOR_BYTES, cluster.memory(plan.config.cluster) // 4)
        each = [layer["shape"][0] for layer in streamed]
        one = dissect.counting_need(1, replace(counted, categories=()), 0, (0, 0)) // 2
        together = max(max(each), min(2 * sum(each), room // max(1, one)))
        counting = dissect.counting_need(together, counted, dataset.shard_images, (height, width))
        maps = 12 * network.numerics.micro_batch * max(math.prod(layer["shape"]) for layer in streamed)
        merged = 3 * TAIL * sum(each)  # counters in int64, thrice
        memory = max(memory, maps + counting + merged + extract.forward_need(prepared, network, size))
    return Cost(step, (), images, -(-images // dataset.shard_images), seconds, memory, shown)


def _grams(plan: Plan, step: Step, splits: Splits, done: bool) -> Cost:
    assert step.network is not None and step.dataset is not None
    how, size = step.settings, plan.step("ingest", step.dataset).settings["size"]
    images = min(splits[step.dataset][how["split"]], how["images"]) * how["epochs"]
    found = preflight.found(plan, step)
    layers = len(found["compared"] or found["layers"]) * len(how["features"])
    minibatch = min(how["minibatch"], images)
    tasks = max(1, images // minibatch)
    raw = 8.0 * tasks * layers * minibatch * (minibatch + 1) / 2
    name = "grams.zarr"
    there = raw if done else size_of(plan.results / step.dataset / step.network / name)
    speed = preflight.speed(plan, step)
    rate = speed.get("images_per_second")
    return Cost(
        step,
        (Store(name, raw, raw, there),),
        images,
        tasks,
        GRAM * images / rate if rate else None,
        grams.memory_need(found["parameters"], found["largest"], minibatch, layers, (size[0], size[1])),
        _rate(speed),
    )


def _sight(plan: Plan, step: Step, splits: Splits, done: bool) -> Cost:
    """How often the images go through the network depends on its skips, which are found on the way."""
    assert step.dataset is not None
    how = step.settings
    images = min(splits[step.dataset][how["split"]], how["images"])
    return Cost(step, (), images, max(1, -(-images // how["minibatch"])), None, None)


def _probes(plan: Plan, step: Step, splits: Splits, done: bool) -> Cost:
    """Features of images that are not extracted take a forward; those of others are read."""
    assert step.network is not None and step.dataset is not None
    how, size = step.settings["probes"], plan.step("ingest", step.dataset).settings["size"]
    dataset = plan.config.datasets[step.dataset]
    wanted = {how[key] for key in ("fit", "choose", "test") if how[key] is not None}
    counts = {split: min(splits[step.dataset][split], how["images"] or splits[step.dataset][split]) for split in wanted}
    images, computed = sum(counts.values()), sum(counts.values()) - counts.get(dataset.dissect.split, 0)
    found = preflight.found(plan, step)
    infos = [LayerInfo(**{**layer, "shape": tuple(layer["shape"])}) for layer in found["layers"]]
    vectors = sum(info.shape[0] * len(probes_tasks.vectors_of(info, how["features"], how["grid"])) for info in infos)
    name, raw = "probe-features", 4.0 * images * vectors
    there = raw if done else size_of(plan.results / step.dataset / step.network / name)
    prepared = probes_tasks.Prepared(infos, found["parameters"], found["largest"])
    rate = preflight.speed(plan, step).get("images_per_second")
    return Cost(
        step,
        (Store(name, raw, raw, there),),
        images,
        -(-images // dataset.shard_images),
        computed / rate if rate else None,
        probes_tasks.forward_need(prepared, plan.networks[step.network], dataset.shard_images, (size[0], size[1])),
        f"{rate:.3g}" if rate else "",
    )


ESTIMATES = {
    "ingest": _ingest,
    "concepts": _concepts,
    "extract": _extract,
    "dissect": _dissect,
    "probes": _probes,
    "grams": _grams,
    "sight": _sight,
}


def _counted(plan: Plan, step: Step, splits: Splits) -> tuple[int, Any, tuple[int, int], Mapping[str, Any]]:
    """The images of the split, the data set, the size of its images, and the concepts' names by category."""
    assert step.dataset is not None
    dataset = plan.config.datasets[step.dataset]
    size = plan.step("ingest", step.dataset).settings["size"]
    images = splits[step.dataset][dataset.dissect.split]
    limit = plan.config.controls.images if (step.network or "").endswith(UNTRAINED) else None
    categories = concepts.wanted_categories(dataset, plan.config)
    return min(images, limit or images), dataset, (size[0], size[1]), categories


def _layers_there(plan: Plan, step: Step, names: Sequence[str]) -> dict[str, float]:
    """The bytes of a step's layers that are on the disk, by name, as far as an earlier extraction tells.

    One that was interrupted has noted which folders it fills, and not of which layers: each gets an equal part.
    """
    assert step.dataset is not None
    before = latest((plan.results / step.manifest).parent, step.stage)
    if before is not None and extract.same_layers(plan, before, step):
        layers = plan.results / step.dataset / "layers"
        return {layer["name"]: size_of(layers / layer["id"] / "activations.zarr") for layer in before.result["layers"]}
    folders = [folder for folder in stage.noted(plan, step) if not folder.endswith(".zarr")]  # those are inside
    begun = sum(size_of(plan.results / folder) for folder in folders)
    return dict.fromkeys(names, begun / len(names))


def _free(folder: Path) -> float:
    """Free bytes of the file system that a folder is on, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return float(shutil.disk_usage(there).free)


def _row(cost: Cost, workers: int, allowed: int) -> tuple[str, ...]:
    raw, expected = sum(s.raw for s in cost.stores), sum(s.expected for s in cost.stores)
    memory = "" if cost.memory is None else f"{(cluster.WORKER_BASE + cost.memory) / 1e9:.2f}"
    if cost.memory is not None and cluster.WORKER_BASE + cost.memory > allowed:
        memory += "!"
    spent = "done" if cost.done else "" if cost.seconds is None else _time(cost.seconds / workers)
    sizes = (_gb(raw), _gb(expected), _gb(sum(s.missing for s in cost.stores))) if cost.stores else ("", "", "")
    counts = (f"{cost.images:,}" if cost.images else "", cost.rate, spent, f"{cost.tasks:,}", memory)
    return (cost.step.name, *sizes, *counts)


def _layer(store: Store) -> tuple[str, ...]:
    name = f"  {store.name}" + {"pooled": " (pooled)", "none": " (not stored)"}.get(store.kept, "")
    return (name, _gb(store.raw), _gb(store.expected), _gb(store.missing), "", "", "", "", "")


def _aligned(row: tuple[str, ...], widths: list[int]) -> Iterator[str]:
    yield row[0].ljust(widths[0])
    yield from (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))


def _gb(count: float) -> str:
    value = count / 1e9
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 or not value else "<0.001"


def _time(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
