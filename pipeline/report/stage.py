"""The stage `report`: the page of one configuration, from what is in the results folder.

Writes report/<config name>/ index.html, figures/*.svg|png|pdf, tables/*.csv.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import report, stage
from pipeline.config import UNTRAINED, Config
from pipeline.identity import crc32c, digest

if TYPE_CHECKING:
    from pipeline.plan import Plan, Step

VERSION = 1


def settings(wanted: Config) -> dict[str, Any]:
    """A page is cheap: another title, template or line of code makes it again."""
    code = sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".j2", ".css"))
    return {
        "report": wanted.report.model_dump(),
        "name": wanted.name,
        "code": hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest(),
    }


def run(plan: Plan, step: Step) -> None:
    began = stage.begin(plan, step)
    out = (plan.results / step.manifest).parent.parent
    comparisons = []
    for dissected in plan.of_stage("dissect"):
        assert dissected.dataset is not None and dissected.network is not None
        if not dissected.network.endswith(UNTRAINED):
            permuted = plan.manifest(dissected).result["control_images"]
            known = dissected.network + UNTRAINED
            control = known if known in plan.networks else None
            comparisons.append(report.Comparison(dissected.dataset, dissected.network, control, permuted))
    ids = {other.name: other.id for other in plan.steps.values() if other.stage != "report"}
    configuration = json.loads(plan.config.model_dump_json(exclude_defaults=True))
    report.build(
        plan.results,
        out,
        plan.config.report.title or plan.config.name,
        comparisons,
        stage.provenance() | {"ids": ids, "configuration": configuration},
        top_images=plan.config.report.top_images,
        cards=plan.config.report.cards,
    )
    files = {}
    for path in [out / "index.html", *sorted((out / "figures").iterdir()), *sorted((out / "tables").iterdir())]:
        data = path.read_bytes()
        files[path.relative_to(out).as_posix()] = (len(data), crc32c(data))
    stage.finish(plan, step, began, digest(files), files)


def discard(plan: Plan, step: Step) -> list[Path]:
    """The files and folders that this step made."""
    out = (plan.results / step.manifest).parent.parent
    return [out / "index.html", out / "figures", out / "tables"]
