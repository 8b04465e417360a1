"""Inspection of networks before any work: layers, shapes, bytes, checkpoint keys, classes.

For segmentation networks, which are sources of concepts: outputs, channels and class lists.

    python -m pipeline.networks.inspection request.json response.json

answers a list of requests in one process, since importing torch and torchvision takes seconds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from torch import nn

from pipeline.config.networks import Described, Generator, NetworkSpec, Reading, Segmenter
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks import checkpoint, segmenters
from pipeline.networks.build import build, load_weights
from pipeline.networks.explainable import examine
from pipeline.networks.fitness import Explainable
from pipeline.networks.generators import refused_images
from pipeline.networks.graph.tail import Tail
from pipeline.networks.graph.trace import UntraceableError, trace
from pipeline.networks.independence import check_independence
from pipeline.networks.layer import Inspection, LayerInfo
from pipeline.networks.layers import Survey, choose, head_of, survey
from pipeline.networks.positions import MOST_IMAGES, place
from pipeline.networks.returned import check_returned
from pipeline.networks.speed import Probe, measure

_HALF_BYTES = 2


class Ablation(BaseModel):
    """Layers whose units are to be removed, and the number of classes that images are labelled with."""

    model_config = ConfigDict(extra="forbid")

    layers: str | list[str]
    classes: int


class Explanation(BaseModel):
    """The layers whose positions explanations name, "" for the default, and those whose units they name."""

    model_config = ConfigDict(extra="forbid")

    layers: list[str]
    units: list[str] = []


class Request(BaseModel):
    """One network to inspect; the fields are the arguments of `inspect`."""

    model_config = ConfigDict(extra="forbid")

    network: NetworkSpec
    image: tuple[int, int] | None = None
    input_shape: tuple[int, ...]
    layers: str | list[str] = "auto"
    images: int = 0
    reading: Reading = Reading()
    weights_path: str | None = None
    ablate: Ablation | None = None
    compare: str | list[str] | None = None
    look: str | list[str] | None = None
    classes: int | None = None
    explain: Explanation | None = None

    @field_validator("input_shape")
    @classmethod
    def _of_images(cls, shape: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if info.data.get("image") is None and len(shape) != 3:
            raise ValueError(f"expected (channels, height, width), found {shape}")
        return shape


class GeneratorRequest(BaseModel):
    """One generator that is to make images of a size (height, width)."""

    model_config = ConfigDict(extra="forbid")

    generator: Generator
    size: tuple[int, int]


class ClassifierRequest(BaseModel):
    """One classifier that is to be trained on images of a shape (channels, height, width)."""

    model_config = ConfigDict(extra="forbid")

    classifier: NetworkSpec
    input_shape: tuple[int, int, int]


class SegmenterRequest(BaseModel):
    """One segmentation network to inspect, for images of a size (height, width)."""

    model_config = ConfigDict(extra="forbid")

    segmenter: Segmenter
    size: tuple[int, int]


def inspect(
    network: Described,
    input_shape: tuple[int, ...],
    layers: str | Sequence[str] = "auto",
    images: int = 0,
    image: tuple[int, int] | None = None,
    reading: Reading | None = None,
    weights_path: str | Path | None = None,
    ablate: Ablation | None = None,
    compare: str | Sequence[str] | None = None,
    look: str | Sequence[str] | None = None,
    classes: int | None = None,
    explain: Explanation | None = None,
) -> Inspection:
    """Build the network on the meta device, check its checkpoint's names and shapes, and find the wanted layers.

    If that fails on the meta device, the network is built on the CPU.

    Parameters
    ----------
    input_shape : (channels, height, width) of the images.
    layers, reading : as in `layers.resolve`.
    images : number of images to compute activations for.
    image : (height, width) of the images that a generator makes of inputs of `input_shape`; None: they are the inputs.
    weights_path : checkpoint made by the workflow, which replaces the network's own.
    ablate : what is to be removed.
    compare : layers that are compared with those of other networks, as in `layers.choose`; None: `layers`.
    look : layers to examine, given in the same way; only unknown ones are refused.
    classes : that the images are labelled with, if they are.
    explain : what explanations name.

    Raises
    ------
    MicrotomeError
        For everything that a stage would refuse later: architecture, checkpoint, image size, layers.
    """
    spec = NetworkSpec.of(network)
    built, surveyed = _surveyed(spec, input_shape, reading, image)
    load_weights(built, spec, weights_path, shapes_only=True)
    check_returned(surveyed.returned, classes, spec.architecture)
    name = spec.architecture
    choices = [layers, *(each for each in (compare, look) if each is not None)]
    notices = [*_notices(spec, surveyed, classes), *_left(spec, weights_path)]
    need, free = _memory_need(built, spec, surveyed.largest, weights_path), psutil.virtual_memory().available
    if need < free:
        recorded = {layer.name for choice in choices for layer in choose(built, surveyed, choice, name)}
        notices += check_independence(spec, sorted(recorded), input_shape, weights_path)
        if image is None:  # where a latent lies in the image is the generator's to say
            channels, height, width = input_shape
            shape = channels, height, width
            place(built, surveyed, [layers], shape, name, lambda: build(spec), every=True)
            place(built, surveyed, choices[1:], shape, name, lambda: build(spec), strict=False)
    else:
        notices.append(
            f"it was not run before the work, for which it needs {need / 2**30:,.1f} GiB of memory where "
            f"{free / 2**30:,.1f} GiB were free: that its outputs depend on the image and the weights alone, and where "
            f"the positions of its layers lie, was not checked"
        )
    chosen = choose(built, surveyed, layers, name)
    compared = [] if compare is None else [each.name for each in choose(built, surveyed, compare, name)]
    return Inspection(
        architecture=spec.architecture,
        layers=chosen,
        activation_bytes={layer.name: _bytes(layer, images) for layer in chosen},
        parameters=sum(parameter.numel() for parameter in built.parameters()),
        largest=surveyed.largest,
        output=surveyed.output,
        classes=surveyed.classes,
        ablation=_ablation(built, chosen, surveyed.output, input_shape, ablate) if ablate else {},
        compared=compared,
        misplaced=[surveyed.misplaced[each] for each in compared if each in surveyed.misplaced],
        notices=notices,
        alone=surveyed.alone,
        explainable=_explainable(spec, surveyed, input_shape, explain).json() if explain and need < free else {},
    )


def _explainable(spec: NetworkSpec, surveyed: Survey, input_shape: tuple[int, ...], wanted: Explanation) -> Explainable:
    """Return what a network has of what explanations need, with random weights."""
    network = build(spec).eval()
    images = torch.randn((2, *input_shape), generator=torch.Generator().manual_seed(0))
    return examine(network, surveyed, images, wanted.layers, lambda: build(spec), wanted.units)


def _notices(spec: NetworkSpec, surveyed: Survey, classes: int | None) -> Iterator[str]:
    """Yield what is not wrong, but may not be meant."""
    if surveyed.classes == 1:
        yield (
            "it gives one logit: `calibrate` reads it as that of the second of two classes, and no accuracy is taken "
            "of it elsewhere"
        )
    elif classes and surveyed.classes and classes != surveyed.classes:
        yield (
            f"it gives {surveyed.classes} logits, and the images have {classes} classes: its predictions are not "
            f"those classes"
        )
    if surveyed.alone:
        yield (
            f"it cannot take one image alone ({surveyed.alone}), so a last minibatch of one image fails: look for "
            f"`squeeze()` without a dimension in its forward"
        )
    if (
        spec.torchvision in ("googlenet", "inception_v3")
        and spec.weights_file is not None
        and "transform_input" not in spec.arguments
    ):
        yield (
            "torchvision's published weights go with `arguments: {transform_input: true}`, which changes how the "
            "input is normalised; with a file as weights it is off unless you say so"
        )


def _left(spec: NetworkSpec, weights_path: str | Path | None) -> Iterator[str]:
    """Yield what the network's own checkpoint holds beside what is taken of it."""
    if weights_path is None and spec.weights_file is not None:
        yield from checkpoint.notices(spec.weights_file, spec.prefix, spec.within)


def _alone(network: nn.Module, output: tuple[int, ...], input_shape: tuple[int, ...]) -> str:
    """Return what goes wrong with a batch of one image: `squeeze()` without a dimension drops the batch, too."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            logits = head_of(network(torch.zeros((1, *input_shape), device=device)))
    except Exception as error:  # shapes that do not fit fail in many ways
        return f"it fails: {type(error).__name__}: {error}"
    found = None if logits is None else tuple(logits.shape)
    return "" if found in (None, (1, *output)) else f"it returns {found}, expected {(1, *output)}"


def _ablation(
    network: nn.Module,
    layers: Sequence[LayerInfo],
    output: tuple[int, ...],
    input_shape: tuple[int, ...],
    wanted: Ablation,
) -> dict[str, float | None]:
    """Return the cost of a pair for each layer; refuse layers that cannot be ablated."""
    if output != (wanted.classes,):
        raise MicrotomeError(
            f"units cannot be ablated: the network gives {output} for an image, and the images have {wanted.classes} "
            f"classes: expected a logit for each class"
        )
    known = {layer.name: layer for layer in layers}
    costs: dict[str, float | None] = {}
    for name in list(known)[-1:] if wanted.layers == "last" else wanted.layers:
        if name not in known:
            raise MicrotomeError(f"ablate.layers: {name!r} is not among the layers{nearest(name, known)}")
        try:
            images = torch.zeros((3, *input_shape), device="meta")
            costs[name] = Tail(trace(network, name, images), known[name]).cost().pair_flops
        except UntraceableError:
            costs[name] = None
    return costs


def answer(requests: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the `result`, or the `error` to show, of each request (one of those above or a `Probe`, as json)."""
    answers: list[dict[str, Any]] = []
    for each in requests:
        try:
            answers.append({"result": _result(each)})
        except ValidationError as error:
            first = error.errors()[0]
            answers.append({"error": f"request: {'.'.join(map(str, first['loc']))}: {first['msg']}"})
        except MicrotomeError as error:
            answers.append({"error": str(error)})
    return answers


def _result(each: Any) -> dict[str, Any]:
    if isinstance(each, dict) and "segmenter" in each:
        wanted = SegmenterRequest.model_validate(each)
        found = segmenters.inspect(wanted.segmenter, wanted.size)
        return {
            "concepts": {name: channels.concepts for name, channels in found.items()},
            "memory": segmenters.memory_need(wanted.segmenter, wanted.size),
        }
    if isinstance(each, dict) and "generator" in each:
        made = GeneratorRequest.model_validate(each)
        return _generating(made.generator, made.size)
    if isinstance(each, dict) and "classifier" in each:
        asked = ClassifierRequest.model_validate(each)
        built, surveyed = _surveyed(asked.classifier, asked.input_shape, None)
        return {"classes": surveyed.classes, "parameters": sum(each.numel() for each in built.parameters())}
    if isinstance(each, dict) and "micro_batch" in each:
        return measure(Probe.model_validate(each))
    request = Request.model_validate(each)
    return inspect(**{name: getattr(request, name) for name in Request.model_fields}).json()


def _generating(generator: Generator, size: tuple[int, int]) -> dict[str, Any]:
    """Check that a generator makes images of a size, of latents alone; return its number of parameters."""
    spec, shape = generator.spec, tuple(generator.latent.shape)
    network = build(spec)
    load_weights(network, spec)
    if why := refused_images(network, generator, size, 3):
        raise MicrotomeError(why)
    check_independence(spec, [], shape)
    return {"parameters": sum(each.numel() for each in network.parameters())}


def main(request_path: str, response_path: str) -> None:
    """Read a JSON list of requests; write the JSON list of answers, in the same order."""
    requests = json.loads(Path(request_path).read_text())
    Path(response_path).write_text(json.dumps(answer(requests), indent=1))


def _surveyed(
    spec: NetworkSpec, input_shape: tuple[int, ...], reading: Reading | None, image: tuple[int, int] | None = None
) -> tuple[nn.Module, Survey]:
    """Return the network on the meta device and the survey of its forward pass, run on the CPU if it needs values."""
    try:
        network = build(spec, device="meta")
        tensors = (*network.parameters(), *network.buffers())
        if not all(tensor.is_meta for tensor in tensors):
            raise NotImplementedError("the builder places tensors itself")
        if _other_precision(network):
            raise NotImplementedError("on the meta device, some operations take what they refuse elsewhere")
        surveyed = survey(network, input_shape, reading, image)
        surveyed.alone = _alone(network, surveyed.output, input_shape)
        return network, surveyed
    # Reading a value (`.item()`), a device named in a forward, numpy: each fails on the meta device in its own way.
    except Exception:
        network = build(spec)
    try:
        surveyed = survey(network, input_shape, reading, image)
    except MicrotomeError:
        raise
    except Exception as error:
        other = _other_precision(network)
        advice = f"; its weights are {other}, and images are float32: call `.float()` in its builder" if other else ""
        raise MicrotomeError(
            f"{spec.architecture} cannot take images of shape {tuple(input_shape)}: {type(error).__name__}: {error}"
            f"{advice}"
        ) from error
    surveyed.alone = _alone(network, surveyed.output, input_shape)
    # Loading shapes into a meta network checks names and shapes and copies nothing.
    return network.to("meta"), surveyed


def _other_precision(network: nn.Module) -> str:
    """Return the type of the first floating-point weight that is not float32; empty if all are."""
    others = (each.dtype for each in network.parameters() if each.is_floating_point() and each.dtype != torch.float32)
    return str(next(others, "")).removeprefix("torch.")


def _memory_need(network: nn.Module, spec: NetworkSpec, largest: int, weights_path: str | Path | None) -> int:
    """Return the bytes of the checks, which hold one copy of the network, and the checkpoint while it is loaded."""
    held = sum(value.numel() * value.element_size() for value in (*network.parameters(), *network.buffers()))
    loads = weights_path is not None or spec.published or spec.weights_file is not None
    return held * (2 if loads else 1) + MOST_IMAGES * 4 * 4 * largest


def _bytes(layer: LayerInfo, images: int) -> int:
    units, height, width = layer.shape
    return images * units * (height * width + layer.special) * _HALF_BYTES


if __name__ == "__main__":
    main(*sys.argv[1:])
