"""A small results folder made of nothing but numpy, exactly as the results contract describes it."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

COLUMNS = [
    "layer", "unit", "concept", "category", "iou", "iou_ceiling", "iou_held_out", "ci_low", "ci_high", "threshold",
    "activation_rate",
]  # fmt: skip
SCALE = 0.5


def concepts_of(count: int) -> list[tuple[str, str]]:
    """`count` concepts as (name, category)."""
    categories = ["truth/object", "truth/part", "truth/material", "colour/colour"]
    return [(f"concept {number}", categories[number % 4]) for number in range(count)]


def write_results(
    root: Path,
    networks: Mapping[str, Sequence[tuple[str, int]]],
    *,
    dataset: str = "scenes",
    strength: Mapping[str, float] | None = None,
    permuted: Sequence[str] = (),
    concepts: Sequence[tuple[str, str]] = (),
    images: int = 12,
    side: int = 32,
    classes: Sequence[str] = ("beach", "road"),
    ids: Sequence[str] = (),
    not_extracted: int = 0,
    model: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write a results folder with `networks` {name: [(layer, units)]} and return it.

    `strength` is the largest IoU of a network (0: no detectors), reached in its last layer. `permuted` names the
    networks that get `units-permuted.csv`. The last `not_extracted` images hold NaN instead of activations.
    """
    random = np.random.default_rng(seed)
    concepts = concepts or concepts_of(8)
    folder = root / dataset
    _write_images(folder / "images.zarr", random, images, side, classes, ids)
    for name, layers in networks.items():
        most = (strength or {}).get(name, 0.3)
        rows, permuted_rows, paths = [], [], {}
        for depth, (layer, units) in enumerate(layers):
            layer_id = f"{name}{depth:02d}"
            best = [((unit + depth) % len(concepts), most * (depth + 1) / len(layers)) for unit in range(units)]
            best = [(column, highest * random.uniform(0.3, 1)) for column, highest in best]
            threshold = _write_layer(folder, layer_id, random, images, best, concepts, not_extracted)
            paths[layer] = {
                "id": layer_id,
                "activations": f"layers/{layer_id}/activations.zarr",
                "thresholds": f"layers/{layer_id}/dissect-d1/thresholds.zarr",
                "iou": f"layers/{layer_id}/dissect-d1/iou.zarr",
            }
            for unit, (column, iou) in enumerate(best):
                rows.append(_row(layer, unit, concepts[column], iou, threshold[unit]))
                permuted_rows.append(_row(layer, unit, concepts[0], 0.02 * random.uniform(), threshold[unit]))
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "layers.json").write_text(json.dumps(paths), encoding="utf-8")
        write_csv(folder / name / "units.csv", rows)
        if name in permuted:
            write_csv(folder / name / "units-permuted.csv", permuted_rows)
        if model is not None:
            (root / "networks" / name).mkdir(parents=True)
            (root / "networks" / name / "model.json").write_text(json.dumps(model), encoding="utf-8")
    return root


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _row(layer: str, unit: int, concept: tuple[str, str], iou: float, threshold: float) -> dict[str, Any]:
    label = concept if iou > 0.04 else ("", "")
    values = [layer, unit, *label, iou, min(1.0, 2 * iou + 0.1), iou * 0.95, iou * 0.9, iou * 1.1, threshold, 0.0099]
    return dict(zip(COLUMNS, values, strict=True))


def _write_images(
    path: Path, random: np.random.Generator, images: int, side: int, classes: Sequence[str], ids: Sequence[str]
) -> None:
    store = zarr.open_group(path, mode="w", zarr_format=3)
    rows, columns = np.mgrid[:side, :side] / side
    base = np.stack([rows * 180 + 40, columns * 150 + 60, (rows + columns) * 60 + 90])
    pixels = (base[None] + random.integers(-30, 30, (images, 1, 1, 1))).clip(0, 255).astype(np.uint8)
    store.create_array("image", data=pixels, chunks=(4, 3, side, side), dimension_names=["image", "channel", "y", "x"])
    store.create_array("label", data=np.arange(images) % len(classes), dimension_names=["image"])
    store.create_array("valid", data=np.arange(images) != 1, dimension_names=["image"])
    for name, values in (
        ("split", ["train" if number == 0 else "validation" for number in range(images)]),
        ("image_id", list(ids) or [f"{number:06d}" for number in range(images)]),
    ):
        array = store.create_array(name, shape=(images,), dtype=str, dimension_names=["image"])
        array[:] = np.array(values, dtype=np.dtypes.StringDType())
    store.update_attributes({"classes": list(classes)})


def _write_layer(
    folder: Path,
    layer_id: str,
    random: np.random.Generator,
    images: int,
    best: Sequence[tuple[int, float]],
    concepts: Sequence[tuple[str, str]],
    missing: int,
) -> np.ndarray:
    """`best` is the column of the best concept of each unit, and its IoU; with the next concept it is half of that."""
    units = len(best)
    maps = random.normal(size=(images, units, 4, 4)).astype(np.float16)
    maps[:, :, 1:3, 1:3] += 3  # a region in the middle, so that masks look like masks
    maximum = maps.max(axis=(2, 3)).astype(np.float32) * SCALE
    if missing:
        maps[-missing:] = np.nan
        maximum[-missing:] = np.nan
    store = zarr.open_group(folder / "layers" / layer_id / "activations.zarr", mode="w", zarr_format=3)
    store.create_array("activation", data=maps, chunks=(4, units, 4, 4), dimension_names=["image", "unit", "y", "x"])
    store.create_array("maximum", data=maximum, chunks=(4, units), dimension_names=["image", "unit"])
    store.update_attributes({"scale": SCALE})
    settings = {
        "method": "standard", "quantile": 0.01, "positions": "upsampled", "border": "edge", "split": "validation",
    }  # fmt: skip
    threshold = np.full(units, 2.5 * SCALE, dtype=np.float32)
    dissect = folder / "layers" / layer_id / "dissect-d1"
    store = zarr.open_group(dissect / "thresholds.zarr", mode="w", zarr_format=3)
    store.create_array("threshold", data=threshold, dimension_names=["unit"])
    store.update_attributes(settings)
    store = zarr.open_group(dissect / "iou.zarr", mode="w", zarr_format=3)
    iou = np.zeros((units, len(concepts)), dtype=np.float32)
    for unit, (column, highest) in enumerate(best):
        iou[unit, column], iou[unit, (column + 1) % len(concepts)] = highest, highest / 2
    store.create_array("iou", data=iou, dimension_names=["unit", "concept"])
    for place, name in enumerate(("concept", "category")):
        array = store.create_array(name, shape=(len(concepts),), dtype=str, dimension_names=["concept"])
        array[:] = np.array([concept[place] for concept in concepts], dtype=np.dtypes.StringDType())
    store.update_attributes(
        settings | {"images": images - 2, "pixels": 1024, "union": "all", "min_iou": 0.04, "labels": "true"}
    )
    return threshold
