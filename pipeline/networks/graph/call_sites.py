"""Backward rules where a network calls functions of torch.

The network's own forward runs. Each torch function that it calls passes through a `CallSites`, with the module that
calls it. A call that gets nothing of the input is left alone. For any other, the active set of rules decides: the call
keeps torch's own gradient, or gets a custom one (`torch.autograd.Function`), so that what a method sends back travels
where gradients would. A call without a rule is an error that names the operation and the module, never a guess.

Reused modules, functional and in-place spellings, additions and joins are all calls. What runs outside torch's
functions (scripted bodies, foreign autograd Functions) leaves nodes in the autograd graph, which `audit` refuses unless
a rule vouches for them.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping
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
    "view reshape flatten unflatten permute transpose t mT T swapaxes swapdims movedim moveaxis squeeze unsqueeze "
    "expand expand_as repeat tile contiguous clone getitem select narrow slice chunk split split_with_sizes "
    "tensor_split unbind cat concat concatenate stack hstack vstack roll pad flip flatten to type type_as float "
    "double identity index_select gather take_along_dim channel_shuffle pixel_shuffle pixel_unshuffle unfold "
    "view_as reshape_as copy atleast_1d atleast_2d cpu cuda setitem"
)
# Their result holds no values of the tensors that they get.
METADATA = _names(
    "get set size dim ndim shape stride numel len is_floating_point is_complex device dtype requires_grad "
    "is_contiguous get_device nelement element_size storage_offset format hash repr is_nested has_names is_cuda "
    "is_sparse data_ptr is_grad_enabled new_zeros new_ones new_full new_empty zeros_like ones_like full_like "
    "empty_like rand_like randn_like iter is_quantized result_type broadcast_shapes is_meta is_cpu is_mps layout "
    "itemsize is_inference is_leaf names grad_fn retain_grad register_hook is_same_size can_cast is_nonzero"
)
# Linear in the one argument that is made of the input.
LINEAR = _names(
    "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d linear matmul addmm "
    "baddbmm einsum mul div neg add sub rsub sum mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d batch_norm interpolate lerp where masked_fill cumsum diff"
)
JOINTLY_LINEAR = frozenset({"add", "sub", "rsub", "where", "lerp"})  # linear in all of their tensors together
DROPOUTS = _names("dropout feature_dropout dropout1d dropout2d dropout3d alpha_dropout drop_path")
ALIASES = {
    "radd": "add", "iadd": "add", "rmul": "mul", "imul": "mul", "multiply": "mul", "isub": "sub", "subtract": "sub",
    "truediv": "div", "divide": "div", "true_divide": "div", "itruediv": "div", "idiv": "div", "negative": "neg",
    "bmm": "matmul", "mm": "matmul", "mv": "matmul", "rmatmul": "matmul", "clip": "clamp", "special_softmax": "softmax",
    "upsample": "interpolate", "deepcopy": "clone",
}  # fmt: skip
# Nodes of the autograd graph that these calls leave.
REARRANGED_NODES = _names(
    "AccumulateGrad View ReshapeAlias UnsafeView Permute Transpose T Squeeze Unsqueeze Expand Repeat Clone Slice "
    "Select Index Cat Stack Split SplitWithSizes Unbind Roll ConstantPadNd ReflectionPad2D ReplicationPad2D Flip "
    "ToCopy Alias CopySlices CopyBackwards Copy IndexSelect Gather AsStrided PixelShuffle PixelUnshuffle "
    "ChannelShuffle Im2Col Unfold Chunk TensorSplit"
)
LINEAR_NODES = _names(
    "Convolution ConvolutionOverrideable MkldnnConvolution Addmm Mm Bmm Mv Dot Mul Div Neg Add Sub Rsub Mean Sum "
    "AvgPool2D AvgPool3D AdaptiveAvgPool2D MkldnnAdaptiveAvgPool2D NativeBatchNorm CudnnBatchNorm MiopenBatchNorm "
    "Linear MkldnnLinear UpsampleBilinear2D UpsampleNearest2D UpsampleBicubic2D Baddbmm MaskedFill Where Cumsum "
    "Lerp"
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
    """Meets every call of a network inside its `with` block. A subclass gives `rule`, and says which nodes it leaves.

    Attributes
    ----------
    method : what errors call the method.
    nodes : names of autograd nodes, without `Backward0`, that its rules vouch for.
    linear : whether torch's own backward of linear calls is the method's.
    strict : whether a call that no rule knows is refused; otherwise it keeps torch's own gradient.
    """

    method: ClassVar[str] = ""
    nodes: ClassVar[frozenset[str]] = frozenset()
    linear: ClassVar[bool] = True
    strict: ClassVar[bool] = True

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._modules: list[str] = []
        self._cut: Any = WeakIdKeyDictionary()  # tensors that are made of the input, without its gradient, and how
        self._depth = 0
        self._ends = contextlib.ExitStack()

    def rule(self, call: Call) -> Any:
        """Return the result of a call that gets something of the input, or `NotImplemented`."""
        return NotImplemented

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
        if name in METADATA:
            return func(*args, **kwargs)
        if not live(args, kwargs):
            return self._without_gradient(name, func, args, kwargs)
        if in_place and name not in ("copy", "setitem"):
            # The rule works on a copy, and its result is written back: autograd, and what rules keep, stay right.
            out = self._met(Call(name, _out_of_place(func, name, self), (args[0].clone(), *args[1:]), kwargs))
            return args[0].copy_(out)
        if kwargs.get("inplace") is True:
            out = self._met(Call(name, func, (args[0].clone(), *args[1:]), kwargs | {"inplace": False}))
            return args[0].copy_(out)
        return self._met(Call(name, func, tuple(args), kwargs))

    def _without_gradient(self, name: str, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Run a call that gets no gradient of the input; remember if it still gets something of the input."""
        output = func(*args, **kwargs)
        cut = next((self._cut[each] for each in tensors_in(args, kwargs) if each in self._cut), None)
        if cut is not None:
            self._remember(output, cut)
        return output

    def _met(self, call: Call) -> Any:
        if call.name in DROPOUTS and _drops(call):
            raise self.refusal(call.name, "draws random numbers: call `eval()` first")
        cut = next((self._cut[each] for each in tensors_in(call.args, call.kwargs) if each in self._cut), None)
        if cut is not None and self.strict and call.name not in ("copy", "setitem"):
            raise self.refusal(call.name, f"depends on the input in a way that has no gradient, through {cut}")
        output = self.rule(call)
        if output is not NotImplemented:
            return output
        if call.name in REARRANGEMENTS or call.name in DROPOUTS:
            return call.run()
        if self.linear and self._is_linear(call):
            return call.run()
        if body := _body_of(call.function):
            with self:
                return body(*call.args, **call.kwargs)
        output = call.run()
        if not live((output,)):
            self._remember(output, f"{call.name!r} in module {self.where!r}")
            return output
        if self.strict:
            raise self.refusal(call.name)
        return output

    def _remember(self, output: Any, cut: str) -> None:
        for each in tensors_in((output,)):
            self._cut[each] = cut

    def _is_linear(self, call: Call) -> bool:
        if call.name not in LINEAR:
            return False
        of_input = sum(each.requires_grad for each in tensors_in(call.args, call.kwargs))
        if call.name == "div" and len(call.args) > 1 and live(call.args[1:2]):
            return False
        if call.name == "batch_norm" and trains(call):
            raise self.refusal("batch_norm", "in training mode depends on the other images of the batch")
        return of_input <= 1 or call.name in JOINTLY_LINEAR

    # What did not pass here -------------------------------------------------------------------------------------------

    def audit(self, output: torch.Tensor) -> None:
        """Refuse the autograd graph of a network's output if no rule vouches for one of its nodes."""
        seen, waiting = set(), [output.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            name = node.name().rpartition("::")[2]
            kind = name.rstrip("0123456789").removesuffix("Backward")
            custom = isinstance(getattr(node, "_forward_cls", None), type)
            if custom and issubclass(node._forward_cls, Vouched):  # type: ignore[attr-defined]
                pass
            elif custom or kind not in self.nodes | REARRANGED_NODES | (LINEAR_NODES if self.linear else frozenset()):
                raise UnsupportedError(
                    f"{self.method}: the network computes something outside torch's functions ({name}), for example a "
                    f"scripted function or a Function of its own, for which there is no rule"
                )
            waiting += [each for each, _ in node.next_functions]


def named(function: Any) -> tuple[str, bool]:
    """Return a function's name without underscores and overloads, and whether it writes into its first argument."""
    name = str(getattr(function, "_opname", None) or getattr(function, "__name__", function)).split(".")[0]
    if name.startswith("__") and name.endswith("__"):
        plain = name[2:-2]
        return ALIASES.get(plain, plain), plain[:1] == "i" and plain in ALIASES
    plain = name.strip("_")
    return ALIASES.get(plain, plain), name.endswith("_")


def tensors_in(*trees: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(trees) if isinstance(each, torch.Tensor)]


def live(*trees: Any) -> bool:
    """Return whether a tensor in here has a gradient of the input: weights have none."""
    return any(each.requires_grad for each in tensors_in(*trees))


def argument(call: Call, place: int, name: str, default: Any = None) -> Any:
    """Return one of a call's arguments, by place or name."""
    return call.args[place] if len(call.args) > place else call.kwargs.get(name, default)


def trains(call: Call) -> bool:
    """Return whether a call of batch_norm takes its statistics from the batch."""
    return bool(argument(call, 5, "training", False)) or argument(call, 1, "running_mean") is None


def _drops(call: Call) -> bool:
    training = argument(call, 2, "training", argument(call, 2, "train", call.name not in ("drop_path",)))
    return bool(training) and argument(call, 1, "p", 0.5) > 0


def _out_of_place(function: Any, name: str, sites: CallSites) -> Callable[..., Any]:
    for home in (torch, torch.Tensor, nn.functional):
        found = getattr(home, name, None)
        if found is not None:
            return found
    raise sites.refusal(name, "writes into its input, and has no form that does not")


_DISPATCH = {f"has_torch_function{end}": (lambda *_: False) for end in ("", "_unary", "_variadic")}


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
