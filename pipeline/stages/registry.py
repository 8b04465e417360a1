"""The one list of stages, parents before children. A new stage is a folder beside this file and a line here."""

import importlib
import os
from collections.abc import Iterator

from pipeline.plan import job
from pipeline.plan.job import Job
from pipeline.plan.stage import Stage
from pipeline.plan.step import Plan
from pipeline.stages.ablate.stage import STAGE as ABLATE
from pipeline.stages.attack.stage import STAGE as ATTACK
from pipeline.stages.attribute.stage import STAGE as ATTRIBUTE
from pipeline.stages.audit.stage import STAGE as AUDIT
from pipeline.stages.calibrate.stage import STAGE as CALIBRATE
from pipeline.stages.concepts.stage import STAGE as CONCEPTS
from pipeline.stages.dissect.stage import STAGE as DISSECT
from pipeline.stages.extract.stage import STAGE as EXTRACT
from pipeline.stages.grams.stage import STAGE as GRAMS
from pipeline.stages.ingest.stage import STAGE as INGEST
from pipeline.stages.intervene.stage import STAGE as INTERVENE
from pipeline.stages.network.stage import STAGE as NETWORK
from pipeline.stages.probes.stage import STAGE as PROBES
from pipeline.stages.randomize.stage import STAGE as RANDOMIZE
from pipeline.stages.report.stage import STAGE as REPORT
from pipeline.stages.sight.stage import STAGE as SIGHT
from pipeline.stages.similarity.stage import STAGE as SIMILARITY
from pipeline.stages.visualize.stage import STAGE as VISUALIZE

ADDED = "MICROTOME_STAGES"
"""Environment variable, for tests: stages of other modules, `module:NAME` with commas between, before the report."""


def _added() -> Iterator[Stage]:
    for entry in filter(None, os.environ.get(ADDED, "").split(",")):
        module, _, name = entry.partition(":")
        yield getattr(importlib.import_module(module), name)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        INGEST,
        CONCEPTS,
        RANDOMIZE,
        NETWORK,
        EXTRACT,
        DISSECT,
        ABLATE,
        CALIBRATE,
        SIGHT,
        PROBES,
        GRAMS,
        SIMILARITY,
        ATTRIBUTE,
        AUDIT,
        VISUALIZE,
        ATTACK,
        INTERVENE,
        *_added(),
        REPORT,
    )
}


def jobs(plan: Plan, stage: str | None = None) -> Iterator[Job]:
    """Return all jobs of a plan, parents before children, or those of one stage."""
    return job.jobs(plan, STAGES, stage)
