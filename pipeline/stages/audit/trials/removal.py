"""Remove pixels in the order of a map: deletion, insertion, ROAD, the log-odds of the DeepLIFT paper."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from kernels.attribution.log_odds import erased
from kernels.audit import faithfulness
from kernels.audit.imputation import imputed
from pipeline.errors import MicrotomeError
from pipeline.stages.audit.batch import Batch
from pipeline.stages.audit.faithful import ORDERS, Deletion, Insertion, LogOdds, Removal, Road, shares_of
from pipeline.stages.audit.trials.changed import filler, nothing_left, said, unchanged


def deletion(batch: Batch, options: Deletion) -> dict[str, np.ndarray]:
    """Follow the score while pixels show the filler, the largest values of the map first.

    Petsiuk et al., "RISE" (BMVC 2018), section 4.2; pixel flipping of Samek et al. (TNNLS 2017).
    """
    return _curves(batch, options, insert=False)


def insertion(batch: Batch, options: Insertion) -> dict[str, np.ndarray]:
    """Follow the score while the filler gives way to the image, the largest values of the map first."""
    return _curves(batch, options, insert=True)


def _curves(batch: Batch, options: Removal, insert: bool) -> dict[str, np.ndarray]:
    places = torch.from_numpy(faithfulness.ranks(batch.at_image()))
    shares = np.array(shares_of(options.steps))
    counts = torch.from_numpy(faithfulness.counts(shares, places[0].numel()))
    images, inner = len(places), options.steps - 1
    rows = np.repeat(np.arange(images), inner)
    upto = counts[1:-1].repeat(images)
    found: dict[str, np.ndarray] = {}
    curves: dict[str, list[np.ndarray]] = {"probability": [], "score": []}
    for kind in options.fillers:
        nothing, whole = filler(batch, kind), batch.pixels
        ends = (unchanged(batch), nothing_left(batch, kind))
        first, second = (nothing, whole) if insert else (whole, nothing)

        def make(some: slice, first: torch.Tensor = first, second: torch.Tensor = second) -> torch.Tensor:
            own = torch.from_numpy(rows[some])
            return torch.where((places[own] < upto[some, None, None])[:, None], second[own], first[own])

        points = said(batch, len(rows), rows, make)
        before, after = ends[::-1] if insert else ends
        for what in curves:
            middle = getattr(points, what).reshape(images, inner)
            curve = np.column_stack([getattr(before, what), middle, getattr(after, what)])
            found[f"{what}_{kind}"] = faithfulness.area(curve, shares)
            curves[what].append(curve)
    return found | {f"{what}_curve": np.stack(own, 1) for what, own in curves.items()}


def road(batch: Batch, options: Road) -> dict[str, np.ndarray]:
    """Remove shares of the pixels and fill them from their neighbours, the most and the least relevant first.

    Rong et al., "A consistent and efficient evaluation strategy for attribution methods" (ICML 2022). Noise is drawn
    by the image and the share, the same for every method.
    """
    maps = batch.at_image()
    orders = [faithfulness.ranks(maps), faithfulness.ranks(-maps)]
    counts = faithfulness.counts(options.shares, maps[0].size)
    whole = batch.pixels.numpy()
    images, each = len(maps), len(counts)
    rows = np.repeat(np.arange(images), each)
    found: dict[str, np.ndarray] = {}
    curves: dict[str, list[np.ndarray]] = {"accuracy": [], "probability": []}
    for order, places in zip(ORDERS, orders, strict=True):

        def make(some: slice, places: np.ndarray = places) -> torch.Tensor:
            made = []
            for point in range(*some.indices(len(rows))):
                image, at = divmod(point, each)
                gone = places[image] < counts[at]
                values = imputed(whole[image] / 255, gone, options.noise, [batch.seeds[image], 3, at])
                made.append(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8))
            return torch.from_numpy(np.stack(made))

        points = said(batch, len(rows), rows, make)
        for what, values in (("accuracy", points.same), ("probability", points.probability)):
            curve = values.reshape(images, each)
            curves[what].append(curve)
            found[f"{what}_{order}"] = curve.mean(1)
    return found | {f"{what}_curve": np.stack(own, 1) for what, own in curves.items()}


def log_odds(batch: Batch, options: LogOdds) -> dict[str, np.ndarray]:
    """Erase the pixels that speak for the explained class and against the next, and measure the log-odds.

    The next is the class of the contrast, else the most probable other one. Shrikumar et al., "Learning important
    features through propagating activation differences" (ICML 2017), section 4.1.
    """
    of, against = pair(batch)
    target = replace(batch.target, classes=of, against=None, link="logit")
    if batch.control:
        maps = batch.at_image()
    else:
        parts = [batch.explain(target=replace(target, classes=each)) for each in (of, against)]
        maps = batch.at_image(parts[0] - parts[1])
    less = erased(batch.pixels, filler(batch, options.filler), torch.from_numpy(maps), options.share)
    odds = replace(target, against=against)
    change = odds(batch.logits).double() - odds(batch.logits_at(batch.normalise(less.contiguous()))).double()
    return {"change": change.cpu().numpy()}


def pair(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the explained class of each image, and the one that it is compared with, int64 (image,) each.

    Raises `MicrotomeError` if there is no other class.
    """
    of = batch.target.classes
    if batch.target.against is not None:
        return of, batch.target.against
    if batch.logits.shape[1] < 2:
        raise MicrotomeError(f"network {batch.model.name!r} has one logit, and log-odds are of two classes")
    others = batch.logits.scatter(1, of[:, None], -torch.inf)
    return of, others.argmax(1)
