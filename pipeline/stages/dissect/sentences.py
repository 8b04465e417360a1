"""Sentences computed from the numbers. Each states only counts and shares, so it is true for any numbers."""

import math
from collections.abc import Sequence
from typing import Any

from pipeline.report.experiment import Experiment
from pipeline.report.words import decimal, number, percent, plural
from pipeline.stages.dissect.counting import LayerCount
from pipeline.stages.dissect.found import Network

CONTROLS = {"untrained": "the same network untrained", "permuted": "label maps permuted over the images of each shard"}


def what_was_compared(network: Network) -> str:
    """Say what the units of a network were compared with."""
    layer = network.trained.layers[-1]
    images = layer.settings.get("images")
    where = f" on {plural(images, 'image')}" if isinstance(images, int) else ""
    return (
        f"{plural(len(network.trained.units), 'unit')} in {plural(len(network.trained.layers), 'layer')}, compared "
        f"with {plural(layer.concepts, 'concept')}{where}."
    )


def findings(network: Network) -> list[str]:
    """Return the findings for a network and its controls."""
    found = [against_controls(network), categories_of_last_layer(network), through_the_layers(network)]
    found.insert(1, without_training(network))
    return [sentence for sentence in [*found, best_unit(network), *coarse_units(network)] if sentence]


def coarse_units(network: Network) -> list[str]:
    """Say of which units few bits are stored."""
    return [
        f"Of {plural(len(layer.coarse), 'unit')} of {layer.name} ({some(sorted(layer.coarse))}), fewer than 8 bits are "
        f"stored: values and thresholds are coarse."
        for layer in network.trained.layers
        if layer.coarse
    ]


def notices(experiment: Experiment, network: Network) -> list[str]:
    """Say what the inspection found that may not be meant."""
    dataset, name = network.trained.dataset, network.trained.network
    found = [made for made in experiment.of_stage("extract") if (made.dataset, made.network) == (dataset, name)]
    return [f"Told before the run: {notice}." for made in found for notice in made.notices]


def some(units: Sequence[int]) -> str:
    return ", ".join(map(str, units[:8])) + (", ..." if len(units) > 8 else "")


def against_controls(network: Network) -> str:
    """Compare the detectors of the last layer with those of the controls."""
    layer, count = network.trained.layers[-1], network.last["trained"]
    text = (
        f"Of the {plural(count.units, 'unit')} in {layer.name}, the last layer, {number(count.detectors)} "
        f"{'responds' if count.detectors == 1 else 'respond'} where a concept is "
        f"(intersection over union above {decimal(network.trained.min_iou, 2)})"
    )
    others = []
    if "untrained" in network.last:
        others.append(f"{number(network.last['untrained'].detectors)} in the same network untrained")
    if "permuted" in network.last:
        detectors = number(network.last["permuted"].detectors)
        others.append(f"{detectors} when the label maps are permuted over the images of each shard")
    return f"{text}, against {' and '.join(others)}." if others else f"{text}."


def without_training(network: Network) -> str:
    """Say that little of the last layer needs training, if the untrained network has half as many detectors or more."""
    trained = network.last["trained"].detectors
    untrained = network.last["untrained"].detectors if "untrained" in network.last else 0
    if not trained or 2 * untrained < trained:
        return ""
    return (
        f"Untrained units reach {percent(untrained / trained)} of that number: where images show few distinct scenes, "
        f"as frames of a video do, positions and colours alone explain much."
    )


def best_unit(network: Network) -> str:
    """Name the detector with the highest IoU; empty if there is none."""
    detectors = [unit for unit in network.trained.units if unit.detector]
    if not detectors:
        return ""
    best = max(detectors, key=lambda unit: unit.iou)
    text = f"The highest IoU is that of unit {best.unit} of {best.layer} with {best.concept}: {decimal(best.iou)}"
    if math.isnan(best.ci_low):
        return f"{text}."
    return f"{text}, 95\u00a0% interval {decimal(best.ci_low)} to {decimal(best.ci_high)}."


def categories_of_last_layer(network: Network) -> str:
    """Count the detectors of the last layer by category, most first."""
    count = network.last["trained"]
    layer = network.trained.layers[-1].name
    if not count.detectors:
        return f"No unit of {layer} has an IoU above {decimal(network.trained.min_iou, 2)} with any concept."
    parts = sorted(count.by_category.items(), key=lambda item: (-item[1][0], item[0]))
    listed = ", ".join(f"{network.category_names[name]} {number(detectors)}" for name, (detectors, _) in parts)
    return (
        f"{layer} has {plural(count.detectors, 'detector')}, of {plural(count.unique, 'different concept')}. "
        f"By category: {listed}."
    )


def through_the_layers(network: Network) -> str:
    """Compare the share of detectors in the first and the last layer, for every run; empty with a single layer."""
    counts = network.counts["trained"]
    if len(counts) < 2:
        return ""

    def change(of_run: Sequence[LayerCount]) -> str:
        return f"{percent(of_run[0].share)} to {percent(of_run[-1].share)}"

    others = [
        f"{label}: {change(network.counts[run])}"
        for run, label in (("untrained", "untrained"), ("permuted", "labels permuted"))
        if run in network.counts
    ]
    beside = f" ({'; '.join(others)})" if others else ""
    return (
        f"From {counts[0].layer} to {counts[-1].layer}, the first and the last of {number(len(counts))} layers, the "
        f"share of units that are detectors goes from {change(counts)}{beside}."
    )


def controls(network: Network) -> str:
    """Name the controls that the network has, on how many images, and those that are absent."""
    absent = [text for run, text in CONTROLS.items() if run not in network.counts]
    parts = []
    if network.untrained is not None:
        images = network.untrained.layers[-1].settings.get("images")
        trained = network.trained.layers[-1].settings.get("images")
        if isinstance(images, int) and isinstance(trained, int):
            untrained = "the same" if images == trained else number(images)
            sentence = f"The network was measured on {plural(trained, 'image')}, the untrained one on {untrained}"
            if network.permuted_images is not None:
                permuted = "the same" if network.permuted_images == trained else number(network.permuted_images)
                sentence += f", permuted labels on {permuted}"
            parts.append(sentence + ".")
    if absent:
        parts.append(f"Not measured here: {' and '.join(absent)}.")
    return " ".join(parts)


def accuracy(model: dict[str, Any]) -> dict[str, float]:
    """Return the accuracies of a `model.json` by split; a single number is that of the validation images."""
    found = model.get("accuracy")
    if not isinstance(found, dict):
        found = {"validation": found}
    return {str(split): float(value) for split, value in found.items() if isinstance(value, int | float)}
