"""Operations between a network's modules: residual additions and attention weights.

Networks are written in many ways, and their libraries change, but all of them call functions of torch. These are
observed here one by one as they run (`TorchFunctionMode`), each with the module that calls it. So no list of classes is
needed, and attention includes everything that a library does to queries and keys beforehand.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from kernels.locality.attention import attention_weights
from pipeline.networks.graph.arithmetic import (  # fmt: skip
    ADDED_PRODUCTS,
    ADDITIONS,
    DIVISIONS,
    FUSED,
    JOINS,
    MULTIPLICATIONS,
    OTHER_PRODUCTS,
    PRODUCTS,
    SHAPES,
    SUBTRACTIONS,
    SUBTRACTIONS_FROM,
    SUMS,
    Reading,
    Term,
    factors,
    part,
    reading,
    sums_to_one,
    terms,
)
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import first_tensor, in_proportion, one_attention_path

Branch = Literal["attention", "mlp", "convolution"]

SOFTMAX = frozenset({"softmax", "special_softmax", "_softmax"})
EXPONENTIALS = SOFTMAX | {"exp", "softmin"}
ATTENTION = frozenset({"multi_head_attention_forward", "scaled_dot_product_attention"})
CONVOLUTIONS = frozenset({f"conv{n}d" for n in (1, 2, 3)} | {f"conv_transpose{n}d" for n in (1, 2, 3)})
WEIGHTED = ATTENTION | CONVOLUTIONS | PRODUCTS | {"linear", "bilinear"} | OTHER_PRODUCTS
SUMMED = ADDITIONS | SUBTRACTIONS | SUBTRACTIONS_FROM | FUSED | ADDED_PRODUCTS
# What else may be made of two results of one image, and is neither a sum of them nor attention.
NEITHER = frozenset(
    {"pow", "pow_", "__pow__", "where", "maximum", "minimum", "max", "min", "fmax", "fmin", "atan2", "clamp"}
    | {"masked_fill", "masked_fill_", "copy_", "expand_as", "type_as", "to", "__getitem__", "__setitem__", "gather"}
    | {"index_select", "scatter", "scatter_", "take_along_dim", "grid_sample", "batch_norm", "layer_norm"}
    | {"group_norm", "instance_norm", "prelu", "fold", "pad", "broadcast_tensors", "meshgrid", "block_diag"}
    | {"complex", "cross", "glu", "dropout", "eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__", "__lt__"}
    | {"__le__", "__gt__", "__ge__", "logical_and", "logical_or", "isclose", "allclose", "equal", "normalize"}
    | {"cosine_similarity", "floor_divide", "remainder"}
)
KNOWN = WEIGHTED | SUMMED | SOFTMAX | JOINS | SUMS | MULTIPLICATIONS | DIVISIONS | SHAPES | NEITHER
IN_PLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__"})
# Takes the shape of a tensor, and nothing of its values.
SHAPED = frozenset(
    {f"{kind}_like" for kind in ("zeros", "ones", "full", "empty")}
    | {f"new_{kind}" for kind in ("zeros", "ones", "full", "empty", "tensor")}
)
FROM_OUTSIDE = frozenset({"from_numpy", "as_tensor", "tensor", "asarray", "frombuffer", "from_dlpack"})


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
    place: int  # index of the product among those of a forward
    operand: int
    reading: Reading


@dataclass(frozen=True)
class Found:
    """The residual additions and attention of a network; if there are none to measure, the reason.

    `unread` lists modules whose additions cannot be read, `attention_unread` says of attention why it cannot be.
    `trail` names the additions and products of a forward, in order: any other has other places.
    """

    skips: list[Skip]
    attention: list[Attention]
    without_skips: str = ""
    without_attention: str = ""
    unread: tuple[str, ...] = ()
    attention_unread: tuple[str, ...] = ()
    trail: tuple[str, ...] = ()


@dataclass(frozen=True)
class Product:
    """A product, softmax or attention as it ran, with the module that called it."""

    place: int
    name: str
    module: str
    args: Any
    kwargs: Mapping[str, Any]
    output: Any
    weights: torch.Tensor | None = None  # what torch's own attention says

    def operand(self, which: int) -> torch.Tensor:
        """Return a factor; -1 for the weights of attention, or what a softmax gave: queries and keys last."""
        if which >= 0:
            found = factors(self.name, self.args, self.kwargs)
            assert found is not None
            return found[0][which]
        if self.name == "scaled_dot_product_attention":
            return _of_scaled_dot_product(*self.args, **self.kwargs)
        return self.output if self.weights is None else self.weights


class Operations(TorchFunctionMode):
    """Observes every torch function that a network calls inside its `with` block, and the module that calls it.

    `aside()` excludes what a hook computes. `trail` names additions and products, in their order.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.modules: list[str] = []
        self.additions = 0
        self.products = 0
        self.trail: list[str] = []
        self._joined: Any = WeakIdKeyDictionary()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._aside = False
        self._paths = contextlib.ExitStack()

    def on_addition(self, place: int, operands: tuple[Term, Term]) -> int | None:
        """Return which term of an addition to leave out, or None for neither. Called before each addition."""
        return None

    def on_other_sum(self, parts: tuple[torch.Tensor, ...]) -> None:
        """Handle a sum over joined tensors that is no plain sum or mean of two."""

    def on_product(self, product: Product) -> None:
        """Handle a product of matrices, a softmax or attention after it ran."""

    def after(self, name: str, inputs: Any, output: Any) -> None:
        """Handle the end of any function, with its arguments and what it returned."""

    def entered(self, module: str) -> None:
        """Handle the start of a module."""

    def left(self, module: str, inputs: Any, output: Any) -> None:
        """Handle the end of a module."""

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before

    def __enter__(self) -> Self:
        self.modules, self.additions, self.products, self.trail = [], 0, 0, []
        self._paths.enter_context(one_attention_path())
        for name, module in self.network.named_modules():
            self._hooks += [
                module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)),
                module.register_forward_hook(lambda _, *ends: self._leave(*ends), always_call=True),
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
        self._joined.clear()
        self._paths.close()

    def _enter(self, name: str) -> None:
        self.modules.append(name)
        self.entered(name)

    def _leave(self, inputs: Any, output: Any) -> None:
        self.left(self.modules.pop(), inputs, output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self._aside:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        weights = None
        added = terms(name, args, kwargs)
        if added is not None:
            output = self._add(name, func, args, kwargs, added)
        elif name == "multi_head_attention_forward":
            output, weights = self._multi_head(func, args, kwargs)
        else:
            output = func(*args, **kwargs)
        if name in SUMS:
            output = self._sum(name, (args, kwargs), output)
        if name in PRODUCTS or name in SOFTMAX or name in ATTENTION:
            self.on_product(Product(self.products, name, self._module, args, kwargs, output, weights))
            self.products += 1
            self.trail.append(f"{self._module}: {name}")
        self._join(name, args, kwargs, output)
        self.after(name, (args, kwargs), output)
        return output

    @property
    def _module(self) -> str:
        return self.modules[-1] if self.modules else ""

    def _left_out(self, name: str, operands: tuple[Term, Term]) -> int | None:
        left_out = self.on_addition(self.additions, operands)
        self.additions += 1
        self.trail.append(f"{self._module}: {name}")
        return left_out

    def _add(
        self, name: str, func: Any, args: Any, kwargs: Mapping[str, Any], operands: tuple[Term, Term]
    ) -> torch.Tensor:
        left_out = self._left_out(name, operands)
        if left_out is None:
            return func(*args, **kwargs)
        rest = operands[1 - left_out].make()
        into = args[0] if _in_place(name) else kwargs.get("out")
        return rest.clone() if into is None else into.copy_(rest)

    def _sum(self, name: str, inputs: Any, output: Any) -> Any:
        """Observe a sum over tensors that were joined: x + f may be spelled `stack([x, f]).sum(0)`."""
        joined = next((self._joined[each] for each in tensors_in(inputs) if each in self._joined), None)
        if joined is None or not isinstance(output, torch.Tensor) or output.numel() != joined[0][0].numel():
            return output
        parts, plain = joined
        shape = tuple(output.shape)
        for factor in (1, 0.5) if plain and len(parts) == 2 else ():
            both = part(parts[0], shape, factor), part(parts[1], shape, factor)
            if torch.allclose(both[0].make() + both[1].make(), output):
                left_out = self._left_out(name, both)
                return output if left_out is None else both[1 - left_out].make().clone()
        self.on_other_sum(parts)
        return output

    def _join(self, name: str, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """Remember of which tensors, all of one size, a result is joined, and whether these are in it as they were."""
        if not isinstance(output, torch.Tensor):
            return
        if name in JOINS:
            parts = tuple(tensors_in(args[0] if args else kwargs["tensors"]))
            if len(parts) > 1 and len({each.numel() for each in parts}) == 1:
                self._joined[output] = parts, True
        elif name in SHAPES or name in MULTIPLICATIONS or name in DIVISIONS:
            before = next((self._joined[each] for each in tensors_in(args) if each in self._joined), None)
            if before is not None:
                self._joined[output] = before[0], before[1] and name in SHAPES

    def _multi_head(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, torch.Tensor]:
        """Run torch's own attention and request its weights."""
        asked = {**kwargs, "need_weights": True, "average_attn_weights": False}
        output, weights = func(*args, **asked)
        wanted = kwargs.get("need_weights", True)
        mean = kwargs.get("average_attn_weights", True)
        return (output, (weights.mean(-3) if mean else weights) if wanted else None), weights


@dataclass(frozen=True)
class _Attended:
    """Attention as it was met: which operand of which product holds the weights, and how they are read."""

    place: int
    module: str
    operand: int
    reading: Reading
    weights: torch.Tensor
    elsewhere: bool = False  # the queries are not made of the image


class Tape(Operations):
    """Records which results are made from which, starting with the images: numbered in order, each with its sources.

    `gaps` lists modules that give, or use, a tensor of which it is not known what it was made of.
    """

    def __init__(self, network: nn.Module, images: torch.Tensor) -> None:
        super().__init__(network)
        self.images = len(images)
        self.number: Any = WeakIdKeyDictionary()
        self.number[images] = 0
        self.made_of: list[frozenset[int]] = [frozenset()]
        self.by: list[str] = [""]
        self.gaps: list[str] = []
        self.constant: Any = WeakIdKeyDictionary()
        for module in network.modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values()]
            self.constant.update({each: True for each in own if isinstance(each, torch.Tensor)})

    def unknown(self, tensor: object) -> bool:
        """Return whether a tensor may have been made of the images by what no mode observes."""
        return (
            isinstance(tensor, torch.Tensor)
            and tensor not in self.number
            and tensor not in self.constant
            and tensor.is_floating_point()
            and tensor.ndim > 1
            and tensor.shape[0] % self.images == 0
        )

    def append(self, sources: frozenset[int], by: str) -> int:
        self.made_of.append(sources)
        self.by.append(by)
        return len(self.made_of) - 1

    def after(self, name: str, inputs: Any, output: Any) -> None:
        given = list(tensors_in(inputs)) if name not in SHAPED else []
        if any(map(self.unknown, given)):
            self.gaps.append(self._module)
        sources = frozenset(self.number[each] for each in given if each in self.number)
        results = list(tensors_in(output))
        if name == "__setitem__" or _in_place(name):
            results = [given[0], *([given[0]._base] if given[0]._base is not None else [])]
        if not results:
            return
        if sources:
            number = self.append(sources, name)
            self.number.update(dict.fromkeys(results, number))
        elif not any(map(self.unknown, given)) and name not in FROM_OUTSIDE:
            self.constant.update({each: True for each in results if each not in self.number})

    def left(self, module: str, inputs: Any, output: Any) -> None:
        with self.aside():
            if self.unknown(first_tensor(output)):
                self.gaps.append(module)

    def before(self, number: int) -> set[int]:
        """Return a result and everything that it is made from."""
        return self.back(number, lambda _: False)

    def back(self, number: int, stop: Callable[[int], bool]) -> set[int]:
        """Return a result and what it is made from, no further than results at which to stop."""
        found, waiting = {number}, [number]
        while waiting:
            last = waiting.pop()
            for each in self.made_of[last] - found if not stop(last) else ():
                found.add(each)
                waiting.append(each)
        return found


class _Found(Tape):
    """Notes additions, attention, and what may be either but cannot be read."""

    def __init__(self, network: nn.Module, images: torch.Tensor) -> None:
        super().__init__(network, images)
        self.added: list[tuple[int, str, int, int, tuple[int, ...]]] = []  # place, module, two numbers, shape
        self.attended: list[_Attended] = []
        self.attention: set[int] = set()
        self.exponentials: dict[int, tuple[Product, torch.Tensor]] = {}  # by number, until attention is made of them
        self.multiplied: dict[int, tuple[str, str, int]] = {}  # until known for scores: module, why, how many values
        self.merged: list[tuple[str, str]] = []

    def on_addition(self, place: int, operands: tuple[Term, Term]) -> None:
        numbers = []
        for term in operands:
            sources = frozenset(self.number[each] for each in term.of if each in self.number)
            if not sources:
                return
            numbers.append(self.append(sources, term.by) if term.by else next(iter(sources)))
        shapes = {each.shape for each in operands}
        self.added.append((place, self._module, numbers[0], numbers[1], shapes.pop() if len(shapes) == 1 else ()))

    def on_other_sum(self, parts: tuple[torch.Tensor, ...]) -> None:
        numbers = [self.number[each] for each in parts if each in self.number]
        self.added += [(-1, self._module, numbers[0], each, ()) for each in numbers[1:]]

    def on_product(self, product: Product) -> None:
        if product.name in ATTENTION:
            query = product.args[0] if product.args else product.kwargs.get("query")
            self._attends(product, -1, None, elsewhere=query in self.constant)

    def _attends(self, product: Product, operand: int, read: Reading | None, elsewhere: bool = False) -> None:
        weights = product.operand(operand)
        last = weights.ndim - 2
        read = read or Reading(tuple(range(last)), (last,), (last + 1,))
        self.attended.append(_Attended(product.place, product.module, operand, read, weights, elsewhere))

    def after(self, name: str, inputs: Any, output: Any) -> None:
        super().after(name, inputs, output)
        if not isinstance(output, torch.Tensor) or output not in self.number:
            return
        number, (args, kwargs) = self.number[output], inputs
        product = Product(self.products - 1, name, self._module, args, kwargs, output)
        several = len({self.number[each] for each in tensors_in(inputs) if each in self.number and _is_float(each)}) > 1
        if name in EXPONENTIALS:
            if output.ndim > 2:
                self.exponentials[number] = product, output
        elif name in PRODUCTS:
            self._multiplies(product, number, several)
        elif name in MULTIPLICATIONS:
            self._broadcasts(inputs, output)
        elif several and name in OTHER_PRODUCTS:
            self._unread(output, f"multiplies two results by `{name}`")
        elif several and name not in KNOWN:
            self.merged.append((self._module, name))

    def _unread(self, output: torch.Tensor, why: str) -> None:
        self.multiplied[self.number[output]] = self._module, why, output.numel()

    def _multiplies(self, product: Product, number: int, several: bool) -> None:
        """Tell attention, which multiplies values with weights that sum to 1, from other products of two results."""
        found = factors(product.name, product.args, product.kwargs)
        both, equation = found or ((), "")
        if found is None and several:
            self._unread(product.output, f"multiplies results by `{product.name}`, in a form that is not read")
        if found is None or any(each not in self.number for each in both):
            return
        why = "multiplies two results, neither of which sums to 1 over what it is multiplied with"
        for which in (0, 1):
            read, weights = reading(equation, which), both[which]
            if read is None or weights.ndim < 3:
                continue
            mixed = self._mixed(weights)
            if sums_to_one(weights, read.keys):
                self._attends(product, which, read)
            elif mixed is not None and sums_to_one(mixed.output, read.keys):
                self._attends(mixed, -1, read)
            elif sums_to_one(weights, read.queries):
                why = "has attention weights that sum to 1 over what attends, not over what is attended to"
                continue
            else:
                continue
            lengths = [math.prod(weights.shape[axis] for axis in axes) for axes in (read.queries, read.keys)]
            if lengths[0] == lengths[1]:
                self.attention.add(number)
            made_of = self.before(self.number[weights])
            for each in [
                each for each in made_of & set(self.multiplied) if self.multiplied[each][2] == weights.numel()
            ]:
                del self.multiplied[each]
            for each in made_of & set(self.exponentials):
                del self.exponentials[each]
            return
        self._unread(product.output, why)

    def _mixed(self, weights: torch.Tensor) -> Product | None:
        """Return the softmax whose heads were mixed to make weights of its shape."""
        last = max(self.before(self.number[weights]) & set(self.exponentials), default=None)
        product = self.exponentials[last][0] if last is not None else None
        usable = product is not None and product.name in SOFTMAX and product.output.shape == weights.shape
        return product if usable else None

    def _broadcasts(self, inputs: Any, output: torch.Tensor) -> None:
        """Note a product of all of one result with all of another that is none of matrices."""
        shapes = [tuple(each.shape) for each in tensors_in(inputs) if each in self.number]
        if len(shapes) == 2 and tuple(output.shape) not in shapes:
            self._unread(output, "multiplies all of one result with all of another")

    def functions(self, numbers: set[int]) -> list[str]:
        weighted = [self.by[each] for each in numbers if self.by[each] in WEIGHTED]
        return weighted + ["attention"] * len(numbers & self.attention)


def find(network: nn.Module, images: torch.Tensor, layers: Mapping[str, LayerInfo]) -> Found:
    """Find the residual additions of a network, in order, and its self-attention over patches.

    An addition is residual if one operand is made from the other by a function with weights. It is also residual if
    both are made from one result, one of them with at most one such function (a projection) and the other with more.
    Attention is a product of values with weights that are not negative and sum to 1 over the values.

    Parameters
    ----------
    images : (image, channel, y, x) as the network takes them, two or more unlike ones.
    layers : all layers of the network, by name, as `layers.survey` finds them.
    """
    with torch.no_grad():
        with _Found(network, images) as tape:
            output = network(images)
        if tape.unknown(first_tensor(output)):
            tape.gaps.append("")
        other = images.flip(0)
        with _Found(network, other) as flipped:
            network(other)
    lost = [f"{said_of(module)} runs code that cannot be followed" for module in tape.gaps]
    skips: list[Skip] = []
    unread: list[str] = []
    image = (images.shape[2], images.shape[3])
    for place, module, a, b, shape in tape.added:
        residual = _residual(tape, a, b)
        if residual is not None:
            info = _layer_of(module, shape, layers, image) if shape[:1] == (len(images),) else None
            if info is None:
                unread.append(module)
            else:
                skips.append(Skip(module, place, *residual, info))
    lost += [
        f"{said_of(module)} combines two results by `{name}`, which cannot be read" for module, name in tape.merged
    ]
    why = "no addition of a branch to what it was made of was found in its forward"
    if unread:
        why = f"what {said_of(unread[0])} adds cannot be read as units at positions"
    elif lost:
        why = f"whether it has any cannot be read: {lost[0]}"
    attention, reasons = _attention(tape, flipped, layers)
    if not attention:
        reasons += [f"whether it attends cannot be read: {each}" for each in lost]
    return Found(
        _named(skips),
        attention,
        "" if skips else why,
        "" if attention else reasons[0] if reasons else "it has no self-attention",
        tuple(dict.fromkeys(unread)),
        tuple(dict.fromkeys(reasons)),
        tuple(tape.trail),
    )


def said_of(module: str) -> str:
    return repr(module) if module else "the network's own forward"


def _residual(tape: _Found, a: int, b: int) -> tuple[bool, Branch, Literal["identity", "projection"]] | None:
    """Return whether the first operand of an addition skips the second, what the branch is, and what the skip is."""
    made_of = {a: tape.before(a), b: tape.before(b)}
    for skip, other in ((a, b), (b, a)):
        if skip != other and skip in made_of[other]:
            functions = tape.functions(made_of[other] - made_of[skip])
            return (skip == a, _branch(functions), "identity") if functions else None
    common = made_of[a] & made_of[b]
    if a == b or max(common) == 0:  # they share nothing but the image
        return None
    own = {each: tape.functions(made_of[each] - common) for each in (a, b)}
    skip, other = sorted((a, b), key=lambda each: len(own[each]))
    if len(own[skip]) > 1 or len(own[skip]) == len(own[other]):
        return None
    return skip == a, _branch(own[other]), "projection" if own[skip] else "identity"


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
        found.append(replace(skip, name=name))
    return found


def _attention(tape: _Found, flipped: _Found, layers: Mapping[str, LayerInfo]) -> tuple[list[Attention], list[str]]:
    """Return the attention over patches, and what cannot be measured of any other."""
    calls = Counter(each.module for each in tape.attended)
    again = {each.place: each.weights for each in flipped.attended}
    found, reasons, seen = [], [], Counter[str]()
    for each in tape.attended:
        module = each.module
        seen[module] += 1
        read = _of_images(each, again.get(each.place), tape.images)
        info = _tokens(module, layers)
        if read is None:
            reasons.append(f"{said_of(module)} attends within windows, or its images and heads cannot be told apart")
            continue
        _, heads, queries, keys = read.weights(each.weights, tape.images).shape
        if queries != keys or each.elsewhere:
            reasons.append(f"{said_of(module)} attends within windows, or from other tokens than those attended to")
        elif info is None or info.special + info.shape[1] * info.shape[2] != keys:
            reasons.append(
                f"the {keys} tokens of {said_of(module)} are no class or register tokens and then a grid of patches"
            )
        else:
            name = f"{module} [{seen[module]}]" if calls[module] > 1 else module
            found.append(Attention(name, heads, info, each.place, each.operand, read))
    reasons += [f"{said_of(module)} {why}, which cannot be read" for module, why, _ in tape.multiplied.values()]
    reasons += [
        f"{said_of(product.module)} takes a softmax of which it cannot be read whether it attends"
        for product, _ in tape.exponentials.values()
    ]
    return found, reasons


def _of_images(attended: _Attended, flipped: torch.Tensor | None, images: int) -> Reading | None:
    """Return where the images are among the weights' axes: the place where these follow when the batch is flipped."""
    weights = attended.weights
    if flipped is None or weights.shape != flipped.shape:
        return None
    best, closest = None, max(float((weights - flipped).abs().max()) / 10, 1e-6)
    for read in attended.reading.of_images(tuple(weights.shape), images):
        error = float((read.weights(weights, images).flip(0) - read.weights(flipped, images)).abs().max())
        if error < closest:
            best, closest = read, error
    return best


def _tokens(module: str, layers: Mapping[str, LayerInfo]) -> LayerInfo | None:
    """Return the tokens that a module attends over: of the nearest one around it; else of the first inside it."""
    inside = [name for name in layers if not module or name.startswith(f"{module}.")]
    names = (*_around(module), *inside)
    return next((layers[name] for name in names if name in layers and layers[name].layout == "tokens"), None)


def _in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in (
        "__iadd__",
        "__isub__",
        "__imul__",
        "__itruediv__",
    )


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point()


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


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
