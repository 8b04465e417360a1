"""The figure of an experiment: what the pictures lose by the number of units, beside random units and the aim."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report.style import COLOURS, INK, MUTED, bare
from pipeline.stages.intervene.found import Interventions, Row

PANELS = {
    "way": "way to the picture without it",
    "contrast": "contrast of the concept to its ring",
    "others": "contrast of other concepts",
    "inside": "change inside",
    "outside": "change outside",
}
RANKS = {"iou": "by IoU", "effect": "by effect"}


def curves_of(one: Interventions) -> list[tuple[str, list[Row], bool]]:
    """Return the lines of the figure: name, rows by number of units, and whether it is a control."""
    found = []
    for rank in one.settings.rank:
        for replace in one.settings.replace:
            found.append((f"{RANKS[rank]}, {replace}", one.curve("removed", rank, replace), False))
    found.append(("patched, the ceiling", one.curve("patched", one.settings.rank[0]), False))
    found.append(("random units", one.curve("random", replace=one.settings.replace[0]), True))
    return [each for each in found if each[1]]


def panels_of(one: Interventions) -> list[str]:
    """Return the measures that the figure shows."""
    return ["way", "contrast", "others"] if one.facts.counterfactual else ["inside", "outside", "contrast"]


def curves(width: float, one: Interventions) -> Figure:
    """Draw each measure by the number of removed units, with 95 % intervals; the aim as a line."""
    names = panels_of(one)
    columns = len(names) if width > 5 else 1
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(width, 2.5 * lines + 0.5), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    aim = one.row("without")
    for panel, name in zip(panels, names, strict=True):
        _panel(panel, one, name)
        if aim is not None:
            panel.axhline(100 * aim.outcomes[name][0], color=INK, linewidth=0.8, linestyle=(0, (3, 2)), label="aim")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3 if width > 5 else 2)
    return figure


def _panel(panel: Axes, one: Interventions, name: str) -> None:
    places = {k: at for at, k in enumerate(sorted(one.settings.units))}
    for number, (label, rows, control) in enumerate(curves_of(one)):
        colour = MUTED if control else COLOURS[number % len(COLOURS)]
        at = [places[row.k] + 0.05 * number for row in rows]
        value, low, high = ([100 * row.outcomes[name][end] for row in rows] for end in range(3))
        error = [
            [max(0.0, v - each) if each == each else 0.0 for v, each in zip(value, low, strict=True)],
            [max(0.0, each - v) if each == each else 0.0 for v, each in zip(value, high, strict=True)],
        ]
        panel.errorbar(at, value, yerr=error, color=colour, marker="o", markersize=3, linewidth=1, label=label)
    panel.set_title(PANELS[name], fontsize=8)
    panel.set_xticks(list(places.values()), [str(k) for k in places])
    panel.set_xlabel("units")
    panel.set_ylabel("%")
    panel.grid(axis="y")
    bare(panel)
