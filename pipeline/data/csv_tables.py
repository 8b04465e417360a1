"""CSV tables with one row per image, read as columns; every error names its line."""

import csv
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import MicrotomeError, nearest

IMAGE_COLUMNS = ("image_id", "image", "path", "file")
LABEL_COLUMNS = ("label", "class_index", "class")
SPLIT_COLUMNS = ("split",)
SAMPLE = 100  # rows by which one of several columns of images is chosen


@dataclass(frozen=True)
class Table:
    """A CSV table in UTF-8 with a header. Column names are in lower case; `lines` holds the line of each row.

    `used` collects the names of the columns that were asked for.
    """

    path: Path
    lines: list[int]
    columns: dict[str, list[str]]
    used: set[str] = field(default_factory=set)

    def find(self, names: Sequence[str]) -> str | None:
        """Return the first of these columns that exists, or None."""
        return next((name for name in names if name in self.columns), None)

    def column(self, names: Sequence[str]) -> str:
        """Return the first of these columns that exists, or raise `MicrotomeError`."""
        found = self.find(names)
        if found is None:
            there = ", ".join(self.columns) or "(none)"
            raise MicrotomeError(f"{self.path} has the columns {there}; expected one of {', '.join(names)}")
        self.used.add(found)
        return found

    def images(self, is_image: Callable[[str], bool]) -> list[str]:
        """Return the image of each row, as written; no image may appear twice.

        Of several columns of images, the one is taken in which most of the first rows satisfy `is_image`.
        """
        there = [name for name in IMAGE_COLUMNS if name in self.columns]
        if len(there) > 1:
            there.sort(key=lambda name: -sum(map(is_image, self.columns[name][:SAMPLE])))  # stable: else the first
        images = self.columns[self.column(there or IMAGE_COLUMNS)]
        if len(set(images)) < len(images):
            first: dict[str, int] = {}
            for line, image in zip(self.lines, images, strict=True):
                if first.setdefault(image, line) != line:
                    raise MicrotomeError(f"{self.line(line)} names {image!r} again, first on line {first[image]}")
        return images

    def values(self, names: Sequence[str]) -> list[str]:
        """Return the values of a column without surrounding space; none may be empty."""
        name = self.column(names)
        values = [value.strip() for value in self.columns[name]]
        if "" in values:
            at = values.index("")
            image = self.columns[self.column(IMAGE_COLUMNS)][at]
            raise MicrotomeError(f"{self.line(self.lines[at])} has an empty {name!r} for {image!r}")
        return values

    @property
    def unused(self) -> list[str]:
        """Return the names of the columns that were not asked for."""
        return [name or "(a column without a name)" for name in self.columns if name not in self.used]

    def line(self, number: int) -> str:
        return f"line {number} of {self.path}"


def read_table(path: Path) -> Table:
    """Read a CSV; raise `MicrotomeError` if it is not one, or a row does not have one field per column."""
    lines: list[int] = []
    rows: list[list[str]] = []
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            width = len(header)
            for cells in reader:
                if len(cells) != width:
                    if not cells:
                        continue
                    raise MicrotomeError(
                        f"line {reader.line_num} of {path} has {len(cells)} fields, its header {width}"
                    )
                lines.append(reader.line_num)
                rows.append(cells)
    except OSError as error:
        raise MicrotomeError(f"cannot read {path}: {error.strerror or error}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise MicrotomeError(f"{path} is not a CSV in UTF-8: {error}") from error
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise MicrotomeError(f"{path} has two columns {twice!r}; rename one")
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in header]
    return Table(Path(path), lines, dict(zip(header, columns, strict=True)))


class Tables(dict[Path, Table]):
    """The tables of one data set, each read once; so a column that any of its uses needs counts as used."""

    def __missing__(self, path: Path) -> Table:
        self[path] = read_table(path)
        return self[path]

    def notices(self) -> list[str]:
        """Return a line on the columns of each table that are not used."""
        return [f"{path.name}: not used: {', '.join(table.unused)}" for path, table in self.items() if table.unused]


def composed(name: str) -> str:
    """Return a name in Unicode's composed form (NFC): macOS decomposes the names of files."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def rows_of(table: Table, image_ids: Sequence[str], what: str) -> list[int]:
    """Return the row of each image; every row must name a listed image, and every image must have a row."""
    known = set(image_ids)
    form = {composed(image): image for image in image_ids}

    def listed(image: str) -> str:
        return image if image in known else form.get(composed(image), image)

    images = [listed(image) for image in table.images(lambda image: listed(image) in known)]
    row_of: dict[str, int] = {}
    for row, image in enumerate(images):
        if (first := row_of.setdefault(image, row)) != row:
            raise MicrotomeError(
                f"{table.line(table.lines[row])} names {image!r} again, first on line {table.lines[first]}"
            )
    unknown = next((image for image in images if image not in known), None)
    if unknown is not None:
        hint = nearest(unknown, image_ids) if len(known) <= 10_000 else ""  # it compares with every name
        line = table.line(table.lines[row_of[unknown]])
        raise MicrotomeError(f"{line} names {unknown!r}, which is not an image of the data set{hint}")
    missing = [image_id for image_id in image_ids if image_id not in row_of]
    if missing:
        n = len(missing)
        raise MicrotomeError(
            f"{n:,} images have no {what} in {table.path}, the first is {missing[0]!r}; add their rows"
        )
    return [row_of[image_id] for image_id in image_ids]
