"""Published measures of weakly supervised localisation, from the boxes and pixels of all images.

`weights` (draw, image) say how often each image counts: a row of ones for all images, and others for images that are
drawn again, so that an interval costs a product of matrices.
"""

from __future__ import annotations

import numpy as np


def box_accuracy(fits: np.ndarray, least: float, weights: np.ndarray) -> np.ndarray:
    """Return the share of images whose IoU reaches `least`, float64 (draw, threshold), from IoUs (image, threshold).

    Its maximum over thresholds is MaxBoxAcc for the largest part's box and least = .5, and the mean of its maxima for
    .3, .5 and .7 MaxBoxAccV2 for any part's: Choe et al., "Evaluating weakly supervised object localization methods
    right" (CVPR 2020), section 4.1, and its extension (TPAMI 2022). NaN where no image counts.
    """
    total = weights.sum(1, keepdims=True)
    return np.where(total > 0, weights @ (fits >= least) / np.where(total > 0, total, 1), np.nan)


def crossed(fits: np.ndarray, half: np.ndarray, least: float, weights: np.ndarray) -> np.ndarray:
    """Return the share of images whose IoU reaches `least` at the best threshold of the *other* half of the images.

    Parameters
    ----------
    fits : IoUs (image, threshold). half : bool (image,).

    Returns
    -------
    float64 (draw,), NaN where one half is empty.
    """
    right = np.zeros(len(weights))
    for own in (half, ~half):
        mine, other = (box_accuracy(fits[part], least, weights[:, part]) for part in (own, ~own))
        chosen = np.nan_to_num(other).argmax(1)
        share = np.take_along_axis(mine, chosen[:, None], 1)[:, 0]
        right += np.where(np.isnan(other).any(1), np.nan, share * weights[:, own].sum(1))
    return right / weights.sum(1)


def pixel_ap(inside: np.ndarray, outside: np.ndarray, total: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return PxAP, the area under pixel precision over pixel recall of all images together, float64 (draw,).

    Choe et al. (CVPR 2020), section 4.1.

    Parameters
    ----------
    inside, outside : pixels at a threshold or above, (image, threshold), thresholds ascending.
    total : pixels of the object, (image,).
    """
    true, false = (weights @ np.asarray(each, np.float64)[:, ::-1] for each in (inside, outside))
    above = true + false
    precision = np.where(above > 0, true / np.where(above > 0, above, 1), 0.0)
    recall = true / (weights @ total)[:, None]
    return (precision * np.diff(recall, prepend=0.0, axis=1)).sum(1)
