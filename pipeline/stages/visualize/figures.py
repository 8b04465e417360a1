"""The figure of how far pictures excite units beyond the best image of the data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from pipeline.report.style import COLOURS, INK, bare, shorten

MARKERS = "osD^"


def reached(width: float, found: Mapping[tuple[str, str], np.ndarray]) -> Figure:
    """Points: by layer and way, the score of each picture over the highest of the data; a line at 1."""
    subjects = list(dict.fromkeys(subject for subject, _ in found))
    ways = list(dict.fromkeys(way for _, way in found))
    figure = Figure(figsize=(width, 0.9 + 0.42 * len(subjects)), layout="constrained")
    panel = figure.subplots()
    for (subject, way), ratio in found.items():
        at = subjects.index(subject) + (ways.index(way) - (len(ways) - 1) / 2) * 0.26
        known = np.sort(ratio[~np.isnan(ratio)])
        spread = np.linspace(-0.08, 0.08, len(known)) if len(known) > 1 else np.zeros(len(known))
        place = ways.index(way)
        marker = MARKERS[place % len(MARKERS)]
        panel.plot(known, at + spread, marker, color=COLOURS[place % len(COLOURS)], markersize=3, alpha=0.8)
    for place, way in enumerate(ways):
        panel.plot([], [], MARKERS[place % len(MARKERS)], color=COLOURS[place % len(COLOURS)], label=way)
    panel.axvline(1, color=INK, linewidth=0.8)
    panel.set_yticks(range(len(subjects)), [shorten(each, int(6 * width)) for each in subjects])
    panel.set_ylim(len(subjects) - 0.4, -0.6)
    panel.set_xlabel("score of the picture / highest of the data")
    panel.grid(axis="x")
    bare(panel, "left")
    if len(ways) > 1:
        panel.legend(loc="best", ncols=len(ways))
    return figure
