"""The page of the linear probes: how well the classes can be read off each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.report import words
from pipeline.report.experiment import Experiment
from pipeline.report.page import Figure, Page
from pipeline.report.style import draw
from pipeline.stages.probes.figures import COLUMNS, TITLES, by_features, by_shots, rows
from pipeline.stages.probes.found import FULL, Probes, read_probes

BESIDE = 4
"""Networks of one figure."""


@dataclass(frozen=True)
class Section:
    """One data set as the page shows it."""

    dataset: str
    found: list[Probes]
    findings: list[str]
    notes: list[str]
    figures: list[Figure]


def pages(experiment: Experiment) -> list[Page]:
    by_dataset: dict[str, list[Probes]] = {}
    for one in experiment.of_stage("probes"):
        assert one.dataset is not None and one.network is not None
        by_dataset.setdefault(one.dataset, []).append(read_probes(experiment.results, one.dataset, one.network))
    if not by_dataset:
        return []
    sections = [section(experiment, dataset, found) for dataset, found in by_dataset.items()]
    return [
        Page(
            file="probes.html",
            title="Linear probes",
            template="probes.html.j2",
            values={"sections": sections, "titles": TITLES, "full": FULL},
            summary="How well a linear classifier reads the classes off each layer.",
            findings=[sentence for one in sections for sentence in one.findings],
            figures=[figure for one in sections for figure in one.figures],
            methods="methods-probes.html.j2",
        )
    ]


def section(experiment: Experiment, dataset: str, found: list[Probes]) -> Section:
    said = [sentence for one in found for sentence in findings(one)]
    notes = [f"{one.network}: {note}." for one in found for note in one.facts.notes]
    return Section(dataset, found, said, list(dict.fromkeys(notes)), list(figures(experiment, dataset, found)))


def findings(one: Probes) -> Iterator[str]:
    """Say what the numbers are, whatever they are."""
    last = len(one.layers) - 1
    features = one.best_features(last)
    accuracy, low, high = one.at(last, features, FULL)
    own = one.facts.network_accuracy
    itself = f"; {one.network} itself tells {words.percent(own, 1)}" if own is not None else ""
    yield (
        f"A linear probe of the last layer of {one.network} that was looked at, {one.layers[last]} "
        f"({TITLES[features]}), tells the class of {with_interval(accuracy, low, high)} of the images{itself}."
    )
    if last:
        first = one.best_features(0)
        text = f"That of the first, {one.layers[0]} ({TITLES[first]}), tells {with_interval(*one.at(0, first, FULL))}"
        best = int(np.nanmax(one.accuracy[:, :, one.shots.index(FULL)], axis=1).argmax())
        if best not in (0, last):
            top = one.best_features(best)
            text += f", and the best, of {one.layers[best]} ({TITLES[top]}), {with_interval(*one.at(best, top, FULL))}"
        yield f"{text}."
    if len(one.shots) > 1:
        few = one.shots[-2]
        values = one.at(last, features, few)
        few_images = words.plural(int(few), "image")
        yield (
            f"Fitted on {few_images} of each class in place of {fitted(one)}, the probe of the last layer tells "
            f"{with_interval(*values)}."
        )


def fitted(one: Probes) -> str:
    return words.plural(one.facts.counted["fit"], "image")


def with_interval(accuracy: float, low: float, high: float) -> str:
    text = words.percent(accuracy, 1)
    return text if np.isnan(low) else f"{text} ({words.percent(low, 1)} to {words.percent(high, 1)})"


def figures(experiment: Experiment, dataset: str, found: Sequence[Probes]) -> Iterator[Figure]:
    for at in range(0, len(found), BESIDE):
        shown = found[at : at + BESIDE]
        names = ", ".join(one.network for one in shown)
        number = f"-{at // BESIDE + 1}" if at else ""
        judged = words.plural(shown[0].facts.counted["test"], "image")
        yield draw(
            experiment,
            f"probes-{dataset}{number}",
            partial(by_features, found=shown),
            kind="probes",
            alt=f"Line charts: accuracy of linear probes over the layers of {names}",
            caption=f"Share of {judged} whose class a linear probe tells, over the layers in execution order, with "
            "95\u00a0% intervals. Single positions: the mean of their probes.",
            header=COLUMNS,
            rows=rows(shown),
            labels={"data set": dataset},
        )
        if any(len(one.shots) > 1 for one in shown):
            draws = words.plural(shown[0].fitting.draws, "draw")
            yield draw(
                experiment,
                f"probes-shots-{dataset}{number}",
                partial(by_shots, found=shown),
                kind="probes-shots",
                alt=f"Line charts: accuracy of few-shot probes over the layers of {names}",
                caption=f"The same for probes of few images of each class: mean of {draws}, with the 95\u00a0% "
                "interval over the draws.",
                header=COLUMNS,
                rows=rows(shown),
                labels={"data set": dataset},
            )
