"""Explain what a network says of images, in a notebook: each method is a function.

    from pipeline import attribute

    network = torchvision.models.resnet18(weights="DEFAULT").eval()
    found = attribute.integrated_gradients(network, images, "predicted", tolerance=0.01)
    found.map, found.residual                       # (image, y, x), and how far completeness is missed

`images` are as the network takes them; any floating-point tensor will do, for example embeddings of a text. A target is
`"predicted"`, a class for all images, one for each, or an object of `Logit`, `Unit` and `Scalar`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.errors import MicrotomeError, nearest
from pipeline.networks.explainable import examine
from pipeline.networks.gradients import Logit, Scalar, Target, Unit, scores
from pipeline.networks.layers import survey
from pipeline.stages.attribute.methods.registry import FUNCTIONS, arguments
from pipeline.stages.attribute.options import METHODS, OPTIONS
from pipeline.stages.attribute.subject import Attribution, Subject

__all__ = ["Attribution", "Logit", "Scalar", "Unit", "explain", *FUNCTIONS]

Targets = str | int | Sequence[int] | torch.Tensor | Logit | Unit | Scalar


def explain(
    method: str,
    network: nn.Module,
    inputs: torch.Tensor,
    target: Targets = "predicted",
    *,
    baseline: torch.Tensor | float = 0.0,
    batch: int | None = None,
    seeds: Sequence[int] = (),
    **options: Any,
) -> Attribution:
    """Explain a scalar of each input by a method.

    Parameters
    ----------
    method : a name of `pipeline.stages.attribute.options.METHODS`.
    inputs : floating-point, the first dimension that of the images.
    target : `"predicted"`, a class or one for each image, or a `Logit`, `Unit` or `Scalar`.
    baseline : the input without information, like the inputs, or one value for all of it, as the network takes it.
    batch : inputs per pass; default: as many as are given.
    seeds : of each image's noise; default: its place.
    options : of the method, as in the configuration, for example `steps` or `layer`.

    Raises
    ------
    MicrotomeError
        For an unknown method or option, and for a network that the method refuses.
    """
    if method not in FUNCTIONS:
        raise MicrotomeError(f"no method {method!r}{nearest(method, FUNCTIONS)}")
    kind, chosen = METHODS[method], OPTIONS[method](**options)
    resolved = _target(network, inputs, target)
    known: dict[str, Any] = {}
    if kind.maps != "image" or "layer" in kind.needs or method == "gradient_x_input":
        known = _known(network, inputs, chosen.request("", ""), kind.needs)
    layer = known.get("layer")
    if kind.baseline:
        baseline = baseline if isinstance(baseline, torch.Tensor) else torch.full_like(inputs, baseline)
        if baseline.shape[-inputs.ndim + 1 :] != inputs.shape[1:]:
            raise MicrotomeError(f"a baseline of {tuple(baseline.shape)} for inputs of {tuple(inputs.shape)}")
    subject = Subject(
        network,
        inputs,
        resolved,
        baseline.expand_as(inputs) if isinstance(baseline, torch.Tensor) else None,
        batch or len(inputs),
        [layer.name] if layer is not None else [],
        kind.shares and kind.maps == "image",
        seeds=seeds,
    )
    return FUNCTIONS[method](subject, chosen, **arguments(method, known))


def _target(network: nn.Module, inputs: torch.Tensor, target: Targets) -> Target:
    if isinstance(target, (Logit, Unit, Scalar)):
        return target
    if isinstance(target, str):
        if target != "predicted":
            raise MicrotomeError(f"target {target!r}: `predicted`, a class by its index, or a Logit, Unit or Scalar")
        found: list[torch.Tensor] = []
        scores(network, inputs, Scalar(lambda output: found.append(output) or output.flatten(1)[:, 0]))  # type: ignore[func-returns-value]
        return Logit(found[0].argmax(1))
    classes = torch.as_tensor(target, dtype=torch.int64)
    return Logit(classes.expand(len(inputs)) if classes.ndim == 0 else classes)


def _known(network: nn.Module, inputs: torch.Tensor, request: str | None, needs: Sequence[str]) -> dict[str, Any]:
    """Return what methods take besides subject and options; refuse a network without what this one needs."""
    if inputs.ndim != 4:
        return {}
    plain = copy.deepcopy(network).float()  # the survey's images are float32
    _, *shape = inputs.shape
    surveyed = survey(plain, (shape[0], shape[1], shape[2]))
    found = examine(network, surveyed, _two(inputs), [request or ""], lambda: copy.deepcopy(plain))
    asked = [need for need in needs if need not in ("gradient", "deconvnet", "guided_backprop")]  # the pass itself says
    if why := found.why_not(asked, request):
        raise MicrotomeError(why)
    layer = found.layers.get(request or "")
    return {
        "layer": layer if request is not None else None,
        "head": found.heads.get(layer.name) if layer is not None else None,
        "linear": layer is not None and layer.name in found.linear,
        "homogeneous": found.homogeneous,
        "tokens": found.attention,
    }


def _two(inputs: torch.Tensor) -> torch.Tensor:
    """Return two unlike images like the inputs."""
    noise = torch.randn((2, *inputs.shape[1:]), generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return noise.to(inputs.device, inputs.dtype)


def _function(name: str) -> Callable[..., Attribution]:
    def method(network: nn.Module, inputs: torch.Tensor, target: Targets = "predicted", **options: Any) -> Attribution:
        return explain(name, network, inputs, target, **options)

    method.__name__ = method.__qualname__ = name
    method.__doc__ = f"{FUNCTIONS[name].__doc__}\n\n    Keyword arguments are those of `explain`.\n    "
    return method


for _name in FUNCTIONS:
    globals()[_name] = _function(_name)
