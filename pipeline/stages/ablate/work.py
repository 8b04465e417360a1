"""What an ablation is about to do: the images that count, and each layer with its shards, as tasks name them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.data.images import Images
from pipeline.data.listing import derangement
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks.forward import Model
from pipeline.plan.job import Job
from pipeline.stages.ablate.settings import Measure, Removal, Settings
from pipeline.stages.ablate.tasks import Cut, Shard, Target, prepare_cuts
from pipeline.stages.extract.results import Extracted, StoredLayer, logits
from pipeline.storage.store import StoreRef
from pipeline.workers.tasks import run_tasks

REMEDY = "lower `shard_images` of the data set"


@dataclass(frozen=True)
class Work:
    """What all layers of one job share.

    Attributes
    ----------
    label : of each image.
    splits : by split, the one that ranks first, the rows of each shard that count.
    """

    job: Job[Settings]
    workers: Any
    label: np.ndarray
    splits: Mapping[str, Mapping[int, np.ndarray]]

    @staticmethod
    def of(job: Job[Settings], workers: Any) -> Work:
        label = np.asarray(job.images.reader()["label"][:])
        return Work(job, workers, label, counted_rows(job.images, label, job.settings.ablate))

    @property
    def settings(self) -> Removal:
        return self.job.settings.ablate

    @property
    def images(self) -> Images:
        return self.job.images

    @property
    def model(self) -> Model:
        return self.job.model

    @property
    def classes(self) -> list[str]:
        return self.images.classes

    @cached_property
    def rows(self) -> dict[int, np.ndarray]:
        """The rows of each shard that count, all splits together, in order."""
        shards = sorted({shard for rows in self.splits.values() for shard in rows})
        return {
            shard: np.sort(np.concatenate([rows[shard] for rows in self.splits.values() if shard in rows]))
            for shard in shards
        }

    def layers(self) -> Iterator[tuple[Target, dict[int, Shard]]]:
        """Prepare each layer whose units are to be removed; yield it with its shards, by number."""
        extraction = self.job.parent("extract")
        extracted = Extracted.of(extraction)
        cuts = self._cuts(extracted.by_name)
        heads = logits(self.job.folder, extraction)
        for each in cuts:
            layer = extracted.layer(each.info.name)
            target = Target(
                **vars(each), id=layer.id, scale=layer.scale, folder=self.job.folder, replace=self.settings.replace
            )
            # Of a layer without stored maps they are computed, as those of images that were not extracted.
            stored = extracted.shards if layer.store is None else []
            maps = layer.activations(self.job.results, self.job.dataset_folder)
            yield target, self._shards(set(stored), maps, heads)

    def _cuts(self, known: Mapping[str, StoredLayer]) -> list[Cut]:
        """Cut the network after each layer, and refuse what takes too much memory or has other classes."""
        chosen = self.settings.layers
        names = [list(known)[-1]] if chosen == "last" else list(chosen)
        for name in names:
            if name not in known:
                raise MicrotomeError(
                    f"network {self.job.network!r}, ablate.layers: {name!r} is not among its layers"
                    f"{nearest(name, known)}"
                )
        task = self.model, self.images.size, list(dict.fromkeys(names)), self.images.shard_images
        (cuts,) = run_tasks(self.workers, prepare_cuts, [task], 1, f"{self.job.name}: tails")
        for each in cuts:
            self.job.check_memory(each.memory, REMEDY, f"{self.job.name}: {each.info.name}")
        for each in cuts:
            if each.classes != len(self.classes):
                raise MicrotomeError(
                    f"network {self.job.network!r} gives {each.classes} logits, and data set {self.job.dataset!r} "
                    f"has {len(self.classes)} classes: they cannot be compared"
                )
        return cuts

    def _shards(self, stored: set[int], maps: StoreRef, heads: StoreRef) -> dict[int, Shard]:
        """Return the shards with their rows, and what is stored of them."""
        images, image_id, shards = self.images, self.image_id, {}
        for number, rows in self.rows.items():
            start, stop = images.range(number)
            partner = np.arange(len(rows))
            for split in self.splits.values():
                if number in split:
                    own = np.searchsorted(rows, split[number])
                    partner[own] = own[derangement(image_id[start:stop][split[number]])]
            shards[number] = Shard(
                number,
                start,
                stop,
                rows,
                self.label[start:stop][rows],
                partner,
                StoreRef(images.store, images.files_of(number)),
                maps.of(("activation", "special"), [number]) if number in stored else None,
                heads.of(("logits",), [number]) if number in stored else None,
            )
        return shards

    @cached_property
    def image_id(self) -> np.ndarray:
        return self.images.image_ids()


def counted_rows(images: Images, label: np.ndarray, measure: Measure) -> dict[str, dict[int, np.ndarray]]:
    """Return by split the rows of each shard that count: valid images with a class.

    Alone in its shard, an image has no other whose values could replace its own, and does not count where they should.
    """
    shuffled = measure.replace == "shuffled"
    found: dict[str, dict[int, np.ndarray]] = {}
    for split in measure.splits:
        counts = images.counted(split) & (label >= 0)
        found[split] = {}
        for shard in images.shards(split, measure.images):
            start, stop = images.range(shard)
            rows = np.flatnonzero(counts[start:stop])
            if len(rows) > shuffled:
                found[split][shard] = rows
        if not found[split]:
            raise MicrotomeError(
                f"{images.store.parent.name}: no image of split {split!r} is left to measure losses on"
                + (" (with `replace: shuffled` it takes two in one shard)" if shuffled else "")
            )
    return found
