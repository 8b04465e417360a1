"""The stage `extract`: fill the stores of all layers in one forward pass per (data set, network).

Writes, for whole shards that hold images of the wanted split,
    layers/<layer id>/activations.zarr  activation (image, unit, y, x) float16 = value / attrs["scale"] ·
                                        maximum, mean (image, unit) float32 · special (image, token, unit) float16 for
                                        class and register tokens
    <network>/logits.zarr               logits (image, class) float32
A shard that was not extracted is absent and reads as NaN. A layer that is stored pooled has everything but the maps,
which read as NaN. So do the maps of a streamed layer (`store: none`), whose thresholds are counted in the same forward
pass (`streaming`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.base import UNTRAINED
from pipeline.config.datasets import AnyDataset
from pipeline.config.networks import Network, Reading
from pipeline.config.patterns import fits
from pipeline.errors import nearest
from pipeline.networks.forward import scale_for
from pipeline.networks.layer import LayerInfo
from pipeline.networks.prepare import Prepared, forward_need
from pipeline.plan import inspected
from pipeline.plan.cost import SHRINKS, Cost, Store, rate_of
from pipeline.plan.counted import Counted
from pipeline.plan.job import Job
from pipeline.plan.stage import Draft, Stage, Wanted
from pipeline.plan.step import Key
from pipeline.stages.extract import replaced, streaming
from pipeline.stages.extract.counting import Counting
from pipeline.stages.extract.layers import (
    LayerStore,
    alike,
    holds,
    layer_of,
    logits_id,
    open_layer,
    open_logits,
    shard_id,
)
from pipeline.stages.extract.pictures import KEPT
from pipeline.stages.extract.results import Extracted, StoredLayer
from pipeline.stages.extract.settings import Settings, Tails
from pipeline.stages.extract.tasks import REMEDY, extract_block, memory_need, prepare_extraction
from pipeline.storage import manifest, provenance
from pipeline.storage.identity import digest
from pipeline.storage.lock import one_at_a_time
from pipeline.storage.manifest import Files, Manifest, remove_others
from pipeline.storage.object_storage import size_of
from pipeline.workers.tasks import run_tasks

if TYPE_CHECKING:
    from pipeline.data.images import Images
    from pipeline.storage.store import Ledger

VERSION = 1
CODE = (
    "kernels/images/grey.py",
    "kernels/images/whiten.py",
    "pipeline/networks/build.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/forward.py",
    "pipeline/networks/layer_id.py",
    "pipeline/networks/layers.py",
    "pipeline/networks/libraries",
    "pipeline/networks/positions.py",
    "pipeline/networks/prepare.py",
    "pipeline/networks/returned.py",
    "pipeline/stages/extract/counting.py",
    "pipeline/stages/extract/layers.py",
    "pipeline/stages/extract/results.py",
    "pipeline/stages/extract/settings.py",
    "pipeline/stages/extract/stage.py",
    "pipeline/stages/extract/streaming.py",
    "pipeline/stages/extract/tasks.py",
)
COARSE = 2.0**-16  # float16 has steps of 2^-24 there
STORED = 19e-9  # CPU seconds to keep, compress and write one value of a layer


def steps(draft: Draft) -> Iterator[Wanted]:
    for data, name in draft.pairs(generators=True):
        draft.summaries[data].require(data, draft.config.datasets[data].examined_split)
        limit = draft.config.controls.images if name.endswith(UNTRAINED) else None
        settings = settings_of(draft.networks[name], draft.config.datasets[data], limit)
        parents = draft.step("ingest", data), draft.step("network", network=name)
        yield Wanted(Key(data, name), settings, parents)


def settings_of(spec: Network, dataset: AnyDataset, limit: int | None) -> Settings:
    """Return the content of an extraction's id; `limit` bounds the images."""
    optional: dict[str, Any] = {} if spec.store == "full" else {"store": spec.store}
    if spec.streams:
        optional["tails"] = Tails.of(dataset.dissect.resolved(), dataset.label_map_size)
    return Settings(
        layers=spec.layers,
        **spec.reading.settings,
        preprocessing=spec.preprocessing,
        numerics=spec.numerics,
        split=dataset.examined_split,
        images=limit,
        **optional,
    )


def run(job: Job[Settings]) -> None:
    from pipeline.storage.store import Ledger, metadata_files, remove

    images, model, settings = job.images, job.model, job.settings
    replaced.keep(job)
    job.begin()
    (job.folder / "accuracy.csv").unlink(missing_ok=True)  # the report measures it again, from these logits and labels
    shards = images.shards(settings.split, settings.images)
    logits = job.folder / "logits.zarr"
    with one_at_a_time(job.scratch / f"{job.dataset}.extract.lock"), job.workers() as workers:
        task = model, images.size, settings.layers, VERSION
        (prepared,) = run_tasks(workers, prepare_extraction, [task], 1, f"{job.name}: layers")
        layers = [
            layer_of(job.dataset_folder, model.spec, prepared.ids[info.name], info, prepared.scales[info.name])
            for info in prepared.layers
        ]
        job.refers_to([layer.store.parent for layer in layers])
        layers = [open_layer(layer, images) for layer in alike(layers)]
        if prepared.classes is None:  # left by another network of this name
            remove(logits)
        else:
            open_logits(logits, images, prepared.classes)
        logits_ledger = Ledger(logits.with_suffix(".ledger"))
        tails = Counting(job, images, shards)
        made: set[int] = set()
        while True:
            # Two names of one output, for example a block and its last part, share one id and one store: full if either
            # asks for it.
            by_wish = sorted(layers, key=lambda layer: (not layer.pooled, layer.streamed))
            distinct = {layer.id: layer for layer in by_wish}
            ledgers = {id: Ledger(layer.store.with_suffix(".ledger")) for id, layer in distinct.items()}
            overflow = tails.open(workers, prepared, distinct.values())
            filled = [layer.store.parent for layer in layers] + [layer.store for layer in tails.layers.values()]
            job.refers_to(filled)
            tasks = []
            for block, members in tails.blocks.items() if not overflow else ():
                parts = []
                uncounted = tails.missing(block)
                for shard in members:
                    missing = [
                        layer
                        for id, layer in distinct.items()
                        if not holds(
                            ledgers[id], shard, shard_id(images, shard, layer.scale), layer.store, layer.pooled
                        )
                    ]
                    for layer in missing:
                        if str(shard) in ledgers[layer.id].entries:  # its files are about to change
                            remove_others(layer.store.parent / "done", "activations")
                    known = prepared.classes is None or logits_ledger.get(
                        str(shard), logits_id(images, shard, model, prepared.numerics), logits
                    )
                    head = None if known else logits
                    if missing or head or uncounted:
                        parts.append((tails.parts[shard], tails.shown[shard], missing, head))
                if parts:
                    tasks.append((model, images.store, block, parts, uncounted))
            if tasks:
                need = memory_need(distinct.values(), prepared, model.spec, images.shard_images, images.size)
                need += streaming.memory_need(tails.layers.values(), model.spec.numerics.micro_batch)
                job.check_memory(need, REMEDY)
            with job.finite(images):
                for done in run_tasks(workers, extract_block, tasks, len(tasks), job.name, REMEDY):
                    for one in done.shards:
                        made.add(one.shard)
                        for id, layer in distinct.items():
                            if id in one.files:
                                made_from = shard_id(images, one.shard, layer.scale)
                                facts = {"pooled": True} if layer.pooled else {}
                                ledgers[id].record(str(one.shard), made_from, one.files[id], **facts)
                        for id, value in one.overflow.items():
                            overflow[id] = max(overflow.get(id, 0.0), value)
                        if "" in one.files:
                            logits_ledger.record(
                                str(one.shard), logits_id(images, one.shard, model, prepared.numerics), one.files[""]
                            )
                    tails.record(done)
            if not overflow:
                break
            # Some values exceed the headroom: extract those layers again, at a scale that holds all values.
            layers = [
                open_layer(replace(layer, scale=scale_for(overflow[layer.id])), images)
                if layer.id in overflow
                else layer
                for layer in layers
            ]
    described = [finish_layer(job, layer, images, shards, ledgers[layer.id], tails) for layer in layers]
    files = {}
    if prepared.classes is not None:
        files = manifest.within("logits.zarr", logits_ledger.files(map(str, shards)))
    output = digest({"layers": [[layer.name, layer.digest] for layer in described], "logits": files})
    if prepared.classes is not None:
        files |= manifest.within("logits.zarr", metadata_files(logits))
    counted = {"forward_bytes": forward_need(prepared, model.spec, images.size)} if tails.layers else {}
    result = Extracted(layers=described, shards=shards, **counted)
    includes = {layer.manifest: layer.digest for layer in described}
    job.finish(output, files, result, includes, made=(len(made), len(shards)))


def pending(job: Job[Settings]) -> tuple[int, int]:
    """Count the shards that a run would put through the network now, and all of them, among the ingested images.

    The layers are known if the last extraction read the same weights in the same way; otherwise all shards are an upper
    bound.
    """
    from pipeline.storage.store import Ledger

    images, model = job.images, job.model
    shards = images.shards(job.settings.split, job.settings.images)
    before = job.before()
    if before is None or not _same_layers(job, before):
        return len(shards), len(shards)
    known = []
    tails = Counting(job, images, shards)
    uncounted: set[int] = set()
    for layer in Extracted.of(before).layers:
        store = layer.folder(job.dataset_folder) / "activations.zarr"
        kept = model.spec.kept(layer.name)
        known.append((layer.scale, kept != "full", store, Ledger(store.with_suffix(".ledger"))))
        if kept == "none":
            info = LayerInfo(layer.name, layer.shape, "map", 0, "", "")  # the store of tails needs only the shape
            if not tails.known(LayerStore(layer.id, store, info, layer.scale, True, streamed=True)):
                return len(shards), len(shards)
    for block, members in tails.blocks.items():
        if tails.missing(block):
            uncounted.update(members)
    missing = [
        shard
        for shard in shards
        if shard in uncounted
        or not all(
            holds(ledger, shard, shard_id(images, shard, scale), store, pooled)
            for scale, pooled, store, ledger in known
        )
    ]
    return len(missing), len(shards)


def _same_layers(job: Job, before: Manifest) -> bool:
    """Return whether an earlier extraction had this one's layers; the network may not exist yet."""
    decisive = ("version", "layers", *Reading.model_fields, "preprocessing", "numerics")
    try:
        model = job.model
    except FileNotFoundError:
        return False
    return model.sha256 in before.parents.values() and all(
        before.settings.get(key) == job.identity.get(key) for key in decisive
    )


def made(job: Job) -> list[Path]:
    """Return the files and folders of an extraction, including shared layers."""
    found = [job.folder / "logits.zarr", job.folder / "logits.ledger"]
    before = job.before()
    for layer in Extracted.of(before).layers if before else ():
        own = layer.folder(job.dataset_folder)
        found += [own / "activations.zarr", own / "activations.ledger", *(own / "done").glob("activations.*.json")]
        found += sorted(own.glob("tails-*"))
    return found


def owned(manifest: Manifest, path: Path) -> set[Path]:
    """Return an extraction's layers, and their counted tails."""
    results, found = path.parents[3], set()
    for name in manifest.includes:
        found.add((results / name).parent.parent)
        if (results / name).exists() and (tails := Manifest.read(results / name).result.get("tails")):
            found.add((results / name).parent.parent / f"{tails}.zarr")
    return found


def unreferenced(results: Path, used: set[Path]) -> Iterator[Path]:
    """Yield layers that no network includes, and in the others, tails that none includes.

    Also yield kept results of earlier weights that are incomplete or that `repair` dropped; all others stay.
    """
    for layer in sorted(results.glob("*/layers/*/")):
        if layer not in used:
            yield layer
        else:
            yield from (tail for tail in sorted(layer.glob("tails-*.zarr/")) if tail not in used)
    yield from (home for home in sorted(results.glob("*/*/before/*/")) if not list(home.glob("done/before.*.json")))


def finish_layer(
    job: Job, layer: LayerStore, images: Images, shards: list[int], ledger: Ledger, tails: Counting
) -> StoredLayer:
    """Write the manifest of a layer's store, which all networks with this prefix share; return its entry."""
    from pipeline.storage.store import metadata_files

    files = ledger.files(map(str, shards))
    kept = "none" if layer.streamed else "pooled"
    wish = [kept] if layer.pooled else []
    if layer.pooled:
        files = {name: value for name, value in files.items() if not name.startswith("activation/")}
    made_of = {shard: shard_id(images, shard, layer.scale) for shard in shards}
    contents: dict[str, Any] = {"layer": layer.id, "files": files}
    counted: Files = {}
    extra: dict[str, Any] = {}
    if layer.streamed:
        # Unstored maps are identified by what they would be computed from: the tails depend on a sample.
        contents |= {"store": kept, "shards": made_of}
        one = tails.layers[layer.id]
        wish.append(one.store.stem)
        counted = tails.files(one)
        extra = {"tails": one.store.stem, "counted": tails.settings, "info": vars(layer.info)}
    output = digest(contents)
    id = digest([layer.id, images.count, made_of, *wish])
    path = layer.store.parent / "done" / f"activations.{id}.json"
    Manifest(
        stage="activations",
        id=id,
        digest=output,
        files=manifest.within("activations.zarr", files | metadata_files(layer.store)) | counted,
        result={"shards": shards, "scale": layer.scale} | ({"tails": extra["tails"]} if extra else {}),
        provenance=provenance.provenance(),
    ).write(path)
    if layer.pooled:
        extra["store"] = kept
    elif coarse := coarse_units(job, layer, files, shards):
        extra["coarse"] = coarse
    return StoredLayer(
        name=layer.name,
        id=layer.id,
        shape=layer.info.shape,
        scale=layer.scale,
        manifest=path.relative_to(job.results).as_posix(),
        digest=output,
        **extra,
    )


def coarse_units(job: Job, layer: LayerStore, files: Files, shards: Sequence[int]) -> list[int]:
    """Return the units of a stored layer of which float16 holds fewer than 8 bits at the layer's scale; say so.

    Units whose largest value of every image is 0 are left out.
    """
    import numpy as np

    from pipeline.storage.store import Reader

    stored, largest = Reader(layer.store, files)["maximum"], np.zeros(layer.info.shape[0])
    for shard in shards:
        largest = np.maximum(largest, np.abs(stored[slice(*job.images.range(shard))]).max(0))
    found = np.flatnonzero((largest > 0) & (largest < layer.scale * COARSE)).tolist()
    if found:
        named = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
        inspected.say(
            f"{job.name}: layer {layer.name!r} has one scale, {layer.scale:g}, and fewer than 8 bits of unit {named} "
            f"are stored ({len(found)} of {len(largest)} units): their values and thresholds are coarse"
        )
    return found


def cost(job: Job, done: bool) -> Cost:
    counted, dataset, network = Counted.of(job), job.dataset_spec, job.network_spec
    found = inspected.found(job)
    there = {} if done else _layers_there(job, [info.name for info in found.layers])
    tasks = counted.shards(dataset.shard_images)
    images = tasks * dataset.shard_images  # shards are whole
    stores, layers = [], []
    for info in found.layers:
        units, height, width = info.shape
        kept = network.kept(info.name)
        layers.append(LayerStore("", Path(), info, 1.0, kept != "full", streamed=kept == "none"))
        all_maps = 2 * images * units * height * width
        maps = all_maps if kept == "full" else 0
        beside = images * units * (2 * info.special + 8)
        if kept == "none":
            beside += units * (streaming.TAIL * min(tasks, streaming.BLOCKS) + 2 * KEPT * height * width)
        expected = maps * SHRINKS["maps"] + beside
        stored = expected if done else there.get(info.name, 0)
        saved = max(0, all_maps - beside) if kept == "none" else 0
        stores.append(Store(info.name, maps + beside, expected, stored, kept, saved))
    values = sum(store.raw for store in stores) / 2
    speed = inspected.speed(job)
    rate = speed.get("images_per_second")
    prepared = Prepared(found.layers, found.parameters, found.largest)
    return Cost(
        tuple(stores),
        counted.images,
        tasks,
        images / rate + values * STORED if rate else None,
        memory_need(layers, prepared, network, dataset.shard_images, counted.size),
        rate_of(speed),
    )


def _layers_there(job: Job, names: Sequence[str]) -> dict[str, float]:
    """Return the bytes of the layers on disk, by name, as far as an earlier extraction tells.

    An interrupted one has noted the folders that it fills, but not their layers: each gets an equal part.
    """
    before = job.before()
    if before is not None and _same_layers(job, before):
        layers = Extracted.of(before).layers
        return {layer.name: size_of(layer.folder(job.dataset_folder) / "activations.zarr") for layer in layers}
    folders = [folder for folder in job.noted() if not folder.endswith(".zarr")]  # the others are inside these
    begun = sum(size_of(job.results / folder) for folder in folders)
    return dict.fromkeys(names, begun / max(1, len(names)))


def check(job: Job) -> Iterator[str]:
    """Yield problems with a network's key `store`, now that its layers are known."""
    if job.is_control:
        return
    network, found = job.network_spec, inspected.found(job)
    names = [layer.name for layer in found.layers]
    who = f"network {job.network!r} on {job.dataset!r}"
    if found.alone and network.numerics.micro_batch == 1:
        yield (
            f"{who}, numerics.micro_batch: it cannot take one image alone ({found.alone}); look for `squeeze()` "
            "without a dimension in its forward, or give a larger `micro_batch`"
        )
    entries = {} if isinstance(network.store, str) else network.store
    for entry in entries:
        if not any(fits(name, entry) for name in names):
            yield f"{who}, store: {entry!r} is none of its layers{nearest(entry, names, 5)}"
    for name in names:
        wishes = {entry: kept for entry, kept in entries.items() if fits(name, entry)}
        if len(set(wishes.values())) > 1:
            yield f"{who}, store: layer {name!r} fits {' and '.join(map(repr, wishes))}, which differ"
    dissected = names and job.beside("dissect") is not None
    if dissected and all(network.kept(name) == "pooled" for name in names):
        yield (
            f"{who}: every layer is stored pooled, which leaves none to dissect: keep the maps of one, `store: full`, "
            "or have them counted without being stored, `store: none`; if none is to be dissected, `store: pooled`"
        )


STAGE = Stage(
    name="extract",
    version=VERSION,
    says="Activations of {wildcards.network} on {wildcards.dataset}",
    place="pair",
    steps=steps,
    run=run,
    settings=Settings,
    code=CODE,
    check=check,
    cost=cost,
    pending=pending,
    counts="shards to put through the network",
    made=made,
    owned=owned,
    unreferenced=unreferenced,
)
