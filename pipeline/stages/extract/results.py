"""What `extract` promises to the stages that read it: its layers, where each is, and the shards that it holds."""

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
    store : `pooled`, without its maps; `none`, streamed: counted in two forward passes; None: it is stored whole.
    tails, counted, info : of a streamed layer: the name of the store of its tails, the settings that they were counted
        under, and what is known of the layer.
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

    @property
    def streamed(self) -> bool:
        """Whether it is counted without being stored."""
        return self.store == "none"

    @property
    def layer_info(self) -> LayerInfo:
        """What is known of a layer that is not stored."""
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
    """What the manifest of `extract` says.

    Attributes
    ----------
    layers : in execution order.
    shards : those that hold images of the split, which are all in every store.
    forward_bytes : what a forward takes, where layers are not stored.
    """

    layers: list[StoredLayer]
    shards: list[int]
    forward_bytes: int | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> Extracted:
        return cls.read(manifest.result)

    def layer(self, name: str) -> StoredLayer:
        """Return the layer of this name; `KeyError` where there is none."""
        return self.by_name[name]

    @property
    def by_name(self) -> Mapping[str, StoredLayer]:
        return {layer.name: layer for layer in self.layers}


def logits(folder: Path, manifest: Manifest) -> StoreRef:
    """Return the network's logits, in its folder; no files where it has no head."""
    return StoreRef.of_manifest(folder, "logits.zarr", manifest.files)
