"""The numbers of one method, or control, in one test, as its outcomes are made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.stages.attribute.options import Options
from pipeline.stages.audit.declared import Measure
from pipeline.stages.audit.results import Name


@dataclass(frozen=True)
class Audited:
    """The numbers of one method, or control, in one test, over all audited images that are not refused.

    Attributes
    ----------
    arrays : by measure, (image, ...). measures : what each of them is. slots : of the images.
    method : the options of the method of attribution; None for a control.
    labels : int64 (image,), -1 where there is none. explained : the class that is explained of each image.
    ids : of the images. class_names : of the data set. given : what `Test.prepare` made.
    refused : why the method refuses the test on some images, or on all; empty if it does not.
    images : how many images are audited, refused ones among them.
    reasons : why it refuses parts of the test, by their names.
    """

    dataset: str
    network: str
    test: str
    name: Name
    method: Options | None
    measures: Mapping[str, Measure]
    arrays: Mapping[str, np.ndarray]
    labels: np.ndarray
    explained: np.ndarray
    ids: Sequence[str]
    class_names: Sequence[str]
    given: Any = None
    refused: str = ""
    images: int = 0
    reasons: Mapping[str, str] = field(default_factory=dict)
    slots: Sequence[int] | np.ndarray = ()
