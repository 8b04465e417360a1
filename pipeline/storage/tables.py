"""CSV tables that stages write."""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.storage.redact import without_home

# A cell that a spreadsheet takes for a formula, after any apostrophes; and a number as text, which it takes for one.
FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
NUMBER = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf|nan)")


def safe(text: str) -> str:
    """Return text from data as a CSV cell that no spreadsheet evaluates as a formula; numbers stay as they are.

    Spreadsheets evaluate a cell that starts with =, +, -, @, a tab or a line break; an apostrophe before it prevents
    that. `plain` takes it away.
    """
    return f"'{text}" if FORMULA.match(text) and not NUMBER.fullmatch(text) else text


def plain(cell: str) -> str:
    """Return the text that `safe` made a cell of."""
    return cell[1:] if cell[:1] == "'" and FORMULA.match(cell) else cell


def read_rows(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a table as `csv_bytes` wrote it, by column, with the text that its cells were made of."""
    for row in csv.DictReader(lines):
        yield {name: plain(cell) if isinstance(cell, str) else cell for name, cell in row.items()}


def number(value: float) -> str:
    """Return a number as tables show it: seven significant digits, empty if it is undefined (NaN)."""
    return "" if np.isnan(value) else f"{value:.7g}"


def csv_bytes(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> bytes:
    """Return a table in UTF-8, with text made `safe` for spreadsheets."""
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    for row in rows:
        cells = [safe(cell) if isinstance(cell, str) else cell for cell in row]
        if any("\r" in cell for cell in cells if isinstance(cell, str)):
            text.write(_with_returns(cells))
        else:
            table.writerow(cells)
    return text.getvalue().encode("utf-8", "surrogateescape")  # file names may not be UTF-8


def _with_returns(cells: Iterable[Any]) -> str:
    """Return a line whose cells hold carriage returns: Python before 3.13 quotes only those of its own line ends."""
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue().removesuffix("\r\n") + "\n"


def quarantine_csv(refused: Mapping[str, str], root: Path) -> bytes:
    """Return the table of refused images: id, path below `root`, reason."""
    rows = (
        [image_id, without_home(str(root / image_id)), without_home(reason)]
        for image_id, reason in sorted(refused.items())
    )
    return csv_bytes(("image_id", "path", "reason"), rows)
