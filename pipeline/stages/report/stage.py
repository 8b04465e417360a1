"""The stage `report`: the pages of one configuration, from what is in the results folder.

Writes report/<config name>/ *.html, figures/*.svg|png|pdf, tables/*.csv, units/*/*.jpg.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.core import Config
from pipeline.plan import job as stage
from pipeline.storage import provenance
from pipeline.storage.identity import crc32c, digest

if TYPE_CHECKING:
    from pipeline.plan.job import Job
    from pipeline.report.experiment import Made

VERSION = 2


def settings(wanted: Config) -> dict[str, Any]:
    """Pages are cheap: another title, template or line of code makes them again."""
    package = Path(__file__).parents[2]
    inside = [path for folder in ("report", "stages") for path in (package / folder).rglob("*")]
    code = sorted(path for path in inside if path.suffix in (".py", ".j2", ".css", ".js"))
    return {
        "report": wanted.report.model_dump(),
        "figures": wanted.figures.model_dump(),
        "name": wanted.name,
        "groups": {name: network.group for name, network in wanted.networks.items() if network.group},
        "code": hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest(),
    }


def run(job: Job) -> None:
    from pipeline.report.experiment import Experiment
    from pipeline.stages.report.site import build, written
    from pipeline.workers.client import client

    job.begin()
    out = job.folder
    with job.workers() as workers:
        site = build(
            Experiment(
                results=job.results,
                out=out,
                title=job.config.report.title or job.config.name,
                made=tuple(made(plan, other) for other in plan.steps.values() if other.stage != "report"),
                configuration=json.loads(job.config.model_dump_json(exclude_defaults=True)),
                versions=provenance.provenance(),
                command=plan.command("report"),
                report=job.config.report,
                figures=job.config.figures,
                workers=workers,
            )
        )
    files = {}
    for name in sorted(set(written(site))):
        data = (out / name).read_bytes()
        files[name] = (len(data), crc32c(data))
    drawn = [
        {"kind": figure.kind, "file": figure.files["svg"], "labels": dict(figure.labels)}
        for page in site
        for figure in page.figures
    ]
    job.finish(digest(files), files, {"figures": drawn})


def made(job: Job) -> Made:
    from pipeline.report.experiment import Made

    manifest = plan.manifest(step)
    return Made(
        step.stage,
        job.dataset,
        job.network,
        step.id,
        manifest.provenance.get("seconds"),
        manifest.result,
        job.experiment,
    )


def discard(job: Job) -> list[Path]:
    """The files and folders that this step made."""
    from pipeline.stages.report.site import FOLDERS

    out = job.folder
    return [*out.glob("*.html"), *(out / folder for folder in FOLDERS)]
