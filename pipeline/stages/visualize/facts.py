"""What the data says of units and classes before anything is drawn: which are chosen, and their highest scores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import MicrotomeError
from pipeline.plan.job import Job
from pipeline.stages.dissect.found import DissectedLayer, read_layers, read_unit_rows
from pipeline.stages.extract.found import top_images
from pipeline.stages.extract.results import Extracted, StoredLayer, logits
from pipeline.stages.visualize.results import SCORES
from pipeline.stages.visualize.settings import Settings
from pipeline.storage.read_back import open_store

ROWS_AT_ONCE = 4096
"""Images whose numbers are read at once."""


@dataclass(frozen=True)
class OfLayer:
    """The chosen units of a layer.

    Attributes
    ----------
    stored : the layer, as the extraction names it. units : their numbers.
    maxima : (unit,) highest activation on the images that count. thresholds : (unit,) NaN where there is none.
    """

    stored: StoredLayer
    units: tuple[int, ...]
    maxima: np.ndarray
    thresholds: np.ndarray


@dataclass(frozen=True)
class OfClasses:
    """The chosen classes of so many logits: `maxima` by score, (class,) the highest on the images that count."""

    classes: tuple[int, ...]
    maxima: dict[str, np.ndarray]
    logits: int


def is_dissected(job: Job[Settings]) -> bool:
    """Return whether units have thresholds and labels: their network is dissected on this data set."""
    return any(parent.stage.name == "dissect" for parent in job.parents)


def counted(job: Job[Settings]) -> np.ndarray:
    """Return (image,) bool: the images of the split that were extracted."""
    shown = job.images.counted(job.settings.split)
    shards = set(Extracted.of(job.parent("extract")).shards)
    return shown & np.isin(np.arange(len(shown)) // job.images.shard_images, list(shards))


def first_by_hash(slots: np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
    """Return so many of these images, ascending: the first by the hash of their ids, since listings go by class."""

    def place(slot: int) -> bytes:
        return hashlib.sha256(str(ids[slot]).encode("utf-8", "surrogateescape")).digest()

    return np.array(sorted(sorted(slots.tolist(), key=place)[:count]), np.int64)


def layers_of(job: Job[Settings], shown: np.ndarray) -> tuple[list[OfLayer], list[str]]:
    """Return the chosen units of each layer, and notes of what was left out."""
    extracted = Extracted.of(job.parent("extract"))
    folder = job.dataset_folder / job.network
    dissected = read_layers(job.dataset_folder, folder / "layers.json") if is_dissected(job) else []
    labelled = read_unit_rows(folder / "units.csv") if is_dissected(job) else []
    found, notes = [], []
    for name, wanted in job.settings.units.items():
        stored = extracted.layer(name)
        if wanted == "best":
            detectors = sorted(
                (row for row in labelled if row["layer"] == name and row["concept"]),
                key=lambda row: (-row["iou"], row["unit"]),
            )
            units = [row["unit"] for row in detectors[: job.settings.most]]
            if not units:
                notes.append(f"layer {name!r} has no detector, so it has no best unit")
        else:
            units = list(range(stored.shape[0])) if wanted == "all" else list(wanted)
        lowest, highest = ranges(job, stored, units, shown)
        constant = [unit for unit, low, high in zip(units, lowest, highest, strict=True) if low == high]
        if constant and isinstance(wanted, list):
            raise MicrotomeError(
                f"visualize.{job.experiment}.units.{name}: unit {constant[0]} of network {job.network!r} has the same "
                f"highest activation, {highest[units.index(constant[0])]:g}, on every image of split "
                f"{job.settings.split!r}: it is constant, and nothing excites it; name others"
            )
        if constant:
            some = ", ".join(map(str, constant[:10])) + (", …" if len(constant) > 10 else "")
            notes.append(f"layer {name!r}: {len(constant)} units are constant on the images and left out: {some}")
        kept = [at for at, unit in enumerate(units) if unit not in set(constant)]
        chosen = tuple(units[at] for at in kept)
        found.append(OfLayer(stored, chosen, highest[kept], thresholds_of(dissected, name, chosen)))
    return found, notes


def thresholds_of(dissected: Sequence[DissectedLayer], name: str, units: Sequence[int]) -> np.ndarray:
    """Return the threshold of each unit, NaN where the layer is not dissected."""
    layer = next((each for each in dissected if each.name == name), None)
    if layer is None or not units:
        return np.full(len(units), np.nan, np.float32)
    return np.asarray(open_store(layer.thresholds)["threshold"][:])[list(units)]


def ranges(
    job: Job[Settings], stored: StoredLayer, units: Sequence[int], shown: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and greatest of each unit's highest activations over the images, (unit,)."""
    low, high = np.full(len(units), np.inf, np.float32), np.full(len(units), -np.inf, np.float32)
    if units:
        array = stored.activations(job.results, job.dataset_folder).open()["maximum"]
        for rows in np.array_split(np.flatnonzero(shown), max(1, -(-int(shown.sum()) // ROWS_AT_ONCE))):
            if len(rows):
                block = np.asarray(array[rows, min(units) : max(units) + 1])[:, np.array(units) - min(units)]
                low, high = np.fmin(low, np.nanmin(block, 0)), np.fmax(high, np.nanmax(block, 0))
    return low, high


def images_of(job: Job[Settings], layer: OfLayer, units: Sequence[int], shown: np.ndarray, count: int) -> np.ndarray:
    """Return the images (unit, place) with each unit's highest activations, highest first; -1 where there are fewer."""
    array = layer.stored.activations(job.results, job.dataset_folder).open()["maximum"]
    order = sorted(units)
    tops, _ = top_images(array, order, shown, count)
    found = np.full((len(units), count), -1, np.int64)
    for unit, images in zip(order, tops, strict=True):
        found[list(units).index(unit), : len(images)] = images
    return found


def classes_of(job: Job[Settings], shown: np.ndarray) -> OfClasses | None:
    """Return the chosen classes; None if there are none."""
    if job.settings.classes == []:
        return None
    where = f"visualize.{job.experiment}.classes"
    extraction = job.parent("extract")
    store = logits(job.dataset_folder / job.network, extraction)
    if not store.files:
        raise MicrotomeError(f"{where}: network {job.network!r} gives no logits, so it has no classes")
    array = store.open()["logits"]
    classes = tuple(range(array.shape[1])) if job.settings.classes is None else tuple(job.settings.classes)
    if outside := [each for each in classes if each >= array.shape[1]]:
        raise MicrotomeError(
            f"{where}: class {outside[0]} of network {job.network!r}, which gives {array.shape[1]} logits"
        )
    highest = {score: np.full(len(classes), -np.inf) for score in SCORES}
    for rows in np.array_split(np.flatnonzero(shown), max(1, -(-int(shown.sum()) // ROWS_AT_ONCE))):
        if not len(rows):
            continue
        values = np.asarray(array[rows], np.float64)
        least = values.max(1, keepdims=True)
        likely = values - least - np.log(np.exp(values - least).sum(1, keepdims=True))
        for score, of in (("logit", values), ("log_probability", likely)):
            highest[score] = np.fmax(highest[score], np.nanmax(of[:, list(classes)], 0))
    return OfClasses(classes, highest, array.shape[1])
