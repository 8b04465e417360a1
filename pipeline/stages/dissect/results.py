"""What `dissect` writes for a layer, and what it reuses from earlier results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.stages.dissect.settings import Method
from pipeline.stages.dissect.work import Concepts, LayerResult, Threshold, manifest_of
from pipeline.storage import manifest as storage_manifest
from pipeline.storage import provenance
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Manifest
from pipeline.storage.record import Record
from pipeline.storage.tables import number

if TYPE_CHECKING:
    from kernels.dissection.counts import Counts
    from pipeline.storage.store import Reader


UNIT_COLUMNS = (
    "layer",
    "unit",
    "concept",
    "category",
    "iou",
    "iou_ceiling",
    "iou_held_out",
    "ci_low",
    "ci_high",
    "threshold",
    "activation_rate",
)


Arrays = dict[str, tuple[tuple[str, ...], np.ndarray]]  # of a store: dimensions and values by name


SHOWN = ("image", "map", "histogram", "low", "high")


class Dissected(Record):
    """The result in the manifest of `dissect`: the number of counted images, and of those of the permuted control."""

    images: int
    control_images: int

    @classmethod
    def of(cls, manifest: Manifest) -> Dissected:
        return cls.read(manifest.result)


class CountedLayer(Record):
    """The result in one layer's manifest: the ids of its thresholds, and of the counts of each category."""

    thresholds: str
    labels: dict[str, str]

    @classmethod
    def of(cls, manifest: Manifest) -> CountedLayer:
        return cls.read(manifest.result)


def earlier_results(one: LayerResult) -> Iterator[tuple[Path, Manifest]]:
    """Yield folder and manifest of finished results for the same layer with the same thresholds."""
    for path in sorted((one.layer.folder / "done").glob("dissect.*.json")):
        manifest = Manifest.read(path)
        if CountedLayer.of(manifest).thresholds == one.thresholds:
            yield one.layer.folder / f"dissect-{manifest.id}", manifest


def earlier_threshold(one: LayerResult) -> Threshold | None:
    """Return the same thresholds from an earlier result, if there is one."""
    for folder, manifest in earlier_results(one):
        stored = result_store(folder, "thresholds.zarr", manifest)
        half = (stored["threshold"][:] / np.float32(stored.attrs["scale"])).astype(np.float16)
        return Threshold(half, stored["active"][:], stored.attrs["positions_counted"])
    return None


def result_store(folder: Path, name: str, manifest: Manifest) -> Reader:
    """Open one store of a dissect-<id> folder, for verified reads."""
    from pipeline.storage.store import Reader

    return Reader(folder / name, storage_manifest.below(f"{folder.name}/{name}", manifest.files))


def earlier_counts(one: LayerResult, concepts: Concepts) -> dict[str, tuple[Counts, Concepts]]:
    """Return earlier counts, by category, for categories that were counted on the same label maps."""
    found: dict[str, tuple[Counts, Concepts]] = {}
    for folder, manifest in earlier_results(one):
        there = CountedLayer.of(manifest).labels
        names = [name for name, id in one.labels.items() if there.get(name) == id and name not in found]
        if names:
            stored = result_store(folder, "counts.zarr", manifest)
            # The store's own order: a manifest sorts its entries by name.
            categories, place = tuple(stored.attrs["categories"]), tuple(stored.attrs["category_of_concept"])
            source = replace(concepts, categories=categories, axis=(), names=(), numbers=(), category_index=place)
            found |= dict.fromkeys(names, (read_counts(stored), source))
    return found


def earlier_shown(one: LayerResult) -> Arrays | None:
    """Return the pictures' data of a streamed layer from an earlier result with the same thresholds."""
    for folder, manifest in earlier_results(one):
        if f"{folder.name}/shown.zarr/zarr.json" in manifest.files:
            stored = result_store(folder, "shown.zarr", manifest)
            return {name: (stored[name].metadata.dimension_names, np.asarray(stored[name][:])) for name in SHOWN}
    return None


def read_counts(stored: Reader) -> Counts:
    from kernels.dissection.counts import Counts

    return Counts(**{item.name: np.asarray(stored[item.name][:]) for item in fields(Counts)})


def write_layer(
    wanted: LayerResult,
    found: Threshold,
    counts: Counts,
    concepts: Concepts,
    method: Method,
    counted: list[str],
    shown: Arrays | None = None,
) -> None:
    """Write the result of one layer; its provenance records `counted`, the categories that were counted now.

    `shown` is the pictures' data of a streamed layer.
    """
    from kernels.dissection.counts import iou
    from pipeline.storage.store import write_whole

    layer = wanted.layer
    folder = layer.folder / f"dissect-{wanted.id}"
    attrs = method.written() | {
        "labels": "permuted" if wanted.permuted else "true",
        "images": sum(len(one.rows) for one in wanted.counted),
        "shards": len(wanted.counted),
    }
    category = np.array([concepts.categories[place] for place in concepts.category_index], dtype=object)
    unit, concept, group = ("unit",), ("concept",), ("group",)
    files = storage_manifest.within(
        f"{folder.name}/thresholds.zarr",
        write_whole(
            folder / "thresholds.zarr",
            {
                "threshold": (unit, found.threshold.astype(np.float32) * np.float32(layer.scale)),
                "active": (unit, found.active),
            },
            attrs | {"scale": layer.scale, "positions_counted": found.positions},
        ),
    )
    files |= storage_manifest.within(
        f"{folder.name}/iou.zarr",
        write_whole(
            folder / "iou.zarr",
            {
                "intersection": (unit + concept, counts.intersection.sum(0)),
                "unit_area": (unit, counts.unit_area.sum(0)),
                "concept_area": (concept, counts.concept_area.sum(0)),
                "iou": (unit + concept, iou(counts, concepts.category_index, method.union).astype(np.float32)),
                "concept": (concept, np.array(concepts.names, dtype=object)),
                "concept_id": (concept, np.array(concepts.numbers, np.int64)),
                "category": (concept, category),
            },
            attrs | {"pixels": int(counts.pixels.sum())},
            coordinates=["concept_id", "category"],
        ),
    )
    files |= storage_manifest.within(
        f"{folder.name}/counts.zarr",
        write_whole(
            folder / "counts.zarr",
            {
                "intersection": (group + unit + concept, counts.intersection),
                "unit_area": (group + unit, counts.unit_area),
                "unit_area_in_category": ((*group, *unit, "category"), counts.unit_area_in_category),
                "concept_area": (group + concept, counts.concept_area),
                "pixels": (group, counts.pixels),
                "pixels_in_category": ((*group, "category"), counts.pixels_in_category),
            },
            attrs | {"categories": list(concepts.categories), "category_of_concept": list(concepts.category_index)},
        ),
    )
    if shown is not None:
        written = write_whole(folder / "shown.zarr", shown, {"scale": layer.scale})
        files |= storage_manifest.within(f"{folder.name}/shown.zarr", written)
    Manifest(
        stage="dissect",
        id=wanted.id,
        digest=digest(files),
        files=files,
        result=CountedLayer(thresholds=wanted.thresholds, labels=dict(wanted.labels)).written(),
        provenance=provenance.provenance() | {"counted": counted},
    ).write(manifest_of(wanted))


def unit_rows(one: LayerResult, manifest: Manifest, method: Method) -> list[list[Any]]:
    """Return the rows of units.csv for one layer, read back from its verified stores."""
    from kernels.dissection.labels import label_units

    folder = one.layer.folder / f"dissect-{one.id}"
    names_of = ("thresholds.zarr", "counts.zarr", "iou.zarr")
    thresholds, stored, result = (result_store(folder, name, manifest) for name in names_of)
    counts = read_counts(stored)
    labels = label_units(counts, np.asarray(stored.attrs["category_of_concept"]), method.union)
    names, categories = result["concept"][:], result["category"][:]
    threshold = thresholds["threshold"][:]
    rate = counts.unit_area.sum(0) / counts.pixels.sum()
    rows = []
    for unit in range(len(threshold)):
        kept = labels.iou[unit] > method.min_iou
        best = labels.column[unit]
        rows.append(
            [
                one.layer.name,
                unit,
                names[best] if kept else "",
                categories[best] if kept else "",
                *map(number, (labels.iou[unit], labels.ceiling[unit], labels.held_out[unit])),
                *map(number, (labels.low[unit], labels.high[unit], threshold[unit], rate[unit])),
            ]
        )
    return rows
