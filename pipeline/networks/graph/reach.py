"""The pixels that a position of a layer can depend on, in closed form, read off the calls of one forward.

Convolutions, poolings, padding and slices move windows; what works entry by entry keeps them; branches join them.
Attention, and whatever mixes all positions, depends on everything. Any other call leaves its result unknown, which is
never guessed: the caller measures the support of gradients instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from kernels.locality.windows import PIXELS, Axis
from pipeline.networks.graph.call_sites import (
    DROPOUTS,
    ELEMENTWISE,
    METADATA,
    Call,
    argument,
    named,
    tensors_in,
)
from pipeline.networks.layers import first_tensor, one_attention_path

KEEPS = (
    ELEMENTWISE
    | DROPOUTS
    | {"relu", "batch_norm", "clone", "contiguous", "to", "type_as", "float", "double", "detach", "copy", "normalize"}
    | {"mul", "div", "add", "sub", "rsub", "neg", "maximum", "minimum", "where", "masked_fill", "cat", "concat"}
    | {"concatenate", "channel_shuffle"}
)
MIXES = frozenset(
    {"mean", "sum", "amax", "amin", "max", "min", "linear", "matmul", "einsum", "softmax", "group_norm"}
    | {"instance_norm", "scaled_dot_product_attention", "multi_head_attention_forward"}
)
OF_TOKENS = frozenset({"linear", "matmul", "softmax"})
"""Treat each token for itself, where they get one tensor that has tokens."""
POOLS = {"max_pool2d": "max", "max_pool2d_with_indices": "max", "avg_pool2d": "mean"}


@dataclass(frozen=True)
class Window:
    """The window of a position, along y and x."""

    y: Axis
    x: Axis

    def both(self, change: Callable[[Axis, int], Axis | None]) -> Window | Literal["unknown"]:
        """Return the window with both axes changed; the second argument is 0 for y and 1 for x."""
        y, x = change(self.y, 0), change(self.x, 1)
        return "unknown" if y is None or x is None else Window(y, x)

    def box(self, position: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return top, left, bottom and right of a position's window within an image (y, x); ends are excluded."""
        (top, bottom), (left, right) = self.y.clipped(position[0], size[0]), self.x.clipped(position[1], size[1])
        return top, left, bottom, right


Reach = Window | Literal["everything", "unknown"]


def reach_of(network: nn.Module, images: torch.Tensor, layers: Sequence[str]) -> dict[str, Reach]:
    """Return what each position of layers depends on, by layer: its window, `everything`, or `unknown`.

    `images` is (image, channel, y, x), as the network takes them; their values matter little.
    """
    with torch.no_grad(), one_attention_path(), _Windows() as windows:
        given = images.clone()
        windows.of[given] = Window(PIXELS, PIXELS)
        found: dict[str, Reach] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: object, output: object) -> None:
                tensor = first_tensor(output)
                if tensor is not None:
                    found[name] = windows.of.get(tensor, "unknown")

            return hook

        hooks = [network.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
        try:
            network(given)
        finally:
            for hook in hooks:
                hook.remove()
    return {name: found.get(name, "unknown") for name in layers}


class _Windows(TorchFunctionMode):
    """Keeps the reach of every tensor that is made of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Any = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name, in_place = named(func)
        before = [self.of[each] for each in tensors_in(args, kwargs) if each in self.of]
        call = Call(name, func, tuple(args), kwargs)
        sizes = [tuple(each.shape) for each in tensors_in(args[:1])]
        output = func(*args, **kwargs)
        if before and name not in METADATA:
            reach = self._after(call, before, sizes[0] if sizes else (), output)
            results = tensors_in(output) + (tensors_in(args[:1]) if in_place or name in ("copy", "setitem") else [])
            for each in results:
                self.of[each] = reach
        return output

    def _after(self, call: Call, before: Sequence[Reach], size: tuple[int, ...], output: Any) -> Reach:
        if "everything" in before:
            return "everything"
        name, first = call.name, before[0]
        made = first_tensor(output)
        if name in MIXES and not _one_position(size) and not _along_others(call, size):
            by_token = name in OF_TOKENS and len(before) == 1 and not _whole(size)
            return "unknown" if by_token else "everything"
        if not isinstance(first, Window) or made is None or len(size) != 4:
            return "unknown"
        if name in KEEPS and len(before) == 1:
            return first if made.ndim == 4 and made.shape[2:] == size[2:] else "unknown"
        if name in KEEPS or name in MIXES:
            return _joined(before)
        return self._moved(call, first, size, made)

    def _moved(self, call: Call, window: Window, size: tuple[int, ...], made: torch.Tensor) -> Reach:
        name = call.name
        if name in ("conv2d", "convolution"):
            if name == "convolution" and argument(call, 6, "transposed", False):
                return "unknown"
            kernel = argument(call, 1, "weight").shape[2:]
            stride, padding, dilation = (
                argument(call, at, key, default)
                for at, key, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
            )
            if isinstance(padding, str):
                spans = [each * (k - 1) // 2 for each, k in zip(_pair(dilation), kernel, strict=True)]
                padding = 0 if padding == "valid" else spans
            steps = _pair(stride), _pair(padding), _pair(dilation)
            return window.both(lambda axis, at: axis.slid(kernel[at], steps[0][at], steps[1][at], steps[2][at]))
        if name in POOLS:
            is_max = POOLS[name] == "max"
            kernel = _pair(argument(call, 1, "kernel_size"))
            stride = _pair(argument(call, 2, "stride") or kernel)
            padding = _pair(argument(call, 3, "padding", 0))
            dilation = _pair(argument(call, 4, "dilation", 1) if is_max else 1)
            return window.both(lambda axis, at: axis.slid(kernel[at], stride[at], padding[at], dilation[at]))
        if name in ("adaptive_avg_pool2d", "adaptive_max_pool2d", "adaptive_max_pool2d_with_indices"):
            return window if made.shape[2:] == size[2:] else "everything"
        if name == "pad" and argument(call, 2, "mode", "constant") == "constant":
            given = list(argument(call, 1, "pad"))
            before = given[2] if len(given) > 2 else 0, given[0]
            return window.both(lambda axis, at: axis.padded(before[at]))
        if name in ("interpolate", "upsample") and argument(call, 3, "mode", "nearest") == "nearest":
            factors = [new // old if new % old == 0 else 0 for new, old in zip(made.shape[2:], size[2:], strict=True)]
            return window.both(lambda axis, at: axis.enlarged(factors[at]) if factors[at] else None)
        if name == "getitem":
            return _sliced(call, window, size, made)
        return "unknown"


def _sliced(call: Call, window: Window, size: tuple[int, ...], made: torch.Tensor) -> Reach:
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if made.ndim != 4 or not all(isinstance(each, slice) or each is Ellipsis for each in index):
        return "unknown"
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (5 - len(index)), *index[at + 1 :])
    index = (*index, *[slice(None)] * (4 - len(index)))
    bounds = [each.indices(length) for each, length in zip(index[2:], size[2:], strict=True)]
    return window.both(lambda axis, at: axis.sliced(bounds[at][0], bounds[at][2]) if bounds[at][2] > 0 else None)


def _joined(before: Sequence[Reach]) -> Reach:
    found = before[0]
    for other in before[1:]:
        if not isinstance(found, Window) or not isinstance(other, Window):
            return "unknown"
        axes = other.y, other.x
        found = found.both(lambda axis, at, axes=axes: axis.joined(axes[at]))  # type: ignore[misc]
    return found


def _whole(size: tuple[int, ...]) -> bool:
    """Return whether a tensor has no positions of its own: all that a linear map gets of an image."""
    return len(size) == 2


def _one_position(size: tuple[int, ...]) -> bool:
    return len(size) == 4 and size[2:] == (1, 1)


def _along_others(call: Call, size: tuple[int, ...]) -> bool:
    """Return whether a sum, mean or maximum is over channels alone."""
    dims = argument(call, 1, "dim")
    if len(size) != 4 or dims is None or call.name in ("linear", "matmul", "group_norm", "instance_norm"):
        return False
    given = [dims] if isinstance(dims, int) else list(dims) if isinstance(dims, (tuple, list)) else []
    return bool(given) and all(each % 4 == 1 for each in given)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = list(value)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def first_convolutions(network: nn.Module, images: torch.Tensor) -> list[str]:
    """Return the convolutions that read the image itself, at most padded or normalised; else the first one of all."""
    found: list[str] = []
    called: list[str] = []
    channels = images.shape[1]
    with torch.no_grad(), one_attention_path(), _Windows() as windows:
        given = images.clone()
        windows.of[given] = Window(PIXELS, PIXELS)

        def look(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any) -> None:
                called.append(name)
                reach = windows.of.get(inputs[0])
                if isinstance(reach, Window) and inputs[0].shape[1] == channels and _is_raw(reach) and not done(name):
                    found.append(name)

            return hook

        def done(name: str) -> bool:
            return name in found

        convolutions = [(name, each) for name, each in network.named_modules() if isinstance(each, nn.Conv2d)]
        hooks = [each.register_forward_pre_hook(look(name)) for name, each in convolutions]
        try:
            network(given)
        finally:
            for hook in hooks:
                hook.remove()
    return found or called[:1]


def _is_raw(window: Window) -> bool:
    """Return whether a position depends on one pixel."""
    return all(axis.step == 1 and axis.first == axis.last for axis in (window.y, window.x))
