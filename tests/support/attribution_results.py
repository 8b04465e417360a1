"""Attributions made of nothing but numpy, in stores as the stage `attribute` writes them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from pipeline.stages.attribute.options import METHODS, OPTIONS
from pipeline.stages.attribute.results import Attributed, Explained, Layout, group_of, store_of, unit_relevance
from pipeline.storage.manifest import Files, Manifest, within
from pipeline.storage.store import Array, create, metadata_files, write


def write_attributions(
    root: Path,
    methods: Mapping[str, str],
    *,
    dataset: str = "scenes",
    network: str = "cnn",
    experiment: str = "explained",
    slots: Sequence[int] = (2, 3, 5, 9, 10),
    targets: Any = "predicted",
    residuals: Mapping[str, Any] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    maps: Mapping[str, np.ndarray] | None = None,
    target: np.ndarray | None = None,
    logits: int | None = None,
    note: str = "",
    signs: Sequence[str] = (),
    units: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    shard: int = 4,
    seed: int = 0,
) -> Manifest:
    """Write an experiment beside the images that `report_results.write_results` wrote, and return its manifest.

    `methods` maps names to methods. `residuals` are a number or one of each slot; methods without have none. `maps` are
    (slot, y, x), or (slot, rank, y, x); default: noise, of 4 x 4 for methods whose maps lie on a layer. `target` is
    that of each slot and rank. Methods in `signs` keep what positive and negative contributions bring; `units` has, by
    method and layer, the relevance of units (slot, unit).
    """
    random = np.random.default_rng(seed)
    images = zarr.open_group(root / dataset / "images.zarr", mode="r")
    count, _, height, width = images["image"].shape
    classes = list(images.attrs["classes"])
    ranks = targets["top"] if isinstance(targets, dict) and "top" in targets else None
    several = () if ranks is None else (ranks,)
    folder = root / dataset / network / "attributions" / experiment
    if target is None:
        target = random.integers(0, len(classes), (len(slots), *several))
    scores = random.normal(size=target.shape)
    files: Files = {}
    told = []
    for name, kind in methods.items():
        layer = METHODS[kind].maps == "layer"
        size = (4, 4) if layer else (height, width)
        own = random.normal(size=(len(slots), *several, *size)) if maps is None or name not in maps else maps[name]
        own = own if METHODS[kind].signed else np.abs(own)
        layout = Layout(count, shard, ranks, own.shape[-2:], None, METHODS[kind].facts)
        if name in signs:
            layout = replace(layout, maps=("relevance", "counter_relevance"))
        given = (residuals or {}).get(name, np.nan)
        residual = np.broadcast_to(np.asarray(given, float).reshape(-1, *[1] * len(several)), target.shape)
        columns = {"attribution": own, "target": target, "score": scores, "residual": residual}
        if name in signs:
            columns |= {"relevance": own.clip(0), "counter_relevance": own.clip(None, 0)}
        facts = {"r2": 0.8, "stability": 0.25} if "r2" in METHODS[kind].facts else {}
        columns |= {fact: np.full(target.shape, value) for fact, value in facts.items()}
        if "bias" in METHODS[kind].facts:
            columns["bias"] = scores / 4
        if METHODS[kind].baseline:
            columns["baseline_score"] = scores - 1
        store = store_of(folder, name)
        options = OPTIONS[kind]().model_dump() | (settings or {}).get(name, {})
        attributes = {
            "method": kind, "law": METHODS[kind].law, "settings": options,
            "split": "validation", "targets": targets, "score": "logit", "baseline": "black",
            "image_size": [height, width], "classes": classes, "logits": len(classes) if logits is None else logits,
        }  # fmt: skip
        of_image = slots, np.asarray(images["image_id"][:]), shard
        files |= within(store.name, _written(store, layout.arrays(), attributes, columns, *of_image))
        of_units = (units or {}).get(name, {})
        for layer_name, values in of_units.items():
            own_store = store_of(folder, unit_relevance(name)) / group_of(layer_name)
            arrays = {"relevance": layout.relevance(values.shape[1]), "image_id": layout.image_id}
            made = _written(own_store, arrays, {}, {"relevance": values}, *of_image)
            files |= within(f"{own_store.parent.name}/{own_store.name}", made)
        told.append(
            Explained(
                name=name, method=kind, law=METHODS[kind].law, images=len(slots), beyond=0, size=own.shape[-2:],
                layer="features" if layer else None, note=note,
                units=tuple(of_units),
            )
        )  # fmt: skip
    result = Attributed(methods=told, images=len(slots), ranks=ranks or 1)
    manifest = Manifest("attribute", "a1", "d", files=files, result=result.written(), provenance={"began": 1})
    manifest.write(folder / "done" / "attribute.a1.json")
    return manifest


def _written(
    store: Path,
    arrays: Mapping[str, Array],
    attributes: Mapping[str, Any],
    columns: Mapping[str, np.ndarray],
    slots: Sequence[int],
    ids: np.ndarray,
    shard: int,
) -> Files:
    """Write a store by shards, with `columns` (slot, ...) where the slots are; return its files."""
    create(store, arrays, attributes)
    written = write(store, {"image_id": ((0,), ids)})
    for number in sorted({slot // shard for slot in slots}):
        places = [at for at, slot in enumerate(slots) if slot // shard == number]
        block = {}
        for array, form in arrays.items():
            if array == "image_id":
                continue
            rows = min(shard, len(ids) - number * shard)
            values = np.full((rows, *form.shape[1:]), form.fill, form.dtype)
            if array in columns:
                values[[slots[at] % shard for at in places]] = columns[array][places]
            block[array] = ((number * shard, *[0] * (values.ndim - 1)), values)
        written |= write(store, block)
    return written | metadata_files(store)
