"""Delete a stage's outputs on purpose. (`snakemake --forcerun` only checks the shards again.)"""

from __future__ import annotations

from pipeline.config.core import Core
from pipeline.errors import MicrotomeError, nearest
from pipeline.run import planner
from pipeline.stages.registry import STAGES, jobs
from pipeline.storage.store import remove


def discard(config: Core, stage: str) -> list[str]:
    """Remove everything that a stage made for a configuration; return one line per file or folder.

    Steps that read it are recomputed only if its new output differs. Layers are shared: another network with the same
    layers has them recomputed too.
    """
    if stage not in STAGES:
        raise MicrotomeError(f"no stage {stage!r}{nearest(stage, STAGES)}; there are: {', '.join(STAGES)}")
    removed = []
    for job in jobs(planner.make(config), stage):
        for path in job.stage.made(job):
            if path.exists():
                remove(path) if path.is_dir() else path.unlink()
                removed.append(f"removed {path}")
        for manifest in job.manifest.parent.glob(f"{stage}.*.json"):
            manifest.unlink()
            removed.append(f"removed {manifest}")
    return removed
