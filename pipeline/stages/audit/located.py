"""Tests of place: does the map lie where the object is?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from pipeline.config.base import PathName
from pipeline.data import boxes, kinds
from pipeline.errors import MicrotomeError, about, nearest
from pipeline.networks.segmenters import wanted_categories
from pipeline.stages.audit.declared import Asked, Measure, Test, TestOptions
from pipeline.storage.identity import digest

if TYPE_CHECKING:
    from pipeline.plan.job import Job

OTHERS = "*"
Rule = Literal["cam", "grad_cam", "grab_cut"]
RULES: Mapping[Rule, str] = {"cam": "20 % of the maximum", "grad_cam": "15 % of the maximum", "grab_cut": "GrabCut"}
LEAST_IOU = (0.3, 0.5, 0.7)
"""IoUs of MaxBoxAccV2; .5 is that of MaxBoxAcc and of the localisation error."""
OPENCV = (
    "rules: grab_cut needs OpenCV, which is not installed: install the extra, `pip install '.[boxes]'` in Microtome's "
    "folder, or name other rules"
)


class Located(TestOptions):
    boxes: PathName | None = Field(
        None,
        description="where objects are: a CSV (path, class, xmin, ymin, xmax, ymax, by edges of pixels), or a folder "
        "of XML files as Pascal VOC and ImageNet have them",
    )
    class_of: dict[str, str] = Field(
        {}, description="for `boxes`: the class of the data set of names that are written otherwise"
    )
    concept_of: dict[str, str | list[str] | None] = Field(
        {},
        description="in place of boxes: the concept, or concepts, of the label maps that show each class; null leaves "
        "the images of a class out, and `*` is all other classes",
    )
    category: str | None = Field(
        None, description="for `concept_of`: the category of label maps; default: the only one"
    )

    @model_validator(mode="after")
    def _one(self) -> Located:
        if (self.boxes is None) == (not self.concept_of):
            raise ValueError("give `boxes`, or `concept_of` with label maps")
        if self.boxes is None and self.class_of:
            raise ValueError("class_of: is for `boxes`")
        if self.boxes is not None and self.category is not None:
            raise ValueError("category: is for `concept_of`")
        return self


class Localisation(Located):
    """Draw boxes from maps, and compare them with the truth's."""

    thresholds: Annotated[int, Field(ge=2, le=1000)] = Field(
        100, description="so many thresholds between a map's least and greatest value are tried"
    )
    rules: Annotated[list[Rule], Field(min_length=1)] = Field(
        ["cam", "grad_cam"],
        description="of the box without a free threshold: `cam`, `grad_cam`, or `grab_cut` (Simonyan et al. 2014), "
        "which needs OpenCV",
    )

    @property
    def levels(self) -> np.ndarray:
        """The thresholds, from 0 on, below 1."""
        return np.arange(self.thresholds) / self.thresholds


class Pointing(Located):
    """Look where the largest value of the map lies, and how much of it lies inside the object."""

    tolerance: PositiveInt = Field(15, description="pixels that the largest value may miss the object by, as published")


class Mass(TestOptions):
    """See how much of the positive part of a map lies in each concept of label maps, whatever is explained."""

    category: str = Field(description="the category of label maps")
    concepts: Annotated[list[str], Field(min_length=1)] = Field(description="concepts of it")


# What they measure ----------------------------------------------------------------------------------------------------


def _localisation(options: Localisation) -> Mapping[str, Measure]:
    labels = {"threshold": tuple(f"{each:g}" for each in options.levels)}
    found = {
        "largest_iou": Measure("IoU of the largest part's box", ("threshold",), labels),
        "any_iou": Measure("IoU of the best part's box", ("threshold",), labels),
        "inside": Measure("Pixels inside at the threshold or above", ("threshold",), labels),
        "outside": Measure("Pixels outside at the threshold or above", ("threshold",), labels),
        "object": Measure("Pixels inside"),
        "first": Measure("Whether the label is predicted"),
        "fifth": Measure("Whether the label is among the five most probable classes"),
        "placed": Measure("Whether the place of the label's object is known"),
    }
    for rule in options.rules:
        found[f"{rule}_iou"] = Measure(f"IoU, {RULES[rule]}", better="higher")
    return found


def _pointing(options: Pointing) -> Mapping[str, Measure]:
    return {
        "hit": Measure("Largest value inside", better="higher"),
        "hit_tolerant": Measure(f"Largest value at most {options.tolerance} pixels off", better="higher"),
        "energy": Measure("Share of the positive part inside", better="higher"),
        "area": Measure("Share of the image inside"),
    }


def _mass(options: Mass) -> Mapping[str, Measure]:
    labels = {"concept": tuple(options.concepts)}
    return {
        "energy": Measure("Share of the positive part in the concept", ("concept",), labels),
        "area": Measure("Share of the image in the concept", ("concept",), labels),
    }


# Where objects are ----------------------------------------------------------------------------------------------------


def _check(options: Located, asked: Asked) -> Iterator[str]:
    """Yield what of the truth is missing, while the plan is made."""
    names = asked.draft.class_names(asked.dataset)
    if not names:
        yield f": data set {asked.dataset!r} has no classes, so that no object is looked for"
        return
    if options.boxes is not None:
        path = Path(options.boxes)
        if not path.exists():
            yield f".boxes: no file or folder {path}"
        for name, of in options.class_of.items():
            if of not in names:
                lacking = f"which is no class of {asked.dataset!r}{nearest(of, names)}"
                yield f".class_of: {name!r} is {of!r}, {lacking}"
        return
    known = _categories(asked)
    if not known:
        yield (
            f".concept_of: data set {asked.dataset!r} has no label maps, or no network is dissected on it: "
            "give it `concepts`, or give `boxes`"
        )
    elif options.category is None and len(known) > 1:
        yield f".category: name one of {', '.join(known)}"
    elif options.category is not None and options.category not in known:
        close = nearest(options.category, known)
        yield f".category: no category {options.category!r} of {asked.dataset!r}{close}"
    else:
        concepts = known[options.category or next(iter(known))]
        for wanted in sorted({name for of in options.concept_of.values() for name in several(of)} - set(concepts)):
            yield f".concept_of: no concept {wanted!r} of {asked.dataset!r}{nearest(wanted, concepts)}"
    for name in options.concept_of:
        if name not in (*names, OTHERS):
            yield f".concept_of: no class {name!r} of {asked.dataset!r}{nearest(name, names)}"
    without = [name for name in names if name not in options.concept_of]
    if without and OTHERS not in options.concept_of:
        more = f", nor have {len(without) - 1} others" if len(without) > 1 else ""
        yield (
            f'.concept_of: class {without[0]!r} has no concept{more}: name it, or give `"*": null` to '
            "leave such images out"
        )


def _check_rules(options: Localisation, asked: Asked) -> Iterator[str]:
    from importlib import util

    if "grab_cut" in options.rules and util.find_spec("cv2") is None:
        yield f".{OPENCV}"
    yield from _check(options, asked)


def _library(options: Localisation) -> str | None:
    """Return the version of OpenCV where a rule draws boxes with it."""
    if "grab_cut" not in options.rules:
        return None
    import cv2

    return f"opencv {cv2.__version__}"


def _check_mass(options: Mass, asked: Asked) -> Iterator[str]:
    known = _categories(asked)
    if options.category not in known:
        yield f".category: no category {options.category!r} of {asked.dataset!r}{nearest(options.category, known)}"
        return
    for name in options.concepts:
        if name not in known[options.category]:
            close = nearest(name, known[options.category])
            yield f".concepts: no concept {name!r} in {options.category} of {asked.dataset!r}{close}"


def _parents(options: Located) -> tuple[str, ...]:
    return ("concepts",) if options.boxes is None else ()


def _categories(asked: Asked) -> Mapping[str, Sequence[str]]:
    """Return the concepts of each category of label maps."""
    if not any(step.key.dataset == asked.dataset for step in asked.draft.of_stage("concepts")):
        return {}
    return wanted_categories(asked.spec, asked.draft.config)


def _reads(options: Located, asked: Asked) -> Any:
    """Return what the ids depend on besides the options: the boxes themselves, wherever their file lies."""
    if options.boxes is None:
        return None
    key = "boxes", options.boxes
    if key not in asked.kept:
        with about(f"{asked.where}.boxes"):
            asked.kept[key] = digest_of(boxes.read_boxes(Path(options.boxes)))
    return asked.kept[key]


def digest_of(found: Sequence[boxes.Box]) -> str:
    """Return the digest of what boxes say."""
    return digest([[each.image, each.name, list(each.edges), each.size] for each in found])


def _prepare(options: Located, job: Job[Any], read: Any) -> dict[int, np.ndarray] | dict[int, tuple[str, ...]]:
    """Return the boxes of each slot, float64 (box, 5) class and edges, or the concepts of each class.

    Raises `MicrotomeError` if the boxes are no longer those of which the id is made.
    """
    images = job.images
    if options.boxes is None:
        return concepts_of(options, images.classes)
    slot = {str(name): at for at, name in enumerate(images.image_ids())}
    found = {}
    valid = np.asarray(images.reader()["valid"][:])
    written = boxes.read_boxes(Path(options.boxes))
    if digest_of(written) != read:
        raise MicrotomeError(f"boxes: {options.boxes} has changed since the plan was made: run again")
    own = boxes.by_image(written, list(slot), images.classes, options.class_of)
    for image, named in own.items():
        if not valid[slot[image]]:
            continue
        before, geometry = kinds.source(job.dataset_spec, image, images.size)
        rows = [(of, *edges) for of, box in named if (edges := boxes.placed(box, before, geometry)) is not None]
        found[slot[image]] = np.array(rows, np.float64).reshape(-1, 5)
    return found


def concepts_of(options: Located, classes: Sequence[str]) -> dict[int, tuple[str, ...]]:
    """Return the concepts that show each class, by its number; no entry for one that is left out."""
    found = {}
    for at, name in enumerate(classes):
        of = several(options.concept_of.get(name, options.concept_of.get(OTHERS)))
        if of:
            found[at] = of
    return found


def several(concepts: str | list[str] | None) -> tuple[str, ...]:
    """Return concepts as they are written for a class; none where it is left out."""
    return (concepts,) if isinstance(concepts, str) else tuple(concepts or ())


MADE = ("random", "edges", "centre", "whole")
"""Controls: the last two are the box in the centre, of half the image's area, and the whole image."""
TESTS: dict[str, Test] = {
    "localisation": Test(
        "Localisation",
        "Boxes drawn from maps are compared with the boxes of the objects, by the published measures.",
        Localisation,
        _localisation,
        lambda options, own, size: 0.0,
        controls=MADE,
        control="centre",
        parents=_parents,
        check=_check_rules,
        prepare=_prepare,
        reads=_reads,
        library=_library,
    ),
    "pointing": Test(
        "Pointing game",
        "The largest value of a map should lie on the object, and most of its positive part inside.",
        Pointing,
        _pointing,
        lambda options, own, size: 0.0,
        controls=MADE,
        control="centre",
        parents=_parents,
        check=_check,
        prepare=_prepare,
        reads=_reads,
    ),
    "mass": Test(
        "Mass in concepts",
        "How much of the positive part of a map lies in each concept, beside the concept's share of the image.",
        Mass,
        _mass,
        lambda options, own, size: 0.0,
        controls=("random", "edges"),
        control="random",
        parents=("concepts",),
        check=_check_mass,
    ),
}
