"""A network as a graph of operations, cut at one layer: what depends on the layer, and what else that needs.

The graph is torch.fx's, traced without values, with the layer as one operation. It runs on a few images, to find every
shape, which values are only numbers (for example sizes), and which operations write into their input. A case that
cannot be resolved raises `UntraceableError`, and the caller falls back on whole forward passes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from pipeline.errors import MicrotomeError
from pipeline.networks.graph.channels import is_binary, is_elementwise
from pipeline.networks.layers import entries_of, first_tensor, head_of, one_attention_path, replaced


class UntraceableError(Exception):
    """The graph does not capture everything that the forward pass does."""


@dataclass(frozen=True)
class Number:
    """A value that is not a tensor: `constant` + `slope` for each image of the batch."""

    constant: Any
    slope: int = 0

    def at(self, batch: int) -> Any:
        return self.constant + self.slope * batch if self.slope else self.constant


@dataclass
class Traced:
    """A network's operations around one layer.

    Attributes
    ----------
    layer, output : the layer's node, and the one that gives the logits.
    reached : the nodes that depend on the layer and are not numbers, in order; the layer is the first.
    sides : tensors computed before or beside the layer that `reached` needs, with the number of entries per image in
        their first dimension.
    constants : tensors that depend on no image.
    numbers : every value that is not a tensor.
    shapes : of each tensor, for two images.
    written : for operations that write into an input, those inputs.
    """

    root: nn.Module
    graph: fx.Graph
    layer: fx.Node
    output: fx.Node
    reached: list[fx.Node]
    sides: dict[fx.Node, int] = field(default_factory=dict)
    constants: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    numbers: dict[fx.Node, Any] = field(default_factory=dict)
    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    written: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)

    def call(self, node: fx.Node, get: Callable[[fx.Node], Any]) -> Any:
        """Return the result of one operation; `get` gives the values of its input nodes."""
        return _call(self.root, node, get)


def trace(network: nn.Module, layer: str, images: torch.Tensor) -> Traced:
    """Cut the network at a layer.

    Parameters
    ----------
    images : (3, channel, y, x), as the network takes them; their values matter little.

    Raises
    ------
    UntraceableError
        The forward pass depends on values, or does something that the graph cannot capture.
    MicrotomeError
        The layer is used twice, or nothing depends on it.
    """
    try:
        with one_attention_path():
            graph = _Tracer(layer).trace(network)
    # Some forward passes branch on values or call foreign libraries: each fails under symbolic values in its own way.
    except Exception as error:
        raise UntraceableError(f"{type(error).__name__}: {error}") from error
    nodes = [node for node in graph.nodes if node.op == "call_module" and node.target == layer]
    if len(nodes) > 1:
        raise MicrotomeError(f"layer {layer!r} is called {len(nodes)} times in one forward, so it has no single output")
    if not nodes:
        raise UntraceableError(f"{layer!r} is not an operation of the graph")
    try:
        return _studied(network, graph, nodes[0], images)
    except (MicrotomeError, UntraceableError):
        raise
    # Likewise on the meta device, where operations whose output depends on values fail.
    except Exception as error:
        raise UntraceableError(f"{type(error).__name__}: {error}") from error


def whole_forward(network: nn.Module, layer: str, images: torch.Tensor) -> Traced:
    """Return the same for a network that cannot be traced: all of it runs, with the layer's output replaced."""

    def output_of_layer(images: torch.Tensor) -> torch.Tensor:
        seen = []

        def keep(output: torch.Tensor) -> torch.Tensor:
            seen.append(output.detach().clone())
            return output

        forward_with(network, layer, images, keep)
        if len(seen) != 1:
            raise MicrotomeError(f"layer {layer!r} is called {len(seen)} times in one forward, expected one call")
        return seen[0]

    def forward(images: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return forward_with(network, layer, images, lambda _: output.clone())

    with torch.enable_grad():
        probe = output_of_layer(images[:1]).requires_grad_()
        logits = forward(images[:1], probe)
        depends = logits.requires_grad and torch.autograd.grad(logits.sum(), probe, allow_unused=True)[0] is not None
    if not depends:
        raise _nothing_depends(layer)
    graph = fx.Graph()
    given = graph.placeholder("images")
    node = graph.call_function(output_of_layer, (given,))
    graph.output(graph.call_function(forward, (given, node)))
    return _studied(network, graph, node, images)


def forward_with(
    network: nn.Module, layer: str, images: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the logits of a whole forward pass that applies `change` to the layer's output: the plain way."""

    def hook(module: nn.Module, _: object, output: Any) -> Any:
        tensor = first_tensor(output)
        if tensor is None:
            raise MicrotomeError(f"layer {layer!r} gives {type(output).__name__}, expected a tensor")
        return replaced(output, tensor, change(tensor))

    handle = network.get_submodule(layer).register_forward_hook(hook)
    try:
        with one_attention_path():
            logits = head_of(network(images))
    finally:
        handle.remove()
    if logits is None:
        raise MicrotomeError(f"{type(network).__name__} does not return logits (image, class)")
    return logits


def _nothing_depends(layer: str) -> MicrotomeError:
    return MicrotomeError(
        f"layer {layer!r}: the network's output does not depend on it, so there is nothing to measure: "
        f"ablate a layer that the logits are made from"
    )


class _Tracer(fx.Tracer):
    """A tracer that treats the layer as one operation, whatever it contains, and enters its parents."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name == self.layer:
            return True
        if self.layer.startswith(f"{module_qualified_name}."):
            return False
        return super().is_leaf_module(m, module_qualified_name)


def _studied(network: nn.Module, graph: fx.Graph, layer: fx.Node, images: torch.Tensor) -> Traced:
    """Run the graph on two and on three images, and classify each node."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for extra in placeholders[1:]:
        if not extra.args:
            raise UntraceableError(f"the forward has an argument {extra.target!r} without a default")
    with torch.no_grad(), one_attention_path():
        values, written = _interpret(network, graph, images[:2], {})
        _rename_written(graph, values, written)
        if _select_early(graph, _shapes(values), network, layer, written):
            values, _ = _interpret(network, graph, images[:2], written)
        others, _ = _interpret(network, graph, images, written)
    shapes = _shapes(values)
    output = _logits_node(graph, values)
    reached = _descendants(graph, layer)
    if output not in reached:
        raise _nothing_depends(str(layer.target))
    if layer not in shapes or shapes[layer][0] != 2:
        raise UntraceableError("the layer does not give one tensor with the batch first")
    found = Traced(network, graph, layer, output, [], shapes=shapes, written=written)
    made_of_images = set(_descendants(graph, placeholders[0]))
    for node, value in values.items():
        if not _holds_tensor(value):
            found.numbers[node] = _fit(value, others[node])
        elif node in reached:
            found.reached.append(node)
    for node in found.reached[1:]:
        for each in node.all_input_nodes:
            if each in reached or each in found.numbers or each in found.sides or each in found.constants:
                continue
            if each not in made_of_images:
                found.constants[each] = values[each]
            else:
                found.sides[each] = _rows(values[each], others[each])
    return found


def _interpret(
    network: nn.Module, graph: fx.Graph, images: torch.Tensor, written: Mapping[fx.Node, tuple[fx.Node, ...]]
) -> tuple[dict[fx.Node, Any], dict[fx.Node, tuple[fx.Node, ...]]]:
    """Return the result of every node, and which nodes wrote into which inputs; those in `written` work on copies."""
    values: dict[fx.Node, Any] = {}
    wrote: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            values[node] = node.args[0] if values else images
            continue
        copied = {each: values[each].clone() for each in written.get(node, ())}
        tensors = [each for each in node.all_input_nodes if isinstance(values[each], torch.Tensor)]
        before = {each: values[each]._version for each in tensors}
        values[node] = _call(network, node, lambda each, copied=copied: copied.get(each, values[each]))  # type: ignore[misc]
        changed = tuple(each for each, version in before.items() if values[each]._version != version)
        if changed:
            wrote[node] = changed
    return values, wrote


def _call(root: nn.Module, node: fx.Node, get: Callable[[fx.Node], Any]) -> Any:
    args, kwargs = map_arg(node.args, get), map_arg(node.kwargs, get)
    match node.op:
        case "get_attr":
            return functools.reduce(getattr, str(node.target).split("."), root)
        case "call_module":
            return root.get_submodule(str(node.target))(*args, **kwargs)
        case "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _rename_written(
    graph: fx.Graph, values: Mapping[fx.Node, Any], written: Mapping[fx.Node, tuple[fx.Node, ...]]
) -> None:
    """Redirect readers of a tensor that was written into to the result of the write, so that nothing is in place."""
    order = {node: at for at, node in enumerate(graph.nodes)}
    for node, inputs in written.items():
        for target in inputs:
            if target.op == "get_attr" or values[node] is not values[target]:
                raise UntraceableError(f"{node} writes into {target} and does not return it")
            storage = values[target].untyped_storage()._cdata
            for other, value in values.items():
                later = [user for user in other.users if order[user] > order[node]]
                if other is node or not later or order[other] > order[node] or not isinstance(value, torch.Tensor):
                    continue
                if value is values[target]:
                    for user in later:
                        user.replace_input_with(other, node)
                elif value.untyped_storage()._cdata == storage:
                    raise UntraceableError(f"{node} writes into {target}, which {other} is a view of")


def _select_early(
    graph: fx.Graph,
    shapes: Mapping[fx.Node, tuple[int, ...]],
    root: nn.Module,
    layer: fx.Node,
    written: Mapping[fx.Node, tuple[fx.Node, ...]],
) -> bool:
    """If only some tokens of a result are used (the class token, at the end), compute only these.

    x[:, 0] of an operation that works on each token alone is that operation on x[:, 0].
    """
    reached = set(_descendants(graph, layer))
    moved = False
    waiting = [node for node in graph.nodes if node.target is operator.getitem]
    while waiting:
        select = waiting.pop()
        source = select.args[0]
        if select not in graph.nodes or source is layer or source not in reached or not _selects_tokens(select, shapes):
            continue
        if source in written or any(
            user.target is not operator.getitem or user.args != select.args for user in source.users
        ):
            continue
        whole = [each for each in source.all_input_nodes if shapes.get(each) == shapes[source]]
        module = root.get_submodule(source.target) if source.op == "call_module" else None
        if not (
            (type(module) is nn.LayerNorm and len(module.normalized_shape) == 1)
            or type(module) is nn.Linear
            or is_elementwise(source, root)
            or (is_binary(source, root) and all(shapes.get(each) == shapes[source] for each in source.all_input_nodes))
        ):
            continue
        if type(module) is nn.Linear:
            whole = source.all_input_nodes
        first = min(source.users, key=list(graph.nodes).index)
        with graph.inserting_before(first):
            picked = {each: graph.call_function(operator.getitem, (each, select.args[1])) for each in whole}
            on_few = graph.create_node(
                source.op,
                source.target,
                map_arg(source.args, lambda each, picked=picked: picked.get(each, each)),  # type: ignore[misc]
                map_arg(source.kwargs, lambda each, picked=picked: picked.get(each, each)),  # type: ignore[misc]
            )
        for user in list(source.users):
            user.replace_all_uses_with(on_few)
            graph.erase_node(user)
        graph.erase_node(source)
        waiting.extend(picked.values())
        moved = True
    return moved


def _selects_tokens(node: fx.Node, shapes: Mapping[fx.Node, tuple[int, ...]]) -> bool:
    """Return whether a node is x[:, i] or x[:, i:j] of (batch, token, unit)."""
    index = node.args[1]
    return (
        len(shapes.get(node.args[0], ())) == 3  # type: ignore[arg-type]
        and isinstance(index, tuple)
        and len(index) == 2
        and index[0] == slice(None)
        and isinstance(index[1], (int, slice))
    )


def _descendants(graph: fx.Graph, start: fx.Node) -> list[fx.Node]:
    """Return a node and everything made from it, in order."""
    found = {start: None}
    for node in graph.nodes:
        if node.op != "output" and any(each in found for each in node.all_input_nodes):
            found[node] = None
    return list(found)


def _logits_node(graph: fx.Graph, values: Mapping[fx.Node, Any]) -> fx.Node:
    (returned,) = (node for node in graph.nodes if node.op == "output")
    named = entries_of(returned.args[0]).get("logits")
    if isinstance(named, fx.Node):
        return named
    tensors = [each for each in returned.all_input_nodes if isinstance(values[each], torch.Tensor)]
    if not tensors:
        raise UntraceableError("the forward does not return logits")
    return tensors[0]


def _shapes(values: Mapping[fx.Node, Any]) -> dict[fx.Node, tuple[int, ...]]:
    return {node: tuple(value.shape) for node, value in values.items() if isinstance(value, torch.Tensor)}


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensor, value))
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, torch.Tensor)


def _fit(two: Any, three: Any) -> Any:
    """Fit a value of a batch of two and of three images to a `Number` or a tuple of them."""
    if isinstance(two, (tuple, list)) and type(two) is type(three) and len(two) == len(three):
        return tuple(_fit(a, b) for a, b in zip(two, three, strict=True))
    if type(two) is int and type(three) is int:
        return Number(two - 2 * (three - two), three - two)
    if isinstance(two, torch.device | torch.dtype | str | float | bool | None) and two == three:
        return Number(two)
    raise UntraceableError(f"a value depends on the batch: {two!r} for 2 images, {three!r} for 3")


def number_at(number: Any, batch: int) -> Any:
    """Return the value of a `Number`, or of a tuple of them, for a batch of this size."""
    return tuple(number_at(each, batch) for each in number) if isinstance(number, tuple) else number.at(batch)


def _rows(two: Any, three: Any) -> int:
    """Return how many entries of the first dimension each image has."""
    if (
        isinstance(two, torch.Tensor)
        and isinstance(three, torch.Tensor)
        and two.ndim
        and two.shape[1:] == three.shape[1:]
    ):
        rows = three.shape[0] - two.shape[0]
        if rows > 0 and two.shape[0] == 2 * rows:
            return rows
    raise UntraceableError("a tensor beside the layer does not have the batch first")
