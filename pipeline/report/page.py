"""The page itself: one section a network, made of figures, cards, tables and sentences, put into the template."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.errors import MicrotomeError
from pipeline.report import Comparison, sentences
from pipeline.report.cards import Card, draw_cards
from pipeline.report.counts import LayerCount, categories, count_detectors
from pipeline.report.figures import CATEGORY_COLOURS, draw_detectors, draw_iou, draw_training
from pipeline.report.results import Dissection, Unit, read_dissection, read_units
from pipeline.report.tables import by_iou, write_detectors, write_units

TEMPLATES = Path(__file__).parent / "templates"
ROWS_SHOWN = 50
"""Rows of the table of units on the page; the CSV beside it has them all."""


@dataclass(frozen=True)
class Section:
    """All that the template shows of one network, and the files written for it, relative to the report's folder."""

    anchor: str
    trained: Dissection
    untrained: Dissection | None
    counts: dict[str, list[LayerCount]]
    units: list[Unit]
    cards: list[Card]
    top_images: int
    permuted_images: int | None
    category_names: dict[str, str]
    has_training: bool
    files: list[str]

    @property
    def last(self) -> dict[str, LayerCount]:
        """The count of the last layer, by run."""
        return {run: counts[-1] for run, counts in self.counts.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """Attributes that all layers' IoU stores share."""
        first, *others = [layer.settings for layer in self.trained.layers]
        return {
            key: first[key]
            for key in sorted(first)
            if all(other.get(key) == first[key] for other in others) and key != "coordinates"
        }

    @property
    def detectors(self) -> int:
        """Detectors of the trained network in all layers."""
        return sum(count.detectors for count in self.counts["trained"])

    @property
    def model(self) -> list[tuple[str, str]]:
        """What `model.json` says, but for the curve, which is drawn."""
        return flatten(
            {key: value for key, value in self.trained.model.items() if key != "curve" and value is not None}
        )

    def colour(self, category: str) -> int:
        """Number of the category's colour class, the same as in the figures."""
        return list(self.category_names).index(category) % len(CATEGORY_COLOURS)


def section(results: Path, figures: Path, tables: Path, comparison: Comparison, top_images: int, cards: int) -> Section:
    """Read one network and its controls, and write its figures and tables."""
    trained = read_dissection(results, comparison.dataset, comparison.network)
    layers = trained.layer_names
    runs = {"trained": trained.units}
    untrained = None
    if comparison.control is not None:
        untrained = read_dissection(results, comparison.dataset, comparison.control)
        _same_layers(trained, untrained)
        runs["untrained"] = untrained.units
    permuted = results / comparison.dataset / comparison.network / "units-permuted.csv"
    if permuted.exists():
        runs["permuted"] = read_units(permuted, layers)

    counts = {run: count_detectors(units, layers) for run, units in runs.items()}
    short = short_names(categories(count for run in counts.values() for count in run))
    name = f"{comparison.dataset}-{comparison.network}"
    iou = {run: {layer: [u.iou for u in units if u.layer == layer] for layer in layers} for run, units in runs.items()}
    files = [
        *draw_detectors(figures, f"detectors-{name}", counts, short),
        *draw_iou(figures, f"iou-{name}", iou, trained.min_iou),
    ]
    curve = trained.model.get("curve") or []
    if curve:
        files += draw_training(figures, f"training-{name}", curve)
    drawn = draw_cards(trained, results / comparison.dataset / "images.zarr", figures, cards, top_images)
    write_units(tables / f"units-{name}.csv", trained.units)
    write_detectors(tables / f"detectors-{name}.csv", counts)
    return Section(
        anchor=name,
        trained=trained,
        untrained=untrained,
        counts=counts,
        units=by_iou(trained.units),
        cards=drawn,
        top_images=top_images,
        permuted_images=comparison.permuted_images,
        category_names=short,
        has_training=bool(curve),
        files=[
            *(f"figures/{file}" for file in files),
            *(f"figures/{card.file}" for card in drawn),
            f"tables/units-{name}.csv",
            f"tables/detectors-{name}.csv",
        ],
    )


def render(title: str, sections: Sequence[Section], provenance: Mapping[str, Any]) -> str:
    """Return the page's HTML. All that comes from data is escaped; the style sheet is allowed by its digest alone."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": sentences.number,
        "decimal": sentences.decimal,
        "percent": sentences.percent,
        "plural": sentences.plural,
    }
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template("index.html.j2").render(
        title=title,
        lead=sentences.lead(sections),
        sections=sections,
        sentences=sentences,
        provenance=flatten(provenance),
        style=Markup(style),  # ours, not data
        style_digest=digest,
        rows_shown=ROWS_SHOWN,
    )


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Categories without their source (`truth/object` -> `object`) where that leaves no two alike."""
    tails = [name.partition("/")[2] or name for name in names]
    return dict(zip(names, tails if len(set(tails)) == len(tails) else names, strict=True))


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (dotted name, text) in the order given; lists as JSON."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            rows.append((name, json.dumps(value, ensure_ascii=False, default=str)))
        else:
            rows.append((name, sentences.number(value)))
    return rows


def _same_layers(trained: Dissection, untrained: Dissection) -> None:
    if trained.layer_names != untrained.layer_names:
        raise MicrotomeError(
            f"{untrained.network} was cut at {', '.join(untrained.layer_names)}, but {trained.network} at "
            f"{', '.join(trained.layer_names)}; a control needs the same layers: dissect both with one configuration"
        )
