"""The first page: what was run, on what, how long, and what came out, in sentences computed from the numbers."""

from collections.abc import Sequence

from pipeline.report.experiment import Experiment
from pipeline.report.page import Page
from pipeline.stages.dissect import sentences


def overview(experiment: Experiment, pages: Sequence[Page]) -> Page:
    """The overview of these pages."""
    return Page(
        file="index.html",
        title=experiment.title,
        template="index.html.j2",
        values={
            "lead": sentences.lead(experiment),
            "pages": pages,
            "datasets": [sentences.images(made) for made in experiment.of_stage("ingest")],
            "seconds": sum(made.seconds or 0 for made in experiment.made),
        },
    )
