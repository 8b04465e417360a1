"""The stage `report`: the pages of one configuration, from what is in the results folder.

Writes report/<config name>/ *.html, figures/*.svg|png|pdf, tables/*.csv, units/*/*.jpg, attributions/*/*.jpg, and
<dataset>/<network>/accuracy.csv.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.plan.job import Job
from pipeline.plan.stage import Draft, Stage, Wanted
from pipeline.plan.step import Key
from pipeline.stages.report.results import Drawn, Shown
from pipeline.stages.report.settings import Settings
from pipeline.storage.identity import crc32c, digest
from pipeline.storage.provenance import provenance

VERSION = 2


def steps(draft: Draft) -> Iterator[Wanted]:
    paged = sorted((stage for stage in draft.stages.values() if stage.pages), key=lambda stage: stage.pages[0].position)
    names = ("network", *(stage.name for stage in paged))
    parents = [step for name in names for step in draft.of_stage(name)]
    # Else the report would not read what is known of networks that are not dissected.
    dissected = {step.key for step in draft.of_stage("dissect")}
    parents += [step for step in draft.of_stage("extract") if step.key not in dissected]
    yield Wanted(Key(), settings_of(draft), tuple(parents))


def settings_of(draft: Draft) -> Settings:
    """Return what the id is made of. Pages are cheap: another title, template or line of code makes them again."""
    package, config = Path(__file__).parents[2], draft.config
    inside = [path for folder in ("report", "stages") for path in (package / folder).rglob("*")]
    code = sorted(path for path in inside if path.suffix in (".py", ".j2", ".css", ".js"))
    return Settings(
        report=config.report,
        figures=config.figures,
        name=config.name,
        groups={name: network.group for name, network in config.networks.items() if network.group},
        code=hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest(),
    )


def run(job: Job[Settings]) -> None:
    from pipeline.report.experiment import Experiment, Made
    from pipeline.stages.report.pages import declared
    from pipeline.stages.report.site import build, written

    job.begin()
    out = job.folder
    with job.workers() as workers:
        experiment = Experiment(
            results=job.results,
            out=out,
            title=job.config.report.title or job.config.name,
            made=tuple(map(Made.of, behind(job))),
            configuration=json.loads(job.config.model_dump_json(exclude_defaults=True)),
            versions=provenance(),
            command=job.command,
            report=job.config.report,
            figures=job.config.figures,
            workers=workers,
            accuracies=accuracies(job),
        )
        site = build(experiment, declared(job.stages.values()))
    files = {}
    for name in sorted(set(written(site))):
        data = (out / name).read_bytes()
        files[name] = (len(data), crc32c(data))
    drawn = [
        Drawn(kind=figure.kind, file=figure.files["svg"], labels=dict(figure.labels))
        for page in site
        for figure in page.figures
    ]
    job.finish(digest(files), files, Shown(figures=drawn))


def accuracies(job: Job) -> dict[tuple[str, str], Any]:
    """Measure how often the networks behind a report are right, by (data set, network); write their `accuracy.csv`."""
    from pipeline.stages.report.accuracy import write_accuracy

    found = {(of.dataset, of.network): write_accuracy(of) for of in behind(job) if of.stage.name == "extract"}
    return {pair: one for pair, one in found.items() if one is not None}


def behind(job: Job) -> list[Job]:
    """Return the jobs that a report is made from: its parents, theirs, and so on, in the order of the plan."""
    found: set[Path] = set()
    new = [job]
    while new:
        parents = {parent.manifest: parent for each in new for parent in each.parents}
        new = [parent for path, parent in parents.items() if path not in found]
        found |= parents.keys()
    return [each for each in job.jobs() if each.manifest in found]


def made(job: Job) -> list[Path]:
    from pipeline.stages.report.site import FOLDERS

    return [*job.folder.glob("*.html"), *(job.folder / folder for folder in FOLDERS)]


STAGE = Stage(
    name="report",
    version=VERSION,
    says="Report",
    place="report",
    steps=steps,
    run=run,
    settings=Settings,
    made=made,
)
