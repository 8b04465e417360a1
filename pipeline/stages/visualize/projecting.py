"""Projections of single activations back to the pixels, cropped to what they can depend on.

Zeiler and Fergus, "Visualizing and understanding convolutional networks" (ECCV 2014), section 2.1: all other
activations of the layer are set to zero, and the one that stays is sent back. Springenberg et al., "Striving for
simplicity" (ICLR workshop 2015), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pipeline.errors import MicrotomeError
from pipeline.networks.gradients import Target, gradients, in_chunks, padded
from pipeline.networks.graph.call_sites import Call, CallSites, UnsupportedError, Vouched, argument
from pipeline.networks.graph.reach import Reach, Window
from pipeline.networks.graph.rectified import MAX_POOLS, Rectified
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import Recorder, to_maps
from pipeline.stages.visualize.settings import UNSWITCHED, Rule
from pipeline.stages.visualize.subject import Single

OUTSIDE = 1e-3
"""Share of a projection's magnitude that may lie beyond the receptive field: fast convolutions round so."""


class Spread(Vouched):
    """Compute the max pooling of x, and send each value back evenly over its window, within the image."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        kernel: Any,
        stride: Any,
        padding: Any,
        ceil_mode: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.pooling = kernel, stride, padding, ceil_mode
        return functional.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)

    @staticmethod
    def backward(ctx: Any, *relevance: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (x,), (kernel, stride, padding, ceil_mode) = ctx.saved_tensors, ctx.pooling
        with torch.enable_grad():
            given = torch.zeros_like(x).requires_grad_()
            mean = functional.avg_pool2d(given, kernel, stride, padding, ceil_mode, count_include_pad=False)
        (found,) = torch.autograd.grad(mean, given, relevance)
        return found, None, None, None, None


class Ruled(Rectified):
    """The rules of deconvnet or guided backpropagation, with or without the switches of max pooling.

    Without them, what max pooling gets is spread evenly over its windows: the image decides less of the projection.
    """

    def __init__(self, network: nn.Module, rule: Rule) -> None:
        plain: Any = rule.removesuffix(UNSWITCHED)
        super().__init__(network, plain)
        self.switches = plain == rule
        self.pools = 0

    def rule(self, call: Call) -> Any:
        if self.switches or call.name not in MAX_POOLS:
            return super().rule(call)
        names = "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"
        defaults = None, None, 0, 1, False, False
        kernel, stride, padding, dilation, ceil_mode, indices = (
            argument(call, 1 + at, *each) for at, each in enumerate(zip(names, defaults, strict=True))
        )
        if call.name != "max_pool2d" or dilation not in (1, (1, 1), [1, 1]) or indices:
            raise self.refusal(call.name, "is no plain max_pool2d, and has no form without switches")
        self.pools += 1
        given = call.args[0] if call.args else call.kwargs["input"]
        return Spread.apply(given, kernel, stride, padding, ceil_mode)

    def audit(self, output: torch.Tensor) -> None:
        super().audit(output)
        if not self.switches and not self.pools:
            raise UnsupportedError(
                f"{self.method} without switches: the network calls no max pooling, so there are none to leave out"
            )


class Partly(Ruled):
    """The same for a part of a network, before whose end there may be no ReLU or max pooling.

    Without a ReLU, they are the gradient.
    """

    def audit(self, output: torch.Tensor) -> None:
        CallSites.audit(self, output)


@dataclass(frozen=True)
class Projected:
    """Projections of units on images, a row for each pair.

    Attributes
    ----------
    value : (row,) the activation. position : (row, 2). field : (row, 4) top, left, bottom, right.
    maps : (row, method, channel, y, x) float32, of the size of the crop; 0 beyond the field.
    """

    value: np.ndarray
    position: np.ndarray
    field: np.ndarray
    maps: np.ndarray


def strongest(
    network: nn.Module, inputs: torch.Tensor, info: LayerInfo, units: torch.Tensor, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's highest value of its unit, (row,), and the first position (y, x) that has it, (row, 2)."""
    values, places = [], []
    for start, stop in in_chunks(len(inputs), batch):
        with Recorder(network, [info.name], stop_early=True) as record:
            _, outputs = record(padded(inputs[start:stop], batch))
        maps = to_maps(outputs[info.name], info)[0][: stop - start]
        flat = maps[torch.arange(len(maps)), units[start:stop].to(maps.device)].flatten(1).float().cpu().numpy()
        at = flat.argmax(1)
        values.append(flat[np.arange(len(flat)), at])
        places.append(np.stack(np.unravel_index(at, maps.shape[2:]), 1))
    return np.concatenate(values), np.concatenate(places)


def project(
    network: nn.Module,
    inputs: torch.Tensor,
    info: LayerInfo,
    units: torch.Tensor,
    reach: Reach,
    methods: Sequence[Rule],
    crop: tuple[int, int],
    batch: int,
) -> Projected:
    """Project the strongest activation of a unit of each row.

    Parameters
    ----------
    inputs : (row, channel, y, x), as the network takes them. units : int64 (row,).
    reach : what a position depends on. crop : (y, x) of the maps. batch : rows of a pass; other sizes round otherwise.
    """
    value, position = strongest(network, inputs, info, units, batch)
    target = Single(info, units, torch.from_numpy(position))
    size = (int(inputs.shape[2]), int(inputs.shape[3]))
    found = {rule: back(network, inputs, target, rule, batch) for rule in methods}
    support = found.get("gradient")
    if reach == "unknown" and support is None:
        support = back(network, inputs, target, "gradient", batch)
    field = np.zeros((len(inputs), 4), np.int64)
    for row in range(len(inputs)):
        if isinstance(reach, Window):
            field[row] = reach.box((int(position[row, 0]), int(position[row, 1])), size)
        elif reach == "unknown":
            assert support is not None
            field[row] = box_of(support[row])
        else:
            field[row] = (0, 0, *size)
    maps = np.zeros((len(inputs), len(methods), inputs.shape[1], *crop), np.float32)
    for at, rule in enumerate(methods):
        for row, (top, left, bottom, right) in enumerate(field):
            inside = found[rule][row, :, top:bottom, left:right]
            maps[row, at, :, : bottom - top, : right - left] = inside
            largest, within = np.abs(found[rule][row]).max(), np.abs(inside).max(initial=0)
            outside = np.abs(found[rule][row]).sum() - np.abs(inside).sum()
            if isinstance(reach, Window) and (within < largest or outside > OUTSIDE * np.abs(inside).sum()):
                raise MicrotomeError(
                    f"layer {info.name!r}: a projection by {rule} reaches beyond the receptive field that follows from "
                    f"the network's calls, rows {top} to {bottom} and columns {left} to {right}"
                )
    return Projected(value, position, field, maps)


def back(network: nn.Module, inputs: torch.Tensor, target: Target, rule: Rule, batch: int) -> np.ndarray:
    """Return what the target sends back to the inputs, float32 like them."""
    made = []
    for start, stop in in_chunks(len(inputs), batch):
        rows = padded(torch.arange(start, stop), batch)
        sites = None if rule == "gradient" else Partly(network, rule)
        found = gradients(network, inputs[rows], target.at(rows), sites=sites).inputs
        assert found is not None
        made.append(found[: stop - start].float().cpu().numpy())
    return np.concatenate(made)


def box_of(values: np.ndarray) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right of where values (channel, y, x) are not 0; the whole if they are nowhere."""
    there = (values != 0).any(0)
    rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
    if not len(rows):
        return 0, 0, *there.shape
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def crop_of(reach: Reach, size: tuple[int, int]) -> tuple[int, int]:
    """Return (y, x) of the largest receptive field of a layer within images of a size."""
    if not isinstance(reach, Window):
        return size
    return tuple(min(axis.last - axis.first + 1, pixels) for axis, pixels in zip((reach.y, reach.x), size, strict=True))  # type: ignore[return-value]
