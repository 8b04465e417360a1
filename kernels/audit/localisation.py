"""Does a map lie where the object is: boxes from maps, and how they fit; `accuracy.py` sums images up.

A box is (xmin, ymin, xmax, ymax) by the edges of pixels: pixel i reaches from i to i + 1, so that a box of the whole
image (height, width) is (0, 0, width, height). A truth's mask is int8 (y, x): 1 inside the object, 0 outside, -1 where
nobody knows, which counts nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CAM, GRAD_CAM = 0.2, 0.15
"""Shares of a map's maximum above which pixels make the box: Zhou et al. (CVPR 2016), Selvaraju et al. (ICCV 2017)."""
FOREGROUND, BACKGROUND = 0.95, 0.3
"""Quantiles of saliency above which pixels are of the object, and below which of its ground: Simonyan et al. (2014)."""
NEIGHBOURS = np.ones((3, 3), bool)


@dataclass(frozen=True)
class Truth:
    """Where the object is: its mask, int8 (y, x), and its boxes, float64 (box, 4), of which there is one or more."""

    mask: np.ndarray
    boxes: np.ndarray

    @staticmethod
    def of_boxes(boxes: np.ndarray, size: tuple[int, int]) -> Truth:
        """Return the truth of boxes: a pixel is inside if its centre is."""
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        mask = np.zeros(size, np.int8)
        y, x = np.arange(size[0])[:, None] + 0.5, np.arange(size[1])[None] + 0.5
        for left, top, right, bottom in boxes:
            mask[(x >= left) & (x < right) & (y >= top) & (y < bottom)] = 1
        return Truth(mask, boxes)

    @staticmethod
    def of_mask(mask: np.ndarray) -> Truth:
        """Return the truth of a mask: its boxes are those of its connected parts."""
        return Truth(mask.astype(np.int8), components(mask == 1)[0].astype(np.float64))


def components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes of the connected parts of a mask (y, x), int64 (part, 4), and their pixels, the largest first.

    Pixels that touch at a corner are connected. Of parts of one size, the one that begins higher up comes first.
    """
    from scipy import ndimage

    number, count = ndimage.label(mask, NEIGHBOURS)
    boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(number)], np.int64)
    sizes = np.bincount(number.ravel(), minlength=count + 1)[1:]
    order = np.argsort(-sizes, kind="stable")
    return boxes.reshape(-1, 4)[order], sizes[order]


def iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the intersection over union of each two boxes, float64 (box, other)."""
    a, b = np.asarray(boxes, np.float64)[:, None], np.asarray(others, np.float64)[None]
    shared = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    both = np.clip(shared, 0, None).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both
    return np.where(union > 0, both / np.where(union > 0, union, 1), 0.0)


def sweep(values: np.ndarray, boxes: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return by threshold the IoU of the largest part's box, and the best of any part's, float64 (threshold,) each.

    A part is connected and of values at the threshold or above; each box is compared with the truth that it fits best.

    Parameters
    ----------
    values : (y, x) from 0 to 1. boxes : the truth's (box, 4). thresholds : ascending.
    """
    largest, best = np.zeros(len(thresholds)), np.zeros(len(thresholds))
    before = -1
    for at, threshold in enumerate(thresholds):
        mask = values >= threshold
        count = int(mask.sum())
        if count == before:  # no value lies between the two thresholds
            largest[at], best[at] = largest[at - 1], best[at - 1]
            continue
        before = count
        found, _ = components(mask)
        if len(found):
            fits = iou(found, boxes).max(1)
            largest[at], best[at] = fits[0], fits.max()
    return largest, best


def pixels_above(values: np.ndarray, mask: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return by threshold how many pixels at it or above lie inside and outside the mask, int64 (threshold,) each."""

    def above(own: np.ndarray) -> np.ndarray:
        return own.size - np.searchsorted(np.sort(own), thresholds, side="left")

    return above(values[mask == 1]), above(values[mask == 0])


def share_box(values: np.ndarray, share: float) -> np.ndarray:
    """Return the box of the largest connected part of the pixels above a share of the map's maximum, float64 (4,).

    That is CAM's rule for 20 % and Grad-CAM's for 15 %. NaN where no value is above 0.
    """
    peak = values.max()
    if not peak > 0:
        return np.full(4, np.nan)
    return components(values > share * peak)[0][0].astype(np.float64)


def grab_cut_box(saliency: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Return the box of the largest part of the object that one GrabCut finds from a saliency map, float64 (4,).

    The object's colours are those of pixels above the map's 95 % quantile, its ground's those below the 30 % quantile;
    one cut decides on the rest. Simonyan et al., "Deep inside convolutional networks" (ICLR workshop 2014), section
    3.2. NaN where the map is constant. Needs OpenCV.

    Parameters
    ----------
    saliency : (y, x). pixels : uint8 (3, y, x).
    """
    import cv2

    low, high = np.quantile(saliency, (BACKGROUND, FOREGROUND))
    sure = saliency > high
    # A map that is least over more than the quantile's share has no value below it.
    ground = saliency < low if (saliency < low).any() else saliency <= low
    if not sure.any():
        return np.full(4, np.nan)
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    image = np.ascontiguousarray(pixels.transpose(1, 2, 0)[..., ::-1])
    # OpenCV counts undecided pixels to the ground's colours: so these are learnt from the others alone, as one row.
    known = sure | ground
    row = np.where(sure[known], cv2.GC_FGD, cv2.GC_BGD).astype(np.uint8)[None]
    cv2.grabCut(image[known][None], row, None, *models, 0, cv2.GC_INIT_WITH_MASK)  # type: ignore[call-overload]
    states = np.full(saliency.shape, cv2.GC_PR_BGD, np.uint8)
    states[ground], states[sure] = cv2.GC_BGD, cv2.GC_FGD
    cv2.grabCut(image, states, None, *models, 1, cv2.GC_EVAL_FREEZE_MODEL)  # type: ignore[call-overload]
    return components((states == cv2.GC_FGD) | (states == cv2.GC_PR_FGD))[0][0].astype(np.float64)


def centre_box(size: tuple[int, int]) -> np.ndarray:
    """Return the box in the centre that has half the area of an image (height, width), float64 (4,)."""
    height, width = size
    side = (1 - np.sqrt(0.5)) / 2
    return np.array([width * side, height * side, width * (1 - side), height * (1 - side)])


def hit(values: np.ndarray, mask: np.ndarray, tolerance: float) -> float:
    """Return whether the largest value lies inside the mask, or at most `tolerance` pixels from it: 1 or 0.

    Of equal largest values, the share of them that does; NaN where they all lie where nobody knows, or nothing is
    inside. Zhang et al., "Top-down neural attention by excitation backprop" (ECCV 2016), section 4.1, with 15 pixels.
    """
    from scipy.ndimage import distance_transform_edt

    if not (mask == 1).any():
        return float("nan")
    largest = (values == values.max()) & (mask >= 0)
    if not largest.any():
        return float("nan")
    distance = distance_transform_edt(mask != 1)
    return float((distance[largest] <= tolerance).mean())


def energy_inside(values: np.ndarray, mask: np.ndarray) -> float:
    """Return the share of the positive part of a map that lies inside the mask; NaN where nothing is positive.

    Wang et al., "Score-CAM" (CVPR workshops 2020), section 4.3.
    """
    positive = np.where(mask >= 0, np.clip(np.asarray(values, np.float64), 0, None), 0)
    total = positive.sum()
    return float(positive[mask == 1].sum() / total) if total > 0 else float("nan")
