"""What the stage `similarity` makes of its minibatches: averages with standard errors, as arrays and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.minibatches import Batching
from pipeline.stages.similarity.results import Compared
from pipeline.stages.similarity.settings import Settings
from pipeline.stages.similarity.tasks import Measured
from pipeline.storage.store import StoreRef
from pipeline.storage.tables import number

if TYPE_CHECKING:
    from kernels.similarity.cka import Cka

TITLES = {"whole": "", "class_token": " [class token]", "spatial": " [spatial]", "pooled": " [pooled]"}
COLUMNS = (
    "network_a", "layer_a", "network_b", "layer_b", "cka", "standard_error", "influence", "most_influential",
    "cka_biased", "neighbours", "neighbours_standard_error", "procrustes", "procrustes_shuffled", "note",
)  # fmt: skip


@dataclass(frozen=True)
class Grams:
    """The Gram matrices of one network: their store, and name and features of each row."""

    network: str
    store: StoreRef
    layers: Sequence[tuple[str, str]]


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
        """Say why a cell is not defined; empty where it is."""
        constant = [self.titles[each] for each in dict.fromkeys((a, b)) if self.cka.constant[each]]
        return f"{' and '.join(constant)}: the same for all images of a minibatch" if constant else ""


def put_together(compared: Sequence[Grams], measured: Sequence[Measured], batching: Batching, how: Settings) -> Found:
    """Average over the minibatches, in their order."""
    from kernels.similarity.cka import cka, ratio

    epoch = np.asarray(compared[0].store.open()["epoch"][:])
    n = np.array([len(one.images) for one in measured])
    # Minibatches of one size are equal; where one may be smaller, all are weighted.
    weight = n * (n - 3.0) if batching.last == "weigh" else np.ones(len(n))
    hsic = np.stack([one.unbiased for one in measured])
    # The biased estimator's own weight: HSIC0 has (n - 1)^2 where HSIC1 has n (n - 3).
    biased = np.stack([one.biased for one in measured])
    biased_weight = (n - 1.0) ** 2 if batching.last == "weigh" else np.ones(len(n))
    neighbours, error = averaged(np.stack([one.neighbours for one in measured]), n, epoch)
    large = n > how.neighbours
    chance = float((n[large] * how.neighbours / (n[large] - 1)).sum() / n[large].sum()) if large.any() else np.nan
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
    """Return the mean over minibatches weighted by their images, and its standard error, that of one epoch.

    Minibatches that are too small for a measure, or on which a layer is constant, are NaN and do not count.
    """
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


def facts(found: Found, dataset: str, asked: list[str]) -> Compared:
    """Return small numbers for the report: how uniform each network is, and how the networks differ in it."""
    from kernels.similarity.cka import jackknife, ratio

    networks = list(dict.fromkeys(network for network, _, _ in found.labels))
    rows_of = {name: [at for at, label in enumerate(found.labels) if label[0] == name] for name in networks}
    defined = ~found.cka.constant

    def uniformity(hsic: np.ndarray) -> np.ndarray:
        """Return the mean CKA over pairs of different layers of each network, and the differences between networks."""
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
    numbers = [(plain(v), plain(e)) for v, e in zip(value, error, strict=True)]
    return Compared(
        dataset=dataset,
        networks=asked,
        layers=found.labels,
        uniformity=dict(zip(networks, numbers[: len(networks)], strict=True)),
        difference=[(a, b, *own) for (a, b), own in zip(pairs, numbers[len(networks) :], strict=True)],
        undefined=[found.titles[at] for at in np.flatnonzero(found.cka.constant)],
    )


def plain(value: float) -> float | None:
    """Return a number as JSON has it: None for NaN."""
    return None if np.isnan(value) else float(value)


def arrays(found: Found) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Return the arrays of cka.zarr."""
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


def rows(found: Found) -> list[list[Any]]:
    """Return a row for each pair of layers, the first not after the second."""
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
