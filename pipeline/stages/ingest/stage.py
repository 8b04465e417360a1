"""The stage `ingest`: decode every image once, into `images.zarr`; no later pass opens an image file.

Writes
    images.zarr     image (image, channel, y, x) uint8 · label (image) int64, -1: none · split (image) · valid (image) ·
                    coords image_id · attrs classes
    quarantine.csv  image_id, path, reason: every refused input. It keeps its slot, with valid = False
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.datasets import AnyDataset, Generated
from pipeline.data import kinds
from pipeline.data.images import Ingested
from pipeline.errors import MicrotomeError, about
from pipeline.networks import generators
from pipeline.networks.generators import Maker
from pipeline.plan.cost import SHRINKS, Cost, Store
from pipeline.plan.inspected import inspected
from pipeline.plan.job import Job
from pipeline.plan.question import Question
from pipeline.plan.stage import Draft, Stage, Wanted
from pipeline.plan.step import Key
from pipeline.stages.ingest.settings import Settings
from pipeline.storage import manifest
from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import crc32c, digest
from pipeline.storage.object_storage import size_of
from pipeline.storage.tables import quarantine_csv
from pipeline.workers.resumable import Done, Parts

if TYPE_CHECKING:
    from pipeline.data.decode import Stamp
    from pipeline.data.listing import Listing
    from pipeline.storage.store import Ledger

VERSION = 2
CODE = (
    "pipeline/data/arrays.py",
    "pipeline/data/kinds.py",
    "pipeline/data/decode.py",
    "pipeline/stages/ingest/settings.py",
    "pipeline/stages/ingest/stage.py",
    "pipeline/data/listing.py",
    "pipeline/data/plain_pickle.py",
    "pipeline/data/published_layouts.py",
    "pipeline/data/scenes",
    "pipeline/data/snapshot.py",
    "pipeline/data/csv_tables.py",
    "pipeline/data/torchvision_data.py",
    "pipeline/networks/beside.py",
    "pipeline/networks/build.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/generators.py",
    "pipeline/networks/returned.py",
)
SOURCE = "source"  # the ledger entry with the source of the images
REMEDY = "lower `shard_images` or `max_pixels` of the data set"
IMAGE = 6e-3  # CPU seconds to decode and resize an image: assumed, until ingest has run once
COLUMN = (65536,)  # chunk of arrays with one value per image: fixed, so that a store that grows keeps its ids


def steps(draft: Draft) -> Iterator[Wanted]:
    for name, dataset in draft.config.datasets.items():
        settings = draft.summaries[name].settings
        if isinstance(dataset, Generated):
            generator = draft.config.generators[dataset.generator]
            with about(f"data set {name!r}"):
                settings = settings | generators.of_scenes(
                    dataset.generator, generator.latent, dataset.size, dataset.images
                )
                settings["generator"] = generators.settings_of(generator, draft.digests)
        yield Wanted(Key(dataset=name), Settings.read(settings))


def run(job: Job[Settings]) -> None:
    from pipeline.storage.store import Ledger, metadata_files, write

    job.begin()
    dataset, settings = job.dataset_spec, job.settings
    folder = job.folder
    store = folder / "images.zarr"
    listed = kinds.listing(dataset, job.scratch)
    if listed.digest() != settings.listing:
        raise MicrotomeError(f"data set {job.dataset!r} changed while this run began: run again")
    ledger = Ledger(store.with_suffix(".ledger"))
    image_id, at = slots_of(listed, store, ledger, settings.source)
    per_shard = dataset.shard_images
    maker = maker_of(job)
    latent = maker.generator.latent.shape if maker is not None else []
    open_store(store, dataset, len(image_id), settings.size, listed.classes, settings.source, ledger, latent)
    used = is_used(listed, at)
    parts = Parts(store, shard_ids(job.identity, listed, at, per_shard))

    def arguments(shard: str, _: list[str]) -> tuple:
        """Build a task's arguments when it is submitted: a million names are not held twice."""
        part = slice(int(shard) * per_shard, (int(shard) + 1) * per_shard)
        items = [
            (str(name), (int(listed.size[i]), int(listed.mtime_ns[i]))) if i >= 0 else None
            for name, i in zip(image_id[part], at[part], strict=True)
        ]
        known = {item[0]: listed.refused[item[0]] for item in items if item and item[0] in listed.refused}
        return dataset, store, shard, part.start, items, known, settings.size, maker

    if parts.missing():
        job.check_memory(memory_need(dataset, settings.size), REMEDY)
    with job.workers() as workers:
        made = job.resumed(workers, ingest_shard, {"": parts}, arguments, REMEDY)

    entries = {int(shard): entry for shard, entry in parts.entries().items()}
    refused = {name: reason for entry in entries.values() for name, reason in entry["refused"].items()}
    is_refused = np.fromiter((name in refused for name in image_id), bool, len(image_id))
    valid = used & ~is_refused
    refused = {str(name): refused[name] for name in image_id[used & is_refused]}
    files = parts.files()
    _check_refused(job.dataset, refused, len(listed.images), getattr(dataset, "max_bad_fraction", 1.0))
    if not valid.any():
        raise MicrotomeError(
            f"data set {job.dataset!r}: not one of {len(listed.images)} images can be used: {_some(refused)}"
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
    shards = range(shard_of[-1] + 1)
    cut = [entry["cut"] * entry["images"] for entry in entries.values() if "cut" in entry]
    told = {"cut": sum(cut) / len(listed.images)} if maker is not None else {}
    result = Ingested(
        images=len(image_id),
        size=settings.size,
        shard_images=per_shard,
        classes=listed.classes,
        splits={str(name): shards_of(shard_of[valid & (split == name)]) for name in np.unique(split[valid])},
        contents=[entries[shard]["content"] if shard in entries else None for shard in shards],
        records=[parts.ids.get(str(shard)) for shard in shards],
        refused=len(refused),
        ignored=listed.ignored,
        **told,
    )
    output = digest({"files": files, "classes": listed.classes})
    files = manifest.within("images.zarr", files | metadata_files(store))
    files["quarantine.csv"] = (len(quarantine), crc32c(quarantine))
    job.finish(output, files, result, made=(len(made), len(parts.ids)))


def maker_of(job: Job[Settings]) -> Maker | None:
    """Return the generator of the images, as tasks name it; None for images that are read."""
    made_of, dataset = job.settings.generator, job.dataset_spec
    if made_of is None or not isinstance(dataset, Generated):
        return None
    return Maker.of(dataset.generator, job.config.generators[dataset.generator], made_of["weights"])


def memory_need(dataset: AnyDataset, size: tuple[int, int]) -> int:
    """Return the bytes of a task: the pixels of a shard, as read and compressed, and the overhead of reading."""
    return 2 * 3 * dataset.shard_images * size[0] * size[1] + kinds.memory_need(dataset)


def pending(job: Job[Settings]) -> tuple[int, int]:
    """Count the shards that a run would decode now, and all of them."""
    from pipeline.storage.store import Ledger

    dataset, store = job.dataset_spec, job.folder / "images.zarr"
    listed = kinds.listing(dataset, job.scratch)
    _, at = slots_of(listed, store, Ledger(store.with_suffix(".ledger")), job.settings.source)
    parts = Parts(store, shard_ids(job.identity, listed, at, dataset.shard_images))
    return len(parts.missing()), len(parts.ids)


def questions(job: Job[Settings]) -> Iterator[Question]:
    """Yield the inspection's question about the generator of the images, if they are generated."""
    maker = maker_of(job)
    if maker is None:
        return
    request = {"generator": maker.generator.model_dump(mode="json"), "size": list(job.settings.size)}
    kept = inspected(job.scratch, [job.settings.generator, request["size"]])
    yield Question(f"generator {maker.name!r} of data set {job.dataset!r}", kept, request)


def made(job: Job) -> list[Path]:
    return [job.folder / "images.zarr", job.folder / "images.ledger"]


def cost(job: Job[Settings], done: bool) -> Cost:
    settings, name = job.settings, "images.zarr"
    raw = 3 * settings.size[0] * settings.size[1] * settings.images
    expected = raw * SHRINKS["pixels"]
    store = Store(name, raw, expected, expected if done else size_of(job.folder / name))
    memory = memory_need(job.dataset_spec, settings.size)
    return Cost(
        (store,), settings.images, -(-settings.images // settings.shard_images), settings.images * IMAGE, memory
    )


def slots_of(listed: Listing, store: Path, ledger: Ledger, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the image id of every slot, and its position in the listing (-1: gone); known images keep their slots."""
    from pipeline.data.listing import slots

    return slots(listed, known_ids(store) if source_of(store, ledger) == source else None)


def is_used(listed: Listing, at: np.ndarray) -> np.ndarray:
    """Return whether each slot's image is listed and within the data set's bound, as boolean (slot,)."""
    used = at >= 0
    if listed.chosen is not None:
        used[used] = listed.chosen[at[used]]
    return used


def shard_ids(identity: Mapping[str, Any], listed: Listing, at: np.ndarray, per_shard: int) -> dict[str, str]:
    """Return the id of each shard: a digest of its images' records, within the bound or not, and of their decoding.

    `identity` is that of the step. A shard whose images are all beyond the bound has no id: it stays as it is. A shard
    with a vanished image has one, so that its recomputation removes that image.
    """
    common = {key: value for key, value in identity.items() if key not in ("listing", "images")}
    wanted = np.unique(np.flatnonzero(is_used(listed, at) | (at < 0)) // per_shard)
    known = (at >= 0) & np.isin(np.arange(len(at)) // per_shard, wanted)
    records = np.zeros((len(at), 16), np.uint8)
    records[known] = listed.record_digests(at[known])
    ids = {}
    for shard in wanted.tolist():
        part = slice(shard * per_shard, (shard + 1) * per_shard)
        made_of = [record.tobytes().hex() if i >= 0 else "" for record, i in zip(records[part], at[part], strict=True)]
        ids[str(shard)] = digest([common, made_of])
    return ids


def shards_of(shard: np.ndarray) -> dict[str, int]:
    """Return the number of images of each shard, from the shard of every image; shards in order, as JSON names them."""
    found, count = np.unique(shard, return_counts=True)
    return {str(name): int(images) for name, images in zip(found, count, strict=True)}


def source_of(store: Path, ledger: Ledger) -> str | None:
    """Return the source of a store's images, from the store or, if its zarr.json is damaged, from its ledger."""
    from pipeline.storage.store import attributes

    return attributes(store).get("source") or ledger.entries.get(SOURCE, {}).get("id")


def known_ids(store: Path) -> np.ndarray | None:
    """Return the image ids of the store in slot order.

    Slots at the end without an id come from an interrupted ingest: they are reassigned.
    """
    import zarr

    from pipeline.storage.engine import Located

    try:
        array = zarr.open_array(Located(store, read_only=True), path="image_id", mode="r", zarr_format=3)
        ids = np.asarray(array[:], dtype=object)
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return ids[: np.flatnonzero(ids != "").max(initial=-1) + 1]


def open_store(
    store: Path,
    dataset: AnyDataset,
    count: int,
    size: tuple[int, int],
    classes: list[str],
    source: str,
    ledger: Ledger,
    latent: Sequence[int] = (),
) -> None:
    """Create the store, or resize it if it holds this data set; a store of another data set is replaced.

    `latent` is the shape of the latents that the images are generated from, if they are.
    """
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
    if latent:
        dimensions = ("image", *(f"latent_{at}" for at in range(len(latent))))
        of_shard = (dataset.shard_images, *latent)
        arrays["latent"] = Array(dimensions, (count, *latent), np.float32, of_shard, fill=np.nan)
    create(store, arrays, {"classes": classes, "source": source}, coordinates=["image_id"])
    if ledger.entries.get(SOURCE, {}).get("id") != source:
        ledger.record(SOURCE, source, {})
    remove_partials(store)


def ingest_shard(
    dataset: AnyDataset,
    store: Path,
    shard: str,
    start: int,
    items: list[tuple[str, Stamp] | None],
    known_refused: dict[str, str],
    size: tuple[int, int],
    maker: Maker | None = None,
) -> Done:
    """Decode the images of one shard and write them, on a worker. A refused or vanished image leaves black pixels.

    With `maker`, they are generated from their ids, and their latents are written beside them.

    `items` are id, size and time of the listed images; a file that is another one by now raises `ChangedError`. The
    facts are the digest of the shard's pixels, and what was refused and why.
    """
    from pipeline.data.decode import Refused
    from pipeline.storage.store import write

    pixels = np.zeros((len(items), 3, *size), np.uint8)
    latents = np.zeros((len(items), *maker.generator.latent.shape), np.float32) if maker is not None else None
    cut = 0.0
    refused = dict(known_refused)
    usable = np.zeros(len(items), bool)
    for i, item in enumerate(items):
        if item is None or item[0] in refused:
            continue
        image_id, stamp = item
        try:
            if maker is not None and latents is not None and isinstance(dataset, Generated):
                latents[i] = generators.latent_of(maker.generator.latent, dataset.seed, image_id, size[0])
                pixels[i], beyond = generators.image_of(maker, latents[i], size)
                cut += beyond
            else:
                pixels[i] = kinds.read_image(dataset, image_id, size, stamp)
            usable[i] = True
        except Refused as error:
            refused[image_id] = error.reason
    made_of = pixels.tobytes() + usable.tobytes()
    blocks: dict[str, tuple[tuple[int, ...], np.ndarray]] = {"image": ((start, 0, 0, 0), pixels)}
    facts: dict[str, Any] = {"refused": refused}
    if latents is not None:
        made_of += latents.tobytes()
        blocks["latent"] = ((start, *(0 for _ in latents.shape[1:])), latents)
        facts |= {"cut": cut / max(1, int(usable.sum())), "images": int(usable.sum())}
    facts["content"] = hashlib.blake2b(made_of, digest_size=16).hexdigest()
    return Done(shard, {"": write(store, blocks)}, facts)


def _check_refused(name: str, refused: dict[str, str], count: int, allowed: float) -> None:
    if len(refused) > allowed * count:
        raise MicrotomeError(
            f"data set {name!r}: {len(refused)} of {count} images were refused, more than max_bad_fraction = "
            f"{allowed:g} allows: {_some(refused)}"
        )


def _some(refused: dict[str, str], shown: int = 5) -> str:
    lines = [f"{image_id!r}: {reason}" for image_id, reason in sorted(refused.items())[:shown]]
    return "; ".join(lines) + ("; ..." if len(refused) > shown else "")


STAGE = Stage(
    name="ingest",
    version=VERSION,
    says="Decode {wildcards.dataset}",
    place="dataset",
    steps=steps,
    run=run,
    settings=Settings,
    code=CODE,
    questions=questions,
    cost=cost,
    pending=pending,
    counts="shards of images to decode",
    made=made,
    priority=2,  # training waits for it
)
