"""A question to the inspection about a network, and its cached answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """Something to inspect: its name in messages, the file of its answer, and the request."""

    name: str
    kept: Path
    request: dict[str, Any]

    @property
    def answered(self) -> bool:
        return self.kept.exists()

    @property
    def answer(self) -> dict[str, Any]:
        """What the inspection found; empty if it has not run."""
        return json.loads(self.kept.read_text()) if self.answered else {}
