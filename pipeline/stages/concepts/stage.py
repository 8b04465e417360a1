"""The stage `concepts`: write label maps of every source, at one size, into `concepts.zarr`.

Writes
    concepts.zarr            label_map (image, category, y, x) uint16, 0 = nothing ·
                             coords category "<source>/<category>" · attrs concepts {number: {name, category}}
    concepts-quarantine.csv  image_id, path, reason: images with refused label maps; they count nowhere

Sources are the data set's own label maps (`truth`), the colours of the pixels (`pixels`), and segmentation networks, by
name. Concept numbers are unique across categories and only ever appended, so a new source, or a new version of one,
leaves the label maps of the others unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.base import PIXELS, TRUTH
from pipeline.config.datasets import AnyDataset, Segmentation
from pipeline.data import kinds
from pipeline.data.images import Images, Ingested
from pipeline.errors import MicrotomeError, about
from pipeline.networks import segmenters
from pipeline.networks.segmenters import wanted_categories
from pipeline.plan.cost import SHRINKS, Cost, Store, rate_of
from pipeline.plan.counted import Counted, ingested
from pipeline.plan.inspected import inspected, speed_of
from pipeline.plan.job import Job
from pipeline.plan.question import Question
from pipeline.plan.stage import Draft, Stage, Wanted
from pipeline.plan.step import Key
from pipeline.stages.concepts.results import Category, Labelled
from pipeline.stages.concepts.settings import ClassList, Settings
from pipeline.stages.concepts.tasks import Numbering, label_shard
from pipeline.storage import manifest
from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import FileDigests, crc32c, digest
from pipeline.storage.object_storage import size_of
from pipeline.storage.tables import quarantine_csv
from pipeline.workers.resumable import Parts, lacking
from pipeline.workers.tasks import run_tasks

if TYPE_CHECKING:
    from pipeline.storage.store import Ledger

REMEDY = "lower `shard_images` of the data set or `numerics.micro_batch` of the segmenter"
VERSION = 3
CODE = (
    "kernels/images/colour_names.py",
    "kernels/images/grey.py",
    "kernels/images/segmentation.py",
    "kernels/images/whiten.py",
    "pipeline/data/decode.py",
    "pipeline/data/kinds.py",
    "pipeline/data/label_maps.py",
    "pipeline/data/scenes",
    "pipeline/networks/build.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/forward.py",
    "pipeline/networks/layers.py",
    "pipeline/networks/libraries",
    "pipeline/networks/returned.py",
    "pipeline/networks/segmenters.py",
    "pipeline/stages/concepts/results.py",
    "pipeline/stages/concepts/settings.py",
    "pipeline/stages/concepts/stage.py",
    "pipeline/stages/concepts/tasks.py",
)
LABELS = 2e-3  # CPU seconds per image and category of label maps: assumed, until the stage has run once
UINT16 = 65535
TABLE = "table"  # the ledger entry with the numbered concepts and the categories


def steps(draft: Draft) -> Iterator[Wanted]:
    config = draft.config
    networks = [*config.networks.values(), *config.generating().values()]
    pairs = ((network, data) for network in networks for data in config.datasets_of(network))
    for name in sorted({data for network, data in pairs if config.dissects(network, data)}):
        dataset = config.datasets[name]
        draft.summaries[name].require(name, dataset.examined_split)
        with about(f"data set {name!r}"):
            settings = settings_of(dataset, config.segmenters, draft.digests)
        yield Wanted(Key(dataset=name), settings, (draft.step("ingest", name),))


def settings_of(dataset: AnyDataset, known: Mapping[str, Any], digests: FileDigests) -> Settings:
    """Return what the label maps' id depends on besides the images."""
    optional: dict[str, Any] = {}
    if isinstance(dataset, Segmentation) and TRUTH in dataset.concepts:
        optional["classes"] = {
            name: ClassList(
                list=kinds.class_list(maps).digest(digests),
                void=maps.void,
                **({"suffix": maps.label_suffix} if maps.label_suffix is not None else {}),
            )
            for name, maps in dataset.label_maps.items()
        }
        if dataset.exif is not None:
            optional["exif"] = dataset.exif
    if named := [name for name in dataset.concepts if name in known]:
        optional["segmenters"] = {name: segmenters.settings(known[name], digests) for name in named}
    return Settings(
        sources=dataset.concepts, split=dataset.examined_split, label_map_size=dataset.label_map_size, **optional
    )


def run(job: Job[Settings]) -> None:
    from pipeline.storage.store import Ledger, StoreRef, attributes, metadata_files, write

    job.begin()
    dataset, images, settings = job.dataset_spec, job.images, job.settings
    folder = job.folder
    store = folder / "concepts.zarr"
    ledger = Ledger(store.with_suffix(".ledger"))
    networks = models(job)
    wanted = wanted_categories(dataset, job.config)
    size = dataset.label_map_size or images.size
    categories = {each.name: each for each in open_store(store, ledger, images, size, wanted)}
    shards = images.shards(settings.split)
    image_id = images.image_ids()
    listed = kinds.listing(dataset, job.scratch)
    if listed.digest() != job.parent_job("ingest").settings.listing:
        raise MicrotomeError(f"data set {job.dataset!r} changed while this run went on: run again")
    index_of = {str(name): index for index, name in enumerate(listed.image_id)}
    parts = parts_of(job, store, ledger, shards, {name: each.numbers for name, each in categories.items()})

    def arguments(shard: str, names: list[str]) -> tuple:
        """Build a task's arguments when it is submitted: the paths of a million label maps are not held at once."""
        start, stop = images.range(int(shard))
        items = []
        for name in map(str, image_id[start:stop]):
            index = index_of.get(name)
            paths, stamps = {}, {}
            if index is not None:
                sizes, times = listed.label_map_size[index].tolist(), listed.label_map_mtime_ns[index].tolist()
                paths = {c: listed.label_map(index, c) for c in listed.label_map_path}
                stamps = dict(zip(paths, zip(sizes, times, strict=True), strict=True))
                stamps[kinds.IMAGE] = int(listed.size[index]), int(listed.mtime_ns[index])
            items.append((name if index is not None else None, paths, stamps))
        missing = [categories[name] for name in names]
        used = {c.source: networks[c.source] for c in missing if c.source in networks}
        pixels = StoreRef(images.store, images.files_of(int(shard)))
        return dataset, store, pixels, shard, start, items, missing, used, images.size, size

    with job.workers() as workers:
        if left := lacking(parts):
            need = memory_need(images.shard_images, images.size, len(categories))
            used = {categories[name].source for names in left.values() for name in names}
            asked = [(networks[name].spec, images.size) for name in networks if name in used]
            need += max(run_tasks(workers, segmenters.memory_need, asked, len(asked), f"{job.name}: size"), default=0)
            job.check_memory(need, REMEDY)
        made = job.resumed(workers, label_shard, parts, arguments, REMEDY)

    entries = {name: list(own.entries().values()) for name, own in parts.items()}
    counted = images.counted(settings.split)
    counts = set(map(str, image_id[counted]))
    refused = {k: v for row in entries.values() for entry in row for k, v in entry["refused"].items() if k in counts}
    allowed = getattr(dataset, "max_bad_fraction", 0.0)
    if len(refused) > allowed * counted.sum():
        shown = "; ".join(f"{name!r}: {reason}" for name, reason in sorted(refused.items())[:5])
        raise MicrotomeError(
            f"data set {job.dataset!r}: the label maps of {len(refused)} of {counted.sum()} images were refused, more "
            f"than max_bad_fraction = {allowed:g} allows: {shown}"
        )
    files = {name: value for own in parts.values() for name, value in own.files().items()}
    output = digest(
        {
            "files": files,
            "refused": sorted(refused),
            "categories": [[name, each.numbers] for name, each in categories.items()],
        }
    )
    quarantine = quarantine_csv(refused, Path(getattr(dataset, "root", "")))
    write_atomically(folder / "concepts-quarantine.csv", quarantine)
    files |= write(store, {"category": ((0,), np.array(attributes(store)["categories"], dtype=object))})
    files = manifest.within("concepts.zarr", files | metadata_files(store))
    files["concepts-quarantine.csv"] = (len(quarantine), crc32c(quarantine))
    result = Labelled(
        shards=shards,
        categories=[
            Category(
                name=name,
                place=each.place,
                numbers=each.numbers,
                concepts=list(wanted[name]),
                contents=[entry["content"] for entry in entries[name]],
            )
            for name, each in categories.items()
        ],
        refused=sorted(refused),
        size=size,
    )
    job.finish(output, files, result, made=(len(made), len(shards)))


def models(job: Job[Settings]) -> dict[str, segmenters.Model]:
    """Return a data set's segmenters as tasks name them, with the plan's checkpoints."""
    return {
        name: segmenters.Model(name, job.config.segmenters[name].model_dump_json(), digest(made_of["checkpoint"]))
        for name, made_of in (job.settings.segmenters or {}).items()
    }


def parts_of(
    job: Job[Settings], store: Path, ledger: Ledger, shards: Sequence[int], numbers: Mapping[str, Sequence[int]]
) -> dict[str, Parts]:
    """Return the shards of each category, with the id of each shard's label maps.

    A segmenter's ids do not depend on other categories.
    """
    images, settings, found = job.images, job.settings, {}
    records = Ingested.read(job.parent("ingest").result).records
    for category, own_numbers in numbers.items():
        source, _, name = category.partition("/")
        ids = {}
        for shard in shards:
            made_of: list[Any]
            if source in job.config.segmenters:
                own = (settings.segmenters or {})[source]
                own = own | {"categories": own["categories"][name]} | segmenters.platform(job.cluster.on_gpus)
                made_of = [images.contents[shard], own]
            elif source == PIXELS:
                made_of = [images.contents[shard]]
            else:
                classes = (settings.classes or {}).get(name)
                made_of = [records[shard], classes.written() if classes is not None else None]
                made_of += [settings.exif] if settings.exif is not None else []
            ids[str(shard)] = digest([VERSION, *made_of, category, own_numbers, settings.label_map_size])
        found[category] = Parts(store, ids, ledger, suffix=f" {category}")
    return found


def memory_need(images: int, size: tuple[int, int], categories: int) -> int:
    """Return the bytes of a task: label maps as read, numbered and compressed, and the pixels for colours."""
    return images * size[0] * size[1] * (6 * categories + 12)


def pending(job: Job[Settings]) -> tuple[int, int]:
    """Count the shards that a run would label now, and all of them, given the ingested images."""
    from pipeline.storage.store import Ledger

    store = job.folder / "concepts.zarr"
    ledger = Ledger(store.with_suffix(".ledger"))
    known = ledger.entries.get(TABLE, {}).get("concepts", {})
    number_of = {(entry["category"], entry["name"]): int(number) for number, entry in known.items()}
    numbers = {
        category: [number_of.get((category, name), 0) for name in names]
        for category, names in wanted_categories(job.dataset_spec, job.config).items()
    }
    shards = job.images.shards(job.settings.split)
    return len(lacking(parts_of(job, store, ledger, shards, numbers))), len(shards)


def made(job: Job) -> list[Path]:
    return [job.folder / "concepts.zarr", job.folder / "concepts.ledger"]


def open_store(
    store: Path, ledger: Ledger, images: Images, size: tuple[int, int], wanted: Mapping[str, Sequence[str]]
) -> list[Numbering]:
    """Create or reopen the store; append new categories and concepts.

    If the store's zarr.json is damaged, its ledger still holds the assigned numbers.
    """
    from pipeline.storage.store import Array, attributes, create, remove_partials

    known = attributes(store) or ledger.entries.get(TABLE, {})
    table = {
        int(number): {"name": entry["name"], "category": entry["category"]}
        for number, entry in known.get("concepts", {}).items()
    }
    places = list(known.get("categories", []))
    number_of = {(entry["category"], entry["name"]): number for number, entry in table.items()}
    for category, names in wanted.items():
        if category not in places:
            places.append(category)
        for name in names:
            if (category, name) not in number_of:
                number = max(table, default=0) + 1
                table[number] = {"name": name, "category": category}
                number_of[category, name] = number
    if max(table, default=0) > UINT16:
        raise MicrotomeError(f"{store}: {len(table)} concepts, a label map can hold {UINT16}")
    shape = (images.count, len(places), *size)
    arrays = {
        "label_map": Array(("image", "category", "y", "x"), shape, np.uint16, (images.shard_images, 1, *size)),
        "category": Array(("category",), (len(places),), str, (len(places),), fill=""),
    }
    attrs = {"concepts": {str(k): v for k, v in sorted(table.items())}, "categories": places}
    create(store, arrays, attrs)
    if ledger.entries.get(TABLE, {}).get("id") != digest(attrs):
        ledger.record(TABLE, digest(attrs), {}, **attrs)
    remove_partials(store)
    return [
        Numbering(name, places.index(name), tuple(number_of[name, concept] for concept in concepts))
        for name, concepts in wanted.items()
    ]


def questions(job: Job) -> list[Question]:
    """Return the inspection's questions about a data set's segmenters."""
    return list(_questions(job).values())


def _questions(job: Job[Settings]) -> dict[str, Question]:
    found, size = {}, list(ingested(job))
    for name, made_of in (job.settings.segmenters or {}).items():
        request = {"segmenter": job.config.segmenters[name].model_dump(), "size": size}
        found[name] = Question(
            f"segmenter {name!r} on {job.dataset!r}", inspected(job.scratch, [made_of, size]), request
        )
    return found


def speeds(job: Job[Settings]) -> list[Question]:
    """Return the probe's questions about the speed of a data set's segmenters."""
    return [_speed(job, name) for name in job.settings.segmenters or {}]


def _speed(job: Job, name: str) -> Question:
    spec = job.config.segmenters[name]
    random = spec.model_copy(update={"weights": "random", "prefix": None, "within": None})
    size = spec.resize or ingested(job)
    return speed_of(job, random, [3, *size], f"segmenter {name!r} on {job.dataset!r}")


def sizes(job: Job) -> Iterator[str]:
    """Yield a line on the concepts that each segmenter names."""
    for question in questions(job):
        concepts = question.answer["concepts"]
        named = ", ".join(f"{len(names)} of {category}" for category, names in concepts.items())
        yield f"{question.name}: concepts, {named}"


def cost(job: Job, done: bool) -> Cost:
    counted, dataset = Counted.of(job), job.dataset_spec
    height, width = counted.label_map_size
    raw = 2 * height * width * len(counted.categories) * counted.images
    name = "concepts.zarr"
    expected = raw * SHRINKS["labels"]
    store = Store(name, raw, expected, expected if done else size_of(job.folder / name))
    asked = _questions(job)
    probes = [_speed(job, each).answer for each in asked]
    rates: list[float] = [probe.get("images_per_second", 0.0) for probe in probes]  # 0: unknown
    known = all(rates)
    seconds = counted.images * len(counted.categories) * LABELS + sum(counted.images / rate for rate in rates if rate)
    memory = memory_need(dataset.shard_images, counted.size, len(counted.categories))
    memory += max((question.answer["memory"] for question in asked.values()), default=0)
    together = {"images_per_second": 1 / sum(1 / rate for rate in rates)} if rates and known else {}
    together |= {"images": min((probe.get("images", 0) for probe in probes), default=0)}
    return Cost(
        (store,),
        counted.images,
        counted.shards(dataset.shard_images),
        seconds if known else None,
        memory,
        rate_of(together) if rates else "",
    )


STAGE = Stage(
    name="concepts",
    version=VERSION,
    says="Label maps of {wildcards.dataset}",
    place="dataset",
    steps=steps,
    run=run,
    settings=Settings,
    code=CODE,
    questions=questions,
    speeds=speeds,
    sizes=sizes,
    cost=cost,
    pending=pending,
    counts="shards of label maps to make",
    made=made,
)
