"""The page of similarity: how alike layers are, within each network and between networks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.report import words
from pipeline.report.experiment import Experiment, Made
from pipeline.report.page import Figure, Page
from pipeline.report.style import draw
from pipeline.report.words import SURE, with_error
from pipeline.stages.similarity.figures import heatmaps, over_fractions
from pipeline.stages.similarity.found import (
    COLUMNS,
    FRACTION_COLUMNS,
    Similarity,
    fraction_rows,
    read_similarity,
    rows,
    same_layers,
)


@dataclass(frozen=True)
class Section:
    """One comparison as the page shows it."""

    found: Similarity
    dataset: str
    findings: list[str]
    figures: list[Figure]


def pages(experiment: Experiment) -> list[Page]:
    sections = [section(experiment, one) for one in experiment.of_stage("similarity")]
    if not sections:
        return []
    return [
        Page(
            file="similarity.html",
            title="Similarity",
            template="similarity.html.j2",
            values={"sections": sections},
            summary="How alike the layers of networks are, each with those of its own network and of others.",
            findings=[sentence for one in sections for sentence in one.findings],
            figures=[figure for one in sections for figure in one.figures],
            methods="methods-similarity.html.j2",
        )
    ]


def section(experiment: Experiment, made: Made) -> Section:
    assert made.experiment is not None and made.dataset is not None
    found = read_similarity(experiment.results, made.experiment, made.result)
    return Section(found, made.dataset, list(findings(found)), list(figures(experiment, found)))


def findings(found: Similarity) -> Iterator[str]:
    """Say what the numbers show, whatever they are."""
    compared = found.compared
    if found.fractions:
        yield from of_fractions(found)
    for name, (value, error) in compared.uniformity.items():
        if value is not None:
            yield f"Two different layers of {name} have a CKA of {with_error(value, error)} on average."
    for a, b, value, error in compared.difference:
        if value is None or (found.fractions and b != found.distinct[-1]):
            continue
        if error is None:
            said = f"That of {b} is {abs(value):.3f} {'above' if value > 0 else 'below'} that of {a}; one minibatch "
            said += "gives no standard error."
        elif abs(value) <= SURE * error:
            said = f"{a} and {b} are equally uniform within the error: they differ by {with_error(abs(value), error)}."
        else:
            more, less = (b, a) if value > 0 else (a, b)
            said = f"{more} is more uniform than {less}, by {with_error(abs(value), error)}."
        yield said
    for a, b in found.panels[len(found.distinct) :] if not found.fractions else ():
        block = found.block("cka", a, b)
        if not np.isnan(block).all():
            row, column = np.unravel_index(np.nanargmax(block), block.shape)
            first, second = found.rows_of(a)[int(row)], found.rows_of(b)[int(column)]
            error = float(found.values["standard_error"][first, second])
            yield (
                f"Most alike of {a} and {b} are {found.layers[first]} and {found.layers[second]}, with a CKA of "
                f"{with_error(float(block[row, column]), error)}."
            )
    influence = found.values["influence"]
    if not np.isnan(influence).all():
        minibatches = words.number(found.settings["minibatches"])
        most = f"{np.nanmax(influence):.3f}"
        yield f"Without any one of the {minibatches} minibatches, no CKA changes by more than {most}."
    if compared.undefined:
        yield f"Not defined, since they give the same for all images: {', '.join(compared.undefined)}."


def of_fractions(found: Similarity) -> Iterator[str]:
    """Say how alike the copies of a network are to it."""
    whole = found.distinct[-1]
    for copy in found.distinct[:-1]:
        value, error = same_layers(found, copy)
        if np.isnan(value).all():
            continue
        names = [found.layers[at] for at in found.rows_of(copy)]
        low, high = int(np.nanargmin(value)), int(np.nanargmax(value))
        yield (
            f"Trained on {words.percent(found.fractions[copy], 1)} of the images, {whole} is least like itself "
            f"trained on all of them at {names[low]}, with a CKA of {with_error(value[low], error[low])}, and most at "
            f"{names[high]}, {with_error(value[high], error[high])}."
        )


def figures(experiment: Experiment, found: Similarity) -> Iterator[Figure]:
    labels = {"comparison": found.name, "data set": found.compared.dataset}
    together = ", ".join(found.distinct)
    if found.fractions:
        yield draw(
            experiment,
            f"fractions-{found.name}",
            partial(over_fractions, found=found),
            kind="similarity-fractions",
            alt=f"Line chart: CKA of each layer of copies of {found.distinct[-1]} trained on parts of the images with "
            "the same layer of the network trained on all of them",
            caption="CKA of each layer with the same layer of the network trained on all images, in execution order, "
            "with a standard error on either side.",
            header=FRACTION_COLUMNS,
            rows=fraction_rows(found),
            labels=labels,
        )
    yield draw(
        experiment,
        f"similarity-{found.name}",
        partial(heatmaps, found=found, measure="cka", label="CKA"),
        kind="similarity",
        alt=f"Heat maps: CKA of each two layers of {together}, within each network and between networks",
        caption="Linear CKA (unbiased) of each two layers, in execution order. A cell without a colour is not defined.",
        header=COLUMNS,
        rows=rows(found),
        labels=labels,
    )
    if not np.isnan(found.values["neighbours"]).all():
        chance = found.settings["neighbours_chance"]
        yield draw(
            experiment,
            f"neighbours-{found.name}",
            partial(heatmaps, found=found, measure="neighbours", label="shared neighbours"),
            kind="similarity-neighbours",
            alt=f"Heat maps: share of nearest neighbours that each two layers of {together} agree on",
            caption=f"Share of an image’s {found.settings['neighbours']} nearest images of its minibatch that two "
            f"layers agree on; {chance:.2f} by chance. Outliers hardly change it.",
            header=COLUMNS,
            rows=rows(found),
            labels=labels,
        )
