"""The stage `attribute`: which pixels made a network say so.

Writes, for an experiment on a network and a data set, into <network>/attributions/<experiment>/
    <method>.zarr      attribution (image[, rank], y, x) float32, raw and signed · channel_attribution (image[, rank],
                       channel, y, x) where kept · target, score, baseline_score, residual (image[, rank])
    attributions.csv   a row for each method: how well it keeps its law, and what it costs
See docs/attribution.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from pipeline.config.base import UNTRAINED
from pipeline.config.networks import Reading
from pipeline.data.images import Images
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks.explainable import Explainable
from pipeline.networks.forward import platform_numerics
from pipeline.plan import inspected
from pipeline.plan.cost import Cost, Store
from pipeline.plan.counted import ingested
from pipeline.plan.job import Job
from pipeline.plan.stage import Draft, PageModule, Stage, Wanted
from pipeline.plan.step import Key
from pipeline.stages.attribute.options import BACKWARD, METHODS, AnyMethod, Options
from pipeline.stages.attribute.settings import SECTION, Explanations, Settings
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Files, Manifest, within, write_file
from pipeline.storage.object_storage import size_of
from pipeline.workers.resumable import Parts
from pipeline.workers.tasks import run_tasks

if TYPE_CHECKING:
    from pipeline.stages.attribute import tasks
    from pipeline.storage.store import StoreRef

VERSION = 1
FOLDER = "attributions"
CODE = (
    "kernels/attribution/baselines.py",
    "kernels/attribution/cam.py",
    "kernels/attribution/paths.py",
    "kernels/attribution/rollout.py",
    "kernels/images/grey.py",
    "kernels/images/whiten.py",
    "kernels/locality/attention.py",
    "pipeline/networks/build.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/explainable.py",
    "pipeline/networks/forward.py",
    "pipeline/networks/gradients.py",
    "pipeline/networks/graph/attended.py",
    "pipeline/networks/graph/arithmetic.py",
    "pipeline/networks/graph/call_sites.py",
    "pipeline/networks/graph/channels.py",
    "pipeline/networks/graph/gradient_flow.py",
    "pipeline/networks/graph/operations.py",
    "pipeline/networks/graph/rectified.py",
    "pipeline/networks/graph/trace.py",
    "pipeline/networks/layer_id.py",
    "pipeline/networks/layers.py",
    "pipeline/networks/libraries",
    "pipeline/networks/positions.py",
    "pipeline/networks/prepare.py",
    "pipeline/networks/returned.py",
    "pipeline/stages/attribute/methods",
    "pipeline/stages/attribute/options.py",
    "pipeline/stages/attribute/results.py",
    "pipeline/stages/attribute/settings.py",
    "pipeline/stages/attribute/stage.py",
    "pipeline/stages/attribute/subject.py",
    "pipeline/stages/attribute/tasks.py",
)
REMEDY = "lower `shard_images` of the data set or `numerics.micro_batch` of the network"


def steps(draft: Draft) -> Iterator[Wanted]:
    for name, section in draft.config.section(SECTION.key).items():
        for dataset, network in draft.pairs():
            if not section.applies(network, dataset):
                continue
            settings = settings_of(draft, name, section, dataset, network)
            if settings.methods:
                parents = draft.step("ingest", dataset), draft.step("network", network=network)
                yield Wanted(Key(dataset, network, name), settings, parents)


def settings_of(draft: Draft, name: str, section: Explanations, dataset: str, network: str) -> Settings:
    """Return what the id is made of; refuse splits and classes that are not there."""
    where, summary, spec = f"attribute.{name}", draft.summaries[dataset], draft.networks[network]
    original = draft.originals.get(network, network)
    split = section.split or draft.config.datasets[dataset].examined_split
    summary.require(dataset, split)
    limits = [section.images, draft.config.controls.images if network.endswith(UNTRAINED) else None]
    if section.targets == "label" and not summary.classes:
        raise MicrotomeError(f"{where}.targets: the images of data set {dataset!r} have no labels to explain")
    return Settings(
        baseline=_baseline(draft, where, section.baseline, dataset),
        split=split,
        images=min((each for each in limits if each is not None), default=None),
        targets=_targets(draft, where, section.targets, dataset),
        score=section.score,
        channels="channels" in section.keep,
        methods={
            key: _own(options, network, original)
            for key, options in section.methods.items()
            if options.networks is None or network in options.networks or original in options.networks
        },
        classes=summary.classes,
        preprocessing=spec.preprocessing,
        numerics=spec.numerics,
        **spec.reading.settings,
    )


def _baseline(draft: Draft, where: str, baseline: Any, dataset: str) -> str | dict[str, str]:
    """Return the baseline as the id holds it: a file by the digest of its bytes."""
    told = {"mean": "train"} if baseline == "mean" else baseline
    if isinstance(told, str):
        return told
    if not isinstance(told, dict):
        told = told.model_dump()
    if "file" in told:
        return {"file": _file_digest(draft, where, told["file"])}
    draft.summaries[dataset].require(dataset, told["mean"])
    return told


def _file_digest(draft: Draft, where: str, file: str) -> str:
    if not Path(file).is_file():
        raise MicrotomeError(f"{where}.baseline.file: no file {file}")
    return draft.digests(file)


def _own(options: Options, network: str, original: str) -> dict[str, Any]:
    """Return the options that matter to a network: its own layer alone."""
    told = options.model_dump(exclude={"networks", "layer"})
    request = options.request(network, original)
    return told if request is None else told | {"layer": request or None}


def _targets(draft: Draft, where: str, targets: Any, dataset: str) -> str | dict[str, Any]:
    """Return the targets with classes by index."""
    if isinstance(targets, str):
        return targets
    told = {key: value for key, value in targets.model_dump().items() if value is not None}
    for key in ("class", "contrast"):
        if key in told:
            several = isinstance(told[key], (list, tuple))
            named = told[key] if several else [told[key]]
            found = [_class(draft, f"{where}.targets", each, dataset) for each in named]
            if len(set(found)) < len(found):
                raise MicrotomeError(f"{where}.targets: both classes are {told[key][0]!r}")
            told[key] = found if several else found[0]
    return told


def _class(draft: Draft, where: str, wanted: int | str, dataset: str) -> int:
    if isinstance(wanted, int):
        return wanted
    names = draft.class_names(dataset)
    if wanted not in names:
        raise MicrotomeError(f"{where}: no class {wanted!r} in data set {dataset!r}{nearest(wanted, names)}")
    return names.index(wanted)


# The work -------------------------------------------------------------------------------------------------------------


def methods_of(settings: Settings) -> dict[str, Options]:
    """Return the options of each method by name."""
    read = TypeAdapter(AnyMethod)
    return {name: read.validate_python(told) for name, told in settings.methods.items()}


def requests_of(methods: Mapping[str, Options]) -> dict[str, str]:
    """Return the layer that each method asks for, "" for the default; methods without one are left out."""
    asked = {name: options.request("", "") for name, options in methods.items()}
    return {name: request for name, request in asked.items() if request is not None}


def run(job: Job[Settings]) -> None:
    from pipeline.stages.attribute import results, tasks
    from pipeline.storage.store import StoreRef, create, metadata_files, remove_partials, write

    job.begin()
    images, methods = job.images, methods_of(job.settings)
    requests = requests_of(methods)
    with job.workers() as workers:
        asked = job.model, images.size, sorted(set(requests.values()))
        prepared, explainable = next(run_tasks(workers, tasks.examine_network, [asked], 1, f"{job.name}: network"))
        if said := list(refusals(job, methods, explainable)):
            raise MicrotomeError("\n  ".join(said))
        shards = shards_of(job)
        layouts = layouts_of(job, methods, requests, explainable)
        stores = {name: results.store_of(job.folder, name) for name in methods}
        baseline = baseline_of(job, workers)
        wanted = tasks.Wanted(*_kind(job.settings))
        work = tasks.Work(job.model, explainable, wanted, baseline, methods, requests, stores, layouts)
        maps = sum(4 * np.prod(each.size) + 4 * np.prod(each.channels or (0,)) for each in layouts.values())
        values = sum(layer.shape[0] * (layer.special + layer.shape[1] * layer.shape[2]) for layer in prepared.layers)
        need = tasks.memory_need(prepared, values, job.model, images.shard_images, images.size, float(maps))
        job.check_memory(need, REMEDY)
        parts = {}
        for name, options in methods.items():
            create(stores[name], layouts[name].arrays(), attributes(job, name, options, explainable, requests))
            remove_partials(stores[name])
            parts[name] = Parts(stores[name], ids_of(job, name, shards, explainable, requests, baseline))

        def arguments(part: str, names: list[str]) -> tuple:
            return work, StoreRef(images.store, images.files_of(int(part))), shards[part], names

        made = job.resumed(workers, tasks.explain, parts, arguments, REMEDY)
    files: Files = {}
    explained, rows = [], []
    image_ids = images.image_ids()
    for name, options in methods.items():
        kind = METHODS[options.kind]
        own = parts[name].files() | write(stores[name], {"image_id": ((0,), image_ids)}) | metadata_files(stores[name])
        numbers = numbers_of(StoreRef(stores[name], own), shards)
        tolerance = getattr(options, "tolerance", results.ROUNDING)
        rows.append(results.row(name, options.kind, kind.law, tolerance, forwards_of(options, images.size), numbers))
        residual = numbers["residual"]
        layer = work.layer_of(name)
        explained.append(
            results.Explained(
                name=name,
                method=options.kind,
                law=kind.law,
                images=int((numbers["target"] >= 0).reshape(len(residual), -1).any(1).sum()),
                beyond=int((residual > tolerance).sum()),
                size=layouts[name].size,
                layer=layer.name if layer is not None else None,
                note=_note(options, explainable),
            )
        )
        files |= within(stores[name].name, own)
    table = results.table(rows)
    output = digest([files, table.decode()])
    files |= write_file(job.folder, "attributions.csv", table)
    count = sum(len(shard.places) for shard in shards.values())
    facts = results.Attributed(methods=explained, images=count, ranks=wanted.ranks)
    job.finish(output, files, facts, made=(len(made), len(shards)))


def numbers_of(store: StoreRef, shards: Mapping[str, tasks.Shard]) -> dict[str, np.ndarray]:
    """Return the numbers of each explained image, in the order of the slots."""
    reader = store.open()
    names = [name for name in reader.group.array_keys() if name not in LARGE]
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for shard in shards.values():
        start, stop = shard.bounds
        for name in names:
            found[name].append(np.asarray(reader[name][start:stop])[list(shard.places)])
    return {name: np.concatenate(parts) for name, parts in found.items()}


LARGE = ("attribution", "channel_attribution", "image_id")


def refusals(job: Job[Settings], methods: Mapping[str, Options], found: Explainable) -> Iterator[str]:
    """Yield a sentence for each method that the network refuses, with those that apply."""
    key = f"attribute.{job.experiment}.methods"
    for name, options in methods.items():
        request = options.request("", "")
        if why := found.why_not(METHODS[options.kind].needs, request):
            good = [each for each, method in METHODS.items() if not found.why_not(method.needs, request)]
            others = f"; these apply: {', '.join(good)}" if good else ""
            yield f"{key}.{name}: network {job.network!r}: {why}{others}"


def _note(options: Options, found: Explainable) -> str:
    if METHODS[options.kind].maps == "attention" and found.attention is not None and not found.attention.first:
        return "there is no class token: the mean over all tokens"
    return ""


def attributes(
    job: Job[Settings], name: str, options: Options, found: Explainable, requests: Mapping[str, str]
) -> dict[str, Any]:
    """Return the attributes of a method's store."""
    kind, settings = METHODS[options.kind], job.settings
    layer = found.layers[requests[name]].name if name in requests else None
    if kind.maps == "attention":
        assert found.attention is not None
        layer = found.attention.name
    return {
        "method": options.kind,
        "law": kind.law,
        "settings": settings.methods[name],
        "units": f"{settings.score} of the target",
        "dataset": job.dataset,
        "network": job.network,
        "experiment": job.experiment,
        "split": settings.split,
        "targets": settings.targets,
        "score": settings.score,
        "baseline": settings.baseline if kind.baseline else None,
        "image_size": list(job.images.size),
        "classes": job.images.classes,
        "logits": found.classes,
        "maps": kind.maps,
        "layer": layer,
        "note": _note(options, found),
        "cells": "a value covers an equal part of the image; enlarge bilinearly without aligned corners",
    }


def layouts_of(
    job: Job[Settings], methods: Mapping[str, Options], requests: Mapping[str, str], found: Explainable
) -> dict[str, Any]:
    from pipeline.stages.attribute import results

    images, (_, _, ranks, _) = job.images, _kind(job.settings)
    several = isinstance(job.settings.targets, dict) and "top" in job.settings.targets
    layouts = {}
    for name, options in methods.items():
        kind = METHODS[options.kind]
        info = found.layers[requests[name]] if kind.maps == "layer" else found.attention
        size = images.size if kind.maps == "image" or info is None else (info.shape[1], info.shape[2])
        channels = None
        if job.settings.channels and kind.maps == "image" and kind.channels:
            channels = (job.network_spec.preprocessing.channels, *images.size)
        layouts[name] = results.Layout(
            images.count, images.shard_images, ranks if several else None, size, channels, kind.facts
        )
    return layouts


def _kind(settings: Settings) -> tuple[str, tuple[int, ...], int, Any]:
    """Return what is explained: its kind, classes, and how many of each image."""
    targets = settings.targets
    if isinstance(targets, str):
        return targets, (), 1, settings.score
    ((kind, value),) = targets.items()
    if kind == "top":
        return kind, (), int(value), settings.score
    return kind, tuple(value) if isinstance(value, (list, tuple)) else (value,), 1, settings.score


def chosen(images: Images, settings: Settings) -> np.ndarray:
    """Return the slots of the images that are explained, ascending: the first by the hash of their ids."""
    slots = np.flatnonzero(images.counted(settings.split))
    if settings.targets == "label":
        slots = slots[np.asarray(images.reader()["label"][:])[slots] >= 0]
    ids = images.image_ids()

    def place(slot: int) -> bytes:
        return hashlib.sha256(str(ids[slot]).encode("utf-8", "surrogateescape")).digest()

    ordered = sorted(slots.tolist(), key=place)
    return np.sort(np.array(ordered[: settings.images], np.int64))


def shards_of(job: Job[Settings]) -> dict[str, tasks.Shard]:
    """Return the images of each shard that has any."""
    from pipeline.stages.attribute.tasks import Shard

    images, reader = job.images, job.images.reader()
    slots = chosen(images, job.settings)
    labels, ids = np.asarray(reader["label"][:]), images.image_ids()
    found = {}
    for shard in np.unique(slots // images.shard_images).tolist():
        own = slots[slots // images.shard_images == shard]
        start, stop = images.range(shard)
        found[str(shard)] = Shard(
            str(shard),
            (start, stop),
            tuple((own - start).tolist()),
            tuple(labels[own].tolist()),
            tuple(map(str, ids[own])),
        )
    return found


def ids_of(
    job: Job[Settings],
    name: str,
    shards: Mapping[str, tasks.Shard],
    found: Explainable,
    requests: Mapping[str, str],
    baseline: str | np.ndarray,
) -> dict[str, str]:
    """Return the id of each shard of a method: what its numbers are made from."""
    images, model, identity = job.images, job.model, job.identity
    kind = METHODS[methods_of(job.settings)[name].kind]
    read = {key: identity[key] for key in Reading.model_fields if key in identity}
    made_of = [
        [VERSION, platform_numerics(VERSION)],
        [model.sha256, model.architecture, identity["preprocessing"], identity["numerics"], list(images.size), read],
        [identity["methods"][name], identity["targets"], identity["score"], identity["channels"]],
        found.layers[requests[name]].name if name in requests else None,
    ]
    if kind.baseline:
        made_of.append(baseline if isinstance(baseline, str) else hashlib.sha256(baseline.tobytes()).hexdigest())
    own = identity["targets"] == "label"
    return {
        part: digest([made_of, images.contents[int(part)], shard.places, shard.image_ids, shard.labels if own else ()])
        for part, shard in shards.items()
    }


def baseline_of(job: Job[Settings], workers: Any) -> str | np.ndarray:
    """Return the baseline's kind, or itself as pixels uint8 (channel, y, x) where it is one image."""
    from PIL import Image

    from pipeline.stages.attribute.tasks import sum_pixels
    from pipeline.storage.store import StoreRef

    told, images = job.settings.baseline, job.images
    if isinstance(told, str):
        return told
    if "mean" in told:
        slots = np.flatnonzero(images.counted(told["mean"]))
        tasks = []
        for shard in np.unique(slots // images.shard_images).tolist():
            own = slots[slots // images.shard_images == shard] - images.range(shard)[0]
            tasks.append((StoreRef(images.store, images.files_of(shard)), images.range(shard), own.tolist()))
        total = sum(run_tasks(workers, sum_pixels, tasks, len(tasks), f"{job.name}: baseline"))
        return np.rint(total / len(slots)).astype(np.uint8)
    file = job.section[job.experiment].baseline.file
    with Image.open(file) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    if pixels.shape[:2] != tuple(images.size):
        raise MicrotomeError(
            f"attribute.{job.experiment}.baseline: {file} has {pixels.shape[0]} x {pixels.shape[1]} pixels, and the "
            f"images of {job.dataset!r} have {images.size[0]} x {images.size[1]}"
        )
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


# What others ask ------------------------------------------------------------------------------------------------------


def requests(job: Job[Settings]) -> dict[str, Any]:
    """Return what the inspection has to find out, for all experiments of a network on a data set."""
    layers = set()
    for other in job.jobs("attribute"):
        if (other.dataset, other.original) == (job.dataset, job.original):
            layers |= set(requests_of(methods_of(other.settings)).values())
    return {"explain": {"layers": sorted(layers)}}


def check(job: Job[Settings]) -> Iterator[str]:
    """Yield what the network or the data set does not have."""
    found = Explainable.read(inspected.found(job).explainable)
    yield from refusals(job, methods_of(job.settings), found)
    where, settings = f"attribute.{job.experiment}", job.settings
    if found.classes:
        if settings.targets == "label" and found.classes != settings.classes:
            yield (
                f"{where}.targets: network {job.network!r} gives {found.classes} logits, and the images of "
                f"{job.dataset!r} have {settings.classes} classes: their labels are not its classes"
            )
        _, classes, ranks, _ = _kind(settings)
        for each in classes:
            if each >= found.classes:
                yield f"{where}.targets: class {each} of network {job.network!r}, which gives {found.classes} logits"
        if ranks > found.classes:
            yield f"{where}.targets: top {ranks} of network {job.network!r}, which gives {found.classes} logits"
    if found.probabilities and settings.score == "logit":
        yield (
            f"{where}.score: network {job.network!r} ends in a softmax, so it gives no logits: ask for "
            f"`probability` or `log_probability`"
        )
    height, width = ingested(job)
    for name, options in methods_of(settings).items():
        if options.kind == "cam" and settings.score != "logit":
            yield f"{where}.methods.{name}: CAM explains logits, and `score` is {settings.score!r}"
        window = getattr(options, "window", 0)
        if window > min(height, width):
            yield f"{where}.methods.{name}.window: {window} pixels, and images have {height} x {width}"


def forwards_of(options: Options, size: tuple[int, int]) -> float:
    """Return the passes of an image that a method costs alone, in forwards."""
    kind = METHODS[options.kind]
    return kind.forwards(options, size) + (BACKWARD if kind.shares else 1.0)


def cost(job: Job[Settings], done: bool) -> Cost:
    """A shared pass, and what methods add; integrated gradients may take more steps than at first."""
    settings, size = job.settings, ingested(job)
    images = min(job.splits[settings.split], settings.images or job.splits[settings.split])
    methods, ranks = methods_of(settings), _kind(settings)[2]
    inspection = inspected.found(job)
    found = Explainable.read(inspection.explainable)
    passes = ranks * (BACKWARD + sum(METHODS[each.kind].forwards(each, size) for each in methods.values()))
    asked, stores = requests_of(methods), []
    for name, options in methods.items():
        kind = METHODS[options.kind]
        info = found.layers.get(asked.get(name, "")) if kind.maps == "layer" else found.attention
        height, width = size if kind.maps == "image" or info is None else info.shape[1:]
        channels = job.network_spec.preprocessing.channels if settings.channels and kind.maps == "image" else 0
        raw = 4.0 * images * ranks * height * width * (1 + channels)
        stores.append(Store(name, raw, 0.9 * raw, 0.9 * raw if done else size_of(job.folder / f"{name}.zarr")))
    rate = inspected.speed(job).get("images_per_second")
    shard = job.dataset_spec.shard_images
    memory = 12 * inspection.parameters + 4 * job.network_spec.numerics.micro_batch * (
        24 * size[0] * size[1] + 3 * found.values
    )
    return Cost(
        stores=tuple(stores),
        images=images,
        tasks=-(-images // shard),
        seconds=images * passes / rate if rate else None,
        memory=memory,
        rate=f"{rate / passes:.3g}" if rate else "",
    )


def pending(job: Job[Settings]) -> tuple[int, int]:
    """Count the shards that would be explained at most, and all of them: the network says which layers are meant."""
    count = len(shards_of(job))
    return count, count


def made(job: Job) -> list[Path]:
    return [job.folder]


def unreferenced(results: Path, used: set[Path]) -> Iterator[Path]:
    """Find the stores of methods that no finished experiment has any more."""
    for folder in sorted(results.glob(f"*/*/{FOLDER}/*/")):
        finished = [Manifest.read(path) for path in (folder / "done").glob("attribute.*.json")]
        named = {name.partition("/")[0] for manifest in finished for name in manifest.files}
        yield from (store for store in sorted(folder.glob("*.zarr")) if finished and store.name not in named)


STAGE = Stage(
    name="attribute",
    version=VERSION,
    says="Explain what {wildcards.network} says of {wildcards.dataset}: {wildcards.experiment}",
    place="experiment",
    folder=FOLDER,
    steps=steps,
    run=run,
    settings=Settings,
    code=CODE,
    section=SECTION,
    requests=requests,
    check=check,
    cost=cost,
    pending=pending,
    counts="shards to explain",
    made=made,
    unreferenced=unreferenced,
    pages=(PageModule("pipeline.stages.attribute.page", 75, here=True),),
)
