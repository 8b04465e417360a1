"""What a method explains an image with: target, baseline, references, bounds and seed; and the explanation itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from kernels.attribution import baselines
from pipeline.config.networks import Network
from pipeline.errors import MicrotomeError
from pipeline.networks.explainable import linear_in
from pipeline.networks.forward import normalise
from pipeline.networks.gradients import Logit
from pipeline.stages.attribute.methods.registry import FUNCTIONS
from pipeline.stages.attribute.options import METHODS, OfProbability, Options
from pipeline.stages.attribute.settings import Targets
from pipeline.stages.attribute.subject import Attribution, Known, Subject
from pipeline.stages.attribute.work import Work

POINTS = 64  # inputs of a small function that go through it together


def explain_inputs(
    work: Work,
    name: str,
    network: nn.Module,
    inputs: torch.Tensor,
    target: Logit,
    *,
    seeds: Sequence[int],
    baseline: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    count: int | None = None,
    options: Options | None = None,
) -> Attribution:
    """Explain inputs by a method of an experiment, whatever network and images they are of.

    Parameters
    ----------
    name : of the method in the experiment. options : those of another one, which needs neither layer nor references.
    inputs : (image, ...), as the network takes them, of any floating type.
    target : of each image. seeds : of what is drawn for each.
    baseline : like the inputs; wanted by methods that compare with one.
    segments : int64 (image, y, x), wanted by methods that part images.
    count : the first so many images count, the others pad the batch; default: all.

    Raises
    ------
    MicrotomeError
        The method refuses the network.
    """
    known = Known()
    if options is None:
        options, background = work.methods[name], background_of(work, name)
        known = replace(work.known(name), background=None if background is None else background.to(inputs))
    subject = Subject(
        network,
        inputs,
        target,
        baseline,
        len(inputs),
        count,
        layers=[known.layer.name] if known.layer is not None else [],
        of_inputs=METHODS[options.kind].shares == "inputs",
        seeds=list(seeds),
        bounds=_like(inputs, bounds_of(work.model.spec, torch.zeros((1, 3, *inputs.shape[2:]), dtype=torch.uint8))),
        segments={} if segments is None else {options.segments.key: segments},  # type: ignore[attr-defined]
    )
    return FUNCTIONS[options.kind](subject, options, known)


def explain_function(network: nn.Module, inputs: torch.Tensor, baseline: torch.Tensor, options: Options) -> Attribution:
    """Explain the first logit of inputs (input, feature) that are no images, each compared with a baseline like it.

    Raises
    ------
    MicrotomeError
        The method refuses the network, or inputs without positions.
    """
    if isinstance(options, OfProbability):
        options = options.model_copy(update={"softmax": False})
    if "linear" in METHODS[options.kind].needs and not linear_in(network, torch.cat([inputs, baseline])):
        raise MicrotomeError(f"{options.kind}: the score is not linear in the input")
    span = inputs - baseline
    subject = Subject(
        network,
        inputs,
        Logit(torch.zeros(len(inputs), dtype=torch.int64)),
        baseline,
        POINTS,
        of_inputs=METHODS[options.kind].shares == "inputs",
        bounds=((inputs - span.abs() - 1).amin(0), (inputs + span.abs() + 1).amax(0)),
    )
    return FUNCTIONS[options.kind](subject, options, Known(background=baseline[:1]))


def _like(inputs: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor] | None) -> tuple | None:
    return None if bounds is None else tuple(each.to(inputs) for each in bounds)


def target_of(targets: Targets, logits: torch.Tensor, labels: torch.Tensor, rank: int, probabilities: bool) -> Logit:
    """Return the target of each image, from its logits where they decide."""
    if targets.kind == "label":
        picked = [labels.to(logits.device)]
    elif targets.kind in ("predicted", "top"):
        picked = [logits.sort(stable=True, dim=1, descending=True).indices[:, rank]]
    else:
        picked = [torch.full((len(logits),), each, device=logits.device) for each in targets.classes]
    return Logit(picked[0], picked[1] if len(picked) > 1 else None, targets.link, probabilities)


def background_of(work: Work, name: str) -> torch.Tensor | None:
    """Return what a method compares images with, as the network takes it."""
    found = work.background.get(name)
    if found is None:
        return None
    values = torch.from_numpy(found)
    return normalise(values, work.model.spec) if values.dtype == torch.uint8 else values


def bounds_of(spec: Network, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the least and greatest input, of black and of white pixels; None where each image has its own scale."""
    if spec.preprocessing.per_image:
        return None
    low, high = (normalise(torch.full_like(pixels[:1], each), spec)[0] for each in (0, 255))
    return low, high


def baseline_pixels(kind: str | np.ndarray, pixels: torch.Tensor, ids: Sequence[str]) -> torch.Tensor:
    """Return the baseline of each image, uint8 like `pixels`."""
    if isinstance(kind, np.ndarray):
        return torch.from_numpy(kind).expand_as(pixels)
    if kind == "blur":
        return baselines.blurred(pixels)
    if kind == "uniform":
        return torch.stack([baselines.uniform(tuple(pixels.shape[1:]), seed_of(each)) for each in ids])
    return torch.full_like(pixels, {"black": 0, "white": 255}[kind])


def seed_of(image_id: str) -> int:
    """Return the seed of what is drawn for an image, from its id."""
    return int.from_bytes(hashlib.sha256(image_id.encode("utf-8", "surrogateescape")).digest()[:6])
