"""The images that a job counts, and the size of their label maps: the basis of several stages' estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.networks import segmenters
from pipeline.plan.job import Job


@dataclass(frozen=True)
class Counted:
    """The images that a job counts, and their label maps."""

    images: int
    size: tuple[int, int]
    label_map_size: tuple[int, int]
    categories: Mapping[str, Sequence[str]]

    @staticmethod
    def of(job: Job) -> Counted:
        dataset = job.dataset_spec
        height, width = ingested(job)
        limit = job.config.controls.images if job.is_control else None
        images = job.splits[dataset.examined_split]
        return Counted(
            min(images, limit or images),
            (height, width),
            dataset.label_map_size or (height, width),
            segmenters.wanted_categories(dataset, job.config),
        )

    def shards(self, images: int) -> int:
        """Return the number of shards of this many images."""
        return -(-self.images // images)


def ingested(job: Job) -> tuple[int, int]:
    """Return (height, width) of the images of a job's data set."""
    height, width = next(each for each in job.jobs("ingest") if each.dataset == job.dataset).settings.size
    return height, width
