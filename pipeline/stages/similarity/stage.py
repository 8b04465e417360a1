"""The stage `similarity`: how alike layers are, within networks and between them, from their Gram matrices.

Writes, for each comparison of the configuration,
    similarity/<name>/cka.zarr  cka, standard_error, influence, most_influential, cka_biased, neighbours, procrustes and
                                others (layer_a, layer_b) · hsic (minibatch, layer_a, layer_b)
    similarity/<name>/cka.csv   the same, a row for each pair of layers
No network is asked: what is read is what the stage `grams` kept of each. See docs/similarity.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.core import Similarity
from pipeline.data.minibatches import SETTINGS
from pipeline.errors import MicrotomeError
from pipeline.plan import job as stage
from pipeline.storage.identity import digest
from pipeline.storage.manifest import write_file
from pipeline.storage.tables import csv_bytes, number
from pipeline.workers.pool import client, run_tasks

if TYPE_CHECKING:
    from kernels.similarity.cka import Cka
    from pipeline.plan.step import Plan, Step
    from pipeline.storage.manifest import Files

VERSION = 1
CODE = (
    "kernels/similarity/alignment.py",
    "kernels/similarity/cka.py",
    "pipeline/data/minibatches.py",
    "pipeline/stages/similarity/stage.py",
)
TITLES = {"whole": "", "class_token": " [class token]", "spatial": " [spatial]", "pooled": " [pooled]"}
COLUMNS = (
    "network_a", "layer_a", "network_b", "layer_b", "cka", "standard_error", "influence", "most_influential",
    "cka_biased", "neighbours", "neighbours_standard_error", "procrustes", "procrustes_shuffled", "note",
)  # fmt: skip


def settings(name: str, asked: Similarity) -> dict[str, Any]:
    copied = {"fractions": asked.data_fraction[name].copies} if name in asked.data_fraction else {}
    return {
        "networks": list(asked.comparisons[name].networks),
        "neighbours": asked.neighbours,
        "procrustes": asked.procrustes,
    } | copied


@dataclass(frozen=True)
class Grams:
    """The Gram matrices of one network, as tasks name them."""

    network: str
    store: Path
    files: Files
    layers: list[tuple[str, str]]  # name, features


@dataclass(frozen=True)
class Measured:
    """Everything of one minibatch, (layer, layer) over the layers of all networks."""

    index: int
    images: tuple[int, ...]
    unbiased: np.ndarray
    biased: np.ndarray
    neighbours: np.ndarray
    procrustes: np.ndarray
    shuffled: np.ndarray


@dataclass(frozen=True)
class Found:
    """What came out: the layers of all networks one after the other, and all measures over (layer, layer)."""

    labels: list[tuple[str, str, str]]  # network, layer, features
    epoch: np.ndarray
    weight: np.ndarray
    images: list[tuple[int, ...]]
    hsic: np.ndarray
    cka: Cka
    biased: np.ndarray
    neighbours: np.ndarray
    neighbours_error: np.ndarray
    neighbours_chance: float
    procrustes: np.ndarray
    shuffled: np.ndarray

    @property
    def titles(self) -> list[str]:
        return [f"{network}/{layer}{TITLES[features]}" for network, layer, features in self.labels]

    def note(self, a: int, b: int) -> str:
        """Why a cell is not defined; empty where it is."""
        constant = [self.titles[each] for each in dict.fromkeys((a, b)) if self.cka.constant[each]]
        return f"{' and '.join(constant)}: the same for all images of a minibatch" if constant else ""


def run(plan: Plan, step: Step) -> None:
    from pipeline.storage.store import write_whole

    assert step.comparison is not None
    began = stage.begin(plan, step)
    compared = [grams_of(plan, path) for path in step.parents]
    attrs = check_images(plan, step)
    with client(plan.config.cluster, plan.scratch) as workers:
        count = attrs["minibatches"]
        tasks = [
            ([(one.store, one_minibatch(one, index)) for one in compared], index, dict(step.settings))
            for index in range(count)
        ]
        measured = sorted(run_tasks(workers, compare, tasks, count, step.name), key=lambda one: one.index)
    found = put_together(compared, measured, attrs, step.settings)
    folder = plan.results / "similarity" / step.comparison
    files = stage.within("cka.zarr", write_whole(folder / "cka.zarr", arrays(found), attributes(found, attrs, step)))
    files |= write_file(folder, "cka.csv", csv_bytes(COLUMNS, rows(found)))
    result = {"dataset": step.dataset, "networks": step.settings["networks"], **facts(found)}
    stage.finish(plan, step, began, digest(files), files, result)


def discard(plan: Plan, step: Step) -> list[Path]:
    """The files and folders that this step made."""
    assert step.comparison is not None
    folder = plan.results / "similarity" / step.comparison
    return [folder / "cka.zarr", folder / "cka.csv"]


def grams_of(plan: Plan, path: str) -> Grams:
    """The Gram matrices that a step made, by its manifest."""
    step = plan.steps[path]
    assert step.dataset is not None and step.network is not None
    manifest = plan.manifest(step)
    layers = [(name, features) for name, features in manifest.result["layers"]]
    store = plan.results / step.dataset / step.network / "grams.zarr"
    return Grams(step.network, store, stage.below("grams.zarr", manifest.files), layers)


def check_images(plan: Plan, step: Step) -> dict[str, Any]:
    """What the networks' minibatches have in common: they have to be of the same images, in the same order."""
    facts = {path: plan.manifest(plan.steps[path]).result for path in step.parents}
    first = plan.steps[step.parents[0]]
    for path, own in facts.items():
        if own["images"] != facts[first.manifest]["images"]:
            raise MicrotomeError(
                f"{step.name}: the layers of {plan.steps[path].network} and {first.network} are of different images; "
                f"`make recompute STAGE=grams` makes them again"
            )
    own = facts[first.manifest]
    how = {key: first.settings[key] for key in (*SETTINGS, "split")}
    return how | {"minibatches": own["minibatches"], "counted": own["count"]}


def one_minibatch(one: Grams, index: int) -> Files:
    """The files that hold one minibatch, and what describes them."""
    names = ("zarr.json", "gram/zarr.json", "image/zarr.json", "epoch/zarr.json", "epoch/c/0")
    return {name: one.files[name] for name in (*names, f"gram/c/{index}/0/0", f"image/c/{index}/0")}


def compare(stores: Sequence[tuple[Path, Files]], index: int, how: dict[str, Any]) -> Measured:
    """On a worker: every pair of layers on one minibatch."""
    from kernels.similarity.alignment import mutual_neighbours, procrustes, procrustes_shuffled
    from kernels.similarity.cka import hsic
    from pipeline.storage.store import Reader

    readers = [Reader(store, files) for store, files in stores]
    slots = readers[0]["image"][index]
    images = tuple(int(slot) for slot in slots if slot >= 0)
    n = len(images)
    packed = np.concatenate([reader["gram"][index, :, : n * (n + 1) // 2] for reader in readers])
    nothing = np.full((len(packed), len(packed)), np.nan)
    return Measured(
        index,
        images,
        hsic(packed, "unbiased"),
        hsic(packed, "biased"),
        mutual_neighbours(packed, how["neighbours"]) if n > how["neighbours"] else nothing,
        procrustes(packed) if how["procrustes"] else nothing,
        procrustes_shuffled(packed) if how["procrustes"] else nothing,
    )


def put_together(compared: Sequence[Grams], measured: Sequence[Measured], attrs: dict[str, Any], how: Any) -> Found:
    """Averages over the minibatches, in their order."""
    from kernels.similarity.cka import cka, ratio
    from pipeline.storage.store import Reader

    epoch = np.asarray(Reader(compared[0].store, compared[0].files)["epoch"][:])
    n = np.array([len(one.images) for one in measured])
    # Minibatches of one size are equal; where one may be smaller, all are weighted.
    weight = n * (n - 3.0) if attrs["last"] == "weigh" else np.ones(len(n))
    hsic = np.stack([one.unbiased for one in measured])
    # The biased estimator's own weight: HSIC0 has (n - 1)^2 where HSIC1 has n (n - 3).
    biased = np.stack([one.biased for one in measured])
    biased_weight = (n - 1.0) ** 2 if attrs["last"] == "weigh" else np.ones(len(n))
    neighbours, error = averaged(np.stack([one.neighbours for one in measured]), n, epoch)
    large = n > how["neighbours"]
    chance = float((n[large] * how["neighbours"] / (n[large] - 1)).sum() / n[large].sum()) if large.any() else np.nan
    return Found(
        [(one.network, *layer) for one in compared for layer in one.layers],
        epoch,
        weight,
        [one.images for one in measured],
        hsic,
        cka(hsic, weight, epoch),
        ratio((biased * biased_weight[:, None, None]).sum(0)),
        neighbours,
        error,
        chance,
        averaged(np.stack([one.procrustes for one in measured]), n, epoch)[0],
        averaged(np.stack([one.shuffled for one in measured]), n, epoch)[0],
    )


def averaged(values: np.ndarray, n: np.ndarray, epoch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over minibatches weighted by their images, and its standard error (that of one epoch); NaN minibatches, too
    small for this measure, do not count, and neither do those on which a layer is constant."""
    known = ~np.isnan(values)
    weight = known * n[:, None, None]
    total = weight.sum(0)
    with np.errstate(invalid="ignore"):
        mean = np.where(known, values, 0) * weight
        mean = mean.sum(0) / total
        squares = (weight**2 * np.where(known, (values - mean) ** 2, 0)).sum(0) / total**2
        count = known.sum(0) / len(np.unique(epoch))
        error = np.sqrt(np.where(count > 1, squares * len(np.unique(epoch)) * count / np.maximum(count - 1, 1), np.nan))
    return mean, error


def facts(found: Found) -> dict[str, Any]:
    """Small numbers for the report: how uniform each network is, and how the networks differ in it."""
    from kernels.similarity.cka import jackknife, ratio

    networks = list(dict.fromkeys(network for network, _, _ in found.labels))
    rows_of = {name: [at for at, label in enumerate(found.labels) if label[0] == name] for name in networks}
    defined = ~found.cka.constant

    def uniformity(hsic: np.ndarray) -> np.ndarray:
        """Mean CKA over pairs of different layers of each network, and the differences between networks."""
        whole = ratio(hsic)
        means = []
        for name in networks:
            own = [at for at in rows_of[name] if defined[at]]
            pairs = whole[np.ix_(own, own)][np.triu_indices(len(own), 1)]
            means.append(pairs.mean() if len(pairs) else np.nan)
        between = [means[b] - means[a] for a in range(len(means)) for b in range(a + 1, len(means))]
        return np.array([*means, *between])

    value, error = jackknife(uniformity, found.hsic, found.weight, found.epoch)
    pairs = [(networks[a], networks[b]) for a in range(len(networks)) for b in range(a + 1, len(networks))]
    numbers = [[plain(v), plain(e)] for v, e in zip(value, error, strict=True)]
    return {
        "layers": [list(label) for label in found.labels],
        "uniformity": dict(zip(networks, numbers[: len(networks)], strict=True)),
        "difference": [[a, b, *own] for (a, b), own in zip(pairs, numbers[len(networks) :], strict=True)],
        "undefined": [found.titles[at] for at in np.flatnonzero(found.cka.constant)],
    }


def plain(value: float) -> float | None:
    """A number as JSON has it: None for NaN."""
    return None if np.isnan(value) else float(value)


def arrays(found: Found) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """The arrays of cka.zarr."""
    pair = ("layer_a", "layer_b")
    size = max(map(len, found.images))
    image = np.full((len(found.images), size), -1)
    for row, own in zip(image, found.images, strict=True):
        row[: len(own)] = own
    titles, networks = found.titles, [network for network, _, _ in found.labels]
    layers = range(len(titles))
    return {
        "layer_a": (("layer_a",), np.array(titles, object)),
        "layer_b": (("layer_b",), np.array(titles, object)),
        "network_a": (("layer_a",), np.array(networks, object)),
        "network_b": (("layer_b",), np.array(networks, object)),
        "cka": (pair, found.cka.cka),
        "standard_error": (pair, found.cka.standard_error),
        "influence": (pair, found.cka.influence),
        "most_influential": (pair, found.cka.most_influential),
        "note": (pair, np.array([[found.note(a, b) for b in layers] for a in layers], object)),
        "cka_biased": (pair, found.biased),
        "neighbours": (pair, found.neighbours),
        "neighbours_standard_error": (pair, found.neighbours_error),
        "procrustes": (pair, found.procrustes),
        "procrustes_shuffled": (pair, found.shuffled),
        "hsic": (("minibatch", *pair), found.hsic),
        "epoch": (("minibatch",), found.epoch),
        "weight": (("minibatch",), found.weight),
        "image": (("minibatch", "place"), image),
    }


def attributes(found: Found, attrs: dict[str, Any], step: Step) -> dict[str, Any]:
    chance = plain(found.neighbours_chance)
    return attrs | dict(step.settings) | {"dataset": step.dataset, "neighbours_chance": chance, "estimator": "unbiased"}


def rows(found: Found) -> list[list[Any]]:
    """A row for each pair of layers, the first not after the second."""
    table = []
    for a, (network_a, layer_a, features_a) in enumerate(found.labels):
        for b in range(a, len(found.labels)):
            network_b, layer_b, features_b = found.labels[b]
            named = (network_a, layer_a + TITLES[features_a], network_b, layer_b + TITLES[features_b])
            most = int(found.cka.most_influential[a, b])
            numbers = (
                number(found.cka.cka[a, b]),
                number(found.cka.standard_error[a, b]),
                number(found.cka.influence[a, b]),
                "" if most < 0 else most,
                number(found.biased[a, b]),
                number(found.neighbours[a, b]),
                number(found.neighbours_error[a, b]),
                number(found.procrustes[a, b]),
                number(found.shuffled[a, b]),
            )
            table.append([*named, *numbers, found.note(a, b)])
    return table
