"""Throwing away on purpose what a stage made. (`snakemake --forcerun` only checks its shards again.)"""

from __future__ import annotations

from pipeline.config.core import Config
from pipeline.errors import MicrotomeError, nearest
from pipeline.plan import step as plan
from pipeline.storage.store import remove


def discard(wanted: Config, stage: str) -> list[str]:
    """Remove everything that a stage made for a configuration; return one line for each file or folder.

    Steps that read it are made again only where the new output differs. Layers are shared: another network with the
    same layers has them made again too.
    """
    if stage not in plan.STAGES:
        raise MicrotomeError(f"no stage {stage!r}{nearest(stage, plan.STAGES)}; there are: {', '.join(plan.STAGES)}")
    made = plan.make(wanted)
    removed = []
    for step in made.of_stage(stage):
        for path in plan.STAGES[stage].discard(made, step):
            if path.exists():
                remove(path) if path.is_dir() else path.unlink()
                removed.append(f"removed {path}")
        for manifest in (made.results / step.manifest).parent.glob(f"{stage}.*.json"):
            manifest.unlink()
            removed.append(f"removed {manifest}")
    return removed
