"""Stores of layers and logits: their paths, the ids of their shards, and their layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.networks import Network
from pipeline.networks.forward import Model
from pipeline.networks.layer import LayerInfo
from pipeline.storage.identity import digest
from pipeline.storage.manifest import remove_others

if TYPE_CHECKING:
    from pipeline.data.images import Images
    from pipeline.storage.store import Ledger


UNIT_BLOCK = 64  # units in one chunk of a shard


@dataclass(frozen=True)
class LayerStore:
    """A layer as tasks name it.

    It holds the store's path, how an output becomes maps, whether the maps are stored, and, if not, whether they are
    counted.
    """

    id: str
    store: Path
    info: LayerInfo
    scale: float
    pooled: bool = False
    streamed: bool = False

    @property
    def name(self) -> str:
        return self.info.name


def layer_of(folder: Path, spec: Network, id: str, info: LayerInfo, scale: float) -> LayerStore:
    kept = spec.kept(info.name)
    return LayerStore(
        id, folder / "layers" / id / "activations.zarr", info, scale, kept != "full", streamed=kept == "none"
    )


def alike(layers: list[LayerStore]) -> list[LayerStore]:
    """Store a streamed layer whose output is also a stored layer under another name."""
    full = {layer.id for layer in layers if not layer.pooled}
    return [
        replace(layer, pooled=False, streamed=False) if layer.streamed and layer.id in full else layer
        for layer in layers
    ]


def shard_id(images: Images, shard: int, scale: float) -> str:
    """Return the id of a shard of a layer's store; the layer id, the store's folder, covers the rest."""
    return digest([images.contents[shard], scale])


def logits_id(images: Images, shard: int, model: Model, numerics: Mapping[str, Any]) -> str:
    """Return the id of a shard of the logits, which covers everything, since logits have a plain file name."""
    made_of = [model.sha256, model.architecture, model.spec.preprocessing.model_dump(), numerics]
    return digest([images.contents[shard], *made_of])


def holds(ledger: Ledger, shard: int, id: str, store: Path, pooled: bool) -> bool:
    """Return whether the wanted shard of a layer is there; a full shard also serves as a pooled one."""
    entry = ledger.get(str(shard), id, store)
    return entry is not None and (pooled or not entry.get("pooled", False))


def open_layer(layer: LayerStore, images: Images) -> LayerStore:
    """Create or reopen a layer's store, at the larger of the two scales."""
    from pipeline.storage.store import Array, attributes, create, metadata_files, remove_partials

    scale = max(layer.scale, attributes(layer.store).get("scale", 0.0))
    layer = replace(layer, scale=scale)
    units, height, width = layer.info.shape
    step, block = images.shard_images, min(units, UNIT_BLOCK)
    whole = -(-units // block) * block
    arrays = {
        "activation": Array(
            ("image", "unit", "y", "x"),
            (images.count, units, height, width),
            np.float16,
            chunk=(step, block, height, width),
            shard=(step, whole, height, width),
            fill=np.nan,
        ),
        "maximum": Array(("image", "unit"), (images.count, units), np.float32, (step, units), fill=np.nan),
        "mean": Array(("image", "unit"), (images.count, units), np.float32, (step, units), fill=np.nan),
    }
    if layer.info.special:
        shape = (images.count, layer.info.special, units)
        arrays["special"] = Array(("image", "token", "unit"), shape, np.float16, (step, *shape[1:]), fill=np.nan)
    before = metadata_files(layer.store)
    create(layer.store, arrays, {"scale": scale})
    if metadata_files(layer.store) != before:
        remove_others(layer.store.parent / "done", "activations")
    remove_partials(layer.store)
    return layer


def open_logits(path: Path, images: Images, classes: int) -> None:
    from pipeline.storage.store import Array, create, remove_partials

    shape = (images.count, classes)
    create(
        path, {"logits": Array(("image", "class"), shape, np.float32, (images.shard_images, classes), fill=np.nan)}, {}
    )
    remove_partials(path)
