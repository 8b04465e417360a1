"""What the stage `ablate` writes of its counts: a group of ablation.zarr for each layer, three tables, and facts."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from kernels.ablation import KINDS, RANDOM_KINDS, Predictions, balanced_accuracy, classes_served
from pipeline.stages.ablate.settings import Measure
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Files, Manifest, within
from pipeline.storage.record import Record
from pipeline.storage.store import create, metadata_files, verified_bytes, write_whole
from pipeline.storage.tables import csv_bytes, number, read_rows

TOP_UNITS = 20  # of each class, in ablation.csv
CLASS_COLUMNS = (
    "layer",
    "class",
    "place",
    "unit",
    "concept",
    "category",
    "iou",
    "loss_rank",
    "loss_judge",
    "recall_loss_judge",
    "precision_loss_judge",
)
SET_COLUMNS = (
    "layer",
    "class",
    "kind",
    "size",
    "loss",
    "accuracy_loss",
    "random_loss",
    "random_loss_low",
    "random_loss_high",
)
UNIT_COLUMNS = (
    "layer",
    "unit",
    "concept",
    "category",
    "iou",
    "classes_served",
    "accuracy_loss_rank",
    "accuracy_loss_judge",
)
CONTROL = {"remove_most": "remove", "remove_least": "remove", "keep_most": "keep"}

CLASS_SCORES = ("balanced_accuracy", "recall", "precision")
SCORES = ("accuracy", "top5_accuracy")

LONGEST = 200  # bytes of a folder's name; file systems take 255

Labels = Mapping[tuple[str, int], Mapping[str, str]]  # a row of units.csv by layer and unit


class AblatedLayer(Record):
    """What is known of a layer whose units were removed.

    Attributes
    ----------
    pairs : of a unit and an image. pairs_that_differ, set_pairs_that_differ : those that were computed, since the unit,
        or the set, makes a difference there.
    logits_difference, logits_largest : how far logits from stored values are from the network's own, and the largest of
        these, both without a sign. predictions_changed : images that are told another class for it.
    sets : how many sets of units. whole_network : whether all of the network runs for each pair.
    pair_flops : floating-point operations of a pair. counted : images by split.
    """

    units: int
    pairs: int
    pairs_that_differ: int
    logits_difference: float
    logits_largest: float
    predictions_changed: int
    set_pairs_that_differ: int
    layer: str
    sets: int
    whole_network: bool
    pair_flops: float
    counted: dict[str, int]
    notes: list[str]


class Ablated(Record):
    """What the manifest of `ablate` says: each layer whose units were removed."""

    layers: list[AblatedLayer]

    @classmethod
    def of(cls, manifest: Manifest) -> Ablated:
        return cls.read(manifest.result)


@dataclass(frozen=True)
class AblationCounts:
    """What was counted for one layer.

    Attributes
    ----------
    measure : how.
    whole, without : by split, counts with nothing removed (one variant) and with each unit removed.
    order : (class, unit), most important first, by the losses on the split that ranks.
    sizes : of the sets, those below the number of units.
    set_counts : true positives, predicted and correct x (kind, size, class), on the split that judges.
    random : counts on the same of the random sets, (draw, kind, size) in this order.
    """

    layer: str
    measure: Measure
    whole: dict[str, Predictions]
    without: dict[str, Predictions]
    order: np.ndarray
    sizes: list[int]
    set_counts: np.ndarray
    random: Predictions
    facts: AblatedLayer

    @property
    def loss(self) -> dict[str, np.ndarray]:
        """By split, (unit, class) of balanced accuracy."""
        return {
            split: self.whole[split].balanced_accuracy - without.balanced_accuracy
            for split, without in self.without.items()
        }


def unit_labels(folder: Path, dissected: Manifest) -> Labels:
    """Return units.csv of the dissection, verified."""
    text = verified_bytes(folder, "units.csv", dissected.files).decode()
    return {(row["layer"], int(row["unit"])): row for row in read_rows(io.StringIO(text, newline=""))}


def write_layer(path: Path, classes: list[str], found: AblationCounts, name: str) -> Files:
    """Write the group of a layer; return its files, named from the folder of the network."""
    units = len(next(iter(found.without.values())).predicted)
    splits = list(found.whole)
    whole, without = found.whole.values(), found.without.values()
    of_unit, of_class = ("split", "unit", "class"), ("split", "class")
    arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        "split": (("split",), np.array(splits, object)),
        "class": (("class",), np.array(classes, object)),
        "unit": (("unit",), np.arange(units)),
        "images": (of_class, np.stack([counts.images for counts in whole])),
        "order": (("class", "unit"), found.order),
        "classes_served": (("unit",), classes_served(found.order, found.loss[splits[0]])),
    }
    for scores, dims in ((CLASS_SCORES, ("class",)), (SCORES, ())):
        for score in scores:
            before = np.stack([getattr(counts, score)[0] for counts in whole])
            after = np.stack([getattr(counts, score) for counts in without])
            arrays[score] = (("split", *dims), before)
            arrays[f"{score}_loss"] = (("split", "unit", *dims), before[:, None] - after)
    for count in ("true_positives", "predicted", "in_top5"):
        arrays[count] = (of_unit, np.stack([getattr(counts, count) for counts in without]))
        arrays[f"{count}_whole"] = (of_class, np.stack([getattr(counts, count)[0] for counts in whole]))
    if found.sizes:
        of_set = ("kind", "size", "class")
        loss, accuracy = set_losses(found)
        arrays |= {
            "size": (("size",), np.array(found.sizes)),
            "kind": (("kind",), np.array(KINDS, object)),
            "set_loss": (of_set, loss),
            "set_accuracy_loss": (of_set, accuracy),
            "set_true_positives": (of_set, found.set_counts[0]),
            "set_predicted": (of_set, found.set_counts[1]),
            "set_correct": (of_set, found.set_counts[2]),
        }
        if found.measure.draws:
            of_draw = ("draw", "random_kind", "size", "class")
            shape = (found.measure.draws, len(RANDOM_KINDS), len(found.sizes), len(classes))
            arrays |= {
                "random_kind": (("random_kind",), np.array(RANDOM_KINDS, object)),
                "random_loss": (of_draw, random_losses(found)),
                "random_true_positives": (of_draw, found.random.true_positives.reshape(shape)),
                "random_predicted": (of_draw, found.random.predicted.reshape(shape)),
            }
    return within(name, write_whole(path, arrays, found.measure.written() | found.facts.written()))


def group_of(layer: str) -> str:
    """Return the group of a layer in ablation.zarr: its name, or a quoted and shortened one where no folder has it."""
    parts = layer.split("/")
    if all(
        part not in ("", ".", "..") and not part.startswith("__") and len(part.encode()) <= LONGEST for part in parts
    ):
        return layer
    quoted = quote(layer, safe=" ")
    quoted = quoted if not quoted.startswith("__") else f"%5F{quoted[1:]}"
    return quoted if len(quoted) <= LONGEST else f"{quoted[: LONGEST - 17]}-{digest(layer)[:16]}"


def open_groups(store: Path, layers: Sequence[str]) -> Files:
    """Create the groups around those of layers with a `/` in their name; return their files."""
    files: Files = {}
    for layer in layers:
        parts = group_of(layer).split("/")
        for count in range(1, len(parts)):
            path = "/".join(parts[:count])
            create(store / path, {}, {})
            files |= within(f"{store.name}/{path}", {"zarr.json": metadata_files(store / path)["zarr.json"]})
    return files


def layer_files(store: Path) -> Files:
    """Return the file that describes the group with all layers."""
    return within(store.name, {"zarr.json": metadata_files(store)["zarr.json"]})


def set_losses(found: AblationCounts) -> tuple[np.ndarray, np.ndarray]:
    """(kind, size, class) of the class's balanced accuracy, and of the accuracy over all classes, without its set."""
    judged = found.whole[found.measure.judge]
    total = int(judged.images.sum())
    positives, predicted, correct = found.set_counts
    after = balanced_accuracy(positives, predicted, judged.images, total)
    undefined = found.order[:, 0] < 0  # a class that could not be ranked has no sets
    loss = np.where(undefined, np.nan, judged.balanced_accuracy[0] - after)
    return loss, np.where(undefined, np.nan, judged.accuracy[0] - correct / total)


def random_losses(found: AblationCounts) -> np.ndarray:
    """(draw, kind, size, class) of balanced accuracy, without random sets."""
    judged = found.whole[found.measure.judge]
    loss = judged.balanced_accuracy - found.random.balanced_accuracy
    return loss.reshape(found.measure.draws, len(RANDOM_KINDS), len(found.sizes), -1)


def write_tables(layers: Iterable[AblationCounts], labels: Labels, classes: list[str]) -> dict[str, bytes]:
    """Return the three tables, by file name."""
    rows: dict[str, list[list[Any]]] = {"ablation.csv": [], "ablation-sets.csv": [], "ablation-units.csv": []}
    for found in layers:
        rows["ablation.csv"] += class_rows(found, labels, classes)
        rows["ablation-sets.csv"] += set_rows(found, classes)
        rows["ablation-units.csv"] += unit_rows(found, labels)
    columns = (CLASS_COLUMNS, SET_COLUMNS, UNIT_COLUMNS)
    return {name: csv_bytes(given, rows[name]) for name, given in zip(rows, columns, strict=True)}


def class_rows(found: AblationCounts, labels: Labels, classes: list[str]) -> list[list[Any]]:
    """Return the most important units of each class; none where a class could not be ranked."""
    rank, judge = found.measure.rank, found.measure.judge
    recall = found.whole[judge].recall - found.without[judge].recall
    precision = found.whole[judge].precision - found.without[judge].precision
    return [
        [
            found.layer,
            name,
            place + 1,
            *described(found.layer, unit, labels),
            *map(number, (found.loss[rank][unit, c], found.loss[judge][unit, c])),
            *map(number, (recall[unit, c], precision[unit, c])),
        ]
        for c, name in enumerate(classes)
        for place, unit in enumerate(found.order[c, :TOP_UNITS].tolist())
        if unit >= 0
    ]


def set_rows(found: AblationCounts, classes: list[str]) -> list[list[Any]]:
    """Return for every class, kind and size the losses without the set, and mean and range without random ones."""
    if not found.sizes:
        return []
    loss, accuracy = set_losses(found)
    random = random_losses(found) if found.measure.draws else None
    rows = []
    for c, name in enumerate(classes):
        for k, kind in enumerate(KINDS):
            for s, size in enumerate(found.sizes):
                drawn = np.full(3, np.nan)
                if random is not None:
                    own = random[:, RANDOM_KINDS.index(CONTROL[kind]), s, c]
                    drawn = np.array([own.mean(), own.min(), own.max()])
                values = (loss[k, s, c], accuracy[k, s, c], *drawn)
                rows.append([found.layer, name, kind, size, *map(number, values)])
    return rows


def unit_rows(found: AblationCounts, labels: Labels) -> list[list[Any]]:
    """Return every unit, with the number of classes it is important to and what is lost over all classes."""
    rank, judge = found.measure.rank, found.measure.judge
    served = classes_served(found.order, found.loss[rank])
    lost = [found.whole[split].accuracy - found.without[split].accuracy for split in (rank, judge)]
    return [
        [found.layer, *described(found.layer, unit, labels), int(count), *(number(each[unit]) for each in lost)]
        for unit, count in enumerate(served)
    ]


def described(layer: str, unit: int, labels: Labels) -> list[Any]:
    """Return unit, concept, category and IoU."""
    row = labels[layer, unit]
    return [unit, row["concept"], row["category"], row["iou"]]
