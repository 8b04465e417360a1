"""Networks of torchvision, and the weights that it publishes by name."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import torch
import torchvision
from torchvision.models import WeightsEnum

from pipeline.config.networks import NetworkSpec
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks import checkpoint
from pipeline.networks.build import published_file
from pipeline.networks.published import Published

# Arguments that fetch weights; a network's weights come from `weights` and nowhere else.
_FETCHING = ("weights", "weights_backbone", "pretrained", "pretrained_backbone")


def builder(spec: NetworkSpec) -> Callable[..., torch.nn.Module]:
    known, fixed = _function(spec), {"weights": None}
    # By default, segmentation and detection networks fetch a trained backbone, even with `weights=None`.
    if "weights_backbone" in inspect.signature(known).parameters:
        fixed["weights_backbone"] = None
    return lambda **arguments: known(**fixed, **arguments)


def state(spec: NetworkSpec, device: str) -> dict[str, torch.Tensor]:
    """Return the weights as torchvision's builder loads them: only it translates the old keys in some files."""
    path = published_file(spec)
    read = checkpoint.shapes if device == "meta" else checkpoint.read
    with _reading(lambda: read(path)), warnings.catch_warnings():
        # The warning says that the auxiliary heads of GoogLeNet were not trained; eval mode does not call them.
        warnings.filterwarnings("ignore", message="auxiliary heads", category=UserWarning)
        return _function(spec)(weights=_weights(spec), **spec.arguments).state_dict()


def describe(spec: NetworkSpec) -> Published:
    weights = _weights(spec)
    preset = weights.transforms()
    size, resize = (getattr(preset, name, None) or [None] for name in ("crop_size", "resize_size"))
    file = urlsplit(weights.url).path.rpartition("/")[2]
    return Published(
        weights=str(weights),
        file=file,
        hash_prefix=digest.group(1) if (digest := torch.hub.HASH_REGEX.search(file)) else None,
        arguments=_implied(spec, weights),
        mean=_three(getattr(preset, "mean", None)),
        std=_three(getattr(preset, "std", None)),
        size=(size[0], size[-1]) if size[0] else None,
        resize=resize[0],
    )


def fetch(spec: NetworkSpec) -> None:
    """Fetch into torch's cache; torch checks the bytes against the digest in the file's name before it keeps them."""
    _weights(spec).get_state_dict(progress=True, check_hash=True, weights_only=True, map_location="meta")


def _function(spec: NetworkSpec) -> Callable[..., torch.nn.Module]:
    assert spec.torchvision is not None
    refused = [name for name in _FETCHING if name in spec.arguments]
    if refused:
        raise MicrotomeError(
            f"argument {refused[0]!r} of {spec.architecture} would fetch weights: "
            f"give a checkpoint or a name as `weights` and leave it out of `arguments`"
        )
    known = torchvision.models.list_models()
    if spec.torchvision not in known:
        raise MicrotomeError(
            f"network {spec.torchvision!r} is not in torchvision {torchvision.__version__}"
            f"{nearest(spec.torchvision, known)}"
        )
    return torchvision.models.get_model_builder(spec.torchvision)


def _weights(spec: NetworkSpec) -> WeightsEnum:
    """Return the entry that `weights` names: `IMAGENET1K_V1`, `DEFAULT`, or with its class as torchvision prints it."""
    _function(spec)
    enum = torchvision.models.get_model_weights(spec.torchvision)
    kind, _, name = spec.weights.rpartition(".")
    if kind not in ("", enum.__name__) or name not in enum.__members__:
        given = ", ".join(enum.__members__) or "none"
        raise MicrotomeError(
            f"{spec.architecture} has no published weights {spec.weights!r}{nearest(name, enum.__members__)}; "
            f"torchvision {torchvision.__version__} has {given} ({enum.__name__})"
        )
    return enum[name]


def _implied(spec: NetworkSpec, weights: WeightsEnum) -> dict[str, Any]:
    """Return the arguments that the builder sets for these weights, so that the untrained control is built alike."""
    function = _function(spec)
    implied: dict[str, Any] = {}
    if "categories" in weights.meta:
        implied["num_classes"] = len(weights.meta["categories"])
    match function.__module__.rpartition(".")[2]:
        case "googlenet" | "inception":
            implied |= {"transform_input": True, "aux_logits": True, "init_weights": False}
        case "vision_transformer":
            implied["image_size"] = weights.meta["min_size"][0]
        case "maxvit":
            implied["input_size"] = list(weights.meta["min_size"])
    if "aux_loss" in inspect.signature(function).parameters:
        implied["aux_loss"] = True
    return implied


@contextlib.contextmanager
def _reading(read: Callable[[], dict[str, torch.Tensor]]) -> Iterator[None]:
    """Make torchvision's builders load what `read` returns: their own loading would run what is pickled in a file."""
    own = WeightsEnum.get_state_dict
    WeightsEnum.get_state_dict = lambda self, *args, **kwargs: read()
    try:
        yield
    finally:
        WeightsEnum.get_state_dict = own


def _three(values: Any) -> tuple[float, float, float] | None:
    return None if values is None else (values[0], values[1], values[2])
