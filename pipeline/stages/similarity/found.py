"""What the stage `similarity` found, as the report reads it, and the heat maps of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.errors import MicrotomeError
from pipeline.report.style import COLOURS, GRID, INK, bare, shorten
from pipeline.stages.dissect.found import open_store

MEASURES = (
    "cka", "standard_error", "influence", "cka_biased", "neighbours", "neighbours_standard_error", "procrustes",
    "procrustes_shuffled",
)  # fmt: skip
COLUMNS = ("network_a", "layer_a", "network_b", "layer_b", *MEASURES)
LINES = ("-", "--", ":", "-.")
LABELS = 24  # layers that are named beside a panel; of more, every second or third is


@dataclass(frozen=True)
class Similarity:
    """One comparison.

    `layers` names the rows of each measure (layer, layer), of all networks one after the other, and `networks` the
    network of each; `settings` are the attributes of the store.
    """

    name: str
    layers: list[str]
    networks: list[str]
    values: Mapping[str, np.ndarray]
    settings: Mapping[str, Any]

    @property
    def distinct(self) -> list[str]:
        return list(dict.fromkeys(self.networks))

    @property
    def fractions(self) -> dict[str, float]:
        """The part of the images that each network was trained on, the smallest first; empty where they are no copies
        of one. The last has all of them."""
        copies = self.settings.get("fractions", {})
        return {name: copies.get(name, 1.0) for name in self.distinct} if copies else {}

    @property
    def panels(self) -> list[tuple[str, str]]:
        """Within each network, then between each two; of copies of a network, each with that."""
        names = self.distinct
        if self.fractions:
            return [(names[-1], names[-1])] + [(name, names[-1]) for name in names[:-1]]
        return [(name, name) for name in names] + [(a, b) for at, a in enumerate(names) for b in names[at + 1 :]]

    def rows_of(self, network: str) -> list[int]:
        return [at for at, name in enumerate(self.networks) if name == network]

    def block(self, measure: str, a: str, b: str) -> np.ndarray:
        """A measure of the layers of one network against those of another."""
        return self.values[measure][np.ix_(self.rows_of(a), self.rows_of(b))]


def read_similarity(results: Path, name: str) -> Similarity:
    path = results / "similarity" / name / "cka.zarr"
    try:
        store = open_store(path)
        networks = [str(each) for each in np.asarray(store["network_a"])]
        titles = [str(each) for each in np.asarray(store["layer_a"])]
        values = {measure: np.asarray(store[measure]) for measure in MEASURES}
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise MicrotomeError(
            f"{path} is not what the stage `similarity` writes ({error}): run `make verify`"
        ) from error
    layers = [title.removeprefix(f"{network}/") for title, network in zip(titles, networks, strict=True)]
    return Similarity(name, layers, networks, values, dict(store.attrs))


def rows(found: Similarity) -> Iterator[Sequence[object]]:
    """Every pair of layers once, with all measures."""
    for a in range(len(found.layers)):
        for b in range(a, len(found.layers)):
            named = (found.networks[a], found.layers[a], found.networks[b], found.layers[b])
            yield (*named, *(float(found.values[measure][a, b]) for measure in MEASURES))


def same_layers(found: Similarity, copy: str) -> tuple[np.ndarray, np.ndarray]:
    """CKA of each layer of a copy with the same layer of the network itself, and its standard error."""
    whole = found.distinct[-1]
    return found.block("cka", copy, whole).diagonal(), found.block("standard_error", copy, whole).diagonal()


FRACTION_COLUMNS = ("fraction", "layer", "cka", "standard_error")


def fraction_rows(found: Similarity) -> Iterator[Sequence[object]]:
    """Each layer of each copy, with the same layer of the network itself."""
    for copy in found.distinct[:-1]:
        names = [found.layers[at] for at in found.rows_of(copy)]
        for name, value, error in zip(names, *same_layers(found, copy), strict=True):
            yield found.fractions[copy], name, float(value), float(error)


def over_fractions(width: float, found: Similarity) -> Figure:
    """CKA of each layer with the same layer of the network that saw all images: a line for each part of them."""
    figure = Figure(figsize=(width, 2.9), layout="constrained")
    panel = figure.subplots()
    copies = found.distinct[:-1]
    for number, copy in enumerate(copies):
        value, error = same_layers(found, copy)
        x, colour = np.arange(len(value)), COLOURS[number % len(COLOURS)]
        panel.fill_between(x, value - error, value + error, color=colour, alpha=0.2, linewidth=0)
        label = f"{100 * found.fractions[copy]:.3g} % of the images"
        panel.plot(x, value, color=colour, linestyle=LINES[number % len(LINES)], marker="o", label=label)
    names = [found.layers[at] for at in found.rows_of(copies[0])]
    step = max(1, math.ceil(len(names) / (LABELS if width > 5 else LABELS // 2)))
    at = np.arange(0, len(names), step)
    panel.set_xticks(at, [shorten(names[each], 16) for each in at], rotation=90)
    panel.tick_params(axis="x", labelsize=6.5, labelcolor=INK)
    panel.set_ylim(top=1.02)
    panel.set_ylabel("CKA with all images")
    panel.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=max(1, int(width / 1.7)), handlelength=2.6)
    return figure


def heatmaps(width: float, found: Similarity, measure: str, label: str) -> Figure:
    """A panel for each network with itself and for each two, layers from the input (top left) on."""
    panels = found.panels
    columns = min(len(panels), 3) if width > 5 else 1
    lines = math.ceil(len(panels) / columns)
    side = min(width / columns, 3.4)
    figure = Figure(figsize=(width, lines * side + 0.3), layout="constrained")
    lowest = min(0.0, float(np.nanmin(found.values[measure], initial=0)))
    mesh = None
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel, (a, b) in zip(axes, panels, strict=False):
        block = found.block(measure, a, b)
        # A cell that is not defined shows the ground.
        panel.set_facecolor(GRID)
        mesh = panel.pcolormesh(np.ma.masked_invalid(block), cmap="magma", vmin=lowest, vmax=1, linewidth=0)
        panel.set_title(shorten(a if a == b else f"{a} (down) and {b}", int(15 * width / columns)))
        panel.set_ylim(len(block), 0)
        short = int(5.5 * width / columns)
        for axis, of in ((panel.yaxis, a), (panel.xaxis, b)):
            names = [found.layers[at] for at in found.rows_of(of)]
            step = max(1, math.ceil(len(names) / LABELS))
            at = np.arange(0, len(names), step)
            axis.set_ticks(at + 0.5, [shorten(names[each], short) for each in at])
        panel.tick_params(axis="x", labelrotation=90)
        panel.tick_params(axis="both", labelsize=5.5 if max(block.shape) > 12 else 6.5, labelcolor=INK)
        bare(panel, "left", "bottom")
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    assert mesh is not None
    bar = figure.colorbar(mesh, ax=list(axes), shrink=0.6, aspect=24, pad=0.01, label=label)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure
