"""Figures of the test `counterfactual`: who knows what the score loses, and of which classes, kinds and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from pipeline.report.style import GRID, INK, MUTED, RUN_COLOURS, bare, shorten
from pipeline.stages.audit.counterfactual import SIZES, Counterfactual
from pipeline.stages.audit.drawing import Drawing, Told
from pipeline.stages.audit.results import Outcome

GROUPS = {
    "baselines": {
        "ig_empty": "IG from the scene without objects",
        "ig_mean": "IG from the mean colour",
        "ig_black": "IG from black",
    },
    "chance": {"random": "Random map", "edges": "Edges", "area": "Visible area alone"},
    "ceilings": {
        "drop": "The drop itself",
        "shapley": "Shapley values of objects",
        "ring": "Mask filled with its ring’s colour",
    },
}
"""The controls by what they show: what a baseline does, what a map that knows nothing reaches, and what is best."""
LOW_HIGH = LinearSegmentedColormap.from_list("low-high", [RUN_COLOURS["untrained"], "#ffffff", RUN_COLOURS["trained"]])
LETTER = 0.068
"""Inches of a letter in a column of names, generously."""
LINE = 0.17
"""Inches of a line."""
Numbers = Mapping[str, Outcome]
"""By measure."""


def drawings(told: Told, titles: Mapping[str, str], options: Counterfactual) -> Iterator[Drawing]:
    """Yield what each method knows of objects: as a whole, by class, and which kinds and sizes it overrates."""
    groups = _groups(told, titles)
    if not groups:
        return
    yield Drawing(
        "",
        "Points: rank correlation of each method’s sums over objects with what the score loses without them",
        "Mean over images of the rank correlation between what a map says of each object and what the score loses "
        "without it, with 95 % intervals: first the methods, then what a baseline does, what a map reaches that knows "
        "nothing, and what is best. Large objects count more for any map: the line is the correlation as it is, the "
        "point what is left of it without the visible area.",
        partial(known, groups=groups),
    )
    for name, measure, label, alt, caption in (
        (
            "classes",
            "partial.drop.signed.class",
            "rank correlation",
            "Matrix: rank correlation of each method by class",
            "The same by class.",
        ),
        (
            "overrated",
            "overrated.drop.signed",
            "share of the order",
            "Matrix: how far each method puts objects of a kind or size too high",
            "How much higher (blue) or lower (orange) objects stand by a map than by the truth, as a share of the "
            "order of an image’s objects: by size and by kind.",
        ),
    ):
        if columns := _columns(groups, measure):
            bounds = (-1.0, 1.0) if name == "classes" else (-0.5, 0.5)
            draw = partial(matrix, groups=groups, measure=measure, columns=columns, label=label, bounds=bounds)
            yield Drawing(name, alt, caption, draw)


def known(width: float, groups: Sequence[Mapping[str, Numbers]]) -> Figure:
    """Draw the rank correlation with what the score loses: raw, without what the visible area explains, of controls."""
    names = [title for group in groups for title in group]
    figure = Figure(figsize=(width, LINE * (len(names) + len(groups)) + 0.75), layout="constrained")
    panel = figure.subplots()
    at, ticks = 0.0, []
    for number, group in enumerate(groups):
        if number:
            panel.axhline(at - 0.2, color=GRID, linewidth=0.8)
            at += 0.6
        for own in group.values():
            _entry(panel, at, own)
            ticks.append(at)
            at += 1
    panel.axvline(0, color=MUTED, linewidth=0.8)
    panel.set_ylim(at - 0.4, -0.6)
    panel.set_xlabel("rank correlation over the objects of an image" if width > 5 else "rank correlation")
    panel.grid(axis="x")
    panel.set_yticks(ticks, [shorten(name, int(0.42 * width / LETTER)) for name in names], fontsize=7, color=INK)
    bare(panel, "left")
    handles, labels = panel.get_legend_handles_labels()
    kept = dict(zip(labels, handles, strict=True))
    columns = 4 if width > 5 else 2
    figure.legend(kept.values(), kept.keys(), loc="outside upper left", ncols=columns, fontsize=7)
    return figure


def _entry(panel: Any, at: float, own: Numbers) -> None:
    raw, left = own.get("rank.drop.signed"), own.get("partial.drop.signed")
    if raw is not None:
        panel.plot([raw.value], [at], "|", color=MUTED, ms=7, label="raw")
    for of, colour, marker, label in (
        ("wrong_class", RUN_COLOURS["permuted"], "v", "map of a wrong class"),
        ("untrained", RUN_COLOURS["untrained"], "s", "untrained network"),
    ):
        if (found := own.get(f"partial.drop.signed.{of}")) is not None:
            panel.plot([found.value], [at], marker, color=colour, ms=3.5, mfc="none", label=label)
    if left is not None and not np.isnan(left.value):
        error = np.nan_to_num([[left.value - left.low], [left.high - left.value]])
        style: dict[str, Any] = {"color": RUN_COLOURS["trained"], "marker": "o", "ms": 4, "linewidth": 1}
        panel.errorbar([left.value], [at], xerr=error, linestyle="", label="area partialled out", **style)


def _groups(told: Told, titles: Mapping[str, str]) -> list[dict[str, Numbers]]:
    """Return the numbers of methods, and of controls by group, by title; the best first."""

    def height(entry: tuple[str, Numbers]) -> float:
        found = entry[1].get("partial.drop.signed")
        return found.value if found is not None and not np.isnan(found.value) else -2.0

    groups = [{titles[name]: own for name, own in told.items() if name in titles}]
    for names in GROUPS.values():
        groups.append({title: told[f"control:{n}"] for n, title in names.items() if f"control:{n}" in told})
    ordered = [dict(sorted(group.items(), key=height, reverse=True)) for group in groups]
    return [group for group in ordered if any("rank.drop.signed" in own for own in group.values())]


def matrix(
    width: float,
    groups: Sequence[Mapping[str, Numbers]],
    measure: str,
    columns: Sequence[str],
    label: str,
    bounds: tuple[float, float],
) -> Figure:
    """Draw numbers as colours, a line for each method or control and a column for each class, kind or size."""
    start = f"{measure}."
    lines = {title: own for group in groups for title, own in group.items() if any(n.startswith(start) for n in own)}
    values = np.array([[_value(own, start + column) for column in columns] for own in lines.values()])
    names = [shorten(title, int(0.34 * width / LETTER)) for title in lines]
    heads = [column.partition(".")[2] or column for column in columns]
    left, top = LETTER * max(map(len, names)) + 0.1, LETTER * max(map(len, heads)) + 0.1
    side = min(0.3, (width - left - 0.75) / len(columns))
    across, tall = side * len(columns), LINE * len(names)
    height = tall + top + 0.1
    figure = Figure(figsize=(width, height))
    panel = figure.add_axes((left / width, 0.1 / height, across / width, tall / height))
    panel.set_facecolor(GRID)
    shown = np.ma.masked_invalid(values)
    mesh = panel.imshow(shown, cmap=LOW_HIGH, norm=Normalize(*bounds), interpolation="none", aspect="auto")
    if side > 0.24:
        for row, column in np.ndindex(values.shape):
            if not np.isnan(values[row, column]):
                ink = "#ffffff" if abs(values[row, column]) > 0.6 * bounds[1] else "#1b1f23"
                text = f"{values[row, column]:.2f}".replace("0.", ".")
                panel.text(column, row, text, ha="center", va="center", fontsize=5.5, color=ink)
    panel.set_yticks(range(len(names)), names, fontsize=7, color=INK)
    panel.set_xticks(range(len(heads)), heads, fontsize=min(7, 68 * side), color=INK, rotation=90)
    panel.xaxis.tick_top()
    bare(panel, "left", "top", "right", "bottom")
    beside = figure.add_axes(((left + across + 0.1) / width, 0.1 / height, 0.08 / width, min(1.2, tall) / height))
    bar = figure.colorbar(mesh, cax=beside)
    bar.set_label(label, fontsize=7)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def _columns(groups: Sequence[Mapping[str, Numbers]], measure: str) -> list[str]:
    """Return the classes, kinds or sizes that there are numbers of: sizes first, the small one before others."""
    every = [name for group in groups for own in group.values() for name in own]
    found = {name.removeprefix(f"{measure}.") for name in every if name.startswith(f"{measure}.")}
    sizes = [f"size.{size}" for size in SIZES]
    return [size for size in sizes if size in found] + sorted(found.difference(sizes))


def _value(own: Numbers, measure: str) -> float:
    found = own.get(measure)
    return np.nan if found is None else found.value


FIGURES = {"counterfactual": drawings}
