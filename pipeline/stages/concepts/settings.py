"""The content of the id of a data set's label maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import NonNegativeInt

from pipeline.storage.record import Record


class ClassList(Record):
    """The class list of one category of truth: digest of its file, void values, end of the label maps' names."""

    list: str
    void: Sequence[NonNegativeInt]
    suffix: str | None = None


class Settings(Record):
    """Sources of label maps in order, the labelled split, the size of the maps, class lists and segmenters.

    `exif` is what orientations of images do to label maps, if the configuration says so.

    `pipeline.networks.segmenters.settings` describes each segmenter.
    """

    sources: list[str]
    split: str
    label_map_size: tuple[int, int] | None
    classes: dict[str, ClassList] | None = None
    segmenters: dict[str, dict[str, Any]] | None = None
    exif: str | None = None
