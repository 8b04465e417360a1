"""The identity of a layer: what its activations depend on, and nothing else.

Two networks whose layers have one id have the same activations there, so the store of that layer is shared; a new
head or a block fine-tuned further on leaves the ids before it as they are. Names of modules do not matter.

The network runs on single made-up images on the CPU, with every operation that reaches torch's dispatcher noted: its
name, its constants, and for each tensor which earlier result it is or, when it is none, the digest of its content. On
the CPU rather than on the meta device because of that digest: a tensor that is no parameter or buffer (a plain
attribute, a closure's, a constant made in the forward) then counts by its values.

Where values steer a forward (`if x.sum() > 0`, a detour through numpy), or it cannot be traced, the operations seen do
not say all: the source files of the modules entered count too.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.errors import MicrotomeError
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import first_tensor, one_attention_path

_ID_LENGTH = 20  # hex digits: 80 bits
# Raise when the same network should get another id than before, since its activations are stored differently.
_VERSION = 1


def layer_ids(
    network: nn.Module,
    layers: Sequence[LayerInfo],
    preprocessing: Mapping[str, Any],
    numerics: Mapping[str, Any],
    input_shape: tuple[int, int, int],
) -> dict[str, str]:
    """The id of each layer, by name: 20 hex digits, the same in every process.

    Parameters
    ----------
    network : on the CPU, in eval mode, with its weights as they were loaded: before BatchNorm is folded or the memory
        format changed (`numerics` says that they will be).
    layers : as `layers.resolve` gives them; how an output is read as maps is part of the id.
    preprocessing, numerics : json-able settings that the activations depend on.
    input_shape : (channels, height, width).

    Raises
    ------
    MicrotomeError
        A forward that is random or changes from call to call, that fails, or that is neither traceable nor readable.
    """
    if any(tensor.device.type != "cpu" for tensor in (*network.parameters(), *network.buffers())):
        raise ValueError("layer ids are made from a network on the CPU")
    if network.training:
        raise ValueError("layer ids are made from a network in eval mode")
    names = [layer.name for layer in layers]
    digests = _Digests()
    with _fixed_conditions(network):
        trace = _settled_trace(network, names, input_shape, digests)
    common = [_VERSION, dict(preprocessing), dict(numerics), list(input_shape)]
    ids = {}
    for layer in layers:
        reached = trace.reached[layer.name]
        entered = trace.entered[: reached.entered]
        parts = [
            common,
            [list(layer.shape), layer.layout, layer.special],
            [digest for module in entered for digest in _state(module, trace.silent, digests)],
            reached.operations,
        ]
        if reached.open_ended:
            parts.append(sorted({_source(type(module)) for module in entered}))
            parts.append([_settings(module, digests) for module in entered])
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
        ids[layer.name] = hashlib.sha256(text.encode()).hexdigest()[:_ID_LENGTH]
    return ids


@dataclass(frozen=True)
class _Reached:
    """How far the forward was when a layer's output was ready.

    `operations` is the digest of all operations up to there and of which tensor the output is; `open_ended` when
    these do not determine the output.
    """

    entered: int
    operations: str
    open_ended: bool


@dataclass
class _Trace:
    """One forward: modules in the order entered, and per wanted layer how far it was.

    `silent` gives the modules below each entered one that no hook ever saw, such as the `out_proj` of torch's
    attention, whose weight is passed to a function.
    """

    entered: list[nn.Module] = field(default_factory=list)
    reached: dict[str, _Reached] = field(default_factory=dict)
    silent: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)


def _settled_trace(network: nn.Module, names: Sequence[str], shape: tuple[int, int, int], digests: _Digests) -> _Trace:
    """The trace of the network once it is the same for two unlike images.

    The first forward may fill caches, so two pairs are tried. Where the images still differ but the same image gives
    the same trace, values steer the forward past the dispatcher (through numpy, say): it is open-ended.
    """
    blank, ramp = torch.zeros(shape), torch.linspace(-2, 2, math.prod(shape)).reshape(shape)
    for _ in range(2):
        trace = _traced(network, names, blank, digests)
        other = _traced(network, names, ramp, digests)
        if trace.reached == other.reached:
            return trace
    again = _traced(network, names, blank, digests)
    differing = [name for name in names if trace.reached[name] != again.reached[name]]
    if differing:
        raise MicrotomeError(
            f"{type(network).__name__}: layer {differing[0]!r} is computed differently in each forward of the same "
            f"image; a layer must depend on the image and the weights alone: remove random numbers and counters from "
            f"its forward"
        )
    for name, reached in trace.reached.items():
        if reached != other.reached[name]:
            trace.reached[name] = replace(reached, open_ended=True)
    return trace


def _traced(network: nn.Module, names: Sequence[str], image: torch.Tensor, digests: _Digests) -> _Trace:
    """One traced forward, or a plain one where tracing fails."""
    try:
        with _Operations(digests) as log:
            return _forward(network, names, image, log)
    except MicrotomeError:
        raise
    # Whatever keeps a forward from being traced (compiled code, subclasses of tensors), its sources still identify it.
    except Exception:
        try:
            return _forward(network, names, image, None)
        except Exception as error:
            raise MicrotomeError(
                f"the forward of {type(network).__name__} fails on an image of shape {tuple(image.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error


def _forward(network: nn.Module, names: Sequence[str], image: torch.Tensor, log: _Operations | None) -> _Trace:
    """One forward of an image (channel, y, x); without a log, every layer reached is open-ended."""
    trace = _Trace()
    seen: set[nn.Module] = set()

    def enter(module: nn.Module, _: object) -> None:
        if module not in seen:
            seen.add(module)
            trace.entered.append(module)

    def reach(name: str) -> Any:
        def hook(module: nn.Module, _: object, output: object) -> None:
            if name in trace.reached:
                return
            tensor = first_tensor(output)
            operations = log.upto(tensor) if log is not None else ""
            trace.reached[name] = _Reached(len(trace.entered), operations, log is None or log.open_ended)
            if log is not None and len(trace.reached) == len(names):
                log.finished = True

        return hook

    hooks = [module.register_forward_pre_hook(enter) for module in network.modules()]
    hooks += [network.get_submodule(name).register_forward_hook(reach(name)) for name in names]
    try:
        batch = image[None].clone()
        if log is not None:
            log.start(batch)
        network(batch)
    finally:
        for handle in hooks:
            handle.remove()
    unreached = [name for name in names if name not in trace.reached]
    if unreached:
        raise MicrotomeError(f"layer {unreached[0]!r} of {type(network).__name__} is not called in its forward")
    _attribute_silent(network, network, seen, trace.silent)
    return trace


def _attribute_silent(
    module: nn.Module, nearest: nn.Module, seen: set[nn.Module], silent: dict[nn.Module, list[nn.Module]]
) -> None:
    """Give every module that never fires to its nearest ancestor that does."""
    for child in module.children():
        if child not in seen:
            silent.setdefault(nearest, []).append(child)
        _attribute_silent(child, child if child in seen else nearest, seen, silent)


def _state(module: nn.Module, silent: Mapping[nn.Module, list[nn.Module]], digests: _Digests) -> Iterator[str]:
    """Digests of the direct parameters and buffers of a module and of the silent ones below it."""
    for owner in (module, *silent.get(module, ())):
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            if name != "num_batches_tracked":
                yield digests(tensor)


class _Operations(TorchDispatchMode):
    """The running digest of all operations of a forward.

    An in-place operation or a view is told by its name and by which tensors it was given, so the list in its order
    determines every result; no aliasing has to be followed.
    """

    def __init__(self, digests: _Digests) -> None:
        super().__init__()
        self.open_ended = False
        self.finished = True
        self._digests = digests
        self._hash = hashlib.sha256()
        self._count = 0
        self._results = WeakTensorKeyDictionary()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch imports its compiler (6 s) to keep itself from compiling `__torch_dispatch__`.
        return False

    def start(self, images: torch.Tensor) -> None:
        """Note operations from here on, of a forward that is given `images`."""
        self._results[images] = "images"
        self.finished = False

    def upto(self, output: torch.Tensor | None) -> str:
        """Digest of the operations so far and of which of their results the output is."""
        so_far = self._hash.copy()
        so_far.update(repr(self._written(output)).encode())
        return so_far.hexdigest()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.finished:
            return func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise MicrotomeError(
                f"the forward draws random numbers ({func}) in eval mode; activations must depend on the image and "
                f"the weights alone: apply dropout or noise only `if self.training`"
            )
        self.open_ended |= torch.Tag.data_dependent_output in func.tags
        # Written before the call: an in-place operation changes what it is given.
        line = repr([str(func), self._written(args), self._written(kwargs)])
        self._hash.update(line.encode() + b"\n")
        results = func(*args, **kwargs)
        for i, result in enumerate(results if isinstance(results, (tuple, list)) else (results,)):
            if isinstance(result, torch.Tensor):
                self._results[result] = f"{self._count}.{i}"
        self._count += 1
        return results

    def _written(self, value: Any) -> Any:
        """An argument as lists and strings that say the same in every process and on every device."""
        if isinstance(value, torch.Tensor):
            known = self._results.get(value)
            return f"result {known}" if known is not None else f"content {self._digests(value)}"
        if isinstance(value, (tuple, list)):
            return [self._written(each) for each in value]
        if isinstance(value, Mapping):
            return [[str(key), self._written(each)] for key, each in value.items()]
        if isinstance(value, torch.device):
            return "device"
        if value is None or isinstance(value, (bool, int, float, complex, str)):
            return [type(value).__name__, repr(value)]
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        raise NotImplementedError(f"argument of type {type(value).__name__}")


class _Digests:
    """Content digests of tensors, each made once as long as the tensor lives and is not written to."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def __call__(self, tensor: torch.Tensor) -> str:
        version = 0 if tensor.is_inference() else tensor._version
        known = self._known.get(tensor)
        if known is not None and known[0] == version and not tensor.is_inference():
            return known[1]
        made = _content(tensor)
        self._known[tensor] = (version, made)
        return made


def _content(tensor: torch.Tensor) -> str:
    """sha256 of dtype, shape and values."""
    if tensor.is_quantized:
        raise MicrotomeError(f"the network holds quantised values ({tensor.dtype}), expected floating-point ones")
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    made = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    values = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    made.update(values.view(torch.uint8).numpy().data)
    return made.hexdigest()


def _source(kind: type) -> str:
    """A module's class: its name, and the digest of the file that it stands in with all that it calls there."""
    try:
        return f"{kind.__qualname__} {hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()}"
    except (OSError, TypeError) as error:
        raise MicrotomeError(
            f"the forward of {kind.__name__} can be identified neither by its operations nor by its source: "
            f"define the class in a Python file"
        ) from error


def _settings(module: nn.Module, digests: _Digests) -> list[str]:
    """The plain values and tensors that a module holds beside its state: they steer its forward."""
    held = [(name, value) for name, value in sorted(vars(module).items()) if not name.startswith("_")]
    plain = [f"{name}={value!r}" for name, value in held if _is_plain(value)]
    return plain + [f"{name}={digests(value)}" for name, value in held if isinstance(value, torch.Tensor)]


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))


@contextlib.contextmanager
def _fixed_conditions(network: nn.Module) -> Iterator[None]:
    """Everything around a forward that makes torch choose other operations for the same computation."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            # `matmul` folds a batch differently when an operand wants a gradient, even where none is recorded.
            parameter.requires_grad_(False)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            sdpa_kernel(SDPBackend.MATH),
            one_attention_path(),
        ):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
