"""What the id of an ablation is made of."""

from __future__ import annotations

from typing import Literal

from pipeline.storage.record import Record


class Measure(Record):
    """How losses are measured: what a removed unit gives, on which images, and against how many random sets.

    Attributes
    ----------
    rank, judge : the split by whose losses units are ranked, and the one that sets of them are judged on.
    images : bound on the images of each split; None: all.
    draws : random sets of each size.
    """

    replace: Literal["zero", "mean", "shuffled"]
    rank: str
    judge: str
    images: int | None
    draws: int

    @property
    def splits(self) -> list[str]:
        """The splits that losses are measured on, the one that ranks first."""
        return list(dict.fromkeys((self.rank, self.judge)))


class Removal(Measure):
    """That, with the layers whose units are removed and the sizes of sets of them."""

    layers: Literal["last"] | list[str]
    sizes: list[int]

    @property
    def measure(self) -> Measure:
        return Measure(**{name: getattr(self, name) for name in Measure.model_fields})


class Settings(Record):
    """What is removed, and how many classes the images are labelled with."""

    ablate: Removal
    classes: int
