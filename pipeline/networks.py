"""Build a network from its description: a torchvision name or a function in a Python file.

The description itself (`NetworkSpec`) is plain data: picklable, json-able, and imported without torch, so that the
main process can compute identities with it. torch is imported when a network is built, torchvision only when one of
its own architectures is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.errors import MicrotomeError, nearest

if TYPE_CHECKING:
    from torch import nn

UNTRAINED = "random"
TRAINED_HERE = "train"
# Arguments of torchvision's builders which fetch weights; a network's weights come from `weights` and nowhere else.
_FETCHING_ARGUMENTS = ("weights", "weights_backbone", "pretrained", "pretrained_backbone")


class Described(Protocol):
    """Anything with the fields of a `NetworkSpec`."""

    @property
    def torchvision(self) -> str | None: ...
    @property
    def module(self) -> str | None: ...
    @property
    def arguments(self) -> dict[str, Any]: ...
    @property
    def weights(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def prefix(self) -> str | None: ...


class NetworkSpec(BaseModel):
    """What has to be known to build one network. Exactly one of `torchvision` and `module` is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    torchvision: str | None = Field(None, description="a name that `torchvision.models.get_model` knows")
    module: str | None = Field(None, description="`path.py:function`; the function returns the network")
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the builder")
    weights: str = Field(UNTRAINED, description="a checkpoint, `random` (the untrained control) or `train` (made here)")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the initial weights")
    prefix: str | None = Field(
        None, description="what every key of the checkpoint starts with and the network's keys do not, `module.` say"
    )

    @model_validator(mode="after")
    def _one_source(self) -> NetworkSpec:
        if (self.torchvision is None) == (self.module is None):
            raise ValueError("a network needs exactly one of `torchvision: name` and `module: path.py:function`")
        if self.module is not None:
            file, colon, function = self.module.rpartition(":")
            if not (colon and file and function.isidentifier()):
                raise ValueError(f"module {self.module!r} is not of the form path.py:function")
        return self

    @classmethod
    def of(cls, described: Described) -> NetworkSpec:
        """The part of a larger description, a network of a configuration say, that builds the network."""
        if type(described) is cls:
            return described
        return cls(**{name: getattr(described, name) for name in cls.model_fields})

    @property
    def architecture(self) -> str:
        """The name by which messages call this network: torchvision's, or that of the building function."""
        return self.torchvision or self.module_function

    @property
    def weights_file(self) -> Path | None:
        """The checkpoint, or None when the weights are random or trained here."""
        return None if self.weights in (UNTRAINED, TRAINED_HERE) else Path(self.weights)

    @property
    def module_file(self) -> Path | None:
        return Path(self.module.rpartition(":")[0]) if self.module is not None else None

    @property
    def module_function(self) -> str:
        return self.module.rpartition(":")[2] if self.module is not None else ""


def load(described: Described, weights_path: str | Path | None = None) -> nn.Module:
    """The network with its weights, on the CPU, in eval mode.

    Parameters
    ----------
    weights_path : the checkpoint that the workflow made of this network (needed for `weights: train`). It replaces
        `weights`, and its keys are the network's own: `prefix` does not apply to it.
    """
    from pipeline import checkpoint

    spec = NetworkSpec.of(described)
    if weights_path is None and spec.weights == TRAINED_HERE:
        raise MicrotomeError(f"{spec.architecture} is trained by the workflow: run its network stage first")
    network = build(spec)
    if weights_path is not None:
        checkpoint.load_into(network, weights_path)
    elif spec.weights_file is not None:
        checkpoint.load_into(network, spec.weights_file, prefix=spec.prefix)
    return network


def build(described: Described, device: str = "cpu") -> nn.Module:
    """The network as its builder makes it, initialised from its seed, in eval mode.

    `device="meta"` gives shapes without memory or weights. The global random state is left as it was. Builders are
    expected to draw initial weights from torch's generator, as `torch.nn.init` does.

    Raises
    ------
    MicrotomeError
        Unknown architecture, missing file or function, a builder that fails or returns something else.
    """
    import torch
    from torch import nn

    spec = NetworkSpec.of(described)
    builder = _torchvision_builder(spec) if spec.torchvision is not None else _file_builder(spec)
    with _seeded(spec.seed), torch.device(device):
        try:
            network = builder(**spec.arguments)
        except Exception as error:
            raise MicrotomeError(
                f"{spec.architecture}({_call(spec.arguments)}) failed: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(network, nn.Module):
        raise MicrotomeError(
            f"{spec.architecture} returned {type(network).__name__}, expected a torch.nn.Module: "
            f"return the network itself"
        )
    return network.eval()


def _torchvision_builder(spec: NetworkSpec) -> Callable[..., Any]:
    import torchvision

    assert spec.torchvision is not None
    refused = [name for name in _FETCHING_ARGUMENTS if name in spec.arguments]
    if refused:
        raise MicrotomeError(
            f"argument {refused[0]!r} of {spec.architecture} would fetch weights: "
            f"give a checkpoint as `weights: path` and leave it out of `arguments`"
        )
    known = torchvision.models.list_models()
    if spec.torchvision not in known:
        raise MicrotomeError(
            f"network {spec.torchvision!r} is not in torchvision {torchvision.__version__}"
            f"{nearest(spec.torchvision, known)}"
        )
    builder = torchvision.models.get_model_builder(spec.torchvision)
    fixed: dict[str, Any] = {"weights": None}
    # Segmentation and detection networks fetch a trained backbone by default, even with `weights=None`.
    if "weights_backbone" in inspect.signature(builder).parameters:
        fixed["weights_backbone"] = None
    return lambda **arguments: builder(**fixed, **arguments)


def _file_builder(spec: NetworkSpec) -> Callable[..., Any]:
    path = spec.module_file
    assert path is not None
    module = _import_file(path)
    function = getattr(module, spec.module_function, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise MicrotomeError(
            f"function {spec.module_function!r} is not in {path}{nearest(spec.module_function, known)}"
        )
    return function


def _import_file(path: Path) -> types.ModuleType:
    """The Python file as a module of a name of its own, never found by `import` and never on `sys.path`.

    The source is compiled from the bytes read here: the import system's bytecode cache goes by time and size, and
    would run an old version of a file that was replaced with its time kept.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        beside = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise MicrotomeError(
            f"network file {path} cannot be read ({error.strerror}){nearest(path.name, beside)}"
        ) from error
    name = f"microtome_network_{hashlib.sha256(str(path.resolve()).encode() + source).hexdigest()[:24]}"
    if name in sys.modules:
        return sys.modules[name]
    module = types.ModuleType(name)
    module.__file__ = str(path)
    # Dataclasses and pickle look a class's module up by name while it is being defined.
    sys.modules[name] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception):
            raise MicrotomeError(f"network file {path} cannot be loaded: {type(error).__name__}: {error}") from error
        raise
    return module


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Run with torch's CPU generator at `seed`, then put it back. Other devices' generators are not touched."""
    import torch

    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _call(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())
