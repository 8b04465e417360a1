"""What an experiment explains: which images, shard by shard, and the baseline that they are compared with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.images import Images
from pipeline.errors import MicrotomeError
from pipeline.plan.job import Job
from pipeline.stages.attribute.options import DeepShap, LinearShap, Options
from pipeline.stages.attribute.settings import Settings
from pipeline.storage.store import StoreRef
from pipeline.workers.tasks import run_in_order, run_tasks


@dataclass(frozen=True)
class Shard:
    """The images of a shard that are explained: places in it, labels and ids, and the shard's slots."""

    part: str
    bounds: tuple[int, int]
    places: tuple[int, ...]
    labels: tuple[int, ...]
    image_ids: tuple[str, ...]


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


def by_shard(images: Images, slots: np.ndarray) -> Mapping[int, np.ndarray]:
    """Return ascending slots by their shard."""
    shards, first = np.unique(slots // images.shard_images, return_index=True)
    return dict(zip(shards.tolist(), np.split(slots, first)[1:], strict=True))


def shards_of(job: Job[Settings]) -> dict[str, Shard]:
    """Return the explained images of each shard that has any."""
    images, reader = job.images, job.images.reader()
    labels, ids = np.asarray(reader["label"][:]), images.image_ids()
    found = {}
    for shard, slots in by_shard(images, chosen(images, job.settings)).items():
        start, stop = images.range(shard)
        found[str(shard)] = Shard(
            str(shard),
            (start, stop),
            tuple((slots - start).tolist()),
            tuple(labels[slots].tolist()),
            tuple(map(str, ids[slots])),
        )
    return found


def background_of(
    job: Job[Settings], workers: Any, methods: Mapping[str, Options], summed: Callable[..., np.ndarray]
) -> dict[str, np.ndarray]:
    """Return what methods compare images with, by name.

    That is pixels uint8 (reference, channel, y, x) of a number of images of a split, or the mean of all of them as the
    network takes it, float64 (1, channel, y, x). `summed` adds up inputs of one shard on a worker.
    """
    images, found = job.images, {}
    for name, options in methods.items():
        if not isinstance(options, (DeepShap, LinearShap)):
            continue
        slots = np.flatnonzero(images.counted(options.split))
        count = options.references if isinstance(options, DeepShap) else 1
        if len(slots) < count:
            raise MicrotomeError(f"{job.name}: {name}: {lacks_references(options.split, count, len(slots))}")
        if isinstance(options, DeepShap):
            slots = _drawn(images, slots, count, options.seed)
        tasks = []
        for shard, own in by_shard(images, slots).items():
            bounds = images.range(shard)
            places = (own - bounds[0]).tolist()
            tasks.append((StoreRef(images.store, images.files_of(shard)), bounds, places))
        if isinstance(options, DeepShap):
            found[name] = np.concatenate(run_in_order(workers, pick_pixels, tasks, f"{job.name}: references"))
        else:
            own_tasks = [(job.model, *each) for each in tasks]
            sums = run_in_order(workers, summed, own_tasks, f"{job.name}: mean input")
            found[name] = np.add.reduce(sums) / len(slots)
    return found


def lacks_references(split: str, count: int, there: int) -> str:
    return f"{count} references of split {split!r}, which has {there} valid images"


def _drawn(images: Images, slots: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return so many of the slots, ascending: the first by a hash of the seed and their ids."""
    ids = images.image_ids()

    def place(slot: int) -> bytes:
        return hashlib.sha256(f"{seed}:{ids[slot]}".encode("utf-8", "surrogateescape")).digest()

    return np.sort(np.array(sorted(slots.tolist(), key=place)[:count], np.int64))


def pick_pixels(images: StoreRef, bounds: tuple[int, int], places: Sequence[int]) -> np.ndarray:
    """Return images of one shard, uint8 (image, channel, y, x). Runs on a worker."""
    start, stop = bounds
    return images.open()["image"][start:stop][list(places)]


def baseline_of(job: Job[Settings], workers: Any) -> str | np.ndarray:
    """Return the baseline's kind, or itself as pixels uint8 (channel, y, x) where it is one image."""
    settings, images = job.settings, job.images
    if isinstance(settings.baseline, str):
        return settings.baseline
    if "mean" in settings.baseline:
        slots = np.flatnonzero(images.counted(settings.baseline["mean"]))
        if not len(slots):
            raise MicrotomeError(f"{job.name}: no valid image has split {settings.baseline['mean']!r}")
        tasks = []
        for shard, own in by_shard(images, slots).items():
            bounds = images.range(shard)
            tasks.append((StoreRef(images.store, images.files_of(shard)), bounds, (own - bounds[0]).tolist()))
        total = sum(run_tasks(workers, sum_pixels, tasks, len(tasks), f"{job.name}: baseline"))
        return np.rint(total / len(slots)).astype(np.uint8)
    file = job.section[job.experiment].baseline.file
    with Path(file).open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != settings.baseline["file"]:
        raise MicrotomeError(f"{file} changed since the run began: start it again")
    return read_baseline(Path(file), images.size, f"attribute.{job.experiment}.baseline", job.dataset)


def sum_pixels(images: StoreRef, bounds: tuple[int, int], places: Sequence[int]) -> np.ndarray:
    """Add up images of one shard, int64 (channel, y, x). Runs on a worker."""
    start, stop = bounds
    return images.open()["image"][start:stop][list(places)].sum(0, dtype=np.int64)


def read_baseline(file: Path, size: tuple[int, int], where: str, dataset: str) -> np.ndarray:
    """Return an image as pixels uint8 (channel, y, x), turned upright; refuse one of another size than the images."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            pixels = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise MicrotomeError(f"{where}: {file} cannot be read as an image: {error}") from None
    if pixels.shape[:2] != tuple(size):
        raise MicrotomeError(
            f"{where}: {file} has {pixels.shape[0]} x {pixels.shape[1]} pixels, and the images of {dataset!r} have "
            f"{size[0]} x {size[1]}"
        )
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
