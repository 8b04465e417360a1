"""Compute reliability bins and calibration errors: how far confidences are from accuracies.

Definitions: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), for bins, ECE and MCE; Nguyen and
O'Connor (EMNLP 2015) for bins of equal mass; Kumar et al., "Verified Uncertainty Calibration" (NeurIPS 2019), for the
debiased error; Kull et al. (NeurIPS 2019) for the classwise error. All arithmetic is in float64, whatever the logits'
type: a softmax in float16 has rows that miss 1 by up to 2.8e-3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = 15
FLOOR = 1e-12
"""The NLL counts lower probabilities as this one; it would be infinite if a method gave the label none at all."""
SUM_OFF = 1e-4
"""Probabilities of an image sum to 1 within this; those of float16 and bfloat16 within `SUM_OFF_HALF`."""
SUM_OFF_HALF = 5e-3
BLOCK = 1 << 17
"""Values in one block of rows: 1 MB in float64, so that a pass over many images does not need memory of their size."""


def blocks(rows: int, classes: int) -> Iterator[slice]:
    """Split the rows into consecutive blocks of up to `BLOCK` values.

    The blocks, and therefore all sums, are the same on every machine.
    """
    step = max(1, BLOCK // classes)
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))


def check_labels(labels: NDArray, classes: int, rows: int) -> Ints:
    """Return the labels as int64 if each row has one of 0 ... classes - 1 and not all labels are equal.

    Raises
    ------
    ValueError
        Naming the first row with a wrong label, and that label.
    """
    if classes < 2:
        raise ValueError(f"there is {classes} class: calibration needs at least two")
    if labels.shape != (rows,):
        raise ValueError(
            f"there are {rows} rows of scores and labels of shape {labels.shape}; expected one label per row"
        )
    if not rows:
        raise ValueError("there are no images")
    if labels.dtype.kind not in "biuf":
        raise ValueError(f"labels have type {labels.dtype}; expected class numbers, 0 to {classes - 1}")
    inside = (labels >= 0) & (labels < classes)  # a NaN is not
    whole = np.where(inside, labels, -1).astype(np.int64)
    bad = ~inside | (whole != labels)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"row {row}: label {labels[row]} is not one of the classes 0 to {classes - 1}")
    if (whole == whole[0]).all():
        raise ValueError(f"rows 0 to {rows - 1} all have the label {whole[0]}: calibration needs two classes")
    return whole


def check_logits(logits: NDArray) -> None:
    """Refuse logits (image, class) that are not finite or exceed float32, with a `ValueError` that names the row."""
    if logits.ndim != 2 or logits.dtype.kind != "f" or logits.dtype.itemsize > 8:
        raise ValueError(
            f"logits have shape {logits.shape} and type {logits.dtype}; "
            f"expected (image, class) in float16, float32 or float64"
        )
    largest = float(np.finfo(np.float32).max)
    for rows in blocks(len(logits), max(1, logits.shape[1])):
        good = (np.abs(logits[rows].astype(np.float64)) <= largest).all(1)  # a NaN is not
        if not good.all():
            row = rows.start + int((~good).argmax())
            raise ValueError(f"row {row}: a logit is not finite (NaN, infinity, or beyond float32)")


@dataclass(frozen=True)
class Predictions:
    """What a network says of images: logits, or probabilities with their logarithms.

    A bin is found from the probabilities as they were given: exp(log p) misses p, and with it the edge of a bin.

    Attributes
    ----------
    logits : (image, class).
    given : (image, class), the probabilities in their own precision; None: the network gave logits.
    """

    logits: NDArray
    given: NDArray | None = None

    @classmethod
    def of(cls, scores: NDArray | Predictions) -> Predictions:
        """Return predictions; an array holds logits."""
        return scores if isinstance(scores, cls) else cls(scores)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, rows: slice | NDArray) -> Predictions:
        return Predictions(self.logits[rows], None if self.given is None else self.given[rows])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.logits.shape

    @property
    def probabilities(self) -> NDArray:
        """(image, class), in the precision in which they were given, else float64."""
        return softmax(self.logits) if self.given is None else self.given

    @property
    def predicted(self) -> Ints:
        """(image), the class with the largest score."""
        return (self.logits if self.given is None else self.given).argmax(1)


def sum_off(values: NDArray) -> float:
    """Return how far a row of probabilities of these values' precision may sum from 1.

    Values that float16 or bfloat16 hold exactly come from these, whatever type holds them now.
    """
    single = values.astype(np.float32)
    half = single.astype(np.float16) == values
    brain = ((single.view(np.uint32) & np.uint32(0xFFFF)) == 0) & (single == values)
    return SUM_OFF_HALF if half.all() or brain.all() else SUM_OFF


def sum_to(values: NDArray, total: float = 1.0) -> bool:
    """Return whether all rows (image, class) are at least 0 and sum to a total, as those of probabilities to 1."""
    if values.ndim != 2 or min(values.shape) == 0 or values.dtype.kind not in "biuf":
        return False
    off = 0.0
    for rows in blocks(*values.shape):
        part = values[rows].astype(np.float64)
        if not (part >= 0).all():  # a NaN is not
            return False
        off = max(off, float(np.abs(part.sum(1) / total - 1).max()))
        if off > SUM_OFF_HALF:
            return False
    return off <= SUM_OFF or off <= min(sum_off(values[rows]) for rows in blocks(*values.shape))


def own_precision(probabilities: NDArray) -> NDArray:
    """Return float64 probabilities in float32 if each is a float32 that was widened, or written out and read again."""
    if probabilities.dtype != np.float64:
        return probabilities
    single = probabilities.astype(np.float32)
    for rows in blocks(*probabilities.shape):
        part = probabilities[rows]
        if not (single[rows] == part).all() and not (single[rows].astype(str).astype(np.float64) == part).all():
            return probabilities
    return single


def logits_of(probabilities: NDArray) -> Floats:
    """Compute logits (image, class) from probabilities: their logarithms, in float64.

    A zero counts as the smallest probability above it; where all of those are 1, as `FLOOR`.

    Raises
    ------
    ValueError
        Naming the first row that holds a NaN or a value outside [0, 1], or whose sum misses 1 by more than its type
        explains: 5e-3 for float16, else 1e-4.
    """
    if probabilities.ndim != 2 or probabilities.dtype.kind not in "biuf":
        raise ValueError(
            f"probabilities have shape {probabilities.shape} and type {probabilities.dtype}; "
            f"expected numbers (image, class)"
        )
    given = probabilities.astype(np.float64)
    outside = ~((given >= 0) & (given <= 1)).all(1)
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(f"row {row}: a probability is not between 0 and 1{_percent(given)}")
    total = given.sum(1)
    off = np.abs(total - 1) > sum_off(probabilities)
    if off.any():
        row = int(off.argmax())
        raise ValueError(f"row {row}: the probabilities sum to {total[row]:.6g}, not 1; give logits as `logits`")
    zeros = given == 0
    given[zeros] = floor_of(given)
    return np.log(given)


def floor_of(probabilities: NDArray) -> float:
    """Return what a probability of zero counts as in a logarithm: the smallest one above zero."""
    least = float(probabilities.min(where=probabilities > 0, initial=1.0))
    return least if least < 1 else FLOOR


def check_no_percentages(values: NDArray) -> None:
    """Refuse rows that are at least 0 and sum to 100, with a `ValueError`."""
    if said := _percent(values):
        raise ValueError(f"row 0{said}")


def _percent(values: NDArray) -> str:
    return ": the rows sum to 100, as percentages do: divide them by 100" if sum_to(values, 100.0) else ""


def log_softmax(logits: NDArray) -> Floats:
    """Compute the log-softmax (image, class) in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return shifted


def softmax(logits: NDArray) -> Floats:
    """Compute the softmax (image, class) in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(1, keepdims=True)
    return shifted


# Bins -----------------------------------------------------------------------------------------------------------------


def width_edges(bins: int, dtype: DTypeLike) -> NDArray:
    """Return the M + 1 edges m / M in the precision of the confidences: in float32, 0.6 is not above 6 / 10."""
    return (np.arange(bins + 1) / bins).astype(dtype)


def equal_width(confidence: NDArray, bins: int = BINS) -> Ints:
    """Return each confidence's bin m, with m / M < confidence <= (m + 1) / M; 0 is in the first bin."""
    edges = width_edges(bins, confidence.dtype)
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)


def equal_mass(confidence: NDArray, bins: int = BINS) -> Ints:
    """Return the bin of each confidence, in bins that hold equally many images; equal confidences share a bin."""
    return np.searchsorted(mass_edges(confidence, bins), confidence, side="left")


def mass_edges(values: NDArray, bins: int) -> NDArray:
    """Return the inclusive upper edges of all but the last of `bins` equal-mass bins; fewer where values are equal."""
    size, larger = divmod(len(values), bins)
    last = np.cumsum(np.full(bins, size) + (np.arange(bins) < larger))[:-1] - 1
    ordered = np.sort(values)
    edges = np.unique(ordered[last[last >= 0]])
    return edges[edges < ordered[-1]]


@dataclass
class Reliability:
    """Sums over images, enough for every measure that does not need the order of the confidences.

    Sums of parts of the images can be merged. To get the same last bits, merge floats in one order, for example that of
    the images.

    Attributes
    ----------
    count, correct : (bin), images with this confidence, and how many of them are predicted correctly.
    confidence : (bin), sum of their confidences.
    class_gap : (class, bin), sum of (1 if the class is the label, else 0) - probability of the class, by that
        probability.
    nll, brier : sums.
    floored : images whose label has a probability below `FLOOR`.
    """

    count: Ints
    correct: Ints
    confidence: Floats
    class_gap: Floats
    nll: float = 0.0
    brier: float = 0.0
    floored: int = 0

    @staticmethod
    def zeros(classes: int, bins: int = BINS) -> Reliability:
        return Reliability(
            np.zeros(bins, np.int64), np.zeros(bins, np.int64), np.zeros(bins), np.zeros((classes, bins))
        )

    def update(self, probabilities: NDArray, labels: Ints, predicted: Ints) -> None:
        """Add images: probabilities (image, class), labels and predicted classes (image).

        Bins are found in the precision of the probabilities; sums are float64.
        """
        images, classes = probabilities.shape
        bins = len(self.count)
        row = np.arange(images)
        self.update_confidences(probabilities[row, predicted], predicted == labels)
        cells = equal_width(probabilities.ravel(), bins).reshape(images, classes) + bins * np.arange(classes)
        probabilities = probabilities.astype(np.float64, copy=False)
        gap = -probabilities
        gap[row, labels] += 1
        self.class_gap += np.bincount(cells.ravel(), gap.ravel(), minlength=bins * classes).reshape(classes, bins)
        true = probabilities[row, labels]
        self.nll -= float(np.log(np.maximum(true, FLOOR)).sum())
        self.floored += int((true < FLOOR).sum())
        self.brier += float(np.square(gap).sum())

    def update_confidences(self, confidence: NDArray, right: NDArray[np.bool_]) -> None:
        """Add what is known of images without the probabilities of all classes, both (image)."""
        bins = len(self.count)
        at = equal_width(confidence, bins)
        self.count += np.bincount(at, minlength=bins)
        self.correct += np.bincount(at[right], minlength=bins)
        self.confidence += np.bincount(at, confidence.astype(np.float64, copy=False), minlength=bins)

    def merge(self, other: Reliability) -> None:
        self.count += other.count
        self.correct += other.correct
        self.confidence += other.confidence
        self.class_gap += other.class_gap
        self.nll += other.nll
        self.brier += other.brier
        self.floored += other.floored

    @property
    def images(self) -> int:
        return int(self.count.sum())

    @property
    def accuracy(self) -> float:
        return int(self.correct.sum()) / self.images

    @property
    def mean_confidence(self) -> float:
        return float(self.confidence.sum()) / self.images

    @property
    def gaps(self) -> Floats:
        """Accuracy minus mean confidence of the images in each bin, (bin); NaN in an empty bin."""
        with np.errstate(invalid="ignore"):
            return (self.correct - self.confidence) / np.where(self.count, self.count, np.nan)

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean over images of the absolute gap of their bin."""
        return float(np.abs(self.correct - self.confidence).sum()) / self.images

    @property
    def mce(self) -> float:
        """Maximum calibration error: the largest absolute gap of a bin."""
        return float(np.nanmax(np.abs(self.gaps)))

    @property
    def ece_debiased(self) -> float:
        """Root of the debiased mean squared gap; 0 where noise alone would give larger gaps."""
        return float(np.sqrt(np.maximum(0.0, debiased_square(self.count, self.correct, self.confidence))))

    @property
    def classwise_ece(self) -> float:
        """Mean over classes of the ECE of their probabilities, against whether the class is the label."""
        return float(np.abs(self.class_gap).sum()) / self.images / len(self.class_gap)


def debiased_square(count: NDArray, correct: NDArray, confidence: Floats) -> Floats:
    """Compute the debiased mean squared gap from sums (..., bin).

    The variance of each bin's accuracy is subtracted from its squared gap. A bin with one image has no variance
    estimate and is left out.
    """
    images = np.maximum(count, 1)
    accuracy = correct / images
    squared = ((correct - confidence) / images) ** 2 - accuracy * (1 - accuracy) / np.maximum(count - 1, 1)
    return np.where(count > 1, count * squared, 0.0).sum(-1) / count.sum(-1)


def ece_equal_mass(confidence: NDArray, right: NDArray[np.bool_], bins: int = BINS) -> float:
    """Compute the ECE in bins that hold equally many images."""
    gap = np.bincount(equal_mass(confidence, bins), right - confidence.astype(np.float64))
    return float(np.abs(gap).sum()) / len(confidence)
