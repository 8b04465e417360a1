"""The stage `visualize`: what units and classes want to see.

Writes, for an experiment on a network and a data set, into <network>/visualizations/<experiment>/
    projections.zarr/<layer>          single activations of the images that excite a unit most, sent back to the pixels
    maximised-<way>.zarr/<layer>      images made to excite units, by way: `pixels` or `maco`
    class-models-<way>.zarr/<score>   the same of classes, for `logit` and `log_probability`
    filters.zarr/<module>             the filters that read the image itself
    visualizations.csv, first-layers.csv
See docs/visualization.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import MicrotomeError, nearest
from pipeline.networks import experts
from pipeline.networks.experts import Likelihood
from pipeline.networks.forward import platform_numerics
from pipeline.networks.generators import Maker
from pipeline.networks.generators import settings_of as generator_settings
from pipeline.plan import inspected
from pipeline.plan.cost import Cost, Store
from pipeline.plan.counted import ingested
from pipeline.plan.job import Job
from pipeline.plan.stage import Draft, PageModule, Stage, Wanted
from pipeline.plan.step import Key
from pipeline.stages.attribute.results import group_of
from pipeline.stages.visualize import facts, results
from pipeline.stages.visualize.results import PictureLayout, ProjectionLayout
from pipeline.stages.visualize.settings import OF_LATENT, SECTION, UNSWITCHED, Maximise, Settings, Visualization
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Files, below, within, write_file
from pipeline.storage.object_storage import size_of
from pipeline.storage.tables import number
from pipeline.workers.resumable import Parts
from pipeline.workers.tasks import run_in_order, run_tasks

if TYPE_CHECKING:
    from kernels.visualization.priors import Spectrum
    from pipeline.stages.visualize.tasks import Group, Seen, Strip

VERSION = 1
FOLDER = "visualizations"
CODE = (
    "kernels/images/grey.py",
    "kernels/images/whiten.py",
    "kernels/locality/windows.py",
    "kernels/visualization/ascent.py",
    "kernels/visualization/augment.py",
    "kernels/visualization/filters.py",
    "kernels/visualization/priors.py",
    "kernels/visualization/spectrum.py",
    "pipeline/networks/beside.py",
    "pipeline/networks/build.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/experts.py",
    "pipeline/networks/forward.py",
    "pipeline/networks/generators.py",
    "pipeline/networks/gradients.py",
    "pipeline/networks/graph/call_sites.py",
    "pipeline/networks/graph/reach.py",
    "pipeline/networks/graph/rectified.py",
    "pipeline/networks/layers.py",
    "pipeline/networks/libraries",
    "pipeline/networks/positions.py",
    "pipeline/networks/prepare.py",
    "pipeline/networks/returned.py",
    "pipeline/stages/extract/pictures.py",
    "pipeline/stages/visualize/climbing.py",
    "pipeline/stages/visualize/facts.py",
    "pipeline/stages/visualize/projecting.py",
    "pipeline/stages/visualize/results.py",
    "pipeline/stages/visualize/settings.py",
    "pipeline/stages/visualize/stage.py",
    "pipeline/stages/visualize/subject.py",
    "pipeline/stages/visualize/tasks.py",
)
REMEDY = "lower `numerics.micro_batch` of the network, or `restarts`"
STATISTICS = 1024
"""Images, at most, whose spectra the data set's Gaussian and the magnitudes of `maco` are made of."""
BACKWARD = 2.0
"""Forwards that a backward costs, about."""
OF_PIXELS = ("l2", "tv", "gaussian", "rate", "shift", "turn", "zoom", "bounded")
OF_PHASES = ("crop", "noise", "phase_rate")
OF_LATENTS = ("latent", "latent_rate")
"""Settings that matter to one way alone."""


def steps(draft: Draft) -> Iterator[Wanted]:
    for name, section in draft.config.section(SECTION.key).items():
        for dataset, network in draft.pairs():
            if not section.applies(network, dataset):
                continue
            parents = [
                draft.step("ingest", dataset),
                draft.step("network", network=network),
                draft.step("extract", dataset, network),
            ]
            if any(step.key == Key(dataset, network) for step in draft.of_stage("dissect")):
                parents.append(draft.step("dissect", dataset, network))
            elif best := [layer for layer, units in section.units.items() if units == "best"]:
                raise MicrotomeError(
                    f"visualize.{name}.units.{best[0]}: `best` units are detectors, and network {network!r} is not "
                    f"dissected on {dataset!r}: name `all`, or a list of numbers"
                )
            yield Wanted(
                Key(dataset, network, name), settings_of(draft, name, section, dataset, network), tuple(parents)
            )


def settings_of(draft: Draft, name: str, section: Visualization, dataset: str, network: str) -> Settings:
    """Return what the id is made of; refuse splits and classes that are not there."""
    where, summary, spec = f"visualize.{name}", draft.summaries[dataset], draft.networks[network]
    examined = draft.config.datasets[dataset].examined_split
    split = section.split or examined
    summary.require(dataset, split, f"{where}.split" if section.split else "")
    if split != examined:
        raise MicrotomeError(
            f"{where}.split: activations of {dataset!r} are those of split {examined!r}, on which units are compared; "
            f"leave it out, or dissect split {split!r}"
        )
    classes = [] if section.classes == "all" else [_class(draft, where, each, dataset) for each in section.classes]
    if twice := [each for at, each in enumerate(classes) if each in classes[:at]]:
        raise MicrotomeError(f"{where}.classes: class {twice[0]} is named twice, by name and by its index")
    maximise = section.maximise
    networks = maximise.networks if maximise is not None else []
    judging = {each: experts.settings_of(draft.config.experts[each], draft.digests) for each in networks}
    return Settings(
        split=split,
        units=section.units,
        most=section.most,
        classes=None if section.classes == "all" else classes,
        projections=section.projections,
        maximise=section.maximise,
        first_layers=section.first_layers,
        generators={
            each: generator_settings(draft.config.generators[each], draft.digests)
            for each in (maximise.generators if maximise is not None else ())
        },
        **({"experts": judging} if judging else {}),  # without any, ids are those of before they existed
        preprocessing=spec.preprocessing,
        numerics=spec.numerics,
        **spec.reading.settings,
    )


def _class(draft: Draft, where: str, wanted: int | str, dataset: str) -> int:
    if isinstance(wanted, int):
        return wanted
    names = draft.class_names(dataset)
    if wanted not in names:
        raise MicrotomeError(f"{where}.classes: no class {wanted!r} in data set {dataset!r}{nearest(wanted, names)}")
    return names.index(wanted)


# The work -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What is drawn of one group, before the network is looked at.

    Attributes
    ----------
    store : name of the store. subject : the layer, or what of classes. numbers : units or classes.
    maxima, thresholds : of each. made_of : what its parts' ids are made of, besides their own units.
    images : (unit, place) of projections. logits : of the network, where classes are drawn.
    """

    store: str
    subject: str
    numbers: tuple[int, ...]
    maxima: np.ndarray
    thresholds: np.ndarray
    made_of: list[Any]
    way: str = ""
    images: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    logits: int = 0

    @property
    def group(self) -> str:
        return group_of(self.subject)

    @property
    def of_units(self) -> bool:
        return not self.store.startswith("class-models-")

    @property
    def scales(self) -> tuple[float, ...]:
        """What each score is divided by, so that one weight of the priors fits all: its highest magnitude on the data.

        The log-probability is divided by that of chance.
        """
        if self.subject == "log_probability" and not self.of_units:
            return tuple(math.log(max(self.logits, 2)) for _ in self.numbers)
        return tuple(float(max(abs(each), 1e-12)) for each in self.maxima.tolist())


def rows_of(job: Job[Settings], shown: np.ndarray) -> tuple[list[Row], list[str]]:
    """Return what is to be drawn, group by group, and notes; refuse units and classes that cannot be."""
    settings, options = job.settings, job.settings.maximise
    layers, notes = facts.layers_of(job, shown)
    classes = facts.classes_of(job, shown)
    common = [VERSION, platform_numerics(VERSION), list(job.images.size)]
    ways = {way: way_of(job, way, shown) for way in options.ways} if options is not None else {}
    found = []
    for layer in layers:
        name = layer.stored.name
        if not layer.units:
            continue
        made_of = [*common, layer.stored.id]
        if settings.projections is not None:
            units = layer.units[: settings.projections.units]
            images = facts.images_of(job, layer, units, shown, settings.projections.images)
            own = [*made_of, settings.projections.methods, settings.projections.images]
            empty = np.full(len(units), np.nan)
            found.append(Row(results.PROJECTIONS, name, units, empty, empty, own, images=images))
        for way, of_way in ways.items():
            store, own = results.maximised(way), [*made_of, *of_way]
            found.append(Row(store, name, layer.units, layer.maxima, layer.thresholds, own, way))
    if classes is not None:
        model, identity = job.model, job.identity
        made_of = [*common, model.sha256, model.architecture, identity["preprocessing"], identity["numerics"]]
        for way, of_way in ways.items():
            for score in results.SCORES:
                maxima = classes.maxima[score]
                empty = np.full(len(maxima), np.nan)
                own = [*made_of, score, *of_way]
                store = results.class_models(way)
                found.append(Row(store, score, classes.classes, maxima, empty, own, way, logits=classes.logits))
    return found, notes


def way_of(job: Job[Settings], way: str, shown: np.ndarray) -> list[Any]:
    """Return what the pictures of a way depend on among the options, and on the data set."""
    options = job.settings.maximise
    assert options is not None
    latent = way.removeprefix(OF_LATENT) if way.startswith(OF_LATENT) else ""
    others = {"maco": OF_PIXELS + OF_LATENTS, "pixels": OF_PHASES + OF_LATENTS}
    told = options.model_dump(exclude={"expert", "generators", *others.get(way, OF_PIXELS + OF_PHASES)})
    if latent:
        told |= {"generator": job.settings.generators[latent]}
    if way == "pixels":
        told |= {name: None for name in ("l2", "tv", "gaussian") if name not in options.expert}
        told |= {"experts": job.settings.experts} if options.networks else {}
    of_data = [each for _, *each in statistics_of(job, shown)] if needs_spectrum(options, way) else []
    return [way, told, of_data]


def needs_spectrum(options: Maximise, way: str) -> bool:
    return way == "maco" or (way == "pixels" and "gaussian" in options.expert)


def statistics_of(job: Job[Settings], shown: np.ndarray) -> list[tuple[int, str | None, list[int]]]:
    """Return the images of the data set's statistics: by shard, the digest of its pixels and places in it."""
    images = job.images
    slots, found = facts.first_by_hash(np.flatnonzero(shown), images.image_ids(), STATISTICS), []
    for shard in np.unique(slots // images.shard_images).tolist():
        start, stop = images.range(shard)
        found.append((shard, images.contents[shard], (slots[(slots >= start) & (slots < stop)] - start).tolist()))
    return found


def each_of(job: Job[Settings], row: Row) -> int:
    """Return how many units or classes a part of a group has."""
    settings, batch = job.settings, job.network_spec.numerics.micro_batch
    if row.store == results.PROJECTIONS:
        assert settings.projections is not None
        return min(len(row.numbers), max(1, 2 * batch // settings.projections.images))
    assert settings.maximise is not None
    return min(len(row.numbers), max(1, batch // settings.maximise.restarts))


def parts_of(job: Job[Settings], rows: Sequence[Row]) -> dict[str, Parts]:
    """Return the parts of each store, with the id of each: some units of a layer, or some classes."""
    ids: dict[str, dict[str, str]] = {}
    images = job.images
    for row in rows:
        each = each_of(job, row)
        for part, start in enumerate(range(0, len(row.numbers), each)):
            own = slice(start, start + each)
            made_of = [row.made_of, row.numbers[own]]
            if row.store == results.PROJECTIONS:
                slots = row.images[own]
                shards = np.unique(slots[slots >= 0] // images.shard_images).tolist()
                made_of += [slots.tolist(), [images.contents[shard] for shard in shards]]
            else:
                made_of += [row.scales[own]]
            ids.setdefault(row.store, {})[key_of(row, part)] = digest(made_of)
    return {store: Parts(job.folder / f"{store}.zarr", own) for store, own in ids.items()}


def key_of(row: Row, part: int) -> str:
    return f"{row.store}|{row.group}|{part}"


def parted(key: str) -> tuple[str, str, str]:
    """Return the store, the group and the part that a key names."""
    store, _, rest = key.partition("|")
    group, _, part = rest.rpartition("|")
    return store, group, part


def run(job: Job[Settings]) -> None:
    from pipeline.stages.visualize import tasks
    from pipeline.storage.store import StoreRef

    job.begin()
    images, settings, model = job.images, job.settings, job.model
    shown = facts.counted(job)
    rows, notes = rows_of(job, shown)
    methods = settings.projections.methods if settings.projections is not None else []
    with job.workers() as workers:
        layers = list(dict.fromkeys(row.subject for row in rows if row.of_units))
        makers, judges = makers_of(job), judges_of(job)
        asked = model, images.size, layers, methods, settings.first_layers, list(makers.values()), judges
        seen: Seen = next(run_tasks(workers, tasks.look, [asked], 1, f"{job.name}: network"))
        if seen.refused:
            name, why = next(iter(seen.refused.items()))
            where = f"visualize.{job.experiment}"
            if name in makers:
                raise MicrotomeError(f"{where}.maximise.generators: {name!r}: {why}")
            if name in settings.experts:
                raise MicrotomeError(f"{where}.maximise.expert: {name!r}: {why}")
            hint = "" if name.endswith(UNSWITCHED) else "; `gradient` needs no ReLU"
            raise MicrotomeError(f"{where}.projections.methods: {name!r} of network {job.network!r}: {why}{hint}")
        job.check_memory(memory_need(job, seen.parameters, seen.values), REMEDY)
        spectrum = spectrum_of(job, workers, shown)
        groups, strips = {}, {}
        for row in rows:
            if row.store == results.PROJECTIONS:
                strips[row.group] = strip_of(job, row, seen)
            else:
                groups[row.store, row.group] = group_made(job, row, seen)
        create_stores(job, rows, groups, strips)
        parts = parts_of(job, rows)
        ways = {row.store: row.way for row in rows}

        def picture(key: str, _: list[str]) -> tuple:
            store, group, part = parted(key)
            own = groups[store, group]
            way = ways[store]
            assert settings.maximise is not None
            needed = spectrum if needs_spectrum(settings.maximise, way) else None
            maker = makers.get(way.removeprefix(OF_LATENT)) if way.startswith(OF_LATENT) else None
            judging = judges if way == "pixels" else []
            return model, own, way, part, settings.maximise, seen.normalised, needed, maker, judging, key

        def strip(key: str, _: list[str]) -> tuple:
            group, part = parted(key)[1:]
            own = strips[group]
            slots = own.images[int(part) * own.layout.each :][: own.layout.each]
            shards = np.unique(slots[slots >= 0] // images.shard_images).tolist()
            files = {file: each for shard in shards for file, each in images.files_of(shard).items()}
            return model, own, part, StoreRef(images.store, files), key

        projections = {name: own for name, own in parts.items() if name == results.PROJECTIONS}
        pictures = {name: own for name, own in parts.items() if name != results.PROJECTIONS}
        made = set[str]()
        if projections:
            made |= job.resumed(workers, tasks.draw_strip, projections, strip, REMEDY, "projections")
        if pictures:
            made |= job.resumed(workers, tasks.draw, pictures, picture, REMEDY, "pictures")
    files, drawn = finish_stores(job, rows, parts, seen)
    if settings.first_layers:
        own, filters, table = write_filters(job, seen)
        files |= own | write_file(job.folder, "first-layers.csv", table)
        drawn += filters
    files |= write_file(job.folder, "visualizations.csv", table_of(job, rows, parts))
    count = sum(len(own.ids) for own in parts.values())
    job.finish(digest(files), files, results.Visualized(drawn=drawn, notes=notes), made=(len(made), count))


def makers_of(job: Job[Settings]) -> dict[str, Maker]:
    """Return the generators that are named, as tasks name them."""
    told = job.settings.generators
    return {name: Maker.of(name, job.config.generators[name], each["weights"]) for name, each in told.items()}


def judges_of(job: Job[Settings]) -> list[Likelihood]:
    """Return the networks among the experts, as tasks name them."""
    told = job.settings.experts
    return [Likelihood.of(name, job.config.experts[name], told[name]["weights"]) for name in sorted(told)]


def spectrum_of(job: Job[Settings], workers: Any, shown: np.ndarray) -> Spectrum | None:
    """Return the statistics of the data set, if some prior needs them."""
    from pipeline.stages.visualize import tasks
    from pipeline.storage.store import StoreRef

    options, images = job.settings.maximise, job.images
    if options is None or not any(needs_spectrum(options, way) for way in options.ways):
        return None
    channels = job.network_spec.preprocessing.channels
    asked = [
        (StoreRef(images.store, images.files_of(shard)), images.range(shard), places, channels)
        for shard, _, places in statistics_of(job, shown)
    ]
    first, *others = run_in_order(workers, tasks.sum_spectra, asked, f"{job.name}: spectra")
    for other in others:
        first = first.merge(other)
    return first


def group_made(job: Job[Settings], row: Row, seen: Seen) -> Group:
    """Return a group of pictures, as tasks name it."""
    from pipeline.stages.visualize.tasks import Group

    options = job.settings.maximise
    assert options is not None
    terms = terms_of(options, row.way)
    layout = PictureLayout(
        len(row.numbers),
        each_of(job, row),
        (job.network_spec.preprocessing.channels, *job.images.size),
        options.restarts,
        options.steps,
        len(terms),
        "float" in options.keep,
        "unit" if row.of_units else "class",
        latent_of(job, row.way),
    )
    info = seen.layers[row.subject] if row.of_units else None
    score = "" if row.of_units else row.subject
    store = job.folder / f"{row.store}.zarr" / row.group
    return Group(store, row.group, row.numbers, row.scales, layout, info, score)


def latent_of(job: Job[Settings], way: str) -> int:
    """Return how many values a generator's latent has; 0 for other ways."""
    if not way.startswith(OF_LATENT):
        return 0
    return math.prod(job.config.generators[way.removeprefix(OF_LATENT)].latent.shape)


def terms_of(options: Maximise, way: str) -> list[str]:
    """Return the names of the terms of a trajectory."""
    if way.startswith(OF_LATENT):
        return ["score", "latent"]
    return ["score", *((*options.priors, *options.networks) if way == "pixels" else ())]


def strip_of(job: Job[Settings], row: Row, seen: Seen) -> Strip:
    """Return a group of projections, as tasks name it."""
    from pipeline.stages.visualize.projecting import crop_of
    from pipeline.stages.visualize.tasks import Strip

    options, reach = job.settings.projections, seen.reach[row.subject]
    assert options is not None
    crop = crop_of(reach, job.images.size)
    channels = job.network_spec.preprocessing.channels
    layout = ProjectionLayout(
        len(row.numbers), each_of(job, row), options.images, len(options.methods), (channels, *crop)
    )
    store = job.folder / f"{row.store}.zarr" / row.group
    methods = tuple(options.methods)
    return Strip(store, row.group, row.numbers, row.images, methods, seen.layers[row.subject], reach, layout)


def create_stores(
    job: Job[Settings],
    rows: Sequence[Row],
    groups: Mapping[tuple[str, str], Group],
    strips: Mapping[str, Strip],
) -> None:
    """Create the stores, a group for each layer or score; remove what an earlier configuration left."""
    from pipeline.storage.store import create, remove, remove_other_arrays, remove_partials

    wanted = {row.store for row in rows} | ({results.FILTERS} if job.settings.first_layers else set())
    for store in job.folder.glob("*.zarr"):
        if store.stem not in wanted:
            remove(store)
            store.with_suffix(".ledger").unlink(missing_ok=True)
    for name in dict.fromkeys(row.store for row in rows):
        store, own = job.folder / f"{name}.zarr", [row for row in rows if row.store == name]
        remove_other_arrays(store, [row.group for row in own])
        create(store, {}, group_attributes(job, own))
        for row in own:
            is_strip = name == results.PROJECTIONS
            arrays = (strips[row.group] if is_strip else groups[name, row.group]).layout.arrays()
            arrays |= {key: results.column(*each) for key, each in columns_of(job, row).items()}
            attrs = attributes(job, row, strips[row.group] if is_strip else None)
            remove_other_arrays(store / row.group, arrays)
            create(store / row.group, arrays, attrs, coordinates=coordinates_of(row))
            remove_partials(store / row.group)
        create(store, {}, group_attributes(job, own))


def group_attributes(job: Job[Settings], rows: Sequence[Row]) -> dict[str, Any]:
    """Return the attributes of a store: the group of each layer or score."""
    return {
        "dataset": job.dataset,
        "network": job.network,
        "experiment": job.experiment,
        "layers": [row.subject for row in rows],
        "groups": {row.subject: row.group for row in rows},
    }


def attributes(job: Job[Settings], row: Row, strip: Strip | None) -> dict[str, Any]:
    """Return the attributes of a group."""
    settings = job.settings
    common = {
        "layer" if row.of_units else "score": row.subject,
        "split": settings.split,
        "image_size": list(job.images.size),
    }
    if strip is not None:
        assert settings.projections is not None
        how = {"everything": "everything", "unknown": "measured"}.get(str(strip.reach), "closed form")
        return common | {"settings": settings.projections.model_dump(), "reach": how}
    options = settings.maximise
    assert options is not None
    statistics = int(min(STATISTICS, facts.counted(job).sum())) if needs_spectrum(options, row.way) else 0
    return common | {
        "way": row.way,
        "settings": options.model_dump(),
        "scales": list(row.scales),
        "statistics_images": statistics,
    }


def coordinates_of(row: Row) -> list[str]:
    return ["unit", "method"] if row.store == results.PROJECTIONS else ["unit" if row.of_units else "class", "term"]


def columns_of(job: Job[Settings], row: Row) -> dict[str, tuple[str, np.ndarray]]:
    """Return the arrays of a group that no task writes: dimension and values by name."""
    settings, dimension = job.settings, "unit" if row.of_units else "class"
    found = {dimension: (dimension, np.array(row.numbers, np.int64))}
    if row.store == results.PROJECTIONS:
        assert settings.projections is not None
        return found | {"method": ("method", np.array(settings.projections.methods, dtype=object))}
    assert settings.maximise is not None
    return found | {
        "term": ("term", np.array(terms_of(settings.maximise, row.way), dtype=object)),
        "data_maximum": (dimension, row.maxima.astype(np.float32)),
        "threshold": (dimension, row.thresholds.astype(np.float32)),
    }


def finish_stores(
    job: Job[Settings], rows: Sequence[Row], parts: Mapping[str, Parts], seen: Seen
) -> tuple[Files, list[results.Drawn]]:
    """Write what no task writes; return all files of the stores, and what the manifest says of them."""
    from pipeline.storage.store import metadata_files, remove_unlisted, write

    files: Files = {}
    drawn = []
    for row in rows:
        store = job.folder / f"{row.store}.zarr"
        own = below(row.group, parts[row.store].files())
        own |= write(store / row.group, {name: ((0,), values) for name, (_, values) in columns_of(job, row).items()})
        remove_unlisted(store / row.group, own)
        own |= metadata_files(store / row.group)
        files |= within(f"{store.name}/{row.group}", own)
        files |= within(store.name, {"zarr.json": metadata_files(store)["zarr.json"]})
        note = ""
        if row.store == results.PROJECTIONS:
            reach = seen.reach[row.subject]
            note = {"everything": "everything", "unknown": "measured"}.get(str(reach), "")
        drawn.append(
            results.Drawn(store=row.store, subject=row.subject, group=row.group, rows=len(row.numbers), note=note)
        )
    return files, drawn


def table_of(job: Job[Settings], rows: Sequence[Row], parts: Mapping[str, Parts]) -> bytes:
    """Return the table of the pictures."""
    from pipeline.storage.store import Reader

    names = job.images.classes
    found = []
    for row in rows:
        if row.store == results.PROJECTIONS:
            continue
        store = job.folder / f"{row.store}.zarr" / row.group
        files = below(row.group, parts[row.store].files())
        reader = Reader(store, files)
        reached, started, best = (np.asarray(reader[name][:]) for name in ("reached", "started", "best"))
        for at, own in enumerate(row.numbers):
            value, most, threshold = float(reached[at, best[at]]), float(row.maxima[at]), float(row.thresholds[at])
            numbers = value, float(reached[at].min()), float(reached[at].max()), float(started[at, best[at]])
            found.append(
                [
                    row.subject,
                    own,
                    "" if row.of_units or own >= len(names) else names[own],
                    row.way,
                    *map(number, (*numbers, most, threshold)),
                    "" if math.isnan(threshold) else int(value > threshold),
                    int(value > most),
                ]
            )
    return results.table(results.COLUMNS, found)


def write_filters(job: Job[Settings], seen: Seen) -> tuple[Files, list[results.Drawn], bytes]:
    """Write the filters of the first layers, and what they are worth."""
    from kernels.visualization import filters
    from pipeline.storage.store import create, metadata_files, remove, write_whole

    store = job.folder / f"{results.FILTERS}.zarr"
    remove(store)
    groups = {module: group_of(module) for module in seen.filters}
    attrs = {"dataset": job.dataset, "network": job.network, "layers": list(groups), "groups": groups}
    create(store, {}, attrs)
    files: Files = {}
    drawn, rows = [], []
    for module, (weights, stride) in seen.filters.items():
        at, alike = filters.nearest(weights)
        dead, share = filters.dead(weights), filters.aliasing(weights, stride)
        one = ("filter",)
        arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
            "filter": (("filter", "channel", "y", "x"), weights.astype(np.float32)),
            "norm": (one, filters.norms(weights)),
            "dead": (one, dead),
            "nearest": (one, at),
            "similarity": (one, alike),
            "aliasing": (one, share),
        }
        kernel = weights.shape[2:]
        own = write_whole(
            store / groups[module], arrays, {"module": module, "stride": list(stride), "kernel": list(kernel)}
        )
        files |= within(f"{store.name}/{groups[module]}", own)
        drawn.append(results.Drawn(store=results.FILTERS, subject=module, group=groups[module], rows=len(weights)))
        known = share[~np.isnan(share)]
        shares = [float(known.mean()), float(np.quantile(known, 0.95))] if known.size else [math.nan, math.nan]
        likeness = float(np.mean(np.nan_to_num(alike) > filters.ALIKE))
        rows.append([module, len(weights), *kernel, *stride, *map(number, (float(dead.mean()), likeness, *shares))])
    create(store, {}, attrs)
    files |= within(store.name, {"zarr.json": metadata_files(store)["zarr.json"]})
    return files, drawn, results.table(results.FILTER_COLUMNS, rows)


# What others ask ------------------------------------------------------------------------------------------------------


def check(job: Job[Settings]) -> Iterator[str]:
    """Yield what the network does not have: layers, units and classes."""
    where, found = f"visualize.{job.experiment}", inspected.found(job)
    known = {layer.name: layer for layer in found.layers}
    for name, units in job.settings.units.items():
        if name not in known:
            yield f"{where}.units: {name!r} is not among the layers of network {job.network!r}{nearest(name, known)}"
            continue
        outside = [unit for unit in units if unit >= known[name].shape[0]] if isinstance(units, list) else []
        if outside:
            yield (
                f"{where}.units.{name}: no unit {outside[0]} in network {job.network!r}, whose layer has "
                f"{known[name].shape[0]}, from 0 on"
            )
    if job.settings.classes != [] and found.classes is None:
        yield f"{where}.classes: network {job.network!r} gives no logits, so it has no classes"
    for each in job.settings.classes or ():
        if found.classes is not None and each >= found.classes:
            yield f"{where}.classes: class {each} of network {job.network!r}, which gives {found.classes} logits"


def planned(job: Job[Settings]) -> dict[str, int]:
    """Return how many units of each layer, and classes, are drawn at most."""
    settings, found = job.settings, inspected.found(job)
    shapes = {layer.name: layer.shape[0] for layer in found.layers}
    counts = {
        name: len(units)
        if isinstance(units, list)
        else min(settings.most if units == "best" else shapes[name], shapes[name])
        for name, units in settings.units.items()
    }
    classes = (found.classes or 0) if settings.classes is None else len(settings.classes)
    return counts | ({"": classes} if classes else {})


def cost(job: Job[Settings], done: bool) -> Cost:
    """Estimate bytes, time and memory: passes of ascents, and of projections."""
    settings, size, found = job.settings, ingested(job), inspected.found(job)
    counts, channels = planned(job), job.network_spec.preprocessing.channels
    pixels = channels * size[0] * size[1]
    units = sum(count for name, count in counts.items() if name)
    options, projections = settings.maximise, settings.projections
    passes, stores = 0.0, []
    if projections is not None:
        chosen = sum(min(count, projections.units or count) for name, count in counts.items() if name)
        passes += chosen * projections.images * (1 + (1 + BACKWARD) * len(projections.methods))
        raw = float(chosen * projections.images * len(projections.methods) * pixels)
        stores.append(Store(results.PROJECTIONS, raw, raw, raw if done else size_of(job.folder / "projections.zarr")))
    if options is not None:
        subjects = {results.maximised: units, results.class_models: len(results.SCORES) * counts.get("", 0)}
        for way in options.ways:
            for name, count in subjects.items():
                passes += count * options.restarts * options.steps * (1 + BACKWARD)
                raw = float(count * (pixels * (5 if options.keep else 1) + 8 * options.restarts * options.steps))
                if count:
                    store = name(way)
                    there = raw if done else size_of(job.folder / f"{store}.zarr")
                    stores.append(Store(store, raw, raw, there))
    rate = inspected.speed(job).get("images_per_second")
    return Cost(
        stores=tuple(stores),
        images=units,
        tasks=max(1, sum(-(-count // 16) for count in counts.values())),
        seconds=passes / rate if rate else None,
        memory=memory_need(job, found.parameters, 0),
        rate="",
    )


def memory_need(job: Job[Settings], parameters: int, values: int) -> int:
    """Estimate the bytes of a task: weights, a forward that keeps what its backward needs, and copies of the rows."""
    settings, size, spec = job.settings, ingested(job), job.network_spec
    restarts = settings.maximise.restarts if settings.maximise is not None else 1
    rows = max(spec.numerics.micro_batch, restarts)
    pixels = spec.preprocessing.channels * size[0] * size[1]
    spectra = 48 * job.dataset_spec.shard_images * pixels  # images in float64 and their transforms
    return 3 * 4 * parameters + max(4 * rows * (24 * pixels + 2 * values), spectra)


def pending(job: Job[Settings]) -> tuple[int, int]:
    """Count the parts that would be drawn now, and all of them."""
    rows, _ = rows_of(job, facts.counted(job))
    parts = parts_of(job, rows).values()
    return sum(len(own.missing()) for own in parts), sum(len(own.ids) for own in parts)


def made(job: Job) -> list[Path]:
    return [job.folder]


STAGE = Stage(
    name="visualize",
    version=VERSION,
    says="Draw what units of {wildcards.network} want to see on {wildcards.dataset}: {wildcards.experiment}",
    place="experiment",
    folder=FOLDER,
    steps=steps,
    run=run,
    settings=Settings,
    code=CODE,
    section=SECTION,
    check=check,
    cost=cost,
    pending=pending,
    counts="parts to draw",
    made=made,
    pages=(PageModule("pipeline.stages.visualize.page", 77, here=True),),
)
