"""The arithmetic of the code published with two papers, written from its description in float64, without any shortcut.

`pnas2020`: Bau et al., "Understanding the role of individual units in a deep neural network" (PNAS 2020), and
davidbau/dissect. Maps are sampled bilinearly at the size of the label maps, outside them are zeros; the threshold of a
unit is the 0.99 quantile of all its values; an IoU comes from the share of active pixels, over all pixels and over
those of a concept.

`cvpr2017`: Bau et al., "Network Dissection" (CVPR 2017), and CSAILVision/NetDissect. The threshold is the 0.995
quantile of the maps as they are; maps are resized with Pillow; the union of a concept runs over images in which its
category occurs. There are two readings of "occurs": the paper's, that the category is labelled anywhere in the image,
and the code's, that it is labelled at an active pixel of the unit.

Both codes take quantiles from a sketch: `Sketch` below, after Karnin, Lang and Liberty (FOCS 2016). With `sketch=None`
quantiles are exact.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from dissection_oracles import by_torch
from PIL import Image


@dataclass
class Found:
    """`threshold` (unit,); `rate` (unit,), share of the positions above it; `iou` (unit, concept)."""

    threshold: np.ndarray
    rate: np.ndarray
    iou: np.ndarray

    @property
    def best(self) -> np.ndarray:
        return self.iou.argmax(1)


class Sketch:
    """Quantiles of a stream from few of its values: sorted buffers, of which every other value moves up with twice the
    weight when one is full. The highest has room for `2 * resolution`, each below for two thirds of the next, at least
    128."""

    def __init__(self, units: int, resolution: int = 3072, seed: int = 0) -> None:
        self.levels = [np.empty((units, 0))]
        self.resolution, self.random = resolution, np.random.default_rng(seed)

    def add(self, values: np.ndarray) -> None:
        """Add values (unit, n)."""
        step = 128
        for at in range(0, values.shape[1], step):
            self.levels[0] = np.concatenate([self.levels[0], values[:, at : at + step]], axis=1)
            level = 0
            while self.levels[level].shape[1] >= self._room(level):
                if level + 1 == len(self.levels):
                    self.levels.append(np.empty((len(values), 0)))
                ordered = np.sort(self.levels[level], axis=1)[:, self.random.integers(2) :: 2]
                self.levels[level + 1] = np.concatenate([self.levels[level + 1], ordered], axis=1)
                self.levels[level] = np.empty((len(values), 0))
                level += 1

    def quantile(self, share: float) -> np.ndarray:
        """The value below which a share of the stream lies, linear between the values that are left."""
        values = np.concatenate(self.levels, axis=1)
        weights = np.concatenate([np.full(level.shape[1], 2.0**k) for k, level in enumerate(self.levels)])
        order = np.argsort(values, axis=1)
        found = np.empty(len(values))
        for unit, own in enumerate(order):
            cumulated = np.cumsum(weights[own]) - weights[own] / 2
            found[unit] = np.interp(share, cumulated / weights.sum(), values[unit, own])
        return found

    def _room(self, level: int) -> int:
        return max(128, math.ceil(2 * self.resolution * (2 / 3) ** (len(self.levels) - 1 - level)))


def quantile(values: np.ndarray, share: float, sketch: Sketch | None) -> np.ndarray:
    """Of values (image, unit, y, x), for each unit."""
    if sketch is None:
        return np.quantile(values.transpose(1, 0, 2, 3).reshape(values.shape[1], -1), share, axis=1)
    for image in values:
        sketch.add(image.reshape(len(image), -1))
    return sketch.quantile(share)


def pnas2020(
    maps: np.ndarray, labels: np.ndarray, number: np.ndarray, place: np.ndarray, sketch: Sketch | None = None
) -> Found:
    """Maps (image, unit, h, w), labels (image, category, y, x); number and category of each concept."""
    large = np.stack([by_torch(image, labels.shape[2:], "zeros") for image in maps])
    threshold = quantile(large, 0.99, sketch)
    active = torch.from_numpy(large > threshold[:, None, None]).permute(0, 2, 3, 1)
    mean = active.double().mean((0, 1, 2))
    iou = np.zeros((maps.shape[1], len(number)))
    for c in range(len(number)):
        labelled = torch.from_numpy(labels[:, place[c]] == number[c])
        share = labelled.double().mean()
        within = active[labelled].double()
        if len(within):
            together = within.mean(0) * share
            iou[:, c] = (together / (mean + share - together)).numpy()
    return Found(threshold, mean.numpy(), iou)


def cvpr2017(
    maps: np.ndarray,
    labels: np.ndarray,
    number: np.ndarray,
    place: np.ndarray,
    sketch: Sketch | None = None,
    occurs: str = "in the image",
) -> Found:
    """As `pnas2020`; `occurs` is "in the image" (the paper) or "at an active pixel" (the code)."""
    maps = maps.astype(np.float64)
    threshold = quantile(maps, 0.995, sketch)
    units, size = maps.shape[1], labels.shape[2:]
    both, area, seen = np.zeros((units, len(number))), np.zeros(len(number)), np.zeros((units, len(number)))
    for own, label_map in zip(maps, labels, strict=True):
        area += [(label_map[k] == n).sum() for k, n in zip(place, number, strict=True)]
        for unit in range(units):
            if own[unit].max() <= threshold[unit]:
                continue
            resized = Image.fromarray(own[unit].astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR)
            mask = np.asarray(resized) > threshold[unit]
            here = label_map[:, mask]
            for category in range(len(label_map)):
                counts = (here[category] if occurs == "at an active pixel" else label_map[category]).any()
                seen[unit, place == category] += counts * mask.sum()
            both[unit] += [(here[k] == n).sum() for k, n in zip(place, number, strict=True)]
    return Found(threshold, (maps > threshold[:, None, None]).mean((0, 2, 3)), both / (area + seen - both + 1e-10))
