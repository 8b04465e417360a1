"""Worker tasks of the stage `intervene`: rank units one at a time, and try sets of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kernels.images.colour_names import colour_names
from kernels.intervention.regions import stretched
from pipeline.config.networks import GeneratorNetwork
from pipeline.data.images import pixels
from pipeline.networks import segmenters
from pipeline.networks.generators import latent_of
from pipeline.stages.intervene.measures import MEASURES, Regions, measured
from pipeline.stages.intervene.painting import Painter
from pipeline.stages.intervene.trials import NOTHING, REMOVED, WITHOUT, Trial
from pipeline.storage.store import StoreRef, write
from pipeline.workers.resumable import Done


@dataclass(frozen=True)
class Subject:
    """A generator, its images and the concept, as tasks name them.

    Attributes
    ----------
    images, labels : the stores, with the files of the images in question. place, number : of the concept's label maps.
    kinds : of objects that are left out of a composition without the concept; empty: there is no such picture.
    judges : by category that can be found in any picture: its concepts, and its segmenter, or None for colours.
    """

    painter: Painter
    images: StoreRef
    labels: StoreRef
    place: int
    number: int
    seed: int
    kinds: tuple[str, ...]
    judges: Mapping[str, tuple[Sequence[str], segmenters.Model | None]]

    def latents(self, slots: Sequence[int]) -> np.ndarray:
        return pixels(self.images.open(), slots, "latent")

    def others(self, slots: Sequence[int], ids: Sequence[str]) -> np.ndarray | None:
        """Return the latents of the same compositions without the concept."""
        if not self.kinds:
            return None
        spec, size = self.painter.model.spec, self.images.open()["image"].shape[-1]
        assert isinstance(spec, GeneratorNetwork)
        return np.stack([latent_of(spec.latent, self.seed, each, size, self.kinds) for each in ids])

    def regions(self, slots: Sequence[int], size: tuple[int, int]) -> list[Regions]:
        maps = stretched(read_labels(self.labels, slots, self.place), size)
        return [Regions.of(each, self.number) for each in maps]


def read_labels(labels: StoreRef, slots: Sequence[int], place: int) -> np.ndarray:
    """Return the label maps (image, y, x) of one category of these slots, read shard by shard."""
    array, chosen = labels.open()["label_map"], np.asarray(slots, np.int64)
    step, found = array.chunks[0], np.empty((len(chosen), *array.shape[2:]), array.dtype)
    for shard in np.unique(chosen // step).tolist():
        own = np.flatnonzero(chosen // step == shard)
        found[own] = array[shard * step : (shard + 1) * step, place][chosen[own] - shard * step]
    return found


def count_pixels(labels: StoreRef, slots: Sequence[int], place: int, number: int) -> list[int]:
    """Return how many pixels of each image show the concept, on a worker."""
    return (read_labels(labels, slots, place) == number).sum((1, 2)).tolist()


def quantiles(subject: Subject, slots: Sequence[int], share: float) -> np.ndarray:
    """Return a quantile of each unit over positions of some images, float64 (unit,), on a worker."""
    outputs = subject.painter.outputs(subject.latents(slots)).float().cpu().numpy()
    return np.quantile(np.moveaxis(outputs, 1, 0).reshape(outputs.shape[1], -1).astype(np.float64), share, axis=1)


def rank_units(subject: Subject, store: Path, part: str, units: Sequence[int], slots: Sequence[int]) -> Done:
    """Write what the removal of each unit alone changes, mean over pixels inside and outside, on a worker."""
    latents = subject.latents(slots)
    before = subject.painter.pictures(latents)
    regions = subject.regions(slots, (before.shape[2], before.shape[3]))
    found = np.empty((len(units), len(slots), 2))
    for row, unit in enumerate(units):
        after = subject.painter.tried(Trial(REMOVED, k=1, units=(unit,), values=(0.0,)), latents, None)
        for at, region in enumerate(regions):
            sums, sizes = measured(before[at], after[at], None, region), region.sizes
            found[row, at] = [sums[each] / sizes[each] if sizes[each] else np.nan for each in (0, 1)]
    blocks = {"inside": ((units[0], 0), found[..., 0]), "outside": ((units[0], 0), found[..., 1])}
    return Done(part, {"": write(store, blocks)})


def try_all(
    subject: Subject,
    store: Path,
    part: str,
    start: int,
    slots: Sequence[int],
    ids: Sequence[str],
    trials: Sequence[Trial],
    shown: int,
) -> Done:
    """Write what every trial does to some images, on a worker; the pictures of the first `shown` of them too."""
    latents, others = subject.latents(slots), subject.others(slots, ids)
    before = subject.painter.tried(Trial(NOTHING), latents, others)
    without = subject.painter.tried(Trial(WITHOUT), latents, others) if others is not None else None
    regions = subject.regions(slots, (before.shape[2], before.shape[3]))
    stored = pixels(subject.images.open(), slots)
    concepts = sum(len(names) for names, _ in subject.judges.values())
    sums = np.empty((len(slots), len(trials), len(MEASURES)))
    areas = np.zeros((len(slots), len(trials), concepts), np.int64)
    pictures = np.zeros((shown, len(trials), *before.shape[1:]), np.uint8)
    for number, trial in enumerate(trials):
        after = subject.painter.tried(trial, latents, others)
        for at, region in enumerate(regions):
            own = None if without is None else without[at]
            sums[at, number] = measured(before[at], after[at], own, region)
        areas[:, number] = areas_of(subject.judges, after)
        pictures[:, number] = after[:shown]
    blocks = {
        "sum": ((start, 0, 0), sums),
        "size": ((start, 0), np.array([region.sizes for region in regions])),
        "area": ((start, 0, 0), areas),
    }
    if shown:
        blocks["picture"] = ((0, 0, 0, 0, 0), pictures)
    apart = int(np.abs(before.astype(int) - stored).max())
    return Done(part, {"": write(store, blocks)}, {"apart": apart})


def areas_of(judges: Mapping[str, tuple[Sequence[str], segmenters.Model | None]], pictures: np.ndarray) -> np.ndarray:
    """Return the pixels of each concept that can be found in any picture, int64 (image, concept)."""
    found = []
    for category, (names, model) in judges.items():
        own = category.partition("/")[2]
        if model is None:
            maps = colour_names(np.moveaxis(pictures, 1, -1)).astype(np.int64) + 1
        else:
            maps = segmenters.label_maps(model, pictures, [own])[own]
        counts = [np.bincount(each.reshape(-1), minlength=len(names) + 1)[1 : len(names) + 1] for each in maps]
        found.append(np.stack(counts))
    return np.concatenate(found, 1) if found else np.zeros((len(pictures), 0), np.int64)
