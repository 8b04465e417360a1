"""Figures of the test `counterfactual`: who knows what the score loses, of which classes, kinds and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from pipeline.report.style import GRID, INK, MUTED, RUN_COLOURS, bare, shorten
from pipeline.stages.audit.counterfactual import SIZES
from pipeline.stages.audit.results import Outcome

Told = Mapping[str, Mapping[str, Outcome]]
"""Outcomes by the name of a method or control, as in the table, and by measure."""
GROUPS = {
    "what a baseline does": {
        "control:ig_black": "IG from black",
        "control:ig_mean": "IG from the mean colour",
        "control:ig_empty": "IG from the scene without objects",
    },
    "what knows nothing": {
        "control:random": "random map",
        "control:edges": "edges",
        "control:area": "visible area alone",
    },
    "what knows all": {
        "control:drop": "the drop itself",
        "control:shapley": "Shapley values of objects",
        "control:ring": "mask filled with its ring’s colour",
    },
}
"""Controls of the test by what they are for."""
CONTROL_TITLES = {name: title for group in GROUPS.values() for name, title in group.items()}
LOW_HIGH = LinearSegmentedColormap.from_list("low-high", [RUN_COLOURS["untrained"], "#ffffff", RUN_COLOURS["trained"]])
LETTER = 0.068
"""Inches of a letter in a column of names, generously."""


def order(told: Told, titles: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Return the methods, and then the controls by group, each in the order of the partial correlation."""

    def height(name: str) -> float:
        found = told[name].get("partial.drop.signed")
        return found.value if found is not None and not np.isnan(found.value) else -2.0

    groups = [("methods", [name for name in told if name in titles])]
    groups += [(group, [name for name in names if name in told]) for group, names in GROUPS.items()]
    return [(group, sorted(names, key=height, reverse=True)) for group, names in groups if names]


def known(width: float, told: Told, titles: Mapping[str, str], truth: str) -> Figure:
    """Draw each one's rank correlation with a truth, with and without the visible area, and the untrained network's."""
    groups = order(told, titles)
    names = [name for _, group in groups for name in group]
    figure = Figure(figsize=(width, 0.17 * (len(names) + len(groups)) + 0.75), layout="constrained")
    panel = figure.subplots()
    at, ticks = 0.0, []
    for number, (_, group) in enumerate(groups):
        at += 0.6 * (number > 0)
        for name in group:
            _entry(panel, at, told[name], truth)
            ticks.append(at)
            at += 1
        if number < len(groups) - 1:
            panel.axhline(at - 0.2, color=GRID, linewidth=0.8)
    panel.axvline(0, color=MUTED, linewidth=0.8)
    panel.set_ylim(at - 0.4, -0.6)
    panel.set_xlim(-0.45, 1.03)
    panel.set_xlabel("rank correlation over the objects of an image")
    panel.grid(axis="x")
    every = titles | CONTROL_TITLES
    panel.set_yticks(ticks, [shorten(every[name], int(0.42 * width / LETTER)) for name in names], fontsize=7, color=INK)
    bare(panel, "left")
    handles, labels = panel.get_legend_handles_labels()
    kept = dict(zip(labels, handles, strict=True))
    figure.legend(kept.values(), kept.keys(), loc="outside upper center", ncols=4 if width > 5 else 2, fontsize=7)
    return figure


def _entry(panel: Any, at: float, own: Mapping[str, Outcome], truth: str) -> None:
    partial, raw = own.get(f"partial.{truth}.signed"), own.get(f"rank.{truth}.signed")
    if raw is not None:
        panel.plot([raw.value], [at], "|", color=MUTED, ms=7, label="raw")
    style: dict[str, Any] = {"linestyle": "", "linewidth": 1}
    for measure, colour, marker, label in (
        (f"partial.{truth}.signed.wrong_class", RUN_COLOURS["permuted"], "v", "map of a wrong class"),
        (f"partial.{truth}.signed.untrained", RUN_COLOURS["untrained"], "s", "map of the untrained network"),
    ):
        if (found := own.get(measure)) is not None:
            panel.plot([found.value], [at], marker, color=colour, ms=3.5, mfc="none", label=label)
    if partial is not None and not np.isnan(partial.value):
        error = np.nan_to_num([[partial.value - partial.low], [partial.high - partial.value]])
        colour = RUN_COLOURS["trained"]
        panel.errorbar(
            [partial.value], [at], xerr=error, color=colour, marker="o", ms=4, label="area partialled out", **style
        )


def groups_of(told: Told, measure: str) -> list[str]:
    """Return the classes, kinds or sizes that any has a number of, `<measure>.<group>`."""
    found = {
        name.removeprefix(f"{measure}.") for own in told.values() for name in own if name.startswith(f"{measure}.")
    }
    order_of = {size: at for at, size in enumerate(SIZES)}
    return sorted(found, key=lambda name: (order_of.get(name, -1), name))


def table_of(
    width: float, told: Told, titles: Mapping[str, str], measure: str, label: str, bounds: tuple[float, float] = (-1, 1)
) -> Figure:
    """Draw a number by group (column) and by method or control (row) as colours, those with few images too."""
    groups = groups_of(told, measure)
    names = [name for _, group in order(told, titles) for name in group if _has(told[name], measure)]
    values = np.array([[_value(told[name], f"{measure}.{group}") for group in groups] for name in names])
    every = titles | CONTROL_TITLES
    shown = [shorten(every[name], int(0.34 * width / LETTER)) for name in names]
    left, top = LETTER * max(map(len, shown)) + 0.1, LETTER * max(map(len, groups)) + 0.1
    side = min(0.3, (width - left - 0.7) / len(groups))
    height = 0.17 * len(names) + top + 0.1
    figure = Figure(figsize=(width, height))
    panel = figure.add_axes((left / width, 0.1 / height, side * len(groups) / width, 0.17 * len(names) / height))
    panel.set_facecolor(GRID)
    mesh = panel.imshow(
        np.ma.masked_invalid(values), cmap=LOW_HIGH, norm=Normalize(*bounds), interpolation="none", aspect="auto"
    )
    if side > 0.24:
        for row, column in np.ndindex(values.shape):
            if not np.isnan(values[row, column]):
                strong = abs(values[row, column]) > 0.6 * bounds[1]
                text = f"{values[row, column]:.2f}".replace("0.", ".")
                ink = "#ffffff" if strong else "#1b1f23"
                panel.text(column, row, text, ha="center", va="center", fontsize=5.5, color=ink)
    panel.set_yticks(range(len(names)), shown, fontsize=7, color=INK)
    panel.set_xticks(range(len(groups)), groups, fontsize=7, color=INK, rotation=90)
    panel.xaxis.tick_top()
    bare(panel, "left", "top")
    beside = figure.add_axes(((left + side * len(groups) + 0.1) / width, 0.1 / height, 0.08 / width, 0.6))
    bar = figure.colorbar(mesh, cax=beside, label=label)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def _has(own: Mapping[str, Outcome], measure: str) -> bool:
    return any(name.startswith(f"{measure}.") for name in own)


def _value(own: Mapping[str, Outcome], measure: str) -> float:
    found = own.get(measure)
    return np.nan if found is None else found.value
