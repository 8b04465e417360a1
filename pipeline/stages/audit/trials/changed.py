"""Images with changed pixels, and what the network says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from kernels.attribution import baselines
from pipeline.networks.gradients import in_chunks
from pipeline.stages.audit.batch import Batch
from pipeline.stages.audit.faithful import Filler


@dataclass(frozen=True)
class Said:
    """What the network says of points, float64 (point,): the score that is explained, and the class's probability.

    `same` is 1 where the network predicts the class that is explained, else 0.
    """

    score: np.ndarray
    probability: np.ndarray
    same: np.ndarray


def said(batch: Batch, count: int, rows: np.ndarray, make: Callable[[slice], torch.Tensor]) -> Said:
    """Return what the network says of points, of which `make` gives some as uint8 (point, 3, y, x).

    rows : the image that each point stands for. One forward of a point gives all there is to say.
    """
    size, found = batch.spec.numerics.micro_batch, []
    for start, stop in in_chunks(count, size):
        logits = batch.logits_at(batch.normalise(make(slice(start, stop)).contiguous()))
        found.append(of_logits(batch, logits, rows[start:stop]))
    return Said(*(np.concatenate(each) for each in zip(*found, strict=True)))


def of_logits(batch: Batch, logits: torch.Tensor, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return score, probability and sameness of points by their logits (point, class)."""
    target = batch.target.at(torch.as_tensor(rows, device=batch.target.classes.device))
    likely = replace(target, against=None, link="probability")
    same = logits.argmax(1) == target.classes.to(logits.device)
    values = (target(logits), likely(logits), same)
    score, probability, equal = (each.double().cpu().numpy() for each in values)
    return score, probability, equal


def unchanged(batch: Batch) -> Said:
    """Return what the network says of the images."""
    return batch.memo("unchanged", lambda: Said(*of_logits(batch, batch.logits, np.arange(len(batch.pixels)))))


def filler(batch: Batch, kind: Filler) -> torch.Tensor:
    """Return what removed pixels show, uint8 like the images."""

    def make() -> torch.Tensor:
        pixels = batch.pixels
        if kind == "blur":
            return baselines.blurred(pixels)
        if kind == "mean":
            return pixels.double().mean((2, 3), keepdim=True).round().to(torch.uint8).expand_as(pixels)
        return torch.zeros_like(pixels)

    return batch.memo(("filler", kind), make)


def nothing_left(batch: Batch, kind: Filler) -> Said:
    """Return what the network says of the fillers alone."""
    own = filler(batch, kind)
    rows = np.arange(len(own))
    return batch.memo(("nothing left", kind), lambda: said(batch, len(own), rows, lambda some: own[some]))
