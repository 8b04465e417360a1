"""The stage `ingest`: every image is decoded once, into `images.zarr`; no later pass opens an image file.

Writes
    images.zarr     image (image, channel, y, x) uint8 · label (image) int64, -1: none · split (image) · valid (image) ·
                    coords image_id · attrs classes
    quarantine.csv  image_id, path, reason: every input that was refused. It keeps its slot, with valid = False
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config.core import AnyDataset
from pipeline.data import kinds as datasets
from pipeline.errors import MicrotomeError
from pipeline.plan import job as stage
from pipeline.storage.identity import crc32c, digest
from pipeline.storage.manifest import Files, write_atomically
from pipeline.storage.tables import quarantine_csv
from pipeline.workers.pool import check_memory, client, run_tasks

if TYPE_CHECKING:
    from pipeline.data.listing import Listing
    from pipeline.plan.step import Plan, Step
    from pipeline.storage.store import Ledger

VERSION = 2
CODE = (
    "pipeline/data/arrays.py",
    "pipeline/data/kinds.py",
    "pipeline/data/decode.py",
    "pipeline/stages/ingest/stage.py",
    "pipeline/data/listing.py",
    "pipeline/data/plain_pickle.py",
    "pipeline/data/published_layouts.py",
    "pipeline/data/scenes",
    "pipeline/data/snapshot.py",
    "pipeline/data/csv_tables.py",
    "pipeline/data/torchvision_data.py",
)
SOURCE = "source"  # the entry of the ledger that says where the images come from
REMEDY = "lower `shard_images` or `max_pixels` of the data set"
COLUMN = (65536,)  # chunk of what has one value an image: the same for any number, so that a longer store keeps its ids


@dataclass
class Shard:
    """What a task says of its shard: the files it wrote, the digest of its pixels, and what it refused and why."""

    shard: int
    files: Files
    content: str
    refused: dict[str, str] = field(default_factory=dict)


def run(plan: Plan, step: Step) -> None:
    from pipeline.storage.store import Ledger, metadata_files, write

    assert step.dataset is not None
    began = stage.begin(plan, step)
    dataset = plan.config.datasets[step.dataset]
    folder = plan.results / step.dataset
    store = folder / "images.zarr"
    listed = datasets.listing(dataset, plan.scratch)
    if listed.digest() != step.settings["listing"]:
        raise MicrotomeError(f"data set {step.dataset!r} changed while this run began: run again")
    source = step.settings["source"]
    ledger = Ledger(store.with_suffix(".ledger"))
    image_id, at = slots_of(listed, store, ledger, source)
    size = (step.settings["size"][0], step.settings["size"][1])
    per_shard = dataset.shard_images
    open_store(store, dataset, len(image_id), size, listed.classes, source, ledger)

    used = is_used(listed, at)
    ids = shard_ids(step, listed, at, per_shard)
    missing = [shard for shard, id in ids.items() if not ledger.get(str(shard), id, store)]

    def tasks() -> Iterator[tuple]:
        """Made as they are handed out: a million names are not held twice."""
        for shard in missing:
            part = slice(shard * per_shard, (shard + 1) * per_shard)
            items = [str(name) if i >= 0 else None for name, i in zip(image_id[part], at[part], strict=True)]
            known = {name: listed.refused[name] for name in items if name in listed.refused}
            yield (dataset, store, shard, part.start, items, known, size)

    if missing:
        check_memory(plan.config.cluster, memory_need(dataset, size), step.name, REMEDY)
    with client(plan.config.cluster, plan.scratch) as workers:
        for done in run_tasks(workers, ingest_shard, tasks(), len(missing), step.name, REMEDY):
            ledger.record(str(done.shard), ids[done.shard], done.files, content=done.content, refused=done.refused)

    entries = {shard: ledger.entries[str(shard)] for shard in ids}
    refused = {name: reason for entry in entries.values() for name, reason in entry["refused"].items()}
    is_refused = np.fromiter((name in refused for name in image_id), bool, len(image_id))
    valid = used & ~is_refused
    refused = {str(name): refused[name] for name in image_id[used & is_refused]}
    files = ledger.files(map(str, ids))
    _check_refused(step.dataset, refused, len(listed.images), getattr(dataset, "max_bad_fraction", 1.0))
    if not valid.any():
        raise MicrotomeError(
            f"data set {step.dataset!r}: not one of {len(listed.images)} images can be used: {_some(refused)}"
        )
    label = np.where(used, listed.label[at], -1)
    split = np.where(used, listed.split[at], "")
    files |= write(
        store,
        {"label": ((0,), label), "split": ((0,), split), "valid": ((0,), valid), "image_id": ((0,), image_id)},
    )
    quarantine = quarantine_csv(refused, listed.root)
    write_atomically(folder / "quarantine.csv", quarantine)

    shard_of = np.arange(len(image_id)) // per_shard
    result = {
        "images": len(image_id),
        "size": list(size),
        "shard_images": per_shard,
        "classes": listed.classes,
        "splits": {str(name): shards_of(shard_of[valid & (split == name)]) for name in np.unique(split[valid])},
        # None: no image of the shard is used
        "contents": [entries[shard]["content"] if shard in entries else None for shard in range(shard_of[-1] + 1)],
        "records": [ids.get(shard) for shard in range(shard_of[-1] + 1)],
        "refused": len(refused),
        "ignored": listed.ignored,
    }
    output = digest({"files": files, "classes": listed.classes})
    files = stage.within("images.zarr", files | metadata_files(store))
    files["quarantine.csv"] = (len(quarantine), crc32c(quarantine))
    stage.finish(plan, step, began, output, files, result, made=(len(missing), len(ids)))


def memory_need(dataset: AnyDataset, size: tuple[int, int]) -> int:
    """Bytes of a task: the pixels of a shard, as read and compressed, and what reading takes."""
    return 2 * 3 * dataset.shard_images * size[0] * size[1] + datasets.memory_need(dataset)


def pending(plan: Plan, step: Step) -> tuple[int, int]:
    """How many shards a run would decode now, of how many."""
    from pipeline.storage.store import Ledger

    assert step.dataset is not None
    dataset = plan.config.datasets[step.dataset]
    store = plan.results / step.dataset / "images.zarr"
    listed = datasets.listing(dataset, plan.scratch)
    ledger = Ledger(store.with_suffix(".ledger"))
    _, at = slots_of(listed, store, ledger, step.settings["source"])
    ids = shard_ids(step, listed, at, dataset.shard_images)
    return sum(not ledger.get(str(shard), id, store) for shard, id in ids.items()), len(ids)


def discard(plan: Plan, step: Step) -> list[Path]:
    """The files and folders that this step made."""
    assert step.dataset is not None
    folder = plan.results / step.dataset
    return [folder / "images.zarr", folder / "images.ledger"]


def slots_of(listed: Listing, store: Path, ledger: Ledger, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Image id of every slot, and its place in the listing (-1: gone); known images keep their slots."""
    from pipeline.data.listing import slots

    return slots(listed, known_ids(store) if source_of(store, ledger) == source else None)


def is_used(listed: Listing, at: np.ndarray) -> np.ndarray:
    """Boolean (slot,): the image of the slot is listed and within the data set's bound."""
    used = at >= 0
    if listed.chosen is not None:
        used[used] = listed.chosen[at[used]]
    return used


def shard_ids(step: Step, listed: Listing, at: np.ndarray, per_shard: int) -> dict[int, str]:
    """What each shard is made from: the records of all its images, within the bound or not, and how they are decoded.

    A shard whose images are all beyond the bound has none: it stays as it is. One with an image that is gone is made,
    so that nothing of that image stays.
    """
    common = {key: value for key, value in step.settings.items() if key not in ("listing", "images")}
    wanted = np.unique(np.flatnonzero(is_used(listed, at) | (at < 0)) // per_shard)
    known = (at >= 0) & np.isin(np.arange(len(at)) // per_shard, wanted)
    records = np.zeros((len(at), 16), np.uint8)
    records[known] = listed.record_digests(at[known])
    ids = {}
    for shard in wanted.tolist():
        part = slice(shard * per_shard, (shard + 1) * per_shard)
        made_of = [record.tobytes().hex() if i >= 0 else "" for record, i in zip(records[part], at[part], strict=True)]
        ids[shard] = digest([common, made_of])
    return ids


def shards_of(shard: np.ndarray) -> dict[str, int]:
    """How many images each shard holds, from the shard of every image; shards in order, as JSON names them."""
    found, count = np.unique(shard, return_counts=True)
    return {str(name): int(images) for name, images in zip(found, count, strict=True)}


def source_of(store: Path, ledger: Ledger) -> str | None:
    """Return the source of the images that a store holds: as it says or, where its zarr.json is damaged, its ledger."""
    from pipeline.storage.store import attributes

    return attributes(store).get("source") or ledger.entries.get(SOURCE, {}).get("id")


def known_ids(store: Path) -> np.ndarray | None:
    """Return the image ids of the store in slot order.

    Slots at the end without an id are those of an ingest that was cut short: they are given out again.
    """
    import zarr

    from pipeline.storage.store import Located

    try:
        array = zarr.open_array(Located(store, read_only=True), path="image_id", mode="r", zarr_format=3)
        ids = np.asarray(array[:], dtype=object)
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return ids[: np.flatnonzero(ids != "").max(initial=-1) + 1]


def open_store(
    store: Path, dataset: AnyDataset, count: int, size: tuple[int, int], classes: list[str], source: str, ledger: Ledger
) -> None:
    """Create the store, or bring the one that holds this data set to more slots; another data set's makes way."""
    from pipeline.storage.store import Array, create, remove, remove_partials

    if source_of(store, ledger) != source:
        remove(store)
        ledger.clear()
    block = (dataset.shard_images, 3, *size)
    arrays = {
        "image": Array(("image", "channel", "y", "x"), (count, 3, *size), np.uint8, block),
        "label": Array(("image",), (count,), np.int64, COLUMN, fill=-1),
        "split": Array(("image",), (count,), str, COLUMN, fill=""),
        "valid": Array(("image",), (count,), bool, COLUMN, fill=False),
        "image_id": Array(("image",), (count,), str, COLUMN, fill=""),
    }
    create(store, arrays, {"classes": classes, "source": source}, coordinates=["image_id"])
    if ledger.entries.get(SOURCE, {}).get("id") != source:
        ledger.record(SOURCE, source, {})
    remove_partials(store)


def ingest_shard(
    dataset: AnyDataset,
    store: Path,
    shard: int,
    start: int,
    items: list[str | None],
    known_refused: dict[str, str],
    size: tuple[int, int],
) -> Shard:
    """On a worker: decode the images of one shard and write them. A refused or vanished image leaves black pixels."""
    from pipeline.data.decode import Refused
    from pipeline.storage.store import write

    pixels = np.zeros((len(items), 3, *size), np.uint8)
    refused = dict(known_refused)
    usable = np.zeros(len(items), bool)
    for i, image_id in enumerate(items):
        if image_id is None or image_id in refused:
            continue
        try:
            pixels[i] = datasets.read_image(dataset, image_id, size)
            usable[i] = True
        except Refused as error:
            refused[image_id] = error.reason
    content = hashlib.blake2b(pixels.tobytes() + usable.tobytes(), digest_size=16).hexdigest()
    return Shard(shard, write(store, {"image": ((start, 0, 0, 0), pixels)}), content, refused)


def _check_refused(name: str, refused: dict[str, str], count: int, allowed: float) -> None:
    if len(refused) > allowed * count:
        raise MicrotomeError(
            f"data set {name!r}: {len(refused)} of {count} images were refused, more than max_bad_fraction = "
            f"{allowed:g} allows: {_some(refused)}"
        )


def _some(refused: dict[str, str], shown: int = 5) -> str:
    lines = [f"{image_id!r}: {reason}" for image_id, reason in sorted(refused.items())[:shown]]
    return "; ".join(lines) + ("; ..." if len(refused) > shown else "")
