"""What a network must have for an explanation of its decisions, and whether it has it.

The inspection asks with random weights, so that what cannot work is refused before any work; the stage asks again with
the network's own weights, on which the laws of some methods depend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from pipeline.errors import MicrotomeError, nearest
from pipeline.networks.gradients import Logit, gradients
from pipeline.networks.graph import gradient_flow
from pipeline.networks.graph.attended import Attended
from pipeline.networks.graph.call_sites import frozen
from pipeline.networks.graph.rectified import Rectified, Rule
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import Survey, head_of, one_attention_path, to_maps
from pipeline.networks.positions import place

Pooling = Literal["mean", "sum"]
NEEDS = ("gradient", "layer", "cam", "deconvnet", "guided_backprop", "attention")
EXACT = 1e-4  # relative, of float32 sums in another order


@dataclass(frozen=True)
class Head:
    """Global pooling and one linear map, which end a network after a layer: the map's module, and the pooling."""

    module: str
    pooling: Pooling


@dataclass(frozen=True)
class Explainable:
    """What was found.

    Attributes
    ----------
    refused : of a need that the network does not meet, why: a sentence. That of a layer is by request, as `layer:NAME`
        ("": the default), that of a CAM's head likewise, as `cam:NAME`; `""` is what refuses all.
    layers : the layer of each request, by the request.
    heads : of a layer after which pooling and one linear map end the network. linear : the layers after which the
        logits are linear in its output.
    homogeneous : whether a doubled input doubles the logits: piecewise linear, without biases.
    probabilities : whether the network ends in softmax.
    attention : a layer with the tokens that attention runs over, if there is attention.
    classes : logits of an image. values : of all outputs of layers, for an image.
    """

    refused: dict[str, str] = field(default_factory=dict)
    layers: dict[str, LayerInfo] = field(default_factory=dict)
    heads: dict[str, Head] = field(default_factory=dict)
    linear: list[str] = field(default_factory=list)
    homogeneous: bool = False
    probabilities: bool = False
    attention: LayerInfo | None = None
    classes: int = 0
    values: int = 0

    def why_not(self, needs: Sequence[str], request: str | None) -> str:
        """Return why a method with these needs, and a layer of this request, does not apply; empty if it does."""
        keys = ["", *needs, *(f"{need}:{request or ''}" for need in needs)]
        return next((self.refused[key] for key in keys if key in self.refused), "")

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def read(answer: Mapping[str, Any]) -> Explainable:
        """Return what `json` gave; nothing was asked, or could be, where the answer is empty."""
        if not answer:
            return Explainable()
        layers = {name: _layer(each) for name, each in answer["layers"].items()}
        heads = {name: Head(**each) for name, each in answer["heads"].items()}
        attention = None if answer["attention"] is None else _layer(answer["attention"])
        return Explainable(**{**answer, "layers": layers, "heads": heads, "attention": attention})


def _layer(told: Mapping[str, Any]) -> LayerInfo:
    return LayerInfo(**{**told, "shape": tuple(told["shape"])})


def examine(
    network: nn.Module,
    survey: Survey,
    images: torch.Tensor,
    layers: Sequence[str],
    made: Callable[[], nn.Module],
) -> Explainable:
    """Find out what a network has of what explanations need.

    Parameters
    ----------
    images : (2, channel, y, x) unlike images, as the network takes them, on its device.
    layers : names of layers, "" for the last one whose positions the logits depend on.
    made : as in `positions.place`, which decides where the positions of these layers lie.
    """
    with torch.no_grad(), one_attention_path():
        logits = head_of(network(images))
    if logits is None or logits.ndim != 2 or logits.shape[1] == 0:
        shape = None if logits is None else tuple(logits.shape)
        reason = f"the network gives {shape} for {len(images)} images, expected logits (image, class)"
        return Explainable(refused=dict.fromkeys([*NEEDS, ""], reason))
    refused: dict[str, str] = {}
    if reason := _no_gradient(network, images):
        refused |= dict.fromkeys([need for need in NEEDS if need != "attention"], reason)
    target = Logit(torch.zeros(len(images), dtype=torch.int64))
    rules: tuple[Rule, ...] = ("deconvnet", "guided_backprop")
    for need in rules:
        if need not in refused:
            with _Refusals(refused, need):
                gradients(network, images, target, sites=Rectified(network, need))
    found: dict[str, LayerInfo] = {}
    if "layer" not in refused:
        for wanted in layers:
            with _Refusals(refused, f"layer:{wanted}"):
                named = wanted or _last(network, survey, images, target, made)
                found[wanted] = _placed(network, survey, named, images, made)
    heads, linear = {}, []
    for wanted, info in found.items():
        affine, head = _head(network, info, images)
        linear += [info.name] if affine else []
        if isinstance(head, Head):
            heads[info.name] = head
        else:
            refused[f"cam:{wanted}"] = f"layer {info.name!r}: {head}"
    attention = None
    if "attention" not in refused:
        with _Refusals(refused, "attention"):
            attention = _attention(network, survey, images, target, made)
    return Explainable(
        refused,
        found,
        heads,
        linear,
        _homogeneous(network, images),
        bool((logits >= 0).all() and ((logits.sum(1) - 1).abs() < EXACT).all() and logits.shape[1] > 1),
        attention,
        logits.shape[1],
        sum(each.shape[0] * (each.special + each.shape[1] * each.shape[2]) for each in survey.layers),
    )


class _Refusals:
    """Note an error as the reason why a need is not met."""

    def __init__(self, refused: dict[str, str], need: str) -> None:
        self.refused, self.need = refused, need

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, MicrotomeError):
            self.refused.setdefault(self.need, str(error))
            return True
        return False


def _no_gradient(network: nn.Module, images: torch.Tensor) -> str:
    """Return why not all of the gradient of the logits reaches the images; empty if it does."""
    try:
        with frozen(network):
            notes = gradient_flow.ends(network, images, [""])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"the network fails when it runs with gradients: {str(error).splitlines()[0]}"
    return notes.get("", "")


def _placed(
    network: nn.Module, survey: Survey, name: str, images: torch.Tensor, made: Callable[[], nn.Module]
) -> LayerInfo:
    """Return a layer once it is known where its positions lie; refuse one that has none, or in another order."""

    def known() -> dict[str, LayerInfo]:
        return {layer.name: layer for layer in survey.layers}

    if name in known():
        _, channels, height, width = images.shape
        place(network, survey, [[name]], (channels, height, width), name, made, every=True, strict=False)
    if name not in known():
        reason = survey.refused.get(name)
        raise MicrotomeError(f"layer {name!r} {reason}" if reason else f"no layer {name!r}{nearest(name, known())}")
    if name in survey.misplaced:
        raise MicrotomeError(f"layer {name!r} {survey.misplaced[name].reason}")
    if not known()[name].spatial:
        raise MicrotomeError(f"layer {name!r} has one position, and a map needs several: name an earlier one")
    return known()[name]


def _last(
    network: nn.Module, survey: Survey, images: torch.Tensor, target: Logit, made: Callable[[], nn.Module]
) -> str:
    """Return the last layer whose positions the logits depend on: after it, a class token may be all that is read.

    Linear maps within a block, such as queries and keys, stand for no layer of their own.
    """
    for info in reversed([layer for layer in survey.layers if layer.spatial and layer.kind != "Linear"]):
        if _depends(network, info, images, target):
            try:
                _placed(network, survey, info.name, images, made)
            except MicrotomeError:
                continue
            return info.name
    raise MicrotomeError("none of its layers has more than one position that the logits depend on")


def _depends(network: nn.Module, info: LayerInfo, images: torch.Tensor, target: Logit) -> bool:
    try:
        found = gradients(network, images, target, [info.name], of_inputs=False)
    except MicrotomeError:
        return False
    maps, _ = to_maps(found.layers[info.name][1], info)
    return bool(maps.any())


def _head(network: nn.Module, info: LayerInfo, images: torch.Tensor) -> tuple[bool, Head | str]:
    """Return whether the logits are linear in a layer's output, and how they are computed from it if by a CAM's head.

    They are linear if the gradient is the same for unlike images. After global pooling it is the same at all positions,
    and the rows of the linear map's weight are the gradient, times the positions under mean pooling.
    """
    reason = "global mean or sum pooling and one linear map do not end the network after it"
    found = []
    for cls in (0, 1):
        target = Logit(torch.full((len(images),), cls))
        try:
            slope = gradients(network, images, target, [info.name], of_inputs=False).layers[info.name][1]
        except (MicrotomeError, IndexError, RuntimeError):
            return False, reason
        if not _close(slope[0], slope[1]):
            return False, reason
        found.append(to_maps(slope, info)[0][0])
    if not all(_close(each, each.mean((1, 2), keepdim=True).expand_as(each)) for each in found):
        return True, reason
    slopes = torch.stack([each.mean((1, 2)) for each in found])
    positions = info.shape[1] * info.shape[2]
    for name, module in network.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or module.weight.flatten(1).shape[1] != info.shape[0]:
            continue
        rows = module.weight.detach().flatten(1)[:2]
        for pooling, factor in (("mean", positions), ("sum", 1)):
            if rows.shape == slopes.shape and _close(rows, slopes * factor):
                return True, Head(name, pooling)  # type: ignore[arg-type]
    return True, reason


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= EXACT * torch.maximum(a.abs().max(), b.abs().max()))


def _homogeneous(network: nn.Module, images: torch.Tensor) -> bool:
    with torch.no_grad(), one_attention_path():
        once, twice, nothing = (head_of(network(factor * images)) for factor in (1, 2, 0))
    if once is None or twice is None or nothing is None:
        return False
    scale = EXACT * once.abs().max()
    return bool((twice - 2 * once).abs().max() <= scale and nothing.abs().max() <= scale)


def _attention(
    network: nn.Module, survey: Survey, images: torch.Tensor, target: Logit, made: Callable[[], nn.Module]
) -> LayerInfo:
    """Return a layer with the tokens that attention runs over; refuse weights that are not of the images in order."""
    weights = attention_of(network, images, target)
    for at in range(len(images)):
        alone = attention_of(network, images[at : at + 1], target)
        if not all(torch.allclose(a[at : at + 1], b, atol=1e-5) for a, b in zip(weights, alone, strict=True)):
            raise MicrotomeError("attention: its weights of an image depend on the other images, or on their order")
    tokens = weights[0].shape[-1]
    for info in reversed(survey.layers):
        if info.spatial and info.shape[1] * info.shape[2] + info.special == tokens:
            return _placed(network, survey, info.name, images, made)
    raise MicrotomeError(f"attention: no layer says where its {tokens} tokens lie in the image")


def attention_of(network: nn.Module, images: torch.Tensor, target: Logit) -> list[torch.Tensor]:
    """Return the attention weights of every block, (image, head, query, key)."""
    sites = Attended(network, len(images))
    with frozen(network), torch.enable_grad(), sites:
        network(images.detach().requires_grad_().clone())
    return [each.detach() for each in sites.checked()]
