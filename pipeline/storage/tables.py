"""CSV tables that stages write."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.storage.redact import without_home


def number(value: float) -> str:
    """Return a number as tables show it: seven significant digits, empty if it is undefined (NaN)."""
    return "" if np.isnan(value) else f"{value:.7g}"


def csv_bytes(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")  # file names may not be UTF-8


def quarantine_csv(refused: Mapping[str, str], root: Path) -> bytes:
    """Return the table of refused images: id, path below `root`, reason."""
    rows = (
        [image_id, without_home(str(root / image_id)), without_home(reason)]
        for image_id, reason in sorted(refused.items())
    )
    return csv_bytes(("image_id", "path", "reason"), rows)
