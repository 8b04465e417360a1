"""Features of layers on the images of a minibatch, and their Gram matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config.networks import Network
from pipeline.data.minibatches import Minibatch
from pipeline.networks.forward import Model, NonFiniteError, normalise, refuse_non_finite
from pipeline.networks.layer import LayerInfo
from pipeline.storage.record import Record
from pipeline.storage.store import StoreRef

if TYPE_CHECKING:
    import torch


class Arithmetic(Record):
    """The settings that change the last bits of an output, if a minibatch goes through a network as a whole."""

    channels_last: bool

    @classmethod
    def of(cls, network: Network) -> Arithmetic:
        return cls(channels_last=network.numerics.channels_last)


@dataclass(frozen=True)
class Entry:
    """A layer and its features: `whole`, `class_token`, `spatial` or `pooled`."""

    info: LayerInfo
    features: str


def images_of(batch: Minibatch, pixels: StoreRef, model: Model) -> torch.Tensor:
    """Return the images of a minibatch as a network takes them."""
    import torch

    from pipeline.data.images import pixels as read

    return normalise(torch.from_numpy(read(pixels.open(), batch.images)), model.spec)


@contextmanager
def naming_slots(batch: Minibatch) -> Iterator[None]:
    """Report an image whose output is not finite by its slot, not by its place in the minibatch."""
    try:
        yield
    except NonFiniteError as error:
        layer, place, *unit = error.args
        raise NonFiniteError(layer, batch.images[place], *unit) from None


def grams_of(network: torch.nn.Module, images: torch.Tensor, entries: Sequence[Entry]) -> np.ndarray:
    """Return the packed Gram matrices, (entry, pair) float64, of images as the network takes them.

    Each is computed as soon as its layer's output is ready: the next operation may overwrite it.

    Raises
    ------
    NonFiniteError
        With the layer and the image's place.
    """
    from pipeline.networks.layers import Recorder

    found: dict[tuple[str, str], np.ndarray] = {}
    of_layer: dict[str, list[Entry]] = {}
    for entry in entries:
        of_layer.setdefault(entry.info.name, []).append(entry)

    def take(name: str, output: torch.Tensor) -> None:
        for entry in of_layer[name]:
            found[name, entry.features] = packed_gram(features_of(output, entry), output, name, entry.info)

    with Recorder(network, list(of_layer), stop_early=True, take=take) as record:
        record(images)
    return np.stack([found[entry.info.name, entry.features] for entry in entries])


def packed_gram(features: torch.Tensor, output: torch.Tensor, layer: str, info: LayerInfo) -> np.ndarray:
    """Return the Gram matrix, (pair), of features of a layer's output.

    Raises `NonFiniteError` with the image's place and the unit if the output is not finite.
    """
    from kernels.similarity.cka import pack
    from kernels.similarity.gram import gram

    made = gram(features).cpu()
    if not bool(made.isfinite().all()):
        refuse_non_finite(output, layer, 0, info)
        # The output is finite, and products of its values are not.
        raise NonFiniteError(f"{layer} (its Gram matrix)", int((~made.isfinite()).any(1).int().argmax()))
    return pack(made.numpy())


def features_of(output: torch.Tensor, entry: Entry) -> torch.Tensor:
    """Return the features (image, ...) of an entry."""
    from pipeline.networks.layers import to_maps

    if entry.features == "whole":
        return output
    maps, special = to_maps(output, entry.info)
    if entry.features == "class_token":
        assert special is not None
        return special[:, 0]
    return maps.float().mean((2, 3)) if entry.features == "pooled" else maps
