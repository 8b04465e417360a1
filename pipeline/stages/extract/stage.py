"""The stage `extract`: one forward pass per (data set, network) fills the stores of all its layers.

Writes, for whole shards that hold images of the wanted split,
    layers/<layer id>/activations.zarr  activation (image, unit, y, x) float16 = value / attrs["scale"] ·
                                        maximum, mean (image, unit) float32 · special (image, token, unit) float16 for
                                        class and register tokens
    <network>/logits.zarr               logits (image, class) float32
A shard that was not extracted is absent and reads as NaN, and so are the maps of a layer that is stored pooled: it has
everything else. So are those of a layer that is not stored (`store: none`), whose thresholds are counted in the same
forward pass (`pipeline.stages.extract.streaming`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.core import AnyDataset, Network
from pipeline.networks.forward import (
    HALF_MAX,
    Model,
    NonFiniteError,
    forward_in_batches,
    half,
    host_buffer,
    loaded,
    model_of,
    network_of,
    normalise,
    platform_numerics,
    refuse_non_finite,
    scale_for,
    to_host,
)
from pipeline.networks.layer import LayerInfo
from pipeline.plan import job as stage
from pipeline.stages.extract import replaced as earlier
from pipeline.stages.extract import streaming as stream
from pipeline.stages.extract.pictures import sample_of
from pipeline.stages.extract.streaming import Counter, Part, Streamed
from pipeline.storage.identity import digest
from pipeline.storage.lock import one_at_a_time
from pipeline.storage.manifest import Files, Manifest, latest, remove_others
from pipeline.workers.pool import check_memory, client, overlapping, run_tasks

if TYPE_CHECKING:
    import torch

    from pipeline.data.images import Images
    from pipeline.plan.step import Plan, Step
    from pipeline.storage.store import Ledger

VERSION = 1
CODE = (
    "kernels/images/grey.py",
    "kernels/images/whiten.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/stages/extract/stage.py",
    "pipeline/networks/forward.py",
    "pipeline/networks/layers.py",
    "pipeline/networks/layer_id.py",
    "pipeline/networks/libraries",
    "pipeline/networks/build.py",
    "pipeline/stages/extract/streaming.py",
)
UNIT_BLOCK = 64  # units of one chunk inside a shard
REMEDY = "lower `shard_images` of the data set or `numerics.micro_batch` of the network, or name fewer layers"


def settings(spec: Network, dataset: AnyDataset, limit: int | None) -> dict[str, Any]:
    found = {
        "layers": spec.layers,
        "special_tokens": spec.special_tokens,
        "preprocessing": spec.preprocessing.model_dump(),
        "numerics": spec.numerics.model_dump(),
        "split": dataset.dissect.split,
        "images": limit,
    } | ({} if spec.store == "full" else {"store": spec.store})
    if spec.streams:
        found["tails"] = stream.settings(dataset.dissect.resolved(), dataset.label_map_size)
    return found


@dataclass(frozen=True)
class Layer:
    """A layer as tasks name it: where its store is, how its output becomes maps, whether these are kept, and, where
    they are not, whether they are counted."""

    id: str
    store: Path
    info: LayerInfo
    scale: float
    pooled: bool = False
    streamed: bool = False

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


@dataclass
class Block:
    """What one task says of its shards, and the files of the tails that it wrote, by layer id."""

    block: int
    shards: list[Shard]
    tails: dict[str, Files]


def run(plan: Plan, step: Step) -> None:
    from pipeline.data.images import Images
    from pipeline.storage.store import Ledger, metadata_files, remove

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
        layers = [layer_of(folder, model.spec, *entry) for entry in prepared.layers]
        stage.refers_to(plan, step, [layer.store.parent for layer in layers])
        layers = [open_layer(layer, images) for layer in alike(layers)]
        if prepared.classes is None:  # those of another network that had this name
            remove(logits)
        else:
            open_logits(logits, images, prepared.classes)
        logits_ledger = Ledger(logits.with_suffix(".ledger"))
        tails = Tails(step, images, shards)
        made: set[int] = set()
        while True:
            # Two names of one output, a block and its last part say, have one id and one store: full if one asks.
            by_wish = sorted(layers, key=lambda layer: (not layer.pooled, layer.streamed))
            distinct = {layer.id: layer for layer in by_wish}
            ledgers = {id: Ledger(layer.store.with_suffix(".ledger")) for id, layer in distinct.items()}
            overflow = tails.open(workers, model, prepared, plan, distinct.values())
            filled = [layer.store.parent for layer in layers] + [layer.store for layer in tails.layers.values()]
            stage.refers_to(plan, step, filled)
            tasks = []
            for block, members in tails.blocks.items() if not overflow else ():
                parts = []
                uncounted = tails.missing(block)
                for shard in members:
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
                    if missing or head or uncounted:
                        parts.append((tails.parts[shard], tails.shown[shard], missing, head))
                if parts:
                    tasks.append((model, images.store, block, parts, uncounted))
            if tasks:
                need = memory_need(distinct.values(), prepared, model.spec, images.shard_images, images.size)
                need += stream.memory_need(tails.layers.values(), model.spec.numerics.micro_batch)
                check_memory(plan.config.cluster, need, step.name, REMEDY)
            try:
                for done in run_tasks(workers, extract_block, tasks, len(tasks), step.name, REMEDY):
                    for one in done.shards:
                        made.add(one.shard)
                        for id, layer in distinct.items():
                            if id in one.files:
                                made_from = shard_id(images, one.shard, layer)
                                facts = {"pooled": True} if layer.pooled else {}
                                ledgers[id].record(str(one.shard), made_from, one.files[id], **facts)
                        for id, value in one.overflow.items():
                            overflow[id] = max(overflow.get(id, 0.0), value)
                        if "" in one.files:
                            logits_ledger.record(
                                str(one.shard), logits_id(images, one.shard, model, prepared), one.files[""]
                            )
                    tails.record(done)
            except NonFiniteError as error:
                raise error.told(step, images.image_ids()) from None
            if not overflow:
                break
            # The values of some image are beyond the headroom: those layers again, at a scale that holds all of them.
            layers = [
                open_layer(replace(layer, scale=scale_for(overflow[layer.id])), images)
                if layer.id in overflow
                else layer
                for layer in layers
            ]
    described = [finish_layer(plan, step, layer, images, shards, ledgers[layer.id], tails) for layer in layers]
    files = {}
    if prepared.classes is not None:
        files = stage.within("logits.zarr", logits_ledger.files(map(str, shards)))
    output = digest({"layers": [[entry["name"], entry["digest"]] for entry in described], "logits": files})
    if prepared.classes is not None:
        files |= stage.within("logits.zarr", metadata_files(logits))
    result: dict[str, Any] = {"layers": described, "shards": shards}
    if tails.layers:
        result["forward_bytes"] = forward_need(prepared, model.spec, images.size)
    includes = {entry["manifest"]: entry["digest"] for entry in described}
    stage.finish(plan, step, began, output, files, result, includes, made=(len(made), len(shards)))


def layer_of(folder: Path, spec: Network, id: str, info: LayerInfo, scale: float) -> Layer:
    kept = spec.kept(info.name)
    return Layer(id, folder / "layers" / id / "activations.zarr", info, scale, kept != "full", streamed=kept == "none")


def alike(layers: list[Layer]) -> list[Layer]:
    """A layer that is to be counted and not stored is stored where another name of the same output asks for it."""
    full = {layer.id for layer in layers if not layer.pooled}
    return [
        replace(layer, pooled=False, streamed=False) if layer.streamed and layer.id in full else layer
        for layer in layers
    ]


class Tails:
    """The layers of an extraction that are counted and not stored, and which blocks of shards are counted.

    Without such a layer there is nothing to count, and every shard is a block of its own.

    Attributes
    ----------
    layers : by layer id, with their brackets.
    blocks : shards by block.
    parts, shown : by shard: the rows that count, and those whose lowest values pictures need.
    """

    def __init__(self, step: Step, images: Images, shards: list[int]) -> None:
        self.images = images
        self.layers: dict[str, Streamed] = {}
        self.ledgers: dict[str, Ledger] = {}
        self.how = step.settings.get("tails")
        self.blocks = {shard: [shard] for shard in shards}
        counts = np.zeros(images.count, bool)
        if self.how is not None:
            self.how = self.how | {"size": self.how["size"] or images.size}
            self.blocks = stream.blocks(shards, len(images.contents))
            counts = images.counted(step.settings["split"])
        self.parts = stream.parts(images, shards, counts)
        sampled = np.isin(np.arange(images.count), sample_of(counts))
        self.shown = {shard: part.rows for shard, part in stream.parts(images, shards, sampled).items()}

    def streamed(self, layer: Layer) -> Streamed:
        assert self.how is not None
        return stream.streamed(layer.store.parent, layer.id, layer.info, layer.scale, self.how)

    def known(self, layer: Layer) -> bool:
        """Whether the layer's tails have a bracket on the disk, which `layers` then has."""
        from pipeline.storage.store import Ledger, remove

        one = self.streamed(layer)
        if layer.id in self.layers and self.layers[layer.id].store != one.store:  # counted at a scale that is too small
            remove(self.layers[layer.id].store)
            self.ledgers[layer.id].clear()
        self.ledgers[layer.id] = Ledger(one.store.with_suffix(".ledger"))
        self.layers[layer.id] = stream.with_bracket(one, self.ledgers[layer.id])
        return self.layers[layer.id].bracket is not None

    def open(
        self, workers: Any, model: Model, prepared: Prepared, plan: Plan, layers: Iterable[Layer]
    ) -> dict[str, float]:
        """Find the brackets, from a sample where there is none yet, and open the stores.

        Returns the largest value of every layer that does not fit float16 by the sample: it is to be scaled, and then
        this done again.
        """
        wanted = [layer for layer in layers if layer.streamed]
        unknown = [self.layers[layer.id] for layer in wanted if not self.known(layer)]
        overflow: dict[str, float] = {}
        if unknown:
            some = [part for part in self.parts.values() if len(part.rows)][: stream.SAMPLE_SHARDS]
            need = forward_need(prepared, model.spec, self.images.size)
            units = sum(layer.info.shape[0] for layer in unknown)
            need += 4 * 512 * units * stream.SAMPLE_SHARDS * stream.SAMPLE_IMAGES
            check_memory(plan.config.cluster, need, f"{model.name}: sample", REMEDY)
            task = model, self.images.store, some, unknown
            ((brackets, overflow),) = run_tasks(workers, stream.sample, [task], 1, f"extract {model.name}: sample")
            for id, bracket in brackets.items():
                self.layers[id] = replace(self.layers[id], bracket=bracket)
        for id, layer in self.layers.items():
            if layer.bracket is not None:
                stream.open_store(layer, max(self.blocks) + 1, self.ledgers[id])
        return overflow

    def id(self, layer: Streamed, block: int) -> str:
        return stream.block_id(layer, self.images, [self.parts[shard] for shard in self.blocks[block]], self.shown)

    def missing(self, block: int) -> list[Streamed]:
        """The layers whose tails of a block are yet to be counted."""
        return [
            layer
            for id, layer in self.layers.items()
            if self.ledgers[id].get(str(block), self.id(layer, block), layer.store) is None
        ]

    def record(self, done: Block) -> None:
        for id, files in done.tails.items():
            self.ledgers[id].record(str(done.block), self.id(self.layers[id], done.block), files)

    def files(self, layer: Streamed) -> Files:
        """The files of a layer's tails, named from the folder of the layer."""
        from pipeline.storage.store import metadata_files

        files = self.ledgers[layer.id].files(["bracket", *map(str, self.blocks)])
        return stage.within(layer.store.name, files | metadata_files(layer.store))


def pending(plan: Plan, step: Step) -> tuple[int, int]:
    """How many shards a run would put through the network now, of how many, with the images that are ingested.

    Layers are known where the last extraction read the same weights in the same way; else it is all shards at most.
    """
    from pipeline.data.images import Images
    from pipeline.storage.store import Ledger

    assert step.dataset is not None and step.network is not None
    images = Images.of(plan, step)
    model = model_of(plan, step)
    shards = images.shards(step.settings["split"], step.settings["images"])
    before = latest((plan.results / step.manifest).parent, step.stage)
    if before is None or not same_layers(plan, before, step):
        return len(shards), len(shards)
    known = []
    tails = Tails(step, images, shards)
    uncounted: set[int] = set()
    for layer in before.result["layers"]:
        store = plan.results / step.dataset / "layers" / layer["id"] / "activations.zarr"
        kept = model.spec.kept(layer["name"])
        known.append((layer["scale"], kept != "full", store, Ledger(store.with_suffix(".ledger"))))
        if kept == "none":
            shape = (layer["shape"][0], layer["shape"][1], layer["shape"][2])
            info = LayerInfo(layer["name"], shape, "map", 0, "", "")  # of which the tails' store needs the shape alone
            if not tails.known(Layer(layer["id"], store, info, layer["scale"], True, streamed=True)):
                return len(shards), len(shards)
    for block, members in tails.blocks.items():
        if tails.missing(block):
            uncounted.update(members)
    missing = [
        shard
        for shard in shards
        if shard in uncounted
        or not all(
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
        found += sorted(own.glob("tails-*"))
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


def finish_layer(
    plan: Plan, step: Step, layer: Layer, images: Images, shards: list[int], ledger: Ledger, tails: Tails
) -> dict[str, Any]:
    """Write the manifest of a layer's store, which all networks with this prefix share; return its entry."""
    from pipeline.storage.store import metadata_files

    files = ledger.files(map(str, shards))
    kept = "none" if layer.streamed else "pooled"
    wish = [kept] if layer.pooled else []
    if layer.pooled:
        files = {name: value for name, value in files.items() if not name.startswith("activation/")}
    made_of = {shard: shard_id(images, shard, layer) for shard in shards}
    contents: dict[str, Any] = {"layer": layer.id, "files": files}
    counted: Files = {}
    extra: dict[str, Any] = {}
    if layer.streamed:
        # What the maps would be is known by what they would be made from; the tails depend on a sample.
        contents |= {"store": kept, "shards": made_of}
        one = tails.layers[layer.id]
        wish.append(one.store.stem)
        counted = tails.files(one)
        extra = {"tails": one.store.stem, "counted": tails.how, "info": vars(layer.info)}
    output = digest(contents)
    id = digest([layer.id, images.count, made_of, *wish])
    path = layer.store.parent / "done" / f"activations.{id}.json"
    Manifest(
        stage="activations",
        id=id,
        digest=output,
        files=stage.within("activations.zarr", files | metadata_files(layer.store)) | counted,
        result={"shards": shards, "scale": layer.scale} | ({"tails": extra["tails"]} if extra else {}),
        provenance=stage.provenance(),
    ).write(path)
    return {
        "name": layer.name,
        "id": layer.id,
        "shape": list(layer.info.shape),
        "scale": layer.scale,
        "manifest": path.relative_to(plan.results).as_posix(),
        "digest": output,
    } | ({"store": kept} | extra if layer.pooled else {})


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

    from pipeline.networks.layer_id import layer_ids
    from pipeline.networks.layers import Recorder, choose, classes_of, survey

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
    outputs = images * (pixels + beside + 2 * sum(maps) + 4 * max(maps, default=0))
    return forward_need(prepared, spec, size) + outputs


def forward_need(prepared: Prepared, spec: Network, size: tuple[int, int]) -> int:
    """Bytes of a forward of one micro-batch: weights, an operation's input, output and workspace."""
    pixels = 3 * size[0] * size[1]
    return 3 * 4 * prepared.parameters + 4 * spec.numerics.micro_batch * (pixels + 4 * prepared.largest)


@overlapping
def extract_block(
    model: Model,
    images: Path,
    block: int,
    parts: list[tuple[Part, np.ndarray, list[Layer], Path | None]],
    streamed: list[Streamed],
) -> Block:
    """On a worker: some shards, one after the other, and the tails of layers over all of them."""
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
    layers: list[Layer],
    logits: Path | None,
    counters: Mapping[str, Counter] | None = None,
) -> Shard:
    """On a worker: one shard through the network, in micro-batches of fixed size, and its files written.

    Every image of the shard goes through, so the micro-batches are the same whichever images count; slots without a
    valid image are black. `counters` get the outputs of the layers of their names too.
    """
    import torch

    from pipeline.storage.store import Reader, remove, write

    start, stop = bounds
    pixels = torch.from_numpy(Reader(images, files)["image"][start:stop])
    counting = dict(counters or {})
    kept = {layer.name: Kept.empty(layer, len(pixels), counting.pop(layer.name, None)) for layer in layers}
    for name, counter in counting.items():  # of which all else is there
        uncounted = counter.layer
        unwritten = Layer(uncounted.id, Path(), uncounted.info, uncounted.scale, pooled=True)
        kept[name] = Kept.empty(unwritten, len(pixels), counter)
    head = forward_in_batches(model, pixels, list(kept), lambda name, at, output: kept[name].take(at, output))
    done = Shard(shard)
    written = {layer.name for layer in layers}
    for name in list(kept):
        one = kept.pop(name)
        layer = one.layer
        refuse_non_finite(one.largest, layer.name, start)
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
        refuse_non_finite(head, "logits", start)
        done.files[""] = write(logits, {"logits": ((start, 0), head.numpy())})
    return done


@dataclass
class Kept:
    """What a shard keeps of a layer, taken from its output as soon as that is ready: a forward holds no outputs.

    `maps` (image, unit, y, x) and `special` (image, token, unit) are float16, divided by the layer's scale; None where
    there are none to keep. `maximum`, `mean` (image, unit) and `largest` (image), the largest absolute value, are
    float32 and not divided. `counter` counts the maps of a layer that is not stored.
    """

    layer: Layer
    maps: torch.Tensor | None
    special: torch.Tensor | None
    maximum: torch.Tensor
    mean: torch.Tensor
    largest: torch.Tensor
    counter: Counter | None = None

    @classmethod
    def empty(cls, layer: Layer, count: int, counter: Counter | None = None) -> Kept:
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
            counter,
        )

    def take(self, at: int, output: torch.Tensor) -> None:
        """The output for the images of the shard from `at` on."""
        import torch

        from pipeline.networks.layers import to_maps

        maps, special = to_maps(output.float(), self.layer.info)
        part = slice(at, at + len(output))
        maximum = maps.amax((2, 3))
        to_host(maximum, self.maximum[part])
        to_host(maps.mean((2, 3)), self.mean[part])
        # NaN and infinity come through: `isfinite` on every value takes longer than all the rest.
        largest = torch.maximum(maximum, -maps.amin((2, 3))).amax(1)
        if self.maps is not None:
            to_host(half(maps, self.layer.scale), self.maps[part])
        if special is not None and self.special is not None:
            largest = torch.maximum(largest, special.abs().amax((1, 2)))
            to_host(half(special, self.layer.scale), self.special[part])
        to_host(largest, self.largest[part])
        # What is not finite or too large is not counted: the shard is refused, or the layer scaled and counted again.
        if self.counter is not None and bool((largest <= HALF_MAX * self.layer.scale).all()):
            self.counter.take(at, maps)

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
