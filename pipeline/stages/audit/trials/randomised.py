"""Compare a method's maps with those of the network without what it learnt."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from kernels.attribution.agreement import rank_correlation
from kernels.audit.structure import scaled, ssim
from pipeline.errors import MicrotomeError, nearest
from pipeline.stages.audit.batch import Batch
from pipeline.stages.audit.sanity import LabelRandomisation, LayerRandomisation


def layer_randomisation(batch: Batch, options: LayerRandomisation) -> dict[str, np.ndarray]:
    """Give layers the state of the untrained network, and compare the maps with those of the trained one.

    A cascade ends as the untrained network. A step is a group of modules that have weights or statistics of their own,
    in the order in which the network registers them; BatchNorm takes the statistics with the weights.
    """
    if batch.untrained is None:
        raise MicrotomeError(f"network {batch.model.name!r} is not trained: there is nothing to forget")
    groups = parts_of(batch.network, options)
    found = {}
    for order in options.orders:
        steps = []
        changed = copy.deepcopy(batch.network)
        for group in groups:
            if order == "independent":
                changed = copy.deepcopy(batch.network)
            forget(changed, batch.untrained, group)
            steps.append(alike(batch.maps, batch.explain(network=changed)))
        for way in steps[0]:
            found[f"{order}_{way}"] = np.full((len(batch.pixels), len(options.steps)), np.nan)
            found[f"{order}_{way}"][:, : len(steps)] = np.stack([step[way] for step in steps], 1)
    return found


def label_randomisation(batch: Batch, options: LabelRandomisation) -> dict[str, np.ndarray]:
    """Compare the maps with those of a network that was trained on random labels, of the same class."""
    other = batch.network_of(options.network)
    own, theirs = ({name: tuple(each.shape) for name, each in one.named_parameters()} for one in (batch.network, other))
    if own != theirs:
        raise MicrotomeError(
            f"network {options.network!r} has other weights than {batch.model.name!r}: the check compares networks of "
            f"one architecture"
        )
    return alike(batch.maps, batch.explain(network=other))


def alike(one: np.ndarray | None, other: np.ndarray) -> dict[str, np.ndarray]:
    """Return how alike two maps (image, y, x) are, (image,) by way; NaN where one is constant."""
    assert one is not None
    a, b = (np.asarray(each, np.float64) for each in (one, other))
    flat = [each.reshape(len(each), -1) for each in (a, b)]
    return {
        "rank": rank_correlation(*flat),
        "magnitude_rank": rank_correlation(*map(np.abs, flat)),
        "ssim": ssim(scaled(np.abs(a)), scaled(np.abs(b))),
    }


def parts_of(network: nn.Module, options: LayerRandomisation) -> list[list[str]]:
    """Return the modules of each step, from the output to the input, that have weights or statistics of their own."""
    own = [name for name, module in network.named_modules() if _state(module)]
    if options.layers is None:
        count = min(options.groups, len(own))
        return [part.tolist() for part in np.array_split(np.array(own[::-1], object), count)]
    parts = []
    for layer in options.layers:
        inside = [name for name in own if name == layer or name.startswith(f"{layer}.")]
        if not inside:
            raise MicrotomeError(f"layers: no module {layer!r} with weights{nearest(layer, own)}")
        parts.append(inside)
    return parts


def forget(network: nn.Module, untrained: nn.Module, modules: Sequence[str]) -> None:
    """Give modules the state that they have in the untrained network."""
    with torch.no_grad():
        for name in modules:
            new = _state(untrained.get_submodule(name))
            for key, value in _state(network.get_submodule(name)).items():
                value.copy_(new[key])


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a module itself."""
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
