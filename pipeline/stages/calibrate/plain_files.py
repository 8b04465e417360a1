"""Calibration of plain files, without a workflow: logits or probabilities and labels of any model.

    python -P -m pipeline.calibrate one.npz other.csv --splits 100 --out calibrated

An npz holds `logits` or `probabilities` (image, class) and `labels` (image). A CSV has a header, a column `label`, and
one of numbers for each class: columns that are numbered go by their numbers, others by their order. Where all numbers
are within [0, 1] they are probabilities. One column, or an array (image), holds scores of class 1 of two.
Nothing in a file is executed. Prints for each file the errors as it is, and a table of the methods; with `--out` writes
<name>/calibration.csv and <name>/calibration-bins.csv, as the stage does, and <name>/calibration-all.csv: the ECE of
all images as they are, with its interval.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from pydantic import ValidationError

from kernels.calibration.methods import uncalibrated
from kernels.calibration.reliability import FLOOR, Predictions, check_labels
from pipeline.config.messages import explain
from pipeline.data.csv_tables import Table, read_table
from pipeline.errors import MicrotomeError, nearest
from pipeline.stages.calibrate.columns import classes_of
from pipeline.stages.calibrate.results import Whole, summary, tables
from pipeline.stages.calibrate.scores import outside_of, read_scores
from pipeline.stages.calibrate.settings import Calibrate, Calibration
from pipeline.stages.calibrate.tasks import DRAWS_OF_CLASSES, Judged, chosen, evaluate, fitted_on, in_two, keys
from pipeline.storage.atomic import write_atomically
from pipeline.storage.tables import csv_bytes, number
from pipeline.workers import devices

NAMES = ("logits", "probabilities")
WHOLE = "calibration-all.csv"
OF_ALL = ("accuracy", "mean_confidence", "nll", "ece", "ece_low", "ece_high", "ece_null_high")
COPIES = 4  # of what was read, in the precision that is computed in: float32 becomes float64, and its logarithm
SHOWN = ("accuracy", "ece", "ece_2.5", "ece_97.5", "ece_low", "ece_high", "ece_null_high", "nll", "brier")


@dataclass(frozen=True)
class Scored:
    """What a file says of (image, class), and labels (image), checked; `remarks` on how it was read."""

    name: str
    said: Predictions
    labels: np.ndarray
    remarks: list[str]


def read(path: Path) -> Scored:
    """Read a file of scores.

    Raises
    ------
    MicrotomeError
        When it is no such file, or holds a value that cannot be right: with the row.
    """
    kinds = {".npz": _npz, ".csv": _csv}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise MicrotomeError(f"{path} is neither .npz nor .csv")
    try:
        values, labels, probable = kind(path)
        said, remarks = read_scores(values, probable)
        return Scored(path.stem, said, check_labels(labels, said.shape[1], len(said)), remarks)
    except ValueError as error:
        raise MicrotomeError(f"{path}: {error}") from None


def _npz(path: Path) -> tuple[np.ndarray, np.ndarray, bool]:
    try:
        # Opened here, since numpy leaves a damaged file open. An .npy under this name is none.
        with path.open("rb") as opened, zipfile.ZipFile(opened) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            found = dict.fromkeys(names)
            scores = [name for name in NAMES if name in found]
            if len(scores) == 1 and "labels" in found:
                read = (*scores, "labels")
                sizes = (each.file_size for each in archive.infolist() if each.filename.removesuffix(".npy") in read)
                _check_unpacked(path, sum(sizes))
                opened.seek(0)
                with np.load(opened, allow_pickle=False) as file:
                    return file[scores[0]], file["labels"], scores[0] == "probabilities"
    except OSError as error:
        raise MicrotomeError(f"cannot read {path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, MemoryError) as error:
        raise MicrotomeError(f"{path} is not an npz, or a damaged one: {error}") from None
    hint = "" if "labels" in found else nearest("labels", found)
    raise MicrotomeError(
        f"{path} has the arrays {', '.join(found) or '(none)'}; expected `labels` and one of {', '.join(NAMES)}{hint}"
    )


def _check_unpacked(path: Path, size: int) -> None:
    """Refuse arrays that this machine cannot hold, by what the file says of their bytes, before one is unpacked."""
    if COPIES * size > (there := devices.memory()):
        raise MicrotomeError(
            f"{path} unpacks to {size / 1e9:.3g} GB, which takes {COPIES} times that in memory, and this machine has "
            f"{there / 1e9:.3g} GB: calibrate fewer images at a time"
        )


def _csv(path: Path) -> tuple[np.ndarray, np.ndarray, bool]:
    table = read_table(path)
    label = table.column(("label",))
    if "" in table.columns:
        raise MicrotomeError(f"{path} has a column without a name: name it, or leave it out if it numbers the rows")
    names = [name for name in table.columns if name != label]
    columns, labels = {name: _numbers(table, name) for name in names}, _numbers(table, label)
    try:
        order, first = classes_of(columns, labels)
    except ValueError as error:
        raise MicrotomeError(f"{path}: {error}") from None
    numbers = np.stack([columns[name] for name in order], axis=1) if order else np.empty((len(labels), 0))
    probable = bool(order) and bool(((numbers >= 0) & (numbers <= 1)).all())
    return numbers, labels - first, probable


def _numbers(table: Table, column: str) -> np.ndarray:
    """(row) float64."""
    found = np.empty(len(table.lines))
    for row, text in enumerate(table.columns[column]):
        try:
            if "_" in text:  # Python's own way to write 1000
                raise ValueError
            found[row] = float(text)
        except ValueError:
            where = table.line(table.lines[row])
            raise MicrotomeError(f"{where}: {text!r} in column {column!r} is not a number") from None
    return found


def calibrate(scored: Scored, section: Calibrate) -> tuple[Whole, dict[str, np.ndarray], list[str]]:
    """Judge a file as it is, and fit the methods; return what came out by split, and the methods."""
    methods = ["uncalibrated", *chosen(section.methods, scored.said.shape[1])]
    images = fitted_on(section.share, len(scored.labels))
    key = keys([str(row) for row in range(len(scored.labels))])
    found = []
    for split in range(section.splits):
        to_fit, to_judge = in_two(key, images, split)
        fitted, judged = ((scored.said[rows], scored.labels[rows]) for rows in (to_fit, to_judge))
        try:
            found.append(evaluate(*fitted, *judged, methods, section.bins, section.penalty, seed=split))
        except ValueError as error:
            raise MicrotomeError(f"{scored.name}: {error}") from None
    as_it_is = Judged.of(uncalibrated, scored.said, scored.labels, section.bins, DRAWS_OF_CLASSES, seed=0)
    whole = Whole.of([as_it_is])
    return whole, {name: np.stack([one[name] for one in found]) for name in found[0]}, methods


def lines(scored: Scored, whole: Whole, found: dict[str, np.ndarray], methods: Sequence[str]) -> list[str]:
    """Return what is printed of a file."""
    of, splits = whole.measures, len(found["score"])
    head = (
        f"{scored.name}: {len(scored.labels):,} images, {scored.said.shape[1]:,} classes; accuracy "
        f"{of['accuracy']:.2%}, mean confidence {of['mean_confidence']:.2%}, NLL {of['nll']:.4f}, ECE {of['ece']:.2%} "
        f"[{of['ece_low']:.2%}, {of['ece_high']:.2%}]; a calibrated model would show up to {of['ece_null_high']:.2%}"
    )
    means = summary(found["score"], methods)
    rows = [["", *SHOWN]]
    for row in means:
        rows.append([str(row["method"]), *("" if np.isnan(row[name]) else f"{row[name]:.4f}" for name in SHOWN)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        row[0].ljust(widths[0])
        + "".join(f"  {cell.rjust(width)}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    shown = [("as it is", of["ece"], of["ece_low"], of["ece_high"])]
    shown += [(f"{row['method']}, mean", row["ece"], row["ece_low"], row["ece_high"]) for row in means]
    remarks = [f"{scored.name}: {remark}" for remark in scored.remarks]
    if of["floored"]:
        remarks.append(
            f"{scored.name}: the label of {of['floored']:.2%} of the images has a probability below {FLOOR:g}, which "
            f"counts as {FLOOR:g} in the NLL"
        )
    return [*remarks, head, f"means over {splits} random splits:", *aligned, *outside_of(shown)]


def whole_table(scored: Scored, whole: Whole) -> bytes:
    """Return a table of one row: the file as it is, over all its images, with the interval and the null of its ECE."""
    images, classes = len(scored.labels), scored.said.shape[1]
    row = {"images": images, "classes": classes} | {name: number(whole.measures[name]) for name in OF_ALL}
    return csv_bytes(row, [row.values()])


def main(arguments: Sequence[str] | None = None) -> None:
    known, default = get_args(Calibration), Calibrate()
    parser = argparse.ArgumentParser(
        "python -P -m pipeline.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--methods", nargs="+", choices=known, metavar="METHOD", help=", ".join(known))
    parser.add_argument("--splits", type=int, default=default.splits)
    parser.add_argument("--share", type=float, default=default.share, help="of the images, to fit on")
    parser.add_argument("--bins", type=int, default=default.bins)
    parser.add_argument("--penalty", type=float, default=default.penalty, help="of matrix_odir")
    parser.add_argument("--out", type=Path, help="folder for the tables")
    given = vars(parser.parse_args(arguments))
    files, out = given.pop("files"), given.pop("out")
    try:
        section = Calibrate(**given)
        twice = next((path for path in files if out and [other.stem for other in files].count(path.stem) > 1), None)
        if twice:
            raise MicrotomeError(f"there are several files {twice.stem!r}: their tables would be written to one folder")
        for path in files:
            scored = read(path)
            whole, found, methods = calibrate(scored, section)
            print("\n".join(lines(scored, whole, found, methods)), flush=True)
            written = {WHOLE: whole_table(scored, whole), **tables(found, methods, whole)} if out else {}
            for name, data in written.items():
                write_atomically(out / scored.name / name, data)
    except ValidationError as error:
        said = [explain(item, Calibrate).removeprefix("the top level: ") for item in error.errors(include_url=False)]
        sys.exit("\n".join(f"--{line}" for line in said))
    except (MicrotomeError, ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
