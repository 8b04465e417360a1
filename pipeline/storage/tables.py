"""Tables that stages write, as CSV."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.storage.redact import without_home


def number(value: float) -> str:
    """A number as tables show it: seven significant digits, empty where it is not defined."""
    return "" if np.isnan(value) else f"{value:.7g}"


def csv_bytes(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")  # names of files may be no UTF-8


def quarantine_csv(refused: Mapping[str, str], root: Path) -> bytes:
    """The table of refused images: id, path below `root`, reason."""
    rows = (
        [image_id, without_home(str(root / image_id)), without_home(reason)]
        for image_id, reason in sorted(refused.items())
    )
    return csv_bytes(("image_id", "path", "reason"), rows)
