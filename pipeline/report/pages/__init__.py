"""The pages of the stages: `pages/<stage>.py` for each stage that has one, with one function,

    def pages(experiment: Experiment) -> list[Page]

It reads the results folder, writes figures, tables and other files into `experiment.out`, and returns its pages; none,
where the experiment has no such stage. docs/report.md, "Adding a page", shows one.
"""

import importlib

from pipeline.report.experiment import Experiment
from pipeline.report.page import Page

STAGES = ("dissect", "compare", "ablate", "calibrate", "probes", "similarity", "sight", "randomize")
"""The stages with a page, and the comparison of networks, in the order of the report."""


def pages(experiment: Experiment) -> list[Page]:
    """The pages of all stages, in order."""
    return [
        page for stage in STAGES for page in importlib.import_module(f"pipeline.report.pages.{stage}").pages(experiment)
    ]
