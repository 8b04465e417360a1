"""Sentences made from the numbers. Each states counts and shares only, so that it is true whatever the numbers are."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.report.counts import LayerCount

if TYPE_CHECKING:
    from pipeline.report.page import Section

CONTROLS = {"untrained": "the same network untrained", "permuted": "label maps permuted over the images"}


def lead(sections: Sequence["Section"]) -> str:
    """One sentence for a newcomer: what was compared, and what came out for the first network."""
    if not sections:
        return "This report compares no network."
    first = sections[0]
    layer, count = first.trained.layers[-1], first.last["trained"]
    images = layer.settings.get("images")
    where = f" whose place in {plural(images, 'image')} is known" if isinstance(images, int) else ""
    text = (
        f"Each unit of {first.trained.network} was compared with {plural(layer.concepts, 'concept')}{where}: "
        f"of the {plural(count.units, 'unit')} in {layer.name}, the last layer, {number(count.detectors)} "
        f"{'responds' if count.detectors == 1 else 'respond'} where one of them is "
        f"(intersection over union above {decimal(first.trained.min_iou, 2)})"
    )
    others = []
    if "untrained" in first.last:
        others.append(f"{number(first.last['untrained'].detectors)} in the same network untrained")
    if "permuted" in first.last:
        others.append(f"{number(first.last['permuted'].detectors)} when the label maps are permuted over the images")
    return f"{text}, against {' and '.join(others)}." if others else f"{text}."


def categories_of_last_layer(section: "Section") -> str:
    """Detectors of the last layer by category, most first."""
    count = section.last["trained"]
    layer = section.trained.layers[-1].name
    if not count.detectors:
        return f"No unit of {layer} has an IoU above {decimal(section.trained.min_iou, 2)} with any concept."
    parts = sorted(count.by_category.items(), key=lambda item: (-item[1][0], item[0]))
    listed = ", ".join(f"{section.category_names[name]} {number(detectors)}" for name, (detectors, _) in parts)
    return (
        f"{layer} has {plural(count.detectors, 'detector')}, of {plural(count.unique, 'different concept')}. "
        f"By category: {listed}."
    )


def through_the_layers(section: "Section") -> str:
    """Share of detectors in the first and in the last layer, for every run; empty with a single layer."""
    counts = section.counts["trained"]
    if len(counts) < 2:
        return ""

    def change(of_run: Sequence[LayerCount]) -> str:
        return f"{percent(of_run[0].share)} to {percent(of_run[-1].share)}"

    others = [
        f"{label}: {change(section.counts[run])}"
        for run, label in (("untrained", "untrained"), ("permuted", "labels permuted"))
        if run in section.counts
    ]
    beside = f" ({'; '.join(others)})" if others else ""
    return (
        f"From {counts[0].layer} to {counts[-1].layer}, the first and the last of {number(len(counts))} layers, the "
        f"share of units that are detectors goes from {change(counts)}{beside}."
    )


def controls(section: "Section") -> str:
    """Which controls stand beside the network, on how many images, and which are absent."""
    absent = [text for run, text in CONTROLS.items() if run not in section.counts]
    parts = []
    if section.untrained is not None:
        images = section.untrained.layers[-1].settings.get("images")
        trained = section.trained.layers[-1].settings.get("images")
        if isinstance(images, int) and isinstance(trained, int):
            untrained = "the same" if images == trained else number(images)
            sentence = f"The network was measured on {plural(trained, 'image')}, the untrained one on {untrained}"
            if section.permuted_images is not None:
                permuted = "the same" if section.permuted_images == trained else number(section.permuted_images)
                sentence += f", permuted labels on {permuted}"
            parts.append(sentence + ".")
    if absent:
        parts.append(f"Not measured here: {' and '.join(absent)}.")
    return " ".join(parts)


def choice_of_cards(section: "Section") -> str:
    """Which detectors have a card: all of them, or the best of each concept and then the next."""
    shown = len(section.cards)
    if shown == section.detectors:
        return f"All {plural(shown, 'detector')}, highest IoU first." if shown > 1 else "The only detector."
    concepts = len({(card.unit.category, card.unit.concept) for card in section.cards})
    chosen = "the best of each concept" if concepts == shown else "the best of each concept and then the next best"
    return f"{number(shown)} of the {plural(section.detectors, 'detector')} in all layers: {chosen}, highest IoU first."


def accuracy(model: dict[str, Any]) -> dict[str, float]:
    """Accuracies of a `model.json` by split; a single number is that of the validation images."""
    found = model.get("accuracy")
    if not isinstance(found, dict):
        found = {"validation": found}
    return {str(split): float(value) for split, value in found.items() if isinstance(value, int | float)}


def number(value: Any) -> str:
    """An integer with thousands separated by thin spaces; anything else as its text."""
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int) and not isinstance(value, bool) else str(value)


def decimal(value: float, digits: int = 3) -> str:
    """A fixed number of digits; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def percent(value: float, digits: int = 0) -> str:
    """A share as a percentage; a dash for NaN. Never rounds to 0 or 100 what is neither."""
    if math.isnan(value):
        return "–"
    step = 0.01 / 10**digits
    if 0 < value < step / 2:
        return f"< {step * 100:.{digits}f} %"
    if 1 - step / 2 < value < 1:
        return f"> {100 - step * 100:.{digits}f} %"
    return f"{value * 100:.{digits}f} %"


def plural(count: Any, noun: str) -> str:
    """`1 unit`, `2 units`."""
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"
