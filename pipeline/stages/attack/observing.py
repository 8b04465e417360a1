"""The units of a layer before and after an attack: their peaks, and the maps of what changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from kernels.attacks import losses
from kernels.attacks.rounding import noise
from pipeline.config.networks import Network
from pipeline.errors import MicrotomeError
from pipeline.networks.forward import normalise
from pipeline.networks.gradients import Scalar, scores
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import Recorder, first_tensor, replaced, to_maps
from pipeline.stages.attack.results import IMPORTANT


@dataclass(frozen=True)
class Shown:
    """Rows of images, before and after attacks.

    Attributes
    ----------
    pixels : uint8 (row, channel, y, x). attacked : the same by attack.
    sources : (row,) the class before. ends : by attack, (row,) the target, or the class after it.
    seeds : of each row's noise.
    """

    pixels: torch.Tensor
    attacked: Mapping[str, torch.Tensor]
    sources: np.ndarray
    ends: Mapping[str, np.ndarray]
    seeds: Sequence[list[int]]

    def at(self, rows: torch.Tensor) -> Shown:
        """Return some rows, which may repeat."""
        places = rows.numpy()
        return Shown(
            self.pixels[rows],
            {name: values[rows] for name, values in self.attacked.items()},
            self.sources[places],
            {name: values[places] for name, values in self.ends.items()},
            [self.seeds[row] for row in places],
        )


def observe_rows(
    network: nn.Module,
    spec: Network,
    twin: nn.Module | None,
    twin_spec: Network | None,
    info: LayerInfo,
    order: np.ndarray,
    shown: Shown,
) -> dict[str, dict[str, np.ndarray]]:
    """Return the arrays of a store of units for each attack, a row each.

    Parameters
    ----------
    twin : the untrained network, of the same architecture. order : (class, rank) the units that matter most; -1: none.
    """
    logits, before = _seen(network, spec, info, shown.pixels)
    sources = torch.from_numpy(shown.sources).to(logits.device)
    important = order[shown.sources, :IMPORTANT]
    without = _without(network, spec, info, shown.pixels, important)
    unknown = torch.from_numpy((important < 0).all(1)).to(logits.device)
    clean = {
        "peak": _peaks(before),
        "margin_before": _array(losses.margin(logits, sources)),
        "margin_without": _array(losses.margin(without, sources).masked_fill(unknown, torch.nan)),
    }
    if twin is not None and twin_spec is not None:
        clean["peak_untrained"] = _peaks(_seen(twin, twin_spec, info, shown.pixels)[1])
    found = {}
    for name, images in shown.attacked.items():
        _, after = _seen(network, spec, info, images)
        drawn = noise(shown.pixels, images, list(shown.seeds))
        _, noisy = _seen(network, spec, info, drawn)
        units = np.concatenate([important, order[shown.ends[name], :IMPORTANT]], 1)
        own = clean | {
            "peak_attacked": _peaks(after),
            "peak_noise": _peaks(noisy),
            "change": _change(before, after, units),
        }
        if twin is not None and twin_spec is not None:
            own["peak_attacked_untrained"] = _peaks(_seen(twin, twin_spec, info, images)[1])
        found[name] = own
    return found


def _seen(
    network: nn.Module, spec: Network, info: LayerInfo, pixels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and the layer's maps (image, unit, y, x)."""
    with Recorder(network, [info.name]) as record:
        logits, outputs = record(normalise(pixels, spec))
    if logits is None:
        raise MicrotomeError(f"the network gives no logits beside layer {info.name!r}")
    return logits, to_maps(outputs[info.name], info)[0]


def _without(
    network: nn.Module, spec: Network, info: LayerInfo, pixels: torch.Tensor, units: np.ndarray
) -> torch.Tensor:
    """Return the logits with some units of each image 0 at every position, and in special tokens."""
    kept = torch.ones((len(pixels), info.shape[0]))
    for row, own in enumerate(units):
        kept[row, own[own >= 0]] = 0
    with _masked(network, info, kept):
        return scores(network, normalise(pixels, spec), Scalar(lambda output: output))


@contextmanager
def _masked(network: nn.Module, info: LayerInfo, kept: torch.Tensor) -> Iterator[None]:
    """Multiply the units of a layer's output by (image, unit)."""

    def hook(module: nn.Module, _: object, output: Any) -> Any:
        tensor = first_tensor(output)
        assert tensor is not None
        last = info.layout in ("tokens", "channels_last")
        shape = [len(tensor), *[1] * (tensor.ndim - 1)]
        shape[-1 if last else 1] = info.shape[0]
        return replaced(output, tensor, tensor * kept.to(tensor).view(shape))

    handle = network.get_submodule(info.name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _peaks(maps: torch.Tensor) -> np.ndarray:
    """Return the highest value of each unit over all positions, float32 (image, unit)."""
    return _array(maps.flatten(2).amax(2).float())


def _change(before: torch.Tensor, after: torch.Tensor, units: np.ndarray) -> np.ndarray:
    """Return what changes in the maps of some units of each image, float32 (image, ranked, y, x); NaN for unit -1."""
    rows = torch.arange(len(units), device=before.device)[:, None]
    chosen = torch.from_numpy(units).to(before.device)
    change = (after[rows, chosen.clamp_min(0)] - before[rows, chosen.clamp_min(0)]).float()
    return _array(change.masked_fill((chosen < 0)[:, :, None, None], torch.nan))


def _array(values: torch.Tensor) -> np.ndarray:
    return values.cpu().numpy()
