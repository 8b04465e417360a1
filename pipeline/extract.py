"""The stage `extract`: one forward pass per (data set, network) fills the stores of all its layers.

Writes, for whole shards that hold images of the wanted split,
    layers/<layer id>/activations.zarr  activation (image, unit, y, x) float16 = value / attrs["scale"] ·
                                        maximum, mean (image, unit) float32 · special (image, token, unit) float16 for
                                        class and register tokens
    <network>/logits.zarr               logits (image, class) float32
A shard that was not extracted is absent and reads as NaN, and so are the maps of a layer that is stored pooled: it has
everything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import earlier, stage
from pipeline.cluster import check_memory, client, run_tasks
from pipeline.config import AnyDataset, Network
from pipeline.errors import MicrotomeError
from pipeline.forward import (
    HALF_MAX,
    Model,
    NonFiniteError,
    forward_in_batches,
    loaded,
    model_of,
    network_of,
    normalise,
    platform_numerics,
    refuse_non_finite,
    scale_for,
)
from pipeline.identity import digest
from pipeline.lock import one_at_a_time
from pipeline.manifest import Files, Manifest, latest, remove_others

if TYPE_CHECKING:
    import torch

    from pipeline.images import Images
    from pipeline.layer_info import LayerInfo
    from pipeline.plan import Plan, Step
    from pipeline.store import Ledger

VERSION = 1
CODE = (
    "kernels/grey.py",
    "kernels/whiten.py",
    "pipeline/checkpoint.py",
    "pipeline/extract.py",
    "pipeline/forward.py",
    "pipeline/layers.py",
    "pipeline/layer_id.py",
    "pipeline/libraries",
    "pipeline/networks.py",
)
UNIT_BLOCK = 64  # units of one chunk inside a shard
REMEDY = "lower `shard_images` of the data set or `numerics.micro_batch` of the network, or name fewer layers"


def settings(spec: Network, dataset: AnyDataset, limit: int | None) -> dict[str, Any]:
    return {
        "layers": spec.layers,
        "special_tokens": spec.special_tokens,
        "preprocessing": spec.preprocessing.model_dump(),
        "numerics": spec.numerics.model_dump(),
        "split": dataset.dissect.split,
        "images": limit,
    } | ({} if spec.store == "full" else {"store": spec.store})


@dataclass(frozen=True)
class Layer:
    """A layer as tasks name it: where its store is, how its output becomes maps, and whether these are kept."""

    id: str
    store: Path
    info: LayerInfo
    scale: float
    pooled: bool = False

    @property
    def name(self) -> str:
        return self.info.name


@dataclass
class Shard:
    """What one task says of its shard, by layer id: the files written (logits under ""), or the largest value of a
    layer that did not fit float16, whose shard is then not written."""

    shard: int
    files: dict[str, Files] = field(default_factory=dict)
    overflow: dict[str, float] = field(default_factory=dict)


def run(plan: Plan, step: Step) -> None:
    from pipeline.images import Images
    from pipeline.store import Ledger, metadata_files, remove

    assert step.dataset is not None and step.network is not None
    images = Images.of(plan, step)
    model = model_of(plan, step)
    earlier.keep(plan, step, images, model.sha256)
    began = stage.begin(plan, step)
    shards = images.shards(step.settings["split"], step.settings["images"])
    folder = plan.results / step.dataset
    logits = folder / step.network / "logits.zarr"
    with (
        one_at_a_time(plan.scratch / f"{step.dataset}.extract.lock"),
        client(plan.config.cluster, plan.scratch) as workers,
    ):
        (prepared,) = run_tasks(workers, prepare, [(model, images.size, VERSION)], 1, f"{step.name}: layers")
        layers = [
            Layer(id, folder / "layers" / id / "activations.zarr", info, scale, model.spec.pools(info.name))
            for id, info, scale in prepared.layers
        ]
        stage.refers_to(plan, step, [layer.store.parent for layer in layers])
        layers = [open_layer(layer, images) for layer in layers]
        if prepared.classes is None:  # those of another network that had this name
            remove(logits)
        else:
            open_logits(logits, images, prepared.classes)
        logits_ledger = Ledger(logits.with_suffix(".ledger"))
        made: set[int] = set()
        while True:
            # Two names of one output, a block and its last part say, have one id and one store: full if one asks.
            distinct = {layer.id: layer for layer in sorted(layers, key=lambda layer: not layer.pooled)}
            ledgers = {id: Ledger(layer.store.with_suffix(".ledger")) for id, layer in distinct.items()}
            tasks = []
            for shard in shards:
                missing = [
                    layer
                    for id, layer in distinct.items()
                    if not holds(ledgers[id], shard, shard_id(images, shard, layer), layer.store, layer.pooled)
                ]
                for layer in missing:
                    if str(shard) in ledgers[layer.id].entries:  # its files are about to become others
                        remove_others(layer.store.parent / "done", "activations")
                known = prepared.classes is None or logits_ledger.get(
                    str(shard), logits_id(images, shard, model, prepared), logits
                )
                head = None if known else logits
                if missing or head:
                    tasks.append(
                        (model, images.store, images.files_of(shard), shard, images.range(shard), missing, head)
                    )
            if tasks:
                need = memory_need(distinct.values(), prepared, model.spec, images.shard_images, images.size)
                check_memory(plan.config.cluster, need, step.name, REMEDY)
            overflow: dict[str, float] = {}
            try:
                for done in run_tasks(workers, extract_shard, tasks, len(tasks), step.name, REMEDY):
                    made.add(done.shard)
                    for id, layer in distinct.items():
                        if id in done.files:
                            made_from = shard_id(images, done.shard, layer)
                            facts = {"pooled": True} if layer.pooled else {}
                            ledgers[id].record(str(done.shard), made_from, done.files[id], **facts)
                    for id, value in done.overflow.items():
                        overflow[id] = max(overflow.get(id, 0.0), value)
                    if "" in done.files:
                        logits_ledger.record(
                            str(done.shard), logits_id(images, done.shard, model, prepared), done.files[""]
                        )
            except NonFiniteError as error:
                name, index = error.args
                raise MicrotomeError(
                    f"network {step.network!r}, layer {name!r}: the output for image {images.image_ids()[index]!r} of "
                    f"data set {step.dataset!r} is not finite (NaN or infinity)"
                ) from None
            if not overflow:
                break
            # The values of some image are beyond the headroom: those layers again, at a scale that holds all of them.
            layers = [
                open_layer(replace(layer, scale=scale_for(overflow[layer.id])), images)
                if layer.id in overflow
                else layer
                for layer in layers
            ]
    described = [finish_layer(plan, step, layer, images, shards, ledgers[layer.id]) for layer in layers]
    files = {}
    if prepared.classes is not None:
        files = stage.within("logits.zarr", logits_ledger.files(map(str, shards)))
    output = digest({"layers": [[entry["name"], entry["digest"]] for entry in described], "logits": files})
    if prepared.classes is not None:
        files |= stage.within("logits.zarr", metadata_files(logits))
    result = {"layers": described, "shards": shards}
    includes = {entry["manifest"]: entry["digest"] for entry in described}
    stage.finish(plan, step, began, output, files, result, includes, made=(len(made), len(shards)))


def pending(plan: Plan, step: Step) -> tuple[int, int]:
    """How many shards a run would put through the network now, of how many, with the images that are ingested.

    Layers are known where the last extraction read the same weights in the same way; else it is all shards at most.
    """
    from pipeline.images import Images
    from pipeline.store import Ledger

    assert step.dataset is not None and step.network is not None
    images = Images.of(plan, step)
    model = model_of(plan, step)
    shards = images.shards(step.settings["split"], step.settings["images"])
    before = latest((plan.results / step.manifest).parent, step.stage)
    if before is None or not same_layers(plan, before, step):
        return len(shards), len(shards)
    known = []
    for layer in before.result["layers"]:
        store = plan.results / step.dataset / "layers" / layer["id"] / "activations.zarr"
        pooled = model.spec.pools(layer["name"])
        known.append((layer["scale"], pooled, store, Ledger(store.with_suffix(".ledger"))))
    missing = [
        shard
        for shard in shards
        if not all(
            holds(ledger, shard, digest([images.contents[shard], scale]), store, pooled)
            for scale, pooled, store, ledger in known
        )
    ]
    return len(missing), len(shards)


def same_layers(plan: Plan, before: Manifest, step: Step) -> bool:
    """Whether an earlier extraction had the layers that this one will have; the network may not be made yet."""
    decisive = ("version", "layers", "special_tokens", "preprocessing", "numerics")
    try:
        model = model_of(plan, step)
    except FileNotFoundError:
        return False
    return model.sha256 in before.parents.values() and all(
        before.settings.get(key) == step.settings[key] for key in decisive
    )


def discard(plan: Plan, step: Step) -> list[Path]:
    """The files and folders that this step made, shared layers included."""
    assert step.dataset is not None and step.network is not None
    folder = plan.results / step.dataset
    found = [folder / step.network / "logits.zarr", folder / step.network / "logits.ledger"]
    before = latest((plan.results / step.manifest).parent, step.stage)
    for layer in before.result["layers"] if before else ():
        own = folder / "layers" / layer["id"]
        found += [own / "activations.zarr", own / "activations.ledger", *(own / "done").glob("activations.*.json")]
    return found


def shard_id(images: Images, shard: int, layer: Layer) -> str:
    """What a shard of a layer's store was made from; the layer id, the store's folder, says the rest."""
    return digest([images.contents[shard], layer.scale])


def logits_id(images: Images, shard: int, model: Model, prepared: Prepared) -> str:
    """What a shard of the logits was made from: they have a plain name, so all of it."""
    made_of = [model.sha256, model.architecture, model.spec.preprocessing.model_dump(), prepared.numerics]
    return digest([images.contents[shard], *made_of])


def holds(ledger: Ledger, shard: int, id: str, store: Path, pooled: bool) -> bool:
    """Whether a shard of a layer is there as it is wanted; a full one serves where a pooled one is wanted."""
    entry = ledger.get(str(shard), id, store)
    return entry is not None and (pooled or not entry.get("pooled", False))


def open_layer(layer: Layer, images: Images) -> Layer:
    """Create a layer's store, or take up the one that is there, at the larger of the two scales."""
    from pipeline.store import Array, attributes, create, metadata_files, remove_partials

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
    from pipeline.store import Array, create, remove_partials

    shape = (images.count, classes)
    create(
        path, {"logits": Array(("image", "class"), shape, np.float32, (images.shard_images, classes), fill=np.nan)}, {}
    )
    remove_partials(path)


def finish_layer(
    plan: Plan, step: Step, layer: Layer, images: Images, shards: list[int], ledger: Ledger
) -> dict[str, Any]:
    """Write the manifest of a layer's store, which all networks with this prefix share; return its entry."""
    from pipeline.store import metadata_files

    files = ledger.files(map(str, shards))
    wish = ["pooled"] if layer.pooled else []
    if layer.pooled:
        files = {name: value for name, value in files.items() if not name.startswith("activation/")}
    output = digest({"layer": layer.id, "files": files})
    id = digest([layer.id, images.count, {shard: shard_id(images, shard, layer) for shard in shards}, *wish])
    path = layer.store.parent / "done" / f"activations.{id}.json"
    Manifest(
        stage="activations",
        id=id,
        digest=output,
        files=stage.within("activations.zarr", files | metadata_files(layer.store)),
        result={"shards": shards, "scale": layer.scale},
        provenance=stage.provenance(),
    ).write(path)
    return {
        "name": layer.name,
        "id": layer.id,
        "shape": list(layer.info.shape),
        "scale": layer.scale,
        "manifest": path.relative_to(plan.results).as_posix(),
        "digest": output,
    } | ({"store": "pooled"} if layer.pooled else {})


@dataclass(frozen=True)
class Prepared:
    """What a network says of itself before any image: layers in order with id and scale, classes (None: it has no
    head), its numerics."""

    layers: list[tuple[str, LayerInfo, float]]
    classes: int | None
    numerics: dict[str, Any]
    parameters: int
    largest: int  # values of the largest output of any module, for one image


def prepare(model: Model, size: tuple[int, int], version: int) -> Prepared:
    """On a worker: load the network, resolve its layers, compute their ids, and find each layer's scale.

    The scale comes from a forward pass over fixed noise, so it belongs to the layer alone and not to the images.
    """
    import torch

    from pipeline.layer_id import layer_ids
    from pipeline.layers import Recorder, choose, classes_of, survey

    spec = model.spec
    shape = (spec.preprocessing.channels, *size)
    as_loaded = loaded(model)
    surveyed = survey(as_loaded, shape, spec.special_tokens)
    infos = choose(as_loaded, surveyed, spec.layers, model.name)
    numerics = spec.numerics.model_dump() | platform_numerics(version)
    preprocessing = spec.preprocessing.model_dump() | {"size": list(size)}
    ids = layer_ids(as_loaded, infos, preprocessing, numerics, shape)
    noise = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with Recorder(network_of(model), ids) as record:
        logits, outputs = record(normalise(noise, spec))
    layers = [
        (ids[info.name], info, scale_for(float(outputs[info.name].abs().amax()), headroom=True)) for info in infos
    ]
    parameters = sum(parameter.numel() for parameter in as_loaded.parameters())
    return Prepared(layers, classes_of(as_loaded, logits), numerics, parameters, surveyed.largest)


def memory_need(layers: Iterable[Layer], prepared: Prepared, spec: Network, images: int, size: tuple[int, int]) -> int:
    """Bytes of a task on `images` of a size: the weights as loaded and as used, a forward, and what is kept.

    In a forward without gradients an operation's input, output and workspace live, and an output is divided and halved
    there. What is kept of outputs is float16, and copied and compressed when it is written.
    """
    layers = list(layers)
    maps = [0 if layer.pooled else math.prod(layer.info.shape) for layer in layers]
    beside = sum(layer.info.shape[0] * (2 * layer.info.special + 8) for layer in layers)
    pixels = 3 * size[0] * size[1]
    forward = 4 * spec.numerics.micro_batch * (pixels + 4 * prepared.largest)
    outputs = images * (pixels + beside + 2 * sum(maps) + 4 * max(maps, default=0))
    return 3 * 4 * prepared.parameters + forward + outputs


def extract_shard(
    model: Model,
    images: Path,
    files: Files,
    shard: int,
    bounds: tuple[int, int],
    layers: list[Layer],
    logits: Path | None,
) -> Shard:
    """On a worker: one shard through the network, in micro-batches of fixed size, and its files written.

    Every image of the shard goes through, so the micro-batches are the same whichever images count; slots without a
    valid image are black.
    """
    import torch

    from pipeline.store import Reader, remove, write

    start, stop = bounds
    pixels = torch.from_numpy(Reader(images, files)["image"][start:stop])
    kept = {layer.name: Kept.empty(layer, len(pixels)) for layer in layers}
    head = forward_in_batches(model, pixels, list(kept), lambda name, at, output: kept[name].take(at, output))
    done = Shard(shard)
    for layer in layers:
        one = kept.pop(layer.name)
        refuse_non_finite(one.largest, layer.name, start)
        largest = float(one.largest.amax())
        if largest > HALF_MAX * layer.scale:
            done.overflow[layer.id] = largest
            continue
        done.files[layer.id] = write(layer.store, one.values(start))
        if layer.pooled:
            # Maps of other images, which the ledger no longer knows.
            remove(layer.store, f"activation/c/{shard}/0/0/0")
    if logits is not None:
        assert head is not None
        refuse_non_finite(head, "logits", start)
        done.files[""] = write(logits, {"logits": ((start, 0), head.numpy())})
    return done


@dataclass
class Kept:
    """What a shard keeps of a layer, taken from its output as soon as that is ready: a forward holds no outputs.

    `maps` (image, unit, y, x) and `special` (image, token, unit) are float16, divided by the layer's scale; None where
    there are none to keep. `maximum`, `mean` (image, unit) and `largest` (image), the largest absolute value, are
    float32 and not divided.
    """

    layer: Layer
    maps: torch.Tensor | None
    special: torch.Tensor | None
    maximum: torch.Tensor
    mean: torch.Tensor
    largest: torch.Tensor

    @classmethod
    def empty(cls, layer: Layer, count: int) -> Kept:
        import torch

        units, height, width = layer.info.shape
        special = layer.info.special
        return cls(
            layer,
            None if layer.pooled else torch.empty((count, units, height, width), dtype=torch.float16),
            torch.empty((count, special, units), dtype=torch.float16) if special else None,
            torch.empty((count, units)),
            torch.empty((count, units)),
            torch.empty(count),
        )

    def take(self, at: int, output: torch.Tensor) -> None:
        """The output for the images of the shard from `at` on."""
        import torch

        from pipeline.layers import to_maps

        maps, special = to_maps(output.float(), self.layer.info)
        part = slice(at, at + len(output))
        maximum = maps.amax((2, 3))
        self.maximum[part] = maximum
        self.mean[part] = maps.mean((2, 3))
        # NaN and infinity come through: `isfinite` on every value takes longer than all the rest.
        largest = torch.maximum(maximum, -maps.amin((2, 3))).amax(1)
        if self.maps is not None:
            self.maps[part] = self._half(maps)
        if special is not None and self.special is not None:
            largest = torch.maximum(largest, special.abs().amax((1, 2)))
            self.special[part] = self._half(special)
        self.largest[part] = largest

    def _half(self, values: torch.Tensor) -> torch.Tensor:
        # On the CPU torch changes the type fast and the order fast, and both at once slowly.
        return (values if self.layer.scale == 1 else values / self.layer.scale).half()

    def values(self, start: int) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
        """The blocks to write, for a shard that begins with image `start`."""
        found: dict[str, tuple[tuple[int, ...], np.ndarray]] = {
            "maximum": ((start, 0), self.maximum.numpy()),
            "mean": ((start, 0), self.mean.numpy()),
        }
        if self.maps is not None:
            found["activation"] = ((start, 0, 0, 0), self.maps.numpy())
        if self.special is not None:
            found["special"] = ((start, 0, 0), self.special.numpy())
        return found
