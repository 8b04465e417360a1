"""CSV files of the report."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path


def safe(text: str) -> str:
    """Return text from data as a CSV cell that no spreadsheet evaluates as a formula.

    Spreadsheets evaluate a cell that starts with =, +, -, @, a tab or a line break; an apostrophe before it prevents
    that.
    """
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") else text


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
