"""The figures of attacks: how often they succeed, and how much the units move that matter to either class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report.style import COLOURS, MUTED, RUN_COLOURS, bare
from pipeline.stages.attack.found import Rows, value

MARKERS = "osD^v"
TITLES = {
    "pgd": "PGD",
    "apgd_ce": "APGD, cross-entropy",
    "apgd_dlr": "APGD, DLR",
    "cw_l2": "Carlini and Wagner, L2",
    "square": "Square attack",
}
SHOWN = {
    "attack": ("attacked", RUN_COLOURS["trained"], "o"),
    "noise": ("noise of the same norm", RUN_COLOURS["permuted"], "s"),
    "untrained": ("attacked, untrained network", RUN_COLOURS["untrained"], "D"),
}
SHORT = {"random": "rand.", "others": "rest"}
AXES = {"linf": "bound of every pixel, in 255ths", "l2": "bound of the length, pixels from 0 to 1"}


def success(width: float, rows: Rows, shortest: np.ndarray, steps: Mapping[str, np.ndarray]) -> Figure:
    """Draw success over the bound, a panel for each norm, and over steps.

    `shortest` are the lengths of the shortest changes by `cw_l2`, (image,), infinite where none succeeded; empty
    without that attack. `steps` is by attack the share of images by each step.
    """
    norms = [norm for norm in AXES if any(row["norm"] == norm and row["epsilon"] for row in rows)]
    if len(shortest) and "l2" not in norms:
        norms.append("l2")
    wide = width > 5
    count = len(norms) + bool(steps)
    figure = Figure(figsize=(width, 2.6 if wide else 2.4 * count), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0] if wide else figure.subplots(count, 1, squeeze=False)[:, 0]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for panel, norm in zip(panels, norms, strict=False):
        for method in methods:
            own = [row for row in rows if row["method"] == method and row["norm"] == norm and row["epsilon"]]
            if not own:
                continue
            at = methods.index(method)
            x, y, low, high = (
                np.array([value(row[key]) for row in own])
                for key in ("epsilon", "success", "success_low", "success_high")
            )
            error = np.nan_to_num(np.stack([y - low, high - y])).clip(0)
            panel.errorbar(
                x, y, error, marker=MARKERS[at], color=COLOURS[at], linewidth=1.2, capsize=2, label=TITLES[method]
            )
        if norm == "l2" and len(shortest):
            at, known = methods.index("cw_l2"), np.sort(shortest[np.isfinite(shortest)])
            share = np.arange(len(known) + 1) / len(shortest)
            known = np.concatenate([[0], known])
            furthest = max(
                [known[-1], *(value(row["epsilon"]) for row in rows if row["norm"] == "l2" and row["epsilon"])]
            )
            known, share = np.append(known, 1.05 * furthest), np.append(share, share[-1])
            panel.step(known, share, where="post", color=COLOURS[at], linewidth=1.2, label=TITLES["cw_l2"])
        panel.set_xlabel(AXES[norm])
        _shares(panel)
        panel.set_xlim(left=0)
        panel.legend(loc="lower right", fontsize=6.5)
    if steps:
        panel, longest = panels[-1], max(map(len, steps.values()))
        for name, share in steps.items():
            method, _, bound = name.partition("-")
            at, style = methods.index(method), "--" if bound.startswith("l2") else "-"
            whole = np.append(share, np.full(longest - len(share), share[-1]))
            panel.step(range(longest), whole, style, where="post", color=COLOURS[at], linewidth=1.2, label=name)
        panel.set_xlabel("step (before rounding)")
        _shares(panel)
        panel.legend(loc="lower right", fontsize=6.5)
    return figure


def _shares(panel: Axes) -> None:
    panel.set_ylim(-0.03, 1.03)
    panel.set_ylabel("success")
    panel.grid(axis="y")
    bare(panel)


def ranks(width: float, rows: Rows, attacks: Sequence[str], measure: str) -> Figure:
    """Draw the change of the peak by the unit's rank of importance, a panel for each attack, with 99 % intervals."""
    wide = width > 5
    columns = min(2, len(attacks)) if wide else 1
    lines = -(-len(attacks) // columns)
    figure = Figure(figsize=(width, 2.5 * lines + 0.3), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    places = [("source", str(k)) for k in range(1, 5)] + [("target", str(k)) for k in range(1, 5)]
    places += [("random", ""), ("others", "")]
    for panel, attack in zip(panels, attacks, strict=False):
        for offset, (shown, (label, colour, marker)) in enumerate(SHOWN.items()):
            own = {(r["important_to"], r["rank"]): r for r in rows if r["attack"] == attack and r["shown"] == shown}
            if not own:
                continue
            at = np.array([x for x, key in enumerate(places) if key in own], float)
            told = [own[key] for key in places if key in own]
            y, low, high = (np.array([value(row[f"{measure}{end}"]) for row in told]) for end in ("", "_low", "_high"))
            error = np.nan_to_num(np.stack([y - low, high - y])).clip(0)
            panel.errorbar(
                at + 0.2 * (offset - 1), y, error, fmt=marker, color=colour, markersize=3, linewidth=1, label=label
            )
        panel.axhline(0, color=MUTED, linewidth=0.6)
        for edge in (3.5, 7.5):
            panel.axvline(edge, color=MUTED, linewidth=0.5, linestyle=(0, (3, 2)))
        panel.set_xticks(range(len(places)), [rank or SHORT[group] for group, rank in places], fontsize=6.5)
        panel.set_xlabel("rank for the source · rank for the target · random units · all others", fontsize=6)
        panel.set_title(attack)
        panel.grid(axis="y")
        bare(panel)
    panels[0].set_ylabel(f"{measure} change of the peak", fontsize=7)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3 if wide else 1, fontsize=7)
    for panel in panels[len(attacks) :]:
        panel.set_axis_off()
    return figure
