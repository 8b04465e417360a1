"""What `extract` promises to later stages: its layers, where each one is, and the shards that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.networks.layer import LayerInfo
from pipeline.stages.extract.settings import Tails
from pipeline.storage.manifest import Manifest
from pipeline.storage.record import Record
from pipeline.storage.store import StoreRef


class StoredLayer(Record):
    """A layer of a network, as the manifest of an extraction names it.

    Attributes
    ----------
    shape : (units, y, x). scale : stored values are to be multiplied by it.
    manifest, digest : of its store, which all networks with this layer share.
    store : `pooled`: without maps; `none`: streamed, counted in two forward passes; None: stored whole.
    tails, counted, info : for a streamed layer: the name of the store of its tails, the settings under which they were
        counted, and the layer's properties.
    coarse : units of which fewer than 8 bits are stored, if there are any.
    """

    name: str
    id: str
    shape: tuple[int, int, int]
    scale: float
    manifest: str
    digest: str
    store: Literal["pooled", "none"] | None = None
    tails: str | None = None
    counted: Tails | None = None
    info: dict[str, Any] | None = None
    coarse: list[int] | None = None

    @property
    def streamed(self) -> bool:
        """Whether it is counted without being stored."""
        return self.store == "none"

    @property
    def layer_info(self) -> LayerInfo:
        """The properties of a streamed layer."""
        assert self.info is not None
        return LayerInfo(**{**self.info, "shape": tuple(self.info["shape"])})

    def folder(self, dataset: Path) -> Path:
        """Return its folder, in the folder of the data set."""
        return dataset / "layers" / self.id

    def activations(self, results: Path, dataset: Path) -> StoreRef:
        """Return the store of its activations, with the files that its manifest lists."""
        files = Manifest.read(results / self.manifest).files
        return StoreRef.of_manifest(self.folder(dataset), "activations.zarr", files)


class Extracted(Record):
    """The result in the manifest of `extract`.

    Attributes
    ----------
    layers : in execution order.
    shards : those with images of the split, which every store holds.
    forward_bytes : memory of a forward pass, if there are streamed layers.
    """

    layers: list[StoredLayer]
    shards: list[int]
    forward_bytes: int | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> Extracted:
        return cls.read(manifest.result)

    def layer(self, name: str) -> StoredLayer:
        """Return the layer of this name; `KeyError` if there is none."""
        return self.by_name[name]

    @property
    def by_name(self) -> Mapping[str, StoredLayer]:
        return {layer.name: layer for layer in self.layers}


def logits(folder: Path, manifest: Manifest) -> StoreRef:
    """Return the network's logits, in its folder; without files if it has no head."""
    return StoreRef.of_manifest(folder, "logits.zarr", manifest.files)
