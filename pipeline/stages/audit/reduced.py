"""Outcomes that are no mean of one number an image: values by label, and measures of all images together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.audit.accuracy import box_accuracy, crossed, pixel_ap
from kernels.audit.intervals import DRAWS, mean_interval
from pipeline.stages.audit.located import LEAST_IOU, Localisation
from pipeline.stages.audit.results import Outcome

if TYPE_CHECKING:
    from pipeline.stages.audit.cell import Audited

HALF = 0.5
"""The IoU of a box that counts, in MaxBoxAcc and in the localisation error."""
POINTS = 9
"""Points of a curve that the table has; the cells have all."""


def by_label(cell: Audited, options: Any) -> Iterator[Outcome]:
    """Yield the mean of every number of an image, those of an array with labels as `measure.label`."""
    for name, measure in cell.measures.items():
        if not measure.dims:
            yield _mean(name, cell.arrays[name])
    for name, measure in cell.measures.items():
        if len(measure.dims) == 1:
            for at, label in enumerate(measure.labels[measure.dims[0]]):
                yield _mean(f"{name}.{label}", cell.arrays[name][:, at])


def curve(cell: Audited, options: Any) -> Iterator[Outcome]:
    """Yield the means of the numbers of an image, and after them those of curves at up to `POINTS` of their points.

    A point is called `<what>_<series>.<label>`, for example `probability_black.0.25`.
    """
    yield from by_label(cell, options)
    for name, measure in cell.measures.items():
        if len(measure.dims) != 2:
            continue
        series, points = (measure.labels[dim] for dim in measure.dims)
        step = max(1, -(-(len(points) - 1) // (POINTS - 1)))
        for row, own in enumerate(series):
            for at in range(0, len(points), step):
                yield _mean(f"{name.removesuffix('_curve')}_{own}.{points[at]}", cell.arrays[name][:, row, at])


def _mean(name: str, values: np.ndarray) -> Outcome:
    value, low, high, count = mean_interval(values)
    return Outcome(name, value, low, high, count, "" if count else "not defined")


def localisation(cell: Audited, options: Localisation) -> Iterator[Outcome]:
    """Yield the published measures, of all images whose object's place is known."""
    arrays = cell.arrays
    known = ~np.isnan(arrays["object"])
    largest, best = arrays["largest_iou"][known], arrays["any_iou"][known]
    inside, outside, total = arrays["inside"][known], arrays["outside"][known], arrays["object"][known]
    half = halves([each for each, there in zip(cell.ids, known, strict=True) if there])

    def max_box_acc(weights: np.ndarray) -> np.ndarray:
        return box_accuracy(largest, HALF, weights).max(1)

    def max_box_acc_v2(weights: np.ndarray) -> np.ndarray:
        return np.mean([box_accuracy(best, least, weights).max(1) for least in LEAST_IOU], 0)

    def other_half(weights: np.ndarray) -> np.ndarray:
        return crossed(largest, half, HALF, weights)

    def other_half_v2(weights: np.ndarray) -> np.ndarray:
        return np.mean([crossed(best, half, least, weights) for least in LEAST_IOU], 0)

    def px_ap(weights: np.ndarray) -> np.ndarray:
        return pixel_ap(inside, outside, total, weights)

    count = int(known.sum())
    for name, statistic in (
        ("max_box_acc", max_box_acc),
        ("max_box_acc.other_half", other_half),
        ("max_box_acc_v2", max_box_acc_v2),
        ("max_box_acc_v2.other_half", other_half_v2),
        ("px_ap", px_ap),
    ):
        yield _together(name, statistic, count)
    for rule in options.rules:
        fits = arrays[f"{rule}_iou"]
        yield _mean(f"{rule}.iou", fits)
        yield _mean(f"{rule}.accuracy", np.where(np.isnan(fits), np.nan, fits >= HALF))
        yield from errors(rule, fits, arrays)


def errors(rule: str, fits: np.ndarray, arrays: Mapping[str, np.ndarray]) -> Iterator[Outcome]:
    """Yield the top-1 and top-5 localisation error: the share of images whose class or box is wrong."""
    for name, right in (("top1_error", arrays["first"]), ("top5_error", arrays["fifth"])):
        lacking = np.isnan(right) & (arrays["placed"] == 1)
        if lacking.any():
            note = "maps of other classes than the label are stored: explain `targets: label`"
            yield Outcome(f"{rule}.{name}", np.nan, state="not defined", note=note)
            continue
        wrong = 1.0 - ((right == 1) & (np.nan_to_num(fits) >= HALF))
        yield _mean(f"{rule}.{name}", np.where(np.isnan(right), np.nan, wrong))


def _together(name: str, statistic: Callable[[np.ndarray], np.ndarray], count: int) -> Outcome:
    """Return a measure of all images together, with its interval over images that are drawn again."""
    if not count:
        return Outcome(name, np.nan, state="not defined", note="no object's place is known")
    value = float(statistic(np.ones((1, count)))[0])
    draw, shares = np.random.default_rng(0), np.full(count, 1 / count)
    drawn = [statistic(draw.multinomial(count, shares, size).astype(np.float64)) for size in [DRAWS // 10] * 10]
    known = np.concatenate(drawn)
    known = known[~np.isnan(known)]
    low, high = np.quantile(known, [0.025, 0.975]) if count > 1 and known.size else (np.nan, np.nan)
    return Outcome(name, value, float(low), float(high), count, "not defined" if np.isnan(value) else "")


def halves(ids: Sequence[str]) -> np.ndarray:
    """Return which images are of one half, bool (image,), by a hash of their ids."""
    return np.array(
        [hashlib.sha256(f"half:{each}".encode("utf-8", "surrogateescape")).digest()[0] < 128 for each in ids], bool
    )


REDUCE: Mapping[str, Callable[[Any, Any], Iterator[Outcome]]] = {
    "deletion": curve,
    "insertion": curve,
    "road": curve,
    "sensitivity_n": by_label,
    "linear_view": by_label,
    "layer_randomisation": by_label,
    "localisation": localisation,
    "mass": by_label,
}
