"""The pages of the stages: `pages/<stage>.py` for each stage that has one, with one function,

    def pages(experiment: Experiment) -> list[Page]

It reads the results folder, writes figures, tables and other files into `experiment.out`, and returns its pages; none,
where the experiment has no such stage. docs/report.md, "Adding a page", shows one.
"""

import importlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pipeline.report.experiment import Experiment
from pipeline.report.page import Page

STAGES = ("dissect", "compare", "ablate", "calibrate", "probes", "similarity", "sight", "randomize")
"""The stages with a page, and the comparison of networks, in the order of the report."""
HERE = "dissect"
"""Its pages are made in this process, with pictures of units from the workers; those of the others are, on a worker."""


def pages(experiment: Experiment) -> list[Page]:
    """The pages of all stages, in order. Drawing takes longest: the workers do it while this process draws, too."""
    alone = replace(experiment, workers=None)
    tasks = [(stage, alone) for stage in STAGES if stage != HERE]
    with ThreadPoolExecutor(1) as background:
        others = background.submit(lambda: dict(experiment.map(of_stage, tasks, "report: pages")))
        made = dict([of_stage(HERE, experiment)]) | others.result()
    return [page for stage in STAGES for page in made[stage]]


def of_stage(stage: str, experiment: Experiment) -> tuple[str, list[Page]]:
    """A stage and its pages."""
    name = "dissect.compare_page" if stage == "compare" else f"{stage}.page"
    return stage, importlib.import_module(f"pipeline.stages.{name}").pages(experiment)
