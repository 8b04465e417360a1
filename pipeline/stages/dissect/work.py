"""The work of one dissection: concepts, layers, counted images, and the id of each result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import MicrotomeError
from pipeline.stages.concepts.results import Labelled
from pipeline.stages.dissect.settings import Method
from pipeline.stages.extract import streaming
from pipeline.stages.extract.results import StoredLayer
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Manifest
from pipeline.storage.store import StoreRef
from pipeline.workers.tasks import workers_of

if TYPE_CHECKING:
    from pipeline.data.images import Images
    from pipeline.stages.extract.streaming import Streamed


VERSION = 2


@dataclass(frozen=True)
class Concepts:
    """The counted concepts, in columns, and their label maps.

    `numbers`, `names` and `category_index` have one entry per column. `category_index` is the index into `categories`;
    `axis` is the position of each category on the store's axis.
    """

    store: StoreRef
    categories: tuple[str, ...]
    axis: tuple[int, ...]
    names: tuple[str, ...]
    numbers: tuple[int, ...]
    category_index: tuple[int, ...]

    def at(self, part: Iterable[CountedShard]) -> Concepts:
        """Return the same concepts with the files of only some shards."""
        return replace(self, store=self.store.of(["label_map"], [one.shard for one in part]))


@dataclass(frozen=True)
class CountedShard:
    """The counted images of one shard: their rows, jackknife groups, and partners in the permuted control."""

    shard: int
    rows: np.ndarray
    group: np.ndarray
    partner: np.ndarray


@dataclass(frozen=True)
class LayerSource:
    """A layer as tasks name it.

    `streamed` and `tails`, the store of its tails, belong to a streamed layer. `coarse` are units of which fewer than 8
    bits are stored.
    """

    name: str
    id: str
    store: StoreRef
    shape: tuple[int, int, int]
    scale: float
    digest: str
    streamed: Streamed | None = None
    tails: StoreRef | None = None
    coarse: tuple[int, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder of the layer, which all networks with this prefix share."""
        return self.store.path.parent

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[1:]

    def at(self, part: Iterable[CountedShard]) -> LayerSource:
        """Return the same layer with the files of only some shards."""
        return replace(self, store=self.store.of(["activation"], [one.shard for one in part]), tails=None)


@dataclass(frozen=True)
class LayerResult:
    """One result per layer: true or permuted labels, over these shards, under this id.

    `thresholds` is the id of the thresholds alone, and `labels` that of each category's counts: earlier results with
    the same ids are reused.
    """

    layer: LayerSource
    permuted: bool
    counted: tuple[CountedShard, ...]
    thresholds: str
    labels: Mapping[str, str]
    id: str


def concepts_of(store: StoreRef, labelled: Labelled) -> Concepts:
    """Return the concepts of all categories, with the label maps that a manifest of `concepts` describes."""
    columns = [
        (name, number, at)
        for at, category in enumerate(labelled.categories)
        for name, number in zip(category.concepts, category.numbers, strict=True)
    ]
    return Concepts(
        store=store,
        categories=tuple(category.name for category in labelled.categories),
        axis=tuple(category.place for category in labelled.categories),
        names=tuple(name for name, _, _ in columns),
        numbers=tuple(number for _, number, _ in columns),
        category_index=tuple(at for _, _, at in columns),
    )


def layer_of(results: Path, dataset: Path, stored: StoredLayer, method: Method) -> LayerSource:
    """Return a layer of an extraction, with the files that its manifest describes.

    Raises
    ------
    MicrotomeError
        Its tails were counted for another quantile, border or kind of positions than this dissection's.
    """
    manifest = Manifest.read(results / stored.manifest)
    home = stored.folder(dataset)
    streamed = tails = None
    if stored.streamed:
        assert stored.counted is not None
        differ = [
            key for key in ("quantile", "border", "positions") if getattr(stored.counted, key) != getattr(method, key)
        ]
        if differ:
            raise MicrotomeError(f"layer {stored.name!r} was extracted for another {' and '.join(differ)}")
        streamed = streaming.streamed(home, stored.id, stored.layer_info, stored.scale, stored.counted)
        tails = StoreRef.of_manifest(home, streamed.store.name, manifest.files)
    return LayerSource(
        name=stored.name,
        id=stored.id,
        store=StoreRef.of_manifest(home, "activations.zarr", manifest.files),
        shape=stored.shape,
        scale=stored.scale,
        digest=manifest.digest,
        coarse=tuple(stored.coarse or ()),
        streamed=streamed,
        tails=tails,
    )


def counted_images(images: Images, split: str, shards: Iterable[int], refused: Iterable[str]) -> list[CountedShard]:
    """Return the counted images of each shard: valid, of the split, with label maps that were not refused."""
    from pipeline.data.listing import derangement, group

    image_id = images.image_ids()
    without = set(refused)
    counts = images.counted(split) & ~np.fromiter((name in without for name in image_id), bool, len(image_id))
    found = []
    for shard in shards:
        start, stop = images.range(shard)
        rows = np.flatnonzero(counts[start:stop])
        if len(rows):
            ids = image_id[start:stop][rows]
            found.append(CountedShard(shard, rows, group(ids), derangement(ids)))
    if not found:
        raise MicrotomeError(f"{images.store.parent.name}: no image of split {split!r} is left to dissect")
    return found


def basis(counted: Iterable[CountedShard]) -> str:
    """Return the id of a selection of images, with their groups and partners."""
    return digest([[one.shard, *(part.tolist() for part in (one.rows, one.group, one.partner))] for one in counted])


def thresholds_id(layer: LayerSource, counted: Iterable[CountedShard], method: Method, size: tuple[int, int]) -> str:
    """Return the id of a layer's thresholds; `size` is that of the label maps."""
    made_of = [method.quantile, method.border, list(method.counted_at(layer.size, size))]
    return digest([VERSION, layer.digest, basis(counted), made_of])


def want(
    layer: LayerSource,
    permuted: bool,
    counted: Iterable[CountedShard],
    thresholds: str,
    labelled: Labelled,
    method: Method,
) -> LayerResult:
    """Return the result to compute for a layer; its id covers activations, images, label maps and settings."""
    counted = tuple(one for one in counted if len(one.rows) > 1 or not permuted)
    common = [VERSION, thresholds, basis(counted), permuted]
    labels = {c.name: digest([*common, c.numbers, c.contents]) for c in labelled.categories}
    return LayerResult(
        layer, permuted, counted, thresholds, labels, digest([*common, list(labels.items()), method.written()])
    )


def manifest_of(one: LayerResult) -> Path:
    return one.layer.folder / "done" / f"dissect.{one.id}.json"


def finished(one: LayerResult) -> bool:
    return manifest_of(one).exists()


def paths_of(one: LayerResult, folder: Path) -> dict[str, Any]:
    """Return an entry of layers.json: paths relative to the data set's folder, and coarse units if there are any."""
    own = one.layer.folder / f"dissect-{one.id}"
    shown = {"shown": (own / "shown.zarr").relative_to(folder).as_posix()} if one.layer.streamed else {}
    coarse = {"coarse": list(one.layer.coarse)} if one.layer.coarse else {}
    return shown | {
        "id": one.layer.id,
        "activations": one.layer.store.path.relative_to(folder).as_posix(),
        "thresholds": (own / "thresholds.zarr").relative_to(folder).as_posix(),
        "iou": (own / "iou.zarr").relative_to(folder).as_posix(),
        **coarse,
    }


@dataclass(frozen=True)
class Threshold:
    """Thresholds of a layer's units as stored (float16, before scaling), positions above them, and all positions."""

    threshold: np.ndarray
    active: np.ndarray
    positions: int


def runs(counted: list[CountedShard], client: Any) -> Iterator[list[CountedShard]]:
    """Cut the shards into runs, several per worker: one task merges the counts of its run before it sends them."""
    length = max(1, -(-len(counted) // (4 * workers_of(client))))
    return (counted[at : at + length] for at in range(0, len(counted), length))


def activation(layer: LayerSource, one: CountedShard) -> np.ndarray:
    """Return the maps (image, unit, y, x) float16 of a shard's counted images."""
    array = layer.store.open()["activation"]
    start = one.shard * array.chunks[0]
    maps = np.asarray(array[start : start + array.chunks[0]])
    return maps if len(one.rows) == len(maps) else maps[one.rows]
