"""The first page: what was run, on what, how long, and what came out, in sentences computed from the numbers."""

from collections.abc import Sequence

from pipeline.data.images import Ingested
from pipeline.report.experiment import Experiment, Made
from pipeline.report.page import Page
from pipeline.report.tables import write_table
from pipeline.report.words import number, plural
from pipeline.stages.dissect.found import lead
from pipeline.stages.report.accuracy import COLUMNS, row

NETWORKS = "tables/networks.csv"


def overview(experiment: Experiment, pages: Sequence[Page]) -> Page:
    """Return the overview of these pages; write the table of the networks' accuracies, if there are any."""
    accuracies = experiment.accuracies
    if accuracies:
        rows = [(*pair, *row(found)) for pair, found in accuracies.items()]
        write_table(experiment.out / NETWORKS, ("dataset", "network", *COLUMNS), rows)
    return Page(
        file="index.html",
        title=experiment.title,
        template="index.html.j2",
        values={
            "lead": lead(experiment),
            "pages": pages,
            "datasets": [images(made) for made in experiment.of_stage("ingest")],
            "seconds": sum(made.seconds or 0 for made in experiment.made),
            "accuracies": accuracies,
            "networks_file": NETWORKS,
        },
        files=[NETWORKS] if accuracies else [],
    )


def images(ingest: Made) -> str:
    """Say what a data set holds, from the manifest of its images."""
    held = Ingested.read(ingest.result)
    height, width = held.size
    splits = {split: sum(shards.values()) for split, shards in held.splits.items()}
    listed = ", ".join(f"{split} {number(count)}" for split, count in splits.items())
    return f"{ingest.dataset}: {plural(sum(splits.values()), 'image')} of {width} × {height} pixels ({listed})."
