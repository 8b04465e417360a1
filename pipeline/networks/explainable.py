"""What a network must have for an explanation of its decisions, and whether it has it.

The inspection asks with random weights, so that what cannot work is refused before any work; the stage asks again with
the network's own weights, on which the laws of some methods depend.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import nn

from pipeline.errors import MicrotomeError, nearest
from pipeline.networks.contributions import contributions
from pipeline.networks.fitness import Attention, Explainable, Head, Normalised, Pooling
from pipeline.networks.gradients import Logit, gradients, of_tensors, scores_through
from pipeline.networks.graph import gradient_flow
from pipeline.networks.graph.attended import Attended
from pipeline.networks.graph.call_sites import frozen
from pipeline.networks.graph.propagated import Study
from pipeline.networks.graph.rectified import Rectified, Rule
from pipeline.networks.graph.rescale import Rescale
from pipeline.networks.graph.reveal_cancel import RevealCancel
from pipeline.networks.graph.trace import forward_with
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import Survey, head_of, in_proportion, one_attention_path, to_maps
from pipeline.networks.positions import place
from pipeline.networks.relevance import no_relevance, study_of

NEEDS = (
    *("gradient", "layer", "cam", "deconvnet", "guided_backprop", "attention"),
    *("deeplift", "max_shapley", "reveal_cancel", "linear", "lrp"),
)
EXACT = 1e-4  # relative, of float32 sums in another order


def examine(
    network: nn.Module,
    survey: Survey,
    images: torch.Tensor,
    layers: Sequence[str],
    made: Callable[[], nn.Module],
    units: Sequence[str] = (),
) -> Explainable:
    """Find out what a network has of what explanations need.

    Parameters
    ----------
    images : (2, channel, y, x) different images, as the network takes them, on its device.
    layers : names of layers; "", the last one whose positions the logits depend on, is always examined.
    made : as in `positions.place`, which decides where the positions of these layers lie.
    units : names of layers whose units' relevance is wanted.
    """
    with torch.no_grad(), one_attention_path():
        logits = head_of(network(images.clone()))
    if logits is None or logits.ndim != 2 or logits.shape[1] == 0:
        shape = None if logits is None else tuple(logits.shape)
        reason = f"the network gives {shape} for {len(images)} images, expected logits (image, class)"
        return Explainable(refused=dict.fromkeys([*NEEDS, ""], reason))
    refused: dict[str, str] = {}
    if reason := _no_gradient(network, images):
        refused |= dict.fromkeys([need for need in NEEDS if need != "attention"], reason)
    target = Logit(torch.zeros(len(images), dtype=torch.int64))
    rules: tuple[Rule, ...] = ("deconvnet", "guided_backprop")
    for rule in rules:
        if rule not in refused:
            with _Refusals(refused, rule):
                gradients(network, images, target, sites=Rectified(network, rule))
    _differences(network, images, target, refused)
    found, heads, linear = {}, {}, []
    study = Study()
    if "lrp" not in refused:
        with _Refusals(refused, "lrp"):
            study = study_of(network, "cp_lrp", images)
    of_units = {}
    for name in units:
        with _Refusals(refused, f"units:{name}"):
            of_units[name] = _of_units(survey, name, study.folded)
    lively = _lively(network)
    for name in sorted({"", *layers}) if "layer" not in refused else ():
        with _Refusals(refused, f"layer:{name}"):
            own = name or _last(lively, survey, images, target, made)
            found[name] = placed(lively, survey, own, images, made)
            if not _depends(lively, found[name], images, target):
                del found[name]
                raise MicrotomeError(f"layer {own!r}: the logits do not depend on its positions: name an earlier one")
    for name, info in found.items():
        affine, head = _head(network, info, images, logits)
        if affine and info.name not in linear:
            linear.append(info.name)
        if isinstance(head, Head):
            heads[info.name] = head
        else:
            refused[f"cam:{name}"] = f"layer {info.name!r}: {head}"
    attention = None
    with _Refusals(refused, "attention"):
        attention = _attention(lively, survey, images, target, made)
    return Explainable(
        refused,
        found,
        heads,
        linear,
        _homogeneous(network, images),
        normalised_by(logits),
        attention,
        logits.shape[1],
        sum(each.shape[0] * (each.special + each.shape[1] * each.shape[2]) for each in survey.layers),
        of_units,
        [name for name, _ in network.named_modules() if name],
        list(study.linear),
        study.rectified,
    )


def _differences(network: nn.Module, images: torch.Tensor, target: Logit, refused: dict[str, str]) -> None:
    """Note why rules for differences from a reference do not hold for a network, or why it is not linear."""
    reference = torch.zeros_like(images[:1])
    if "deeplift" not in refused:
        with _Refusals(refused, "deeplift"):
            contributions(network, images, reference, target, partial(Rescale, network))
    if "max_shapley" not in refused:
        with _Refusals(refused, "max_shapley"):
            scores_through(network, images, target, Rescale(network, len(images), "shapley"), len(images))
    if "reveal_cancel" not in refused:
        with _Refusals(refused, "reveal_cancel"):
            contributions(network, images, reference, target, partial(RevealCancel, network, reference=reference))
    if "linear" not in refused and not linear_in(network, images):
        refused["linear"] = "the logits are not linear in the input"


def linear_in(network: nn.Module, images: torch.Tensor) -> bool:
    """Return whether the logits are linear in the input, but for a constant: judged by sums of two images."""
    first, second = images[:1], images[1:2]
    with torch.no_grad(), one_attention_path():
        given = torch.cat([first, second, first + second, -2 * first, 0 * first])
        made = head_of(network(given))
    if made is None:
        return False
    a, b, both, turned, none = made.double()
    scale = EXACT * made.double().abs().max()
    return bool(max((a + b - both - none).abs().max(), (turned + 2 * a - 3 * none).abs().max()) <= scale)


def _of_units(survey: Survey, name: str, folded: Set[str]) -> LayerInfo:
    """Return a layer that has units, and a relevance of its own."""
    known = {layer.name: layer for layer in survey.layers}
    if name not in known:
        reason = survey.refused.get(name)
        raise MicrotomeError(f"layer {name!r} {reason}" if reason else f"no layer {name!r}{nearest(name, known)}")
    if name in folded:
        raise MicrotomeError(no_relevance(name))
    return known[name]


def normalised_by(logits: torch.Tensor) -> Normalised:
    """Return whether a network's outputs (image, class) are those of a softmax, or of its logarithm."""
    if logits.shape[1] < 2:
        return ""
    if bool((logits >= 0).all() and ((logits.sum(1) - 1).abs() < EXACT).all()):
        return "softmax"
    return "log_softmax" if bool((logits.logsumexp(1).abs() < EXACT).all()) else ""


def _lively(network: nn.Module) -> nn.Module:
    """Return a network whose matrices are not all zeros: a head that begins so hides all before it."""
    if all(bool(value.any()) for value in network.parameters() if value.ndim > 1 and value.is_floating_point()):
        return network
    copied = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    for value in copied.parameters():
        if value.ndim > 1 and value.is_floating_point() and not bool(value.any()):
            value.data.copy_(0.02 * torch.randn(value.shape, generator=generator))
    return copied


class _Refusals:
    """Note an error as the reason why a need is not met: what was asked of the network may be no more than possible."""

    def __init__(self, refused: dict[str, str], need: str) -> None:
        self.refused, self.need = refused, need

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, torch.OutOfMemoryError) or not isinstance(
            error, (MicrotomeError, RuntimeError, TypeError)
        ):
            return False
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        self.refused.setdefault(self.need, str(error) if isinstance(error, MicrotomeError) else f"it fails: {said}")
        return True


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


def placed(
    network: nn.Module, survey: Survey, name: str, images: torch.Tensor, made: Callable[[], nn.Module]
) -> LayerInfo:
    """Return a layer once it is known where its positions lie; refuse one that has none, or in another order.

    Arguments are those of `examine`.
    """

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
        # Heads of attention apart, (head, token, unit), look like maps of another shape.
        if in_proportion(info.shape[1:], survey.image) and _depends(network, info, images, target):
            try:
                placed(network, survey, info.name, images, made)
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


def _head(network: nn.Module, info: LayerInfo, images: torch.Tensor, logits: torch.Tensor) -> tuple[bool, Head | str]:
    """Return whether the logits are linear in a layer's output, and how they are computed from it if by a CAM's head.

    They are linear if the gradient is the same for different images, and so are the logits with zeros at the layer's
    positions: nothing goes around it. After global pooling the gradient is the same at all positions, and the rows of
    the linear map's weight are the gradient, times the positions under mean pooling.
    """
    classes = logits.shape[1]
    reason = "global mean or sum pooling and one linear map do not end the network after it"
    found = []
    for cls in range(min(2, classes)):
        target = Logit(torch.full((len(images),), cls))
        try:
            slope = gradients(network, images, target, [info.name], of_inputs=False).layers[info.name][1]
        except MicrotomeError:
            return False, reason
        if not _close(slope[0], slope[1]):
            return False, reason
        found.append(to_maps(slope, info)[0][0])
    with torch.no_grad():
        rest = forward_with(network, info.name, images.clone(), partial(without_positions, info=info))
    if not torch.allclose(rest[:1], rest[1:], atol=EXACT * float(logits.abs().max())):
        return False, reason
    if not all(_close(each, each.mean((1, 2), keepdim=True).expand_as(each)) for each in found):
        return True, reason
    slopes = torch.stack([each.mean((1, 2)) for each in found])
    positions = info.shape[1] * info.shape[2]
    poolings: tuple[tuple[Pooling, int], ...] = (("mean", positions), ("sum", 1))
    for name, module in network.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or module.weight.flatten(1).shape[1] != info.shape[0]:
            continue
        rows = module.weight.detach().flatten(1)
        for pooling, factor in poolings:
            if len(rows) == classes and _close(rows[: len(slopes)], slopes * factor):
                return True, Head(name, pooling)
    return True, reason


def without_positions(output: torch.Tensor, info: LayerInfo) -> torch.Tensor:
    """Return a layer's output with zeros at its positions; special tokens stay."""
    changed = output.clone()
    to_maps(changed, info)[0].zero_()
    return changed


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
) -> Attention:
    """Return where attention runs; refuse weights that depend on other images, and tokens that lie nowhere."""
    weights = _weights(network, images, target)
    for at in range(len(images)):
        alone = _weights(network, images[at : at + 1], target.at(torch.tensor([at])))
        if not all(torch.allclose(a[at : at + 1], b, atol=1e-5) for a, b in zip(weights, alone, strict=True)):
            raise MicrotomeError("attention: its weights of an image depend on the other images, or on their order")
    tokens = weights[0].shape[-1]
    layers = [each for each in survey.layers if each.spatial and _tokens(each) == tokens and each.layout != "map"]
    if not layers:
        raise MicrotomeError(f"attention: no layer says where its {tokens} tokens lie in the image")
    info = placed(network, survey, layers[-1].name, images, made)
    slope = gradients(network, images, target, [info.name], of_inputs=False).layers[info.name][1]
    by_token = slope.reshape(len(slope), tokens, -1).abs().amax((0, 2))
    return Attention(info, tuple(by_token.nonzero()[:, 0].tolist()))


def _tokens(info: LayerInfo) -> int:
    return info.shape[1] * info.shape[2] + info.special


def _weights(network: nn.Module, images: torch.Tensor, target: Logit) -> list[torch.Tensor]:
    """Return the attention weights of every block, (image, head, query, key)."""
    sites = Attended(network, len(images))
    return of_tensors(network, images, target, sites, sites.checked, wanted=False)[0]
