"""What workers do for the stage `grams`: one minibatch through a network, and the Gram matrices of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.minibatches import Minibatch
from pipeline.errors import MicrotomeError
from pipeline.networks.features import Entry, grams_of, images_of, naming_slots
from pipeline.networks.forward import Model, loaded, network_of, platform_numerics
from pipeline.networks.layer import LayerInfo, Misplaced
from pipeline.networks.prepare import Prepared, ids_of, prepare, survey_of
from pipeline.storage.store import StoreRef
from pipeline.workers.resumable import Done

GRAMS = "grams"  # the store, as `Done` names it


@dataclass(frozen=True)
class Identified(Prepared):
    """A network with the id of each of its layers."""

    ids: dict[str, str]


def prepare_layers(model: Model, size: tuple[int, int], layers: str | Sequence[str], version: int) -> Identified:
    """Resolve a network's layers and compute their ids, on a worker. Minibatches are no part of the numerics."""
    network = loaded(model)
    prepared = prepare(network, model, survey_of(network, model, size), layers, strict=False)
    numerics = model.spec.numerics.model_dump(exclude={"micro_batch"}) | platform_numerics(version)
    return Identified(**vars(prepared), ids=ids_of(network, model, size, prepared.layers, numerics))


def unreadable(misplaced: Sequence[Misplaced], features: Sequence[str]) -> Iterator[str]:
    """Yield the features that cannot be told where positions do not lie as they seem."""
    for each in misplaced:
        lost = [name for name in features if not each.keeps(name)]
        if "class_token" in lost and not each.layer.special:  # then it is left out
            lost.remove("class_token")
        if "spatial" in lost and not each.layer.special:
            lost.remove("spatial")
        if lost:
            yield (
                f"similarity.features: {' and '.join(lost)} cannot be told of layer {each.layer.name!r}, which "
                f"{each.reason}; its `whole` output can be compared"
            )


def entries_of(layers: Sequence[LayerInfo], features: Sequence[str]) -> list[Entry]:
    """Return the rows of the store, layers in execution order.

    Features that a layer lacks, or that are its whole output, are left out.
    """
    found = []
    for info in layers:
        has = {"whole": True, "class_token": info.special > 0, "spatial": info.special > 0, "pooled": info.spatial}
        found += [Entry(info, each) for each in features if has[each]]
    if not found:
        raise MicrotomeError(
            f"similarity.features: none of its layers has {' or '.join(features)}: `whole` every layer has"
        )
    return found


def memory_need(parameters: int, largest: int, images: int, layers: int, size: tuple[int, int]) -> int:
    """Estimate the bytes of a task: the weights, a forward of the minibatch without gradients, the Gram matrices."""
    return 12 * parameters + 4 * images * (3 * size[0] * size[1] + 4 * largest) + 16 * images**2 * layers


def keep_grams(
    model: Model,
    pixels: StoreRef,
    part: str,
    batch: Minibatch,
    entries: Sequence[Entry],
    size: int,
    store: Path,
) -> Done:
    """On a worker: put one minibatch through the network once, and write the Gram matrices of its layers, packed."""
    from pipeline.storage.store import write

    with naming_slots(batch):
        packed = grams_of(network_of(model), images_of(batch, pixels, model), entries)
    pairs = size * (size + 1) // 2
    row = np.full((1, len(entries), pairs), np.nan)
    row[0, :, : packed.shape[1]] = packed
    slots = np.full((1, size), -1)
    slots[0, : len(batch.images)] = batch.images
    number = int(part)
    return Done(part, {GRAMS: write(store, {"gram": ((number, 0, 0), row), "image": ((number, 0), slots)})})
