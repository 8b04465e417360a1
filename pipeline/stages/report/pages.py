"""The pages of the stages: modules that stages declare, each with one function,

    def pages(experiment: Experiment) -> list[Page]

It reads the results folder, writes figures, tables and other files into `experiment.out`, and returns its pages; none,
where the experiment has no such stage. docs/report.md, "Adding a page", shows one.
"""

import importlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from pipeline.plan import stage
from pipeline.plan.stage import Stage
from pipeline.report.experiment import Experiment
from pipeline.report.page import Page


def declared(stages: Iterable[Stage]) -> list[stage.PageModule]:
    """Return the pages that stages declare, in the order of the report."""
    return sorted((page for each in stages for page in each.pages), key=lambda page: page.position)


def pages(experiment: Experiment, wanted: Sequence[stage.PageModule]) -> list[Page]:
    """Make the pages, in order. Drawing takes longest: the workers do it while this process draws, too."""
    alone = replace(experiment, workers=None)
    tasks = [(page.module, alone) for page in wanted if not page.here]
    with ThreadPoolExecutor(1) as background:
        others = background.submit(lambda: dict(experiment.map(of_module, tasks, "report: pages")))
        here = dict(of_module(page.module, experiment) for page in wanted if page.here)
        made = here | others.result()
    return [each for page in wanted for each in made[page.module]]


def of_module(name: str, experiment: Experiment) -> tuple[str, list[Page]]:
    """Return the name of a module, and its pages."""
    return name, importlib.import_module(name).pages(experiment)


def templates(wanted: Sequence[stage.PageModule]) -> list[Path]:
    """Return the folders `templates` beside the modules of pages."""
    files = (importlib.import_module(page.module).__file__ for page in wanted)
    return [folder for file in files if file is not None and (folder := Path(file).parent / "templates").is_dir()]
