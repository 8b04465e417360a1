"""The stage `dissect`: thresholds of units, IoU with every concept, labels; beside them the permuted control.

Writes, for every layer, shared by all networks with that layer,
    layers/<layer id>/dissect-<id>/thresholds.zarr  threshold (unit) float32, active (unit) int64: positions above it
    layers/<layer id>/dissect-<id>/iou.zarr         intersection (unit, concept) int64 · unit_area (unit) ·
                                                    concept_area (concept) · iou (unit, concept) float32
    layers/<layer id>/dissect-<id>/counts.zarr      the same counts by jackknife group and category
    layers/<layer id>/dissect-<id>/shown.zarr       of a layer that is not stored: what pictures of its units show
and for the network
    <network>/layers.json          where these are, by layer name, in execution order
    <network>/units.csv            the label of every unit
    <network>/units-permuted.csv   the same, with the label maps permuted over the images of each shard

Definitions: Bau et al., "Network Dissection" (CVPR 2017) and "Understanding the role of individual units in a deep
neural network" (PNAS 2020). See docs/dissection.md.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.core import AnyDataset
from pipeline.errors import MicrotomeError
from pipeline.networks.layer import LayerInfo
from pipeline.plan import job as stage
from pipeline.stages.extract import streaming as stream
from pipeline.storage.identity import digest
from pipeline.storage.lock import one_at_a_time
from pipeline.storage.manifest import Files, Manifest, latest, write_file
from pipeline.storage.tables import csv_bytes, number
from pipeline.workers.pool import check_memory, client, device, memory, run_tasks, workers_of

if TYPE_CHECKING:
    from kernels.dissection.iou import Counts, Labels
    from kernels.dissection.threshold import Bracket, Tail
    from pipeline.data.images import Images
    from pipeline.plan.step import Plan, Step
    from pipeline.stages.extract.streaming import Streamed
    from pipeline.storage.store import Reader

VERSION = 2
CODE = (
    "kernels",
    "pipeline/stages/dissect/stage.py",
    "pipeline/stages/dissect/streamed.py",
    "pipeline/data/listing.py",
    "pipeline/stages/extract/pictures.py",
    "pipeline/stages/extract/streaming.py",
)
SAMPLE_SHARDS = 4  # the first shards are a random sample of the images: where the thresholds probably lie
ACCUMULATOR_BYTES = 2 << 30  # counts that a worker holds at once; layers beyond that go through the images again
REMEDY = "lower `shard_images` of the data set, or count fewer concepts"
UNIT_COLUMNS = (
    "layer",
    "unit",
    "concept",
    "category",
    "iou",
    "iou_ceiling",
    "iou_held_out",
    "ci_low",
    "ci_high",
    "threshold",
    "activation_rate",
)


Arrays = dict[str, tuple[tuple[str, ...], np.ndarray]]  # of a store: dimensions and values by name
SHOWN = ("image", "map", "histogram", "low", "high")


def settings(dataset: AnyDataset, permuted: bool, control_images: int | None) -> dict[str, Any]:
    return {"dissect": dataset.dissect.resolved(), "permuted": permuted, "control_images": control_images}


@dataclass(frozen=True)
class Concepts:
    """The concepts that are counted, in columns, and where their label maps are.

    `numbers`, `names` and `place` have one entry a column; `place` is the index into `categories`, and `axis` that of
    each category on the store's category axis.
    """

    store: Path
    files: Files
    categories: tuple[str, ...]
    axis: tuple[int, ...]
    names: tuple[str, ...]
    numbers: tuple[int, ...]
    place: tuple[int, ...]

    def at(self, part: Iterable[Counted]) -> Concepts:
        """The same concepts with the files of some shards alone: a task carries no more."""
        chunks = (f"label_map/c/{one.shard}/{axis}/0/0" for one in part for axis in self.axis)
        names = ("zarr.json", "label_map/zarr.json", *chunks)
        return replace(self, files={name: self.files[name] for name in names if name in self.files})


@dataclass(frozen=True)
class Counted:
    """The images of one shard that count: their rows in the shard, jackknife groups, and whose labels each meets in
    the permuted control."""

    shard: int
    rows: np.ndarray
    group: np.ndarray
    partner: np.ndarray


@dataclass(frozen=True)
class Layer:
    """A layer as tasks name it."""

    name: str
    id: str
    store: Path
    files: Files
    shape: tuple[int, int, int]
    scale: float
    digest: str
    streamed: Streamed | None = None  # of a layer whose maps are not stored

    def at(self, part: Iterable[Counted]) -> Layer:
        """The same layer with the files of some shards alone: a task carries no more."""
        names = ("zarr.json", "activation/zarr.json", *(f"activation/c/{one.shard}/0/0/0" for one in part))
        return replace(self, files={name: self.files[name] for name in names if name in self.files})


@dataclass(frozen=True)
class Wanted:
    """One result per layer: true labels or permuted ones, over these shards, under this id.

    `thresholds` is the id of the thresholds alone, and `labels` that of what was counted for each category: what an
    earlier result with the same ones holds is taken from there.
    """

    layer: Layer
    permuted: bool
    counted: tuple[Counted, ...]
    thresholds: str
    labels: Mapping[str, str]
    id: str


def run(plan: Plan, step: Step) -> None:
    from pipeline.data.images import Images
    from pipeline.stages.dissect import streamed as dissect_streamed

    assert step.dataset is not None and step.network is not None
    began = stage.begin(plan, step)
    images = Images.of(plan, step)
    how = step.settings["dissect"]
    _, extracted = plan.parent(step, "extract")
    _, labelled = plan.parent(step, "concepts")
    folder = plan.results / step.dataset
    concepts = concepts_of(folder, labelled)
    size = (labelled.result["size"][0], labelled.result["size"][1])
    # A layer that is stored pooled has no maps.
    layers = [layer_of(plan, folder, e) for e in extracted.result["layers"] if e.get("store") != "pooled"]
    if not layers:
        raise MicrotomeError(f"{step.name}: every layer is stored pooled, which leaves none to dissect")
    counted = counted_images(images, how["split"], extracted.result["shards"], labelled.result["refused"])
    bound = step.settings["control_images"]
    few = [one for one in counted if one.shard in images.shards(how["split"], bound)] if bound else counted

    # Alone in its shard, an image has no other label map to meet.
    with_control = step.settings["permuted"] and any(len(one.rows) > 1 for one in few)
    wanted = []
    for layer in layers:
        thresholds = digest([VERSION, layer.digest, basis(counted), threshold_settings(layer, how, size)])
        wanted.append(want(layer, False, counted, thresholds, labelled, how))
        if with_control:
            wanted.append(want(layer, True, few, thresholds, labelled, how))
    homes = [one.layer.store.parent for one in wanted]
    stage.refers_to(
        plan, step, [*homes, *(home / f"dissect-{one.id}" for home, one in zip(homes, wanted, strict=True))]
    )
    with one_at_a_time(plan.scratch / f"{step.dataset}.dissect.lock"):
        # Two names of one output, a block and its last part say, are one layer with one result.
        missing = list({one.id: one for one in wanted if not finished(one)}.values())
        if missing:
            accumulator = min(ACCUMULATOR_BYTES, memory(plan.config.cluster) // 4)
            stored = [one for one in missing if one.layer.streamed is None]
            streamed = [one for one in missing if one.layer.streamed is not None]
            for one in stored:
                need = memory_need(one.layer, images.shard_images, size, concepts)
                check_memory(plan.config.cluster, need, f"{step.name}, layer {one.layer.name!r},", REMEDY)
            with client(plan.config.cluster, plan.scratch) as workers:
                known = {one.layer.id: found for one in missing if (found := earlier_threshold(one))}
                lacking = {one.layer.id: one.layer for one in stored if one.layer.id not in known}
                known |= find_thresholds(workers, step.name, lacking, counted, how, size)
                count = functools.partial(count_stored, workers, step.name, known, how)
                count_and_write(count, stored, known, concepts, how, accumulator)
                if streamed:
                    passes = dissect_streamed.Passes(plan, step, workers, images, extracted, counted, how, size)
                    lacking = {one.layer.id: one.layer for one in streamed if one.layer.id not in known}
                    known |= passes.thresholds(lacking)
                    count_and_write(passes.count(known), streamed, known, concepts, how, accumulator)
                    passes.remove()

    entries = {}
    files: Files = {}
    includes = {}
    for permuted, name in ((False, "units.csv"), (True, "units-permuted.csv")):
        rows: list[list[Any]] = []
        for one in wanted:
            if one.permuted == permuted:
                manifest = Manifest.read(manifest_of(one))
                includes[manifest_of(one).relative_to(plan.results).as_posix()] = manifest.digest
                rows += unit_rows(one, manifest, how)
                if not permuted:
                    entries[one.layer.name] = paths_of(one, folder)
        if rows:
            files |= write_file(folder / step.network, name, csv_bytes(UNIT_COLUMNS, rows))
        else:
            (folder / step.network / name).unlink(missing_ok=True)
    files |= write_file(folder / step.network, "layers.json", json.dumps(entries, indent=1).encode())
    result = {"images": sum(len(c.rows) for c in counted), "control_images": sum(len(c.rows) for c in few)}
    output = digest({"layers": list(includes.values()), "files": files})
    counted_now = {one.layer.id for one in missing}
    made = len(counted_now), len({layer.id for layer in layers})
    stage.finish(plan, step, began, output, files, result, includes, made=made)


def discard(plan: Plan, step: Step) -> list[Path]:
    """The files and folders that this step made, shared results of layers included."""
    assert step.dataset is not None and step.network is not None
    found = []
    before = latest((plan.results / step.manifest).parent, step.stage)
    for name in before.includes if before else ():
        path = plan.results / name
        found += [path, path.parent.parent / path.stem.replace(".", "-", 1)]
    return found


def concepts_of(folder: Path, labelled: Manifest) -> Concepts:
    columns = [
        (name, number, place)
        for place, category in enumerate(labelled.result["categories"])
        for name, number in zip(category["concepts"], category["numbers"], strict=True)
    ]
    return Concepts(
        store=folder / "concepts.zarr",
        files=stage.below("concepts.zarr", labelled.files),
        categories=tuple(category["name"] for category in labelled.result["categories"]),
        axis=tuple(category["place"] for category in labelled.result["categories"]),
        names=tuple(name for name, _, _ in columns),
        numbers=tuple(number for _, number, _ in columns),
        place=tuple(place for _, _, place in columns),
    )


def layer_of(plan: Plan, folder: Path, entry: Mapping[str, Any]) -> Layer:
    manifest = Manifest.read(plan.results / entry["manifest"])
    streamed = None
    if entry.get("store") == "none":
        info = LayerInfo(**{**entry["info"], "shape": tuple(entry["info"]["shape"])})
        home = folder / "layers" / entry["id"]
        streamed = stream.streamed(home, entry["id"], info, entry["scale"], entry["counted"])
    return Layer(
        name=entry["name"],
        id=entry["id"],
        store=folder / "layers" / entry["id"] / "activations.zarr",
        files=stage.below(streamed.store.name if streamed else "activations.zarr", manifest.files),
        shape=tuple(entry["shape"]),
        scale=entry["scale"],
        digest=manifest.digest,
        streamed=streamed,
    )


def counted_images(images: Images, split: str, shards: Iterable[int], refused: Iterable[str]) -> list[Counted]:
    """The images that count in each shard: valid, of the split, with label maps that were not refused."""
    from pipeline.data.listing import derangement, group

    image_id = images.image_ids()
    without = set(refused)
    counts = images.counted(split) & ~np.fromiter((name in without for name in image_id), bool, len(image_id))
    found = []
    for shard in shards:
        start, stop = images.range(shard)
        rows = np.flatnonzero(counts[start:stop])
        if len(rows):
            ids = image_id[start:stop][rows]
            found.append(Counted(shard, rows, group(ids), derangement(ids)))
    if not found:
        raise MicrotomeError(f"{images.store.parent.name}: no image of split {split!r} is left to dissect")
    return found


def basis(counted: Iterable[Counted]) -> str:
    """The id of a choice of images, with their groups and partners."""
    return digest([[one.shard, *(part.tolist() for part in (one.rows, one.group, one.partner))] for one in counted])


def threshold_settings(layer: Layer, how: Mapping[str, Any], size: tuple[int, int]) -> list[Any]:
    return [how["quantile"], how["border"], list(counted_size(layer, how, size))]


def counted_size(layer: Layer, how: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, int]:
    """The size at which positions are counted for thresholds: that of the label maps, or the layer's own."""
    return size if how["positions"] == "upsampled" else layer.shape[1:]


def want(
    layer: Layer,
    permuted: bool,
    counted: Iterable[Counted],
    thresholds: str,
    labelled: Manifest,
    how: Mapping[str, Any],
) -> Wanted:
    """The result for a layer, with the id of all it depends on: activations, images, label maps, settings."""
    counted = tuple(one for one in counted if len(one.rows) > 1 or not permuted)
    common = [VERSION, thresholds, basis(counted), permuted]
    labels = {c["name"]: digest([*common, c["numbers"], c["contents"]]) for c in labelled.result["categories"]}
    return Wanted(layer, permuted, counted, thresholds, labels, digest([*common, list(labels.items()), dict(how)]))


def manifest_of(one: Wanted) -> Path:
    return one.layer.store.parent / "done" / f"dissect.{one.id}.json"


def finished(one: Wanted) -> bool:
    return manifest_of(one).exists()


def paths_of(one: Wanted, folder: Path) -> dict[str, str]:
    """An entry of layers.json: paths relative to the data set's folder."""
    own = one.layer.store.parent / f"dissect-{one.id}"
    shown = {"shown": (own / "shown.zarr").relative_to(folder).as_posix()} if one.layer.streamed else {}
    return shown | {
        "id": one.layer.id,
        "activations": one.layer.store.relative_to(folder).as_posix(),
        "thresholds": (own / "thresholds.zarr").relative_to(folder).as_posix(),
        "iou": (own / "iou.zarr").relative_to(folder).as_posix(),
    }


# Thresholds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """Thresholds of a layer's units as stored (float16, before the scale), and positions above them of how many."""

    threshold: np.ndarray
    active: np.ndarray
    positions: int


def find_thresholds(
    client: Any,
    label: str,
    layers: Mapping[str, Layer],
    counted: list[Counted],
    how: Mapping[str, Any],
    size: tuple[int, int],
) -> dict[str, Threshold]:
    """Find the exact top quantile of every unit: brackets from a sample, counts in them, again where they missed."""
    quantile, border = how["quantile"], how["border"]
    counted_at = {id: counted_size(layer, how, size) for id, layer in layers.items()}
    found: dict[str, Threshold] = {}
    sample = counted[:SAMPLE_SHARDS]
    tasks: list[tuple] = [(layer.at(sample), sample, counted_at[id], border, quantile) for id, layer in layers.items()]
    brackets: dict[str, tuple[Bracket, np.ndarray]] = {}
    for id, bracket in run_tasks(client, sample_layer, tasks, len(tasks), f"{label}: samples"):
        count = len(bracket.floor)
        brackets[id] = (bracket, np.arange(count))
        found[id] = Threshold(np.full(count, np.nan, np.float16), np.zeros(count, np.int64), 0)
    while brackets:
        tasks = [
            (layers[id].at(part), units, bracket, part, counted_at[id], border)
            for id, (bracket, units) in brackets.items()
            for part in runs(counted, client)
        ]
        tails: dict[str, Tail] = {}
        for id, tail in run_tasks(client, tail_layer, tasks, len(tasks), f"{label}: thresholds"):
            tails[id] = tails[id].merge(tail) if id in tails else tail
        for id, tail in tails.items():
            _, units = brackets.pop(id)
            result = tail.result(quantile)
            done = units[result.certified]
            found[id].threshold[done] = result.threshold[result.certified]
            found[id].active[done] = result.active[result.certified]
            found[id] = replace(found[id], positions=tail.positions)
            if not result.certified.all():
                brackets[id] = (tail.refine(quantile)[~result.certified], units[~result.certified])
    return found


def earlier_results(one: Wanted) -> Iterator[tuple[Path, Manifest]]:
    """Finished results for the same layer with the same thresholds: folder and manifest."""
    for path in sorted((one.layer.store.parent / "done").glob("dissect.*.json")):
        manifest = Manifest.read(path)
        if manifest.result["thresholds"] == one.thresholds:
            yield one.layer.store.parent / f"dissect-{manifest.id}", manifest


def earlier_threshold(one: Wanted) -> Threshold | None:
    """The thresholds of an earlier result, if there is one with these."""
    for folder, manifest in earlier_results(one):
        stored = result_store(folder, "thresholds.zarr", manifest)
        half = (stored["threshold"][:] / np.float32(stored.attrs["scale"])).astype(np.float16)
        return Threshold(half, stored["active"][:], stored.attrs["positions_counted"])
    return None


def result_store(folder: Path, name: str, manifest: Manifest) -> Reader:
    """One store of a dissect-<id> folder, to be read verified."""
    from pipeline.storage.store import Reader

    return Reader(folder / name, stage.below(f"{folder.name}/{name}", manifest.files))


def runs(counted: list[Counted], client: Any) -> Iterator[list[Counted]]:
    """Cut the shards into runs, some for every worker: one task merges the counts of its run before it sends them."""
    length = max(1, -(-len(counted) // (4 * workers_of(client))))
    return (counted[at : at + length] for at in range(0, len(counted), length))


def sample_layer(
    layer: Layer, sample: list[Counted], size: tuple[int, int], border: Any, quantile: float
) -> tuple[str, Bracket]:
    from kernels.dissection.threshold import sample_bracket

    maps = np.concatenate([activation(layer, one) for one in sample])
    return layer.id, sample_bracket(maps, size, border, quantile)


def tail_layer(
    layer: Layer, units: np.ndarray, bracket: Bracket, part: list[Counted], size: tuple[int, int], border: Any
) -> tuple[str, Tail]:
    from kernels.dissection.threshold import count_tail

    total = None
    for one in part:
        maps = activation(layer, one)
        if len(units) < maps.shape[1]:
            maps = np.ascontiguousarray(maps[:, units])
        tail = count_tail(maps, bracket, size, border, device=device())
        total = tail if total is None else total.merge(tail)
    assert total is not None
    return layer.id, total


def activation(layer: Layer, one: Counted) -> np.ndarray:
    """The maps (image, unit, y, x) float16 of the images of a shard that count."""
    from pipeline.storage.store import Reader

    array = Reader(layer.store, layer.files)["activation"]
    start = one.shard * array.chunks[0]
    maps = np.asarray(array[start : start + array.chunks[0]])
    return maps if len(one.rows) == len(maps) else maps[one.rows]


# IoU ------------------------------------------------------------------------------------------------------------------


def count_and_write(
    count: Callable[[list[Wanted], Concepts], tuple[dict[tuple[str, bool], Counts], dict[str, Arrays]]],
    missing: list[Wanted],
    thresholds: Mapping[str, Threshold],
    concepts: Concepts,
    how: Mapping[str, Any],
    accumulator: int,
) -> None:
    """Count intersections for every wanted result, a batch of layers at a time; write each when it is done.

    `count` gives the counts of a batch by (layer id, permuted), and the stores `shown.zarr` of layers that are not
    stored.
    """
    for batch in batches(missing, len(concepts.names), accumulator):
        known = {(one.layer.id, one.permuted): earlier_counts(one, concepts) for one in batch}
        rest = {name for one in batch for name in set(one.labels) - set(known[one.layer.id, one.permuted])}
        chosen = only(concepts, [name for name in concepts.categories if name in rest])
        # Areas come with any count; where all categories are known there is nothing to count.
        totals, shown = count(batch, chosen) if rest else ({}, {})
        for w in batch:
            key = w.layer.id, w.permuted
            sources = known[key] | (dict.fromkeys(chosen.categories, (totals[key], chosen)) if rest else {})
            counted = [name for name in w.labels if name not in known[key]]
            pictures = None
            if w.layer.streamed is not None and not w.permuted:
                pictures = earlier_shown(w) or shown[w.layer.id]
            write_layer(w, thresholds[w.layer.id], joined(concepts, sources), concepts, how, counted, pictures)


def count_stored(
    client: Any,
    label: str,
    thresholds: Mapping[str, Threshold],
    how: Mapping[str, Any],
    batch: list[Wanted],
    chosen: Concepts,
) -> tuple[dict[tuple[str, bool], Counts], dict[str, Arrays]]:
    """The counts of layers whose maps are stored."""
    shards = {one.shard: one for wanted in batch for one in wanted.counted}
    tasks = []
    for part in runs(list(shards.values()), client):
        wanted = [
            (
                w.layer.at(part),
                w.permuted,
                {one.shard for one in w.counted} & {one.shard for one in part},
                thresholds[w.layer.id].threshold,
            )
            for w in batch
        ]
        tasks.append((wanted, part, chosen.at(part), how["border"]))
    totals: dict[tuple[str, bool], Counts] = {}
    for counts in run_tasks(client, count_run, tasks, len(tasks), f"{label}: IoU"):
        for key, part in counts.items():
            totals[key] = add(totals[key], part) if key in totals else part
    return totals, {}


def only(concepts: Concepts, categories: list[str]) -> Concepts:
    """The concepts of some categories."""
    places = [concepts.categories.index(name) for name in categories]
    columns = [at for at, place in enumerate(concepts.place) if place in places]
    return replace(
        concepts,
        categories=tuple(categories),
        axis=tuple(concepts.axis[place] for place in places),
        names=tuple(concepts.names[at] for at in columns),
        numbers=tuple(concepts.numbers[at] for at in columns),
        place=tuple(places.index(concepts.place[at]) for at in columns),
    )


def earlier_counts(one: Wanted, concepts: Concepts) -> dict[str, tuple[Counts, Concepts]]:
    """Counts of earlier results, by category, for the categories that were counted there on the same label maps."""
    found: dict[str, tuple[Counts, Concepts]] = {}
    for folder, manifest in earlier_results(one):
        there = manifest.result["labels"]
        names = [name for name, id in one.labels.items() if there.get(name) == id and name not in found]
        if names:
            stored = result_store(folder, "counts.zarr", manifest)
            # The store's own order: a manifest gives its entries sorted by name.
            categories, place = tuple(stored.attrs["categories"]), tuple(stored.attrs["category_of_concept"])
            source = replace(concepts, categories=categories, axis=(), names=(), numbers=(), place=place)
            found |= dict.fromkeys(names, (read_counts(stored), source))
    return found


def earlier_shown(one: Wanted) -> Arrays | None:
    """What pictures show of a layer that is not stored, as an earlier result with the same thresholds has it."""
    for folder, manifest in earlier_results(one):
        if f"{folder.name}/shown.zarr/zarr.json" in manifest.files:
            stored = result_store(folder, "shown.zarr", manifest)
            return {name: (stored[name].metadata.dimension_names, np.asarray(stored[name][:])) for name in SHOWN}
    return None


def read_counts(stored: Reader) -> Counts:
    from kernels.dissection.iou import Counts

    return Counts(**{item.name: np.asarray(stored[item.name][:]) for item in fields(Counts)})


def joined(concepts: Concepts, sources: Mapping[str, tuple[Counts, Concepts]]) -> Counts:
    """Counts with all concepts in order, each category from its source; areas and pixels are in every source."""
    from kernels.dissection.iou import Counts

    columns, places = [], []
    for name in concepts.categories:
        counts, source = sources[name]
        place = source.categories.index(name)
        own = np.flatnonzero(np.asarray(source.place) == place)
        columns.append((counts.intersection[:, :, own], counts.concept_area[:, own]))
        places.append((counts.unit_area_in_category[:, :, place], counts.pixels_in_category[:, place]))
    counts, _ = next(iter(sources.values()))
    return Counts(
        intersection=np.concatenate([part for part, _ in columns], axis=2),
        unit_area=counts.unit_area,
        unit_area_in_category=np.stack([part for part, _ in places], axis=2),
        concept_area=np.concatenate([part for _, part in columns], axis=1),
        pixels=counts.pixels,
        pixels_in_category=np.stack([part for _, part in places], axis=1),
    )


def memory_need(layer: Layer, images: int, size: tuple[int, int], concepts: Concepts) -> int:
    """Bytes of a task: maps as stored and decompressed, the counts of thresholds or of IoU, and prepared label maps."""
    from kernels.dissection.iou import GROUPS

    units, height, width = layer.shape
    maps = 2 * 3 * images * units * height * width
    labels = 2 * 3 * images * size[0] * size[1] * len(concepts.categories)
    return maps + labels + 2 * 8 * units * max(2049, GROUPS * len(concepts.names))


def counting_need(units: int, concepts: Concepts, images: int, size: tuple[int, int]) -> int:
    """Bytes of counting so many units of a batch together beside a forward: their counts, twice, and label maps of a
    shard."""
    from kernels.dissection.iou import GROUPS

    return 16 * GROUPS * units * len(concepts.names) + 6 * images * size[0] * size[1] * len(concepts.categories)


def batches(missing: list[Wanted], concepts: int, accumulator: int) -> Iterator[list[Wanted]]:
    """Layers whose counts fit into `accumulator` bytes together; one that does not fit stands alone."""
    from kernels.dissection.iou import GROUPS

    batch: list[Wanted] = []
    held = 0
    for wanted in missing:
        size = 8 * GROUPS * wanted.layer.shape[0] * concepts
        if batch and held + size > accumulator:
            yield batch
            batch, held = [], 0
        batch.append(wanted)
        held += size
    yield batch


def count_run(
    wanted: list[tuple[Layer, bool, set[int], np.ndarray]], part: list[Counted], concepts: Concepts, border: Any
) -> dict[tuple[str, bool], Counts]:
    """On a worker: the counts of some shards, merged, by (layer id, permuted)."""
    from kernels.dissection.iou import GROUPS, Counts, count_shard
    from pipeline.storage.store import Reader

    label_maps = Reader(concepts.store, concepts.files)["label_map"]
    totals: dict[tuple[str, bool], Counts] = {}
    for one in part:
        labels = labels_of(concepts, label_maps, one)
        read: dict[str, np.ndarray] = {}
        for layer, permuted, shards, threshold in wanted:
            if one.shard not in shards:
                continue
            if layer.id not in read:
                read = {layer.id: activation(layer, one)}
            shard = count_shard(
                read[layer.id],
                threshold,
                labels,
                one.group,
                border,
                permutation=one.partner if permuted else None,
                device=device(),
            )
            key = layer.id, permuted
            if key not in totals:
                totals[key] = Counts.zeros(GROUPS, len(threshold), len(concepts.names), len(concepts.categories))
            totals[key].add(shard)
    return totals


def labels_of(concepts: Concepts, label_maps: Any, one: Counted) -> Labels:
    """The label maps of the images of a shard that count, prepared for counting."""
    from kernels.dissection.iou import label_columns

    step = label_maps.chunks[0]
    start = one.shard * step
    maps = np.stack([np.asarray(label_maps[start : start + step, axis]) for axis in concepts.axis], axis=1)
    return label_columns(maps[one.rows], concepts.numbers, concepts.place)


def add(total: Counts, part: Counts) -> Counts:
    for one in fields(total):
        mine = getattr(total, one.name)
        mine += getattr(part, one.name)
    return total


def write_layer(
    wanted: Wanted,
    found: Threshold,
    counts: Counts,
    concepts: Concepts,
    how: Mapping[str, Any],
    counted: list[str],
    shown: Arrays | None = None,
) -> None:
    """Write the result of one layer; `counted` are the categories that were counted now, for its provenance.

    `shown` is what pictures show of a layer that is not stored.
    """
    from kernels.dissection.iou import iou
    from pipeline.storage.store import write_whole

    layer = wanted.layer
    folder = layer.store.parent / f"dissect-{wanted.id}"
    attrs = dict(how) | {
        "labels": "permuted" if wanted.permuted else "true",
        "images": sum(len(one.rows) for one in wanted.counted),
        "shards": len(wanted.counted),
    }
    category = np.array([concepts.categories[place] for place in concepts.place], dtype=object)
    unit, concept, group = ("unit",), ("concept",), ("group",)
    files = stage.within(
        f"{folder.name}/thresholds.zarr",
        write_whole(
            folder / "thresholds.zarr",
            {
                "threshold": (unit, found.threshold.astype(np.float32) * np.float32(layer.scale)),
                "active": (unit, found.active),
            },
            attrs | {"scale": layer.scale, "positions_counted": found.positions},
        ),
    )
    files |= stage.within(
        f"{folder.name}/iou.zarr",
        write_whole(
            folder / "iou.zarr",
            {
                "intersection": (unit + concept, counts.intersection.sum(0)),
                "unit_area": (unit, counts.unit_area.sum(0)),
                "concept_area": (concept, counts.concept_area.sum(0)),
                "iou": (unit + concept, iou(counts, concepts.place, how["union"]).astype(np.float32)),
                "concept": (concept, np.array(concepts.names, dtype=object)),
                "concept_id": (concept, np.array(concepts.numbers, np.int64)),
                "category": (concept, category),
            },
            attrs | {"pixels": int(counts.pixels.sum())},
            coordinates=["concept_id", "category"],
        ),
    )
    files |= stage.within(
        f"{folder.name}/counts.zarr",
        write_whole(
            folder / "counts.zarr",
            {
                "intersection": (group + unit + concept, counts.intersection),
                "unit_area": (group + unit, counts.unit_area),
                "unit_area_in_category": ((*group, *unit, "category"), counts.unit_area_in_category),
                "concept_area": (group + concept, counts.concept_area),
                "pixels": (group, counts.pixels),
                "pixels_in_category": ((*group, "category"), counts.pixels_in_category),
            },
            attrs | {"categories": list(concepts.categories), "category_of_concept": list(concepts.place)},
        ),
    )
    if shown is not None:
        written = write_whole(folder / "shown.zarr", shown, {"scale": layer.scale})
        files |= stage.within(f"{folder.name}/shown.zarr", written)
    Manifest(
        stage="dissect",
        id=wanted.id,
        digest=digest(files),
        files=files,
        result={"thresholds": wanted.thresholds, "labels": dict(wanted.labels)},
        provenance=stage.provenance() | {"counted": counted},
    ).write(manifest_of(wanted))


# Labels of units ------------------------------------------------------------------------------------------------------


def unit_rows(one: Wanted, manifest: Manifest, how: Mapping[str, Any]) -> list[list[Any]]:
    """The rows of units.csv for one layer, read back from its verified stores."""
    from kernels.dissection.labels import label_units

    folder = one.layer.store.parent / f"dissect-{one.id}"
    names_of = ("thresholds.zarr", "counts.zarr", "iou.zarr")
    thresholds, stored, result = (result_store(folder, name, manifest) for name in names_of)
    counts = read_counts(stored)
    labels = label_units(counts, np.asarray(stored.attrs["category_of_concept"]), how["union"])
    names, categories = result["concept"][:], result["category"][:]
    threshold = thresholds["threshold"][:]
    rate = counts.unit_area.sum(0) / counts.pixels.sum()
    rows = []
    for unit in range(len(threshold)):
        kept = labels.iou[unit] > how["min_iou"]
        best = labels.column[unit]
        rows.append(
            [
                one.layer.name,
                unit,
                names[best] if kept else "",
                categories[best] if kept else "",
                *map(number, (labels.iou[unit], labels.ceiling[unit], labels.held_out[unit])),
                *map(number, (labels.low[unit], labels.high[unit], threshold[unit], rate[unit])),
            ]
        )
    return rows
