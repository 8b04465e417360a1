"""The page of each explained network: its images beside the maps of all methods, and what the maps are worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pipeline.report.experiment import Experiment
from pipeline.report.page import Figure, Page
from pipeline.report.pictures import Pictures, open_pictures, rounded
from pipeline.report.style import draw
from pipeline.report.words import plural
from pipeline.stages.attribute import figures, sentences
from pipeline.stages.attribute.found import SHOWN, Attributions, Explanation, explanations, page_of
from pipeline.stages.attribute.pictures import COMPARED, Drawn, draw_all, first_images, tasks_of, tile_size
from pipeline.stages.attribute.sentences import Means

FIGURED = 6
"""Images that the figure shows at most."""
ROWS_WITHOUT_SCRIPT = 50
"""Rows of the table that replaces the grid where scripts are off."""
GRID_COLUMNS = ("image", "label", "explained_class", "score", "method", "full_colour", "residual", "tolerance")
RESIDUAL_COLUMNS = ("method", "image", "explained_class", "residual", "tolerance", "beyond_tolerance")
ALIKE_COLUMNS = ("method_a", "method_b", "compared", "rank_correlation", "interval_low", "interval_high", "images")
UNTRAINED_COLUMNS = ("method", "compared", "rank_correlation", "interval_low", "interval_high", "images")


@dataclass(frozen=True)
class Section:
    """One experiment as the page shows it.

    Attributes
    ----------
    folder : of its pictures, with the beginning of their names.
    alike, trained : how alike its maps are, with each other and with those of the untrained network.
    """

    explanation: Explanation
    pictures: Pictures
    folder: str
    drawn: Drawn
    alike: Means
    trained: Means

    @property
    def found(self) -> Attributions:
        return self.explanation.trained

    @property
    def shown(self) -> list[int]:
        return self.found.shown

    @property
    def findings(self) -> list[str]:
        """What the numbers show, whatever they are."""
        found = self.found
        return [
            *sentences.of_laws(found),
            *sentences.of_biases(found),
            *sentences.of_fits(found),
            *sentences.of_likeness(found, self.alike),
            *sentences.of_training(found, self.trained),
        ]

    @property
    def notes(self) -> list[str]:
        """What a reader has to know of the numbers."""
        found = self.found
        said = [baseline] if (baseline := sentences.of_baseline(found)) else []
        if len(found.slots) > SHOWN:
            said.append(f"The grid shows {plural(SHOWN, 'image')} of {plural(len(found.slots), 'image')}, by a hash.")
        if found.picked:
            said.append(
                f"The first {plural(len(found.picked), 'image')} are picked by SP-LIME: together they show what LIME "
                f"finds important."
            )
        if len(found.methods) > 1 or self.explanation.untrained is not None:
            count = min(COMPARED, len(found.slots))
            said.append(f"Maps are compared on {plural(count, 'image')}: {sentences.how_compared(found)}")
        if self.explanation.untrained is not None and found.kind in ("predicted", "top"):
            said.append("Each network, trained and untrained, explains the class that it predicts itself.")
        return said

    def label(self, slot: int) -> str:
        return self.pictures.classes[slot]


def pages(experiment: Experiment) -> list[Page]:
    found = explanations(experiment)
    if not found:
        return []
    prefixes: dict[tuple[str, str, int], str] = {}
    tasks, opened, figured = [], {}, {}
    for (dataset, network), of_network in found.items():
        if dataset not in opened:
            opened[dataset] = open_pictures(experiment.results / dataset / "images.zarr")
        folder = page_of(experiment, dataset, network).removeprefix("attribution-").removesuffix(".html")
        for at, one in enumerate(of_network):
            prefixes[dataset, network, at] = prefix = f"attributions/{folder}/{at}-"
            figured[prefix] = first_images(one.trained, opened[dataset].labels, FIGURED)
            tasks += list(tasks_of(experiment, one, prefix, figured[prefix]))
    drawn = draw_all(experiment, tasks)
    made = []
    for (dataset, network), of_network in found.items():
        sections = []
        for at, one in enumerate(of_network):
            prefix, count = prefixes[dataset, network, at], len(one.trained.methods)
            own = drawn.get(prefix, Drawn())
            alike, trained = Means.of(own.alike, (count, count)), Means.of(own.trained, (count,))
            sections.append(Section(one, opened[dataset], prefix, own, alike, trained))
        made.append(page(experiment, sections, [figured[one.folder] for one in sections]))
    return made


def page(experiment: Experiment, sections: Sequence[Section], figured: Sequence[list[int]]) -> Page:
    """Return the page of one network on a data set."""
    first = sections[0].found
    dataset, network = first.dataset, first.network
    several = len({dataset for dataset, _ in explanations(experiment)}) > 1
    label = f"{network} on {dataset}" if several else network
    dissected = any((one.dataset, one.network) == (dataset, network) for one in experiment.dissected)
    shown = [list(draw_figures(experiment, one, own)) for one, own in zip(sections, figured, strict=True)]
    findings = [
        f"{one.found.experiment}: {sentence}" if len(sections) > 1 else sentence
        for one in sections
        for sentence in one.findings
    ]
    return Page(
        file=page_of(experiment, dataset, network),
        title=f"Attribution, {label}",
        template="attribution.html.j2",
        values={
            "sections": sections,
            "drawn": shown,
            "network": network,
            "explained": browser_data(experiment, sections, dissected),
            "units": experiment.page_of(dataset, network) if dissected else "",
            "rows": ROWS_WITHOUT_SCRIPT,
            "sentences": sentences,
        },
        summary=" ".join(dict.fromkeys(sentences.what_was_explained(one.found) for one in sections)),
        findings=findings,
        figures=[figure for figures in shown for figure in figures],
        files=[file for one in sections for file in one.drawn.files],
        methods="methods-attribution.html.j2",
        scripts=("elements.js", "attribution.js"),
    )


def browser_data(experiment: Experiment, sections: Sequence[Section], dissected: bool) -> dict[str, Any]:
    """Return the data that the page's script reads: of each experiment its methods, and a row for each image.

    A row is: id, label (-1: none), whether the network is right (-1: unknown), classes that are explained by rank,
    their scores, those of the baseline, residuals (rank, method of `laws`), whether the untrained network is explained
    too.
    """
    first = sections[0].found
    width, height = tile_size(first.size)
    return {
        "network": first.network,
        "units": experiment.page_of(first.dataset, first.network) if dissected else "",
        "width": width,
        "height": height,
        "experiments": [of_experiment(one) for one in sections],
    }


def of_experiment(section: Section) -> dict[str, Any]:
    found, control = section.found, section.explanation.untrained
    labels = section.pictures.labels
    right = found.right(labels)
    laws = [at for at, method in enumerate(found.methods) if method.known.size]
    explained = set() if control is None else set(control.slots)
    others = set() if control is None else {method.name for method in control.methods}
    targets = sorted({int(each) for each in found.target[section.shown].ravel()} - {-1})
    rows = []
    for slot in section.shown:
        rows.append(
            [
                str(found.ids[slot]),
                int(labels[slot]) if 0 <= labels[slot] < len(section.pictures.names) else -1,
                int(right[slot]),
                found.target[slot].tolist(),
                [rounded(float(each)) for each in found.score[slot]],
                [rounded(float(each)) for each in found.baseline_score[slot]],
                [
                    [rounded(float(found.methods[at].residual[slot, rank])) for at in laws]
                    for rank in range(found.ranks)
                ],
                int(slot in explained),
            ]
        )
    return {
        "name": found.experiment,
        "folder": section.folder,
        "kind": found.kind,
        "score": str(found.settings["score"]).replace("_", " "),
        "explains": sentences.what_was_explained(found),
        "labels": section.pictures.names,
        "targets": {str(each): found.class_name(each) for each in targets},
        "methods": [
            {
                "name": method.name,
                "title": title,
                "signed": method.signed,
                "tolerance": method.tolerance,
                "layer": method.facts.layer or "",
                "note": method.facts.note,
                "untrained": method.name in others,
            }
            for title, method in zip(found.titles(), found.methods, strict=True)
        ],
        "laws": laws,
        "images": rows,
    }


def draw_figures(experiment: Experiment, section: Section, figured: Sequence[int]) -> Iterator[Figure]:
    """Draw the figures of one experiment; without laws or several methods there are fewer."""
    found = section.found
    titles, signed = found.titles(), [method.signed for method in found.methods]
    name = "-".join([*section.folder.split("/")[1:2], found.experiment])
    labels = {"network": found.network, "data set": found.dataset, "experiment": found.experiment}
    chosen = [slot for slot in figured if slot in section.drawn.shown]
    yield draw(
        experiment,
        f"attributions-{name}",
        partial(
            figures.grid,
            shown=[section.drawn.shown[slot] for slot in chosen],
            names=[_caption(section, slot) for slot in chosen],
            titles=titles,
            signed=signed,
        ),
        kind="attributions",
        alt=f"Images, and below each what {plural(len(titles), 'method')} say of its pixels for {found.network}",
        caption="Maps of chosen images, the first of each label: orange speaks for the class, blue against it, green "
        "is a magnitude without a sign. Each map is scaled by the 99.5th percentile of its own magnitudes.",
        header=GRID_COLUMNS,
        rows=list(grid_rows(section, chosen)),
        labels=labels,
    )
    measured = {
        title: (method.known, method.tolerance)
        for title, method in zip(titles, found.methods, strict=True)
        if method.known.size
    }
    if measured:
        yield draw(
            experiment,
            f"attribution-residuals-{name}",
            partial(figures.residuals, found=measured),
            kind="attribution-residuals",
            alt=f"Points: by how much each explanation of {found.network} misses the law of its method",
            caption="By how much each explanation misses the law of its method, relative to the score, and the "
            "tolerance as a line; crosses are beyond it. Residuals of 0 stand at the left end.",
            header=RESIDUAL_COLUMNS,
            rows=list(residual_rows(found)),
            labels=labels,
        )
    if len(titles) > 1:
        yield draw(
            experiment,
            f"attribution-alike-{name}",
            partial(figures.alike, mean=section.alike.mean, titles=titles),
            kind="attribution-alike",
            alt=f"Matrix: mean rank correlation of the maps of each two methods on {found.network}",
            caption=f"Mean over images of the rank correlation of two methods’ maps. {sentences.how_compared(found)}",
            header=ALIKE_COLUMNS,
            rows=list(alike_rows(found, section.alike)),
            labels=labels,
        )
    if not np.isnan(section.trained.mean).all():
        yield draw(
            experiment,
            f"attribution-untrained-{name}",
            partial(figures.untrained, mean=section.trained.mean, error=section.trained.half, titles=titles),
            kind="attribution-untrained",
            alt=f"Points: rank correlation of each method’s maps of {found.network}, trained and untrained",
            caption="Mean over images of the rank correlation of a method’s maps of the trained and the untrained "
            "network, with 95\u00a0% intervals. A method at 1 shows the image, not what the network learnt.",
            header=UNTRAINED_COLUMNS,
            rows=list(untrained_rows(found, section.trained)),
            labels=labels,
        )


def _caption(section: Section, slot: int) -> str:
    found = section.found
    label, target = section.label(slot), found.class_name(int(found.target[slot, 0]))
    return f"{label or 'no label'}\n→ {target}"


def grid_rows(section: Section, slots: Sequence[int]) -> Iterator[Sequence[object]]:
    found = section.found
    for slot in slots:
        known = (str(found.ids[slot]), section.label(slot), found.class_name(int(found.target[slot, 0])))
        for at, (title, method) in enumerate(zip(found.titles(), found.methods, strict=True)):
            scale, residual = float(section.drawn.scales[slot][at]), float(method.residual[slot, 0])
            tolerance = method.tolerance if method.facts.law else None
            yield (*known, float(found.score[slot, 0]), title, scale, residual, tolerance)


def residual_rows(found: Attributions) -> Iterator[Sequence[object]]:
    for title, method in zip(found.titles(), found.methods, strict=True):
        if not method.known.size:
            continue
        for slot in found.slots:
            for rank in range(found.ranks):
                residual, target = float(method.residual[slot, rank]), int(method.target[slot, rank])
                beyond = int(method.beyond[slot, rank])
                yield title, str(found.ids[slot]), found.class_name(target), residual, method.tolerance, beyond


def alike_rows(found: Attributions, means: Means) -> Iterator[Sequence[object]]:
    titles, signed = found.titles(), [method.signed for method in found.methods]
    for a in range(len(titles)):
        for b in range(a):
            compared = "signed" if signed[a] and signed[b] else "magnitude"
            yield (titles[b], titles[a], compared, *_mean_cells(means, a, b))


def untrained_rows(found: Attributions, means: Means) -> Iterator[Sequence[object]]:
    for at, (title, method) in enumerate(zip(found.titles(), found.methods, strict=True)):
        yield (title, "signed" if method.signed else "magnitude", *_mean_cells(means, at))


def _mean_cells(means: Means, *at: int) -> Sequence[object]:
    mean, half = float(means.mean[at]), float(means.half[at])
    return mean, mean - half, mean + half, int(means.count[at])
