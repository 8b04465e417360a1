"""Build a network from its description: a name in a library of networks, or a function in a Python file.

The description itself (`NetworkSpec`) is plain data: picklable, json-able, and imported without torch, so that the main
process can compute identities with it. torch is imported only when a network is built, and a library of networks only
when one of its networks is built.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from pipeline.config.networks import TRAINED_HERE, Described, NetworkSpec
from pipeline.errors import MicrotomeError, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

_ENDS = {"_exit": "ends the process", "fork": "forks the process", "forkpty": "forks the process"}  # functions of os
_LONGEST = 500  # characters of a foreign error message, which may list all keys of a network


def load(described: Described, weights_path: str | Path | None = None) -> nn.Module:
    """Return the network with its weights, on the CPU, in eval mode.

    Published weights are read from `local`, which `pipeline.networks.published` finds.

    Parameters
    ----------
    weights_path : the checkpoint that the workflow made of this network (needed for `weights: train`). It replaces
        `weights`, and its keys are the network's own: `prefix` and `within` do not apply to it.
    """
    spec = NetworkSpec.of(described)
    if weights_path is None and (spec.weights == TRAINED_HERE or spec.run is not None):
        raise MicrotomeError(f"{spec.architecture} is trained by the workflow: run its network stage first")
    network = build(spec)
    load_weights(network, spec, weights_path)
    return network


def load_weights(
    network: nn.Module, spec: NetworkSpec, weights_path: str | Path | None = None, shapes_only: bool = False
) -> None:
    """Load the weights of a description, if it has any, into a network built from it.

    `shapes_only` checks names and shapes against a network on the meta device, without reading values unless the
    library needs them.
    """
    from pipeline.networks import checkpoint

    read = checkpoint.shapes if shapes_only else checkpoint.read
    if weights_path is not None:
        checkpoint.load_state(network, read(weights_path), weights_path)
    elif spec.published:
        path = published_file(spec)
        checkpoint.load_state(network, _published(spec, shapes_only), path)
    elif spec.weights_file is not None:
        checkpoint.load_state(network, read(spec.weights_file, spec.prefix, spec.within), spec.weights_file)


def published_file(spec: NetworkSpec) -> Path:
    """Return where the published weights are: the file, or for transformers the folder."""
    if spec.local is None and spec.transformers is not None and Path(spec.transformers).is_dir():
        return Path(spec.transformers)
    if spec.local is None:
        raise MicrotomeError(f"{spec.architecture}: published weights were not looked up: give their file as `local`")
    return Path(spec.local)


def build(described: Described, device: str = "cpu", fresh: bool = False) -> nn.Module:
    """Return the network as its builder makes it, initialised from its seed, in eval mode.

    `device="meta"` gives shapes without memory or weights; `fresh` runs a module's file again. The global random state
    is restored. Builders are expected to draw initial weights from torch's generator, as `torch.nn.init` does.

    Raises
    ------
    MicrotomeError
        Unknown architecture, missing library, file or function, a builder that fails, returns something else, or opens
        a file that `files` does not name.
    """
    from torch import nn

    from pipeline.networks.opened import only_named_files
    from pipeline.networks.returned import returning

    spec = NetworkSpec.of(described)
    with only_named_files(spec), _contained(spec):
        network = _on(spec, device, _file_builder(spec, fresh) if spec.library is None else library(spec).builder(spec))
    if not isinstance(network, nn.Module):
        raise MicrotomeError(
            f"{spec.architecture} returned {type(network).__name__}, expected a torch.nn.Module: "
            f"return the network itself"
        )
    _check_kind(network, spec.architecture)
    try:
        network.eval()
    except Exception as error:
        raise MicrotomeError(
            f"{spec.architecture} refuses `eval()`: {type(error).__name__}: {error}: return a network that can leave "
            f"training mode, not an exported graph"
        ) from error
    training = next((name for name, module in network.named_modules() if module.training), None)
    if training is not None:
        raise MicrotomeError(
            f"{spec.architecture} stays in training mode after `eval()`: module {training or '(the whole)'!r}: have "
            f"its `train` set `self.training`"
        )
    return returning(network, spec.output, spec.architecture)


def _check_kind(network: nn.Module, name: str) -> None:
    """Refuse a network whose layers or weights cannot be read, with what to return instead."""
    import torch
    from torch.nn.parameter import is_lazy

    if isinstance(network, torch.jit.ScriptModule):
        raise MicrotomeError(
            f"{name} is scripted (TorchScript), so its layers cannot be read: return the module that was scripted"
        )
    if type(network).__name__ == "OptimizedModule":
        raise MicrotomeError(f"{name} is compiled (torch.compile): return the module that was compiled")
    tensors = (*network.named_parameters(), *network.named_buffers())
    if lazy := next((key for key, tensor in tensors if is_lazy(tensor)), None):
        raise MicrotomeError(
            f"{name} has lazy modules: {lazy!r} has no shape before the first forward: give its module the number of "
            f"inputs, or run the network on an image in its builder"
        )
    quantised = (key for key, each in network.named_modules() if ".quantized" in type(each).__module__)
    if (found := next(quantised, None)) is not None:
        raise MicrotomeError(
            f"{name} is quantised: {found!r} holds integers, expected floating-point weights: return the network as it "
            f"was before"
        )


def library(spec: NetworkSpec) -> types.ModuleType:
    """Return the module of `pipeline.networks.libraries` that handles the library of a network."""
    assert spec.library is not None
    try:
        return import_module(f"pipeline.networks.libraries.of_{spec.library}")
    except ModuleNotFoundError as error:
        if error.name != spec.library:
            raise
        raise missing(spec.library) from error


def missing(name: str) -> MicrotomeError:
    """Return the error that a library, an optional extra, is not installed."""
    return MicrotomeError(
        f"{name} is not installed, which networks named by `{name}:` need: install the extra, "
        f"`pip install '.[{name}]'` in Microtome's folder"
    )


def _published(spec: NetworkSpec, shapes_only: bool) -> dict[str, torch.Tensor]:
    """Return the state dict that the library's own code makes of its published file."""
    read = library(spec).state
    if shapes_only:
        # Conversions that need values fail on the meta device, each in its own way; they are then repeated with values.
        with contextlib.suppress(Exception):
            return _on(spec, "meta", lambda **_: read(spec, "meta"))
    state = _on(spec, "cpu", lambda **_: read(spec, "cpu"))
    return {key: tensor.to("meta") for key, tensor in state.items()} if shapes_only else state


def _on(spec: NetworkSpec, device: str, make: Callable[..., Any]) -> Any:
    """Return what a builder makes, with its seed and on a device; a failure is reported with the builder's call."""
    import torch

    with _seeded(spec.seed), torch.device(device):
        try:
            return make(**spec.arguments)
        except MicrotomeError:
            raise
        except Exception as error:
            said = str(error) if len(str(error)) <= _LONGEST else f"{str(error)[:_LONGEST]}..."
            raise MicrotomeError(
                f"{spec.architecture}({_call(spec.arguments)}) failed: {type(error).__name__}: {said}"
            ) from error


@contextlib.contextmanager
def _contained(spec: NetworkSpec) -> Iterator[None]:
    """Refuse a network's own code that exits, forks, or waits for input: it would take this process with it."""
    if spec.module_file is None:
        yield
        return
    own = threading.get_ident()

    def refused(does: str) -> MicrotomeError:
        return MicrotomeError(
            f"network file {spec.module_file} {does}, expected a file that only defines networks: move that below "
            f"`if __name__ == '__main__':`"
        )

    class NoInput(io.TextIOBase):
        def read(self, _: int | None = -1) -> str:
            raise refused("reads from standard input")

        def readline(self, _: int = -1) -> str:  # type: ignore[override]
            raise refused("reads from standard input")

    with contextlib.ExitStack() as stack:
        for name, does in (
            ("_exit", "ends the process"),
            ("fork", "forks the process"),
            ("forkpty", "forks the process"),
        ):
            stack.enter_context(patch.object(os, name, _unless(own, getattr(os, name), refused(does))))
        stack.enter_context(patch.object(sys, "stdin", NoInput()))
        try:
            yield
        except SystemExit as error:
            raise refused(f"exits ({error.code!r})") from error


def _unless(thread: int, function: Callable[..., Any], error: MicrotomeError) -> Callable[..., Any]:
    """Return a function that raises an error in one thread; in others it is as it was."""

    def called(*arguments: Any) -> Any:
        if threading.get_ident() == thread:
            raise error
        return function(*arguments)

    return called


def _file_builder(spec: NetworkSpec, fresh: bool) -> Callable[..., Any]:
    path = spec.module_file
    assert path is not None
    module = _import_file(path, fresh)
    function = getattr(module, spec.module_function, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise MicrotomeError(
            f"function {spec.module_function!r} is not in {path}{nearest(spec.module_function, known)}"
        )
    return function


def _import_file(path: Path, fresh: bool) -> types.ModuleType:
    """Return the Python file as a module with a unique name, never found by `import` and never on `sys.path`.

    The source is compiled from the bytes read here: the import system's bytecode cache goes by time and size, and would
    run an old version of a file that was replaced with its time kept.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        beside = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise MicrotomeError(
            f"network file {path} cannot be read ({error.strerror}){nearest(path.name, beside)}"
        ) from error
    name = f"microtome_network_{hashlib.sha256(str(path.resolve()).encode() + source).hexdigest()[:24]}"
    if name in sys.modules and not fresh:
        return sys.modules[name]
    module = types.ModuleType(name)
    module.__file__ = str(path)
    # Dataclasses and pickle look up a class's module by name while the class is being defined.
    sys.modules[name] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception) and not isinstance(error, MicrotomeError):
            raise MicrotomeError(f"network file {path} cannot be loaded: {type(error).__name__}: {error}") from error
        raise
    return module


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Run with torch's CPU generator at `seed`, then restore it. Other devices' generators are not touched."""
    import torch

    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _call(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())
