"""CSV files of the dissection: units by IoU, and detectors per run, layer and category."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.report.tables import write_table
from pipeline.stages.dissect.counting import LayerCount
from pipeline.stages.dissect.found import COLUMNS, Unit

UNIT_COLUMNS = (*COLUMNS[:6], "iou_over_ceiling", *COLUMNS[6:])


DETECTOR_COLUMNS = ("run", "layer", "units", "category", "detectors", "unique_detectors")


def write_units(file: Path, units: Iterable[Unit]) -> None:
    """Write the units, highest IoU first, with IoU / ceiling as a separate column and blank cells for NaN."""
    columns = [column if column != "iou_over_ceiling" else "share_of_ceiling" for column in UNIT_COLUMNS]
    write_table(file, UNIT_COLUMNS, ([getattr(unit, column) for column in columns] for unit in by_iou(units)))


def detector_rows(runs: Mapping[str, Sequence[LayerCount]]) -> Iterator[Sequence[object]]:
    """Yield detectors and unique detectors of every run (trained, untrained, permuted) and layer.

    The first row of a layer has a blank category and holds its totals; one row per category with detectors follows.
    """
    for run, counts in runs.items():
        for count in counts:
            yield run, count.layer, count.units, "", count.detectors, count.unique
            for category, (detectors, unique) in count.by_category.items():
                yield run, count.layer, count.units, category, detectors, unique


def by_iou(units: Iterable[Unit]) -> list[Unit]:
    """Sort units by IoU, highest first and units without one last; ties keep their order in the network."""
    return sorted(units, key=lambda unit: math.inf if math.isnan(unit.iou) else -unit.iou)
