"""A check that a network's outputs depend on the image and the weights alone.

An image is run beside other images, at another place of the batch, after other images, and through a second build of
the network. All batches have one size: another one is other arithmetic. The images are unlike in brightness and
contrast, so that a network that treats images differently shows it.
"""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from pipeline.config.networks import RANDOM, TRAINED_HERE, NetworkSpec
from pipeline.errors import MicrotomeError
from pipeline.networks.build import build, load_weights
from pipeline.networks.graph.operations import tensors_in
from pipeline.networks.layers import Recorder
from pipeline.networks.opened import only_named_files

_ELSEWHERE = 1e-6  # of a layer's largest value: the last bits may depend on the place in the batch
_ROUNDED, _IN_DOUBLE = 1e-3, 1e-12  # more than the last bits, of deep networks, which are rounding if float64 has less
_LEVELS = ((-1.5, 0.5), (1.5, 0.5), (0.0, 1.0), (-0.5, 1.5))  # (mean, standard deviation) of the images
# Images of the batches: the first image with a neighbour, with another one, and at another place.
_FIRST, _NEIGHBOUR, _PLACE = (0, 1), (0, 2), (3, 0)
_LOGITS = "logits"
_ALONE = "activations must depend on the image and the weights alone"


def check_independence(
    spec: NetworkSpec,
    layers: Sequence[str],
    input_shape: tuple[int, ...],
    weights_path: str | Path | None = None,
) -> list[str]:
    """Refuse a network whose layers or logits depend on more than the image and the weights; return what is to be told.

    Parameters
    ----------
    layers : names of those to be recorded.
    input_shape : (channels, height, width), or a generator's latents'.
    weights_path : as in `build.load_weights`.

    Raises
    ------
    MicrotomeError
        Random numbers, batch statistics, a state that earlier images set, two builds that differ, a layer that does not
        give one row an image. With the layer, or `logits`.
    """
    noise = torch.randn((len(_LEVELS), *input_shape), generator=torch.Generator().manual_seed(0))
    level, contrast = torch.tensor(_LEVELS).view(len(_LEVELS), 2, *(1 for _ in input_shape)).unbind(1)
    images = level + contrast * noise
    name = spec.architecture

    def run(network: nn.Module, batch: tuple[int, int]) -> dict[str, torch.Tensor]:
        with only_named_files(spec):
            return _run(network, layers, images[list(batch)], name)

    network = _built(spec, weights_path)
    with _Steering() as steering:
        first = run(network, _FIRST)
    other = run(network, _NEIGHBOUR)
    for layer, output in first.items():
        if not _equal(output[0], other[layer][0]):
            raise MicrotomeError(
                f"{_said(layer, name)} gives an image other values beside other images: it depends on the whole batch, "
                f"as with batch statistics (`track_running_stats=False`), or on images that ran before; {_ALONE}"
            )
    del network
    again = _built(spec, weights_path)
    other = run(again, _PLACE)
    repeated = run(again, _FIRST)
    del again  # a third build would stand beside it
    _compare_builds(first, repeated, lambda: run(_built(spec, weights_path), _FIRST), spec)
    doubled: dict[str, float] = {}
    for layer, output in first.items():
        apart = _apart(output, other[layer])
        if apart <= _ELSEWHERE:
            continue
        doubled = doubled or _doubled(lambda: _built(spec, weights_path), layers, images)
        if apart > _ROUNDED or doubled.get(layer, math.inf) > _IN_DOUBLE:
            raise MicrotomeError(
                f"{_said(layer, name)} gives an image other values at another place of the batch, by {apart:.3g} of "
                f"its largest value; {_ALONE}"
            )
    if steering.read is None:
        return []
    return [
        f"values of its outputs steer its forward (by `{steering.read}`): where those of a whole batch do, its images "
        f"decide for one another, which shows only for images that take another way than those of the inspection"
    ]


class _Steering(TorchFunctionMode):
    """Notes the first function by which a forward reads values that are made of the images; `_run` marks these."""

    def __init__(self) -> None:
        super().__init__()
        self.known: Any = WeakIdKeyDictionary()
        self.read: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        given = [*tensors_in(args), *tensors_in(kwargs)]
        if name == _MARK or any(each in self.known for each in given):
            if name in _READS:
                self.read = self.read or _READS[name]
            changed = given[:1] if name.endswith("_") or name == "__setitem__" else []
            self.known.update(dict.fromkeys([*tensors_in(output), *changed], True))
        return output


_READS = {"__bool__": "bool", "__float__": "float", "__int__": "int", "__index__": "int"} | {
    name: name for name in ("item", "tolist", "numpy", "__array__", "allclose", "equal", "is_nonzero")
}
_MARK = "clone"  # by which `_run` makes the images


def _apart(output: torch.Tensor, other: torch.Tensor) -> float:
    """Return how far the first image is from itself at another place, as a share of the largest value."""
    apart, largest = (output[0] - other[1]).abs().nan_to_num().amax(), output.abs().nan_to_num().amax()
    return float(apart / largest) if apart else 0.0


def _doubled(made: Callable[[], nn.Module], layers: Sequence[str], images: torch.Tensor) -> dict[str, float]:
    """Return how far an image is from itself at another place in float64; nothing if the network has no float64."""

    def run(batch: tuple[int, int]) -> dict[str, torch.Tensor]:
        with Recorder(network, layers, take=lambda _, output: output.clone()) as record:
            logits, outputs = record(images[list(batch)].double())
        return outputs if logits is None else outputs | {_LOGITS: logits}

    try:
        network = made().double()
        one, other = run(_FIRST), run(_PLACE)
    except Exception:  # tensors that the forward makes in float32 do not mix with float64
        return {}
    return {layer: _apart(output, other[layer]) for layer, output in one.items() if output.dtype == torch.float64}


def _compare_builds(
    first: dict[str, torch.Tensor], again: dict[str, torch.Tensor], third: Any, spec: NetworkSpec
) -> None:
    """Refuse what a second build, through which another batch went first, gives otherwise."""
    differing = [layer for layer, output in first.items() if not _equal(output, again[layer])]
    if not differing:
        return
    said = _said(differing[0], spec.architecture)
    if _equal(first[differing[0]], third()[differing[0]]):
        raise MicrotomeError(
            f"{said} gives other values after other images: its forward keeps a state, for example one that the first "
            f"batch sets; {_ALONE}"
        )
    raise MicrotomeError(
        f"{said} differs between two builds with seed {spec.seed}"
        + ("" if _drawn(spec) else " and the same weights")
        + ": the builder draws values that no id and no checkpoint holds, for example from numpy or `random`: draw "
        "them from torch's generator, which has the seed, or register them as buffers of a checkpoint"
    )


def _built(spec: NetworkSpec, weights_path: str | Path | None) -> nn.Module:
    network = build(spec, fresh=True)
    load_weights(network, spec, weights_path)
    return network


def _drawn(spec: NetworkSpec) -> bool:
    return spec.weights in (RANDOM, TRAINED_HERE)


def _run(network: nn.Module, layers: Sequence[str], images: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """Return the outputs of the layers and `logits` for a batch; refuse a forward that draws random numbers."""
    before = _random_states()
    with Recorder(network, layers) as record:
        logits, outputs = record(images.clone())
    drawn = [generator for generator, state in _random_states().items() if state != before[generator]]
    if drawn:
        raise MicrotomeError(
            f"{name}: the forward draws random numbers (from {drawn[0]}) in eval mode; {_ALONE}: apply dropout or "
            f"noise only `if self.training`"
        )
    if logits is not None and logits.ndim and len(logits) == len(images):
        outputs[_LOGITS] = logits.float()
    return outputs


def _random_states() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": pickle.dumps(np.random.get_state()),
        "random": random.getstate(),
    }


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _said(layer: str, name: str) -> str:
    return f"{name}'s output" if layer == _LOGITS else f"layer {layer!r} of {name}"
