"""The stage `concepts`: label maps of every source, at one size, into `concepts.zarr`.

Writes
    concepts.zarr            label_map (image, category, y, x) uint16, 0 = nothing ·
                             coords category "<source>/<category>" · attrs concepts {number: {name, category}}
    concepts-quarantine.csv  image_id, path, reason: images whose label maps were refused; they count nowhere

Sources are the data set's own label maps (`truth`), the colours of the pixels (`pixels`), and segmentation networks, by
name. Concept numbers are unique over the categories and only ever appended: another source leaves the label maps of
those that are there as they are, and so does another version of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.core import PIXELS, TRUTH, AnyDataset, Config, Segmentation, Segmenter
from pipeline.data import kinds as datasets
from pipeline.errors import MicrotomeError
from pipeline.networks import segmenters
from pipeline.plan import job as stage
from pipeline.storage.identity import FileDigests, crc32c, digest
from pipeline.storage.manifest import Files, Manifest, write_atomically
from pipeline.storage.tables import quarantine_csv
from pipeline.workers.pool import check_memory, client, run_tasks

if TYPE_CHECKING:
    from pipeline.data.images import Images
    from pipeline.plan.step import Plan, Step
    from pipeline.storage.store import Ledger

REMEDY = "lower `shard_images` of the data set or `numerics.micro_batch` of the segmenter"
VERSION = 3
CODE = (
    "kernels/images/colour_names.py",
    "kernels/images/grey.py",
    "kernels/images/whiten.py",
    "kernels/images/segmentation.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/stages/concepts/stage.py",
    "pipeline/data/kinds.py",
    "pipeline/data/decode.py",
    "pipeline/networks/forward.py",
    "pipeline/data/label_maps.py",
    "pipeline/networks/layers.py",
    "pipeline/networks/libraries",
    "pipeline/networks/build.py",
    "pipeline/data/scenes",
    "pipeline/networks/segmenters.py",
)
COLOUR = f"{PIXELS}/colour"  # the category computed from the pixels
UINT16 = 65535
TABLE = "table"  # the entry of the ledger that holds the concepts with their numbers, and the categories


def settings(dataset: AnyDataset, known: Mapping[str, Segmenter], digests: FileDigests) -> dict[str, Any]:
    """What the label maps' id is made of beside the images: the sources, in order, class lists and segmenters."""
    made_of: dict[str, Any] = {
        "sources": list(dataset.concepts),
        "split": dataset.dissect.split,
        "label_map_size": dataset.label_map_size,
    }
    if isinstance(dataset, Segmentation) and TRUTH in dataset.concepts:
        made_of["classes"] = {
            name: {"list": digests(maps.classes), "void": maps.void} for name, maps in dataset.label_maps.items()
        }
    named = [name for name in dataset.concepts if name in known]
    if named:
        made_of["segmenters"] = {name: segmenters.settings(known[name], digests) for name in named}
    return made_of


@dataclass(frozen=True)
class Category:
    """One category as tasks name it: its place on the category axis and the number of each of its concepts."""

    name: str
    place: int
    numbers: tuple[int, ...]  # of the concepts, in the order of the source's own numbers 1, 2, ...

    @property
    def source(self) -> str:
        return self.name.partition("/")[0]

    @property
    def own_name(self) -> str:
        """Its name within the source."""
        return self.name.partition("/")[2]


@dataclass
class Shard:
    shard: int
    files: dict[str, Files]  # by category
    contents: dict[str, str]
    refused: dict[str, str] = field(default_factory=dict)


def run(plan: Plan, step: Step) -> None:
    from pipeline.data.images import Images
    from pipeline.storage.store import Ledger, attributes, metadata_files, write

    assert step.dataset is not None
    began = stage.begin(plan, step)
    dataset = plan.config.datasets[step.dataset]
    images = Images.of(plan, step)
    _, ingest = plan.parent(step, "ingest")
    folder = plan.results / step.dataset
    store = folder / "concepts.zarr"
    ledger = Ledger(store.with_suffix(".ledger"))
    networks = models(plan, step)
    wanted = wanted_categories(dataset, plan.config)
    categories = open_store(store, ledger, images, label_map_size(dataset, images), wanted)
    shards = images.shards(step.settings["split"])
    image_id = images.image_ids()
    listed = datasets.listing(dataset, plan.scratch)
    index_of = {str(name): index for index, name in enumerate(listed.image_id)}

    size = label_map_size(dataset, images)

    def id_of(shard: int, category: Category) -> str:
        return shard_id(plan, step, images, ingest, shard, category.name, category.numbers)

    lacking = {}
    for shard in shards:
        missing = [c for c in categories if not ledger.get(f"{shard} {c.name}", id_of(shard, c), store)]
        if missing:
            lacking[shard] = missing

    def tasks() -> Iterator[tuple]:
        """Made as they are handed out: the paths of a million label maps are not held at once."""
        for shard, missing in lacking.items():
            start, stop = images.range(shard)
            items = []
            for name in map(str, image_id[start:stop]):
                index = index_of.get(name)
                paths = {c: listed.label_map(index, c) for c in listed.label_map_path} if index is not None else {}
                items.append((name if index is not None else None, paths))
            used = {c.source: networks[c.source] for c in missing if c.source in networks}
            files = images.files_of(shard)
            yield (dataset, store, images.store, files, shard, start, items, missing, used, images.size, size)

    with client(plan.config.cluster, plan.scratch) as workers:
        if lacking:
            need = memory_need(images.shard_images, images.size, len(categories))
            used = {c.source for missing in lacking.values() for c in missing}
            asked = [(networks[name].spec, images.size) for name in networks if name in used]
            need += max(run_tasks(workers, segmenters.memory_need, asked, len(asked), f"{step.name}: size"), default=0)
            check_memory(plan.config.cluster, need, step.name, REMEDY)
        for done in run_tasks(workers, label_shard, tasks(), len(lacking), step.name, REMEDY):
            for category in categories:
                if category.name in done.files:
                    ledger.record(
                        f"{done.shard} {category.name}",
                        id_of(done.shard, category),
                        done.files[category.name],
                        content=done.contents[category.name],
                        refused=done.refused if category.source == TRUTH else {},
                    )

    entries = {c.name: [ledger.entries[f"{shard} {c.name}"] for shard in shards] for c in categories}
    counted = images.counted(step.settings["split"])
    counts = set(map(str, image_id[counted]))
    refused = {k: v for row in entries.values() for entry in row for k, v in entry["refused"].items() if k in counts}
    allowed = getattr(dataset, "max_bad_fraction", 0.0)
    if len(refused) > allowed * counted.sum():
        shown = "; ".join(f"{name!r}: {reason}" for name, reason in sorted(refused.items())[:5])
        raise MicrotomeError(
            f"data set {step.dataset!r}: the label maps of {len(refused)} of {counted.sum()} images were refused, more "
            f"than max_bad_fraction = {allowed:g} allows: {shown}"
        )
    files = ledger.files(f"{shard} {c.name}" for c in categories for shard in shards)
    output = digest(
        {"files": files, "refused": sorted(refused), "categories": [[c.name, c.numbers] for c in categories]}
    )
    quarantine = quarantine_csv(refused, Path(getattr(dataset, "root", "")))
    write_atomically(folder / "concepts-quarantine.csv", quarantine)
    files |= write(store, {"category": ((0,), np.array(attributes(store)["categories"], dtype=object))})
    files = stage.within("concepts.zarr", files | metadata_files(store))
    files["concepts-quarantine.csv"] = (len(quarantine), crc32c(quarantine))
    result = {
        "shards": shards,
        "categories": [
            {
                "name": c.name,
                "place": c.place,
                "numbers": c.numbers,
                "concepts": wanted[c.name],
                "contents": [entry["content"] for entry in entries[c.name]],
            }
            for c in categories
        ],
        "refused": sorted(refused),
        "size": size,
    }
    stage.finish(plan, step, began, output, files, result, made=(len(lacking), len(shards)))


def models(plan: Plan, step: Step) -> dict[str, segmenters.Model]:
    """The segmenters of a data set as tasks name them, with the checkpoints that the plan was made with."""
    return {
        name: segmenters.Model(name, plan.config.segmenters[name].model_dump_json(), digest(made_of["checkpoint"]))
        for name, made_of in step.settings.get("segmenters", {}).items()
    }


def shard_id(
    plan: Plan, step: Step, images: Images, ingest: Manifest, shard: int, category: str, numbers: Sequence[int]
) -> str:
    """What the label maps of one shard and category are made from. Of a segmenter, other categories do not matter."""
    source, _, name = category.partition("/")
    made_of: list[Any]
    if source in plan.config.segmenters:
        own = step.settings["segmenters"][source]
        own = own | {"categories": own["categories"][name]} | segmenters.platform(plan.config.cluster.on_gpus)
        made_of = [images.contents[shard], own]
    else:
        classes = step.settings.get("classes", {}).get(name)
        made_of = [images.contents[shard]] if source == PIXELS else [ingest.result["records"][shard], classes]
    return digest([VERSION, *made_of, category, numbers, step.settings["label_map_size"]])


def memory_need(images: int, size: tuple[int, int], categories: int) -> int:
    """Bytes of a task: label maps as read, numbered and compressed, and the pixels that colours come from."""
    return images * size[0] * size[1] * (6 * categories + 12)


def pending(plan: Plan, step: Step) -> tuple[int, int]:
    """How many shards a run would label now, of how many, with the images that are ingested."""
    from pipeline.data.images import Images
    from pipeline.storage.store import Ledger

    assert step.dataset is not None
    images = Images.of(plan, step)
    _, ingest = plan.parent(step, "ingest")
    store = plan.results / step.dataset / "concepts.zarr"
    ledger = Ledger(store.with_suffix(".ledger"))
    known = ledger.entries.get(TABLE, {}).get("concepts", {})
    number_of = {(entry["category"], entry["name"]): int(number) for number, entry in known.items()}
    wanted = {
        category: [number_of.get((category, name), 0) for name in names]
        for category, names in wanted_categories(plan.config.datasets[step.dataset], plan.config).items()
    }
    shards = images.shards(step.settings["split"])
    missing = [
        shard
        for shard in shards
        if not all(
            ledger.get(f"{shard} {name}", shard_id(plan, step, images, ingest, shard, name, numbers), store)
            for name, numbers in wanted.items()
        )
    ]
    return len(missing), len(shards)


def discard(plan: Plan, step: Step) -> list[Path]:
    """The files and folders that this step made."""
    assert step.dataset is not None
    folder = plan.results / step.dataset
    return [folder / "concepts.zarr", folder / "concepts.ledger"]


def wanted_categories(dataset: AnyDataset, wanted: Config) -> dict[str, Sequence[str]]:
    """Concept names by category, of the sources the configuration names, in its order."""
    from kernels.images.colour_names import COLOURS

    found: dict[str, Sequence[str]] = {}
    for source in dataset.concepts:
        if source == PIXELS:
            found[COLOUR] = list(COLOURS)
        else:
            truth = source == TRUTH
            own = datasets.truth_categories(dataset) if truth else segmenters.concepts(wanted.segmenters[source])
            found |= {f"{source}/{name}": list(names) for name, names in own.items()}
    return found


def open_store(
    store: Path, ledger: Ledger, images: Images, size: tuple[int, int], wanted: Mapping[str, Sequence[str]]
) -> list[Category]:
    """Create the store or take it up; categories and concepts that are new to it are appended.

    Where the store's zarr.json is damaged, its ledger knows the numbers that were given out.
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
        Category(name, places.index(name), tuple(number_of[name, concept] for concept in concepts))
        for name, concepts in wanted.items()
    ]


def label_shard(
    dataset: AnyDataset,
    store: Path,
    images: Path,
    image_files: Files,
    shard: int,
    start: int,
    items: list[tuple[str | None, dict[str, Path | None]]],
    categories: list[Category],
    networks: Mapping[str, segmenters.Model],
    image_size: tuple[int, int],
    size: tuple[int, int],
) -> Shard:
    """On a worker: the label maps of one shard, in the given categories, numbered and written.

    They are made at the size of the images, and taken to another size by the label under the centre of each position.
    """
    from pipeline.storage.store import Reader, write

    maps: dict[str, np.ndarray] = {}  # in the source's own numbers
    refused: dict[str, str] = {}
    for source in dict.fromkeys(category.source for category in categories):
        names = [category.own_name for category in categories if category.source == source]
        if source == TRUTH:
            own, refused = _truth(dataset, items, names, image_size)
        else:
            pixels = np.asarray(Reader(images, image_files)["image"][start : start + len(items)])
            own = _colours(pixels) if source == PIXELS else _segmented(networks[source], pixels, names, items)
        maps |= {f"{source}/{name}": block for name, block in own.items()}
    files, contents = {}, {}
    for category in categories:
        block = np.array([0, *category.numbers], np.uint16)[resized(maps[category.name], size)][:, None]
        files[category.name] = write(store, {"label_map": ((start, category.place, 0, 0), block)})
        # Whether truth was read in this task or in an earlier one says nothing of the other sources.
        missing = sorted(refused) if category.source == TRUTH else []
        contents[category.name] = hashlib.blake2b(block.tobytes() + repr(missing).encode(), digest_size=16).hexdigest()
    return Shard(shard, files, contents, refused)


def label_map_size(dataset: AnyDataset, images: Images) -> tuple[int, int]:
    """(height, width) of the label maps of a data set."""
    return dataset.label_map_size or images.size


def resized(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Label maps (image, y, x) at another size: position i of n takes the label at floor((i + 1/2) m / n) of m."""
    if maps.shape[1:] == size:
        return maps
    rows, columns = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip(size, maps.shape[1:], strict=True))
    return maps[:, rows[:, None], columns]


def _truth(
    dataset: AnyDataset,
    items: list[tuple[str | None, dict[str, Path | None]]],
    names: Sequence[str],
    size: tuple[int, int],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The data set's own label maps, uint16 (image, y, x) by category, and why images were refused."""
    from pipeline.data.decode import Refused

    maps = {name: np.zeros((len(items), *size), np.uint16) for name in names}
    refused: dict[str, str] = {}
    for at, (image_id, paths) in enumerate(items):
        if image_id is None:
            continue
        try:
            own = datasets.read_label_maps(dataset, image_id, paths, size)
        except Refused as error:
            refused[image_id] = error.reason
            continue
        for name in names:
            maps[name][at] = own[name]
    return maps, refused


def _colours(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The colour name of every pixel, uint16 (image, y, x), numbered from 1 in the order of `COLOURS`."""
    from kernels.images.colour_names import colour_names

    return {"colour": colour_names(np.moveaxis(pixels, 1, -1)).astype(np.uint16) + 1}


def _segmented(
    model: segmenters.Model,
    pixels: np.ndarray,
    names: Sequence[str],
    items: list[tuple[str | None, dict[str, Path | None]]],
) -> dict[str, np.ndarray]:
    try:
        return segmenters.label_maps(model, pixels, names)
    except segmenters.NonFiniteScoresError as error:
        (at,) = error.args
        raise MicrotomeError(
            f"segmenter {model.name!r}: the scores for image {items[at][0]!r} are not finite (NaN or infinity)"
        ) from None
