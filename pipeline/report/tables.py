"""The report's CSV files: units by IoU, and detectors per run, layer and category."""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.stages.dissect.counting import LayerCount
from pipeline.stages.dissect.found import COLUMNS, Unit

UNIT_COLUMNS = (*COLUMNS[:6], "iou_over_ceiling", *COLUMNS[6:])
DETECTOR_COLUMNS = ("run", "layer", "units", "category", "detectors", "unique_detectors")


def write_units(file: Path, units: Iterable[Unit]) -> None:
    """Write the units, highest IoU first, with IoU / ceiling as a column of its own. NaN is written as a blank cell."""
    columns = [column if column != "iou_over_ceiling" else "share_of_ceiling" for column in UNIT_COLUMNS]
    write_table(file, UNIT_COLUMNS, ([getattr(unit, column) for column in columns] for unit in by_iou(units)))


def detector_rows(runs: Mapping[str, Sequence[LayerCount]]) -> Iterator[Sequence[object]]:
    """Detectors and unique detectors of every run (trained, untrained, permuted) and layer.

    One row per layer with a blank category holds the layer's totals; one row per category that has detectors follows.
    """
    for run, counts in runs.items():
        for count in counts:
            yield run, count.layer, count.units, "", count.detectors, count.unique
            for category, (detectors, unique) in count.by_category.items():
                yield run, count.layer, count.units, category, detectors, unique


def by_iou(units: Iterable[Unit]) -> list[Unit]:
    """Units sorted by IoU, highest first, units without one last; ties by their order in the network."""
    return sorted(units, key=lambda unit: math.inf if math.isnan(unit.iou) else -unit.iou)


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
