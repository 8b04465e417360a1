"""The relevance of a layer's units, by methods that say something of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch

from kernels.attribution.paths import nodes
from pipeline.errors import MicrotomeError
from pipeline.networks.forward import units_of
from pipeline.networks.gradients import Logit, gradients, in_chunks, padded, scores_through
from pipeline.networks.graph.rescale import Rescale
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import first_tensor, replaced
from pipeline.networks.prepare import prepare, survey_of
from pipeline.stages.attribute.options import DeepLift, IntegratedGradients
from pipeline.stages.audit.batch import Batch
from pipeline.stages.audit.removed import Ablation, Layer


def ablation(batch: Batch, options: Ablation) -> dict[str, np.ndarray]:
    """Return the relevance of the units of each layer whose units were removed, float64 (image, unit).

    It is the sum over all positions. Of LRP it is what `attribute` stored; of a layer that it did not store, NaN.
    """
    found = {}
    for layer, known in batch.given("ablation").items():
        found[f"relevance.{layer}"] = _relevance(batch, layer, known)
    return found


def _relevance(batch: Batch, layer: str, known: Layer) -> np.ndarray:
    units = known.units
    if batch.control == "other_split":  # as well as it can be done with so many images: the losses, measured again
        return known.other[:, batch.classes].T
    if batch.control == "random":
        return np.stack([np.random.default_rng([seed, 4]).standard_normal(units) for seed in batch.seeds])
    kind = batch.control or batch.options_of_method.kind
    if kind == "lrp":
        missing = np.full((len(batch.ids), units), np.nan)
        return np.asarray(batch.stored.get(f"relevance.{layer}", missing), np.float64)
    info = batch.memo(("layer", layer), lambda: _layer(batch, layer))
    parts, size = [], batch.spec.numerics.micro_batch
    for start, stop in in_chunks(len(batch.ids), size):
        rows = torch.arange(start, stop)
        inputs, baseline = (padded(each[rows], size) for each in (batch.inputs, batch.baseline))
        target = batch.target.at(padded(rows, size))
        parts.append(RULES[kind](batch, info, inputs, baseline, target)[: stop - start])
    return torch.cat(parts).cpu().numpy()


def _layer(batch: Batch, layer: str) -> LayerInfo:
    survey = survey_of(batch.network, batch.model, batch.size)
    return prepare(batch.network, batch.model, survey, [layer], strict=False).layers[0]


Rule = Callable[[Batch, LayerInfo, torch.Tensor, torch.Tensor, Logit], torch.Tensor]


def _both(batch: Batch, info: LayerInfo, inputs: torch.Tensor, target: Logit) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the layer's output and the gradient with respect to it, float64 (image, unit, place)."""
    found = gradients(batch.network, inputs, target, [info.name], of_inputs=False).layers[info.name]
    output, gradient = (units_of(each, info).double() for each in found)
    return output, gradient


def grad_cam(batch: Batch, info: LayerInfo, inputs: torch.Tensor, _: torch.Tensor, target: Logit) -> torch.Tensor:
    """Return the mean gradient of a unit times its output, summed over positions: its part of Grad-CAM's map."""
    output, gradient = _both(batch, info, inputs, target)
    return gradient.mean(2) * output.sum(2)


def gradient_x_activation(
    batch: Batch, info: LayerInfo, inputs: torch.Tensor, _: torch.Tensor, target: Logit
) -> torch.Tensor:
    output, gradient = _both(batch, info, inputs, target)
    return (gradient * output).sum(2)


def layer_cam(batch: Batch, info: LayerInfo, inputs: torch.Tensor, _: torch.Tensor, target: Logit) -> torch.Tensor:
    output, gradient = _both(batch, info, inputs, target)
    return (gradient.clamp(min=0) * output).sum(2)


def activation(batch: Batch, info: LayerInfo, inputs: torch.Tensor, _: torch.Tensor, target: Logit) -> torch.Tensor:
    """Return the mean output of a unit: what it does, whatever the class."""
    return _both(batch, info, inputs, target)[0].mean(2)


def _output(batch: Batch, info: LayerInfo, inputs: torch.Tensor, target: Logit) -> torch.Tensor:
    """Return the layer's output as the network gives it."""
    return gradients(batch.network, inputs, target, [info.name], of_inputs=False).layers[info.name][0]


def integrated_gradients(
    batch: Batch, info: LayerInfo, inputs: torch.Tensor, baseline: torch.Tensor, target: Logit
) -> torch.Tensor:
    """Integrate the gradient on the line from the layer's output for the baseline to that for the image.

    Sundararajan et al., "Axiomatic attribution for deep networks" (ICML 2017), of the rest of the network.
    """
    options = batch.options_of_method
    assert isinstance(options, IntegratedGradients)
    first, last = (_output(batch, info, each, target) for each in (baseline, inputs))
    total = torch.zeros_like(last, dtype=torch.float64)
    for at, weight in zip(*nodes(options.steps, options.rule), strict=True):
        point = first + float(at) * (last - first)

        def put(module: object, given: object, output: object, point: torch.Tensor = point) -> object:
            tensor = first_tensor(output)
            assert tensor is not None
            return replaced(output, tensor, point)

        handle = batch.network.get_submodule(info.name).register_forward_hook(put)
        try:
            made = gradients(batch.network, inputs, target, [info.name], of_inputs=False).layers[info.name][1]
        finally:
            handle.remove()
        total += float(weight) * made.double()
    return units_of(total * (last - first).double(), info).sum(2)


def deeplift(
    batch: Batch, info: LayerInfo, inputs: torch.Tensor, baseline: torch.Tensor, target: Logit
) -> torch.Tensor:
    """Return DeepLIFT's multipliers at the layer times the difference of its output to that for the baseline.

    Shrikumar et al. (ICML 2017), the rule rescale.
    """
    options = batch.options_of_method
    assert isinstance(options, DeepLift)
    if options.rule != "rescale":
        raise MicrotomeError(f"the rule `{options.rule}` has no multipliers of a layer: take `rescale`")
    sites = partial(Rescale, batch.network, max_rule=options.max)(len(inputs))
    sites.shared = False
    reference = _output(batch, info, baseline, target)
    scores_through(batch.network, baseline, target, sites, len(inputs))
    sites.turn()
    output, multiplier = gradients(batch.network, inputs, target, [info.name], sites=sites).layers[info.name]
    return units_of((multiplier * (output - reference)).double(), info).sum(2)


RULES: Mapping[str, Rule] = {
    "grad_cam": grad_cam,
    "hires_cam": gradient_x_activation,
    "layer_cam": layer_cam,
    "gradient_x_input": gradient_x_activation,
    "integrated_gradients": integrated_gradients,
    "deeplift": deeplift,
    "activation": activation,
}
"""By method, or control: the relevance of units, float64 (image, unit)."""
