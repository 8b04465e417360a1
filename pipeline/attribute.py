"""Explain what a network says of images, in a notebook: each method is a function.

    from pipeline import attribute

    network = torchvision.models.resnet18(weights="DEFAULT").eval()
    found = attribute.integrated_gradients(network, images, "predicted", tolerance=0.01)
    found.map, found.residual                       # (image, y, x), and how far completeness is missed

`images` are as the network takes them; any floating-point tensor will do, for example embeddings of a text. A target is
`"predicted"`, a class for all images, one for each, or an object of `Logit`, `Unit` and `Scalar`.

Black boxes (`lime`, `kernel_shap`, `rise`) explain any function from a batch to scores (input, class), with or without
gradients. Their segments are those of the option `segments`, or a tensor (image, y, x) of your own; the values of a
vector, and the rows of a matrix, are segments of themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.config.messages import explain as explained
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks.explainable import examine, linear_in, normalised_by, placed
from pipeline.networks.gradients import Logit, Scalar, Target, Unit, refuse_training, scores
from pipeline.networks.layers import head_of, one_attention_path, survey
from pipeline.stages.attribute.methods.registry import FUNCTIONS
from pipeline.stages.attribute.options import METHODS, OPTIONS, Labels, Lrp, OfSplit, Options, Patches, Segmented
from pipeline.stages.attribute.segments import lacking, part
from pipeline.stages.attribute.subject import Attribution, Known, Subject

__all__ = ["Attribution", "Logit", "Scalar", "Unit", "explain", *FUNCTIONS]

ALIKE = {True: 1e-9, False: 1e-4}
"""Relative difference of scores in float64 (True) and in other types that rounding makes beside other neighbours."""
Targets = str | int | Sequence[int] | torch.Tensor | Logit | Unit | Scalar


def explain(
    method: str,
    network: nn.Module | Callable[[torch.Tensor], Any],
    inputs: torch.Tensor,
    target: Targets = "predicted",
    *,
    baseline: torch.Tensor | float | None = None,
    background: torch.Tensor | None = None,
    batch: int | None = None,
    seeds: Sequence[int] = (),
    segments: torch.Tensor | Mapping[str, Any] | str | None = None,
    bounds: tuple[float | torch.Tensor, float | torch.Tensor] | None = None,
    **options: Any,
) -> Attribution:
    """Explain a scalar of each input by a method.

    Parameters
    ----------
    method : a name of `pipeline.stages.attribute.options.METHODS`.
    network : a module, or, for methods that take no gradient, any function from inputs to scores (input, class).
    inputs : floating-point, the first dimension that of the images.
    target : `"predicted"`, a class or one for each image, or a `Logit`, `Unit` or `Scalar`.
    baseline : the input without information, like the inputs, or one value for all of it, as the network takes it;
        default: 0.
    background : (reference, ...), inputs that `deep_shap` and `linear_shap` compare with, all of them.
    batch : points on a line, noisy copies or windows that go through the network at a time; default: as many as there
        are inputs, which always go together.
    seeds : of each image's noise and masked copies; default: its place.
    segments : as the option of a black box, or segments of your own from 0 on, integers (image, y, x). Superpixels are
        those of the inputs, each image scaled from 0 to 1.
    bounds : the least and the greatest input that there may be, for the rule `z_b` of LRP: numbers, or tensors that are
        broadcast to an input.
    options : of the method, as in the configuration, for example `steps` or `layer`.

    Raises
    ------
    MicrotomeError
        For an unknown method or option, an argument that the method does not use, a network that the method refuses or
        that mixes the images of a batch, and scores that are not finite.
    """
    if method not in FUNCTIONS:
        raise MicrotomeError(f"no method {method!r}{nearest(method, FUNCTIONS)}")
    kind = METHODS[method]
    if segments is not None and not isinstance(segments, torch.Tensor):
        options["segments"] = segments
    chosen = _options(method, options)
    if isinstance(chosen, OfSplit) and (given := sorted({"references", "split", "seed"} & set(options))):
        raise MicrotomeError(f"{method}: {given[0]!r} is of the configuration: give the references as `background`")
    network = _module(network, method)
    if inputs.ndim != 4 and (kind.maps != "image" or "layer" in kind.needs or method == "occlusion"):
        raise MicrotomeError(f"{method} explains images (image, channel, y, x), not inputs of {tuple(inputs.shape)}")
    if not inputs.is_floating_point() or not len(inputs) or not bool(inputs.isfinite().all()):
        raise MicrotomeError(
            f"inputs of {tuple(inputs.shape)}, {inputs.dtype}: at least one, of finite floating-point values"
        )
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise MicrotomeError(f"batch: {batch}, expected a whole number from 1 on")
    if len(seeds) not in (0, len(inputs)):
        raise MicrotomeError(f"{len(seeds)} seeds for {len(inputs)} inputs, expected one each")
    unused = {"baseline": baseline is not None and not kind.baseline, "background": background is not None}
    unused["background"] &= not isinstance(chosen, OfSplit)
    unused["bounds"] = bounds is not None and not (isinstance(chosen, Lrp) and chosen.bounded)
    if lost := [name for name, given in unused.items() if given]:
        raise MicrotomeError(f"{method} does not use `{lost[0]}`: leave it out")
    refuse_training(network)
    resolved = _target(network, inputs, target)
    if "linear" in kind.needs and not (isinstance(resolved, Logit) and resolved.link == "logit"):
        raise MicrotomeError(f"{method} explains logits, or the difference of two")
    _check_scores(network, inputs, resolved)
    if resolved.layer is not None and kind.maps == "attention":
        raise MicrotomeError(f"{method} follows attention to the logits, not to a unit of layer {resolved.layer!r}")
    if resolved.layer is not None and chosen.layer_name() == "":
        raise MicrotomeError(f"{method}: name a `layer` before {resolved.layer!r}: the default is that of the logits")
    known = Known()
    of_logits = method == "gradient_x_input" and isinstance(resolved, Logit)
    units = chosen.unit_layers()
    if inputs.ndim == 4 and (kind.maps != "image" or "layer" in kind.needs or of_logits or units):
        known = _known(network, inputs, chosen.layer_name(), kind.needs, units, resolved)
    reference = None
    if kind.baseline:
        reference = baseline if isinstance(baseline, torch.Tensor) else torch.full_like(inputs, baseline or 0.0)
        if reference.shape[-inputs.ndim + 1 :] != inputs.shape[1:] or (
            reference.ndim == inputs.ndim and len(reference) not in (1, len(inputs))
        ):
            raise MicrotomeError(f"a baseline of {tuple(reference.shape)} for inputs of {tuple(inputs.shape)}")
        reference = reference.to(inputs.device, inputs.dtype).expand_as(inputs)
    for name, values in (("baseline", reference), ("background", background)):
        if values is not None and not bool(values.isfinite().all()):
            raise MicrotomeError(f"{name}: its values are not all finite")
    if "linear" in kind.needs and not linear_in(network, _two(inputs)):
        raise MicrotomeError(f"{method}: the logits are not linear in the input")
    parted: dict[str, torch.Tensor] = {}
    if isinstance(chosen, Segmented):
        own = segments if isinstance(segments, torch.Tensor) else None
        parted = _segments(network, inputs, chosen, own, segments is None)
    elif isinstance(segments, torch.Tensor):
        raise MicrotomeError(f"{method} has no segments")
    subject = Subject(
        network,
        inputs,
        resolved,
        reference,
        batch or len(inputs),
        layers=[known.layer.name] if known.layer is not None else [],
        of_inputs=kind.shares == "inputs",
        seeds=seeds,
        one_baseline=not isinstance(baseline, torch.Tensor) or baseline.ndim < inputs.ndim or len(baseline) == 1,
        segments=parted,
        bounds=None if bounds is None else _bounds(bounds, inputs),
    )
    return FUNCTIONS[method](subject, chosen, replace(known, background=background))


def _options(method: str, options: dict[str, Any]) -> Options:
    if "networks" in options or isinstance(options.get("layer"), dict) or isinstance(options.get("layers"), dict):
        raise MicrotomeError(f"{method}: names of networks are of the configuration: give layers by their own names")
    try:
        return OPTIONS[method](**options)
    except ValidationError as error:
        raise MicrotomeError(f"{method}: {explained(error, OPTIONS[method])[0]}") from None


def _target(network: nn.Module, inputs: torch.Tensor, target: Targets) -> Target:
    """Return what is explained of each input; classes of a network that ends in a softmax have to be a `Logit`."""
    if isinstance(target, (Logit, Unit, Scalar)):
        return target
    if isinstance(target, str) and target != "predicted":
        raise MicrotomeError(f"target {target!r}: `predicted`, a class by its index, or a Logit, Unit or Scalar")
    with torch.no_grad(), one_attention_path():
        output = head_of(network(inputs.clone()))
    if output is None or output.ndim != 2:
        shape = None if output is None else tuple(output.shape)
        raise MicrotomeError(f"the network gives {shape}, expected logits (image, class): give a Unit or a Scalar")
    try:
        given = output.argmax(1) if isinstance(target, str) else torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError):
        given = torch.tensor(0.5)
    if given.is_floating_point() or given.dtype == torch.bool:
        raise MicrotomeError(f"target {target!r}: classes are integers")
    classes = given.to(torch.int64)
    classes = classes.expand(len(inputs)) if classes.ndim == 0 else classes
    if ends := normalised_by(output):
        raise MicrotomeError(
            f"the network ends in a {ends}, so it gives no logits: give `Logit(classes, link='probability', "
            f"probabilities={ends == 'softmax'})`, or `link='log_probability'`"
        )
    return Logit(classes)


def _check_scores(network: nn.Module, inputs: torch.Tensor, target: Target) -> None:
    """Refuse a network whose score of an input depends on the other inputs, or on earlier calls, or is not finite."""
    rows = torch.zeros(max(len(inputs), 2), dtype=torch.int64)
    beside = inputs if len(inputs) > 1 else torch.cat([inputs, inputs / 2])
    among = scores(network, beside, target if len(inputs) > 1 else target.at(rows))
    alone = scores(network, inputs[rows], target.at(rows))
    if not bool(among[: len(inputs)].isfinite().all()):
        raise MicrotomeError("the score that is explained is not finite (NaN or infinity): look at weights and targets")
    allowed = ALIKE[inputs.dtype == torch.float64] * max(float(among.abs().max()), float(alone.abs().max()))
    if abs(float(among[0]) - float(alone[0])) > allowed:
        raise MicrotomeError(
            "what is explained of an input depends on the other inputs of its batch, or on earlier calls, so it is no "
            "property of the input: look for statistics of the batch, and for state"
        )


def _bounds(given: Any, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bounds of inputs, like one of them; refuse bounds that the inputs do not keep."""
    try:
        low, high = (
            torch.as_tensor(each, dtype=inputs.dtype, device=inputs.device).expand_as(inputs[0]) for each in given
        )
    except (TypeError, ValueError, RuntimeError):
        raise MicrotomeError(
            f"bounds: the least and the greatest input of {tuple(inputs.shape[1:])}, or numbers"
        ) from None
    if not bool((low < high).all()) or not bool(((inputs >= low) & (inputs <= high)).all()):
        least, most = float(inputs.min()), float(inputs.max())
        raise MicrotomeError(
            f"bounds: inputs go from {least:g} to {most:g}: the first bound has to be below, the second above"
        )
    return low, high


class _Function(nn.Module):
    """Any function from inputs to scores, as a network."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found = self.function(inputs)
        if not isinstance(found, (torch.Tensor, np.ndarray)):
            raise MicrotomeError(f"the function gives {type(found).__name__}, expected scores (input, class)")
        made = torch.as_tensor(found)
        return made if made.is_floating_point() else made.to(inputs.dtype)


def _module(network: nn.Module | Callable[[torch.Tensor], Any], method: str) -> nn.Module:
    if isinstance(network, nn.Module):
        return network
    if METHODS[method].needs:
        black_boxes = ", ".join(name for name, each in METHODS.items() if not each.needs)
        raise MicrotomeError(f"{method} explains modules; these explain any function: {black_boxes}")
    return _Function(network)


def _segments(
    network: nn.Module, inputs: torch.Tensor, options: Segmented, given: torch.Tensor | None, default: bool
) -> dict[str, torch.Tensor]:
    """Return the segments of inputs by the key of their setting; none for the values of vectors and rows."""
    if given is not None:
        positions = (len(inputs), *inputs.shape[-2:]) if inputs.ndim == 4 else tuple(inputs.shape[:2])
        whole = given.expand(positions) if given.ndim == len(positions) - 1 else given
        if whole.shape != positions or whole.is_floating_point() or bool((whole < 0).any()):
            raise MicrotomeError(
                f"segments {tuple(given.shape)}, {given.dtype}: expected integers from 0 on {positions}"
            )
        return {options.segments.key: whole.to("cpu", torch.int64)}
    if inputs.ndim not in (2, 3, 4):
        raise MicrotomeError(
            f"segments are of vectors (input, value), rows (input, row, value) or images, not of {tuple(inputs.shape)}"
        )
    if inputs.ndim != 4:
        if not default:
            raise MicrotomeError(f"segments are of images (image, channel, y, x), not of inputs {tuple(inputs.shape)}")
        return {}
    patches = None
    if isinstance(options.segments, Patches):
        attention = _known(network, inputs, None, ("attention",)).attention
        assert attention is not None
        patches = (attention.layer.shape[1], attention.layer.shape[2])
    if isinstance(options.segments, Labels):
        raise MicrotomeError("segments: label maps are those of a data set: give them as a tensor (image, y, x)")
    if why := lacking(options.segments, (inputs.shape[2], inputs.shape[3])):
        raise MicrotomeError(f"segments.{why}")
    low, high = (each[:, None, None, None] for each in (inputs.flatten(1).amin(1), inputs.flatten(1).amax(1)))
    scaled = ((inputs - low) / torch.where(high > low, high - low, 1)).double().cpu().numpy()
    return {options.segments.key: torch.from_numpy(np.array(part(options.segments, scaled, None, patches)[0]))}


def _known(
    network: nn.Module,
    inputs: torch.Tensor,
    layer: str | None,
    needs: Sequence[str],
    units: Sequence[str] = (),
    target: Target | None = None,
) -> Known:
    """Return what is found of a network for a method; refuse a network without what it needs."""
    plain = copy.deepcopy(network).float()  # the survey's images are float32
    _, *shape = inputs.shape
    surveyed = survey(plain, (shape[0], shape[1], shape[2]))
    passes = ("gradient", "deconvnet", "guided_backprop", "lrp")  # the pass itself says
    asked = [need for need in needs if need not in passes]
    if asked == ["layer"] and target is not None and not isinstance(target, Logit):
        if not layer:
            raise MicrotomeError("name a `layer`: the default is found from logits, and this target is none")
        return Known(placed(network, surveyed, layer, _two(inputs), lambda: copy.deepcopy(plain)))
    found = examine(network, surveyed, _two(inputs), [layer or ""], lambda: copy.deepcopy(plain), units)
    if why := found.why_not(asked, layer):
        raise MicrotomeError(why)
    if why := next((found.refused[key] for each in units if (key := f"units:{each}") in found.refused), ""):
        raise MicrotomeError(why)
    info = found.layers[layer] if layer is not None else None
    return Known(
        info,
        found.heads.get(info.name) if info is not None else None,
        info is not None and info.name in found.linear,
        found.homogeneous,
        found.attention,
        units=tuple(found.units[each] for each in units),
    )


def _two(inputs: torch.Tensor) -> torch.Tensor:
    """Return two unlike images like the inputs."""
    noise = torch.randn((2, *inputs.shape[1:]), generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return noise.to(inputs.device, inputs.dtype)


def _function(name: str) -> Callable[..., Attribution]:
    def method(
        network: nn.Module | Callable[[torch.Tensor], Any],
        inputs: torch.Tensor,
        target: Targets = "predicted",
        **options: Any,
    ) -> Attribution:
        return explain(name, network, inputs, target, **options)

    method.__name__ = method.__qualname__ = name
    method.__doc__ = f"{FUNCTIONS[name].__doc__}\n\n    Keyword arguments are those of `explain`.\n    "
    return method


for _name in FUNCTIONS:
    globals()[_name] = _function(_name)
