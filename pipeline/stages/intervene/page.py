"""The page of interventions: what a generator's images lose without some of its units, and what goes with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from pipeline.report.experiment import Experiment
from pipeline.report.page import Figure, Page
from pipeline.report.pictures import picture
from pipeline.report.style import draw
from pipeline.report.words import plural
from pipeline.stages.intervene.figures import curves, curves_of, panels_of
from pipeline.stages.intervene.found import Area, Interval, Interventions, Row, interventions

SIDE = 192
"""Pixels of the longer side of a picture on the page, about; small ones are enlarged by whole factors."""
LOST = 0.15
"""Contrast that other concepts lose beyond the aim from which the page says so."""
EFFECTS = 12
"""Concepts in the table of side effects."""
WORDS = {
    "nothing": "unchanged",
    "without": "the generator’s own picture without it",
    "removed": "removed",
    "random": "random units removed",
    "patched": "patched to their values without it",
    "inserted": "inserted",
}


@dataclass(frozen=True)
class Tile:
    """One picture: its file and what it shows."""

    file: str
    title: str


@dataclass(frozen=True)
class Section:
    """One experiment as the page shows it."""

    found: Interventions
    title: str
    findings: list[str]
    figure: Figure
    size: tuple[int, int]
    strips: list[list[Tile]]
    rows: list[tuple[Row, str]]
    effects: list[Area]


def pages(experiment: Experiment) -> list[Page]:
    found = interventions(experiment)
    if not found:
        return []
    files: list[str] = []
    sections = [section_of(experiment, number, one, files) for number, one in enumerate(found)]
    several = len(sections) > 1
    return [
        Page(
            file="interventions.html",
            title="Interventions",
            template="interventions.html.j2",
            values={"sections": sections, "words": WORDS, "percent": said, "nan": math.nan},
            summary="What the images of generators lose without some of their units, and what goes with it.",
            findings=[
                f"{one.found.experiment}: {each}" if several else each for one in sections for each in one.findings
            ],
            figures=[one.figure for one in sections],
            files=files,
            methods="methods-interventions.html.j2",
            scripts=["interventions.js"],
        )
    ]


def section_of(experiment: Experiment, number: int, one: Interventions, files: list[str]) -> Section:
    """Draw one experiment's figure and pictures; `files` gets the names of the pictures."""
    folder = f"interventions/{number}-"
    (experiment.out / folder).parent.mkdir(parents=True, exist_ok=True)
    size, strips = draw_pictures(experiment, one, folder, files)
    name = f"interventions-{number}"
    figure = draw(
        experiment,
        name,
        partial(curves, one=one),
        kind="interventions",
        alt=f"Curves over the number of removed units of {one.network}: {', '.join(panels_of(one))}",
        caption="By the number of removed units, on images that had no part in ranking them, with 95 % intervals over "
        "images. Grey: as many random units of the same mean activation. Dashed: what the generator itself paints of "
        "the composition without the concept."
        if one.facts.counterfactual
        else "By the number of removed units, on images that had no part in ranking them, with 95 % intervals over "
        "images. Grey: as many random units of the same mean activation.",
        header=("curve", "units", "measure", "value", "low", "high"),
        rows=[
            (label, row.k, measure, *row.outcomes[measure])
            for label, rows, _ in curves_of(one)
            for row in rows
            for measure in row.outcomes
        ],
        labels={"generator": one.network, "data set": one.dataset, "experiment": one.experiment},
    )
    title = f"{one.settings.concept} in {one.settings.layer} of {one.network}"
    told = [(row, described(row)) for row in one.rows]
    return Section(one, title, list(findings(one)), figure, size, strips, told, side_effects(one))


def described(row: Row) -> str:
    """Say what was done."""
    units = f"{plural(row.k, 'unit')} " if row.k else ""
    by = {"iou": "of highest IoU ", "effect": "of largest effect "}.get(row.rank, "")
    how = {"zero": ", zero", "mean": ", mean"}.get(row.replace, "") + {"grid": ", on a grid"}.get(row.at, "")
    return f"{units}{by}{WORDS[row.what]}{how}".strip()


def said(interval: Interval, digits: int = 0) -> str:
    """Format a share with its interval, with a sign where it is negative."""
    value, low, high = interval
    if value != value:
        return "–"
    around = f" [{_percent(low, digits)}, {_percent(high, digits)}]" if low == low else ""
    return f"{_percent(value, digits)} %{around}"


def _percent(value: float, digits: int) -> str:
    return f"{round(100 * value, digits) + 0.0:.{digits}f}".replace("-", "−")  # no −0


def strongest(one: Interventions) -> Row | None:
    """Return the removal with the most units, by the first ranking and replacement."""
    found = one.curve("removed", one.settings.rank[0], one.settings.replace[0])
    return found[-1] if found else None


def findings(one: Interventions) -> Iterator[str]:
    """Say what the numbers show, whatever they are."""
    row, aim, concept = strongest(one), one.row("without"), one.settings.concept
    if row is None:
        return
    random = one.row("random", k=row.k)
    out = row.outcomes
    by = "highest IoU" if row.rank == "iou" else "largest effect"
    value = "zero" if row.replace == "zero" else "their mean"
    first = f"{concept[0].upper()}{concept[1:]}: with the {plural(row.k, 'unit')} of {by} at {value}, "
    beside = f"; random units {said(random.outcomes['way' if aim else 'inside'])}" if random is not None else ""
    if aim is not None:
        yield (
            f"{first}pictures of {plural(one.facts.test, 'image')} go {said(out['way'])} of the way to the generator’s "
            f"own picture without it{beside}."
        )
        yield (
            f"The contrast of {concept} to its ring changes by {said(out['contrast'])}, where the aim is "
            f"{said(aim.outcomes['contrast'])}; that of other concepts by {said(out['others'])}, where the aim is "
            f"{said(aim.outcomes['others'])}."
        )
        lost = aim.outcomes["others"][0] - out["others"][0]
        if lost > LOST:
            yield (
                f"Other concepts lose {_percent(lost, 0)} points of contrast with it: these units carry more than "
                f"{concept}, and their IoU promises more than their removal does."
            )
        elif out["way"][0] > 0.5:
            yield f"What they paint is {concept} and little else."
    else:
        yield (
            f"{first}its pixels in {plural(one.facts.test, 'image')} change by {said(out['inside'], 1)}, all others by "
            f"{said(out['outside'], 1)}{beside}."
        )
        if out["outside"][0] > 0.5 * out["inside"][0]:
            yield (
                f"The rest of the picture changes more than half as much: a smaller area of {concept} is then no proof "
                f"that these units are of {concept}."
            )
    if one.facts.apart:
        yield (
            f"Unchanged pictures differ from those of the data set by at most {one.facts.apart} of 255, since they run "
            f"in other batches."
        )
    yield from (note[0].upper() + note[1:] + "." for note in one.facts.notes)


def side_effects(one: Interventions) -> list[Area]:
    """Return the concepts whose area the strongest removal changes most, by pixels."""
    row = strongest(one)
    if row is None:
        return []
    own = [each for each in one.areas if each.row == row.key]
    return sorted(own, key=lambda each: -abs(each.share * each.change[0]))[:EFFECTS]


# Pictures -------------------------------------------------------------------------------------------------------------


def columns_of(one: Interventions) -> list[tuple[int, str]]:
    """Return the trials whose pictures are shown, before and after first: place on the store's axis, title."""
    told = one.trials.open().attrs["trials"]
    settings, best = one.settings, max(one.settings.units)

    def place(**named: object) -> int | None:
        fits = (at for at, each in enumerate(told) if all(each.get(key, 0) == value for key, value in named.items()))
        return next(fits, None)

    how = {"replace": settings.replace[0]}
    wanted = [
        (place(what="nothing"), "before"),
        (place(what="removed", rank=settings.rank[0], k=best, **how), f"{plural(best, 'unit')} removed"),
        (place(what="without"), "its own without"),
        (place(what="random", k=best), f"{best} random removed"),
        (place(what="inserted", k=best), f"{plural(best, 'unit')} inserted"),
    ]
    return [(at, title) for at, title in wanted if at is not None]


def draw_pictures(
    experiment: Experiment, one: Interventions, folder: str, files: list[str]
) -> tuple[tuple[int, int], list[list[Tile]]]:
    """Write the pictures of the shown images; return their (width, height) and, image by image, their tiles."""
    if not one.facts.shown:
        return (0, 0), []
    stored = np.asarray(one.trials.open()["picture"][:])
    height, width = stored.shape[-2:]
    factor = max(1, round(SIDE / max(height, width)))
    strips = []
    for image in range(len(stored)):
        tiles = []
        for place, title in columns_of(one):
            file = f"{folder}{image}-{place}.png"
            drawn = picture(stored[image, place])
            drawn.resize((factor * width, factor * height), Image.Resampling.NEAREST).save(experiment.out / file)
            files.append(file)
            tiles.append(Tile(file, title))
        strips.append(tiles)
    return (factor * width, factor * height), strips
