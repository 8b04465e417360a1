"""What the id of a report is made of."""

from __future__ import annotations

from pipeline.config.report import Figures, Report
from pipeline.storage.record import Record


class Settings(Record):
    """The sections `report` and `figures`, names that pages show, and the digest of all that makes pages."""

    report: Report
    figures: Figures
    name: str
    groups: dict[str, str]
    code: str
