"""What `report` says in its manifest: every figure, for Snakemake's report."""

from __future__ import annotations

from pipeline.storage.manifest import Manifest
from pipeline.storage.record import Record


class Drawn(Record):
    """A figure: its kind, its SVG file in the report's folder, and what it shows."""

    kind: str
    file: str
    labels: dict[str, str]


class Shown(Record):
    """What the manifest of `report` says."""

    figures: list[Drawn]

    @classmethod
    def of(cls, manifest: Manifest) -> Shown:
        return cls.read(manifest.result)
