"""The stage `intervene`: remove units of a generator, or insert them, and measure what its images lose.

Writes, for an experiment on a generator and a data set of its images, into <generator>/interventions/<experiment>/
    ranking.zarr         inside, outside (unit, image): what the removal of each unit alone changes
    trials.zarr          sum (image, trial, measure) · size (image, measure) · area (image, trial, concept) ·
                         picture (shown, trial, channel, y, x) · slot (image)
    interventions.csv, interventions-areas.csv, interventions-units.csv
Definitions: Bau et al., "Understanding the role of individual units in a deep neural network" (PNAS 2020), and "GAN
Dissection" (ICLR 2019). See docs/generators.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.base import TRUTH
from pipeline.config.datasets import Generated
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks import segmenters
from pipeline.networks.forward import platform_numerics
from pipeline.networks.segmenters import wanted_categories
from pipeline.plan import inspected
from pipeline.plan.cost import Cost, Store
from pipeline.plan.counted import Counted, ingested
from pipeline.plan.job import Job
from pipeline.plan.stage import Draft, PageModule, Stage, Wanted
from pipeline.plan.step import Key
from pipeline.stages.concepts.results import Category, Labelled
from pipeline.stages.dissect.found import read_layer_paths
from pipeline.stages.dissect.results import read_counts, result_store
from pipeline.stages.extract.results import Extracted
from pipeline.stages.intervene import results
from pipeline.stages.intervene.measures import MEASURES, SMALLEST
from pipeline.stages.intervene.settings import SECTION, Intervention, Settings, of_generator
from pipeline.stages.intervene.trials import Trial, trials_of
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Files, Manifest, within, write_file
from pipeline.storage.object_storage import size_of
from pipeline.storage.tables import csv_bytes, number
from pipeline.workers.resumable import Parts
from pipeline.workers.tasks import run_in_order, run_tasks

if TYPE_CHECKING:
    from pipeline.stages.intervene.tasks import Subject

VERSION = 1
FOLDER = "interventions"
CODE = (
    "kernels/dissection/counts.py",
    "kernels/dissection/half.py",
    "kernels/dissection/loops.py",
    "kernels/dissection/upsample.py",
    "kernels/images/colour_names.py",
    "kernels/images/grey.py",
    "kernels/images/segmentation.py",
    "kernels/images/whiten.py",
    "kernels/intervention",
    "pipeline/data/label_maps.py",
    "pipeline/data/scenes",
    "pipeline/networks/beside.py",
    "pipeline/networks/build.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/forward.py",
    "pipeline/networks/generators.py",
    "pipeline/networks/layers.py",
    "pipeline/networks/returned.py",
    "pipeline/networks/segmenters.py",
    "pipeline/stages/intervene/measures.py",
    "pipeline/stages/intervene/painting.py",
    "pipeline/stages/intervene/results.py",
    "pipeline/stages/intervene/settings.py",
    "pipeline/stages/intervene/stage.py",
    "pipeline/stages/intervene/tasks.py",
    "pipeline/stages/intervene/trials.py",
)
REMEDY = "lower `numerics.micro_batch` of the generator"
HALF = 10
"""Of 20 groups of images, by a hash of their ids: the first ten rank the units, the others are changed."""
UNITS, IMAGES = 16, 16
"""Units, and images, of a part."""


def steps(draft: Draft) -> Iterator[Wanted]:
    config = draft.config
    for name, section in config.section(SECTION.key).items():
        for dataset in of_generator(config, section.generator):
            if section.datasets is not None and dataset not in section.datasets:
                continue
            settings = settings_of(draft, name, section, dataset)
            network = section.generator
            parents = (
                draft.step("ingest", dataset),
                draft.step("network", network=network),
                draft.step("concepts", dataset),
                draft.step("extract", dataset, network),
                draft.step("dissect", dataset, network),
            )
            yield Wanted(Key(dataset, network, name), settings, parents)


def settings_of(draft: Draft, name: str, section: Intervention, dataset: str) -> Settings:
    """Return what the id is made of; refuse a concept that nothing finds, and a generator that is not dissected."""
    where, generator = f"intervene.{name}", draft.config.generators[section.generator]
    if not draft.config.dissects(draft.networks[section.generator], dataset):
        raise MicrotomeError(
            f"{where}.generator: {section.generator!r} is not dissected on {dataset!r}, so its units have no IoU: "
            f"give the data set `concepts`, and the generator `layers`"
        )
    known = wanted_categories(draft.config.datasets[dataset], draft.config)
    category, _, concept = section.concept.partition(": ")
    if category not in known:
        raise MicrotomeError(
            f"{where}.concept: no category {category!r} among the concepts of data set {dataset!r} (there are: "
            f"{', '.join(known)}){nearest(category, known)}"
        )
    if concept not in known[category]:
        raise MicrotomeError(
            f"{where}.concept: no concept {concept!r} in {category!r}{nearest(concept, known[category])}"
        )
    keys = ("layer", "units", "replace", "rank", "insert", "images", "rank_images", "draws", "pictures", "seed")
    return Settings(
        split=draft.config.datasets[dataset].examined_split,
        category=category,
        concept=concept,
        output=generator.output,
        latent=generator.latent.kind,
        **{key: getattr(section, key) for key in keys},
    )


# The work -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """The images that count: `train` and `test` slots that show the concept, and all slots of the train half."""

    train: list[int]
    test: list[int]
    half: list[int]


class Work:
    """What a job needs from its parents, read once."""

    def __init__(self, job: Job[Settings]) -> None:
        self.job, self.settings, self.images, self.model = job, job.settings, job.images, job.model
        self.labels = job.parent("concepts")
        self.labelled = Labelled.of(self.labels)
        self.stored = Extracted.of(job.parent("extract")).layer(self.settings.layer)

    @cached_property
    def ids(self) -> list[str]:
        return [str(each) for each in self.images.image_ids()]

    @property
    def category(self) -> Category:
        return next(each for each in self.labelled.categories if each.name == self.settings.category)

    @property
    def concept_number(self) -> int:
        return self.category.numbers[self.category.concepts.index(self.settings.concept)]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of objects that a composition can leave out to lack the concept."""
        from pipeline.data.scenes.composed import kinds_of

        composed = self.settings.latent == "scenes" and self.settings.category == f"{TRUTH}/object"
        return kinds_of(self.settings.concept) if composed else ()

    def contents(self, slots: Sequence[int]) -> list[Any]:
        """Return digests of the pixels and of the label maps of these slots' shards."""
        shards = sorted({slot // self.images.shard_images for slot in slots})
        own = dict(zip(self.labelled.shards, self.category.contents, strict=True))
        return [[self.images.contents[shard], own[shard]] for shard in shards]

    def subject(self, slots: Sequence[int]) -> Subject:
        """Return what tasks on these slots need."""
        from pipeline.stages.intervene.painting import Painter
        from pipeline.stages.intervene.tasks import Subject
        from pipeline.storage.store import StoreRef

        job, settings, dataset = self.job, self.settings, self.job.dataset_spec
        assert isinstance(dataset, Generated)
        shards = sorted({slot // self.images.shard_images for slot in slots})
        files = {name: each for shard in shards for name, each in self.images.files_of(shard).items()}
        return Subject(
            Painter(self.model, settings.layer, settings.output),
            StoreRef(self.images.store, files),
            StoreRef.of_manifest(job.dataset_folder, "concepts.zarr", self.labels.files).of(["label_map"], shards),
            self.category.place,
            self.concept_number,
            dataset.seed,
            self.kinds,
            self.judges,
        )

    @cached_property
    def judges(self) -> dict[str, tuple[Sequence[str], segmenters.Model | None]]:
        """By category that can be found in any picture: its concepts, and its segmenter or None for colours."""
        config = self.job.config
        found: dict[str, tuple[Sequence[str], segmenters.Model | None]] = {}
        made_of = self.job.parent_job("concepts").settings.segmenters or {}
        for category, names in wanted_categories(self.job.dataset_spec, config).items():
            source = category.partition("/")[0]
            if source == TRUTH:
                continue
            model = None
            if source in made_of:
                spec = config.segmenters[source]
                model = segmenters.Model(source, spec.model_dump_json(), digest(made_of[source]["checkpoint"]))
            found[category] = (list(names), model)
        return found

    @property
    def made_of(self) -> list[Any]:
        """What every part depends on."""
        settings, spec = self.settings, self.model.spec
        return [
            VERSION,
            platform_numerics(VERSION),
            [self.model.sha256, self.model.architecture, spec.numerics.model_dump()],
            [self.stored.id, settings.output, settings.latent, settings.category, self.concept_number, self.kinds],
        ]


def run(job: Job[Settings]) -> None:
    from pipeline.stages.intervene import tasks

    job.begin()
    work = Work(job)
    values = int(np.prod(work.stored.shape))
    job.check_memory(memory_need(job, work.model.weights.stat().st_size, values, trials_most(work.settings)), REMEDY)
    with job.workers() as workers:
        chosen = choose(work, workers)
        ranking = ranking_parts(work, chosen)
        create_ranking(work, chosen, ranking)

        def rank(part: str, _: list[str]) -> tuple:
            units = range(work.stored.shape[0])[int(part) * UNITS :][:UNITS]
            return work.subject(chosen.train), ranking.store, part, list(units), chosen.train

        made = len(job.resumed(workers, tasks.rank_units, {"": ranking}, rank, REMEDY, "ranking"))
        scores, means = scores_of(work, chosen, ranking)
        insert = work.settings.insert
        high = np.zeros(len(means))
        if insert is not None:
            asked = work.subject(chosen.train), chosen.train, insert.quantile
            (high,) = run_tasks(workers, tasks.quantiles, [asked], 1, f"{job.name}: quantiles")
        trials = trials_of(work.settings, orders_of(work, scores), means, high, bool(work.kinds))
        shown = min(work.settings.pictures, len(chosen.test), IMAGES)
        parts = trial_parts(work, chosen, trials, shown)
        create_trials(work, chosen, parts, trials, shown)

        def attempt(part: str, _: list[str]) -> tuple:
            start = int(part) * IMAGES
            slots = chosen.test[start : start + IMAGES]
            ids = [work.ids[slot] for slot in slots]
            return work.subject(slots), parts.store, part, start, slots, ids, trials, shown if part == "0" else 0

        made += len(job.resumed(workers, tasks.try_all, {"": parts}, attempt, REMEDY, "trials"))
    finish(work, chosen, scores, means, trials, ranking, parts, shown, made)


def choose(work: Work, workers: Any) -> Chosen:
    """Return the images of both halves that show the concept."""
    from pipeline.data.listing import group
    from pipeline.stages.intervene import tasks
    from pipeline.storage.store import StoreRef

    images, settings, job = work.images, work.settings, work.job
    refused = set(work.labelled.refused)
    counted = images.counted(settings.split) & np.array([each not in refused for each in work.ids])
    labels = StoreRef.of_manifest(job.dataset_folder, "concepts.zarr", work.labels.files)
    slots = np.flatnonzero(counted)
    asked = []
    for shard in np.unique(slots // images.shard_images).tolist():
        own = slots[slots // images.shard_images == shard].tolist()
        asked.append((labels.of(["label_map"], [shard]), own, work.category.place, work.concept_number))
    seen = [each for counts in run_in_order(workers, tasks.count_pixels, asked, job.name) for each in counts]
    scale = work.images.size[0] * work.images.size[1] / (work.labelled.size[0] * work.labelled.size[1])
    first = group([work.ids[slot] for slot in slots]) < HALF
    shows = np.array(seen) * scale >= SMALLEST
    train, test = slots[first & shows].tolist(), slots[~first & shows].tolist()
    if not train or not test:
        raise MicrotomeError(
            f"intervene.{job.experiment}.concept: {settings.concept!r} is seen in {len(train)} images of the train "
            f"half and {len(test)} of the test half, expected some in each: give the data set more images"
        )
    return Chosen(train[: settings.rank_images], test[: settings.images], slots[first].tolist())


def ranking_parts(work: Work, chosen: Chosen) -> Parts:
    made_of = [work.made_of, chosen.train, work.contents(chosen.train)]
    count = -(-work.stored.shape[0] // UNITS)
    return Parts(work.job.folder / "ranking.zarr", {str(at): digest([*made_of, at, UNITS]) for at in range(count)})


def trial_parts(work: Work, chosen: Chosen, trials: Sequence[Trial], shown: int) -> Parts:
    settings = work.job.parent_job("concepts").settings
    judged = [list(work.judges), (settings.segmenters or {}), segmenters.platform(work.job.cluster.on_gpus)]
    common = [work.made_of, [asdict(each) for each in trials], judged]
    ids = {}
    for at, start in enumerate(range(0, len(chosen.test), IMAGES)):
        slots = chosen.test[start : start + IMAGES]
        ids[str(at)] = digest([*common, slots, work.contents(slots), 0 if at else shown])
    return Parts(work.job.folder / "trials.zarr", ids)


def create_ranking(work: Work, chosen: Chosen, parts: Parts) -> None:
    from pipeline.storage.store import Array, create, remove_partials

    shape, chunk = (work.stored.shape[0], len(chosen.train)), (UNITS, len(chosen.train))
    arrays = {name: Array(("unit", "image"), shape, np.float64, chunk, fill=np.nan) for name in ("inside", "outside")}
    create(parts.store, arrays, attributes(work))
    remove_partials(parts.store)


def create_trials(work: Work, chosen: Chosen, parts: Parts, trials: Sequence[Trial], shown: int) -> None:
    from pipeline.storage.store import Array, create, remove_other_arrays, remove_partials

    count, many, measures, concepts = len(chosen.test), len(trials), len(MEASURES), len(concepts_of(work))
    arrays = {
        "sum": Array(("image", "trial", "measure"), (count, many, measures), np.float64, (IMAGES, many, measures)),
        "size": Array(("image", "measure"), (count, measures), np.float64, (IMAGES, measures)),
        "area": Array(
            ("image", "trial", "concept"), (count, many, concepts), np.int64, (IMAGES, many, max(1, concepts))
        ),
        "slot": Array(("image",), (count,), np.int64, (count,), fill=-1),
    }
    if shown:
        picture = (shown, many, 3, *work.images.size)
        arrays["picture"] = Array(("shown", "trial", "channel", "y", "x"), picture, np.uint8, picture)
    remove_other_arrays(parts.store, arrays)
    told = [{key: value for key, value in asdict(each).items() if value not in ("", (), -1)} for each in trials]
    facts = {"trials": told, "measures": list(MEASURES), "concepts": [list(each) for each in concepts_of(work)]}
    create(parts.store, arrays, attributes(work) | facts)
    remove_partials(parts.store)


def attributes(work: Work) -> dict[str, Any]:
    settings, job = work.settings, work.job
    return {
        "dataset": job.dataset,
        "network": job.network,
        "experiment": job.experiment,
        "layer": settings.layer,
        "concept": f"{settings.category}: {settings.concept}",
        "settings": settings.written(),
    }


def concepts_of(work: Work) -> list[tuple[str, str]]:
    return [(category, name) for category, (names, _) in work.judges.items() for name in names]


def scores_of(work: Work, chosen: Chosen, parts: Parts) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return, by name, the scores of units on the train half, and their mean activation there."""
    from kernels.dissection.counts import iou
    from pipeline.storage.store import Reader

    job = work.job
    paths = read_layer_paths(job.parent_job("dissect").folder / "layers.json")[work.settings.layer]
    folder = (job.dataset_folder / paths["iou"]).parent
    id = folder.name.removeprefix("dissect-")
    manifest = Manifest.read(folder.parent / "done" / f"dissect.{id}.json")
    named, stored = (result_store(folder, name, manifest) for name in ("iou.zarr", "counts.zarr"))
    wanted = work.settings.category, work.settings.concept
    column = list(zip(named["category"][:], named["concept"][:], strict=True)).index(wanted)
    found = iou(read_counts(stored), stored.attrs["category_of_concept"], named.attrs["union"], slice(0, HALF))
    reader = Reader(parts.store, parts.files())
    inside, outside = (_known_means(np.asarray(reader[name][:])) for name in ("inside", "outside"))
    means = np.asarray(work.stored.activations(job.results, job.dataset_folder).open()["mean"][:])
    scores = {"iou": found[:, column], "effect": inside - outside, "inside": inside, "outside": outside}
    return scores, means[chosen.half].astype(np.float64).mean(0)


def _known_means(values: np.ndarray) -> np.ndarray:
    """Return the mean of each row over what is known; 0 where nothing is, as outside of what is everywhere."""
    known = ~np.isnan(values)
    return np.where(known, values, 0.0).sum(1) / np.maximum(known.sum(1), 1)


def orders_of(work: Work, scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    from kernels.intervention.choice import order_of

    return {rank: order_of(scores[rank]) for rank in work.settings.rank}


def finish(
    work: Work,
    chosen: Chosen,
    scores: Mapping[str, np.ndarray],
    means: np.ndarray,
    trials: Sequence[Trial],
    ranking: Parts,
    parts: Parts,
    shown: int,
    made: int,
) -> None:
    """Write what no task writes, the tables, and the manifest."""
    from pipeline.storage.store import Reader, metadata_files, remove_unlisted, write

    job, files = work.job, Files()
    own = parts.files() | write(parts.store, {"slot": ((0,), np.array(chosen.test, np.int64))})
    for store, stored in ((ranking.store, ranking.files()), (parts.store, own)):
        remove_unlisted(store, stored)
        files |= within(store.name, stored | metadata_files(store))
    reader, groups = Reader(parts.store, own), results.groups_of(trials)
    sums, sizes, areas = (np.asarray(reader[name][:]) for name in ("sum", "size", "area"))
    found = results.outcomes(sums, sizes, groups)
    pixels = work.images.size[0] * work.images.size[1]
    tables = {
        "interventions": (results.COLUMNS, results.outcome_rows(found, groups, len(chosen.test))),
        "interventions-areas": (
            results.AREA_COLUMNS,
            results.area_rows(areas, pixels, groups, concepts_of(work)),
        ),
        "interventions-units": (results.UNIT_COLUMNS, unit_rows(scores, means)),
    }
    for name, (columns, rows) in tables.items():
        files |= write_file(job.folder, f"{name}.csv", csv_bytes(columns, rows))
    notes = [
        f"no random units are as many as {k} of {len(means)}"
        for k in work.settings.units
        if 2 * k > len(means) and work.settings.draws
    ]
    result = results.Intervened(
        train=len(chosen.train),
        test=len(chosen.test),
        shown=shown,
        counterfactual=bool(work.kinds),
        apart=max(int(entry["apart"]) for entry in parts.entries().values()),
        notes=notes,
    )
    job.finish(digest(files), files, result, made=(made, len(ranking.ids) + len(parts.ids)))


def unit_rows(scores: Mapping[str, np.ndarray], means: np.ndarray) -> Iterator[list[Any]]:
    from kernels.intervention.choice import order_of

    places = {}
    for rank in ("iou", "effect"):
        places[rank] = np.empty(len(means), np.int64)
        places[rank][order_of(scores[rank])] = np.arange(1, len(means) + 1)
    for unit in range(len(means)):
        values = (*(float(scores[name][unit]) for name in ("iou", "effect", "inside", "outside")), float(means[unit]))
        yield [unit, *map(number, values), int(places["iou"][unit]), int(places["effect"][unit])]


# What the rest of the project asks ------------------------------------------------------------------------------------


def check(job: Job[Settings]) -> Iterator[str]:
    """Yield what the generator does not have: the layer, and as many units."""
    where, found, settings = f"intervene.{job.experiment}", inspected.found(job), job.settings
    known = {layer.name: layer for layer in found.layers}
    if settings.layer not in known:
        yield (
            f"{where}.layer: {settings.layer!r} is not among the layers of generator {job.network!r}"
            f"{nearest(settings.layer, known)}"
        )
        return
    layer = known[settings.layer]
    if layer.layout != "map":
        yield f"{where}.layer: the output of {layer.name!r} is no map (unit, y, x), whose units could be removed"
    if job.network_spec.kept(layer.name) == "pooled":
        yield f"{where}.layer: {layer.name!r} is stored pooled, so its units have no IoU: set `store` of the generator"
    if (most := max(settings.units)) > layer.shape[0]:
        yield f"{where}.units: {most} units of layer {layer.name!r}, which has {layer.shape[0]}"


def trials_most(settings: Settings) -> int:
    """Return how many trials there are, at most."""
    return 2 + len(settings.units) * (len(settings.rank) * (len(settings.replace) + 1) + settings.draws + 1)


def cost(job: Job[Settings], done: bool) -> Cost:
    """Estimate bytes, time and memory: a forward for each unit and image, and for each trial and image."""
    settings, found, counted = job.settings, inspected.found(job), Counted.of(job)
    units = next((each.shape[0] for each in found.layers if each.name == settings.layer), 0)
    half, sets = counted.images // 2, trials_most(settings)
    train, test = min(settings.rank_images, half), min(settings.images or half, half)
    pixels = 3 * counted.size[0] * counted.size[1]
    raw = float(settings.pictures * sets * pixels + 8 * test * sets * len(MEASURES))
    rate = inspected.speed(job).get("images_per_second")
    return Cost(
        stores=(Store("trials", raw, raw, raw if done else size_of(job.folder / "trials.zarr")),),
        images=test,
        tasks=max(1, -(-test // IMAGES) + -(-units // UNITS)),
        seconds=(train * units + test * sets) / rate if rate else None,
        memory=memory_need(job, 4 * found.parameters, found.largest, sets),
    )


def memory_need(job: Job[Settings], weights: int, values: int, sets: int) -> int:
    """Estimate the bytes of a task: weights, a forward of a micro-batch with outputs of `values`, and pictures."""
    size, spec = ingested(job), job.network_spec
    pixels = 3 * size[0] * size[1]
    pictures = job.settings.pictures * sets * pixels + 40 * IMAGES * pixels
    return 3 * weights + 16 * spec.numerics.micro_batch * values + pictures


def made(job: Job) -> list[Path]:
    return [job.folder]


STAGE = Stage(
    name="intervene",
    version=VERSION,
    says="Remove units of {wildcards.network} on {wildcards.dataset}: {wildcards.experiment}",
    place="experiment",
    folder=FOLDER,
    steps=steps,
    run=run,
    settings=Settings,
    code=CODE,
    section=SECTION,
    check=check,
    cost=cost,
    made=made,
    pages=(PageModule("pipeline.stages.intervene.page", 78, here=True),),
)
