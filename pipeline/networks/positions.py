"""Where the positions of a layer lie: decided by the place at which a change of the image shows.

A shape may fit maps with the units first or last; tokens may be in any order, stand before or after class and register
tokens, or be no positions at all, as learned queries. Parts of an image are changed, one at a time, and the layer's
change has to appear at the same place. Initial weights serve best, since trained ones send some changes elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.errors import MicrotomeError
from pipeline.networks.layer import LayerInfo, Misplaced
from pipeline.networks.layers import Recorder, Survey, choose, to_maps

# (y, x) of the corners of the changed squares, as shares of the image; no two in one row or column.
_SQUARES = ((0.125, 0.625), (0.25, 0.125), (0.375, 0.375), (0.5, 0.75), (0.625, 0.25), (0.75, 0.5))
_SIDE = 0.125
_ELSEWHERE = 2  # that many changes elsewhere cannot be chance
_CONCENTRATED = 4.0  # times the median change of all positions
_THERE = (
    0.5  # of the largest change, above the median: narrow layers may change most at the rim of what a square reaches
)
_CELLS = 8  # changed patches of a grid of tokens
MOST_IMAGES = 1 + _CELLS
"""Images of the largest batch that is run."""
_ENOUGH = 0.6  # of them have to show where they are: by chance, one in eight or fewer do
_SUM = 1e-3  # rows of attention sum to 1 within this

_Box = tuple[slice, slice]


@dataclass(frozen=True)
class _Misplaced:
    """Why the positions of a layer cannot be read: they are in another order, or there are none."""

    reason: str
    out_of_order: bool


_ATTENTION = _Misplaced(
    "gives weights of attention (its rows sum to 1), which are no maps of units: take the output of the attention or "
    "of the whole block",
    out_of_order=False,
)


def place(
    network: nn.Module,
    surveyed: Survey,
    wanted: Iterable[str | Sequence[str]],
    input_shape: tuple[int, int, int],
    name: str,
    made: Callable[[], nn.Module],
    every: bool = False,
    strict: bool = True,
) -> None:
    """Decide how the wanted layers of a survey are read, and write it into the survey.

    Layers whose tokens are no positions are refused from then on; `auto` leaves them out.

    Parameters
    ----------
    wanted : choices of layers, as in `layers.choose`.
    input_shape : (channels, height, width).
    made : returns the network on the CPU, in eval mode, with initial weights; called if anything is in doubt.
    every : check plain maps too, which have one reading only.
    strict : refuse; else a layer keeps its likeliest reading and is noted in `misplaced`, and only `auto` leaves out
        what is no position.

    Raises
    ------
    MicrotomeError
        If strict, a layer whose positions are not where they seem, with what to use instead; as in `layers.choose`.
    """
    probed: nn.Module | None = None
    settled: set[str] = set()
    for choice in wanted:
        while True:
            chosen = [layer for layer in choose(network, surveyed, choice, name) if layer.name not in settled]
            doubtful = [
                layer
                for layer in chosen
                if layer.spatial and (every or layer.layout == "tokens" or layer.name in surveyed.readings)
            ]
            if not doubtful:
                break
            probed = probed or made()
            for layer, found in zip(doubtful, _settle(probed, doubtful, surveyed, input_shape), strict=True):
                settled.add(layer.name)
                if isinstance(found, LayerInfo):
                    surveyed.layers[surveyed.layers.index(layer)] = found
                elif found.out_of_order and strict:
                    raise MicrotomeError(f"layer {layer.name!r} of {name} {found.reason}")
                elif not found.out_of_order and (strict or choice == "auto"):
                    surveyed.unplace(layer.name, found.reason)
                else:
                    surveyed.misplaced[layer.name] = Misplaced(layer, found.reason, found.out_of_order)


def _settle(
    network: nn.Module, layers: Sequence[LayerInfo], surveyed: Survey, input_shape: tuple[int, int, int]
) -> list[LayerInfo | _Misplaced]:
    """Return how each layer is read, or why its positions cannot be read."""
    image = input_shape[1], input_shape[2]
    groups: dict[tuple[int, int] | None, list[LayerInfo]] = {}
    for layer in layers:
        groups.setdefault((layer.shape[1], layer.shape[2]) if layer.layout == "tokens" else None, []).append(layer)
    found: dict[str, LayerInfo | _Misplaced] = {}
    for grid, members in groups.items():
        cells = _cells(grid) if grid is not None else []
        boxes = (
            [_cell(cell, grid, image) for cell in cells] if grid is not None else [_box(at, image) for at in _SQUARES]
        )
        readings = {layer.name: surveyed.readings.get(layer.name, [layer]) for layer in members}
        told = {layer.name for layer in members if surveyed.reading.layout_of(layer.name) is not None}
        changes = _changes(network, readings, boxes, input_shape)
        for layer in members:
            change = changes[layer.name]
            if not change:
                found[layer.name] = _ATTENTION
            elif grid is None:
                found[layer.name] = _of_maps(change, readings[layer.name], boxes, image)
            else:
                found[layer.name] = _of_tokens(change[0], readings[layer.name], cells, layer.name in told)
    return [found[layer.name] for layer in layers]


def _changes(
    network: nn.Module,
    readings: Mapping[str, Sequence[LayerInfo]],
    boxes: Sequence[_Box],
    input_shape: tuple[int, int, int],
) -> dict[str, list[torch.Tensor]]:
    """Return for each reading of each layer how large its change is, (box, y, x), of tokens (box, token).

    There are none for weights of attention.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(input_shape, generator=generator).repeat(1 + len(boxes), 1, 1, 1)
    for image, (y, x) in zip(images[1:], boxes, strict=True):
        changed = image[:, y, x]
        changed.copy_(4 * torch.randn(changed.shape, generator=generator))

    def take(layer: str, output: torch.Tensor) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        if output.ndim == 4 and _is_attention(output):
            return found
        for reading in readings[layer]:
            if reading.layout == "tokens":
                to_maps(output, reading)  # refuses another shape
                found.append((output[1:] - output[:1]).float().square().sum(2).sqrt())
                break
            maps = to_maps(output, reading)[0].float()
            found.append((maps[1:] - maps[:1]).square().sum(1).sqrt())
        return found

    with Recorder(network, list(readings), stop_early=True, take=take) as record:
        return record(images)[1]


def _is_attention(output: torch.Tensor) -> bool:
    rows = output.float()
    return rows.shape[-1] > 1 and bool((rows >= 0).all()) and bool(((rows.sum(-1) - 1).abs() < _SUM).all())


def _of_maps(
    changes: Sequence[torch.Tensor],
    readings: Sequence[LayerInfo],
    boxes: Sequence[_Box],
    image: tuple[int, int],
) -> LayerInfo | _Misplaced:
    """Return the reading whose maps change where the image does; the first one if none tells.

    Changes that one reading shows at single places are not spread out, as another one may show them.
    """
    found = [[_found_at(change, box, image) for change, box in zip(each, boxes, strict=True)] for each in changes]
    scores = [(each.count(False), -each.count(True)) for each in found]
    best = scores.index(min(scores))
    if len(readings) > 1 and not scores[best][1]:
        best = scores.index(max(scores))
    wrong, right = scores[best][0], -scores[best][1]
    if wrong >= _ELSEWHERE or (len(readings) > 1 and 0 < right <= wrong):
        return _order(readings[best], len(readings) > 1)
    return readings[best]


def _found_at(size: torch.Tensor, box: _Box, image: tuple[int, int]) -> bool | None:
    """Return whether a change (y, x) is large within one position of the box; None if it is spread out."""
    median, largest = float(size.median()), float(size.amax())
    if not largest > _CONCENTRATED * median:
        return None
    for dim, (part, pixels) in enumerate(zip(box, image, strict=True)):
        cells = size.shape[dim]
        first, last = part.start * cells // pixels, (part.stop - 1) * cells // pixels
        size = size.narrow(dim, max(first - 1, 0), min(last + 2, cells) - max(first - 1, 0))
    return float(size.amax()) - median >= _THERE * (largest - median)


def _of_tokens(
    change: torch.Tensor, readings: Sequence[LayerInfo], cells: Sequence[tuple[int, int]], told: bool
) -> LayerInfo | _Misplaced:
    """Return the reading in which tokens change where the image does, or why the tokens are no positions.

    What counts is a token's change above its mean over all changed patches: queries answer to all of them alike.
    """
    _, height, width = readings[0].shape
    places = torch.tensor([y * width + x for y, x in cells])
    above = change - change.mean(0)
    largest, at = above.max(1)

    def shown(first: int) -> int:
        own = above[torch.arange(len(cells)), places + first]
        return int((own > (_THERE * largest).clamp_min(0)).sum())

    best = max(readings, key=lambda layer: shown(layer.first))
    there = shown(best.first)
    offsets = (at - places)[places.argsort()]
    if there < len(cells) and bool((offsets.diff() >= 0).all()) and 0 <= offsets[0] <= offsets[-1] <= best.special:
        between = bool(offsets[0] != offsets[-1])
        if between or offsets[0] != best.first:
            found = f"before and after the patches: {offsets[0]} and {best.special - offsets[0]}"
            return _Misplaced(
                f"is read with {best.first} special tokens before its patches, but its {best.special} special tokens "
                f"stand {'between the patches' if between else found}. Correct `special_tokens: {{first: ..., last: "
                f"...}}`, or take another layer",
                out_of_order=True,
            )
    if there >= _ENOUGH * len(cells):
        return best
    concentrated = (change.amax(1) > _CONCENTRATED * change.median(1).values).sum()
    # Tokens that answer to one patch each, but to another one than the reading says.
    if concentrated >= _ENOUGH * len(cells) and len(set(at.tolist())) >= _ENOUGH * len(cells):
        return _order(best)
    if told:
        return best
    return _Misplaced(
        f"has {change.shape[1]} tokens that do not change where the image does: each answers to all of it alike, or "
        f"not at all, as learned queries do, so they are no positions of a {height}x{width} grid. Take a layer before "
        f"them, or, if they are positions, set `layout: {{{best.name}: tokens}}`",
        out_of_order=False,
    )


def _order(layer: LayerInfo, several: bool = False) -> _Misplaced:
    return _Misplaced(
        f"has positions that are not in row order (a change of the image shows elsewhere in its "
        f"{layer.shape[1]}x{layer.shape[2]} map), as inside windows of attention or after a flip or rotation of the "
        f"image: take the output of a whole block or stage, or a layer of another kind"
        + (f", or say how it is laid out, `layout: {{{layer.name}: ...}}`" if several else ""),
        out_of_order=True,
    )


def _cells(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Return cells of a grid, its first and last among them: no two in one row or column where it is large enough."""
    height, width = grid
    count = min(_CELLS, height * width)
    if min(grid) < _CELLS:
        return [divmod(round(i * (height * width - 1) / max(1, count - 1)), width) for i in range(count)]
    rows = [round(i * (height - 1) / (count - 1)) for i in range(count)]
    step = next(k for k in range(round(width * 0.382), width) if math.gcd(k, width - 1) == 1)
    return [(y, i * step % (width - 1)) for i, y in enumerate(rows[:-1])] + [(height - 1, width - 1)]


def _cell(cell: tuple[int, int], grid: tuple[int, int], image: tuple[int, int]) -> _Box:
    y, x = (
        slice(at * pixels // cells, max((at + 1) * pixels // cells, at * pixels // cells + 1))
        for at, cells, pixels in zip(cell, grid, image, strict=True)
    )
    return y, x


def _box(corner: tuple[float, float], image: tuple[int, int]) -> _Box:
    y, x = (
        slice(int(at * pixels), max(int((at + _SIDE) * pixels), int(at * pixels) + 1))
        for at, pixels in zip(corner, image, strict=True)
    )
    return y, x
