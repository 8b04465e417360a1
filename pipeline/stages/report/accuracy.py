"""How often each network is right: `<dataset>/<network>/accuracy.csv`, from the logits of `extract` and the labels.

The report measures it, since its id covers both: `extract` keeps logits where images only have other labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields

import numpy as np

from kernels.calibration.reliability import (
    FLOOR,
    Predictions,
    Reliability,
    equal_width,
    logits_of,
    own_precision,
    sum_to,
)
from pipeline.plan.job import Job
from pipeline.stages.extract.results import Extracted, logits
from pipeline.storage.manifest import write_file
from pipeline.storage.tables import csv_bytes

FILE = "accuracy.csv"
TOP = 5


@dataclass(frozen=True)
class Accuracy:
    """Measures of a network over `images` labelled images of the examined split; ECE in 15 bins of equal width.

    `top_1` and `top_5` are shares of images; `top_5` is NaN where there are no more classes than five.
    """

    images: int
    top_1: float
    top_5: float
    nll: float
    ece: float


COLUMNS = tuple(field.name for field in fields(Accuracy))


def write_accuracy(job: Job) -> Accuracy | None:
    """Write `accuracy.csv` beside the logits of a job of `extract`; remove it where the network has no accuracy."""
    found = measure(job)
    if found is None:
        (job.folder / FILE).unlink(missing_ok=True)
    else:
        write_file(job.folder, FILE, csv_bytes(COLUMNS, [row(found)]))
    return found


def row(found: Accuracy) -> list[str]:
    """Return the cells of a table: numbers with seven digits, blank if undefined."""
    count, *measures = astuple(found)
    return [str(count), *("" if math.isnan(value) else f"{value:.7g}" for value in measures)]


def measure(job: Job) -> Accuracy | None:
    """Measure a network on the labelled images of its split, one shard at a time.

    None if the network has no head, gives another number of logits than the images have classes, or no image counts.
    """
    images, manifest = job.images, job.read()
    stored, classes = logits(job.folder, manifest), len(images.classes)
    if not stored.files:
        return None
    array = stored.open()["logits"]
    width = array.shape[1]
    if classes < 2 or width not in (classes, 1 if classes == 2 else classes):
        return None
    label = np.asarray(images.reader()["label"][:])
    counted = images.counted(job.settings.split) & (label >= 0)

    def shards() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for shard in Extracted.of(manifest).shards:
            start, stop = images.range(shard)
            rows = counted[start:stop]
            if rows.any():
                yield np.asarray(array[start:stop])[rows], label[start:stop][rows]

    if width == 1:
        probable = all(bool(((values >= 0) & (values <= 1)).all()) for values, _ in shards())
    else:
        probable = all(sum_to(values) for values, _ in shards())
    total, best = Reliability.zeros(1), 0
    for values, labels in shards():
        if width == 1:
            values = np.concatenate([1 - values if probable else np.zeros_like(values), values], 1)
        given = own_precision(values) if probable else None
        best += add(total, Predictions(logits_of(values) if probable else values, given), labels)
    if not total.images:
        return None
    top = best / total.images if classes > TOP else math.nan
    return Accuracy(total.images, total.accuracy, top, total.nll / total.images, total.ece)


def add(total: Reliability, scores: Predictions, labels: np.ndarray) -> int:
    """Add images to sums of reliability; return how many labels are among the five largest scores.

    Of equal scores the lower class comes first, as for the prediction.
    """
    row, predicted, probabilities = np.arange(len(labels)), scores.predicted, scores.probabilities
    at, bins = equal_width(probabilities[row, predicted], len(total.count)), len(total.count)
    true = probabilities[row, labels].astype(np.float64)
    total.count += np.bincount(at, minlength=bins)
    total.correct += np.bincount(at[predicted == labels], minlength=bins)
    total.confidence += np.bincount(at, probabilities[row, predicted].astype(np.float64), minlength=bins)
    total.nll -= float(np.log(np.maximum(true, FLOOR)).sum())
    own = scores.logits[row, labels][:, None]
    before = np.arange(scores.shape[1]) < labels[:, None]
    rank = ((scores.logits > own) | ((scores.logits == own) & before)).sum(1)
    return int((rank < TOP).sum())
