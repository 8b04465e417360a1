"""What is asked about a network before any work, and the answer where there is one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """Something to inspect: how messages call it, where its answer is kept, and the request."""

    name: str
    kept: Path
    request: dict[str, Any]

    @property
    def answered(self) -> bool:
        return self.kept.exists()

    @property
    def answer(self) -> dict[str, Any]:
        """What was found; empty where nothing was asked yet."""
        return json.loads(self.kept.read_text()) if self.answered else {}
