"""What workers do for the stage `probes`: keep the features of the images of a shard, fit and judge the probes of a
layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.networks import Network
from pipeline.networks.forward import HALF_MAX, Model, forward_in_batches, loaded, refuse_non_finite, scale_for
from pipeline.networks.layer import LayerInfo
from pipeline.networks.prepare import Prepared, prepare, survey_of
from pipeline.stages.probes.division import PARTS
from pipeline.storage.store import StoreRef, write
from pipeline.workers.devices import device
from pipeline.workers.resumable import Done

if TYPE_CHECKING:
    import torch

STORE = "probes"  # as tasks name it
FULL = "full"  # in place of a number of shots: all images to fit on
AT_ONCE = 256 << 20  # bytes of features that a task holds, if one position takes no more
ROWS = 2048  # images whose sums are made at once
QUANTILE = 0.975  # of 95 % intervals


@dataclass(frozen=True)
class Vector:
    """One vector of features of an image: the class token, the mean over the positions, or a single position."""

    features: str
    y: int | None = None
    x: int | None = None

    @property
    def name(self) -> str:
        return self.features if self.y is None else f"{self.features} {self.y},{self.x}"


@dataclass(frozen=True)
class ProbedLayer:
    """A layer as tasks name it.

    Attributes
    ----------
    id, scale : of its activations.
    features : where those of its images are kept. vectors : what is kept of an image.
    """

    info: LayerInfo
    id: str
    scale: float
    features: Path
    vectors: tuple[Vector, ...]

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def arrays(self) -> tuple[str, ...]:
        """The stored arrays that the features are read from."""
        of = {"pooled": "mean", "class_token": "special", "spatial": "activation"}
        return tuple(dict.fromkeys(of[vector.features] for vector in self.vectors))


@dataclass(frozen=True)
class Task:
    """All probes of one kind of features of a layer.

    Attributes
    ----------
    store, row, column : where the result goes.
    features : of all images. ranges : first image of each shard and one past its last.
    part, label : (image), as in `Division`.
    picks : (draw, class, shot). shots : of `all_shots` those that are fitted.
    """

    store: Path
    row: int
    column: int
    kind: str
    layer: ProbedLayer
    features: StoreRef = field(repr=False)
    ranges: Mapping[int, tuple[int, int]] = field(repr=False)
    part: np.ndarray = field(repr=False)
    label: np.ndarray = field(repr=False)
    picks: np.ndarray = field(repr=False)
    shots: tuple[int, ...]
    all_shots: tuple[int, ...]
    grid: int
    penalties: tuple[float, ...]
    classes: int

    @property
    def vectors(self) -> list[int]:
        """The places of its vectors in the store."""
        return [at for at, vector in enumerate(self.layer.vectors) if vector.features == self.kind]

    @property
    def key(self) -> str:
        return f"{self.row}.{self.column}"

    def kept(self, counts: Mapping[str, int]) -> int:
        """Return how many images' features a task holds, at most."""
        units = self.layer.info.shape[0]
        fitted = min(counts["fit"], self.picks.size + units)
        return counts["choose"] + counts["test"] + fitted

    def memory_need(self, counts: Mapping[str, int]) -> int:
        """Return the bytes of a task: features, sums and their eigenvectors, and the weights of all penalties."""
        units = self.layer.info.shape[0]
        one = 4 * units * self.kept(counts)
        held = max(one, min(AT_ONCE, one * max(1, len(self.vectors))))
        sums = 8 * units * (6 * units + 2 * self.classes) * max(1, held // max(one, 1))
        weights = 8 * len(self.penalties) * self.classes * units
        return 2 * held + sums + weights + 16 * ROWS * (units + self.classes)


def vectors_of(info: LayerInfo, features: Sequence[str], grid: int) -> tuple[Vector, ...]:
    """Return the vectors that a layer has of some features; single positions in rows, evenly spread over its map."""
    found = []
    for kind in features:
        if kind == "class_token" and info.special:
            found.append(Vector(kind))
        if kind == "pooled":
            found.append(Vector(kind))
        if kind == "spatial" and info.spatial:
            rows, columns = (spread(length, grid) for length in info.shape[1:])
            found += [Vector(kind, y, x) for y in rows for x in columns]
    return tuple(found)


def spread(length: int, count: int) -> list[int]:
    """Return the middles of `count` equal parts of a length; of a shorter length, all of it."""
    count = min(count, length)
    return [(2 * at + 1) * length // (2 * count) for at in range(count)]


def prepare_layers(model: Model, size: tuple[int, int], names: Sequence[str]) -> Prepared:
    """Resolve the layers of a network."""
    network = loaded(model)
    return prepare(network, model, survey_of(network, model, size), list(names))


def forward_need(prepared: Prepared, spec: Network, images: int, size: tuple[int, int]) -> int:
    """Return the bytes of a task that makes features.

    They are the weights as loaded and as used, a forward, and a layer as stored.
    """
    pixels = 3 * size[0] * size[1]
    forward = 4 * spec.numerics.micro_batch * (pixels + 4 * prepared.largest)
    stored = 2 * images * max(math.prod(info.shape) for info in prepared.layers)
    return 12 * prepared.parameters + forward + images * pixels + 2 * stored


# The features of a shard ----------------------------------------------------------------------------------------------


def gather(
    model: Model,
    images: StoreRef,
    shard: str,
    bounds: tuple[int, int],
    layers: Sequence[tuple[ProbedLayer, StoreRef | None]],
) -> Done:
    """Keep the features of one shard: read where its activations are stored (given with the layer), else computed.

    Both ways give the same bits: a computed value is rounded as stored ones are.
    """
    start, stop = bounds
    found = {layer.id: read(layer, stored, start, stop) for layer, stored in layers if stored is not None}
    lacking = [layer for layer, stored in layers if stored is None]
    if lacking:
        found |= computed(model, images, bounds, lacking)
    return Done(
        shard,
        {layer.id: write(layer.features, {"feature": ((start, 0, 0), found.pop(layer.id))}) for layer, _ in layers},
    )


def read(layer: ProbedLayer, activations: StoreRef, start: int, stop: int) -> np.ndarray:
    """Read (image, vector, unit) float32 of a shard, from what is stored of a layer."""
    reader = activations.open()
    arrays = {name: np.asarray(reader[name][start:stop]) for name in layer.arrays}
    found = np.empty((stop - start, len(layer.vectors), layer.info.shape[0]), np.float32)
    for at, vector in enumerate(layer.vectors):
        if vector.features == "pooled":
            found[:, at] = arrays["mean"]
        elif vector.features == "class_token":
            found[:, at] = arrays["special"][:, 0].astype(np.float32) * layer.scale
        else:
            found[:, at] = arrays["activation"][:, :, vector.y, vector.x].astype(np.float32) * layer.scale
    return found


def computed(
    model: Model, images: StoreRef, bounds: tuple[int, int], layers: Sequence[ProbedLayer]
) -> dict[str, np.ndarray]:
    """Compute by layer id (image, vector, unit) float32 of a shard, in a forward pass that keeps nothing else."""
    import torch

    from pipeline.networks.layers import to_maps

    start, stop = bounds
    pixels = torch.from_numpy(images.open()["image"][start:stop])
    by_name = {layer.name: layer for layer in layers}
    found = {
        layer.name: torch.full((stop - start, len(layer.vectors), layer.info.shape[0]), math.nan) for layer in layers
    }

    def take(name: str, at: int, output: torch.Tensor) -> None:
        layer = by_name[name]
        maps, special = to_maps(output.float(), layer.info)
        for place, vector in enumerate(layer.vectors):
            if vector.features == "pooled":
                values = maps.mean((2, 3))
            elif vector.features == "class_token":
                assert special is not None
                values = special[:, 0]
            else:
                values = maps[:, :, vector.y, vector.x]
            found[name][at : at + len(output), place] = values.cpu()

    forward_in_batches(model, pixels, list(by_name), take)
    rounded = {}
    for name, values in found.items():
        layer = by_name[name]
        # Of what is kept: a mean tells of every position, and `isfinite` on all of them takes as long as a convolution.
        refuse_non_finite(values, name, start, values.transpose(1, 2))
        halves = [at for at, vector in enumerate(layer.vectors) if vector.features != "pooled"]
        if halves:
            largest = float(values[:, halves].abs().amax())
            scale = layer.scale if largest <= HALF_MAX * layer.scale else scale_for(largest)
            values[:, halves] = (values[:, halves] / scale).half().float() * scale
        rounded[layer.id] = values.numpy()
    return rounded


# The probes of a layer ------------------------------------------------------------------------------------------------


def probe(task: Task) -> Done:
    """Fit the probes of one kind of features of a layer, judge them, and write what came out."""
    found = Outcome.empty(task)
    vectors = task.vectors
    if vectors:
        held = (
            4 * task.layer.info.shape[0] * task.kept({p: int((task.part == at).sum()) for at, p in enumerate(PARTS, 1)})
        )
        step = max(1, min(len(vectors), AT_ONCE // max(1, held)))
        right = np.zeros(int((task.part == PARTS.index("test") + 1).sum()))
        for at in range(0, len(vectors), step):
            for position, x in enumerate(Features.read(task, vectors[at : at + step]).split(), start=at):
                right += probe_vector(task, found, position, *x)
        found.intervals(right / len(vectors))
    return Done(task.key, {STORE: write(task.store, found.blocks(task))})


@dataclass
class Features:
    """What a pass over the features keeps: sums of the images to fit on, and the images that are needed as they are.

    Attributes
    ----------
    moments : of each vector; None where there are fewer images than features: they are then all in `picked`.
    slots : by part, and of the picked images; `values` the same, (image, vector, unit) float32.
    """

    task: Task
    moments: list[Any]
    slots: dict[str, np.ndarray]
    values: dict[str, np.ndarray]

    @classmethod
    def read(cls, task: Task, vectors: Sequence[int]) -> Features:
        import torch

        from kernels.ridge import Moments

        units = task.layer.info.shape[0]
        slots = {name: np.flatnonzero(task.part == at) for at, name in enumerate(PARTS, start=1)}
        by_sums = len(slots["fit"]) >= units
        slots["picked"] = np.unique(task.picks[task.picks >= 0]) if by_sums else slots["fit"]
        values = {
            name: np.empty((len(own), len(vectors), units), np.float32) for name, own in slots.items() if name != "fit"
        }
        moments = [Moments.zeros(units, task.classes, device()) for _ in vectors] if by_sums else []
        array = task.features.open()["feature"]
        waiting: list[np.ndarray] = []
        labels: list[np.ndarray] = []

        def add() -> None:
            x, label = np.concatenate(waiting), torch.from_numpy(np.concatenate(labels)).to(device())
            for at, own in enumerate(moments):
                own.update(torch.from_numpy(np.ascontiguousarray(x[:, at])).to(device()), label)
            waiting.clear()
            labels.clear()

        for _, (start, stop) in sorted(task.ranges.items()):
            block = array[start:stop, vectors[0] : vectors[-1] + 1]
            for name, into in values.items():
                own = slice(*np.searchsorted(slots[name], [start, stop]))
                into[own] = block[slots[name][own] - start]
            if by_sums:
                fitted = slots["fit"][slice(*np.searchsorted(slots["fit"], [start, stop]))]
                waiting.append(block[fitted - start])
                labels.append(task.label[fitted].astype(np.int64))
                if sum(map(len, waiting)) >= ROWS:
                    add()
        if waiting:
            add()
        return cls(task, moments, slots, values)

    def split(self) -> Iterator[tuple[Any, dict[str, Any], dict[str, Any], np.ndarray]]:
        """Yield of each vector its sums, tensors (image, unit) and labels by part, and the slots of those picked."""
        import torch

        labels = {
            name: torch.from_numpy(self.task.label[self.slots[name]].astype(np.int64)).to(device())
            for name in self.values
        }
        for at in range(next(iter(self.values.values())).shape[1]):
            x = {
                name: torch.from_numpy(np.ascontiguousarray(values[:, at])).to(device())
                for name, values in self.values.items()
            }
            yield self.moments[at] if self.moments else None, x, labels, self.slots["picked"]


@dataclass
class Outcome:
    """What comes out of the probes of one kind of features of a layer: (shots, draw, position), and (shots)."""

    single: np.ndarray
    penalty: np.ndarray
    accuracy: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def empty(cls, task: Task) -> Outcome:
        shots = len(task.all_shots) + 1
        shape = (shots, len(task.picks), task.grid**2)
        return cls(*(np.full(shape, np.nan) for _ in range(2)), *(np.full(shots, np.nan) for _ in range(3)))

    def intervals(self, right: np.ndarray) -> None:
        """Average, with 95 % intervals: over the draws by Student's t; of all images, over the images that judge.

        `right` is the share of the positions at which each of these is recognised, by the probes of all images.
        """
        from scipy.special import ndtri, stdtrit

        from kernels.ridge import wilson

        for at, own in enumerate(self.single[:-1]):
            draws = np.nanmean(own, 1) if np.isfinite(own).any() else np.array([np.nan])
            self._put(at, draws, stdtrit(len(draws) - 1, QUANTILE) if len(draws) > 1 else np.nan)
        if set(np.unique(right)) <= {0.0, 1.0}:
            self.accuracy[-1] = right.mean()
            self.low[-1], self.high[-1] = wilson(float(right.sum()), len(right), float(ndtri(QUANTILE)))
        else:
            self._put(-1, right, float(ndtri(QUANTILE)))

    def _put(self, at: int, values: np.ndarray, quantile: float) -> None:
        self.accuracy[at] = values.mean()
        if len(values) > 1:
            half = quantile * values.std(ddof=1) / math.sqrt(len(values))
            self.low[at] = max(0.0, self.accuracy[at] - half)
            self.high[at] = min(1.0, self.accuracy[at] + half)

    def blocks(self, task: Task) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
        at = (task.row, task.column)
        values = {"probe_accuracy": self.single, "penalty": self.penalty}
        values |= {name: getattr(self, name) for name in ("accuracy", "low", "high")}
        return {name: ((*at, *[0] * own.ndim), own[None, None]) for name, own in values.items()}


def probe_vector(
    task: Task,
    found: Outcome,
    position: int,
    moments: Any,
    x: Mapping[str, torch.Tensor],
    label: Mapping[str, torch.Tensor],
    picked: np.ndarray,
) -> np.ndarray:
    """Fit and judge all probes of one vector: few-shot ones of every draw, and that of all images.

    Returns of the last (image) float64, 1 where an image that judges is recognised.
    """
    import torch

    from kernels.ridge import Ridge

    def judge(ridge: Ridge, shots: int, draw: int) -> np.ndarray:
        penalty = ridge.choose(x["choose"], label["choose"], task.penalties)
        right = ridge.right(x["test"], label["test"], [penalty])[0].double().cpu().numpy()
        found.single[shots, draw, position], found.penalty[shots, draw, position] = right.mean(), penalty
        return right

    for shots in task.shots:
        for draw, own in enumerate(task.picks[:, :, :shots]):
            rows = torch.from_numpy(np.searchsorted(picked, own[own >= 0])).to(device())
            ridge = Ridge.of_images(x["picked"][rows], label["picked"][rows], task.classes)
            judge(ridge, task.all_shots.index(shots), draw)
    whole = (
        Ridge.of_moments(moments)
        if moments is not None
        else Ridge.of_images(x["picked"], label["picked"], task.classes)
    )
    return judge(whole, len(task.all_shots), 0)
