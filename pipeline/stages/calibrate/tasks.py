"""What workers do for the stage `calibrate`: read logits, fit methods on some images, and judge them on the others."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kernels.calibration.methods import NAMES, Method, facts, fit, judge, uncalibrated
from kernels.calibration.reliability import BINS, BLOCK, Predictions, Reliability, ece_equal_mass
from kernels.calibration.uncertainty import AT_ONCE, ClasswiseNoise, Noise, noise
from pipeline.errors import MicrotomeError
from pipeline.stages.calibrate.scores import read_scores
from pipeline.stages.calibrate.settings import Fitting
from pipeline.storage.store import StoreRef, write
from pipeline.workers.resumable import Done

STORE = "calibration"  # as tasks name it
ERRORS = ("ece", "ece_equal_mass", "ece_debiased", "classwise_ece")
"""Those that have an interval and a null."""
MEASURES = (
    "accuracy", "mean_confidence", "ece", "ece_equal_mass", "ece_debiased", "mce", "classwise_ece", "nll", "brier",
    "floored", "temperature", "penalty", "converged",
    *(f"{error}_{end}" for error in ERRORS
      for end in ("low", "high", "null", "null_high")),
)  # fmt: skip
"""What is known of a method on a split; `temperature` and `penalty` of the methods that have one."""
MATRIX_CLASSES = 100
"""With more, a matrix is fitted only where it is asked for: it takes hours, and has more numbers than images."""
DRAWS = 1000
"""For the interval and null of the network as it is, over all images."""
DRAWS_OF_CLASSES = 200
"""For those of its classwise error, which take more time."""
DRAWS_OF_SPLIT = 100
"""For those of a method on a split, of which tables have means."""


@dataclass(frozen=True)
class Scores:
    """The logits of the images that count, as tasks name them.

    Attributes
    ----------
    id : of all else, so that a worker reads them once.
    logits : where they are.
    shards : {first image: one past the last} of the shards that hold them.
    rows, label, key : (image), where each is in the store, its class, and a number that stands for its id.
    """

    id: str
    logits: StoreRef = field(compare=False)
    shards: Mapping[int, int] = field(compare=False)
    classes: int
    rows: np.ndarray = field(compare=False)
    label: np.ndarray = field(compare=False)
    key: np.ndarray = field(compare=False)


def keys(image_ids: Sequence[str]) -> np.ndarray:
    """Return (image) uint64, from the ids: whichever images come or go, a split puts the others where they were."""
    digests = (hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest() for name in image_ids)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def in_two(key: np.ndarray, fit: int, split: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the images at random: those to fit on, `fit` of them, and those to judge on.

    The split is the same for every network on these images, so that methods and networks are compared in pairs.
    """
    # splitmix64 (Steele, Lea and Flood, OOPSLA 2014): well mixed for every split from one number an image.
    mixed = key + np.uint64(0x9E3779B97F4A7C15 * (split + 1) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order = np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")
    return np.sort(order[:fit]), np.sort(order[fit:])


def chosen(methods: Sequence[str] | None, classes: int) -> list[str]:
    """Return the methods to fit, in their order; for None those that make sense for so many classes."""
    if methods is None:
        return [name for name in NAMES[1:] if classes <= MATRIX_CLASSES or not name.startswith("matrix")]
    return [name for name in NAMES[1:] if name in methods]


def fitted_on(share: float, images: int) -> int:
    """Return how many of some images methods are fitted on; one at least is left to judge them."""
    return max(0, min(images - 1, round(share * images)))


def memory_need(images: int, classes: int, methods: Sequence[str]) -> int:
    """Return the bytes of a task.

    They are the logits and a copy of both parts (of probabilities the same beside their logarithms), maps of BBQ, what
    chance does, and the search of a matrix.
    """
    matrix = any(name.startswith("matrix") for name in methods)
    search = 2 * 20 + 10  # vectors that L-BFGS keeps
    of_noise = 8 * (4 * AT_ONCE + 6 * BINS * images + 6 * DRAWS_OF_CLASSES * BINS * classes)
    return (
        16 * images * classes
        + 64 * BLOCK
        + 8 * 40 * images
        + of_noise
        + (8 * search * classes * (classes + 1) if matrix else 0)
    )


@functools.lru_cache(maxsize=1)
def predictions_of(scores: Scores) -> tuple[Predictions, list[str]]:
    """Return what the network says of (image, class), verified, and remarks on it; a worker reads it once."""
    reader = scores.logits.open()["logits"]
    found = np.empty((len(scores.rows), reader.shape[1]), np.float32)
    for start, stop in scores.shards.items():
        at = slice(*np.searchsorted(scores.rows, [start, stop]))
        found[at] = reader[start:stop][scores.rows[at] - start]
    try:
        said, remarks = read_scores(found)
    except ValueError as error:
        raise MicrotomeError(f"{scores.logits.path}: {error}") from None
    return Predictions(said.logits.astype(np.float32, copy=False), said.given), remarks


@dataclass
class Judged:
    """What is known of some images after a method: sums, (image) confidence and whether it is right, and what chance
    does to the classwise error."""

    sums: Reliability
    confidence: np.ndarray
    right: np.ndarray
    classwise: ClasswiseNoise

    @staticmethod
    def of(
        method: Method, said: np.ndarray | Predictions, label: np.ndarray, bins: int, draws: int, seed: int
    ) -> Judged:
        classwise = ClasswiseNoise.zeros(said.shape[1], draws, bins)
        return Judged(*judge(method, said, label, bins, (classwise, seed)), classwise)

    @staticmethod
    def merged(parts: Sequence[Judged]) -> Judged:
        """Merge the parts, in the order of the images."""
        classes, bins = parts[0].sums.class_gap.shape
        found = Judged(
            Reliability.zeros(classes, bins),
            np.concatenate([each.confidence for each in parts]),
            np.concatenate([each.right for each in parts]),
            ClasswiseNoise.zeros(classes, len(parts[0].classwise.weight), bins),
        )
        for each in parts:
            found.sums.merge(each.sums)
            found.classwise.merge(each.classwise)
        return found

    def measures(self, draws: int, seed: int) -> dict[str, float]:
        """Return every measure, by name."""
        sums, classes = self.sums, len(self.sums.class_gap)
        return of_confidences(sums, self.confidence, self.right, draws, seed) | {
            "classwise_ece": sums.classwise_ece,
            "nll": sums.nll / sums.images,
            "brier": sums.brier / sums.images,
            "floored": sums.floored / sums.images,
            **_band("classwise_ece", self.classwise.noise(classes)),
        }


def of_confidences(
    sums: Reliability, confidence: np.ndarray, right: np.ndarray, draws: int, seed: int
) -> dict[str, float]:
    """Return the measures that need no more than (image) the confidence and whether the prediction is right."""
    bins = len(sums.count)
    found = {name: getattr(sums, name) for name in ("accuracy", "mean_confidence", "ece", "ece_debiased", "mce")}
    found["ece_equal_mass"] = ece_equal_mass(confidence, right, bins)
    for name, band in noise(confidence, right, draws, seed, bins).items():
        found |= _band(name, band)
    return found


def _band(name: str, band: Noise) -> dict[str, float]:
    return {
        f"{name}_low": band.low, f"{name}_high": band.high,
        f"{name}_null": band.null_mean, f"{name}_null_high": band.null_high,
    }  # fmt: skip


def measure(scores: Scores, at: int, part: slice, bins: int) -> tuple[int, tuple[Judged, list[str]]]:
    """Judge the network as it is, on some of the images; also return the remarks on its scores."""
    said, remarks = predictions_of(scores)
    judged = Judged.of(uncalibrated, said[part], scores.label[part], bins, DRAWS_OF_CLASSES, seed=at)
    return at, (judged, remarks)


def one_split(scores: Scores, split: int, images: int, methods: Sequence[str], settings: Fitting, store: Path) -> Done:
    """Fit and judge every method on a split, and write what came out."""
    said, _ = predictions_of(scores)
    to_fit, to_judge = in_two(scores.key, images, split)
    found = evaluate(
        said[to_fit],
        scores.label[to_fit],
        said[to_judge],
        scores.label[to_judge],
        methods,
        settings.bins,
        settings.penalty,
        seed=split,
    )
    files = write(store, {name: ((split, 0, 0), values[None]) for name, values in found.items()})
    return Done(str(split), {STORE: files})


def evaluate(
    fit_said: np.ndarray | Predictions,
    fit_label: np.ndarray,
    said: np.ndarray | Predictions,
    label: np.ndarray,
    methods: Sequence[str],
    bins: int,
    penalty: float | None,
    seed: int,
) -> dict[str, np.ndarray]:
    """Fit every method on what a network says of some images, and judge it on others.

    `seed` is that of what chance does. Returns `score` (method, measure), and `count`, `correct` and `confidence`
    (method, bin).
    """
    found: dict[str, list] = {"score": [], "count": [], "correct": [], "confidence": []}
    for name in methods:
        method = fit(name, fit_said, fit_label, bins, penalty)
        judged = Judged.of(method, said, label, bins, DRAWS_OF_SPLIT, seed)
        known = judged.measures(DRAWS_OF_SPLIT, seed) | facts(method)
        found["score"].append([float(known.get(measure, np.nan)) for measure in MEASURES])
        for of_bins in ("count", "correct", "confidence"):
            found[of_bins].append(getattr(judged.sums, of_bins))
    return {name: np.array(values) for name, values in found.items()}
