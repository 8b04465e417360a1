"""Operations between a network's modules: residual additions and attention weights.

Networks are written in many ways, and their libraries change, but all of them call functions of torch. These are
observed here one by one as they run (`TorchFunctionMode`), each with the module that calls it. So no list of classes is
needed, and attention includes everything that a library does to queries and keys beforehand.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from kernels.locality.attention import attention_weights
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import in_proportion, one_attention_path

Branch = Literal["attention", "mlp", "convolution"]

ADDITIONS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})
IN_PLACE = frozenset({"add_", "__iadd__"})
ATTENTION = frozenset({"multi_head_attention_forward", "scaled_dot_product_attention"})
CONVOLUTIONS = frozenset({f"conv{n}d" for n in (1, 2, 3)} | {f"conv_transpose{n}d" for n in (1, 2, 3)})
WEIGHTED = ATTENTION | CONVOLUTIONS | {"linear", "matmul", "__matmul__", "bmm", "baddbmm", "einsum"}


@dataclass(frozen=True)
class Skip:
    """One residual addition z + f(z).

    Attributes
    ----------
    name : the module that adds; with the branch in brackets if it adds more than once.
    place : index of the addition in a forward pass.
    first : whether z is the first of the two operands.
    branch : what f is made of: attention, linear layers, or convolutions.
    shortcut : whether z reaches the addition through weights (a `projection`) or without any, at most cut and padded.
    info : the layer with the shape of the operands.
    """

    name: str
    place: int
    first: bool
    branch: Branch
    shortcut: Literal["identity", "projection"]
    info: LayerInfo


@dataclass(frozen=True)
class Attention:
    """Self-attention over a grid of patches: the module that calls it, and the grid (in `info`)."""

    name: str
    heads: int
    info: LayerInfo


@dataclass(frozen=True)
class Found:
    """The residual additions and attention of a network; if there are none to measure, the reason.

    `unread` lists modules whose additions cannot be read.
    """

    skips: list[Skip]
    attention: list[Attention]
    without_skips: str = ""
    without_attention: str = ""
    unread: tuple[str, ...] = ()


class Operations(TorchFunctionMode):
    """Observes every torch function that a network calls inside its `with` block, and the module that calls it.

    `aside()` excludes what a hook computes.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.modules: list[str] = []
        self.additions = 0
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._aside = False
        self._paths = contextlib.ExitStack()

    def on_addition(self, place: int, operands: tuple[torch.Tensor, torch.Tensor]) -> int | None:
        """Return which operand of an addition to leave out, or None for neither.

        Called before each addition of two tensors of the same shape.
        """
        return None

    def on_attention(self, module: str, weights: Callable[[], torch.Tensor]) -> None:
        """Handle attention after it ran.

        `weights` gives (image, head, query, key), for windows with more dimensions before.
        """

    def after(self, name: str, inputs: Any, output: Any) -> None:
        """Handle the end of any function, with its arguments and what it returned."""

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before

    def __enter__(self) -> Self:
        self.modules, self.additions = [], 0
        self._paths.enter_context(one_attention_path())
        for name, module in self.network.named_modules():
            self._hooks += [
                module.register_forward_pre_hook(lambda *_, name=name: self.modules.append(name)),
                module.register_forward_hook(lambda *_: self._leave(), always_call=True),
            ]
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._paths.close()

    def _leave(self) -> None:
        self.modules.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self._aside:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ADDITIONS and _of_one_shape(args, kwargs):
            output = self._add(name, func, args)
        elif name == "multi_head_attention_forward":
            output = self._multi_head(func, args, kwargs)
        else:
            output = func(*args, **kwargs)
            if name == "scaled_dot_product_attention" and output.ndim >= 4:
                self.on_attention(self._module, lambda: _of_scaled_dot_product(*args, **kwargs))
            elif name == "softmax" and isinstance(output, torch.Tensor) and _is_square(output):
                self.on_attention(self._module, lambda: output)
        self.after(name, (args, kwargs), output)
        return output

    @property
    def _module(self) -> str:
        return self.modules[-1] if self.modules else ""

    def _add(self, name: str, func: Any, args: Any) -> torch.Tensor:
        left_out = self.on_addition(self.additions, (args[0], args[1]))
        self.additions += 1
        if left_out is None:
            return func(*args)
        rest = args[1 - left_out]
        return args[0].copy_(rest) if name in IN_PLACE else rest.clone()

    def _multi_head(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Run torch's own attention and request its weights."""
        asked = {**kwargs, "need_weights": True, "average_attn_weights": False}
        output, weights = func(*args, **asked)
        if weights.ndim == 4:
            self.on_attention(self._module, lambda: weights)
        wanted = kwargs.get("need_weights", True)
        mean = kwargs.get("average_attn_weights", True)
        return output, (weights.mean(1) if mean else weights) if wanted else None


class _Tape(Operations):
    """Records which results are made from which, starting with the images: numbered in order, each with its sources."""

    def __init__(self, network: nn.Module, images: torch.Tensor) -> None:
        super().__init__(network)
        self.number: Any = WeakIdKeyDictionary()
        self.number[images] = 0
        self.made_of: list[frozenset[int]] = [frozenset()]
        self.by: list[str] = [""]
        self.added: list[tuple[int, str, int, int, tuple[int, ...]]] = []  # place, module, two numbers, shape
        self.attended: list[tuple[str, tuple[int, ...]]] = []

    def on_addition(self, place: int, operands: tuple[torch.Tensor, torch.Tensor]) -> None:
        numbers = [self.number.get(each) for each in operands]
        if None not in numbers:
            self.added.append((place, self._module, numbers[0], numbers[1], tuple(operands[0].shape)))

    def on_attention(self, module: str, weights: Callable[[], torch.Tensor]) -> None:
        self.attended.append((module, tuple(weights().shape)))

    def after(self, name: str, inputs: Any, output: Any) -> None:
        sources = frozenset(self.number[each] for each in _tensors(inputs) if each in self.number)
        results = list(_tensors(output))
        if not sources or not results:
            return
        self.made_of.append(sources)
        self.by.append("attention" if name == "softmax" and _is_square(results[0]) else name)
        for each in results:
            self.number[each] = len(self.made_of) - 1

    def before(self, number: int) -> set[int]:
        """Return a result and everything that it is made from."""
        found, waiting = {number}, [number]
        while waiting:
            for each in self.made_of[waiting.pop()] - found:
                found.add(each)
                waiting.append(each)
        return found

    def functions(self, numbers: set[int]) -> list[str]:
        return [self.by[each] for each in numbers if self.by[each] in WEIGHTED or self.by[each] == "attention"]


def find(network: nn.Module, images: torch.Tensor, layers: Mapping[str, LayerInfo]) -> Found:
    """Find the residual additions of a network, in order, and its self-attention over patches.

    An addition is residual if one operand is made from the other by a function with weights. It is also residual if
    both are made from one result, one of them with at most one such function (a projection) and the other with more.

    Parameters
    ----------
    images : (image, channel, y, x) as the network takes them, two or more; their values do not matter.
    layers : all layers of the network, by name, as `layers.survey` finds them.
    """
    with torch.no_grad(), _Tape(network, images) as tape:
        network(images)
    residual = [each for each in (_residual(tape, *added) for added in tape.added) if each is not None]
    skips: list[Skip] = []
    unread: list[str] = []
    image = (images.shape[2], images.shape[3])
    for place, module, first, branch, shortcut, shape in residual:
        info = _layer_of(module, shape, layers, image)
        if info is None:
            unread.append(module)
        else:
            skips.append(Skip(module, place, first, branch, shortcut, info))
    why = "no addition of a branch to what it was made of was found in its forward"
    if unread:
        why = f"what {unread[0]!r} adds cannot be read as units at positions"
    attention, why_not = _attention(tape, len(images), layers)
    return Found(
        _named(skips), attention, "" if skips else why, "" if attention else why_not, tuple(dict.fromkeys(unread))
    )


def _residual(
    tape: _Tape, place: int, module: str, a: int, b: int, shape: tuple[int, ...]
) -> tuple[int, str, bool, Branch, Literal["identity", "projection"], tuple[int, ...]] | None:
    made_of = {a: tape.before(a), b: tape.before(b)}
    for skip, other in ((a, b), (b, a)):
        if skip != other and skip in made_of[other]:
            functions = tape.functions(made_of[other] - made_of[skip])
            return (place, module, skip == a, _branch(functions), "identity", shape) if functions else None
    common = made_of[a] & made_of[b]
    if a == b or max(common) == 0:  # they share nothing but the image
        return None
    own = {each: tape.functions(made_of[each] - common) for each in (a, b)}
    skip, other = sorted((a, b), key=lambda each: len(own[each]))
    if len(own[skip]) > 1 or len(own[skip]) == len(own[other]):
        return None
    return place, module, skip == a, _branch(own[other]), "projection" if own[skip] else "identity", shape


def _branch(functions: list[str]) -> Branch:
    if any(each in ATTENTION or each == "attention" for each in functions):
        return "attention"
    return "convolution" if any(each in CONVOLUTIONS for each in functions) else "mlp"


def _layer_of(
    module: str, shape: tuple[int, ...], layers: Mapping[str, LayerInfo], image: tuple[int, int]
) -> LayerInfo | None:
    """Return the layer with this shape: the module, the nearest one around it, or one inside it.

    A layer whose grid lacks the image's proportions is skipped: it consists of windows.
    """
    inside = [name for name in layers if not module or name.startswith(f"{module}.")]
    for name in (*_around(module), *inside):
        info = layers.get(name)
        if info is not None and info.spatial and _shape(info) == shape[1:] and in_proportion(info.shape[1:], image):
            return info
    return None


def _around(module: str) -> Iterator[str]:
    """Yield a module and those that contain it, from the inside out."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _shape(info: LayerInfo) -> tuple[int, ...]:
    units, height, width = info.shape
    if info.layout == "tokens":
        return info.special + height * width, units
    return (height, width, units) if info.layout == "channels_last" else (units, height, width)


def _named(skips: list[Skip]) -> list[Skip]:
    """Make the names of skips unique."""
    found: list[Skip] = []
    for skip in skips:
        own = [each for each in skips if each.name == skip.name]
        alike = [each for each in own if each.branch == skip.branch]
        number = f" {alike.index(skip) + 1}" if len(alike) > 1 else ""
        name = f"{skip.name} [{skip.branch}{number}]" if len(own) > 1 else skip.name
        found.append(Skip(name, skip.place, skip.first, skip.branch, skip.shortcut, skip.info))
    return found


def _attention(tape: _Tape, images: int, layers: Mapping[str, LayerInfo]) -> tuple[list[Attention], str]:
    found = []
    calls = Counter(module for module, _ in tape.attended)
    reasons = []
    for module, (*count, heads, queries, keys) in tape.attended:
        tokens = (layers[name] for name in _around(module) if name in layers and layers[name].layout == "tokens")
        info = next(tokens, None)
        if calls[module] > 1:
            reasons.append(f"{module!r} attends more than once in one forward")
        elif count != [images] or queries != keys:
            reasons.append(f"{module!r} attends within windows, or from other tokens than those attended to")
        elif info is None or info.special + info.shape[1] * info.shape[2] != keys:
            reasons.append(
                f"the {keys} tokens of {module!r} are no class or register tokens and then a grid of patches"
            )
        else:
            found.append(Attention(module, heads, info))
    return found, reasons[0] if reasons else "it has no self-attention"


def _of_one_shape(args: Any, kwargs: Mapping[str, Any]) -> bool:
    if len(args) != 2 or kwargs or not all(isinstance(each, torch.Tensor) for each in args):
        return False
    a, b = args
    return a.shape == b.shape and a.ndim in (3, 4) and a.is_floating_point() and b.is_floating_point()


def _is_square(tensor: torch.Tensor) -> bool:
    return tensor.ndim >= 4 and tensor.shape[-1] == tensor.shape[-2] > 1


def _of_scaled_dot_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute the weights that the fused kernel used, from the same arguments."""
    return attention_weights(query, key, attn_mask, is_causal, scale)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
