"""The page of each network: what its units and classes want to see, its projections, and its first layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pipeline.config.base import UNTRAINED
from pipeline.report.experiment import Experiment
from pipeline.report.page import Figure, Page
from pipeline.report.pictures import open_pictures
from pipeline.report.style import draw
from pipeline.report.words import percent, plural
from pipeline.stages.dissect.found import networks
from pipeline.stages.visualize import figures, pictures
from pipeline.stages.visualize.found import (
    SHOWN,
    TITLES,
    FirstLayer,
    Pictured,
    ProjectedLayer,
    Visualizations,
    control_of,
    folder_of,
    page_of,
    reached_by,
    switches_cosine,
    visualizations,
)
from pipeline.stages.visualize.settings import UNSWITCHED

REACHED_COLUMNS = ("subject", "number", "way", "reached", "data_maximum", "threshold", "ratio")
PLAIN = {"deconvnet": "deconvnet", "guided_backprop": "guided backpropagation", "gradient": "gradient"}
RULES = PLAIN | {f"{rule}{UNSWITCHED}": f"{title} without switches" for rule, title in PLAIN.items()}


@dataclass(frozen=True)
class Tile:
    """One unit or class on the page.

    Attributes
    ----------
    title, link : for readers. label : the concept that the unit detects. said : what its pictures reach.
    file, size : of its pictures, (width, height); empty without any. strips, strips_size : of its projections.
    """

    title: str
    link: str
    label: str
    said: list[str]
    file: str
    size: tuple[int, int]
    strips: str = ""
    strips_size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Mosaic:
    """The units of a layer, or the classes: a heading, notes, and tiles; `alt` says what a tile's pictures are."""

    title: str
    notes: list[str]
    tiles: list[Tile]
    ways: str
    rows: str


@dataclass(frozen=True)
class Section:
    """One experiment as the page shows it."""

    found: Visualizations
    findings: list[str]
    mosaics: list[Mosaic]
    filters: list[tuple[FirstLayer, str, tuple[int, int]]]
    figures: list[Figure]


def pages(experiment: Experiment) -> list[Page]:
    found = visualizations(experiment)
    if not found:
        return []
    tasks = []
    sections: dict[tuple[str, str], list[Section]] = {}
    files: dict[tuple[str, str], list[str]] = {}
    for key, several in found.items():
        for number, one in enumerate(several):
            folder = folder_of(experiment, *key, number)
            (experiment.out / folder).parent.mkdir(parents=True, exist_ok=True)
            own, section = section_of(experiment, one, folder, len(several) > 1)
            tasks += own
            sections.setdefault(key, []).append(section)
            files.setdefault(key, []).extend(file for _, file, _ in section.filters)
    for prefix, drawn in experiment.map(pictures.draw, [(task,) for task in tasks], "report: pictures of units"):
        key = next(
            key
            for key, several in found.items()
            if any(prefix.startswith(folder_of(experiment, *key, number)) for number in range(len(several)))
        )
        files[key] += drawn
    return [page(experiment, key, sections[key], files[key]) for key in found]


def page(experiment: Experiment, key: tuple[str, str], sections: Sequence[Section], files: Sequence[str]) -> Page:
    """Return the page of one network on a data set."""
    dataset, network = key
    several = len({dataset for dataset, _ in visualizations(experiment)}) > 1
    label = f"{network} on {dataset}" if several else network
    return Page(
        file=page_of(experiment, *key),
        title=f"Feature pictures, {label}",
        template="visualization.html.j2",
        values={"sections": sections, "network": network, "first_layers": first_layers(experiment)},
        summary=f"What units and classes of {label} want to see, beside the evidence of the data.",
        findings=[finding for one in sections for finding in one.findings],
        figures=[figure for one in sections for figure in one.figures],
        files=list(files),
        methods="methods-visualization.html.j2",
    )


def first_layers(experiment: Experiment) -> list[tuple[str, FirstLayer]]:
    """Return the first layers of all networks of the configuration, each once, with the network's name."""
    found: dict[tuple[str, str], tuple[str, FirstLayer]] = {}
    for (_, network), several in visualizations(experiment).items():
        for one in several:
            found |= {(network, first.facts.subject): (network, first) for first in one.first}
    return list(found.values())


def section_of(
    experiment: Experiment, one: Visualizations, folder: str, several: bool
) -> tuple[list[pictures.Task], Section]:
    """Return the tasks that draw an experiment's pictures, and the experiment as the page shows it."""
    images = experiment.results / one.dataset / "images.zarr"
    opened = open_pictures(images)
    size = opened.pixels.shape[2], opened.pixels.shape[3]
    labels = labels_of(experiment, one)
    tasks, mosaics = [], []
    for at, layer in enumerate(one.layers):
        units, ways, projected = one.units(layer), one.of_layer(layer), one.projections(layer)
        prefix = f"{folder}{at}-"
        sources = tuple(pictures.Source(each.store, rows_of(each.numbers)) for each in ways)
        strips = pictures.Source(projected.store, rows_of(projected.numbers)) if projected is not None else None
        tasks += [
            pictures.Task(experiment.out, prefix, images, part, sources, strips, size) for part in pictures.parts(units)
        ]
        crop, places = (0, 0), 0
        if projected is not None:
            shape = projected.store.open()["projection"].shape
            crop, places = (shape[-2], shape[-1]), shape[1]
        tiles = []
        for unit in units:
            has = projected is not None and strips is not None and unit in strips.rows
            linked = experiment.link_to(one.dataset, one.network, layer, unit) if (layer, unit) in labels else ""
            tiles.append(
                Tile(
                    f"unit {unit}",
                    linked,
                    labels.get((layer, unit), ""),
                    [said for each in ways if (said := reached_by(each, unit))],
                    f"{prefix}{unit:04d}.jpg" if any(unit in source.rows for source in sources) else "",
                    width_of(size, len(ways)),
                    f"{prefix}{unit:04d}-projections.jpg" if has else "",
                    pictures.strips_size(crop, places, len(projected.methods)) if projected is not None else (0, 0),
                )
            )
        methods = projected.methods if projected is not None else []
        mosaics.append(
            Mosaic(
                layer, list(notes_of(one, layer)), tiles, ways_said(ways), ", ".join(RULES[each] for each in methods)
            )
        )
    if classes := one.of_classes:
        numbers = list(dict.fromkeys(int(each) for group in classes for each in group.numbers))[:SHOWN]
        prefix = f"{folder}classes-"
        sources = tuple(pictures.Source(each.store, rows_of(each.numbers)) for each in classes)
        tasks += [
            pictures.Task(experiment.out, prefix, images, part, sources, None, size) for part in pictures.parts(numbers)
        ]
        names = opened.names
        tiles = [
            Tile(
                names[each] if each < len(names) else f"class {each}",
                "",
                "",
                [f"{TITLES[group.facts.subject]}, {reached_by(group, each)}" for group in classes],
                f"{prefix}{each:04d}.jpg",
                width_of(size, len(classes)),
            )
            for each in numbers
        ]
        said = ", ".join(f"{TITLES[each.facts.subject]} by {TITLES.get(each.way, each.way)}" for each in classes)
        mosaics.append(Mosaic("Class models", [], tiles, said, ""))
    filters = []
    for at, first in enumerate(one.first):
        file = f"{folder}filters-{at}.png"
        drawn = pictures.filters_mosaic(first)
        drawn.save(experiment.out / file)
        filters.append((first, file, drawn.size))
    sentences = [f"{one.experiment}: {each}" if several else each for each in findings(experiment, one)]
    return tasks, Section(one, sentences, mosaics, filters, list(draw_figures(experiment, one, folder)))


def rows_of(numbers: np.ndarray) -> dict[int, int]:
    return {int(number): row for row, number in enumerate(numbers)}


def width_of(size: tuple[int, int], tiles: int) -> tuple[int, int]:
    """Return (width, height) of so many pictures side by side."""
    width, height = pictures.scaled(size, pictures.TILE)
    return tiles * width, height


def ways_said(ways: Sequence[Pictured]) -> str:
    return ", ".join(TITLES.get(each.way, each.way) for each in ways)


def labels_of(experiment: Experiment, one: Visualizations) -> dict[tuple[str, int], str]:
    """Return the concept of each dissected unit of a network, empty for one that is no detector."""
    network = next(
        (
            each.trained
            for each in networks(experiment)
            if (each.trained.dataset, each.trained.network) == (one.dataset, one.network)
        ),
        None,
    )
    if network is None:
        return {}
    return {(unit.layer, unit.unit): unit.concept if unit.detector else "" for unit in network.units}


def notes_of(one: Visualizations, layer: str) -> Iterator[str]:
    """Yield what a reader has to know of a layer's pictures."""
    projected = one.projections(layer)
    if projected is not None and projected.reach == "everything":
        yield "Every position of this layer can depend on the whole image, so projections are not cropped."
    if projected is not None and projected.reach == "measured":
        yield "Receptive fields are measured by the support of gradients, since no closed form is known here."
    total = len(set().union(*(set(each.numbers.tolist()) for each in one.of_layer(layer))))
    if total > SHOWN:
        yield f"Shown are {plural(SHOWN, 'unit')} of {plural(total, 'unit')}."
    yield from (note[0].upper() + note[1:] + "." for note in one.notes if repr(layer) in note)


# Findings -------------------------------------------------------------------------------------------------------------


def findings(experiment: Experiment, one: Visualizations) -> Iterator[str]:
    """Say what the numbers show, whatever they are."""
    control = control_of(experiment, one)
    for pictured in one.pictured:
        name = TITLES.get(pictured.way, pictured.way)
        subject = pictured.facts.subject if pictured.of_units else f"Class models, {TITLES[pictured.facts.subject]}"
        what, count = ("unit" if pictured.of_units else "class"), len(pictured.numbers)
        many = plural(count, what) if what == "unit" or count == 1 else f"{count} classes"
        beats = int(pictured.beats.sum())
        said = f"{subject}, {name}: of {many}, the pictures of {beats} score higher than every image of the data"
        ratio = pictured.ratio[~np.isnan(pictured.ratio)]
        if ratio.size and pictured.of_units:
            said += f", {float(np.median(ratio)):.2g} times as high in the median"
        other = (
            []
            if control is None
            else [
                each
                for each in control.pictured
                if (each.facts.store, each.facts.subject) == (pictured.facts.store, pictured.facts.subject)
            ]
        )
        for each in other:
            share = float(each.beats.mean()) if len(each.beats) else float("nan")
            said += f"; of the untrained network, {percent(share)} of its own do"
        yield said + "."
    for projected in one.projected:
        yield from switches_said(projected)
    for first in one.first:
        yield first_said(first)
    yield from (note[0].upper() + note[1:] + "." for note in one.notes)


def switches_said(projected: ProjectedLayer) -> Iterator[str]:
    """Say how far projections without the switches of max pooling are those with them."""
    for rule, title in PLAIN.items():
        if (cosine := switches_cosine(projected, rule)) is not None and cosine.size:
            low, middle, high = np.quantile(cosine, [0.25, 0.5, 0.75])
            yield (
                f"{projected.facts.subject}: projections by {title} without the switches of max pooling have a cosine "
                f"of {middle:.2f} in the median with those by the same rule with them (quartiles {low:.2f} and "
                f"{high:.2f})."
            )


def first_said(first: FirstLayer) -> str:
    """Say what the filters of a first layer are worth."""
    (height, width), (down, right) = first.kernel, first.stride
    stride = f"{down}" if down == right else f"{down} and {right}"
    return (
        f"{first.facts.subject}: of its {plural(len(first.filters), 'filter')} of {height} × {width} at stride "
        f"{stride}, {percent(float(first.dead.mean()))} are dead and {percent(first.alike)} near-duplicates; "
        f"{percent(first.alias)} of their energy is above the Nyquist frequency of the stride."
    )


def draw_figures(experiment: Experiment, one: Visualizations, folder: str) -> Iterator[Figure]:
    """Draw how far pictures excite units; nothing without a unit whose highest activation is positive."""
    found: Mapping[tuple[str, str], np.ndarray] = {
        (each.facts.subject, TITLES.get(each.way, each.way)): each.ratio
        for each in one.pictured
        if each.of_units and not np.isnan(each.ratio).all()
    }
    if not found:
        return
    name = "-".join([*folder.split("/")[1:2], one.experiment])
    control = " (untrained)" if one.network.endswith(UNTRAINED) else ""
    yield draw(
        experiment,
        f"visualization-{name}",
        partial(figures.reached, found=found),
        kind="visualization",
        alt=f"Points: score of each picture of {one.network} over the highest of the data, by layer",
        caption=f"Score of each unit’s picture{control}, put through the network itself, over the highest activation "
        "of the unit on the images of the data. Right of the line, the picture excites the unit more than any image.",
        header=REACHED_COLUMNS,
        rows=list(reached_rows(one)),
        labels={"network": one.network, "data set": one.dataset, "experiment": one.experiment},
    )


def reached_rows(one: Visualizations) -> Iterator[Sequence[Any]]:
    for each in one.pictured:
        if each.of_units:
            columns = each.numbers, each.value, each.data_maximum, each.threshold, each.ratio
            for number, value, most, threshold, ratio in zip(*(column.tolist() for column in columns), strict=True):
                yield each.facts.subject, number, each.way, value, most, threshold, ratio
