"""The stage `attribute`: which pixels made a network say so.

Writes, for an experiment on a network and a data set, into <network>/attributions/<experiment>/
    <method>.zarr      attribution (image[, rank], y, x) float32, raw and signed · channel_attribution (image[, rank],
                       channel, y, x) where kept · value (image[, rank], segment) of methods that part images into
                       segments · target, score, baseline_score, residual (image[, rank])
    segments-<kind>-<id>.zarr   segments (image, y, x) · feature (image, segment), once for all methods that part images
                       the same way. They lie here, and not beside the images of the data set: they cost nothing
                       beside the forwards, only explained images have any, and two jobs never fill one store
    <method>-relevance.zarr/<layer>  relevance (image[, rank], unit) of the layers that LRP names
    attributions.csv   a row for each method: how well it keeps its law, and what it costs
See docs/attribution.md.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.base import UNTRAINED
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks.fitness import DEPTH, INPUT_RULES, Explainable, matches
from pipeline.networks.forward import platform_numerics
from pipeline.networks.segmenters import wanted_categories
from pipeline.plan import inspected
from pipeline.plan.cost import SHRINKS, Cost, Store
from pipeline.plan.counted import ingested
from pipeline.plan.job import Job
from pipeline.plan.stage import Draft, PageModule, Stage, Wanted
from pipeline.plan.step import Key
from pipeline.stages.attribute import results, segments
from pipeline.stages.attribute.again import EXPLAINS, examined, labels_of, layer_names, unit_layers, work_of
from pipeline.stages.attribute.inputs import (
    Shard,
    by_shard,
    chosen,
    lacks_references,
    read_baseline,
    shards_of,
)
from pipeline.stages.attribute.options import (
    BACKWARD,
    METHODS,
    IntegratedGradients,
    Labels,
    Lime,
    Lrp,
    OfSplit,
    Options,
    Patches,
    Segmented,
    Segments,
    forwards_alone,
    link_of,
    tolerance_of,
)
from pipeline.stages.attribute.settings import SECTION, Explanations, Settings, methods_of, targets_of
from pipeline.stages.concepts.results import Labelled
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Files, Manifest, below, within, write_file
from pipeline.storage.object_storage import size_of
from pipeline.workers.resumable import Parts

if TYPE_CHECKING:
    from pipeline.stages.attribute.subject import Known
    from pipeline.stages.attribute.work import Work
    from pipeline.storage.store import StoreRef

VERSION = 2
FOLDER = "attributions"
CODE = (*EXPLAINS, "pipeline/stages/attribute/stage.py")
FLOATS = 0.9
"""Compression ratio of maps and of other numbers."""
REMEDY = "lower `shard_images` of the data set or `numerics.micro_batch` of the network"


def steps(draft: Draft) -> Iterator[Wanted]:
    for name, section in draft.config.section(SECTION.key).items():
        for dataset, network in draft.pairs():
            if not section.applies(network, dataset):
                continue
            settings = settings_of(draft, name, section, dataset, network)
            if settings.methods:
                parents = [draft.step("ingest", dataset), draft.step("network", network=network)]
                if labels_of(methods_of(settings)):
                    parents.append(draft.step("concepts", dataset))
                yield Wanted(Key(dataset, network, name), settings, tuple(parents))


def settings_of(draft: Draft, name: str, section: Explanations, dataset: str, network: str) -> Settings:
    """Return what the id is made of; refuse splits and classes that are not there."""
    where, summary, spec = f"attribute.{name}", draft.summaries[dataset], draft.networks[network]
    original = draft.originals.get(network, network)
    split = section.split or draft.config.datasets[dataset].examined_split
    summary.require(dataset, split, f"{where}.split" if section.split else "")
    for key, options in section.methods.items():
        if isinstance(options, OfSplit):
            summary.require(dataset, options.split, f"{where}.methods.{key}.split")
    limits = [section.images, draft.config.controls.images if network.endswith(UNTRAINED) else None]
    if section.targets == "label" and not summary.classes:
        raise MicrotomeError(f"{where}.targets: the images of data set {dataset!r} have no labels to explain")
    for key, options in section.methods.items():
        if labels := labels_of({key: options}):
            _require_labels(draft, f"{where}.methods.{key}.segments", labels[0], dataset, split)
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


def _require_labels(draft: Draft, where: str, category: str, dataset: str, split: str) -> None:
    """Refuse segments of label maps that the data set does not have."""
    spec = draft.config.datasets[dataset]
    if not any(step.key.dataset == dataset for step in draft.of_stage("concepts")):
        raise MicrotomeError(
            f"{where}: data set {dataset!r} has no label maps, or no network is dissected on it: give it `concepts`, "
            f"or use `slic`"
        )
    known = wanted_categories(spec, draft.config)
    if category not in known:
        raise MicrotomeError(f"{where}.category: no category {category!r} of {dataset!r}{nearest(category, known)}")
    if split != spec.examined_split:
        raise MicrotomeError(
            f"{where}: split {split!r} of {dataset!r} has no label maps, which are those of {spec.examined_split!r}"
        )


def _baseline(draft: Draft, where: str, baseline: Any, dataset: str) -> str | dict[str, str]:
    """Return the baseline as the id holds it: a file by the digest of its bytes."""
    told = {"mean": "train"} if baseline == "mean" else baseline
    if isinstance(told, str):
        return told
    if not isinstance(told, dict):
        told = told.model_dump(exclude_none=True)
    if "file" in told:
        return {"file": _file_digest(draft, where, told["file"])}
    draft.summaries[dataset].require(dataset, told["mean"], f"{where}.baseline, the mean of a split's images")
    return told


def _file_digest(draft: Draft, where: str, file: str) -> str:
    if not Path(file).is_file():
        raise MicrotomeError(f"{where}.baseline.file: no file {file}")
    return draft.digests(file)


def _own(options: Options, network: str, original: str) -> dict[str, Any]:
    """Return the options that matter to a network: its own layer alone."""
    told = options.model_dump(exclude={"networks", "layer", "layers"})
    layer, units = options.layer_name(network, original), options.unit_layers(network, original)
    told |= {"layers": units} if units else {}
    return told if layer is None else told | {"layer": layer or None}


def _targets(draft: Draft, where: str, targets: Any, dataset: str) -> str | dict[str, Any]:
    """Return the targets with classes by index."""
    if isinstance(targets, str):
        return targets
    told = targets.model_dump(exclude_none=True)
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


def run(job: Job[Settings]) -> None:
    from pipeline.stages.attribute import tasks
    from pipeline.storage.store import (
        StoreRef,
        create,
        metadata_files,
        remove_other_arrays,
        remove_partials,
        remove_unlisted,
        write,
    )

    job.begin()
    images, methods = job.images, methods_of(job.settings)
    with job.workers() as workers:
        parameters, found = examined(job, workers, methods)
        if said := list(objections(job, methods, found)):
            raise MicrotomeError("\n  ".join(said))
        shards = shards_of(job)
        layouts = {name: layout_of(job, options, found) for name, options in methods.items()}
        of_units = [results.unit_relevance(name) for name, options in methods.items() if options.unit_layers()]
        stores = {name: results.store_of(job.folder, name) for name in methods}
        labelled = Labelled.of(job.parent("concepts")) if labels_of(methods) else None
        maps = _label_maps(job) if labelled is not None else None
        parted = segments.settings_of(methods)
        patches = found.patches
        parted_layouts = {name: segment_layout(job, each, patches) for name, each in parted.items()}
        stores |= {name: results.store_of(job.folder, name) for name in (*parted, *of_units)}
        work = work_of(job, workers, methods, found, stores, layouts, parted_layouts)
        spec, kept = job.network_spec, list(layouts.values())
        need = results.memory_need(
            parameters, found.values, spec, images.shard_images, images.size, kept, methods.values()
        )
        job.check_memory(need, REMEDY)
        parts = {}
        for name in (*methods, *parted):
            store, arrays = stores[name], work.layout(name).arrays()
            remove_other_arrays(store, arrays)
            if name in parted:
                create(store, arrays, segment_attributes(job, parted[name], labelled))
                ids = segment_ids(job, work, parted[name], shards, labelled)
            else:
                create(store, arrays, attributes(job, name, methods[name], found, work))
                ids = ids_of(job, work, name, shards, labelled)
            remove_partials(store)
            parts[name] = Parts(store, ids)
        for name in of_units:
            create_relevance(job, work, name)
            parts[name] = Parts(stores[name], relevance_ids(work, name, parts[results.method_of(name)].ids))

        def given(part: str) -> tasks.Given:
            own = maps.of(["label_map"], [int(part)]) if maps is not None else None
            return tasks.Given(StoreRef(images.store, images.files_of(int(part))), own, shards[part])

        def arguments(several: list[str], names: list[str]) -> tuple:
            return work, [given(part) for part in several], names

        counts = {part: len(shard.places) for part, shard in shards.items()}
        made = job.resumed_in_groups(
            workers, tasks.explain, parts, arguments, counts, spec.numerics.micro_batch, REMEDY
        )
    files: Files = {}
    explained, rows = [], []
    for name in (*methods, *parted):
        store = stores[name]
        own = parts[name].files() | write(store, {"image_id": ((0,), images.image_ids())})
        remove_unlisted(store, own)
        own |= metadata_files(store)
        files |= within(store.name, own)
        if name in parted:
            continue
        options = methods[name]
        numbers = numbers_of(StoreRef(store, own), layouts[name], shards)
        law = law_of(job, options, work.known(name))
        rows.append(row_of(options, name, law, numbers, images.size))
        explained.append(facts_of(job, options, name, law, numbers, work))
        warn(job, name, numbers, found.classes)
    for name in of_units:
        own = parts[name].files()
        files |= within(stores[name].name, own | relevance_files(job, work, name, own))
    table = results.table(rows)
    output = digest([files, table.decode()])
    files |= write_file(job.folder, "attributions.csv", table)
    count = sum(len(shard.places) for shard in shards.values())
    facts = results.Attributed(methods=explained, images=count, ranks=targets_of(job.settings).ranks)
    job.finish(output, files, facts, made=(len(made), len(shards)))


def layout_of(job: Job[Settings], options: Options, found: Explainable) -> results.Layout:
    """Return the layout of a method's store."""
    images, settings, kind = job.images, job.settings, METHODS[options.kind]
    several = isinstance(settings.targets, dict) and "top" in settings.targets
    kept = channels_of(job, options)
    return results.Layout(
        images.count,
        images.shard_images,
        targets_of(settings).ranks if several else None,
        map_size(options, found, images.size),
        (kept, *images.size) if kept else None,
        kind.facts,
        kind.by_segment,
        segments_of(options, found) if isinstance(options, Segmented) else 0,
        signs_of(options),
        options.nodes if isinstance(options, Lime) else 0,
    )


def segments_of(options: Segmented, found: Explainable) -> int:
    """Return how many segments an image has at most."""
    return options.segments.most(found.patches) or 0


def segment_layout(job: Job[Settings], parted: Segments, patches: tuple[int, int] | None) -> results.SegmentLayout:
    images, most = job.images, parted.most(patches)
    assert most is not None
    return results.SegmentLayout(images.count, images.shard_images, images.size, most)


def _label_maps(job: Job[Settings]) -> StoreRef:
    """Return the label maps of the data set, with the files that their manifest lists."""
    from pipeline.storage.store import StoreRef

    return StoreRef.of_manifest(job.dataset_folder, "concepts.zarr", job.parent("concepts").files)


def signs_of(options: Options) -> tuple[str, ...]:
    """Return the names of further maps: of what positive and negative contributions bring."""
    return ("relevance", "counter_relevance") if isinstance(options, Lrp) and options.keep else ()


def create_relevance(job: Job[Settings], work: Work, name: str) -> None:
    """Create the store of the relevance of a method's units, a group for each layer."""
    from pipeline.storage.store import create, remove_other_arrays, remove_partials

    store, layers = work.stores[name], work.layers_of(name)
    method = results.method_of(name)
    attrs = attributes(job, method, work.methods[method], work.explainable, work)
    groups = {layer: results.group_of(layer) for layer in layers}
    remove_other_arrays(store, groups.values())
    create(store, {}, attrs | {"layers": layers, "groups": groups})
    for layer, group in groups.items():
        arrays = {"relevance": work.relevance_of(name, layer), "image_id": work.layouts[method].image_id}
        create(store / group, arrays, attrs | {"layer": layer, "units": "score"})
        remove_partials(store / group)
    create(store, {}, attrs | {"layers": layers, "groups": groups})


def relevance_ids(work: Work, name: str, ids: Mapping[str, str]) -> dict[str, str]:
    """Return the id of each shard of a store of the relevance of units: that of the method's maps, and the layers."""
    layers = [asdict(work.explainable.units[layer]) for layer in work.layers_of(name)]
    return {part: digest([id, layers]) for part, id in ids.items()}


def relevance_files(job: Job[Settings], work: Work, name: str, shards: Files) -> Files:
    """Write the ids of the images beside the relevance of units; return all files but those of its shards."""
    from pipeline.storage.store import metadata_files, remove_unlisted, write

    store = work.stores[name]
    files: Files = {"zarr.json": metadata_files(store)["zarr.json"]}
    for layer in work.layers_of(name):
        group = results.group_of(layer)
        written = write(store / group, {"image_id": ((0,), job.images.image_ids())})
        remove_unlisted(store / group, below(group, shards) | written)
        files |= within(group, written | metadata_files(store / group))
    return files


def map_size(options: Options, found: Explainable, size: tuple[int, int]) -> tuple[int, int]:
    """Return (y, x) of a method's map."""
    kind, layer = METHODS[options.kind], options.layer_name()
    info = found.layers.get(layer or "") if kind.maps == "layer" else None
    if kind.maps == "attention" and found.attention is not None:
        info = found.attention.layer
    return size if info is None else (info.shape[1], info.shape[2])


def channels_of(job: Job[Settings], options: Options) -> int:
    """Return of how many channels a method's maps are kept."""
    kind = METHODS[options.kind]
    kept = job.settings.channels and kind.maps == "image" and kind.channels
    return job.network_spec.preprocessing.channels if kept else 0


def segment_ids(
    job: Job[Settings],
    work: Work,
    parted: Segments,
    shards: Mapping[str, Shard],
    labelled: Labelled | None,
) -> dict[str, str]:
    """Return the id of each shard of segments: what they are made from."""
    made_of = [VERSION, segments.library(parted), parted.key, job.images.size]
    made_of.append(work.explainable.patches if isinstance(parted, Patches) else None)
    contents = job.images.contents
    return {
        part: digest([made_of, contents[int(part)], shard.places, shard.image_ids, _labels(parted, labelled, part)])
        for part, shard in shards.items()
    }


def _labels(parted: Segments, labelled: Labelled | None, part: str) -> str | None:
    """Return the digest of a shard's label maps of a category that segments are made of."""
    if not isinstance(parted, Labels):
        return None
    assert labelled is not None
    (category,) = (each for each in labelled.categories if each.name == parted.category)
    return category.contents[labelled.shards.index(int(part))]


def ids_of(
    job: Job[Settings], work: Work, name: str, shards: Mapping[str, Shard], labelled: Labelled | None = None
) -> dict[str, str]:
    """Return the id of each shard of a method: what its numbers are made from."""
    images, model, identity, options = job.images, job.model, job.identity, work.methods[name]
    kind, known = METHODS[options.kind], work.known(name)
    made_of: list[Any] = [
        [VERSION, platform_numerics(VERSION), work.explainable.normalised],
        [model.sha256, model.architecture, identity["preprocessing"], identity["numerics"], list(images.size)],
        [_own_maps(identity["methods"][name]), identity["targets"], identity["score"], channels_of(job, options)],
        [asdict(each) for each in (known.layer, known.head) if each is not None],
        known.linear,
    ]
    if kind.maps == "attention":
        made_of.append(asdict(known.attention) if known.attention is not None else None)
    if options.kind == "gradient_x_input":
        made_of.append(known.homogeneous)
    if kind.baseline:
        of_image = isinstance(work.baseline, np.ndarray)
        made_of.append(hashlib.sha256(work.baseline.tobytes()).hexdigest() if of_image else work.baseline)  # type: ignore[union-attr]
    if isinstance(options, Segmented):
        made_of.append(np.__version__.split(".")[:2])  # whose random numbers other versions may draw otherwise
    if name in work.background:
        made_of.append(hashlib.sha256(work.background[name].tobytes()).hexdigest())
    parted = segment_ids(job, work, options.segments, shards, labelled) if isinstance(options, Segmented) else {}
    of_labels = identity["targets"] == "label"

    def of(shard: Shard) -> list[Any]:
        labels = shard.labels if of_labels else ()
        own = [parted[shard.part]] if parted else []
        return [images.contents[int(shard.part)], shard.places, shard.image_ids, labels, *own]

    return {part: digest([made_of, of(shard)]) for part, shard in shards.items()}


def _own_maps(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a method's maps depend on among its options: not the layers whose units it stores as well."""
    return {key: value for key, value in told.items() if key != "layers"}


def attributes(job: Job[Settings], name: str, options: Options, found: Explainable, work: Work) -> dict[str, Any]:
    """Return the attributes of a method's store."""
    kind, settings, layer = METHODS[options.kind], job.settings, options.layer_name()
    info = found.layers[layer] if layer is not None else None
    if kind.maps == "attention" and found.attention is not None:
        info = found.attention.layer
    return {
        "method": options.kind,
        "law": law_of(job, options, work.known(name)),
        "settings": settings.methods[name],
        "units": kind.units,
        "dataset": job.dataset,
        "network": job.network,
        "experiment": job.experiment,
        "split": settings.split,
        "targets": settings.targets,
        "score": link_of(options, settings.score),
        "baseline": settings.baseline if kind.baseline else None,
        "image_size": list(job.images.size),
        "classes": job.images.classes,
        "logits": found.classes,
        "maps": kind.maps,
        "layer": info.name if info is not None else None,
        "note": note_of(job, options, found),
        "cells": "a value covers an equal part of the image; enlarge bilinearly without aligned corners",
    }


def segment_attributes(job: Job[Settings], parted: Segments, labelled: Labelled | None) -> dict[str, Any]:
    """Return the attributes of a store of segments."""
    concepts: dict[str, str] = {}
    if isinstance(parted, Labels) and labelled is not None:
        (category,) = (each for each in labelled.categories if each.name == parted.category)
        concepts = {str(number): name for number, name in zip(category.numbers, category.concepts, strict=True)}
    return {
        "settings": parted.model_dump(),
        "dataset": job.dataset,
        "network": job.network,
        "experiment": job.experiment,
        "split": job.settings.split,
        "image_size": list(job.images.size),
        "features": parted.features,
        "concepts": concepts,
    }


def note_of(job: Job[Settings], options: Options, found: Explainable) -> str:
    """Return what a reader has to know of a method's maps."""
    if (link := link_of(options, job.settings.score)) != job.settings.score:
        return f"explains the {link.replace('_', '-')}, not the {job.settings.score}"
    attends = METHODS[options.kind].maps == "attention" and found.attention is not None
    return found.attention.note if attends and found.attention is not None else ""


def numbers_of(store: StoreRef, layout: results.Layout, shards: Mapping[str, Shard]) -> dict[str, np.ndarray]:
    """Return the numbers of each explained image, in the order of the slots."""
    reader = store.open()
    found: dict[str, np.ndarray] = {}
    for name, array in layout.arrays().items():
        if name not in LARGE:
            parts = [np.asarray(reader[name][slice(*shard.bounds)])[list(shard.places)] for shard in shards.values()]
            found[name] = np.concatenate(parts) if parts else np.zeros((0, *array.shape[1:]), array.dtype)
    return found


LARGE = ("attribution", "channel_attribution", "relevance", "counter_relevance", "image_id")


def bound_of(options: Options) -> float:
    """Return the tolerance of a method's residual."""
    return tolerance_of(options) or results.ROUNDING


def row_of(
    options: Options, name: str, law: str, numbers: Mapping[str, np.ndarray], size: tuple[int, int]
) -> list[Any]:
    """Return a method's row of the table."""
    return results.row(name, options.kind, law, bound_of(options), forwards_of(options, size, numbers), numbers)


def facts_of(
    job: Job[Settings], options: Options, name: str, law: str, numbers: Mapping[str, np.ndarray], work: Work
) -> results.Explained:
    """Return what the manifest says of a method."""
    layer = work.layer_of(name)
    return results.Explained(
        name=name,
        method=options.kind,
        law=law,
        images=len(numbers["target"]),
        beyond=int((numbers["residual"] > bound_of(options)).sum()),
        size=work.layouts[name].size,
        layer=layer.name if layer is not None else None,
        note=note_of(job, options, work.explainable),
        units=tuple(options.unit_layers()),
    )


def warn(job: Job[Settings], name: str, numbers: Mapping[str, np.ndarray], classes: int) -> None:
    """Say so if the network is sure of what it sees in the baseline, and if relevance of both signs cancels."""
    magnitude = numbers.get("magnitude")
    if magnitude is not None and magnitude.size:
        large = magnitude > results.CANCELS * np.abs(numbers["score"])
        if large.any():
            inspected.say(
                f"{job.name}: {name}: for {large.mean():.0%} of the explanations, relevance adds up to more than "
                f"{results.CANCELS} times the score in magnitude, so most of it cancels: try `rule: alpha_beta` with "
                f"alpha 1, or `preset: cp_lrp`"
            )
    likely = numbers.get("baseline_probability")
    if likely is not None and likely.size and float(likely.mean()) > max(results.LIKELY, 2 / classes):
        inspected.say(
            f"{job.name}: {name}: the network gives the target a probability of {likely.mean():.2f} for the baseline, "
            f"on average: it is no image without information; try another `baseline`"
        )
    players = numbers.get("players", np.zeros(0))
    few, count = int((players <= 1).sum()), int((~np.isnan(players)).sum())
    if few:
        inspected.say(
            f"{job.name}: {name}: {few} of {count} explanations have at most one segment that differs from the "
            f"baseline, which takes the whole score: try other `segments`, or another `baseline`"
        )


# What others ask ------------------------------------------------------------------------------------------------------


def requests(job: Job[Settings]) -> dict[str, Any]:
    """Return the layers that the inspection has to examine, for all experiments of a network on a data set."""
    layers, units = set[str](), set[str]()
    for other in job.jobs("attribute"):
        if (other.dataset, other.original) == (job.dataset, job.original):
            layers |= set(layer_names(methods_of(other.settings)))
            units |= set(unit_layers(methods_of(other.settings)))
    return {"explain": {"layers": sorted(layers), "units": sorted(units)}}


def check(job: Job[Settings]) -> Iterator[str]:
    """Yield what the network or the data set does not have."""
    yield from objections(job, methods_of(job.settings), Explainable.read(inspected.found(job).explainable))
    where, size = f"attribute.{job.experiment}", ingested(job)
    for name, options in methods_of(job.settings).items():
        window = getattr(options, "window", 0)
        if window > min(size):
            yield f"{where}.methods.{name}.window: {window} pixels, and images have {size[0]} x {size[1]}"
        count = getattr(options, "references", 0)
        if isinstance(options, OfSplit) and (there := job.splits[options.split]) < count:
            yield f"{where}.methods.{name}.references: {lacks_references(options.split, count, there)}"
        if isinstance(options, Segmented) and (why := segments.lacking(options.segments, size)):
            yield f"{where}.methods.{name}.segments.{why}"
    file = getattr(job.section[job.experiment].baseline, "file", None)
    if file is not None:
        try:
            read_baseline(Path(file), size, f"{where}.baseline", job.dataset)
        except MicrotomeError as error:
            yield str(error)


def objections(job: Job[Settings], methods: Mapping[str, Options], found: Explainable) -> Iterator[str]:
    """Yield a sentence for all that a network refuses: methods, with those that apply, classes and scores."""
    where, settings = f"attribute.{job.experiment}", job.settings
    for name, options in methods.items():
        layer = options.layer_name()
        if why := found.why_not(options.needs, layer):
            good = [each for each, method in METHODS.items() if not found.why_not(method.needs, layer)]
            others = f"; these apply: {', '.join(good)}" if good else ""
            yield f"{where}.methods.{name}: network {job.network!r}: {why}{others}"
        if isinstance(options, Lrp):
            for key, why in of_lrp(options, found, settings.preprocessing.per_image):
                yield f"{where}.methods.{name}.{key}: network {job.network!r}: {why}"
        if found.classes == 1 and (link := link_of(options, settings.score)) != "logit":
            what = "`softmax: false`" if settings.score == "logit" else "`score: logit`"
            yield f"{where}.methods.{name}: the {link} of one logit is always 1: give {what}"
        if options.kind in ("cam", "linear_shap") and settings.score != "logit":
            title = METHODS[options.kind].title
            yield f"{where}.methods.{name}: {title} explains logits, and `score` is {settings.score!r}"
        if isinstance(options, Segmented) and isinstance(options.segments, Patches) and found.classes:
            if found.attention is None:
                yield (
                    f"{where}.methods.{name}.segments: network {job.network!r} has no patches: "
                    f"{found.why_not(['attention'], None)}; use `slic` or `grid`"
                )
            elif why := options.why_not(segments_of(options, found)):
                yield f"{where}.methods.{name}.{why}"
    if not found.classes:
        return
    targets = targets_of(settings)
    gives = f"network {job.network!r} gives {found.classes} logits"
    if found.classes != settings.classes and (targets.kind == "label" or named_classes(job)):
        yield (
            f"{where}.targets: {gives}, and the images of {job.dataset!r} have {settings.classes} classes: these are "
            f"not its classes; name a class by the index of its logit"
        )
    for each in targets.classes:
        if each >= found.classes:
            yield f"{where}.targets: class {each} of network {job.network!r}, which gives {found.classes} logits"
    if targets.ranks > found.classes:
        yield f"{where}.targets: top {targets.ranks} of network {job.network!r}, which gives {found.classes} logits"
    if found.normalised and settings.score == "logit":
        ends = "a softmax" if found.normalised == "softmax" else "the logarithm of a softmax"
        yield (
            f"{where}.score: network {job.network!r} ends in {ends}, so it gives no logits: ask for `probability` or "
            f"`log_probability`"
        )


def of_lrp(options: Lrp, found: Explainable, own_scale: bool) -> Iterator[tuple[str, str]]:
    """Yield keys of LRP's options, each with why its value does not apply to a network."""
    if not found.modules or found.why_not(("gradient", "lrp"), None):
        return
    if not found.rectified and any(each.alpha > 1 for each in options.every_rule):
        yield "alpha", "above 1, relevance grows from layer to layer where there is no ReLU: take alpha 1"
    for pattern in options.rules:
        if not DEPTH.fullmatch(pattern) and not fnmatch.filter(found.modules, pattern):
            yield "rules", f"{pattern!r} matches no module{nearest(pattern, found.modules)}"
        if DEPTH.fullmatch(pattern) and not any(
            matches(pattern, module, depth) for depth, (module, _) in enumerate(found.linear_maps, 1)
        ):
            yield (
                "rules",
                f"{pattern!r}: there are {len(found.linear_maps)} convolutions and linear maps, from depth 1 on",
            )
    for depth, (module, reads_input) in enumerate(found.linear_maps, 1):
        rule = next((rule.rule for pattern, rule in options.rules.items() if matches(pattern, module, depth)), "")
        if rule in INPUT_RULES and not reads_input:
            yield "rules", f"`{rule}` is a rule of the layer that reads the input itself, not of {module!r}"
            break
    if options.bounded and own_scale:
        yield "rules", "`z_b` needs bounds of the inputs, and `preprocessing.per_image` gives each image its own"
    if options.keep and not any(reads_input for _, reads_input in found.linear_maps):
        yield "keep", "`signs` needs a convolution or linear map of the input itself"
    for layer in options.unit_layers():
        if why := found.refused.get(f"units:{layer}"):
            yield "layers", why


def named_classes(job: Job[Settings]) -> list[str]:
    """Return the classes that the configuration names by their names in the data set."""
    targets = job.section[job.experiment].targets
    told = {} if isinstance(targets, str) else targets.model_dump()
    given = [told.get("class"), *(told.get("contrast") or ())]
    return [each for each in given if isinstance(each, str)]


def forwards_of(options: Options, size: tuple[int, int], numbers: Mapping[str, np.ndarray] | None = None) -> float:
    """Return the passes of an image that a method takes alone, in forwards; with its numbers, those that it took."""
    kind = METHODS[options.kind]
    steps = numbers.get("steps") if numbers is not None else None
    copies = numbers.get("samples") if numbers is not None else None
    if copies is not None and not np.isnan(copies).all():
        return float(np.nanmean(copies)) + (BACKWARD if kind.shares else 1.0)
    if isinstance(options, IntegratedGradients) and steps is not None and steps.size:
        options = options.model_copy(
            update={"steps": float(np.mean([options.taken(int(each)) for each in steps.flat]))}
        )
    return forwards_alone(options, size)


def law_of(job: Job[Settings], options: Options, known: Known) -> str:
    """Return what a method promises of this network and score; empty if nothing."""
    kind = METHODS[options.kind]
    of_logits = job.settings.score == "logit"
    if options.kind == "gradient_x_input" and not (known.homogeneous and of_logits):
        return ""
    if options.kind == "hires_cam" and (getattr(options, "relu", False) or not (known.linear and of_logits)):
        return ""
    return kind.law


def cost(job: Job[Settings], done: bool) -> Cost:
    """Estimate bytes, time and memory: a shared pass and what each method adds.

    Integrated gradients may take more steps than at first.
    """
    settings, size, dataset = job.settings, ingested(job), job.dataset_spec
    images = min(job.splits[settings.split], settings.images or job.splits[settings.split])
    methods, ranks = methods_of(settings), targets_of(settings).ranks
    inspection = inspected.found(job)
    found = Explainable.read(inspection.explainable)
    passes = ranks * (BACKWARD + sum(METHODS[each.kind].forwards(each, size) for each in unshared(methods)))
    stores, layouts = [], []
    for name, options in methods.items():
        height, width = map_size(options, found, size)
        kept = channels_of(job, options)
        kind, count = METHODS[options.kind], segments_of(options, found) if isinstance(options, Segmented) else 0
        layout = results.Layout(
            images,
            dataset.shard_images,
            ranks,
            (height, width),
            (kept, *size) if kept else None,
            kind.facts,
            kind.by_segment,
            count,
            signs_of(options),
        )
        layouts.append(layout)
        values = height * width * (1 + len(layout.maps)) + kept * size[0] * size[1] + len(kind.by_segment) * count
        stores.append(foretold(job, name, 4.0 * images * ranks * values, FLOATS, done))
        if units := sum(found.units[layer].shape[0] for layer in options.unit_layers()):
            stores.append(foretold(job, results.unit_relevance(name), 4.0 * images * ranks * units, FLOATS, done))
    for name, setting in segments.settings_of(methods).items():
        most = setting.most(found.patches) or 0
        stores.append(foretold(job, name, images * (2.0 * size[0] * size[1] + 4 * most), SHRINKS["labels"], done))
    rate = inspected.speed(job).get("images_per_second")
    spec, shard = job.network_spec, dataset.shard_images
    return Cost(
        stores=tuple(stores),
        images=images,
        tasks=-(-images // shard),
        seconds=images * passes / rate if rate else None,
        memory=results.memory_need(inspection.parameters, found.values, spec, shard, size, layouts, methods.values()),
        rate=f"{rate / passes:.3g}" if rate else "",
    )


def foretold(job: Job[Settings], name: str, raw: float, shrinks: float, done: bool) -> Store:
    """Return a store of so many bytes that shrink by so much, and what is there of it."""
    expected = shrinks * raw
    return Store(name, raw, expected, expected if done else size_of(results.store_of(job.folder, name)))


def unshared(methods: Mapping[str, Options]) -> list[Options]:
    """Return the methods without those that only read the copies of another: of equal segments and samples."""
    found: dict[Any, Options] = {}
    for name, options in methods.items():
        shares = isinstance(options, Segmented) and getattr(options, "estimator", "regression") == "regression"
        found.setdefault((options.segments.key, options.samples) if shares else name, options)  # type: ignore[attr-defined]
    return list(found.values())


def pending(job: Job[Settings]) -> tuple[int, int]:
    """Count the shards that would be explained at most, and all of them: the network says which layers are meant."""
    count = len(by_shard(job.images, chosen(job.images, job.settings)))
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
