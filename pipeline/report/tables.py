"""The report's CSV files: units by IoU, and detectors per run, layer and category."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path


def safe(text: str) -> str:
    """A text from data as a CSV cell that no spreadsheet takes for a formula.

    A leading =, +, -, @, tab or line break makes spreadsheets evaluate a cell; an apostrophe before it prevents that.
    """
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") else text


def _cell(value: object) -> object:
    if isinstance(value, str):
        return safe(value)
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def write_table(file: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV in UTF-8. Text is made safe for spreadsheets; NaN and None are blank cells."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_cell(value) for value in row] for row in rows)
