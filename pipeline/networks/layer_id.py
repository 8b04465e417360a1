"""The identity of a layer: what its activations depend on, and nothing else.

Two networks whose layers have the same id have the same activations there, so they share that layer's store. A new
head, or a block fine-tuned further on, leaves the ids before it unchanged. Names of modules do not matter.

The network runs on single made-up images on the CPU. Every operation that reaches torch's dispatcher is recorded with
its name, its constants, and its tensors: each counts as an earlier result or, if it is none, by the digest of its
content. That digest is why it runs on the CPU and not on the meta device: a tensor that is neither a parameter nor a
buffer (a plain attribute, a closure's, a constant made in the forward) then counts by its values.

If values steer a forward pass (`if x.sum() > 0`, a detour through numpy), or if it cannot be traced, the recorded
operations are incomplete: the source files of the modules entered count too.
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
# Increase if the same network should get a new id because its activations are stored differently.
_VERSION = 1


def layer_ids(
    network: nn.Module,
    layers: Sequence[LayerInfo],
    preprocessing: Mapping[str, Any],
    numerics: Mapping[str, Any],
    input_shape: tuple[int, ...],
) -> dict[str, str]:
    """Return the id of each layer, by name: 20 hex digits, the same in every process.

    Parameters
    ----------
    network : on the CPU, in eval mode, with its weights as loaded: before BatchNorm is folded or the memory format
        changes (`numerics` says that they will).
    layers : from `layers.resolve`; the id includes how an output is read as maps.
    preprocessing, numerics : json-able settings that the activations depend on.
    input_shape : (channels, height, width).

    Raises
    ------
    MicrotomeError
        A forward pass that is random or changes from call to call, that fails, or that is neither traceable nor
        readable.
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
            [list(layer.shape), layer.layout, layer.special, *([layer.last] if layer.last else [])],
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
    """How far the forward pass was when a layer's output was ready.

    `operations` is the digest of all operations up to that point and of which tensor the output is. `open_ended` is
    true if these do not determine the output.
    """

    entered: int
    operations: str
    open_ended: bool


@dataclass
class _Trace:
    """One forward pass: modules in the order entered, and how far it was at each wanted layer.

    `silent` gives, for each entered module, those below it that no hook ever saw, such as the `out_proj` of torch's
    attention, whose weight is passed to a function.
    """

    entered: list[nn.Module] = field(default_factory=list)
    reached: dict[str, _Reached] = field(default_factory=dict)
    silent: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)


def _settled_trace(network: nn.Module, names: Sequence[str], shape: tuple[int, ...], digests: _Digests) -> _Trace:
    """Return the trace of the network once it is the same for two unlike images.

    The first forward pass may fill caches, so two pairs are tried. If two images still give different traces, but the
    same image gives the same one, values steer the forward pass past the dispatcher (for example through numpy): it is
    open-ended.
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
    """Run one traced forward pass, or a plain one if tracing fails."""
    try:
        with _Operations(digests) as log:
            return _forward(network, names, image, log)
    except MicrotomeError:
        raise
    # Whatever prevents tracing (compiled code, tensor subclasses), the sources still identify the forward pass.
    except Exception:
        try:
            return _forward(network, names, image, None)
        except Exception as error:
            raise MicrotomeError(
                f"the forward of {type(network).__name__} fails on an image of shape {tuple(image.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error


def _forward(network: nn.Module, names: Sequence[str], image: torch.Tensor, log: _Operations | None) -> _Trace:
    """Run one forward pass of an image (channel, y, x); without a log, every layer reached is open-ended."""
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
    """Assign every module that never fires to its nearest ancestor that does."""
    for child in module.children():
        if child not in seen:
            silent.setdefault(nearest, []).append(child)
        _attribute_silent(child, child if child in seen else nearest, seen, silent)


def _state(module: nn.Module, silent: Mapping[nn.Module, list[nn.Module]], digests: _Digests) -> Iterator[str]:
    """Yield digests of the direct parameters and buffers of a module and of the silent ones below it."""
    for owner in (module, *silent.get(module, ())):
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            if name != "num_batches_tracked":
                yield digests(tensor)


class _Operations(TorchDispatchMode):
    """The running digest of all operations of a forward pass.

    An in-place operation or a view is identified by its name and its input tensors, so the ordered list determines
    every result, without following aliases.
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
        # Otherwise, torch imports its compiler (6 s) to keep itself from compiling `__torch_dispatch__`.
        return False

    def start(self, images: torch.Tensor) -> None:
        """Record the operations of a forward pass over `images` from here on."""
        self._results[images] = "images"
        self.finished = False

    def upto(self, output: torch.Tensor | None) -> str:
        """Return the digest of the operations so far and of which of their results the output is."""
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
        # Written before the call: an in-place operation changes its inputs.
        line = repr([str(func), self._written(args), self._written(kwargs)])
        self._hash.update(line.encode() + b"\n")
        results = func(*args, **kwargs)
        for i, result in enumerate(results if isinstance(results, (tuple, list)) else (results,)):
            if isinstance(result, torch.Tensor):
                self._results[result] = f"{self._count}.{i}"
        self._count += 1
        return results

    def _written(self, value: Any) -> Any:
        """Return an argument as lists and strings that are the same in every process and on every device."""
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
    """Content digests of tensors, each computed once while the tensor lives and is not written to."""

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
    """Return the sha256 of dtype, shape and values."""
    if tensor.is_quantized:
        raise MicrotomeError(f"the network holds quantised values ({tensor.dtype}), expected floating-point ones")
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    made = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    values = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    made.update(values.view(torch.uint8).numpy().data)
    return made.hexdigest()


def _source(kind: type) -> str:
    """Return a module's class, as its name and the digest of its source file."""
    try:
        return f"{kind.__qualname__} {hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()}"
    except (OSError, TypeError) as error:
        raise MicrotomeError(
            f"the forward of {kind.__name__} can be identified neither by its operations nor by its source: "
            f"define the class in a Python file"
        ) from error


def _settings(module: nn.Module, digests: _Digests) -> list[str]:
    """Return the plain values and tensors that a module holds besides its state, which steer its forward pass."""
    held = [(name, value) for name, value in sorted(vars(module).items()) if not name.startswith("_")]
    plain = [f"{name}={value!r}" for name, value in held if _is_plain(value)]
    return plain + [f"{name}={digests(value)}" for name, value in held if isinstance(value, torch.Tensor)]


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))


@contextlib.contextmanager
def _fixed_conditions(network: nn.Module) -> Iterator[None]:
    """Fix everything around a forward pass that makes torch choose other operations for the same computation."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            # `matmul` folds a batch differently if an operand requires a gradient, even if none is recorded.
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
