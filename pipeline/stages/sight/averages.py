"""What the stage `sight` makes of its minibatches: averages with standard errors, as arrays and as tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kernels.locality.attention import distances
from kernels.locality.localisation import position_cka
from kernels.locality.receptive_field import extent
from kernels.similarity.cka import jackknife, ratio
from pipeline.data.images import Images
from pipeline.data.minibatches import Minibatch
from pipeline.stages.sight.results import NO_POSITIONS, TABLES, Attributes
from pipeline.stages.sight.tasks import Work
from pipeline.storage.store import StoreRef
from pipeline.storage.tables import csv_bytes, number

Arrays = dict[str, tuple[tuple[str, ...], np.ndarray]]

NO_GRADIENT = "no pixel changes what its centre position gives"
ZERO_GRADIENT = "its gradient is zero at every pixel, though its values change with the image"


@dataclass
class Averages:
    """Arrays of sight.zarr, its attributes, and the tables by name."""

    arrays: Arrays = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, bytes] = field(default_factory=dict)

    @property
    def attributes(self) -> Attributes:
        return Attributes(**self.attrs)


def put_together(work: Work, batches: Sequence[Minibatch], images: Images, store: StoreRef) -> Averages:
    """Average over the minibatches, in their order."""
    reader = store.open()
    slots = np.array([slot for batch in batches for slot in batch.images])
    label = np.asarray(images.reader()["label"][:])[slots]
    found = Averages()
    weight = np.array([batch.weight for batch in batches], np.float64)
    kept = np.asarray(reader["image"][:]) >= 0

    def stored(name: str) -> np.ndarray:
        return np.asarray(reader[name][:])

    found.attrs = {
        "images": len(slots),
        "minibatches": len(batches),
        "image_size": list(work.image),
        "measures": list(work.measures),
        "absent": {name: why for name, why in work.prepared.absent.items() if name in work.measures},
    }
    if work.wants("receptive_field") or work.wants("skips"):
        found.arrays["layer"] = ("layer",), _text(layer.name for layer in work.prepared.layers)
    if work.wants("receptive_field"):
        _receptive_fields(found, work, stored("receptive_field"), stored("gradients"), stored("centre_changes"))
    if "attention" in work.measures and work.prepared.attention and work.prepared.attention_unread:
        found.attrs["attention_not_read"] = list(work.prepared.attention_unread)
    if work.wants("attention"):
        _attention(found, work, stored("distance")[kept])
    if work.wants("skips"):
        names = ("ratio_sum", "ratio_count", "hsic_layer", "hsic_across", "hsic_without")
        _skips(found, work, stored("ratio")[kept], stored("predicted")[kept], label, weight, *map(stored, names))
    if work.wants("localisation"):
        _localisation(found, work, weight, *map(stored, ("hsic_position", "hsic_output", "hsic_input")))
    return found


def _receptive_fields(found: Averages, work: Work, fields: np.ndarray, count: np.ndarray, changes: np.ndarray) -> None:
    layers = work.prepared.layers
    total = fields.sum(0) / count.sum()
    reach = [extent(field) for field in total]
    notes = []
    for layer, one, changed in zip(layers, reach, changes.max(0).tolist(), strict=True):
        none = "" if not math.isnan(one.area) else ZERO_GRADIENT if changed else NO_GRADIENT
        notes.append(work.prepared.gradient_notes.get(layer.name, none) if layer.spatial else NO_POSITIONS)
    if all(math.isnan(one.area) for one in reach):
        found.attrs["absent"]["receptive_field"] = "; ".join(
            f"{layer.name}: {note}" for layer, note in zip(layers, notes, strict=True)
        )
    misplaced = {each.layer.name for each in work.prepared.misplaced}
    total[[not layer.spatial or layer.name in misplaced for layer in layers]] = np.nan
    radius = np.array([one.radius for one in reach])

    def radii(summed: np.ndarray) -> np.ndarray:
        return np.array([extent(field).radius for field in summed.reshape(total.shape)])

    _, error = jackknife(radii, fields.reshape(*fields.shape[:2], -1), np.ones(len(fields)))
    deviation = np.array([one.deviation for one in reach])
    found.arrays |= {
        "receptive_field": (("layer", "y", "x"), total),
        "receptive_area": (("layer",), np.array([one.area for one in reach])),
        "receptive_radius": (("layer",), radius),
        "receptive_radius_standard_error": (("layer",), error),
        "receptive_deviation_y": (("layer",), deviation[:, 0]),
        "receptive_deviation_x": (("layer",), deviation[:, 1]),
        "receptive_note": (("layer",), _text(notes)),
    }
    found.attrs["receptive_field_images"] = int(count.sum())
    rows = (
        [layer.name, number(one.area), number(one.radius), number(error[at]), *map(number, one.deviation), notes[at]]
        for at, (layer, one) in enumerate(zip(layers, reach, strict=True))
    )
    _table(found, "sight-receptive-fields.csv", rows)


def _attention(found: Averages, work: Work, distance: np.ndarray) -> None:
    """`distance` (image, attention, head, kind); heads that a layer lacks are NaN."""
    modules = work.prepared.attention
    mean, error = _mean(distance)
    dims = ("attention", "head")
    grids = [each.info.shape[1:] for each in modules]
    uniform = [float(distances(grid, _patch(work.image, grid)).mean()) for grid in grids]
    found.arrays |= {
        "attention": (("attention",), _text(each.name for each in modules)),
        "attention_uniform_distance": (("attention",), np.array(uniform)),
    }
    for kind, name in enumerate(("attention_distance", "attention_distance_renormalised")):
        found.arrays |= {name: (dims, mean[..., kind]), f"{name}_standard_error": (dims, error[..., kind])}
    rows = (
        [each.name, head, *(number(value[at, head, kind]) for kind in (0, 1) for value in (mean, error))]
        for at, each in enumerate(modules)
        for head in range(each.heads)
    )
    _table(found, "sight-attention.csv", rows)


def _skips(
    found: Averages,
    work: Work,
    ratios: np.ndarray,
    predicted: np.ndarray,
    label: np.ndarray,
    weight: np.ndarray,
    ratio_sum: np.ndarray,
    ratio_count: np.ndarray,
    own: np.ndarray,
    across: np.ndarray,
    within: np.ndarray,
) -> None:
    """`ratios` (image, skip, part), `predicted` (image, network); the others by minibatch."""
    skips, layers = work.prepared.skips, work.prepared.layers
    mean, error = _mean(ratios)
    loss, loss_error, accuracy, changed = _accuracy(predicted, label)
    cka, cka_error = _cka_across(own, across, np.diagonal(within, axis1=2, axis2=3), weight)
    with np.errstate(invalid="ignore"):
        by_position = np.nansum(ratio_sum, 0) / ratio_count.sum(0)
    summed = (within * weight[:, None, None, None]).sum(0)
    found.arrays |= {
        "skip": (("skip",), _text(each.name for each in skips)),
        "skip_branch": (("skip",), _text(each.branch for each in skips)),
        "skip_shortcut": (("skip",), _text(each.shortcut for each in skips)),
        "skip_special_tokens": (("skip",), np.array([each.info.special for each in skips])),
        "skip_ratio_special": (("skip",), mean[:, 0]),
        "skip_ratio_special_standard_error": (("skip",), error[:, 0]),
        "skip_ratio_spatial": (("skip",), mean[:, 1]),
        "skip_ratio_spatial_standard_error": (("skip",), error[:, 1]),
        "skip_ratio": (("skip", "position"), by_position),
        "accuracy_without_skip": (("skip",), accuracy[1:]),
        "accuracy_loss": (("skip",), loss),
        "accuracy_loss_standard_error": (("skip",), loss_error),
        "predictions_changed": (("skip",), changed),
        "cka_without_skip": (("skip", "layer"), cka),
        "cka_without_skip_standard_error": (("skip", "layer"), cka_error),
        "layer_b": (("layer_b",), _text(layer.name for layer in layers)),
        "cka_within_without_skip": (("skip", "layer", "layer_b"), np.stack([ratio(each) for each in summed])),
    }
    found.attrs["accuracy"] = None if math.isnan(accuracy[0]) else float(accuracy[0])
    found.attrs["skips_not_read"] = list(work.prepared.unread)
    found.attrs["labelled"] = int((label >= 0).sum())
    if not work.prepared.logits:
        found.attrs["absent"]["accuracy"] = "the network gives no logits of several classes"
    elif not (label >= 0).any():
        found.attrs["absent"]["accuracy"] = "none of the images has a label"
    rows = (
        [
            each.name, each.branch, each.shortcut,
            *(number(value[at, part]) for part in (0, 1) for value in (mean, error)),
            *map(number, (accuracy[1 + at], loss[at], loss_error[at], changed[at], cka[at, -1], cka_error[at, -1])),
        ]
        for at, each in enumerate(skips)
    )  # fmt: skip
    _table(found, "sight-skips.csv", rows)


def _accuracy(predicted: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return what the network loses without each skip, its standard error, accuracies, and changed predictions.

    The error is that of paired differences; the accuracies are of the whole network and without each skip; of the
    predictions it is the share. All are NaN without logits or labels.
    """
    whole, without = predicted[:, :1], predicted[:, 1:]
    nothing = np.full(without.shape[1], np.nan)
    if (predicted < 0).any():
        return nothing, nothing, np.full(predicted.shape[1], np.nan), nothing
    changed = (without != whole).mean(0)
    known = label >= 0
    if not known.any():
        return nothing, nothing, np.full(predicted.shape[1], np.nan), changed
    right = (predicted == label[:, None])[known].astype(np.float64)
    loss, error = _mean(right[:, :1] - right[:, 1:])
    return loss, error, right.mean(0), changed


def _cka_across(
    own: np.ndarray, across: np.ndarray, without: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """CKA (skip, layer) of each layer with itself without a skip, and its standard error.

    From HSIC1 by minibatch: `own` (minibatch, layer), `across` and `without` (minibatch, skip, layer).
    """
    skips = across.shape[1]
    together = np.concatenate([own[:, None], across, without], 1)

    def statistic(hsic: np.ndarray) -> np.ndarray:
        lengths = [np.sqrt(np.where(each > 0, each, np.nan)) for each in (hsic[:1], hsic[1 + skips :])]
        return hsic[1 : 1 + skips] / (lengths[0] * lengths[1])

    return jackknife(statistic, together, weight)


def _localisation(
    found: Averages, work: Work, weight: np.ndarray, cross: np.ndarray, outputs: np.ndarray, inputs: np.ndarray
) -> None:
    layer = work.prepared.localised
    assert layer is not None
    special, (height, width) = layer.special, layer.shape[1:]
    count = cross.shape[1]
    flat = np.concatenate([cross.reshape(len(cross), -1), outputs, inputs], 1)[:, None]

    def pairs(hsic: np.ndarray) -> np.ndarray:
        parts = np.split(hsic[0], [cross[0].size, cross[0].size + count])
        return position_cka(parts[0].reshape(cross.shape[1:]), parts[1], parts[2])

    def summary(hsic: np.ndarray) -> np.ndarray:
        cka = pairs(hsic)[special:]
        own = np.eye(len(cka), dtype=bool)
        return np.array([np.nanmean(cka[own]), np.nanmean(cka[~own])]) @ np.array([[1, 0, 1], [0, 1, -1]])

    cka, error = jackknife(pairs, flat, weight)
    defined = ~np.isnan(cka)
    facts = np.full((2, 3), np.nan)
    if defined[special:].any():
        facts = np.stack(jackknife(summary, flat, weight))
    y, x = np.divmod(np.arange(height * width), width)
    place = [np.concatenate([np.full(special, -1), axis]) for axis in (y, x)]
    notes = []
    for at in range(count):
        own_constant = not outputs[:, at].sum() > 0
        notes.append("the same for all images of a minibatch" if own_constant else "")
    best = np.array([int(np.nanargmax(row)) if known.any() else -1 for row, known in zip(cka, defined, strict=True)])
    dims = ("output", "input")
    found.arrays |= {
        "localisation": (dims, cka),
        "localisation_standard_error": (dims, error),
        "output_y": (("output",), place[0]),
        "output_x": (("output",), place[1]),
        "input_y": (("input",), y),
        "input_x": (("input",), x),
        "localisation_best": (("output",), best),
    }
    names = ("own", "others", "difference")
    found.attrs |= {
        "localised_layer": layer.name,
        "localised_grid": [height, width],
        "localised_special_tokens": special,
        "localisation": {name: [_plain(v), _plain(e)] for name, v, e in zip(names, *facts, strict=True)},
    }
    _table(found, "sight-localisation.csv", _localised_rows(special, width, cka, error, best, notes))


def _localised_rows(
    special: int, width: int, cka: np.ndarray, error: np.ndarray, best: np.ndarray, notes: list[str]
) -> Iterator[list[Any]]:
    for at, row in enumerate(cka):
        cell = at - special
        own = [number(row[cell]), number(error[at, cell])] if cell >= 0 else ["", ""]
        others = np.delete(row, cell) if cell >= 0 else row
        mean = number(float(np.nanmean(others))) if not np.isnan(others).all() else ""
        where = list(divmod(cell, width)) if cell >= 0 else ["", ""]
        found = list(divmod(int(best[at]), width)) if best[at] >= 0 else ["", ""]
        yield [f"special token {at}" if cell < 0 else "position", *where, *own, mean, *found, notes[at]]


def _patch(image: tuple[int, int], grid: tuple[int, int]) -> tuple[float, float]:
    return image[0] / grid[0], image[1] / grid[1]


def _mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean over the first axis and standard error of the values that are defined; NaN where too few are."""
    known = ~np.isnan(values)
    count = known.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values, 0).sum(0) / count
        variance = np.where(known, (values - mean) ** 2, 0).sum(0) / (count - 1)
        error = np.sqrt(np.where(count > 1, variance / count, np.nan))
    return mean, error


def _table(found: Averages, name: str, rows: Any) -> None:
    found.tables[name] = csv_bytes(TABLES[name], rows)


def _plain(value: float) -> float | None:
    """Return a number as JSON has it: None for NaN."""
    return None if math.isnan(value) else float(value)


def _text(values: Any) -> np.ndarray:
    found = list(values)
    array = np.empty(len(found), object)
    array[:] = found
    return array
