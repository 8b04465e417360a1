"""Calibration of plain files, without a workflow: logits or probabilities and labels of any model.

    python -P -m pipeline.calibrate one.npz other.csv --splits 100 --out calibrated

An npz holds `logits` or `probabilities` (image, class) and `labels` (image). A CSV has a header, a column `label`, and
one of numbers for each class: columns that are numbered go by their numbers, others by their order. Where all numbers
are within [0, 1] they are probabilities. One column, or an array (image), holds scores of class 1 of two.
Either may hold `label`, `predicted` and `confidence` (image) in place of scores: measures and methods that need no more
are then those of the confidence, and classes may be names.
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

from kernels.calibration.methods import UNCALIBRATED, uncalibrated
from kernels.calibration.reliability import FLOOR, Predictions, check_labels
from pipeline.config.messages import explain
from pipeline.data.csv_tables import Table, read_table
from pipeline.errors import MicrotomeError, nearest
from pipeline.stages.calibrate import confidences
from pipeline.stages.calibrate.columns import classes_of
from pipeline.stages.calibrate.confidences import Stated
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

    def __len__(self) -> int:
        return len(self.labels)


def read(path: Path) -> Scored | Stated:
    """Read a file of scores, or of confidences alone.

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
        found = kind(path)
        if isinstance(found, Stated):
            return found
        values, labels, probable = found
        said, remarks = read_scores(values, probable)
        return Scored(path.stem, said, check_labels(labels, said.shape[1], len(said)), remarks)
    except ValueError as error:
        raise MicrotomeError(f"{path}: {error}") from None


def _npz(path: Path) -> tuple[np.ndarray, np.ndarray, bool] | Stated:
    try:
        # Opened here, since numpy leaves a damaged file open. An .npy under this name is none.
        with path.open("rb") as opened, zipfile.ZipFile(opened) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            found = dict.fromkeys(names)
            scores = [name for name in NAMES if name in found]
            stated = None if scores else confidences.columns_of(list(found))
            if stated is not None or (len(scores) == 1 and "labels" in found):
                read = stated or (*scores, "labels")
                sizes = (each.file_size for each in archive.infolist() if each.filename.removesuffix(".npy") in read)
                _check_unpacked(path, sum(sizes))
                opened.seek(0)
                with np.load(opened, allow_pickle=False) as file:
                    if stated is not None:
                        unused = [name for name in found if name not in stated]
                        true, predicted, confidence = (file[name] for name in stated)
                        return confidences.stated(path.stem, true, predicted, confidence, unused)
                    return file[scores[0]], file["labels"], scores[0] == "probabilities"
    except OSError as error:
        raise MicrotomeError(f"cannot read {path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, MemoryError) as error:
        raise MicrotomeError(f"{path} is not an npz, or a damaged one: {error}") from None
    hint = "" if "labels" in found else nearest("labels", found)
    raise MicrotomeError(
        f"{path} has the arrays {', '.join(found) or '(none)'}; expected `labels` and one of {', '.join(NAMES)}, "
        f"or `predicted` and `confidence`{hint}"
    )


def _check_unpacked(path: Path, size: int) -> None:
    """Refuse arrays that this machine cannot hold, by what the file says of their bytes, before one is unpacked."""
    if COPIES * size > (there := devices.memory()):
        raise MicrotomeError(
            f"{path} unpacks to {size / 1e9:.3g} GB, which takes {COPIES} times that in memory, and this machine has "
            f"{there / 1e9:.3g} GB: calibrate fewer images at a time"
        )


def _csv(path: Path) -> tuple[np.ndarray, np.ndarray, bool] | Stated:
    table = read_table(path)
    if stated := confidences.columns_of(list(table.columns)):
        *classes, confidence = stated
        unused = [name for name in table.columns if name not in stated]
        true, predicted = (np.array(table.columns[name], str) for name in classes)
        return confidences.stated(path.stem, true, predicted, _numbers(table, confidence), unused)
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


def calibrate(scored: Scored | Stated, section: Calibrate) -> tuple[Whole, dict[str, np.ndarray], list[str]]:
    """Judge a file as it is, and fit the methods; return what came out by split, and the methods."""
    images = fitted_on(section.share, len(scored))
    key = keys([str(row) for row in range(len(scored))])
    splits = [in_two(key, images, split) for split in range(section.splits)]
    try:
        if isinstance(scored, Stated):
            methods = [UNCALIBRATED, *confidences.chosen(section.methods)]
            whole = confidences.whole(scored, section.bins)
            found = [confidences.evaluate(scored, *of, methods, section.bins, at) for at, of in enumerate(splits)]
        else:
            methods = [UNCALIBRATED, *chosen(section.methods, scored.said.shape[1])]
            whole, found = _of_scores(scored, splits, methods, section)
    except ValueError as error:
        raise MicrotomeError(f"{scored.name}: {error}") from None
    return whole, {name: np.stack([one[name] for one in found]) for name in found[0]}, methods


def _of_scores(
    scored: Scored, splits: Sequence[tuple[np.ndarray, np.ndarray]], methods: Sequence[str], section: Calibrate
) -> tuple[Whole, list[dict[str, np.ndarray]]]:
    found = []
    for at, of in enumerate(splits):
        fitted, judged = ((scored.said[rows], scored.labels[rows]) for rows in of)
        found.append(evaluate(*fitted, *judged, methods, section.bins, section.penalty, seed=at))
    as_it_is = Judged.of(uncalibrated, scored.said, scored.labels, section.bins, DRAWS_OF_CLASSES, seed=0)
    return Whole.of([as_it_is]), found


def lines(scored: Scored | Stated, whole: Whole, found: dict[str, np.ndarray], methods: Sequence[str]) -> list[str]:
    """Return what is printed of a file."""
    of, splits = whole.measures, len(found["score"])
    classes = "confidences alone" if isinstance(scored, Stated) else f"{scored.said.shape[1]:,} classes"
    nll = f", NLL {of['nll']:.4f}" if "nll" in of else ""
    head = (
        f"{scored.name}: {len(scored):,} images, {classes}; accuracy "
        f"{of['accuracy']:.2%}, mean confidence {of['mean_confidence']:.2%}{nll}, ECE {of['ece']:.2%} "
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
    if of.get("floored"):
        remarks.append(
            f"{scored.name}: the label of {of['floored']:.2%} of the images has a probability below {FLOOR:g}, which "
            f"counts as {FLOOR:g} in the NLL"
        )
    return [*remarks, head, f"means over {splits} random splits:", *aligned, *outside_of(shown)]


def whole_table(scored: Scored | Stated, whole: Whole) -> bytes:
    """Return a table of one row: the file as it is, over all its images, with the interval and the null of its ECE."""
    classes = "" if isinstance(scored, Stated) else scored.said.shape[1]
    row = {"images": len(scored), "classes": classes}
    row |= {name: number(whole.measures.get(name, np.nan)) for name in OF_ALL}
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
        said = [line.removeprefix("the top level: ") for line in explain(error, Calibrate)]
        sys.exit("\n".join(f"--{line}" for line in said))
    except (MicrotomeError, ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
