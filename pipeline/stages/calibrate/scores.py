"""Scores as a network or a file gives them: logits or probabilities, and what has to be said of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kernels.calibration.reliability import (
    FLOOR,
    Predictions,
    check_logits,
    check_no_percentages,
    floor_of,
    logits_of,
    own_precision,
    sum_to,
)

PROBABILITIES = "rows are probabilities (at least 0, sum 1): their logarithms are taken as logits"
ONE_PROBABILITY = "one column of numbers from 0 to 1: probabilities of class 1 of two"
ONE_LOGIT = "one column: logits of class 1 of two, against 0"
LIKE_SIGMOIDS = (
    "all numbers lie between 0 and 1 and rows do not sum to 1, as those of sigmoids: they are taken as logits, which "
    "go through a softmax"
)


def read_scores(values: np.ndarray, probable: bool = False) -> tuple[Predictions, list[str]]:
    """Return what was given as predictions, and remarks on how it was read.

    Parameters
    ----------
    values : (image, class); of two classes also (image) or (image, 1), scores of class 1.
    probable : whether they are said to be probabilities; else that is found from all rows.

    Raises
    ------
    ValueError
        Naming the row: values that are not finite, percentages, and what are said to be probabilities but are none.
    """
    remarks = []
    if values.ndim == 1 or values.shape[1:] == (1,):
        values, probable, remark = _of_two(values.reshape(-1), probable)
        remarks.append(remark)
    elif not probable and sum_to(values):
        probable = True
        remarks.append(PROBABILITIES)
    if probable:
        given = own_precision(values)
        logits = logits_of(given)
        return Predictions(logits, given), remarks + _zeros(given)
    check_logits(values)
    check_no_percentages(values)
    if values.size and values.min() >= 0 and values.max() <= 1:
        remarks.append(LIKE_SIGMOIDS)
    return Predictions(values), remarks


def _of_two(score: np.ndarray, probable: bool) -> tuple[np.ndarray, bool, str]:
    """Return (image, 2) from scores of class 1, whether they are probabilities, and how they were read."""
    if probable or bool(((score >= 0) & (score <= 1)).all()):
        if score.dtype.kind != "f":
            score = score.astype(np.float64)
        score = own_precision(score[:, None])[:, 0]
        return np.stack([1 - score, score], axis=1), True, ONE_PROBABILITY
    return np.stack([np.zeros_like(score), score], axis=1), False, ONE_LOGIT


def _zeros(given: np.ndarray) -> list[str]:
    zeros = int((given == 0).sum())
    if not zeros:
        return []
    floor = floor_of(given)
    why = "the smallest probability above 0" if floor != FLOOR else "no other probability is below 1"
    return [f"{zeros:,} probabilities are 0: each counts as {floor:.3g} in a logarithm ({why})"]


def outside(ece: float, low: float, high: float) -> str:
    """Return why an ECE is not within its interval; empty if it is, as printed with four digits."""
    if round(low, 4) <= round(ece, 4) <= round(high, 4):
        return ""
    return (
        "the ECE lies above its interval: chance alone adds to every gap of a bin, and the interval leaves that out; "
        "compare the ECE with what a calibrated model would show"
        if ece > high
        else "the ECE lies below its interval: resampled images have smaller gaps than these"
    )


def outside_of(rows: Sequence[tuple[str, float, float, float]]) -> list[str]:
    """Return a line for each reason, with the names of the (name, ECE, low, high) that it is true of."""
    names: dict[str, list[str]] = {}
    for name, *numbers in rows:
        if said := outside(*numbers):
            names.setdefault(said, []).append(name)
    return [f"{', '.join(of)}: {said}" for said, of in names.items()]
