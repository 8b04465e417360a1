"""CSV files of the report."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.storage.tables import safe


def _cell(value: object) -> object:
    if isinstance(value, str):
        return safe(value)
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def write_table(file: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file in UTF-8, with text made safe for spreadsheets and blank cells for NaN and None."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_cell(value) for value in row] for row in rows)
