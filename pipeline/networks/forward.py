"""Networks as tasks name them, loaded once per worker, and their forward pass over the images of a shard.

Every stage runs networks through this module, with the same pixels, micro-batches and torch settings, so the outputs
agree bit for bit.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.networks import GeneratorNetwork, Network, Segmenter, planned
from pipeline.errors import DamagedError, MicrotomeError
from pipeline.networks.layer import LayerInfo
from pipeline.workers.devices import device
from pipeline.workers.tasks import computing

if TYPE_CHECKING:
    import torch


HALF_MAX = 65504.0  # of float16


@dataclass(frozen=True)
class Model:
    """A network as tasks name it: small, picklable, and equal only for equal networks and weights."""

    name: str
    spec_json: str
    weights: Path
    sha256: str
    architecture: str  # digest of its builder: an edited module may compute something else with the same weights

    @property
    def spec(self) -> Network:
        return planned(json.loads(self.spec_json))

    @property
    def reads(self) -> str:
        """The array of a data set's images that it reads."""
        return "latent" if isinstance(self.spec, GeneratorNetwork) else "image"


class NonFiniteError(Exception):
    """A layer's output holds a NaN or an infinity; args: layer, image index, and the unit if it is known."""


def loaded(model: Model) -> torch.nn.Module:
    """Return the network with its weights, if the file still is what the stage `network` wrote."""
    from pipeline.networks.build import load
    from pipeline.networks.checkpoint import sha256

    if sha256(model.weights) != model.sha256:
        raise DamagedError(
            f"{model.weights} is not what was written (another sha256): run `make repair` to recompute it"
        )
    return load(model.spec, model.weights)


@functools.lru_cache(maxsize=2)
def network_of(model: Model) -> torch.nn.Module:
    """Return this worker's copy of a network, loaded once."""
    return placed(loaded(model), model.spec)


def placed(network: torch.nn.Module, spec: Network | Segmenter) -> torch.nn.Module:
    """Put a network on the worker's device in its memory format, and set torch to compute it the same way each time."""
    import torch

    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    network = network.to(device())
    return network.to(memory_format=torch.channels_last) if spec.numerics.channels_last else network


def platform_numerics(version: int) -> dict[str, str]:
    """Return what else determines the last bits: this module, the device kind and torch's minor version."""
    import torch

    return {
        "version": str(version),
        "dtype": "float32",
        "device": device(),
        "torch": ".".join(torch.__version__.split(".")[:2]),
    }


def normalise(pixels: torch.Tensor, spec: Network | Segmenter) -> torch.Tensor:
    """Convert uint8 (image, 3, y, x) to float32 on the device: (x / 255 - mean) / std, in the network's memory format.

    A network with a single mean gets grey images (image, 1, y, x); with `per_image`, each image is whitened by itself.
    A generator gets latents, as they are.
    """
    import torch

    from kernels.images.grey import grey
    from kernels.images.whiten import whiten

    pixels = pixels.to(device(), non_blocking=True)
    if isinstance(spec, GeneratorNetwork):
        return pixels
    if spec.preprocessing.channels == 1:
        pixels = grey(pixels)
    if spec.preprocessing.per_image:
        x = whiten(pixels.float())
    else:
        x = pixels.float().div_(255)
        mean, std = (_constant(values, x.device) for values in (spec.preprocessing.mean, spec.preprocessing.std))
        x = x.sub_(mean).div_(std)
    return x.contiguous(memory_format=torch.channels_last) if spec.numerics.channels_last else x


@functools.lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return one number per channel, cached on the device: a copy to a GPU would wait for its pending work."""
    import torch

    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def forward_in_batches(
    model: Model,
    pixels: torch.Tensor,
    names: Sequence[str],
    take: Callable[[str, int, torch.Tensor], None],
    stop_early: bool = False,
) -> torch.Tensor | None:
    """Run one shard's images through the network; return the logits (image, class), or None without a head.

    They run in micro-batches of the network's size, the last one padded with black images. For each layer named,
    `take(name, at, output)` gets the output for the shard's images from `at` on as soon as it is ready: the next
    operation may overwrite it. With `stop_early`, the forward pass ends with the last of these layers, and there are no
    logits. On a GPU, host and device do not wait for each other before the last micro-batch, unless `take` does.
    """
    import torch

    from pipeline.networks.layers import Recorder

    size, on_gpu = model.spec.numerics.micro_batch, device() == "cuda"
    if on_gpu:
        pixels = pixels.pin_memory()
    heads: list[torch.Tensor] = []
    with computing:
        network = network_of(model)
        for at in range(0, len(pixels), size):
            batch = pixels[at : at + size]
            count = len(batch)
            if count < size:
                batch = torch.cat([batch, batch.new_zeros((size - count, *batch.shape[1:]))])

            def taken(name: str, output: torch.Tensor, at: int = at, count: int = count) -> None:
                take(name, at, output[:count])

            with Recorder(network, names, stop_early, take=taken) as record:
                head, _ = record(normalise(batch, model.spec))
            if head is not None and head.ndim == 2:
                if len(head) != size:
                    raise MicrotomeError(
                        f"network {model.name!r} returns {len(head)} rows for {size} images, expected one row an image"
                    )
                heads.append(head[:count].float())
        logits = to_host(torch.cat(heads)) if heads else None
        done = torch.cuda.Event() if on_gpu else None
        if done is not None:
            done.record()
    # The next thread can use the GPU while this one waits for its copies.
    if done is not None:
        done.synchronize()
    return logits


def host_buffer(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return host memory for a network's outputs, all NaN: pinned if they come from a GPU, which then need not wait."""
    import torch

    return torch.full(tuple(shape), math.nan, dtype=dtype, pin_memory=device() == "cuda")


def to_host(values: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
    """Copy values to host memory, to `target` if given.

    Values from a GPU are complete once `forward_in_batches` returns.
    """
    if not values.is_cuda:
        return values if target is None else target.copy_(values)
    target = host_buffer(values.shape, values.dtype) if target is None else target
    return target.copy_(values.contiguous(), non_blocking=True)


def half(values: torch.Tensor, scale: float) -> torch.Tensor:
    """Convert float32 values for storage: divided by the layer's scale, float16, in the same memory format."""
    # On the CPU, torch is fast at changing the type or the order, and slow at both at once.
    return (values if scale == 1 else values / scale).half()


def refuse_non_finite(
    output: torch.Tensor, layer: str, start: int, units: torch.Tensor | LayerInfo | None = None
) -> None:
    """Raise for the first image of `output` (image, ...) that is not finite; the shard begins with image `start`.

    `units` (image, unit, ...), if given, is not finite where a unit's values are not; or it says how the output is
    read.
    """
    good = output.isfinite().reshape(len(output), -1).all(1)
    if not bool(good.all()):
        image = int((~good).nonzero()[0])
        bad: list[int] = []
        if units is not None:
            own = units_of(output[image : image + 1], units)[0] if isinstance(units, LayerInfo) else units[image]
            bad = (~own.isfinite().reshape(len(own), -1).all(1)).nonzero().reshape(-1).tolist()
        raise NonFiniteError(layer, start + image, *bad[:1])


def units_of(output: torch.Tensor, info: LayerInfo) -> torch.Tensor:
    """Return all values of each unit, (image, unit, place), those in special tokens among them."""
    import torch

    from pipeline.networks.layers import to_maps

    maps, special = to_maps(output, info)
    return maps.flatten(2) if special is None else torch.cat([special.transpose(1, 2), maps.flatten(2)], 2)


def scale_for(largest: float, headroom: bool = False) -> float:
    """Return the power of two to divide by, so that `largest` is well inside float16.

    It is 1 for layers of ordinary size (largest value between 2^-6 and 2^9). Otherwise, `largest` falls below 2^5 with
    `headroom` (which leaves 2^11 above it for images unlike the noise), or below 2^15 if it is the maximum over the
    data.
    """
    if headroom and (2.0**-6 <= largest <= 2.0**9 or not math.isfinite(largest) or largest == 0):
        return 1.0
    return 2.0 ** (math.frexp(largest)[1] - (5 if headroom else 15))
