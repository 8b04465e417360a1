"""Which operations keep the units of a layer apart: each channel of the result depends on one channel alone.

As long as that holds, one pass computes what a unit's absence does to every channel, for all units: channel u of
f(everything replaced) is channel u of f(unit u replaced). Only the operation that mixes channels has to treat units one
at a time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional


@dataclass(frozen=True)
class Channels:
    """Where a tensor holds the units: along `dim`, with `group` consecutive entries per unit."""

    dim: int
    group: int = 1


_ELEMENTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_ELEMENTWISE_FUNCTIONS = (
    functional.relu,
    functional.relu_,
    functional.relu6,
    functional.leaky_relu,
    functional.elu,
    functional.selu,
    functional.gelu,
    functional.silu,
    functional.mish,
    functional.hardswish,
    functional.hardsigmoid,
    functional.hardtanh,
    functional.softplus,
    functional.dropout,
    torch.relu,
    torch.relu_,
    torch.sigmoid,
    torch.tanh,
    torch.clamp,
    torch.abs,
)
_POOL_FUNCTIONS = (
    functional.max_pool2d,
    functional.avg_pool2d,
    functional.adaptive_avg_pool2d,
    functional.adaptive_max_pool2d,
    torch.max_pool2d,
)
_ELEMENTWISE_METHODS = ("relu", "relu_", "sigmoid", "tanh", "clamp", "clamp_", "abs", "contiguous", "clone", "float")
_BINARY_FUNCTIONS = (
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    torch.add,
    torch.sub,
    torch.mul,
    torch.div,
)
_BINARY_METHODS = ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_")
_REDUCTIONS = (torch.mean, torch.sum, torch.amax)
_REDUCTION_METHODS = ("mean", "sum", "amax")
_RESHAPES = (torch.flatten, torch.reshape, torch.squeeze)
_RESHAPE_METHODS = ("flatten", "reshape", "view", "squeeze")


def channels_after(
    node: fx.Node,
    known: Mapping[fx.Node, Channels],
    reached: Collection[fx.Node],
    shapes: Mapping[fx.Node, tuple[int, ...]],
    root: nn.Module,
) -> Channels | None:
    """Return where the result of an operation holds the units; None if it mixes them, or may mix them.

    Parameters
    ----------
    known : the operations before this one that keep units apart.
    reached : all before this one whose result depends on the layer.
    shapes : of every tensor, the batch first.
    """
    inputs = [each for each in node.all_input_nodes if each in known]
    if node not in shapes or not inputs or not isinstance(node.args[0], fx.Node):
        return None
    if any(each in reached and each not in known for each in node.all_input_nodes):
        return None
    first = node.args[0]
    if is_binary(node, root):
        # The other operand may be anything that the unit does not reach, or a tensor with the units at the same place.
        same = len({known[each] for each in inputs}) == 1 and all(shapes[each] == shapes[node] for each in inputs)
        return known[inputs[0]] if same else None
    if inputs != [first]:
        return None
    before, source, shape = known[first], shapes[first], shapes[node]
    if is_elementwise(node, root):
        return before if shape == source else None
    if _is(node, root, _POOLS, _POOL_FUNCTIONS, ()):
        return before if before.dim == 1 and len(source) == 4 else None
    if _is(node, root, _REDUCTIONS, _REDUCTIONS, _REDUCTION_METHODS):
        return _reduced(node, before, source, shape)
    if _is(node, root, (nn.Flatten,), _RESHAPES, _RESHAPE_METHODS):
        return _reshaped(before, source, shape)
    if _is(node, root, (), (torch.permute, torch.transpose), ("permute", "transpose")):
        return _permuted(node, before, source)
    if node.target is operator.getitem:
        return _indexed(node, before, source)
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and before.dim == 1:
        return before if not module.training and module.running_mean is not None else None
    if type(module) is nn.Conv2d and before == Channels(1) and module.padding_mode == "zeros":
        return Channels(1, module.out_channels // module.groups) if module.groups == module.in_channels else None
    return None


def mixes_linearly(
    node: fx.Node, known: Mapping[fx.Node, Channels], shapes: Mapping[fx.Node, tuple[int, ...]], root: nn.Module
) -> bool:
    """Return whether an operation is a convolution or a linear map of a tensor with units apart."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or node.args[0] not in known:
        return False
    source = node.all_input_nodes[0]
    module, channels, rank = root.get_submodule(str(node.target)), known[source], len(shapes[source])
    if type(module) is nn.Conv2d:
        return channels == Channels(1) and rank == 4 and module.padding_mode == "zeros"
    return type(module) is nn.Linear and channels.dim == rank - 1


def is_elementwise(node: fx.Node, root: nn.Module) -> bool:
    """Return whether each value of the result depends on one value of the first input, and on no other tensor's."""
    return _is(node, root, _ELEMENTWISE, _ELEMENTWISE_FUNCTIONS, _ELEMENTWISE_METHODS)


def is_binary(node: fx.Node, root: nn.Module) -> bool:
    """Return whether an operation is elementwise arithmetic of two operands."""
    return _is(node, root, (), _BINARY_FUNCTIONS, _BINARY_METHODS)


def _is(node: fx.Node, root: nn.Module, modules: tuple, functions: tuple, methods: tuple[str, ...]) -> bool:
    match node.op:
        case "call_module":
            return type(root.get_submodule(str(node.target))) in modules
        case "call_function":
            return any(node.target is function for function in functions)
        case "call_method":
            return node.target in methods
    return False


def _reduced(node: fx.Node, before: Channels, source: tuple[int, ...], shape: tuple[int, ...]) -> Channels | None:
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, (tuple, list)) or not dims or not all(isinstance(dim, int) for dim in dims):
        return None
    gone = {dim % len(source) for dim in dims}  # type: ignore[operator]
    if 0 in gone or before.dim in gone:
        return None
    if len(shape) == len(source):
        return before
    return Channels(before.dim - sum(dim < before.dim for dim in gone), before.group)


def _reshaped(before: Channels, source: tuple[int, ...], shape: tuple[int, ...]) -> Channels | None:
    """Handle (batch, units, ...) → (batch, units · ...): the positions of a unit become adjacent."""
    if before.dim != 1 or source[0] != shape[0]:
        return None
    if shape[1] == source[1]:
        return before
    return Channels(1, before.group * math.prod(source[2:])) if len(shape) == 2 else None


def _permuted(node: fx.Node, before: Channels, source: tuple[int, ...]) -> Channels | None:
    given: Any = node.args[1:] or tuple(node.kwargs.values())
    order = list(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else list(given)
    if not all(isinstance(dim, int) for dim in order):
        return None
    order = [dim % len(source) for dim in order]
    if len(order) == 2 and len(source) > 2:  # transpose
        swapped = list(range(len(source)))
        swapped[order[0]], swapped[order[1]] = order[1], order[0]
        order = swapped
    return Channels(order.index(before.dim), before.group) if order[0] == 0 else None


def _indexed(node: fx.Node, before: Channels, source: tuple[int, ...]) -> Channels | None:
    """Handle x[:, 0] and the like: the whole batch, whole units."""
    index = node.args[1]
    if not isinstance(index, tuple) or not all(isinstance(each, (int, slice)) for each in index):
        return None
    padded = [*index, *[slice(None)] * (len(source) - len(index))]
    if padded[0] != slice(None) or padded[before.dim] != slice(None):
        return None
    gone = sum(isinstance(each, int) for each in padded[: before.dim])
    return Channels(before.dim - gone, before.group)
