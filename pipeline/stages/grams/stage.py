"""The stage `grams`: minibatches of images through one network, of which only Gram matrices are kept.

Writes, for a network and data set that some comparison names,
    <network>/grams.zarr  gram (minibatch, layer, pair) float64, packed upper triangles of the Gram matrices of centred
                          features · image (minibatch, place) int64, their slots in images.zarr, -1 beyond a smaller
                          minibatch · layer, features (layer)
A few MB, from which every comparison with this network is made: when another network changes, this one is not asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.core import AnyDataset, Network, Similarity
from pipeline.data.minibatches import SETTINGS, Minibatch, minibatches
from pipeline.errors import MicrotomeError
from pipeline.networks.forward import Model, NonFiniteError, loaded, model_of, network_of, normalise, platform_numerics
from pipeline.plan import job as stage
from pipeline.storage.identity import digest
from pipeline.workers.pool import check_memory, client, run_tasks

if TYPE_CHECKING:
    import torch

    from pipeline.data.images import Images
    from pipeline.networks.layer import LayerInfo
    from pipeline.plan.step import Plan, Step
    from pipeline.storage.manifest import Files

VERSION = 2
CODE = (
    "kernels/similarity/cka.py",
    "kernels/similarity/gram.py",
    "kernels/images/grey.py",
    "kernels/images/whiten.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/forward.py",
    "pipeline/stages/grams/stage.py",
    "pipeline/networks/layer_id.py",
    "pipeline/networks/layers.py",
    "pipeline/networks/libraries",
    "pipeline/data/minibatches.py",
    "pipeline/networks/build.py",
)
REMEDY = "lower `similarity.minibatch`"


def settings(name: str, spec: Network, dataset: AnyDataset, asked: Similarity) -> dict[str, Any]:
    layers = asked.layers.get(name) or asked.layers.get(asked.original(name)) or spec.layers
    return {
        "layers": layers,
        "features": list(asked.features),
        "special_tokens": spec.special_tokens,
        "preprocessing": spec.preprocessing.model_dump(),
        "numerics": spec.numerics.model_dump(exclude={"micro_batch"}),
        "split": asked.split or dataset.dissect.split,
    } | {key: getattr(asked, key) for key in SETTINGS}


@dataclass(frozen=True)
class Prepared:
    """What a network says of itself: its layers in execution order, what names each, and what a forward takes."""

    layers: list[LayerInfo]
    ids: dict[str, str]
    parameters: int
    largest: int


@dataclass(frozen=True)
class Entry:
    """One row of the store: a layer, and which features of it."""

    info: LayerInfo
    features: str


def run(plan: Plan, step: Step) -> None:
    from pipeline.data.images import Images
    from pipeline.storage.store import Array, Ledger, create, metadata_files, remove_partials, write

    assert step.dataset is not None and step.network is not None
    began = stage.begin(plan, step)
    images, model = Images.of(plan, step), model_of(plan, step)
    slots, image_id = candidates(images, step.settings["split"])
    batches = minibatches(slots, image_id, step.settings, step.name)
    store = plan.results / step.dataset / step.network / "grams.zarr"
    ledger = Ledger(store.with_suffix(".ledger"))
    with client(plan.config.cluster, plan.scratch) as workers:
        asked = (model, images.size, step.settings["layers"], step.settings["special_tokens"])
        (prepared,) = run_tasks(workers, prepare, [asked], 1, f"{step.name}: layers")
        size = max(len(batch.images) for batch in batches)
        entries = entries_of(prepared.layers, step.settings["features"])
        need = memory_need(prepared.parameters, prepared.largest, size, len(entries), images.size)
        check_memory(plan.config.cluster, need, step.name, REMEDY)
        pixels = pixel_digests(workers, images, batches, step.name)
        shape = (len(batches), len(entries), size * (size + 1) // 2)
        arrays = {
            "gram": Array(("minibatch", "layer", "pair"), shape, np.float64, (1, *shape[1:]), fill=np.nan),
            "image": Array(("minibatch", "place"), (len(batches), size), np.int64, (1, size), fill=-1),
            "epoch": Array(("minibatch",), (len(batches),), np.int64, (len(batches),)),
            "layer": Array(("layer",), (len(entries),), str, (len(entries),), fill=None),
            "features": Array(("layer",), (len(entries),), str, (len(entries),), fill=None),
        }
        attrs = {key: step.settings[key] for key in (*SETTINGS, "split")}
        create(store, arrays, attrs)
        remove_partials(store)
        made_of = [VERSION, [[prepared.ids[each.info.name], each.features] for each in entries], size]
        ids = [digest([*made_of, [pixels[slot] for slot in batch.images], batch.images]) for batch in batches]
        tasks = [
            (model, images.store, files_of(images, batch), index, batch, entries, size, store)
            for index, batch in enumerate(batches)
            if not ledger.get(str(index), ids[index], store)
        ]
        try:
            for index, files in run_tasks(workers, gram_minibatch, tasks, len(tasks), step.name, REMEDY):
                ledger.record(str(index), ids[index], files)
        except NonFiniteError as error:
            raise error.told(step, image_id) from None
    names: dict[str, tuple[tuple[int, ...], np.ndarray]] = {
        "layer": ((0,), np.array([each.info.name for each in entries], object)),
        "features": ((0,), np.array([each.features for each in entries], object)),
        "epoch": ((0,), np.array([batch.epoch for batch in batches])),
    }
    files = ledger.files(map(str, range(len(batches)))) | write(store, names)
    output = digest(files)
    result = {
        "layers": [[each.info.name, each.features] for each in entries],
        "minibatches": len(batches),
        "images": digest([[pixels[slot] for slot in batch.images] for batch in batches]),
        "count": len({slot for batch in batches for slot in batch.images}),
    }
    files = stage.within("grams.zarr", files | metadata_files(store))
    stage.finish(plan, step, began, output, files, result, made=(len(tasks), len(batches)))


def pending(plan: Plan, step: Step) -> tuple[int, int]:
    """How many minibatches a run would put through the network at most, of how many."""
    from pipeline.data.images import Images

    count = len(minibatches(*candidates(Images.of(plan, step), step.settings["split"]), step.settings, step.name))
    return count, count


def discard(plan: Plan, step: Step) -> list[Path]:
    """The files and folders that this step made."""
    assert step.dataset is not None and step.network is not None
    folder = plan.results / step.dataset / step.network
    return [folder / "grams.zarr", folder / "grams.ledger"]


def candidates(images: Images, split: str) -> tuple[np.ndarray, list[str]]:
    """The slots that count, and the ids of all."""
    return np.flatnonzero(images.counted(split)), images.image_ids().tolist()


def entries_of(layers: Sequence[LayerInfo], features: Sequence[str]) -> list[Entry]:
    """The rows of the store, layers in execution order; features that a layer lacks, or that are its whole output,
    are left out."""
    found = []
    for info in layers:
        has = {"whole": True, "class_token": info.special > 0, "spatial": info.special > 0, "pooled": info.spatial}
        found += [Entry(info, each) for each in features if has[each]]
    if not found:
        raise MicrotomeError(
            f"similarity.features: none of its layers has {' or '.join(features)}: `whole` every layer has"
        )
    return found


def files_of(images: Images, batch: Minibatch) -> Files:
    """The chunk files that hold the pixels of a minibatch."""
    shards = {slot // images.shard_images for slot in batch.images}
    return {name: value for shard in sorted(shards) for name, value in images.files_of(shard).items()}


def memory_need(parameters: int, largest: int, images: int, layers: int, size: tuple[int, int]) -> int:
    """Bytes of a task: the weights, a forward of the minibatch without gradients, and the Gram matrices."""
    return 12 * parameters + 4 * images * (3 * size[0] * size[1] + 4 * largest) + 16 * images**2 * layers


def pixel_digests(workers: Any, images: Images, batches: Sequence[Minibatch], label: str) -> dict[int, str]:
    """The digest of the pixels of every image used, by slot: a changed image costs its minibatches and no others."""
    by_shard: dict[int, set[int]] = {}
    for slot in sorted({slot for batch in batches for slot in batch.images}):
        by_shard.setdefault(slot // images.shard_images, set()).add(slot)
    tasks = [
        (images.store, images.files_of(shard), images.range(shard), sorted(slots)) for shard, slots in by_shard.items()
    ]
    found: dict[int, str] = {}
    for part in run_tasks(workers, digest_images, tasks, len(tasks), f"{label}: images"):
        found |= part
    return found


# On a worker ----------------------------------------------------------------------------------------------------------


def digest_images(store: Path, files: Files, bounds: tuple[int, int], slots: Sequence[int]) -> dict[int, str]:
    """The digests of some images of one shard."""
    import hashlib

    from pipeline.storage.store import Reader

    start, stop = bounds
    pixels = Reader(store, files)["image"][start:stop]
    return {slot: hashlib.sha256(np.ascontiguousarray(pixels[slot - start]).data).hexdigest()[:20] for slot in slots}


def prepare(model: Model, size: tuple[int, int], wanted: str | Sequence[str], special: int | None) -> Prepared:
    """Resolve a network's layers, and compute their ids: those of `extract`, of all that their outputs depend on."""
    from pipeline.networks.layer_id import layer_ids
    from pipeline.networks.layers import choose, survey

    spec = model.spec
    shape = (spec.preprocessing.channels, *size)
    network = loaded(model)
    surveyed = survey(network, shape, special)
    infos = choose(network, surveyed, wanted, model.name)
    numerics = spec.numerics.model_dump(exclude={"micro_batch"}) | platform_numerics(VERSION)
    preprocessing = spec.preprocessing.model_dump() | {"size": list(size)}
    ids = layer_ids(network, infos, preprocessing, numerics, shape)
    return Prepared(infos, ids, sum(each.numel() for each in network.parameters()), surveyed.largest)


def gram_minibatch(
    model: Model,
    images: Path,
    files: Files,
    index: int,
    batch: Minibatch,
    entries: Sequence[Entry],
    size: int,
    store: Path,
) -> tuple[int, Files]:
    """One minibatch through the network in a single forward, and the packed Gram matrices of its layers written."""
    import torch

    from pipeline.data.images import pixels
    from pipeline.storage.store import Reader, write

    taken = normalise(torch.from_numpy(pixels(Reader(images, files), batch.images)), model.spec)
    try:
        packed = grams_of(network_of(model), taken, entries)
    except NonFiniteError as error:
        layer, place = error.args
        raise NonFiniteError(layer, batch.images[place]) from None
    pairs = size * (size + 1) // 2
    row = np.full((1, len(entries), pairs), np.nan)
    row[0, :, : packed.shape[1]] = packed
    slots = np.full((1, size), -1)
    slots[0, : len(batch.images)] = batch.images
    return index, write(store, {"gram": ((index, 0, 0), row), "image": ((index, 0), slots)})


def grams_of(network: torch.nn.Module, images: torch.Tensor, entries: Sequence[Entry]) -> np.ndarray:
    """(entry, pair) float64: the packed Gram matrices of images (image, channel, y, x) as the network takes them.

    Each is made when its layer's output is ready, which the next operation may overwrite. Raises `NonFiniteError` with
    the layer and the image's place.
    """
    from pipeline.networks.layers import Recorder, to_maps

    found: dict[tuple[str, str], np.ndarray] = {}
    of_layer: dict[str, list[Entry]] = {}
    for entry in entries:
        of_layer.setdefault(entry.info.name, []).append(entry)

    def take(name: str, output: torch.Tensor) -> None:
        for entry in of_layer[name]:
            found[name, entry.features] = packed_gram(features_of(output, entry, to_maps), output, name)

    with Recorder(network, list(of_layer), stop_early=True, take=take) as record:
        record(images)
    return np.stack([found[entry.info.name, entry.features] for entry in entries])


def packed_gram(features: torch.Tensor, output: torch.Tensor, layer: str) -> np.ndarray:
    """(pair): the Gram matrix of features of a layer's output; an output that is not finite is refused by its image."""
    from kernels.similarity.cka import pack
    from kernels.similarity.gram import gram

    made = gram(features).cpu()
    if not bool(made.isfinite().all()):
        bad = ~output.isfinite().reshape(len(output), -1).all(1)
        raise NonFiniteError(layer, int(bad.int().argmax()))
    return pack(made.numpy())


def features_of(output: torch.Tensor, entry: Entry, to_maps: Any) -> torch.Tensor:
    """The features (image, ...) that an entry means."""
    if entry.features == "whole":
        return output
    maps, special = to_maps(output, entry.info)
    if entry.features == "class_token":
        return special[:, 0]
    return maps.float().mean((2, 3)) if entry.features == "pooled" else maps
