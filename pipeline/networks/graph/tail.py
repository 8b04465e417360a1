"""The tail of a network: from the output of one layer to the logits, with units of that layer replaced.

The result is exact. Four savings make it cheap. Only what comes after the layer runs (`pipeline.networks.graph.trace`).
As long as operations keep the units apart (activation functions, BatchNorm, pooling:
`pipeline.networks.graph.channels`), they run twice for all units, once with everything as it is and once with
everything replaced. When a convolution or a linear map then mixes the channels, the effect of one unit is added to its
result: one input channel is multiplied, not all. A unit that changes nothing in an image at that point, because it is
zero everywhere, leaves the logits as they are, and nothing is computed. The remaining operations run for many pairs of
a unit and an image at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pipeline.errors import MicrotomeError
from pipeline.networks.graph.channels import Channels, channels_after, mixes_linearly
from pipeline.networks.graph.trace import Traced, UntraceableError, forward_with, number_at, trace, whole_forward
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import one_attention_path

TOLERANCE = 1e-4  # of the logits' size: allowed difference between a tail and the whole forward pass, from rounding


def unit_dim(layer: LayerInfo) -> int:
    """Return the dimension of the layer's output that holds the units; the batch is 0."""
    return {"map": 1, "vector": 1, "tokens": 2, "channels_last": 3}[layer.layout]


def cut(network: nn.Module, layer: LayerInfo, images: torch.Tensor) -> Tail:
    """Return the tail after a layer, checked against whole forward passes, or the whole forward if it cannot be cut.

    Parameters
    ----------
    network : in eval mode, with its weights.
    images : (3, channel, y, x) as the network takes them, for the check; noise will do.

    Raises
    ------
    MicrotomeError
        The layer is used twice, or nothing depends on it.
    """
    if network.training:
        raise ValueError("units are ablated in a network in eval mode")
    try:
        tail = Tail(trace(network, layer.name, images), layer)
        if _is_right(tail, network, images):
            return tail
    except UntraceableError:
        pass
    return Tail(whole_forward(network, layer.name, images), layer, whole=True)


@dataclass(frozen=True)
class State:
    """Some images up to the point where channels mix, unchanged and with every unit replaced.

    `kept`, `replaced` : the tensors that hold units apart and are needed later, for `images` images. `mixed` : the
    results of the operations that mix them, with nothing replaced. `sides` : the tensors that bypass the layer.
    `differs` (unit, image) : whether replacing the unit changes anything.
    """

    images: int
    kept: Mapping[fx.Node, torch.Tensor]
    replaced: Mapping[fx.Node, torch.Tensor]
    mixed: Mapping[fx.Node, torch.Tensor]
    sides: Mapping[fx.Node, torch.Tensor]
    differs: torch.Tensor


class Tail:
    """The operations after a layer, in three groups: those that keep units apart, those that mix them, and the rest.

    Attributes
    ----------
    whole : all of the network runs for each pair, since it could not be cut.
    needs_images : whether the tensors that bypass the layer are computed from the images.
    """

    def __init__(self, traced: Traced, layer: LayerInfo, whole: bool = False) -> None:
        self.traced, self.layer, self.whole = traced, layer, whole
        self.units = layer.shape[0]
        self.apart: dict[fx.Node, Channels] = {traced.layer: Channels(unit_dim(layer))}
        reached = set(traced.reached)
        for node in traced.reached[1:]:
            found = channels_after(node, self.apart, reached, traced.shapes, traced.root)
            if found is not None:
                self.apart[node] = found
        mixed = [node for node in traced.reached if node not in self.apart]
        self.mixing = [node for node in mixed if mixes_linearly(node, self.apart, traced.shapes, traced.root)]
        self.rest = [node for node in mixed if node not in self.mixing]
        # Tensors with units apart that others read; some of these need all channels even for a single unit.
        self.ends = [n for n in self.apart if n is traced.output or any(user in set(mixed) for user in n.users)]
        self.whole_ends = [n for n in self.ends if n is traced.output or any(user in self.rest for user in n.users)]
        self._before = self._needed_before()
        self.needs_images = any(node.op == "placeholder" for node in self._before)
        self._free = _last_uses(self.rest, keep=traced.output)

    # What goes around the layer ---------------------------------------------------------------------------------------

    def _needed_before(self) -> list[fx.Node]:
        """Return the operations that compute the sides, in order. Numbers are known without them."""
        needed = set(self.traced.sides)
        for node in reversed(self.traced.graph.nodes):
            if node in needed:
                needed |= {each for each in node.all_input_nodes if each not in self.traced.numbers}
        return [node for node in self.traced.graph.nodes if node in needed]

    @torch.no_grad()
    def beside(self, images: torch.Tensor) -> dict[fx.Node, torch.Tensor]:
        """Return the tensors that bypass the layer, from the images as the network takes them."""
        values: dict[fx.Node, Any] = {}
        free = _last_uses(self._before)
        with one_attention_path():
            for node in self._before:
                values[node] = images if node.op == "placeholder" else self._run(node, values, len(images))
                for each in free[node]:
                    if each not in self.traced.sides:
                        values.pop(each, None)
        return {node: values[node] for node in self.traced.sides}

    # Units apart ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(
        self, output: torch.Tensor, replaced: torch.Tensor, sides: Mapping[fx.Node, torch.Tensor] | None = None
    ) -> State:
        """Run the operations that keep units apart, on the layer's output and on one with every unit replaced.

        Parameters
        ----------
        output, replaced : (image, ...) as the layer gives it.
        sides : what `beside` gives for the same images; needed if there are any `traced.sides`.
        """
        sides = sides or {}
        with one_attention_path():
            kept, other = self._through_apart(output, sides), self._through_apart(replaced, sides)
            mixed = {node: self._run(node, kept, len(output)) for node in self.mixing}
        differs = torch.zeros((self.units, len(output)), dtype=torch.bool, device=output.device)
        for node in self.ends:
            differs |= self._by_unit(node, kept[node] != other[node]).flatten(2).any(2).T
        return State(len(output), kept, other, mixed, sides, differs)

    def _through_apart(
        self, output: torch.Tensor, sides: Mapping[fx.Node, torch.Tensor]
    ) -> dict[fx.Node, torch.Tensor]:
        """Return the ends, computed from the layer's output."""
        values = {self.traced.layer: output}
        for node in list(self.apart)[1:]:
            values[node] = self._run(node, {**sides, **values}, len(output))
        return {node: values[node] for node in self.ends}

    def _by_unit(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor:
        """Return a view (image, unit, entries of the unit, ...) of a tensor that keeps units apart."""
        channels = self.apart[node]
        return value.movedim(channels.dim, 1).unflatten(1, (self.units, channels.group))

    # Logits -----------------------------------------------------------------------------------------------------------

    def logits(self, state: State, pairs: int) -> torch.Tensor:
        """Return (image, class) with nothing replaced."""
        nothing = torch.zeros((pairs, self.units), dtype=torch.bool, device=state.differs.device)
        images = torch.arange(state.images, device=state.differs.device)
        return torch.cat([self._with_sets(state, nothing[: len(part)], part) for part in images.split(pairs)])

    def without_units(
        self, state: State, units: Sequence[int], pairs: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Replace one unit at a time: yield (unit, image, logits) of at most `pairs` pairs, for all pairs that differ.

        A pair that does not appear has exactly the original logits.
        """
        wrong = [unit for unit in units if not 0 <= unit < self.units]
        if wrong:
            raise MicrotomeError(
                f"unit {wrong[0]} is not in layer {self.layer.name!r}, whose units are 0 to {self.units - 1}"
            )
        chosen = torch.as_tensor(list(units), dtype=torch.long, device=state.differs.device)
        place, image = state.differs[chosen].nonzero(as_tuple=True)
        for at, part in zip(chosen[place].split(pairs), image.split(pairs), strict=True):
            if len(at):
                yield at, part, self._with_units(state, at, part)

    def without_sets(
        self, state: State, sets: torch.Tensor, pairs: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Replace sets of units, (set, unit) bool: yield (set, image, logits) as `without_units` does."""
        if sets.ndim != 2 or sets.shape[1] != self.units:
            raise ValueError(f"sets {tuple(sets.shape)} of {self.units} units: expected (set, unit)")
        chosen, image = (sets.float() @ state.differs.float() > 0).nonzero(as_tuple=True)
        for at, part in zip(chosen.split(pairs), image.split(pairs), strict=True):
            if len(at):
                yield at, part, self._with_sets(state, sets[at], part)

    @torch.no_grad()
    def _with_sets(self, state: State, sets: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Return the logits of pairs, with the units `sets` (pair, unit) of each replaced."""
        values: dict[fx.Node, Any] = {}
        for node in self.ends:
            kept = self._by_unit(node, state.kept[node].index_select(0, image))
            other = self._by_unit(node, state.replaced[node].index_select(0, image))
            mask = sets[(..., *[None] * (kept.ndim - 2))]
            values[node] = torch.where(mask, other, kept).flatten(1, 2).movedim(1, self.apart[node].dim)
        with one_attention_path():
            for node in self.mixing:
                values[node] = self._run(node, values, len(image))
            return self._through_rest(state, values, image)

    @torch.no_grad()
    def _with_units(self, state: State, unit: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Return the logits of pairs, sorted by unit, with the one unit of each replaced."""
        values: dict[fx.Node, Any] = {}
        pair = torch.arange(len(image), device=image.device)
        for node in self.whole_ends:
            values[node] = state.kept[node].index_select(0, image)
            self._by_unit(node, values[node])[pair, unit] = self._by_unit(node, state.replaced[node])[image, unit]
        distinct, counts = unit.unique_consecutive(return_counts=True)
        runs = list(zip(distinct.tolist(), image.split(counts.tolist()), strict=True))
        for node in self.mixing:
            source = node.all_input_nodes[0]
            module = self.traced.root.get_submodule(str(node.target))
            values[node] = state.mixed[node].index_select(0, image)
            kept, replaced = self._by_unit(source, state.kept[source]), self._by_unit(source, state.replaced[source])
            at = 0
            for one, rows in runs:
                change = replaced[:, one].index_select(0, rows) - kept[:, one].index_select(0, rows)
                _add_effect(module, values[node][at : at + len(rows)], change, one)
                at += len(rows)
        with one_attention_path():
            return self._through_rest(state, values, image)

    def _through_rest(self, state: State, values: dict[fx.Node, Any], image: torch.Tensor) -> torch.Tensor:
        """Run the remaining operations for pairs whose images are `image`; they may overwrite `values`."""
        for node in self.rest:
            for each in node.all_input_nodes:
                if each in self.traced.sides and each not in values:
                    side = state.sides[each].unflatten(0, (state.images, self.traced.sides[each]))
                    values[each] = side.index_select(0, image).flatten(0, 1)
            values[node] = self._run(node, values, len(image), owned=True)
            for each in self._free[node]:
                values.pop(each, None)
        return values[self.traced.output]

    def _run(self, node: fx.Node, values: Mapping[fx.Node, Any], batch: int, owned: bool = False) -> Any:
        """Run one operation on copies of what it writes into, unless that is `owned` and nobody else reads it."""
        written = self.traced.written.get(node, ())

        def get(each: fx.Node) -> Any:
            if each in values:
                copy = each in written and not (owned and len(each.users) == 1)
                return values[each].clone() if copy else values[each]
            if each in self.traced.numbers:
                return number_at(self.traced.numbers[each], batch)
            return self.traced.constants[each]

        return self.traced.call(node, get)

    # Cost -------------------------------------------------------------------------------------------------------------

    def cost(self) -> Cost:
        """Return the cost of a pair and of an image, from shapes alone; also works on the meta device."""
        shapes = self.traced.shapes
        numel = {node: math.prod(shape) / 2 for node, shape in shapes.items()}
        held = sum(numel[node] for node in (*self.whole_ends, *self.mixing))
        peak = held
        alive = dict.fromkeys((*self.whole_ends, *self.mixing))
        for node in self.rest:
            for each in (node, *(each for each in node.all_input_nodes if each in self.traced.sides)):
                alive[each] = None
            # An opaque module has internal results that are invisible here: for attention, four times its input.
            inside = 4 * sum(numel.get(each, 0) for each in node.all_input_nodes) if node not in shapes else 0
            peak = max(peak, sum(numel.get(each, 0) for each in alive) + inside)
            for each in self._free[node]:
                alive.pop(each, None)
        image = sum(numel[node] for node in self.apart) + sum(numel[n] for n in (*self.mixing, *self.traced.sides))
        return Cost(self._pair_flops(), int(4 * peak) + 4 * self.units, int(8 * image))

    @torch.no_grad()
    def _pair_flops(self) -> float:
        like = next(self.traced.root.parameters(), torch.zeros(()))
        sides = {node: like.new_zeros(self.traced.shapes[node]) for node in self.traced.sides}
        values = {node: like.new_zeros(self.traced.shapes[node]) for node in (*self.whole_ends, *self.mixing)}
        state = State(2, {}, {}, {}, sides, like)
        with _Flops() as counter, one_attention_path(), sdpa_kernel(SDPBackend.MATH):
            self._through_rest(state, values, torch.arange(2, device=like.device))
        flops = counter.total / 2
        for node in self.mixing:
            module, outputs = self.traced.root.get_submodule(str(node.target)), math.prod(self.traced.shapes[node]) / 2
            if isinstance(module, nn.Conv2d):
                flops += 2 * outputs / module.groups * math.prod(module.kernel_size)
            else:
                flops += 2 * outputs * self.apart[node.all_input_nodes[0]].group
        return flops


@dataclass(frozen=True)
class Cost:
    """The cost of a pair and of an image.

    Floating-point operations of a pair (multiplications and additions of matrix products and convolutions), and
    approximate bytes held for a pair and for an image.
    """

    pair_flops: float
    pair_bytes: int
    image_bytes: int


class _Flops(TorchDispatchMode):
    """Counts the floating-point operations of matrix products and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise, torch imports its compiler (4 s) to keep itself from compiling `__torch_dispatch__`.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _add_effect(module: nn.Module, result: torch.Tensor, change: torch.Tensor, unit: int) -> None:
    """Add the effect of changing one unit to the result (pair, ...) of a convolution or linear map.

    `change` (pair, entry, ...) is that of the unit's entries of the input.
    """
    if isinstance(module, nn.Conv2d):
        units, outputs = module.in_channels // module.groups, module.out_channels // module.groups
        own = slice(unit // units * outputs, (unit // units + 1) * outputs)
        weight = module.weight[own, unit % units, None]
        result[:, own] += functional.conv2d(change, weight, None, module.stride, module.padding, module.dilation)
        return
    assert isinstance(module, nn.Linear)
    group = change.shape[1]
    weight = module.weight[:, unit * group : (unit + 1) * group]
    result += change.movedim(1, -1) @ weight.T


def _last_uses(nodes: Sequence[fx.Node], keep: fx.Node | None = None) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each operation, the results that no later operation reads."""
    found: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    seen = {keep}
    for node in reversed(nodes):
        # A result that nobody reads is freed at once.
        for each in (node, *node.all_input_nodes):
            if each not in seen:
                seen.add(each)
                found[node].append(each)
    return found


def _is_right(tail: Tail, network: nn.Module, images: torch.Tensor) -> bool:
    """Return whether the tail agrees with whole forward passes, with nothing, the liveliest units or a set removed."""
    layer, dim = tail.layer.name, unit_dim(tail.layer)
    seen: list[torch.Tensor] = []

    def without(units: Sequence[int]) -> torch.Tensor:
        def change(output: torch.Tensor) -> torch.Tensor:
            seen.append(output.clone())
            return output.index_fill(dim, torch.tensor(units, dtype=torch.long, device=output.device), 0)

        return forward_with(network, layer, images, change)

    with torch.no_grad():
        truth = [without([])]
        output = seen[0]
        liveliest = output.abs().movedim(dim, 0).flatten(1).mean(1).topk(min(3, tail.units)).indices.tolist()
        halves = list(range(0, tail.units, 2))
        truth += [without([unit]) for unit in liveliest] + [without(halves)]
    try:
        state = tail.begin(output, torch.zeros_like(output), tail.beside(images))
        found = [tail.logits(state, 2)] + [tail.logits(state, 2) for _ in truth[1:]]
        for unit, image, logits in tail.without_units(state, sorted(liveliest), 2):
            for one, at, row in zip(unit.tolist(), image.tolist(), logits, strict=True):
                found[1 + liveliest.index(one)][at] = row
        sets = torch.zeros((1, tail.units), dtype=torch.bool, device=output.device)
        sets[0, halves] = True
        for _, image, logits in tail.without_sets(state, sets, 2):
            found[-1][image] = logits
    except RuntimeError:  # shapes do not fit: some operation relies on more than the graph shows
        return False
    size = max(float(each.abs().max()) for each in truth)
    return all(float((a - b).abs().max()) <= TOLERANCE * size for a, b in zip(truth, found, strict=True))
