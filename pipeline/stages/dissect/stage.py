"""The stage `dissect`: compute thresholds of units, IoU with every concept, labels, and the permuted control.

Writes, for every layer, shared by all networks with that layer,
    layers/<layer id>/dissect-<id>/thresholds.zarr  threshold (unit) float32, active (unit) int64: positions above it
    layers/<layer id>/dissect-<id>/iou.zarr         intersection (unit, concept) int64 · unit_area (unit) ·
                                                    concept_area (concept) · iou (unit, concept) float32
    layers/<layer id>/dissect-<id>/counts.zarr      the same counts by jackknife group and category
    layers/<layer id>/dissect-<id>/shown.zarr       for a streamed layer: data for pictures of its units
and for the network
    <network>/layers.json          paths of these, by layer name, in execution order
    <network>/units.csv            the label of every unit
    <network>/units-permuted.csv   the same, with the label maps permuted over the images of each shard

Definitions: Bau et al., "Network Dissection" (CVPR 2017) and "Understanding the role of individual units in a deep
neural network" (PNAS 2020). See docs/dissection.md.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.base import UNTRAINED
from pipeline.errors import MicrotomeError
from pipeline.networks.prepare import Prepared, forward_need
from pipeline.plan import inspected
from pipeline.plan import stage as plan
from pipeline.plan.cost import Cost, rate_of
from pipeline.plan.counted import Counted
from pipeline.plan.job import Job
from pipeline.plan.stage import Draft, PageModule, Stage
from pipeline.plan.step import Key, Step
from pipeline.stages.concepts.results import Labelled
from pipeline.stages.dissect.intersections import (
    ACCUMULATOR_BYTES,
    batches,
    count_stored,
    counting_need,
    joined,
    memory_need,
    only,
)
from pipeline.stages.dissect.results import (
    UNIT_COLUMNS,
    Arrays,
    Dissected,
    earlier_counts,
    earlier_shown,
    earlier_threshold,
    unit_rows,
    write_layer,
)
from pipeline.stages.dissect.settings import Method, Settings
from pipeline.stages.dissect.thresholds import find_thresholds
from pipeline.stages.dissect.work import (
    VERSION,
    Concepts,
    LayerResult,
    LayerSource,
    Threshold,
    concepts_of,
    counted_images,
    finished,
    layer_of,
    manifest_of,
    paths_of,
    thresholds_id,
    want,
)
from pipeline.stages.extract.results import Extracted
from pipeline.stages.extract.streaming import TAIL
from pipeline.storage.identity import digest
from pipeline.storage.lock import one_at_a_time
from pipeline.storage.manifest import Files, Manifest, write_file
from pipeline.storage.store import StoreRef
from pipeline.storage.tables import csv_bytes
from pipeline.workers import memory

if TYPE_CHECKING:
    from kernels.dissection.counts import Counts

CODE = (
    "kernels/dissection",
    "kernels/images",
    "pipeline/stages/dissect/intersections.py",
    "pipeline/stages/dissect/results.py",
    "pipeline/stages/dissect/settings.py",
    "pipeline/stages/dissect/stage.py",
    "pipeline/stages/dissect/streamed.py",
    "pipeline/stages/dissect/thresholds.py",
    "pipeline/stages/dissect/work.py",
    "pipeline/data/listing.py",
    "pipeline/stages/extract/pictures.py",
    "pipeline/stages/extract/streaming.py",
)
REMEDY = "lower `shard_images` of the data set, or count fewer concepts"
COUNTED = 3.8e-6, 0.6e-9  # CPU seconds to dissect a unit on an image: constant, and per position of the label map


def steps(draft: Draft) -> Iterator[plan.Wanted]:
    for data, name in draft.pairs(generators=True):
        if not draft.config.dissects(draft.networks[name], data):
            continue
        settings = Settings(
            dissect=Method.of(draft.config.datasets[data].dissect),
            permuted=not name.endswith(UNTRAINED),
            control_images=draft.config.controls.images,
        )
        parents = [draft.step("ingest", data), draft.step("concepts", data), draft.step("extract", data, name)]
        if draft.networks[name].streams:  # streamed layers are recomputed
            parents.append(draft.step("network", network=name))
        yield plan.Wanted(Key(data, name), settings, tuple(parents))


def run(job: Job[Settings]) -> None:
    from pipeline.stages.dissect.streamed import Passes

    job.begin()
    images, method = job.images, job.settings.dissect
    extracted, labels = Extracted.of(job.parent("extract")), job.parent("concepts")
    labelled = Labelled.of(labels)
    folder, size = job.dataset_folder, labelled.size
    concepts = concepts_of(StoreRef.of_manifest(folder, "concepts.zarr", labels.files), labelled)
    # Pooled layers have no maps.
    layers = [layer_of(job.results, folder, stored, method) for stored in extracted.layers if stored.store != "pooled"]
    if not layers:
        raise MicrotomeError(f"{job.name}: every layer is stored pooled, which leaves none to dissect")
    counted = counted_images(images, method.split, extracted.shards, labelled.refused)
    bound = job.settings.control_images
    few = [one for one in counted if one.shard in images.shards(method.split, bound)] if bound else counted

    # An image that is alone in its shard cannot swap label maps.
    with_control = job.settings.permuted and any(len(one.rows) > 1 for one in few)
    wanted = []
    for layer in layers:
        thresholds = thresholds_id(layer, counted, method, size)
        wanted.append(want(layer, False, counted, thresholds, labelled, method))
        if with_control:
            wanted.append(want(layer, True, few, thresholds, labelled, method))
    homes = [one.layer.folder for one in wanted]
    job.refers_to([*homes, *(home / f"dissect-{one.id}" for home, one in zip(homes, wanted, strict=True))])
    with one_at_a_time(job.scratch / f"{job.dataset}.dissect.lock"):
        # Two names of one output, for example a block and its last part, are one layer with one result.
        missing = list({one.id: one for one in wanted if not finished(one)}.values())
        if missing:
            accumulator = min(ACCUMULATOR_BYTES, memory.memory(job.cluster) // 4)
            stored = [one for one in missing if one.layer.streamed is None]
            streamed = [one for one in missing if one.layer.streamed is not None]
            for one in stored:
                need = memory_need(one.layer, images.shard_images, size, concepts)
                job.check_memory(need, REMEDY, f"{job.name}, layer {one.layer.name!r},")
            with job.workers() as workers:
                known = {one.layer.id: found for one in missing if (found := earlier_threshold(one))}
                lacking = {one.layer.id: one.layer for one in stored if one.layer.id not in known}
                known |= find_thresholds(workers, job.name, lacking, counted, method, size)
                count = functools.partial(count_stored, workers, job.name, known, method)
                count_and_write(count, stored, known, concepts, method, accumulator)
                if streamed:
                    passes = Passes(job, workers, extracted, counted, method, size)
                    lacking = {one.layer.id: one.layer for one in streamed if one.layer.id not in known}
                    known |= passes.thresholds(lacking)
                    count_and_write(passes.count(known), streamed, known, concepts, method, accumulator)
                    passes.remove()

    entries = {}
    files: Files = {}
    includes = {}
    for permuted, name in ((False, "units.csv"), (True, "units-permuted.csv")):
        rows: list[list[Any]] = []
        for one in wanted:
            if one.permuted == permuted:
                manifest = Manifest.read(manifest_of(one))
                includes[manifest_of(one).relative_to(job.results).as_posix()] = manifest.digest
                rows += unit_rows(one, manifest, method)
                if not permuted:
                    entries[one.layer.name] = paths_of(one, folder)
        if rows:
            files |= write_file(job.folder, name, csv_bytes(UNIT_COLUMNS, rows))
        else:
            (job.folder / name).unlink(missing_ok=True)
    files |= write_file(job.folder, "layers.json", json.dumps(entries, indent=1).encode())
    result = Dissected(images=sum(len(c.rows) for c in counted), control_images=sum(len(c.rows) for c in few))
    output = digest({"layers": list(includes.values()), "files": files})
    counted_now = {one.layer.id for one in missing}
    made = len(counted_now), len({layer.id for layer in layers})
    job.finish(output, files, result, includes, made=made)


def made(job: Job) -> list[Path]:
    """Return the files and folders of a dissection, including shared results of layers."""
    found = []
    before = job.before()
    for name in before.includes if before else ():
        path = job.results / name
        found += [path, path.parent.parent / path.stem.replace(".", "-", 1)]
    return found


def count_and_write(
    count: Callable[[list[LayerResult], Concepts], tuple[dict[tuple[str, bool], Counts], dict[str, Arrays]]],
    missing: list[LayerResult],
    thresholds: Mapping[str, Threshold],
    concepts: Concepts,
    method: Method,
    accumulator: int,
) -> None:
    """Count intersections for every wanted result, one batch of layers at a time; write each result when it is done.

    `count` returns a batch's counts by (layer id, permuted), and the stores `shown.zarr` of streamed layers.
    """
    for batch in batches(missing, len(concepts.names), accumulator):
        known = {(one.layer.id, one.permuted): earlier_counts(one, concepts) for one in batch}
        rest = {name for one in batch for name in set(one.labels) - set(known[one.layer.id, one.permuted])}
        chosen = only(concepts, [name for name in concepts.categories if name in rest])
        # Every count also gives the areas; if all categories are known, there is nothing to count.
        totals, shown = count(batch, chosen) if rest else ({}, {})
        for w in batch:
            key = w.layer.id, w.permuted
            sources = known[key] | (dict.fromkeys(chosen.categories, (totals[key], chosen)) if rest else {})
            counted = [name for name in w.labels if name not in known[key]]
            pictures = None
            if w.layer.streamed is not None and not w.permuted:
                pictures = earlier_shown(w) or shown[w.layer.id]
            write_layer(w, thresholds[w.layer.id], joined(concepts, sources), concepts, method, counted, pictures)


def owned(manifest: Manifest, path: Path) -> set[Path]:
    """Return a dissection's layers, and its results in them."""
    results = path.parents[3]
    found = set()
    for name in manifest.includes:
        layer, stem = (results / name).parent.parent, Path(name).stem
        found |= {layer, layer / stem.replace(".", "-", 1)}
    return found


def unreferenced(results: Path, used: set[Path]) -> Iterator[Path]:
    """Yield dissections that no network includes, of the layers that one does: a layer goes as a whole."""
    for part in sorted(results.glob("*/layers/*/dissect-*/")):
        if part.parent in used and part not in used:
            yield part


def explains(step: Step) -> str:
    if any("/network." in parent for parent in step.parents):
        return "streamed layers counted in a forward pass, the others from the stores"
    return "counted from the stores, without a forward pass"


def cost(job: Job, done: bool) -> Cost:
    counted, dataset, network = Counted.of(job), job.dataset_spec, job.network_spec
    height, width = counted.label_map_size
    found = inspected.found(job)
    layers = [layer for layer in found.layers if network.kept(layer.name) != "pooled"]
    units = sum(layer.shape[0] for layer in layers)
    constant, position = COUNTED
    names = tuple(name for concept_names in counted.categories.values() for name in concept_names)
    nowhere = StoreRef(Path(), {})
    concepts = Concepts(nowhere, tuple(counted.categories), (), names, (), ())
    need = max(
        memory_need(
            LayerSource(layer.name, "", nowhere, layer.shape, 1.0, ""),
            dataset.shard_images,
            (height, width),
            concepts,
        )
        for layer in layers
    )
    seconds: float | None = counted.images * units * (constant + position * height * width)
    shown = ""
    if streamed := [layer for layer in layers if network.kept(layer.name) == "none"]:
        speed = inspected.speed(job)
        rate, shown = speed.get("images_per_second"), rate_of(speed)
        seconds = seconds + counted.images / rate if rate and seconds is not None else None
        prepared = Prepared([], found.parameters, found.largest)
        # A worker counts as many layers together as fit its memory, with true and with permuted labels.
        room = min(ACCUMULATOR_BYTES, memory.memory(job.cluster) // 4)
        each = [layer.shape[0] for layer in streamed]
        one = counting_need(1, replace(concepts, categories=()), 0, (0, 0)) // 2
        together = max(max(each), min(2 * sum(each), room // max(1, one)))
        counting = counting_need(together, concepts, dataset.shard_images, (height, width))
        maps = 12 * network.numerics.micro_batch * max(math.prod(layer.shape) for layer in streamed)
        merged = 3 * TAIL * sum(each)  # counters in int64, three copies
        need = max(need, maps + counting + merged + forward_need(prepared, network, counted.size))
    return Cost((), counted.images, counted.shards(dataset.shard_images), seconds, need, shown)


STAGE = Stage(
    name="dissect",
    version=VERSION,
    says="Dissect {wildcards.network} on {wildcards.dataset}",
    place="pair",
    steps=steps,
    run=run,
    settings=Settings,
    code=CODE,
    cost=cost,
    explains=explains,
    made=made,
    owned=owned,
    unreferenced=unreferenced,
    pages=(
        PageModule("pipeline.stages.dissect.page", 10, here=True),
        PageModule("pipeline.stages.dissect.compare_page", 20),
    ),
)
