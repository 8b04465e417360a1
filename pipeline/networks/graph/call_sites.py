"""Backward rules where a network calls functions of torch.

The network's own forward runs. Each torch function that it calls passes through a `CallSites`, with the module that
calls it. A call that gets nothing of the input is left alone. For any other, the active set of rules decides: the call
keeps torch's own gradient, or gets a custom one (`torch.autograd.Function`), so that what a method sends back travels
where gradients would. A call without a rule is an error that names the operation and the module, never a guess.

A tensor that is made of the input without its gradient (a mask, a detached factor) is cut. Cut tensors are remembered,
with what they are written into, and a call that combines one with a tensor that has a gradient is an error as well: the
gradient would miss a part of what the network computes. So is a call that gives plain numbers of either.

Reused modules, functional and in-place spellings, additions and joins are all calls. What runs outside torch's
functions (scripted bodies, foreign autograd Functions) leaves nodes in the autograd graph that no call made, which
`audit` refuses unless they only rearrange entries.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from pipeline.errors import MicrotomeError
from pipeline.networks.layers import one_attention_path


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Copies of entries: torch's own backward is that of every method.
REARRANGEMENTS = _names(
    "view reshape flatten unflatten permute transpose t mT mH T H adjoint swapaxes swapdims movedim moveaxis squeeze "
    "unsqueeze expand expand_as repeat tile contiguous clone getitem select narrow chunk split split_with_sizes "
    "tensor_split unbind cat concat concatenate stack hstack vstack roll pad flip flatten to type type_as float "
    "double index_select gather take_along_dim channel_shuffle pixel_shuffle pixel_unshuffle unfold "
    "view_as reshape_as copy atleast_1d atleast_2d cpu cuda setitem"
)
# Their result holds no values of the tensor that they get first.
METADATA = _names(
    "size dim ndim shape stride numel len is_floating_point is_complex device dtype requires_grad retains_grad "
    "is_contiguous get_device nelement element_size storage_offset format repr is_nested is_cuda is_sparse data_ptr "
    "new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like rand_like randn_like is_quantized "
    "result_type is_meta is_cpu is_mps is_xpu layout itemsize nbytes is_inference is_leaf grad_fn output_nr version "
    "retain_grad register_hook is_same_size can_cast dim_order is_signed is_conj is_neg is_pinned is_shared is_mkldnn "
    "grad"
)
FILLED = frozenset({"full_like", "new_full"})  # but may hold others'
LIKE = _names("to type_as view_as expand_as reshape_as")  # a second tensor gives a shape, type or device
# Linear in the one argument that is made of the input.
LINEAR = _names(
    "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d linear matmul addmm "
    "baddbmm einsum mul div neg add sub rsub sum mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d batch_norm interpolate lerp where masked_fill cumsum diff"
)
JOINTLY_LINEAR = frozenset({"add", "sub", "rsub", "where", "lerp"})  # linear in all of their tensors together
# Functions of each entry, but for the ReLU.
ELEMENTWISE = _names(
    "abs absolute atan celu clamp clamp_max clamp_min cos cosh elu erf erfc exp exp2 expm1 gelu hardshrink hardsigmoid "
    "hardswish hardtanh leaky_relu log log10 log1p log2 log_sigmoid logsigmoid mish pow prelu reciprocal relu6 rpow "
    "rrelu rsqrt selu sigmoid silu sin sinh softplus softshrink softsign special_erf special_expit sqrt square tan "
    "tanh tanhshrink threshold"
)
DROPOUTS = _names(
    "dropout native_dropout feature_dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"
)
WRITERS = frozenset({"copy", "setitem", "set_data"})  # write the other arguments into the first one
SHAPED_IN_PLACE = _names("squeeze unsqueeze transpose t swapaxes swapdims detach")
ALIASES = {
    "radd": "add", "iadd": "add", "rmul": "mul", "imul": "mul", "multiply": "mul", "isub": "sub", "subtract": "sub",
    "truediv": "div", "divide": "div", "true_divide": "div", "idiv": "div", "negative": "neg",
    "bmm": "matmul", "mm": "matmul", "mv": "matmul", "rmatmul": "matmul", "clip": "clamp", "special_softmax": "softmax",
    "deepcopy": "clone",
}  # fmt: skip
# Nodes of the autograd graph that these calls leave.
REARRANGED_NODES = _names(
    "AccumulateGrad View ReshapeAlias UnsafeView Permute Transpose T Squeeze Unsqueeze Expand Repeat Clone Slice "
    "Select Index Cat Stack Split SplitWithSizes Unbind Roll ConstantPadNd ReflectionPad1D ReflectionPad2D "
    "ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D Flip ToCopy Alias CopySlices CopyBackwards "
    "Copy IndexSelect Gather AsStrided PixelShuffle PixelUnshuffle ChannelShuffle Im2Col Unfold Chunk TensorSplit"
)
LINEAR_NODES = _names(
    "Convolution ConvolutionOverrideable MkldnnConvolution Addmm Mm Bmm Mv Dot Mul Div Neg Add Sub Rsub Mean Sum "
    "AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D MkldnnAdaptiveAvgPool2D NativeBatchNorm CudnnBatchNorm "
    "MiopenBatchNorm Linear MkldnnLinear UpsampleLinear1D UpsampleBilinear2D UpsampleBilinear2DAa UpsampleTrilinear3D "
    "UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D "
    "UpsampleNearestExact3D UpsampleBicubic2D UpsampleBicubic2DAa Baddbmm MaskedFill Where Cumsum Lerp"
)


class UnsupportedError(MicrotomeError):
    """An operation without a rule, or a network for which a method means nothing."""


class Vouched(torch.autograd.Function):
    """Base of the custom gradients of rules; the audit lets them pass."""


@dataclass(frozen=True)
class Call:
    """One call of a function of torch: its name without underscores and spellings, and what it was called with."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self) -> Any:
        return self.function(*self.args, **self.kwargs)


class CallSites(TorchFunctionMode):
    """Apply backward rules to every torch call inside the `with` block.

    A subclass gives `rule`, and says which nodes it leaves.

    Attributes
    ----------
    method : what errors call the method.
    nodes : names of autograd nodes, without `Backward0`, that its rules vouch for.
    linear : whether torch's own backward of linear calls is the method's.
    strict : whether a call that no rule knows is refused; otherwise it keeps torch's own gradient.
    of_score : whether the rules also hold for what makes a score of the network's output.
    """

    method: str = ""
    nodes: ClassVar[frozenset[str]] = frozenset()
    linear: ClassVar[bool] = True
    strict: ClassVar[bool] = True
    of_score: ClassVar[bool] = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._modules: list[str] = []
        self._cut: Any = WeakIdKeyDictionary()  # what is made of the input without its gradient: through which call
        self._written: Any = WeakIdKeyDictionary()  # the same, written into a tensor, which may have a gradient too
        self._aliases: Any = WeakIdKeyDictionary()  # share the memory of a tensor with a gradient
        self._made: set[int] = set()  # the autograd nodes of calls, by their sequence number
        self._depth = 0
        self._ends = contextlib.ExitStack()

    def rule(self, call: Call) -> Any:
        """Return the result of a call that gets something of the input, or `NotImplemented`."""
        return NotImplemented

    def carried(self, source: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        """Return a tensor that got the values of another: what a rule keeps beside one goes with them."""
        return to

    # The module that calls --------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            self._modules = []
            self._ends.enter_context(one_attention_path())
            for name, module in self.network.named_modules():
                enter = module.register_forward_pre_hook(lambda *_, name=name: self._modules.append(name))
                leave = module.register_forward_hook(lambda *_: self._leave(), always_call=True)
                self._ends.callback(enter.remove)
                self._ends.callback(leave.remove)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._depth -= 1
        if not self._depth:
            self._ends.close()

    def _leave(self) -> None:
        self._modules.pop()

    @property
    def where(self) -> str:
        """The module that runs, by its name in the network."""
        return (self._modules[-1] if self._modules else "") or type(self.network).__name__

    def refusal(self, operation: str, why: str = "has no rule") -> UnsupportedError:
        return UnsupportedError(f"{self.method}: operation {operation!r} in module {self.where!r} {why}")

    # Calls ------------------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name, in_place = named(func)
        if name in METADATA and not (name in FILLED and tensors_in(args[1:], kwargs)):
            return func(*args, **kwargs)
        if in_place and not args:
            args = (kwargs.pop("input"),)
        call = Call(name, func, tuple(args), kwargs)
        writes = in_place or name in WRITERS or _asks_in_place(call)
        if writes and name not in SHAPED_IN_PLACE:
            self._check_written(call)
        values = (args[:1],) if name in LIKE else (args, kwargs)
        cut = self._cut_of(args[1:], kwargs) if name in WRITERS else self._cut_of(*values)
        if not live(*values):
            return self._without_gradient(call, cut, writes)
        if (name in DROPOUTS and _drops(call)) or (name == "rrelu" and argument(call, 3, "training", False)):
            raise self.refusal(name, "draws random numbers: call `eval()` first")
        if cut is not None and self.strict:
            raise self.refusal(name, f"depends on the input in a way that has no gradient, through {cut}")
        before = torch.autograd._get_sequence_nr()
        try:
            return self._in_place(call, in_place)
        finally:
            self._made.update(range(before, torch.autograd._get_sequence_nr()))

    def _without_gradient(self, call: Call, cut: str | None, writes: bool) -> Any:
        """Run a call that gets no gradient of the input; remember if it still gets something of the input."""
        output = call.run()
        if cut is not None:
            made = tensors_in(output, call.kwargs.get("out"))
            if self.strict and not made and not writes:
                raise self._numbers(call)
            self._remember(made, cut)
            if writes or "out" in call.kwargs:
                self._remember_written(_first(call) if writes else made[0], cut)
        return output

    def _in_place(self, call: Call, in_place: bool) -> Any:
        """Meet a call; one that writes into its first argument works on a copy, and its result is written back.

        So autograd, and what rules keep, stay right.
        """
        function = call.function
        if in_place and call.name not in WRITERS | SHAPED_IN_PLACE:
            found = _out_of_place(call.name)
            if found is None and self.strict:
                raise self.refusal(call.name, "writes into its input, and has no form that does not")
            if found is None:
                return call.run()
            function = found
        elif not _asks_in_place(call):
            return self._met(call)
        destination, at = _first(call), _place_of_inplace(call.function)
        args = (self.carried(destination, destination.clone()), *call.args[1:])
        kwargs = {name: value for name, value in call.kwargs.items() if name not in ("input", "inplace")}
        if at is not None and len(args) > at:
            args = (*args[:at], False, *args[at + 1 :])
        output = self._met(Call(call.name, function, args, kwargs))
        if not live(output):
            self._remember_written(destination, self._here(call))
        return self.carried(output, destination.copy_(output))

    def _met(self, call: Call) -> Any:
        known = True
        if call.name in WRITERS and (before := self._cut_of(call.args[0])) is not None:
            self._remember_written(call.args[0], before)  # which gets a gradient in a part
        output = self.rule(call)
        if output is NotImplemented:
            known = call.name in REARRANGEMENTS | DROPOUTS or (self.linear and self._is_linear(call))
            if not known and (body := _body_of(call.function)):
                with self:
                    return body(*call.args, **call.kwargs)
            output = call.run()
        made = [call.args[0]] if call.name in WRITERS else tensors_in(output)
        if self.strict and not made:
            raise self._numbers(call)
        if self.strict and not known and live(made):
            raise self.refusal(call.name)
        lost = [each for each in made if not each.requires_grad]
        self._remember(lost, self._here(call))
        if call.name in WRITERS and lost:
            self._remember_written(call.args[0], self._here(call))
        if call.name in ("detach", "data"):
            for each in made:
                self._aliases[each] = True
        return output

    def _here(self, call: Call) -> str:
        return f"{call.name!r} in module {self.where!r}"

    def _numbers(self, call: Call) -> UnsupportedError:
        return self.refusal(call.name, "gives numbers of the input, which have no gradient")

    def _is_linear(self, call: Call) -> bool:
        if call.name not in LINEAR:
            return False
        of_input = sum(each.requires_grad for each in tensors_in(call.args, call.kwargs))
        if call.name == "div" and (live(argument(call, 1, "other")) or call.kwargs.get("rounding_mode") is not None):
            return False
        if call.name == "lerp" and live(argument(call, 2, "weight")):
            return False
        if call.name == "batch_norm" and trains(call):
            raise self.refusal("batch_norm", "in training mode depends on the other images of the batch")
        return of_input <= 1 or call.name in JOINTLY_LINEAR

    # What is made of the input without its gradient -------------------------------------------------------------------

    def _remember(self, made: Sequence[torch.Tensor], cut: str) -> None:
        for each in made:
            self._cut[each] = cut

    def _remember_written(self, destination: torch.Tensor, cut: str) -> None:
        """Remember a tensor that something cut was written into, and the one that it is a view of."""
        for each in _with_base(destination):
            self._written[each] = cut

    def _cut_of(self, *trees: Any) -> str | None:
        """Return through which call a tensor in here is made of the input without its gradient; None if none is."""
        for each in tensors_in(*trees):
            for one in _with_base(each):
                if one in self._written:
                    return self._written[one]
            if each in self._cut and not each.requires_grad:
                return self._cut[each]
        return None

    def _check_written(self, call: Call) -> None:
        """Refuse to write past autograd into the memory of a tensor that has a gradient."""
        into = _first(call)
        if not self.strict or not isinstance(into, torch.Tensor):
            return
        if into.requires_grad:
            past = call.name == "set_data" or not torch.is_grad_enabled()
        else:
            past = any(each.requires_grad or each in self._aliases for each in _with_base(into))
        if past:
            raise self.refusal(call.name, "writes into a tensor without its gradient")

    # What did not pass here -------------------------------------------------------------------------------------------

    def audit(self, output: torch.Tensor) -> None:
        """Refuse the autograd graph of a network's output if no call made one of its nodes, or no rule vouches for it.

        What only rearranges entries may be made outside of calls.
        """
        vouched = self.nodes | (LINEAR_NODES if self.linear else frozenset())
        seen, waiting = set(), [output.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            kind = kind_of(node)
            if isinstance(function := getattr(node, "_forward_cls", None), type):
                passes = issubclass(function, Vouched)
            else:
                passes = kind in REARRANGED_NODES or (kind in vouched and node._sequence_nr() in self._made)
            if not passes:
                raise UnsupportedError(
                    f"{self.method}: the network computes something outside torch's functions ({kind}), for example a "
                    f"scripted function or a Function of its own, for which there is no rule"
                )
            waiting += [each for each, _ in node.next_functions]


def kind_of(node: Any) -> str:
    """Return the name of a node of the autograd graph, such as `Mul`."""
    return node.name().rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")


def named(function: Any) -> tuple[str, bool]:
    """Return a function's name without underscores and overloads, and whether it writes into its first argument.

    An attribute's is that of the attribute, and `set_data` where the data are set.
    """
    name = str(getattr(function, "_opname", None) or getattr(function, "__name__", function)).split(".")[0]
    if name in ("__get__", "__set__"):
        owner = function.__self__
        plain = str(getattr(owner, "__name__", None) or owner.fget.__name__).strip("_")
        return ("set_data" if name == "__set__" and plain in ("data", "real", "imag") else plain), False
    if name.startswith("__") and name.endswith("__"):
        plain = name[2:-2]
        return ALIASES.get(plain, plain), plain[:1] == "i" and plain in ALIASES
    plain = name.strip("_")
    return ALIASES.get(plain, plain), name.endswith("_")


def tensors_in(*trees: Any) -> list[torch.Tensor]:
    """Return the tensors of nested arguments, also those that bound a slice."""
    found = []
    for each in tree_leaves(trees):
        if isinstance(each, torch.Tensor):
            found.append(each)
        elif isinstance(each, slice):
            found += [end for end in (each.start, each.stop, each.step) if isinstance(end, torch.Tensor)]
    return found


def _with_base(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return a tensor, and the one that it is a view of if it is one."""
    return (tensor,) if tensor._base is None else (tensor, tensor._base)


def live(*trees: Any) -> bool:
    """Return whether a tensor in here has a gradient of the input: weights have none."""
    return any(each.requires_grad for each in tensors_in(*trees))


def argument(call: Call, place: int, name: str, default: Any = None) -> Any:
    """Return one of a call's arguments, by place or name."""
    return call.args[place] if len(call.args) > place else call.kwargs.get(name, default)


def _first(call: Call) -> Any:
    return call.args[0] if call.args else call.kwargs["input"]


def trains(call: Call) -> bool:
    """Return whether a call of batch_norm takes its statistics from the batch."""
    of_network = isinstance(call.function, types.FunctionType)  # torch's own has weight and bias before the statistics
    mean = argument(call, 1 if of_network else 3, "running_mean")
    return bool(argument(call, 5, "training", False)) or mean is None


def _drops(call: Call) -> bool:
    default = "alpha" not in call.name
    training = argument(call, 2, "training", argument(call, 2, "train", default))
    return bool(training) and argument(call, 1, "p", 0.5) > 0


def _out_of_place(name: str) -> Callable[..., Any] | None:
    """Return the function that gives what one of this name writes into its input; None if there is none."""
    homes = (torch, torch.Tensor, nn.functional)
    return next((found for home in homes if (found := getattr(home, name, None)) is not None), None)


@functools.cache
def _place_of_inplace(function: Any) -> int | None:
    """Return the place of the argument `inplace` of a Python function; None for any other."""
    if not isinstance(function, types.FunctionType):
        return None
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return names.index("inplace") if "inplace" in names else None


def _asks_in_place(call: Call) -> bool:
    at = _place_of_inplace(call.function)
    return at is not None and argument(call, at, "inplace") is True


_DISPATCH = {f"has_torch_function{end}": (lambda *_: False) for end in ("", "_unary", "_variadic")}


@functools.cache
def _body_of(function: Any) -> Callable[..., Any] | None:
    """Return a Python function of torch without its own dispatch, so that what it calls is met; None for any other."""
    homes = ("torch.nn.functional", "torch._tensor", "torch.functional")
    if not isinstance(function, types.FunctionType) or not function.__module__.startswith(homes):
        return None
    if "if_true" in function.__code__.co_freevars:  # torch's choice between two functions, which dispatch themselves
        return None
    code, scope = function.__code__, {**function.__globals__, **_DISPATCH}
    clone = types.FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
    clone.__kwdefaults__ = function.__kwdefaults__
    return clone


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Take the gradients of parameters away: they cost a third of a backward, and make constants look like input."""
    before = [(each, each.requires_grad) for each in network.parameters()]
    try:
        for each, _ in before:
            each.requires_grad_(False)
        yield
    finally:
        for each, had in before:
            each.requires_grad_(had)
