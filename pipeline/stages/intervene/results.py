"""What the stage `intervene` writes: two stores, three tables, and what each trial comes to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kernels.intervention.ratios import Ratio, ratio_of_sums
from pipeline.stages.intervene.measures import MEASURES
from pipeline.stages.intervene.trials import NOTHING, RANDOM, Trial
from pipeline.storage.record import Record
from pipeline.storage.tables import number

OUTCOMES = ("way", "inside", "outside", "contrast", "others")
TRIAL = ("what", "rank", "replace", "k", "at", "draws")
COLUMNS = (*TRIAL, "images", *(f"{name}{end}" for name in OUTCOMES for end in ("", "_low", "_high")))
AREA_COLUMNS = (*TRIAL, "category", "concept", "share", "change", "change_low", "change_high")
UNIT_COLUMNS = ("unit", "iou", "effect", "inside", "outside", "mean", "place_iou", "place_effect")


class Intervened(Record):
    """The result in the manifest of `intervene`.

    Attributes
    ----------
    train, test : how many images rank the units, and how many are changed. shown : of how many pictures are kept.
    counterfactual : whether the generator's own picture without the concept is known.
    apart : largest difference of the unchanged pictures from those of the data set, of 255: other batches may round
        otherwise. notes : what was left out, and why.
    """

    train: int
    test: int
    shown: int
    counterfactual: bool
    apart: int
    notes: list[str]


@dataclass(frozen=True)
class Group:
    """A trial, or all random sets of one size: the mean of their sums over sets counts.

    Attributes
    ----------
    at : places on the stores' axis of trials.
    """

    trial: Trial
    at: tuple[int, ...]

    @property
    def cells(self) -> tuple[str | int, ...]:
        """Its cells in the columns `TRIAL`."""
        one = self.trial
        draws = len(self.at) if one.what == RANDOM else ""
        return one.what, one.rank, one.replace, one.k or "", one.at, draws


def groups_of(trials: Sequence[Trial]) -> list[Group]:
    """Return the trials, with the random sets of one size together."""
    found: dict[tuple[str, str, str, int, str], list[int]] = {}
    for place, one in enumerate(trials):
        found.setdefault((one.what, one.rank, one.replace, one.k, one.at), []).append(place)
    return [Group(trials[places[0]], tuple(places)) for places in found.values()]


def outcomes(sums: np.ndarray, sizes: np.ndarray, groups: Sequence[Group]) -> Mapping[str, Ratio]:
    """Return what each group comes to, by name, with 95 % intervals over images.

    `way` is the share of the distance inside the region to the picture without the concept: 0 for nothing, 1 there.
    `inside` and `outside` are mean changes of pixels, from 0 to 1. `contrast` and `others` are changes relative to the
    unchanged picture: -1 is no contrast left.

    Parameters
    ----------
    sums : (image, trial, measure). sizes : (image, measure).
    """
    of_group = np.stack([sums[:, list(group.at)].mean(1) for group in groups], 1)
    nothing = sums[:, next(group.at[0] for group in groups if group.trial.what == NOTHING)]

    def ratio(name: str, whole: np.ndarray) -> Ratio:
        at = MEASURES.index(name)
        return ratio_of_sums(of_group[:, :, at], np.repeat(whole[:, at, None], len(groups), 1))

    left, contrast, others = (ratio(name, nothing) for name in ("left", "contrast", "others"))
    return {
        "way": Ratio(1 - left.value, 1 - left.high, 1 - left.low),
        "inside": ratio("inside", sizes),
        "outside": ratio("outside", sizes),
        "contrast": Ratio(*(each - 1 for each in contrast)),
        "others": Ratio(*(each - 1 for each in others)),
    }


def outcome_rows(found: Mapping[str, Ratio], groups: Sequence[Group], images: int) -> Iterator[list[object]]:
    for at, group in enumerate(groups):
        values = [number(float(values[at])) for name in OUTCOMES for values in found[name]]
        yield [*group.cells, images, *values]


def area_rows(
    areas: np.ndarray, pixels: int, groups: Sequence[Group], concepts: Sequence[tuple[str, str]]
) -> Iterator[list[object]]:
    """Yield the change of every concept's area in every group, of concepts that are in some unchanged picture.

    Parameters
    ----------
    areas : (image, trial, concept) pixels. pixels : of a picture. concepts : (category, name).
    """
    place = next(group.at[0] for group in groups if group.trial.what == NOTHING)
    before = areas[:, place].astype(np.float64)
    for group in groups:
        if group.trial.what == NOTHING:
            continue
        change = ratio_of_sums(areas[:, list(group.at)].mean(1), before)
        for at, (category, name) in enumerate(concepts):
            if before[:, at].any():
                values = [number(float(each[at]) - 1) for each in change]
                yield [*group.cells, category, name, number(float(before[:, at].mean() / pixels)), *values]
