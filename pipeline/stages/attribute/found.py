"""What the stage `attribute` found, as pages and later stages read it: verified maps, and numbers by image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.base import UNTRAINED
from pipeline.errors import MicrotomeError
from pipeline.report.experiment import Experiment, file_names
from pipeline.stages.attribute.options import METHODS, OPTIONS, OfProbability, Segmented
from pipeline.stages.attribute.results import ROUNDING, Attributed, Explained, group_of, store_of, unit_relevance
from pipeline.stages.attribute.segments import name_of
from pipeline.storage.manifest import Manifest, latest
from pipeline.storage.store import StoreRef

MAIN = "attribution"
"""The array of the maps that a method is about."""
EXTRA = {"relevance": "positive contributions", "counter_relevance": "negative contributions"}
"""Arrays of further maps, and what they are for readers."""
PICKED = 8
"""Images that SP-LIME picks."""
SHOWN = 1000
"""Images of an experiment that its page shows."""


@dataclass(frozen=True)
class MethodMaps:
    """The maps of one method: those that it is about, or others that it keeps beside them.

    Attributes
    ----------
    facts : what the manifest says: name, method, law, layer, note, size (y, x).
    store : its store, with the files that the manifest lists.
    tolerance : of the residual of its law.
    target : (image, rank) class that is explained, -1 where none is.
    residual : (image, rank) of the law, NaN where it has none.
    array : of the store that holds the maps.
    relevance : the stores of the relevance of units, by layer.
    segments : that of the segments of images, for methods that part images into such.
    """

    facts: Explained
    store: StoreRef
    tolerance: float
    target: np.ndarray
    residual: np.ndarray
    array: str = MAIN
    relevance: Mapping[str, StoreRef] = field(default_factory=dict)
    segments: StoreRef | None = None

    @property
    def name(self) -> str:
        return self.facts.name if self.array == MAIN else f"{self.facts.name}.{self.array}"

    @property
    def title(self) -> str:
        """Its method's name for readers."""
        title = METHODS[self.facts.method].title
        return title if self.array == MAIN else f"{title}, {EXTRA[self.array]}"

    @property
    def image_sized(self) -> bool:
        """Whether its maps lie on the image's pixels."""
        return METHODS[self.facts.method].maps == "image"

    @property
    def signed(self) -> bool:
        return METHODS[self.facts.method].signed

    @property
    def explained(self) -> np.ndarray:
        """(image, rank) bool: where there is a map."""
        return self.target >= 0

    @property
    def known(self) -> np.ndarray:
        """The residuals that are known, (explanation,)."""
        return self.residual[self.explained & ~np.isnan(self.residual)]

    @property
    def beyond(self) -> np.ndarray:
        """(image, rank) bool: where the law is missed by more than the tolerance."""
        return self.explained & (self.residual > self.tolerance)

    def fact(self, name: str) -> np.ndarray | None:
        """Return a further number of each explanation, (explanation,), such as `bias`; None for methods without it."""
        known = self.array == MAIN and name in METHODS[self.facts.method].facts
        return _by_rank(self.store, name)[self.explained] if known else None

    def maps(self, slots: Sequence[int]) -> np.ndarray:
        """Return the maps of images (image, rank, y, x) float32; these may lie in one shard only, to read little."""
        return read_maps(self.store, slots, self.array)


@dataclass(frozen=True)
class Attributions:
    """One experiment on a network and a data set.

    Attributes
    ----------
    methods : in the order of the configuration.
    settings : the attributes that all stores share: split, targets, score, image_size, classes, ...
    ids : (image,) of all slots.
    target : (image, rank) class that is explained, -1 where none is. score, baseline_score : the same, NaN where there
        is none.
    """

    dataset: str
    network: str
    experiment: str
    methods: list[MethodMaps]
    settings: Mapping[str, Any]
    ids: np.ndarray
    target: np.ndarray
    score: np.ndarray
    baseline_score: np.ndarray

    @property
    def kind(self) -> str:
        """What is explained: `predicted`, `label`, `class`, `top` or `contrast`."""
        targets = self.settings["targets"]
        return targets if isinstance(targets, str) else next(iter(targets))

    @property
    def ranks(self) -> int:
        return self.target.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(y, x) of the images."""
        height, width = self.settings["image_size"]
        return height, width

    @cached_property
    def slots(self) -> list[int]:
        """The images that are explained, by a hash of their ids: the first of them are a random sample."""
        return sorted(np.flatnonzero((self.target >= 0).any(1)).tolist(), key=lambda slot: _hash(str(self.ids[slot])))

    @cached_property
    def picked(self) -> list[int]:
        """The images that SP-LIME picks: together they show what LIME finds important. None without LIME."""
        method = next((each for each in self.methods if each.facts.method == "lime" and each.segments), None)
        if method is None or method.segments is None or not method.segments.files:
            return []
        from kernels.attribution.lime import by_feature, pick

        values = _column(method.store, "value")[self.slots]
        values = values if values.ndim == 2 else values[:, 0]
        features = _column(method.segments, "feature")[self.slots]
        order = pick(by_feature(values, features, int(features.max(initial=0)) + 1), PICKED)
        return [self.slots[at] for at in order]

    @cached_property
    def shown(self) -> list[int]:
        """The images that a page shows, in its order: those that SP-LIME picks, then a random sample."""
        return list(dict.fromkeys([*self.picked, *self.slots]))[:SHOWN]

    @property
    def classes(self) -> list[str]:
        """Names of the classes that the images are labelled with."""
        return [str(name) for name in self.settings["classes"]]

    @property
    def named(self) -> bool:
        """Whether the network's classes are those that the images are labelled with."""
        count = len(self.classes)
        return 0 <= int(self.target.max(initial=-1)) < count == (self.settings.get("logits") or count)

    def class_name(self, index: int) -> str:
        """Return the name of a class of the network, its number if that is all that is known."""
        return self.classes[index] if self.named and 0 <= index < len(self.classes) else f"class {index}"

    def titles(self) -> list[str]:
        """Return the name of each method for readers, with its name in the configuration if two are alike."""
        plain = [method.title for method in self.methods]
        return [
            f"{title} ({method.name})" if plain.count(title) > 1 else title
            for title, method in zip(plain, self.methods, strict=True)
        ]

    def right(self, labels: np.ndarray) -> np.ndarray:
        """Return (image,) int: 1 where the network predicts the label, 0 where another class, -1 if that is unknown."""
        known = (labels >= 0) & (self.target[:, 0] >= 0) & (self.kind in ("predicted", "top") and self.named)
        return np.where(known, self.target[:, 0] == labels, -1)


def read_attributions(results: Path, dataset: str, network: str, experiment: str, id: str = "") -> Attributions:
    """Read an experiment without its maps, verified.

    Parameters
    ----------
    id : of the step; default: the one that finished last.

    Raises
    ------
    MicrotomeError
        If there is none that finished, or a store is not what the stage writes.
    """
    folder = results / dataset / network / "attributions" / experiment
    try:
        done = folder / "done"
        manifest = Manifest.read(done / f"attribute.{id}.json") if id else latest(done, "attribute")
        if manifest is None:
            raise FileNotFoundError(f"no manifest in {done}")
        methods = [
            each for facts in Attributed.read(manifest.result).methods for each in _methods(folder, manifest, facts)
        ]
        first = next((each for each in methods if not _of_probability(each)), methods[0]).store
        score = _by_rank(first, "score")
        baselines = [
            _by_rank(method.store, "baseline_score")
            for method in sorted(methods, key=_of_probability)
            if METHODS[method.facts.method].baseline
        ]
        return Attributions(
            dataset,
            network,
            experiment,
            methods,
            dict(first.open().attrs),
            _column(first, "image_id"),
            methods[0].target,
            score,
            baselines[0] if baselines else np.full_like(score, np.nan),
        )
    except (FileNotFoundError, KeyError, IndexError, ValueError) as error:
        raise MicrotomeError(
            f"{folder} is not what the stage `attribute` writes ({error}): run `make verify`"
        ) from error


def _of_probability(method: MethodMaps) -> bool:
    """Return whether a method may explain the probability where the others explain the logit."""
    return issubclass(OPTIONS[method.facts.method], OfProbability)


def _methods(folder: Path, manifest: Manifest, facts: Explained) -> Iterator[MethodMaps]:
    """Yield the maps that a method is about, and those that it keeps beside them, which have no law."""
    store = StoreRef.of_manifest(folder, store_of(folder, facts.name).name, manifest.files)
    settings = store.open().attrs["settings"]
    tolerance = float(settings["tolerance"]) if METHODS[facts.method].own_tolerance else ROUNDING
    target, residual = _by_rank(store, "target"), _by_rank(store, "residual")
    relevance = {
        layer: StoreRef.of_manifest(
            folder, f"{store_of(folder, unit_relevance(facts.name)).name}/{group_of(layer)}", manifest.files
        )
        for layer in facts.units
    }
    options = OPTIONS[facts.method].model_validate(settings)
    parts = None
    if isinstance(options, Segmented):
        parts = StoreRef.of_manifest(folder, store_of(folder, name_of(options.segments)).name, manifest.files)
    main = MethodMaps(facts, store, tolerance, target, residual, relevance=relevance, segments=parts)
    yield main
    plain = facts.model_copy(update={"law": ""})
    for array in EXTRA:
        if f"{array}/zarr.json" in store.files:
            yield replace(main, facts=plain, residual=np.full_like(residual, np.nan), array=array, relevance={})


def _column(store: StoreRef, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
    """Return the numbers of the slots from `first` to `last`; shards without an explained image are not written."""
    array = store.open()[name]
    stop = array.shape[0] if last is None else last + 1
    values = np.full((stop - first, *array.shape[1:]), array.fill_value, array.dtype)
    for shard in store.shards(name):
        begin, end = max(shard * array.chunks[0], first), min((shard + 1) * array.chunks[0], stop)
        if begin < end:
            values[begin - first : end - first] = array[begin:end]
    return values


def _by_rank(store: StoreRef, name: str) -> np.ndarray:
    """Return the numbers of images as (image, rank), also where only one class of an image is explained."""
    values = _column(store, name)
    return values if values.ndim == 2 else values[:, None]


def _hash(image_id: str) -> bytes:
    return hashlib.sha256(image_id.encode("utf-8", "surrogateescape")).digest()


def read_maps(store: StoreRef, slots: Sequence[int], array: str = MAIN) -> np.ndarray:
    """Return the maps of images (image, rank, y, x) float32, NaN where there is none."""
    first = min(slots)
    found = _column(store, array, first, max(slots))[np.asarray(slots) - first]
    return found if found.ndim == 4 else found[:, None]


@dataclass(frozen=True)
class UnitRelevance:
    """The relevance of the units of a layer, (image[, rank], unit): how much they speak for what is explained.

    `title` is the method's, for readers.
    """

    title: str
    store: StoreRef

    def most_relevant(self, units: Sequence[int], shown: np.ndarray, count: int) -> list[list[int]]:
        """Return the images with the highest relevance of each unit, if positive, of those that may be `shown`.

        Of several classes of an image, the first counts. Ties by image number.
        """
        columns = np.asarray(units)
        values = np.full((0, len(columns)), -np.inf, np.float32)
        images = np.zeros((0, len(columns)), np.int64)
        array = self.store.open()["relevance"]
        for shard in self.store.shards("relevance"):
            start = shard * array.chunks[0]
            block = np.asarray(array[start : start + array.chunks[0]])
            block = (block if block.ndim == 2 else block[:, 0])[:, columns]
            rows = np.arange(start, start + len(block))
            rows = rows[(rows < len(shown))]
            rows = rows[shown[rows]]
            values = np.concatenate([values, np.nan_to_num(block[rows - start], nan=-np.inf)])
            images = np.concatenate([images, np.broadcast_to(rows[:, None], (len(rows), len(columns)))])
            order = np.argsort(-values, axis=0, kind="stable")[:count]
            values, images = np.take_along_axis(values, order, 0), np.take_along_axis(images, order, 0)
        return [images[values[:, at] > 0, at].tolist() for at in range(len(columns))]


# In a report ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """An experiment and, if there is one, the same on the untrained network."""

    trained: Attributions
    untrained: Attributions | None


def explanations(experiment: Experiment) -> dict[tuple[str, str], list[Explanation]]:
    """Return the experiments of each data set and network, without untrained controls that stand beside a network."""
    return experiment.once(_explanations)


def _explanations(experiment: Experiment) -> dict[tuple[str, str], list[Explanation]]:
    made = {(str(one.dataset), str(one.network), str(one.experiment)): one for one in experiment.of_stage("attribute")}
    read = {key: read_attributions(experiment.results, *key, one.id) for key, one in made.items()}
    found: dict[tuple[str, str], list[Explanation]] = {}
    for (dataset, network, name), trained in read.items():
        if (dataset, network.removesuffix(UNTRAINED), name) not in read or not network.endswith(UNTRAINED):
            untrained = read.get((dataset, network + UNTRAINED, name))
            found.setdefault((dataset, network), []).append(Explanation(trained, untrained))
    return found


def page_of(experiment: Experiment, dataset: str, network: str) -> str:
    """Return the file of the page that explains a network's images; empty if there is none."""
    names = file_names(explanations(experiment))
    return f"attribution-{names[dataset, network]}.html" if (dataset, network) in names else ""


def explained_images(experiment: Experiment, dataset: str, network: str) -> set[int]:
    """Return the images whose explanation is on that page."""
    found = explanations(experiment).get((dataset, network), [])
    return {slot for one in found for slot in one.trained.shown}


def unit_relevance_of(experiment: Experiment, dataset: str, network: str) -> dict[str, UnitRelevance]:
    """Return the relevance of the units of a network's layers, by layer: that of the first method that has it."""
    found: dict[str, UnitRelevance] = {}
    for one in explanations(experiment).get((dataset, network), []):
        for title, method in zip(one.trained.titles(), one.trained.methods, strict=True):
            for layer, store in method.relevance.items():
                found.setdefault(layer, UnitRelevance(title, store))
    return found
