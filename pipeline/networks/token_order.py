"""A check that the positions of a layer's maps lie where its shape suggests: tokens may be in another order.

Windows of attention, mask units and folded patches give outputs whose sizes fit a grid, but whose tokens are not in row
order. The check changes parts of an image, one at a time: if a layer's change is concentrated, it has to appear at the
same place. Initial weights serve best, since trained ones send some changes elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.errors import MicrotomeError
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import Recorder, to_maps

# (y, x) of the corners of the changed squares, as shares of the image; no two in one row or column.
_SQUARES = ((0.125, 0.625), (0.25, 0.125), (0.375, 0.375), (0.5, 0.75), (0.625, 0.25), (0.75, 0.5))
_SIDE = 0.125
_ELSEWHERE = 2  # that many changes elsewhere cannot be chance
_CONCENTRATED = 4.0  # times the median change of all positions
_THERE = (
    0.5  # of the largest change, above the median: narrow layers may change most at the rim of what a square reaches
)


def check_places(network: nn.Module, layers: Sequence[LayerInfo], input_shape: tuple[int, int, int], name: str) -> None:
    """Refuse a layer whose positions are not where they seem, and a network that draws random numbers.

    Parameters
    ----------
    network : on the CPU, in eval mode, with initial weights.
    input_shape : (channels, height, width).

    Raises
    ------
    MicrotomeError
        With the layer, and what to use instead.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(input_shape, generator=generator)
    images = image.repeat(2 + len(_SQUARES), 1, 1, 1)
    boxes = [_box(corner, (input_shape[1], input_shape[2])) for corner in _SQUARES]
    for i, (y, x) in enumerate(boxes):
        changed = images[2 + i, :, y, x]
        changed.copy_(4 * torch.randn(changed.shape, generator=generator))
    with Recorder(network, [layer.name for layer in layers], stop_early=True) as record:
        outputs = record(images)[1]
    for layer in layers:
        maps, _ = to_maps(outputs[layer.name], layer)
        if not torch.allclose(maps[0], maps[1], rtol=1e-2, atol=1e-3 * float(maps[0].abs().amax())):
            raise MicrotomeError(
                f"layer {layer.name!r} of {name} differs between two equal images of a batch: the forward draws random "
                f"numbers, and activations must depend on the image and the weights alone"
            )
        found = [_found_at(maps[2 + i] - maps[0], box, images.shape[2:]) for i, box in enumerate(boxes)]
        if found.count(False) >= _ELSEWHERE:
            raise MicrotomeError(
                f"layer {layer.name!r} of {name} has positions that are not in row order (a change of the "
                f"image shows elsewhere in its {layer.shape[1]}x{layer.shape[2]} map), as inside windows of attention: "
                f"take the output of a whole block or stage, or a layer of another kind"
            )


def _found_at(change: torch.Tensor, box: tuple[slice, slice], image: torch.Size) -> bool | None:
    """Return whether the change (unit, y, x) is large within one position of the box; None if it is spread out."""
    size = change.square().sum(0).sqrt()
    median, largest = float(size.median()), float(size.amax())
    if not largest > _CONCENTRATED * median:
        return None
    for dim, (part, pixels) in enumerate(zip(box, image, strict=True)):
        cells = change.shape[1 + dim]
        first, last = part.start * cells // pixels, (part.stop - 1) * cells // pixels
        size = size.narrow(dim, max(first - 1, 0), min(last + 2, cells) - max(first - 1, 0))
    return float(size.amax()) - median >= _THERE * (largest - median)


def _box(corner: tuple[float, float], image: tuple[int, int]) -> tuple[slice, slice]:
    y, x = (
        slice(int(at * pixels), max(int((at + _SIDE) * pixels), int(at * pixels) + 1))
        for at, pixels in zip(corner, image, strict=True)
    )
    return y, x
