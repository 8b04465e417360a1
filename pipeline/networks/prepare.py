"""The properties of a network that no image determines: layers, their ids, and the memory of a forward pass."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.config.networks import GeneratorNetwork, Network
from pipeline.networks.forward import Model
from pipeline.networks.layer import LayerInfo, Misplaced

if TYPE_CHECKING:
    from torch import nn

    from pipeline.networks.layers import Survey


@dataclass(frozen=True)
class Prepared:
    """What every stage knows of a network before any image.

    Attributes
    ----------
    layers : the wanted ones, in execution order.
    parameters : how many.
    largest : values of the largest output of any module, for one image.
    misplaced : those of the layers whose positions are not where they seem.
    """

    layers: list[LayerInfo]
    parameters: int
    largest: int
    misplaced: list[Misplaced] = field(default_factory=list, kw_only=True)


def survey_of(network: nn.Module, model: Model, size: tuple[int, int]) -> Survey:
    """Return what one forward pass of an image of this size shows."""
    from pipeline.networks.layers import survey

    of_generator = size if isinstance(model.spec, GeneratorNetwork) else None
    return survey(network, input_shape(model.spec, size), model.spec.reading, of_generator)


def input_shape(spec: Network, size: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of a network's input for images of a size: (channels, height, width), or a latent's."""
    return tuple(spec.latent.shape) if isinstance(spec, GeneratorNetwork) else (spec.preprocessing.channels, *size)


def prepare(
    network: nn.Module,
    model: Model,
    survey: Survey,
    layers: str | Sequence[str],
    strict: bool = True,
    others: Sequence[str] = (),
) -> Prepared:
    """Choose the layers of a network that was surveyed, decide how they are read, and measure it. Runs on a worker.

    Parameters
    ----------
    strict : refuse layers whose positions are not where they seem; else they are `misplaced`.
    others : names of further layers of the survey whose reading matters; never refused.
    """
    from pipeline.networks.build import build
    from pipeline.networks.layers import choose
    from pipeline.networks.positions import place

    shape = model.spec.preprocessing.channels, *survey.image
    made = functools.cache(lambda: build(model.spec))
    placed = not isinstance(model.spec, GeneratorNetwork)
    if placed:
        place(network, survey, [layers], shape, model.name, made, strict=strict)
    infos = choose(network, survey, layers, model.name)
    rest = [layer.name for layer in survey.layers if layer.name in others and layer not in infos]
    if rest and placed:
        place(network, survey, [rest], shape, model.name, made, strict=False)
    misplaced = [survey.misplaced[info.name] for info in infos if info.name in survey.misplaced]
    parameters = sum(each.numel() for each in network.parameters())
    return Prepared(infos, parameters, survey.largest, misplaced=misplaced)


def ids_of(
    network: nn.Module,
    model: Model,
    size: tuple[int, int],
    layers: Sequence[LayerInfo],
    numerics: Mapping[str, Any],
) -> dict[str, str]:
    """Return the id of each layer by name: the digest of all that its output depends on beside the image."""
    from pipeline.networks.layer_id import layer_ids

    preprocessing = model.spec.preprocessing.model_dump() | {"size": list(size)}
    return layer_ids(network, layers, preprocessing, dict(numerics), input_shape(model.spec, size))


def forward_need(prepared: Prepared, spec: Network, size: tuple[int, int]) -> int:
    """Return the bytes of a forward pass of one micro-batch: weights, an operation's input, output and workspace."""
    pixels = 3 * size[0] * size[1]
    return 3 * 4 * prepared.parameters + 4 * spec.numerics.micro_batch * (pixels + 4 * prepared.largest)
