"""What the stage `ablate` writes of its counts: a group of ablation.zarr for each layer, and three tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.ablation import KINDS, RANDOM_KINDS, balanced_accuracy, classes_served
from pipeline.plan import job as stage
from pipeline.storage.manifest import Files, Manifest
from pipeline.storage.store import metadata_files, verified_bytes, write_whole
from pipeline.storage.tables import csv_bytes, number

if TYPE_CHECKING:
    from pipeline.stages.ablate.stage import Ablated

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

Labels = Mapping[tuple[str, int], Mapping[str, str]]  # a row of units.csv by layer and unit


def unit_labels(folder: Path, dissected: Manifest) -> Labels:
    """units.csv of the dissection, verified."""
    text = verified_bytes(folder, "units.csv", dissected.files).decode()
    return {(row["layer"], int(row["unit"])): row for row in csv.DictReader(io.StringIO(text))}


def write_layer(path: Path, classes: list[str], found: Ablated, name: str) -> Files:
    """Write the group of a layer; its files, named from the folder of the network."""
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
        if found.draws:
            of_draw = ("draw", "random_kind", "size", "class")
            shape = (found.draws, len(RANDOM_KINDS), len(found.sizes), len(classes))
            arrays |= {
                "random_kind": (("random_kind",), np.array(RANDOM_KINDS, object)),
                "random_loss": (of_draw, random_losses(found)),
                "random_true_positives": (of_draw, found.random.true_positives.reshape(shape)),
                "random_predicted": (of_draw, found.random.predicted.reshape(shape)),
            }
    attrs = {key: value for key, value in found.how.items() if key not in ("layers", "sizes")} | found.facts
    return stage.within(name, write_whole(path, arrays, attrs))


def layer_files(store: Path) -> Files:
    """The group that holds the layers."""
    return stage.within(store.name, {"zarr.json": metadata_files(store)["zarr.json"]})


def set_losses(found: Ablated) -> tuple[np.ndarray, np.ndarray]:
    """(kind, size, class) of the class's balanced accuracy, and of the accuracy over all classes, without its set."""
    judged = found.whole[found.how["judge"]]
    total = int(judged.images.sum())
    positives, predicted, correct = found.set_counts
    after = balanced_accuracy(positives, predicted, judged.images, total)
    undefined = found.order[:, 0] < 0  # a class that could not be ranked has no sets
    loss = np.where(undefined, np.nan, judged.balanced_accuracy[0] - after)
    return loss, np.where(undefined, np.nan, judged.accuracy[0] - correct / total)


def random_losses(found: Ablated) -> np.ndarray:
    """(draw, kind, size, class) of balanced accuracy, without random sets."""
    judged = found.whole[found.how["judge"]]
    loss = judged.balanced_accuracy - found.random.balanced_accuracy
    return loss.reshape(found.draws, len(RANDOM_KINDS), len(found.sizes), -1)


def write_tables(layers: Iterable[Ablated], labels: Labels, classes: list[str]) -> dict[str, bytes]:
    """The three tables, by file name."""
    rows: dict[str, list[list[Any]]] = {"ablation.csv": [], "ablation-sets.csv": [], "ablation-units.csv": []}
    for found in layers:
        rows["ablation.csv"] += class_rows(found, labels, classes)
        rows["ablation-sets.csv"] += set_rows(found, classes)
        rows["ablation-units.csv"] += unit_rows(found, labels)
    columns = (CLASS_COLUMNS, SET_COLUMNS, UNIT_COLUMNS)
    return {name: csv_bytes(given, rows[name]) for name, given in zip(rows, columns, strict=True)}


def class_rows(found: Ablated, labels: Labels, classes: list[str]) -> list[list[Any]]:
    """The most important units of each class; none where a class could not be ranked."""
    rank, judge = found.how["rank"], found.how["judge"]
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


def set_rows(found: Ablated, classes: list[str]) -> list[list[Any]]:
    """For every class, kind and size, the losses without the set, and mean and range without random ones."""
    if not found.sizes:
        return []
    loss, accuracy = set_losses(found)
    random = random_losses(found) if found.draws else None
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


def unit_rows(found: Ablated, labels: Labels) -> list[list[Any]]:
    """Every unit, with the number of classes it is important to and what is lost over all classes."""
    served = classes_served(found.order, found.loss[found.how["rank"]])
    lost = [
        found.whole[split].accuracy - found.without[split].accuracy for split in (found.how["rank"], found.how["judge"])
    ]
    return [
        [found.layer, *described(found.layer, unit, labels), int(count), *(number(each[unit]) for each in lost)]
        for unit, count in enumerate(served)
    ]


def described(layer: str, unit: int, labels: Labels) -> list[Any]:
    """Unit, concept, category, IoU."""
    row = labels[layer, unit]
    return [unit, row["concept"], row["category"], row["iou"]]
