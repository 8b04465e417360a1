"""Compare maps with where the object of the explained class is."""

from __future__ import annotations

import numpy as np

from kernels.attribution.segments import enlarged
from kernels.audit import localisation as kernels
from kernels.audit.localisation import Truth
from kernels.audit.structure import scaled
from pipeline.errors import MicrotomeError, nearest
from pipeline.stages.audit.batch import Batch
from pipeline.stages.audit.located import Localisation, Located, Mass, Pointing, Rule

FIRST, FIFTH = 1, 5


def localisation(batch: Batch, options: Localisation) -> dict[str, np.ndarray]:
    """Draw boxes from the map of each image whose object's place is known, and compare them with the truth's.

    Choe et al., "Evaluating weakly supervised object localization methods right" (CVPR 2020); Zhou et al. (CVPR 2016);
    Selvaraju et al. (ICCV 2017); Simonyan et al. (2014).
    """
    images, levels = len(batch.pixels), options.levels
    shape = (images, len(levels))
    found: dict[str, np.ndarray] = {
        name: np.full(shape, np.nan) for name in ("largest_iou", "any_iou", "inside", "outside")
    }
    found |= {name: np.full(images, np.nan) for name in ("object", *(f"{rule}_iou" for rule in options.rules))}
    truths, maps = truth(batch, options, "localisation", batch.classes), shown(batch)
    values = np.nan_to_num(scaled(maps))
    for at, own in enumerate(truths):
        if own is None:
            continue
        fixed = fixed_box(batch)
        if fixed is None:
            fits = kernels.sweep(values[at], own.boxes, levels)
        else:
            fit = float(kernels.iou(fixed[None], own.boxes).max())
            fits = np.full(len(levels), fit), np.full(len(levels), fit)
        found["largest_iou"][at], found["any_iou"][at] = fits
        found["inside"][at], found["outside"][at] = kernels.pixels_above(values[at], own.mask, levels)
        found["object"][at] = (own.mask == 1).sum()
        for rule in options.rules:
            box = by_rule(rule, maps[at], batch.pixels[at].numpy()) if fixed is None else fixed
            # A map without a box has none that fits.
            found[f"{rule}_iou"][at] = 0.0 if np.isnan(box).any() else kernels.iou(box[None], own.boxes).max()
    return found | classified(batch, options)


def pointing(batch: Batch, options: Pointing) -> dict[str, np.ndarray]:
    """Look whether the largest value of each map lies inside the object, and how much of its positive part does.

    Zhang et al., "Top-down neural attention by excitation backprop" (ECCV 2016), with its tolerance and without; Wang
    et al., "Score-CAM" (2020). The box in the centre and the whole image hit by the share of them that lies inside.
    """
    maps = shown(batch)
    found = {name: np.full(len(maps), np.nan) for name in ("hit", "hit_tolerant", "energy", "area")}
    for at, own in enumerate(truth(batch, options, "pointing", batch.classes)):
        if own is None:
            continue
        values = maps[at].astype(np.float64)
        found["hit"][at] = kernels.hit(values, own.mask, 0)
        found["hit_tolerant"][at] = kernels.hit(values, own.mask, options.tolerance)
        found["energy"][at] = kernels.energy_inside(values, own.mask)
        found["area"][at] = (own.mask == 1).sum() / (own.mask >= 0).sum()
    return found


def mass(batch: Batch, options: Mass) -> dict[str, np.ndarray]:
    """Return the share of each map's positive part, and of the image, in each concept; NaN in images without it.

    Pixels without a label count as part of the image.
    """
    maps, numbers = batch.at_image(), batch.concepts(options.category)
    wanted = [_number(numbers, name) for name in options.concepts]
    found = {name: np.full((len(maps), len(wanted)), np.nan) for name in ("energy", "area")}
    for at, label_map in enumerate(batch.label_maps(options.category)):
        own = enlarged(label_map, batch.size)
        for column, number in enumerate(wanted):
            mask = (own == number).astype(np.int8)
            if mask.any():
                found["energy"][at, column] = kernels.energy_inside(maps[at], mask)
                found["area"][at, column] = mask.mean()
    return found


def shown(batch: Batch) -> np.ndarray:
    """Return the maps at the images' size; those of the controls that are boxes are 1 inside them."""
    if (box := fixed_box(batch)) is None:
        return batch.at_image()
    return np.repeat(Truth.of_boxes(box, batch.size).mask[None].astype(np.float32), len(batch.pixels), 0)


def fixed_box(batch: Batch) -> np.ndarray | None:
    """Return the box of a control that is one, whatever the image."""
    height, width = batch.size
    made = {"centre": kernels.centre_box(batch.size), "whole": np.array([0.0, 0.0, width, height])}
    return made.get(batch.control)


def by_rule(rule: Rule, values: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Return the box of a map by a rule that needs no threshold, float64 (4,)."""
    if rule == "grab_cut":
        return kernels.grab_cut_box(values, pixels)
    return kernels.share_box(values, kernels.CAM if rule == "cam" else kernels.GRAD_CAM)


def classified(batch: Batch, options: Localisation) -> dict[str, np.ndarray]:
    """Return whether the label is the most probable class, and among the five most, 1 or 0, (image,) by name.

    `placed` says whether the place of the label's object is known.

    NaN where the label's object has no known place, and where the label counts but the map is of another class.
    """
    order = batch.logits.sort(dim=1, stable=True, descending=True).indices.cpu().numpy()
    labels, other = batch.labels, batch.classes != batch.labels
    there = np.array([own is not None for own in truth(batch, options, "localisation", labels)])
    found = {"placed": there.astype(np.float64)}
    for name, most in (("first", FIRST), ("fifth", FIFTH)):
        right = (order[:, :most] == labels[:, None]).any(1)
        found[name] = np.where(there & ~(right & other), right.astype(np.float64), np.nan)
    return found


def truth(batch: Batch, options: Located, test: str, classes: np.ndarray) -> list[Truth | None]:
    """Return where the object of a class of each image is, None where that is unknown; -1 is no class."""
    given = batch.given(test)
    found: list[Truth | None] = []
    if options.boxes is not None:
        for slot, of in zip(batch.slots.tolist(), classes.tolist(), strict=True):
            rows = given.get(slot, np.empty((0, 5)))
            own = rows[rows[:, 0] == of, 1:]
            found.append(Truth.of_boxes(own, batch.size) if len(own) else None)
        return found
    category = options.category or batch.categories[0]
    numbers, maps = batch.concepts(category), batch.label_maps(category)
    for of, label_map in zip(classes.tolist(), maps, strict=True):
        wanted = [_number(numbers, name) for name in given.get(of, ())]
        mask = np.isin(enlarged(label_map, batch.size), wanted)
        found.append(Truth.of_mask(mask) if wanted and mask.any() else None)
    return found


def _number(numbers: dict[str, int], name: str) -> int:
    if name not in numbers:
        raise MicrotomeError(f"no concept {name!r} in the label maps{nearest(name, numbers)}")
    return numbers[name]
