"""Worker tasks of the stage `extract`: run shards through the network, and write what is kept of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.networks import GeneratorNetwork, Network
from pipeline.errors import MicrotomeError
from pipeline.networks.forward import (
    HALF_MAX,
    Model,
    forward_in_batches,
    half,
    host_buffer,
    loaded,
    network_of,
    normalise,
    platform_numerics,
    refuse_non_finite,
    scale_for,
    to_host,
)
from pipeline.networks.generators import latent_of
from pipeline.networks.prepare import Prepared, forward_need, ids_of, prepare, survey_of
from pipeline.stages.extract.layers import LayerStore
from pipeline.stages.extract.streaming import Counter, Part, Streamed
from pipeline.storage.manifest import Files
from pipeline.workers.tasks import overlapping

if TYPE_CHECKING:
    import torch


REMEDY = "lower `shard_images` of the data set or `numerics.micro_batch` of the network, or name fewer layers"


@dataclass
class Shard:
    """A task's result for one shard, by layer id.

    `files` are those written (logits under ""); `overflow` is the largest value of a layer that exceeds float16, whose
    shard is then not written.
    """

    shard: int
    files: dict[str, Files] = field(default_factory=dict)
    overflow: dict[str, float] = field(default_factory=dict)


@dataclass
class Block:
    """A task's results for its shards, and the tail files that it wrote, by layer id."""

    block: int
    shards: list[Shard]
    tails: dict[str, Files]


@dataclass(frozen=True)
class Extraction(Prepared):
    """A network in an extraction: its layers with their ids and scales.

    `classes` is None for a network without a head; `numerics` is all else that decides the last bits.
    """

    ids: dict[str, str]
    scales: dict[str, float]
    classes: int | None
    numerics: dict[str, Any]


def prepare_extraction(model: Model, size: tuple[int, int], layers: str | Sequence[str], version: int) -> Extraction:
    """Load the network, resolve its layers, compute their ids, and find each layer's scale, on a worker.

    The scale comes from a forward pass over fixed noise, so it depends on the layer alone and not on the images.
    """
    import torch

    from pipeline.networks.layers import Recorder, classes_of

    network = loaded(model)
    prepared = prepare(network, model, survey_of(network, model, size), layers)
    numerics = model.spec.numerics.model_dump() | platform_numerics(version)
    ids = ids_of(network, model, size, prepared.layers, numerics)
    if isinstance(model.spec, GeneratorNetwork):
        latents = [latent_of(model.spec.latent, 0, f"train/{at}", size[0]) for at in range(4)]
        inputs = torch.from_numpy(np.stack(latents))
    else:
        inputs = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with Recorder(network_of(model), ids) as record:
        logits, outputs = record(normalise(inputs, model.spec))
    scales = {name: scale_for(float(outputs[name].abs().amax()), headroom=True) for name in ids}
    return Extraction(**vars(prepared), ids=ids, scales=scales, classes=classes_of(network, logits), numerics=numerics)


def memory_need(
    layers: Iterable[LayerStore], prepared: Prepared, spec: Network, images: int, size: tuple[int, int]
) -> int:
    """Return the bytes of a task on `images` of a size: weights as loaded and as used, a forward pass, its outputs.

    In a forward pass without gradients, an operation's input, output and workspace are alive, and outputs are divided
    and halved there. Kept outputs are float16, and are copied and compressed when they are written.
    """
    layers = list(layers)
    maps = [0 if layer.pooled else math.prod(layer.info.shape) for layer in layers]
    beside = sum(layer.info.shape[0] * (2 * layer.info.special + 8) for layer in layers)
    pixels = 3 * size[0] * size[1]
    outputs = images * (pixels + beside + 2 * sum(maps) + 4 * max(maps, default=0))
    return forward_need(prepared, spec, size) + outputs


@overlapping
def extract_block(
    model: Model,
    images: Path,
    block: int,
    parts: list[tuple[Part, np.ndarray, list[LayerStore], Path | None]],
    streamed: list[Streamed],
) -> Block:
    """Extract some shards in turn, and count the tails of layers over all of them, on a worker."""
    counters = {layer.info.name: Counter(layer) for layer in streamed}
    done = Block(block, [], {})
    for part, shown, layers, logits in parts:
        for counter in counters.values():
            counter.begin(part, shown)
        done.shards.append(extract_shard(model, images, part.files, part.shard, part.bounds, layers, logits, counters))
    beyond = {id for shard in done.shards for id in shard.overflow}
    for counter in counters.values():
        if counter.layer.id not in beyond:
            done.tails[counter.layer.id] = counter.write(block)
    return done


def extract_shard(
    model: Model,
    images: Path,
    files: Files,
    shard: int,
    bounds: tuple[int, int],
    layers: list[LayerStore],
    logits: Path | None,
    counters: Mapping[str, Counter] | None = None,
) -> Shard:
    """Run one shard through the network, in micro-batches of fixed size, and write its files, on a worker.

    Every image of the shard goes through, so the micro-batches are the same whichever images count; slots without a
    valid image are black. `counters` also get the outputs of the layers that they are named after.
    """
    import torch

    from pipeline.storage.store import Reader, remove, write

    start, stop = bounds
    pixels = torch.from_numpy(Reader(images, files)[model.reads][start:stop])
    counting = dict(counters or {})
    kept = {layer.name: Kept.empty(layer, len(pixels), counting.pop(layer.name, None)) for layer in layers}
    for name, counter in counting.items():  # streamed layers that are otherwise complete
        uncounted = counter.layer
        unwritten = LayerStore(uncounted.id, Path(), uncounted.info, uncounted.scale, pooled=True)
        kept[name] = Kept.empty(unwritten, len(pixels), counter)
    head = forward_in_batches(model, pixels, list(kept), lambda name, at, output: kept[name].take(at, output))
    done = Shard(shard)
    written = {layer.name for layer in layers}
    for name in list(kept):
        one = kept.pop(name)
        layer = one.layer
        one.require_all(start)
        refuse_non_finite(one.largest, layer.name, start, one.maximum + one.mean)
        largest = float(one.largest.amax())
        if largest > HALF_MAX * layer.scale:
            done.overflow[layer.id] = largest
            continue
        if name not in written:
            continue
        done.files[layer.id] = write(layer.store, one.values(start))
        if layer.pooled:
            # Maps of other images, which the ledger no longer knows.
            remove(layer.store, f"activation/c/{shard}/0/0/0")
    if logits is not None:
        assert head is not None
        refuse_non_finite(head, "logits", start, head)
        done.files[""] = write(logits, {"logits": ((start, 0), head.numpy())})
    return done


@dataclass
class Kept:
    """What a shard keeps of a layer, taken from its output as soon as it is ready: a forward pass holds no outputs.

    `maps` (image, unit, y, x) and `special` (image, token, unit) are float16, divided by the layer's scale; None if
    there are none to keep. `maximum`, `mean` (image, unit) and `largest` (image), the largest absolute value, are
    float32 and not divided. `written` (image) bool says which rows an output has filled. `counter` counts the maps of a
    streamed layer.
    """

    layer: LayerStore
    maps: torch.Tensor | None
    special: torch.Tensor | None
    maximum: torch.Tensor
    mean: torch.Tensor
    largest: torch.Tensor
    written: np.ndarray
    counter: Counter | None = None

    @classmethod
    def empty(cls, layer: LayerStore, count: int, counter: Counter | None = None) -> Kept:
        import torch

        units, height, width = layer.info.shape
        special = layer.info.special
        return cls(
            layer,
            None if layer.pooled else host_buffer((count, units, height, width), torch.float16),
            host_buffer((count, special, units), torch.float16) if special else None,
            host_buffer((count, units), torch.float32),
            host_buffer((count, units), torch.float32),
            host_buffer((count,), torch.float32),
            np.zeros(count, bool),
            counter,
        )

    def take(self, at: int, output: torch.Tensor) -> None:
        """Take the output for the shard's images from `at` on."""
        import torch

        from pipeline.networks.layers import to_maps

        maps, special = to_maps(output.float(), self.layer.info)
        part = slice(at, at + len(output))
        self.written[part] = True
        maximum = maps.amax((2, 3))
        to_host(maximum, self.maximum[part])
        to_host(maps.mean((2, 3)), self.mean[part])
        # NaN and infinity pass through: `isfinite` on every value takes longer than all the rest.
        largest = torch.maximum(maximum, -maps.amin((2, 3))).amax(1)
        if self.maps is not None:
            to_host(half(maps, self.layer.scale), self.maps[part])
        if special is not None and self.special is not None:
            largest = torch.maximum(largest, special.abs().amax((1, 2)))
            to_host(half(special, self.layer.scale), self.special[part])
        to_host(largest, self.largest[part])
        # Values that are not finite or too large are not counted: the shard is refused, or the layer is rescaled and
        # recounted.
        if self.counter is not None and bool((largest <= HALF_MAX * self.layer.scale).all()):
            self.counter.take(at, maps)

    def require_all(self, start: int) -> None:
        """Refuse a row that no output has filled; the shard begins with image `start`."""
        if not self.written.all():
            raise MicrotomeError(
                f"layer {self.layer.name!r} gave no output for image {start + int(self.written.argmin())}: nothing is "
                f"stored"
            )

    def values(self, start: int) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
        """Return the blocks to write, for a shard that begins with image `start`."""
        found: dict[str, tuple[tuple[int, ...], np.ndarray]] = {
            "maximum": ((start, 0), self.maximum.numpy()),
            "mean": ((start, 0), self.mean.numpy()),
        }
        if self.maps is not None:
            found["activation"] = ((start, 0, 0, 0), self.maps.numpy())
        if self.special is not None:
            found["special"] = ((start, 0, 0), self.special.numpy())
        return found
