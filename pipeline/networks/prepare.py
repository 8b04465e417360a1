"""The properties of a network that no image determines: layers, ids, scales, and the memory of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.networks import Network
from pipeline.networks.forward import Model, loaded, network_of, normalise, platform_numerics, scale_for
from pipeline.networks.layer import LayerInfo


@dataclass(frozen=True)
class Prepared:
    """The properties of a network that no image determines.

    Layers in order with id and scale, classes (None: it has no head), and numerics.
    """

    layers: list[tuple[str, LayerInfo, float]]
    classes: int | None
    numerics: dict[str, Any]
    parameters: int
    largest: int  # values of the largest output of any module, for one image


def prepare(
    model: Model, size: tuple[int, int], layers: str | Sequence[str], special_tokens: int | None, version: int
) -> Prepared:
    """Load the network, resolve its layers, compute their ids, and find each layer's scale. Runs on a worker.

    The scale comes from a forward pass over fixed noise, so it depends on the layer alone and not on the images.
    """
    import torch

    from pipeline.networks.layer_id import layer_ids
    from pipeline.networks.layers import Recorder, choose, classes_of, survey

    spec = model.spec
    shape = (spec.preprocessing.channels, *size)
    as_loaded = loaded(model)
    surveyed = survey(as_loaded, shape, special_tokens)
    infos = choose(as_loaded, surveyed, layers, model.name)
    numerics = spec.numerics.model_dump() | platform_numerics(version)
    preprocessing = spec.preprocessing.model_dump() | {"size": list(size)}
    ids = layer_ids(as_loaded, infos, preprocessing, numerics, shape)
    noise = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with Recorder(network_of(model), ids) as record:
        logits, outputs = record(normalise(noise, spec))
    described = [
        (ids[info.name], info, scale_for(float(outputs[info.name].abs().amax()), headroom=True)) for info in infos
    ]
    parameters = sum(parameter.numel() for parameter in as_loaded.parameters())
    return Prepared(described, classes_of(as_loaded, logits), numerics, parameters, surveyed.largest)


def forward_need(prepared: Prepared, spec: Network, size: tuple[int, int]) -> int:
    """Return the bytes of a forward pass of one micro-batch: weights, an operation's input, output and workspace."""
    pixels = 3 * size[0] * size[1]
    return 3 * 4 * prepared.parameters + 4 * spec.numerics.micro_batch * (pixels + 4 * prepared.largest)
