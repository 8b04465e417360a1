"""Calibration of confidences alone: true class, predicted class and confidence, without the scores of other classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kernels.calibration.methods import UNCALIBRATED, maps_of_confidence
from kernels.calibration.reliability import Reliability, own_precision
from pipeline.stages.calibrate.columns import NO_CLASSES
from pipeline.stages.calibrate.results import OF_BINS, Whole
from pipeline.stages.calibrate.tasks import DRAWS, DRAWS_OF_SPLIT, MEASURES, of_confidences

TRUE = ("label", "labels", "true", "target", "y_true")
PREDICTED = ("predicted", "prediction", "pred", "y_pred")
CONFIDENCE = ("confidence", "conf")
METHODS = tuple(maps_of_confidence())
"""Methods that need no more than the confidence."""


@dataclass(frozen=True)
class Stated:
    """What a file says of each image: how sure the prediction is, and whether it is right.

    Attributes
    ----------
    confidence, right : (image) of the predicted class, in its own precision, and bool.
    remarks : on how the file was read.
    """

    name: str
    confidence: np.ndarray
    right: np.ndarray
    remarks: list[str]

    def __len__(self) -> int:
        return len(self.right)

    def sums(self, bins: int) -> Reliability:
        found = Reliability.zeros(1, bins)
        found.update_confidences(self.confidence, self.right)
        return found


def columns_of(names: Sequence[str]) -> tuple[str, str, str] | None:
    """Return the columns of the true class, the predicted one and the confidence.

    None where one of them is missing, or where a column may hold the scores of a class.
    """
    plain = {re.sub(r"[\s\-]+", "_", name.strip().lower()): name for name in names}
    found = [next((plain[each] for each in wanted if each in plain), None) for wanted in (TRUE, PREDICTED, CONFIDENCE)]
    true, predicted, confidence = found
    if true is None or predicted is None or confidence is None:
        return None
    return (true, predicted, confidence) if set(plain) <= NO_CLASSES | set(TRUE) else None


def stated(name: str, true: np.ndarray, predicted: np.ndarray, confidence: np.ndarray, unused: Sequence[str]) -> Stated:
    """Return what is stated of images, checked; classes (image) are numbers or names.

    Raises
    ------
    ValueError
        Naming the row of a confidence that is none, or saying that the two columns do not name the same classes.
    """
    if not len(true) == len(predicted) == len(confidence):
        raise ValueError(f"{len(true)} true classes, {len(predicted)} predicted ones, {len(confidence)} confidences")
    if confidence.ndim != 1 or confidence.dtype.kind != "f":
        raise ValueError(f"confidences have shape {confidence.shape} and type {confidence.dtype}; expected (image)")
    if len(confidence) < 2:
        raise ValueError(f"{len(confidence)} images: some to fit on and some to judge on are needed")
    good = (confidence >= 0) & (confidence <= 1)  # a NaN is not
    if not good.all():
        row = int((~good).argmax())
        within = bool(((confidence >= 0) & (confidence <= 100)).all())
        hint = ": are they percentages? Divide them by 100" if within else ""
        raise ValueError(f"row {row}: confidence {confidence[row]:g} is not between 0 and 1{hint}")
    true, predicted = _classes(true), _classes(predicted)
    if true.dtype.kind != predicted.dtype.kind or not set(true.tolist()) & set(predicted.tolist()):
        raise ValueError(
            f"no predicted class ({predicted[0]}, ...) is a true one ({true[0]}, ...): both must name classes alike"
        )
    remarks = [f"columns that are not used: {', '.join(unused)}"] if unused else []
    return Stated(name, own_precision(confidence[:, None])[:, 0], true == predicted, remarks)


def _classes(values: np.ndarray) -> np.ndarray:
    """Return classes as numbers if all are, else as names."""
    if values.ndim != 1:
        raise ValueError(f"classes have shape {values.shape}; expected (image)")
    if values.dtype.kind in "biuf":
        return values.astype(np.float64)
    try:
        return values.astype(np.float64)
    except ValueError:
        return np.char.strip(values.astype(str))


def chosen(methods: Sequence[str] | None) -> list[str]:
    """Return the methods to fit, in their order; refuse those that need the scores of all classes."""
    if lacking := [name for name in methods or () if name not in METHODS]:
        raise ValueError(f"{lacking[0]} needs the scores of all classes; of confidences: {', '.join(METHODS)}")
    return [name for name in METHODS if methods is None or name in methods]


def whole(said: Stated, bins: int) -> Whole:
    """Measure all images as they are."""
    sums = said.sums(bins)
    return Whole(sums, of_confidences(sums, said.confidence, said.right, DRAWS, seed=0))


def evaluate(
    said: Stated, to_fit: np.ndarray, to_judge: np.ndarray, methods: Sequence[str], bins: int, seed: int
) -> dict[str, np.ndarray]:
    """Fit every method on some images and judge it on others; return what `tasks.evaluate` returns.

    Measures that need the scores of all classes are NaN.
    """
    found: dict[str, list] = {name: [] for name in ("score", *OF_BINS)}
    maps: Mapping = maps_of_confidence(bins)
    for name in methods:
        after = said.confidence[to_judge]
        if name != UNCALIBRATED:
            after = maps[name](said.confidence[to_fit], said.right[to_fit])(after)
        judged = Stated(said.name, after, said.right[to_judge], [])
        sums = judged.sums(bins)
        known = of_confidences(sums, after, judged.right, DRAWS_OF_SPLIT, seed)
        found["score"].append([float(known.get(measure, np.nan)) for measure in MEASURES])
        for of_bins in OF_BINS:
            found[of_bins].append(getattr(sums, of_bins))
    return {name: np.array(values) for name, values in found.items()}
