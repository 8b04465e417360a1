"""The first page: what was run, on what, how long, and what came out, in sentences computed from the numbers."""

from collections.abc import Sequence

from pipeline.data.images import Ingested
from pipeline.report.experiment import Experiment, Made
from pipeline.report.page import Page
from pipeline.report.words import number, plural
from pipeline.stages.dissect.found import lead


def overview(experiment: Experiment, pages: Sequence[Page]) -> Page:
    """Return the overview of these pages."""
    return Page(
        file="index.html",
        title=experiment.title,
        template="index.html.j2",
        values={
            "lead": lead(experiment),
            "pages": pages,
            "datasets": [images(made) for made in experiment.of_stage("ingest")],
            "seconds": sum(made.seconds or 0 for made in experiment.made),
        },
    )


def images(ingest: Made) -> str:
    """Say what a data set holds, from the manifest of its images."""
    held = Ingested.read(ingest.result)
    height, width = held.size
    splits = {split: sum(shards.values()) for split, shards in held.splits.items()}
    listed = ", ".join(f"{split} {number(count)}" for split, count in splits.items())
    return f"{ingest.dataset}: {plural(sum(splits.values()), 'image')} of {width} × {height} pixels ({listed})."
