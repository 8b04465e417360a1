"""What one trial did to one image: inside the concept's region, around its pieces, and elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernels.intervention.regions import MARGIN, Mask, Spot, contrast, dilated, distance, spots

MEASURES = ("inside", "outside", "left", "contrast", "others")
"""Sums over the image: change inside the region and outside of it, distance inside to the picture without the concept,
contrast of the concept's pieces to their rings, and that of the other concepts' pieces."""
SMALLEST = 12
"""Pixels of a piece."""


@dataclass(frozen=True)
class Regions:
    """One image's pixels of the concept, all pixels farther away, and pieces of it and of other concepts."""

    inside: Mask
    outside: Mask
    own: list[Spot]
    others: list[Spot]

    @classmethod
    def of(cls, label_map: np.ndarray, number: int) -> Regions:
        """Return the regions of a concept in the label map (y, x) of its category; 0 means nothing."""
        inside = label_map == number
        others = [
            spot
            for each in np.unique(label_map).tolist()
            if each not in (0, number)
            for spot in spots(label_map == each, SMALLEST, 0.25)
        ]
        return cls(inside, ~dilated(inside, MARGIN), spots(inside, SMALLEST), others)

    @property
    def sizes(self) -> tuple[float, float, float, float, float]:
        """What each measure is divided by: pixels inside, outside and inside, and pieces."""
        inside, outside = float(self.inside.sum()), float(self.outside.sum())
        return inside, outside, inside, float(len(self.own)), float(len(self.others))


def measured(before: np.ndarray, after: np.ndarray, without: np.ndarray | None, regions: Regions) -> Sequence[float]:
    """Return the sums of `MEASURES` for pictures uint8 (channel, y, x); `left` is NaN where there is no `without`."""
    was, now = before / 255, after / 255
    return (
        distance(was, now, regions.inside),
        distance(was, now, regions.outside),
        math.nan if without is None else distance(without / 255, now, regions.inside),
        sum(contrast(now, spot) for spot in regions.own),
        sum(contrast(now, spot) for spot in regions.others),
    )
