"""The page of each dissected network: its detectors beside those of the controls, and a browser of its units."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.report import words
from pipeline.report.experiment import Experiment
from pipeline.report.page import Figure, Page, Picture
from pipeline.report.style import draw
from pipeline.stages.dissect import figures, sentences
from pipeline.stages.dissect.browser import browser_data
from pipeline.stages.dissect.cards import Card, best_units, draw_cards, relevance_file
from pipeline.stages.dissect.found import Network, networks
from pipeline.stages.dissect.tables import DETECTOR_COLUMNS, by_iou, detector_rows, write_units

ROWS_WITHOUT_SCRIPT = 50
"""Rows of the table that replaces the unit browser where scripts are off."""
PICTURES = 6
"""Units of a network that the overview shows."""


def pages(experiment: Experiment) -> list[Page]:
    found = networks(experiment)
    # The workers draw pictures while this process draws figures.
    with ThreadPoolExecutor(1) as background:
        cards = [background.submit(draw_cards, experiment, network.trained) for network in found]
        drawn = [list(draw_all(experiment, network)) for network in found]
        return [
            page(experiment, network, shown, later.result())
            for network, shown, later in zip(found, drawn, cards, strict=True)
        ]


def page(
    experiment: Experiment, network: Network, drawn: Sequence[Figure], cards: Mapping[tuple[str, int], Card]
) -> Page:
    dataset, of = network.trained.dataset, network.trained.network
    table = f"tables/units-{experiment.name(dataset, of)}.csv"
    write_units(experiment.out / table, network.trained.units)
    return Page(
        file=experiment.page_of(dataset, of),
        title=experiment.label(dataset, of),
        template="network.html.j2",
        values={
            "network": network,
            "drawn": {figure.kind: figure for figure in drawn},
            "table": table,
            "units": browser_data(experiment, network, cards),
            "best": by_iou(network.trained.units)[:ROWS_WITHOUT_SCRIPT],
            "sentences": sentences,
            "told": [*sentences.coarse_units(network), *sentences.notices(experiment, network)],
        },
        summary=sentences.what_was_compared(network),
        findings=[*sentences.findings(network), *sentences.notices(experiment, network)],
        figures=drawn,
        pictures=list(best_pictures(experiment, network, cards)),
        files=[
            table,
            *(card.file for card in cards.values() if card.images),
            *(relevance_file(card.file) for card in cards.values() if card.relevant),
        ],
        methods="methods-dissect.html.j2",
        methods_values={"networks": networks(experiment)},
        scripts=("elements.js", "browser.js"),
    )


def best_pictures(experiment: Experiment, network: Network, cards: Mapping[tuple[str, int], Card]) -> Iterator[Picture]:
    """Yield the best unit of each of a few concepts."""
    of = network.trained
    for unit in best_units(of.units, PICTURES):
        card = cards.get((unit.layer, unit.unit))
        if unit.detector and card is not None and card.images:
            yield Picture(
                file=card.file,
                images=len(card.images),
                alt=f"Images on which unit {unit.unit} of {unit.layer} responds most",
                title=unit.concept,
                text=f"{unit.layer}, unit {unit.unit} · IoU {words.decimal(unit.iou)}",
                link=experiment.link_to(of.dataset, of.network, unit.layer, unit.unit),
            )


def draw_all(experiment: Experiment, network: Network) -> Iterator[Figure]:
    """Draw the figures of a network; a network without training or detectors has fewer."""
    name = experiment.name(network.trained.dataset, network.trained.network)
    label, short = network.trained.network, network.category_names
    labels = {"network": label, "data set": network.trained.dataset}
    limit = words.decimal(network.trained.min_iou, 2)
    yield draw(
        experiment,
        f"detectors-{name}",
        lambda width: figures.detectors(width, network.counts, short),
        kind="detectors",
        alt=f"Bar chart: number of detectors in every layer of {label} by category, beside its controls",
        caption=f"Units whose IoU with their best concept exceeds {limit}, stacked by the category of that concept, "
        "and out of how many. Layers from the input (top) to the output.",
        header=DETECTOR_COLUMNS,
        rows=detector_rows(network.counts),
        labels=labels,
    )
    if network.concepts:
        yield draw(
            experiment,
            f"concepts-{name}",
            lambda width: figures.concepts(width, network.concepts, short),
            kind="concepts",
            alt=f"Bar chart: number of units of {label} that detect each concept",
            caption="Detectors of each concept, by the colour of its category: in full colour those of the last layer, "
            f"{network.trained.layers[-1].name}, pale those of the layers before it.",
            header=("concept", "category", "units", "units_in_last_layer"),
            rows=[(count.concept, count.category, count.units, count.last) for count in network.concepts],
            labels=labels,
        )
    iou = network.iou()
    yield draw(
        experiment,
        f"iou-{name}",
        lambda width: figures.iou(width, iou, network.trained.min_iou),
        kind="iou",
        alt=f"Line charts, one a layer: share of units of {label} with an IoU above a value, trained and controls",
        caption="Share of a layer’s units whose IoU with their best concept is above the value on the axis; the "
        f"vertical line is the limit for detectors, {limit}.",
        header=("run", "layer", "unit", "iou"),
        rows=[(run, unit.layer, unit.unit, unit.iou) for run, units in network.runs.items() for unit in units],
        labels=labels,
    )
    curve = network.trained.model.get("curve") or []
    if curve:
        yield draw(
            experiment,
            f"training-{name}",
            lambda width: figures.training(width, curve),
            kind="training",
            alt=f"Line charts: loss and accuracy of {label} over the training steps",
            caption="Loss and accuracy of the training batches over the steps.",
            header=("step", "loss", "accuracy"),
            rows=[(entry["step"], entry.get("loss"), entry.get("accuracy")) for entry in curve],
            labels=labels,
        )
