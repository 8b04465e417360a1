"""Does the score follow the map: remove what a map calls important, and see what the network says.

Inputs are (image, channel, y, x), maps (image, y, x). A pixel is removed or shown with all its channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def ranks(maps: np.ndarray) -> np.ndarray:
    """Return the place of each pixel when the largest value comes first, int64 like the maps; of equal ones the first.

    Raises ValueError for a map that is not finite: its pixels have no order.
    """
    flat = np.asarray(maps).reshape(len(maps), -1)
    if not np.isfinite(flat).all():
        raise ValueError("a map is not finite: its pixels have no order")
    order = np.argsort(-flat.astype(np.float64), axis=1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.broadcast_to(np.arange(flat.shape[1]), order.shape), 1)
    return places.reshape(maps.shape)


def counts(shares: Sequence[float] | np.ndarray, pixels: int) -> np.ndarray:
    """Return shares of an image in whole pixels, halves upwards, int64."""
    return np.floor(np.asarray(shares, np.float64) * pixels + 0.5).astype(np.int64)


def removed(inputs: torch.Tensor, filler: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
    """Return inputs whose first `count` pixels by `places` (image, y, x) show the filler.

    With inputs and filler exchanged, these pixels are inserted.
    """
    return torch.where((places < count)[:, None], filler, inputs)


def area(curve: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return the mean height of curves (..., point) over the shares, by the trapezium rule, float64 (...).

    Petsiuk et al., "RISE" (BMVC 2018), section 4.2, whose curves reach over shares from 0 to 1.
    """
    curve, shares = np.asarray(curve, np.float64), np.asarray(shares, np.float64)
    if shares.ndim != 1 or len(shares) < 2 or (np.diff(shares) <= 0).any():
        raise ValueError("a curve needs two ascending shares or more")
    heights = (curve[..., 1:] + curve[..., :-1]) / 2
    return (heights * np.diff(shares)).sum(-1) / (shares[-1] - shares[0])


def subsets(pixels: int, size: int, count: int, seed: Sequence[int]) -> np.ndarray:
    """Draw `count` sets of `size` pixels, each without repetition, bool (set, pixel)."""
    if not 0 < size <= pixels:
        raise ValueError(f"sets of {size} of {pixels} pixels")
    random = np.random.default_rng(list(seed))
    drawn = np.zeros((count, pixels), bool)
    for own in drawn:
        own[random.choice(pixels, size, replace=False)] = True
    return drawn


def squares(size: tuple[int, int], side: int, count: int, seed: Sequence[int]) -> np.ndarray:
    """Draw `count` squares that lie inside an image (y, x), bool (set, pixel)."""
    height, width = size
    if not 0 < side <= min(size):
        raise ValueError(f"squares of {side} pixels in an image of {height} x {width}")
    random = np.random.default_rng(list(seed))
    drawn = np.zeros((count, height, width), bool)
    for own in drawn:
        y, x = random.integers(height - side + 1), random.integers(width - side + 1)
        own[y : y + side, x : x + side] = True
    return drawn.reshape(count, -1)


def sums(maps: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """Return the sum of each image's map in each of its sets, float64 (image, set).

    maps : (image, y, x). sets : bool (image, set, pixel).
    """
    flat = np.asarray(maps, np.float64).reshape(len(maps), -1)
    return np.einsum("isp,ip->is", sets.astype(np.float64), flat)


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute Pearson's correlation over the last axis, float64; NaN where one of the two does not vary.

    Of the sums of maps and the drops of scores over sets of n pixels this is sensitivity-n: Ancona et al., "Towards
    better understanding of gradient-based attribution methods for deep neural networks" (ICLR 2018), section 4.
    """
    a, b = (np.asarray(each, np.float64) - np.mean(each, -1, keepdims=True, dtype=np.float64) for each in (a, b))
    norm = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    known = norm > 0
    return np.where(known, (a * b).sum(-1) / np.where(known, norm, 1), np.nan)


def infidelity(said: np.ndarray, drop: np.ndarray, scaled: bool) -> np.ndarray:
    """Return the mean squared difference between what a map says of perturbations and what they do, float64 (image,).

    With `scaled`, the map is multiplied by the factor that makes the difference least, so that its unit does not count,
    and the result is relative to the mean squared drop: 0 is perfect, 1 is a map that says nothing. Yeh et al., "On the
    (in)fidelity and sensitivity of explanations" (NeurIPS 2019), definition 2.1 and section 2.2.

    Parameters
    ----------
    said : (image, perturbation), the sum of the map over what a perturbation removes. drop : the same of the score.
    """
    said, drop = np.asarray(said, np.float64), np.asarray(drop, np.float64)
    if not scaled:
        return ((said - drop) ** 2).mean(-1)
    power, effect = (said**2).mean(-1), (drop**2).mean(-1)
    factor = (said * drop).mean(-1) / np.where(power > 0, power, 1)
    found = ((factor[..., None] * said - drop) ** 2).mean(-1)
    return np.where(effect > 0, found / np.where(effect > 0, effect, 1), np.nan)


def r2(said: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Return the share of the scores' variance that a prediction of them explains, float64 over the last axis.

    1 is a prediction that is right at all points; below 0, their mean predicts them better. NaN where the scores do not
    vary.
    """
    said, score = np.asarray(said, np.float64), np.asarray(score, np.float64)
    around = ((score - score.mean(-1, keepdims=True)) ** 2).sum(-1)
    missed = ((said - score) ** 2).sum(-1)
    return np.where(around > 0, 1 - missed / np.where(around > 0, around, 1), np.nan)


def relative_change(maps: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Return by how much maps change relative to what they are, in the Euclidean norm, float64 (image,).

    NaN where a map is 0 all over. The largest change over perturbations of an image is max-sensitivity, relative to the
    map: Yeh et al. (NeurIPS 2019), definition 2.3.
    """
    a, b = (np.asarray(each, np.float64).reshape(len(each), -1) for each in (maps, moved))
    size = np.sqrt((a**2).sum(1))
    return np.where(size > 0, np.sqrt(((b - a) ** 2).sum(1)) / np.where(size > 0, size, 1), np.nan)
