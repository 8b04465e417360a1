"""Find a network's layers, describe their outputs, and record them in one forward pass.

A layer is a module whose output can be read as units at positions: the map of a convolution, or the tokens of a
transformer laid back onto the image. Layers are named by module names and listed in execution order.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from pipeline.config.networks import Reading, SpecialTokens
from pipeline.config.patterns import fits
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks.layer import LayerInfo, Layout, Misplaced

# Published transformers have at most a dozen class, distillation and register tokens. A larger remainder means that the
# grid was guessed wrong.
_MOST_SPECIAL = 16
# Convolutions round and cut borders: a map may differ from the image's proportions by this many positions.
_ROUNDING = 2
_SHOWN = 8
PART_OF_THE_BATCH = (
    "a layer that only some images reach, such as an expert, cannot be recorded: take the module around it, which all "
    "images pass"
)


@dataclass
class Survey:
    """The results of one forward pass: layers in execution order, why other modules are none, and the network's output.

    `readings` holds all ways to read a layer whose shape leaves several, the likeliest first, `unplaced` the refused
    layers whose tokens are no positions, `misplaced` those that keep a reading although they are not placed so
    (`pipeline.networks.positions` decides all three), and `reading` what was told.
    `image` is the (height, width) that it ran on, `output` the shape of the network's own output without the batch, and
    `classes` as in `classes_of`. `largest` is how many values the largest output of any module has for one image, which
    determines the memory of a forward pass. `returned` are the shapes of the tensors that the network returns, where it
    does not return one alone. `alone` is what goes wrong with a batch of one image.
    """

    layers: list[LayerInfo] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    readings: dict[str, list[LayerInfo]] = field(default_factory=dict)
    unplaced: set[str] = field(default_factory=set)
    misplaced: dict[str, Misplaced] = field(default_factory=dict)
    reading: Reading = field(default_factory=Reading)
    image: tuple[int, int] = (0, 0)
    output: tuple[int, ...] = ()
    classes: int | None = None
    largest: int = 0
    returned: dict[str | int, tuple[int, ...]] = field(default_factory=dict)
    alone: str = ""

    def unplace(self, name: str, reason: str) -> None:
        """Refuse a layer whose tokens are no positions."""
        self.layers = [layer for layer in self.layers if layer.name != name]
        self.refused[name] = reason
        self.unplaced.add(name)


def resolve(
    network: nn.Module,
    wanted: str | Sequence[str],
    input_shape: tuple[int, int, int],
    reading: Reading | None = None,
    name: str = "",
) -> list[LayerInfo]:
    """Return the wanted layers, in execution order.

    Parameters
    ----------
    wanted : `auto` for the blocks, or names and patterns. In a pattern, `*`, `?` and `[...]` stand for characters of
        one part of a name: `layer*` is layer1 to layer4, `layer*.*` their blocks. A pattern takes the layers with more
        than one position.
    input_shape : (channels, height, width) of the images.
    reading : what is told of how outputs are read.
    name : what messages call the network.

    Raises
    ------
    MicrotomeError
        A name that is not a layer (with the reason or the nearest names), a pattern that matches none, no blocks.
    """
    return choose(network, survey(network, input_shape, reading), wanted, name or type(network).__name__)


def candidates(network: nn.Module, input_shape: tuple[int, int, int]) -> list[LayerInfo]:
    """Return every possible layer, ordered by the first completion of its output."""
    return survey(network, input_shape).layers


def survey(
    network: nn.Module,
    input_shape: tuple[int, ...],
    reading: Reading | None = None,
    image: tuple[int, int] | None = None,
) -> Survey:
    """Run the network once on two blank images, on the device of its parameters; the meta device costs no memory.

    With two images, an output that does not begin with a 2 does not have the batch first. `image` is the (height,
    width) of the images that a generator makes of such inputs; None: they are the inputs.
    """
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    images = torch.zeros((2, *input_shape), device=device)
    calls: Counter[str] = Counter()
    largest = 0
    outputs: list[tuple[str, nn.Module, object]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: object) -> None:
            # torch does not compare this convolution's channels on the meta device, and generators begin with it.
            if isinstance(module, nn.ConvTranspose2d) and inputs[0].shape[1] != module.in_channels:
                raise MicrotomeError(f"{name} gets {inputs[0].shape[1]} channels, expected {module.in_channels}")
            nonlocal largest
            tensor = first_tensor(output)
            largest = max(largest, tensor.numel() // 2 if tensor is not None else 0)
            calls[name] += 1
            if calls[name] == 1:
                outputs.append((name, module, _sketch(tensor)))

        return hook

    modules = [(name, module) for name, module in network.named_modules() if name]
    hooks = [module.register_forward_hook(note(name)) for name, module in modules]
    try:
        with torch.no_grad(), one_attention_path():
            returned = network(images)
            logits = head_of(returned)
    finally:
        for hook in hooks:
            hook.remove()

    shape = tuple(logits.shape[1:]) if logits is not None else ()
    found = Survey(image=image or (input_shape[1], input_shape[2]), output=shape, classes=classes_of(network, logits))
    found.largest = max(largest, math.prod(shape))
    tensors = ((key, each) for key, each in entries_of(returned).items() if isinstance(each, torch.Tensor))
    found.returned = {key: tuple(each.shape[1:]) for key, each in tensors}
    found.reading = reading or Reading()
    reader = _Reader(found.image, found.reading)
    for name, module, output in outputs:
        read = reader.read(name, module, output)
        if calls[name] > 1:
            found.refused[name] = f"is called {calls[name]} times in one forward, so it has no single output"
        elif isinstance(read, str):
            found.refused[name] = read
        else:
            found.layers.append(read[0])
            if len(read) > 1:
                found.readings[name] = read
    for name, _ in modules:
        if name not in calls:
            found.refused[name] = "is never called in the forward, so its output cannot be read"
    return found


def choose(network: nn.Module, surveyed: Survey, wanted: str | Sequence[str], name: str) -> list[LayerInfo]:
    """Return the wanted layers of a survey; see `resolve`. `all` stands for every layer."""
    known = {layer.name: layer for layer in surveyed.layers}
    if wanted == "all":
        chosen = set(known)
    elif wanted == "auto":
        chosen = set(_auto(network, known, surveyed.image, name))
    else:
        chosen = set()
        for entry in [wanted] if isinstance(wanted, str) else wanted:
            chosen.update(_matches(entry, known, surveyed.refused, sorted(surveyed.unplaced), name))
    return [layer for layer in surveyed.layers if layer.name in chosen]


class Recorder:
    """Records the outputs of layers in one forward pass, as float32 copies made when each output is ready.

    The copy is needed: a later in-place operation (`ReLU(inplace=True)`, `out += identity`) overwrites the output.
    `take(name, output)`, if given, replaces the copy. It has to use the output at once; its return value is recorded.

    >>> with Recorder(network, ["layer1", "layer2"]) as record:
    ...     logits, outputs = record(images)

    `stop_early=True` ends the forward pass with the last layer's output and gives no logits.
    """

    def __init__(
        self,
        network: nn.Module,
        names: Iterable[str],
        stop_early: bool = False,
        take: Callable[[str, torch.Tensor], Any] | None = None,
    ) -> None:
        self.network = network
        self.names = list(names)
        self.stop_early = stop_early
        self.take = take or (lambda _, output: output.to(torch.float32, copy=True))
        self.outputs: dict[str, Any] = {}
        self._images = 0
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._paths = contextlib.ExitStack()

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Return the network's output (None after an early stop) and the layers' outputs as they are, for `to_maps`."""
        if not self._hooks and self.names:
            raise RuntimeError("a Recorder records inside its `with` block only")
        self.outputs, self._images = {}, len(images)
        logits = None
        with torch.no_grad(), contextlib.suppress(_Done):
            logits = head_of(self.network(images))
        missing = [name for name in self.names if name not in self.outputs]
        if missing:
            raise MicrotomeError(
                f"layer {missing[0]!r} was not called in this forward, expected one call: {PART_OF_THE_BATCH}"
            )
        outputs, self.outputs = self.outputs, {}
        return logits, {name: outputs[name] for name in self.names}

    def __enter__(self) -> Self:
        self._paths.enter_context(one_attention_path())
        for name in self.names:
            self._hooks.append(self.network.get_submodule(name).register_forward_hook(self._keep(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._paths.close()

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, _: object, output: object) -> None:
            tensor = first_tensor(output)
            if tensor is None:
                raise MicrotomeError(f"layer {name!r} gives {type(output).__name__}, expected a tensor")
            if name in self.outputs:
                raise MicrotomeError(f"layer {name!r} is called more than once in one forward, expected one call")
            if tensor.ndim == 0 or len(tensor) != self._images:
                found = len(tensor) if tensor.ndim else "no"
                raise MicrotomeError(
                    f"layer {name!r} gives {found} rows for {self._images} images, expected one row an image: "
                    f"{PART_OF_THE_BATCH}"
                )
            self.outputs[name] = self.take(name, tensor.detach())
            if self.stop_early and len(self.outputs) == len(self.names):
                raise _Done

        return hook


class _Done(BaseException):
    """Ends a forward pass; no `except Exception` of a network may catch it."""


def to_maps(output: torch.Tensor, layer: LayerInfo) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return an output's maps (batch, unit, y, x), a view, and special tokens (batch, token, unit) or None.

    Raises
    ------
    MicrotomeError
        The output does not have the layer's shape, for example because the images have another size.
    """
    units, height, width = layer.shape
    tokens = layer.special + height * width
    expected = {
        "map": (units, height, width),
        "channels_last": (height, width, units),
        "tokens": (tokens, units),
        "vector": (units,),
    }[layer.layout]
    if tuple(output.shape[1:]) != expected:
        raise MicrotomeError(
            f"layer {layer.name!r}: output {tuple(output.shape[1:])}, expected {expected}: "
            f"resolve the layers for images of this size"
        )
    if layer.layout == "channels_last":
        return output.permute(0, 3, 1, 2), None
    if layer.layout == "tokens":
        patches = slice(layer.first, layer.first + height * width)
        maps = output[:, patches].transpose(1, 2).unflatten(2, (height, width))
        if not layer.last:
            return maps, output[:, : layer.special] if layer.special else None
        return maps, torch.cat([output[:, : patches.start], output[:, patches.stop :]], 1)
    return output.reshape(output.shape[0], units, height, width), None


def first_tensor(output: object) -> torch.Tensor | None:
    """Return the tensor that a module's output stands for: itself, or the first of a tuple, list or mapping."""
    if isinstance(output, torch.Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((value for value in values if isinstance(value, torch.Tensor)), None)


def replaced(output: Any, tensor: torch.Tensor, changed: torch.Tensor) -> Any:
    """Return a module's output with `changed` in place of a tensor: as a dict, list, tuple or named one, as it was."""
    if output is tensor:
        return changed
    if isinstance(output, Mapping):
        return type(output)({key: changed if value is tensor else value for key, value in output.items()})  # type: ignore[call-arg]
    values = [changed if value is tensor else value for value in output]
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)


def entries_of(output: object) -> dict[str | int, Any]:
    """Return what a network returned by name, or by place where it has no names; one tensor alone has none."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return dict(zip(output._fields, output, strict=True))
    return dict(enumerate(output)) if isinstance(output, (tuple, list)) else {}


def head_of(output: object) -> torch.Tensor | None:
    """Return the tensor that stands for the logits of what a network returned: `logits` by name, else the first."""
    named = entries_of(output).get("logits")
    return named if isinstance(named, torch.Tensor) else first_tensor(output)


def classes_of(network: nn.Module, output: torch.Tensor | None) -> int | None:
    """Return how many logits per image the network gives; None if it has no head, only features.

    Logits are (batch, class). A timm network without its head gives features of that form, and reports 0 classes.
    """
    if output is None or output.ndim != 2 or getattr(network, "num_classes", None) == 0:
        return None
    return output.shape[1]


@contextlib.contextmanager
def one_attention_path() -> Iterator[None]:
    """Keep torch from using its fused attention, which it chooses depending on hooks and gradients.

    Fused attention rounds differently and calls no inner hooks, so a layer's values would depend on which others are
    recorded.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _matches(
    entry: str, known: Mapping[str, LayerInfo], refused: Mapping[str, str], unplaced: Iterable[str], network: str
) -> list[str]:
    if entry in known:
        return [entry]
    if entry in refused:
        raise MicrotomeError(f"layer {entry!r} of {network} {refused[entry]}")
    if not any(sign in entry for sign in "*?["):
        known_ones = nearest(entry, known) or f"; it has {_some(known)}"
        raise MicrotomeError(f"layer {entry!r} is not in {network}{known_ones}")
    for name in unplaced:
        if fits(name, entry):
            raise MicrotomeError(f"layer {name!r} of {network} {refused[name]}")
    found = [name for name, layer in known.items() if layer.spatial and fits(name, entry)]
    if not found:
        raise MicrotomeError(
            f"pattern {entry!r} matches no layer with more than one position of {network}; it has {_some(known)} "
            f"(`*` stands for one part of a name, between two dots)"
        )
    return found


def _auto(network: nn.Module, known: Mapping[str, LayerInfo], image: tuple[int, int], name: str) -> list[str]:
    """Return the blocks with more than one position; if there are none, the convolutions."""

    def whole(path: str) -> bool:
        return path in known and in_proportion(known[path].shape[1:], image)

    def usable(names: Iterable[str]) -> list[str]:
        return [each for each in names if each in known and known[each].spatial]

    blocks = usable(_blocks(network, "", whole))
    blocks = blocks or usable(each for each, module in network.named_modules() if isinstance(module, nn.Conv2d))
    if not blocks:
        raise MicrotomeError(f"`layers: auto` found no blocks in {name}: name layers; it has {_some(known)}")
    return blocks


def _blocks(module: nn.Module, name: str, whole: Callable[[str], bool]) -> Iterator[str]:
    """Yield the names of the outermost building blocks, by structure; `whole`: does a module's output cover the image?

    A block is a module with a forward of its own that is an element of a Sequential or ModuleList, or one of several
    siblings of its class (GoogLeNet's inceptions), or beside such siblings without holding a Sequential. If all of them
    are stages (Swin's), their blocks are taken. A Sequential without such elements is a block if it holds one
    convolution (conv, norm, activation); one with several (VGG) gives the last activation or norm after each.
    """
    composites = [
        (_join(name, key), child) for key, child in module.named_children() if any(True for _ in child.children())
    ]
    if _is_chain(module) and not composites:
        yield from _plain_blocks(module, name)
        return
    classes = Counter(type(child) for _, child in composites if not _is_chain(child))
    repeated = any(count > 1 for count in classes.values())
    stages = all(_is_stage(child, path, whole) for path, child in composites if not _is_chain(child))
    for path, child in composites:
        if _is_chain(child):
            yield from _blocks(child, path, whole)
        elif not stages and (
            _is_chain(module) or classes[type(child)] > 1 or (repeated and not any(map(_is_chain, child.children())))
        ):
            yield path
        else:
            yield from _blocks(child, path, whole)


def _is_stage(module: nn.Module, name: str, whole: Callable[[str], bool]) -> bool:
    """Return whether a module has exactly one chain of blocks of one class, each with an output that covers the image.

    An inception has several such branches; inside a block of MobileViT or NesT, the image is cut into patches.
    """

    def of_blocks(chain: nn.Module, path: str) -> bool:
        blocks = list(chain.named_children())
        return len({type(block) for _, block in blocks}) == 1 and all(
            not _is_chain(block) and any(True for _ in block.children()) and whole(_join(path, key))
            for key, block in blocks
        )

    return sum(_is_chain(child) and of_blocks(child, _join(name, key)) for key, child in module.named_children()) == 1


def _plain_blocks(chain: nn.Module, name: str) -> Iterator[str]:
    leaves = list(chain.named_children())
    weighted = [i for i, (_, leaf) in enumerate(leaves) if isinstance(leaf, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    if len(weighted) == 1 and name:
        yield name
        return
    for i in weighted:
        while i + 1 < len(leaves) and type(leaves[i + 1][1]).__module__ in _ELEMENTWISE:
            i += 1
        yield _join(name, leaves[i][0])


_ELEMENTWISE = tuple(f"torch.nn.modules.{part}" for part in ("activation", "batchnorm", "dropout", "normalization"))


def _is_chain(module: nn.Module) -> bool:
    """Return whether a module is a container that only holds its elements or calls them in sequence."""
    if isinstance(module, nn.Sequential):
        return type(module).forward is nn.Sequential.forward
    return type(module) in (nn.ModuleList, nn.ModuleDict)


class _Reader:
    """Reads outputs as layers in execution order, and remembers earlier maps, which resolve ambiguous shapes."""

    def __init__(self, image: tuple[int, int], reading: Reading) -> None:
        self.image = image
        self.reading = reading
        self.special = reading.special
        self.layouts: dict[tuple[int, ...], Layout] = {}
        self.grids: dict[int, list[tuple[int, int]]] = {}

    def read(self, name: str, module: nn.Module, output: object) -> list[LayerInfo] | str:
        """Return the ways to read the layer, the likeliest first, or why the output cannot be one."""
        if not isinstance(output, torch.Tensor):
            return "does not give a tensor"
        shape = tuple(output.shape[1:])
        if output.ndim == 0 or output.shape[0] != 2:
            return f"gives {tuple(output.shape)} for 2 images: expected the batch in the first dimension"
        if output.is_complex():
            return "gives complex numbers, of which only the real parts would be stored: take a layer of real ones"
        told = self.reading.layout_of(name)
        if told is not None and len(shape) > 1 and (told == "tokens") != (len(shape) == 2):
            return f"gives {shape} for an image, which is not laid out as {told}: correct `layout`"
        special = 0
        layouts: list[Layout] = []
        if len(shape) == 1:
            layouts = ["vector"]
            units, height, width = shape[0], 1, 1
        elif len(shape) == 2:
            layouts = ["tokens"]
            tokens, units = shape
            grid = self._grid(tokens, units)
            if grid is None:
                return (
                    f"gives {tokens} tokens, which do not cover an image of {self.image[0]}x{self.image[1]} as a grid"
                    + ("" if self.special is None else f" beside {self.special} special tokens")
                    + ": set `special_tokens` to the number of class and register tokens, or `grid: [y, x]` to that of "
                    "patches along each side"
                )
            height, width = grid
            special = tokens - height * width
        elif len(shape) == 3:
            layouts = [told] if told is not None else self._map_layouts(module, shape)
            units, height, width = _at_end(shape, layouts[0])
            self.layouts[shape] = layouts[0]
            self.grids.setdefault(units, []).insert(0, (height, width))
        else:
            return f"gives {shape} for an image: expected maps, tokens or a vector"
        dtype = str(output.dtype).removeprefix("torch.")
        kind = type(module).__name__
        if len(shape) == 3:
            return [LayerInfo(name, _at_end(shape, layout), layout, 0, dtype, kind) for layout in layouts]
        info = LayerInfo(name, (units, height, width), layouts[0], special, dtype, kind)
        return [replace(info, last=last) for last in self._last(special)]

    def _last(self, special: int) -> list[int]:
        """Return how many of the special tokens may come after the patches, the likeliest number first."""
        told = self.reading.special_tokens
        return [told.last] if isinstance(told, SpecialTokens) else list(range(special + 1))

    def _map_layouts(self, module: nn.Module, shape: tuple[int, int, int]) -> list[Layout]:
        """Return which ends may hold the units, from the module's class and the image's proportions.

        The likelier one comes first: that of the last output of this shape.
        """
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)):
            return ["map"]
        # Exactly LayerNorm: torchvision's LayerNorm2d inherits from it, and normalises maps.
        if type(module) in (nn.Linear, nn.LayerNorm):
            return ["channels_last"]
        first, last = in_proportion(shape[1:], self.image), in_proportion(shape[:2], self.image)
        if first == last:
            both: list[Layout] = ["map", "channels_last"]
            return both if self.layouts.get(shape, "map") == "map" else both[::-1]
        return ["map"] if first else ["channels_last"]

    def _grid(self, tokens: int, units: int) -> tuple[int, int] | None:
        """Return (y, x) of the tokens, from an earlier map with as many units (the patches), or from the image."""

        def rest_fits(grid: tuple[int, int]) -> bool:
            rest = tokens - grid[0] * grid[1]
            return 0 <= rest <= _MOST_SPECIAL if self.special is None else rest == self.special

        if self.reading.grid is not None and rest_fits(self.reading.grid):
            return self.reading.grid
        seen = next(filter(rest_fits, self.grids.get(units, [])), None)
        if seen is not None:
            return seen
        height, width = self.image
        steps = math.gcd(height, width)
        grids = [(k * height // steps, k * width // steps) for k in range(steps, 0, -1)]
        # Prefer whole patches: 36 pixels are rather 9 patches of 4 than 10 of 3.6.
        grids.sort(key=lambda grid: height % grid[0] != 0)
        return next(filter(rest_fits, grids), None)


def _at_end(shape: tuple[int, int, int], layout: Layout) -> tuple[int, int, int]:
    """Return (units, y, x) of an output without the batch."""
    return shape if layout == "map" else (shape[2], shape[0], shape[1])


def in_proportion(grid: tuple[int, int], image: tuple[int, int]) -> bool:
    """Return whether a grid (y, x) has the proportions of an image (height, width), up to rounding and cut borders."""
    (y, x), (height, width) = grid, image
    return abs(y * width - x * height) <= _ROUNDING * max(height, width)


def _sketch(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return the tensor's shape and dtype without its memory, which a later layer can then use."""
    return None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
