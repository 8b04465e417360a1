"""Data of the unit browser: one row per unit, compact, as JSON in the page."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.report.experiment import Experiment
from pipeline.report.pictures import Numbers, open_pictures, rounded
from pipeline.stages.attribute.found import explained_images, page_of, unit_relevance_of
from pipeline.stages.dissect.cards import BINS, SAMPLE, Card
from pipeline.stages.dissect.found import Network, short_names
from pipeline.stages.visualize.found import wanted_by
from pipeline.storage.read_back import open_store


def browser_data(experiment: Experiment, network: Network, cards: Mapping[tuple[str, int], Card]) -> dict[str, Any]:
    """Return the data that the browser's script reads.

    `units` are rows: layer, unit, concept (-1: no label), IoU, ceiling, held-out IoU, ends of the interval, threshold,
    activation rate; then, for units with pictures: images, best concepts as [concept, IoU], histogram, its two
    ends, images of the highest relevance; `relevance` is the method that knows it, by layer. `wanted` holds, by layer
    and unit, the file of the pictures that excite it, their number, and what they reach.
    `coarse`, if there are any, are the places of units of which fewer than 8 bits are stored.
    Layers, concepts, categories, images and classes are indices into their own lists. None: undefined. An image is its
    id, its class, and whether the page `explained` explains it.
    """
    dissection = network.trained
    pictures = open_pictures(experiment.results / dissection.dataset / "images.zarr")
    columns = {layer.name: concepts_of(open_store(layer.iou)) for layer in dissection.layers}
    concepts = Numbers()
    images = Numbers()
    rows = []
    for unit in dissection.units:
        card = cards.get((unit.layer, unit.unit))
        label = concepts.number((unit.concept, unit.category)) if unit.detector else -1
        row: list[Any] = [
            dissection.layer_names.index(unit.layer),
            unit.unit,
            label,
            *(rounded(value) for value in (unit.iou, unit.iou_ceiling, unit.iou_held_out, unit.ci_low, unit.ci_high)),
            rounded(unit.threshold),
            rounded(unit.activation_rate),
        ]
        if card is not None:
            row += [
                [images.number(image) for image in card.images],
                [[concepts.number(columns[unit.layer][column]), rounded(iou)] for column, iou in card.concepts],
                card.histogram,
                rounded(card.low),
                rounded(card.high),
                [images.number(image) for image in card.relevant],
            ]
        rows.append(row)
    coarse = {(layer.name, unit) for layer in dissection.layers for unit in layer.coarse}
    noted = [at for at, unit in enumerate(dissection.units) if (unit.layer, unit.unit) in coarse]
    categories = list(network.category_names)
    categories += sorted({category for _, category in concepts.items} - set(categories))
    short = short_names(categories)
    classes = Numbers()
    explained = explained_images(experiment, dissection.dataset, dissection.network)
    return {
        "network": dissection.network,
        "folder": f"units/{experiment.name(dissection.dataset, dissection.network)}",
        "minIou": dissection.min_iou,
        "layers": dissection.layer_names,
        "categories": [short[category] for category in categories],
        "coloured": len(network.category_names),
        "concepts": [[name, categories.index(category)] for name, category in concepts.items],
        "images": [
            [str(pictures.ids[image]), classes.number(pictures.classes[image]), int(image in explained)]
            for image in images.items
        ],
        "relevance": {
            str(dissection.layer_names.index(layer)): of.title
            for layer, of in unit_relevance_of(experiment, dissection.dataset, dissection.network).items()
            if layer in dissection.layer_names
        },
        "wanted": {
            str(dissection.layer_names.index(layer)): units
            for layer, units in wanted_by(experiment, dissection.dataset, dissection.network).items()
            if layer in dissection.layer_names
        },
        "explained": page_of(experiment, dissection.dataset, dissection.network),
        "classes": classes.items,
        "bins": BINS,
        "sample": min(SAMPLE, _images_of(network)),
        "units": rows,
        **({"coarse": noted} if noted else {}),
    }


def concepts_of(iou: Any) -> list[tuple[str, str]]:
    """Return name and category of every column of an IoU store."""
    names, categories = np.asarray(iou["concept"][:]), np.asarray(iou["category"][:])
    return [(str(name), str(category)) for name, category in zip(names, categories, strict=True)]


def _images_of(network: Network) -> int:
    images = network.trained.layers[-1].settings.get("images")
    return images if isinstance(images, int) else SAMPLE
