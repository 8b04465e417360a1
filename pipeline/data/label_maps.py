"""Label maps on disk (PNG images whose pixels are class indices), read as concept numbers aligned with their images."""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.decode import Geometry, Refused, opened, transform_label_map, turn_upright
from pipeline.errors import MicrotomeError, nearest

LARGEST = 2**16 - 1  # largest index in a 16-bit PNG, and largest concept number
ID_COLUMNS = ("id", "idx", "index")
INDEX_MODES = ("1", "L", "P", "I;16", "I")  # Pillow's modes; older releases had "I" for 16 bits
GREY_STEPS = {"L;2": 85, "L;4": 17}  # Pillow spreads grey of 2 and 4 bits over 0 to 255


@dataclass(frozen=True)
class ClassList:
    """The meaning of the indices in a category's label maps.

    path: the file the list was read from, for messages.
    names: index in the files -> name of the concept.
    void: indices that mean nothing (unlabelled, border); they need no name, and if they have one, it is not a concept.
    """

    path: Path
    names: Mapping[int, str]
    void: frozenset[int]

    def concepts(self) -> dict[int, str]:
        """Return index -> name of all concepts, in order of index."""
        return {index: self.names[index] for index in sorted(self.names) if index not in self.void}

    def lookup(self, numbers: Mapping[str, int]) -> np.ndarray:
        """Return int32 (65536,): the concept number of every index; 0 for void, -1 for an index that is not listed.

        numbers: name -> concept number, 1 to 65535, for every name in `concepts()`.
        """
        table = np.full(LARGEST + 1, -1, np.int32)
        for index, name in self.concepts().items():
            number = numbers.get(name, 0)
            if not 1 <= number <= LARGEST:
                raise MicrotomeError(
                    f"concept {name!r} of {self.path} has the number {number}; expected 1 to {LARGEST}"
                )
            table[index] = number
        table[list(self.void)] = 0
        return table


def decode_label_map(
    path: Path | str,
    classes: ClassList,
    lookup: np.ndarray,
    geometry: Geometry,
    image_size: tuple[int, int],
    max_pixels: int,
) -> np.ndarray:
    """Return uint16 (height, width): the concept number at each pixel of the transformed image, 0 for nothing.

    lookup: from `classes.lookup(numbers)`, made once. image_size: (height, width) of the upright image (`size_of`).

    Raises `Refused`: as `read_label_map`; an index that is not in the class list; a shape that differs from the
    image's.
    """
    try:
        indices = read_label_map(path, max_pixels)
        numbers = lookup[indices]
        if numbers.min() < 0:
            y, x = np.unravel_index(np.argmin(numbers), numbers.shape)
            known = f"{classes.path.name} ({min(classes.names)} to {max(classes.names)})"
            raise Refused(f"index {indices[y, x]} at row {y}, column {x} is neither in {known} nor void")
        return transform_label_map(numbers.astype(np.uint16), geometry, image_size)
    except Refused as error:
        raise Refused(f"label map {Path(path).name}: {error.reason}") from error


def read_label_map(path: Path | str, max_pixels: int) -> np.ndarray:
    """Return uint16 (height, width): the indices stored in a PNG of grey (1 to 16 bits) or palette colours, upright.

    Indices are read as stored: palettes are not looked up, and grey of few bits is not spread over 0 to 255.

    Raises `Refused`: not a PNG, colours instead of indices, or as `pipeline.data.decode.decode`.
    """
    with opened(path, ("PNG",), max_pixels) as image:
        mode, raw_mode = image.mode, str(image.tile[0][3])
        image.load()
        indices = np.asarray(turn_upright(image, image))
    if mode not in INDEX_MODES:
        raise Refused(f"colours ({mode}); expected one index per pixel, as grey or palette")
    return (indices // GREY_STEPS.get(raw_mode, 1)).astype(np.uint16)


@dataclass(frozen=True)
class Row:
    """One class of a list; `category` is empty if the list has no such column."""

    line: int
    index: str
    name: str
    category: str = ""


def read_class_list(path: Path | str, void: Iterable[int] = (), category: str | None = None) -> ClassList:
    """Read the names of the indices of label maps, or of the channels of a segmentation network.

    A file that ends in .csv has a header with one of `ID_COLUMNS` and `name`. Of synonyms, such as `building;edifice`,
    the first is the name, unless another class has it too. In any other file, every line is `id name` (if the first
    line begins with a number), or a name alone, numbered from 0 in line order. Headings `-- 13 person --` with lines `1
    head` below them, as in ADE20K's list of parts, give `person head`.

    With `category`, a list that has a column `category` gives the classes of this category only; all others are void.

    Raises `MicrotomeError`: the file cannot be read, a line is not understood, an index or the name of a concept
    appears twice, an index is over 65535, no class is of the category, nothing is left that is not void.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MicrotomeError(f"cannot read the class list {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise MicrotomeError(f"the class list {path} is not text in UTF-8: {error}") from error
    is_csv = path.suffix.lower() == ".csv"
    rows = _rows_of_csv(path, text, category is not None) if is_csv else _rows_of_lines(path, text)
    names: dict[int, str] = {}
    for row in rows:
        if not re.fullmatch("[0-9]{1,9}", row.index) or int(row.index) > LARGEST or not row.name:
            raise MicrotomeError(
                f"line {row.line} of {path} is {row.index!r} {row.name!r}; expected an index up to {LARGEST} and a name"
            )
        before = names.setdefault(int(row.index), row.name)
        if before != row.name:
            raise MicrotomeError(
                f"line {row.line} of {path} names index {row.index} {row.name!r}, but it is {before!r}"
            )
    classes = ClassList(path, names, frozenset(void) | _other_categories(path, rows, category))
    outside = [value for value in classes.void if not 0 <= value <= LARGEST]
    if outside:
        raise MicrotomeError(
            f"the void value {outside[0]} for {path} cannot be in a label map; expected 0 to {LARGEST}"
        )
    concepts = classes.concepts()
    if not concepts:
        raise MicrotomeError(f"the class list {path} has no names that are not void; expected lines like '3 road'")
    first: dict[str, int] = {}
    for number, name in concepts.items():
        if first.setdefault(name, number) != number:
            raise MicrotomeError(
                f"{path} gives the name {name!r} to the indices {first[name]} and {number}; make them differ"
            )
    return classes


def _other_categories(path: Path, rows: list[Row], category: str | None) -> frozenset[int]:
    """Return the indices of all classes outside a category, if the list has categories."""
    known = sorted({row.category for row in rows} - {""})
    if category is None or not known:
        return frozenset()
    if category not in known:
        raise MicrotomeError(
            f"{path} has no class of category {category!r} (there are: {', '.join(known)}){nearest(category, known)}"
        )
    return frozenset(int(row.index) for row in rows if row.category != category)


def _rows_of_lines(path: Path, text: str) -> list[Row]:
    """Return the classes of a text file."""
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    filled = [(number, line) for number, line in lines if line]
    if filled and _heading(filled[0][1]):
        return _rows_of_parts(filled)
    if filled and re.match(r"[0-9]+\s", filled[0][1]):
        return [Row(number, *_halves(line)) for number, line in filled]
    between = [number for number, line in lines if not line and number < filled[-1][0]] if filled else []
    if between:
        raise MicrotomeError(
            f"line {between[0]} of {path} is empty; it would shift the indices of the names that follow"
        )
    return [Row(number, str(index), line) for index, (number, line) in enumerate(filled)]


def _rows_of_parts(filled: list[tuple[int, str]]) -> list[Row]:
    """Return the parts in a list with headings; each is named after the heading above it."""
    rows, whole = [], ""
    for number, line in filled:
        heading = _heading(line)
        if heading:
            whole = heading
        else:
            index, name = _halves(line)
            rows.append(Row(number, index, f"{whole} {name}" if name else ""))
    return rows


def _heading(line: str) -> str:
    """Return the name in `-- 13 person --`, or an empty string if the line is something else."""
    found = re.fullmatch(r"--\s+[0-9]+\s+(.*\S)\s+--", line)
    return found[1] if found else ""


def _halves(line: str) -> tuple[str, str]:
    index, *name = line.split(maxsplit=1)
    return index, name[0] if name else ""


def _rows_of_csv(path: Path, text: str, by_category: bool) -> list[Row]:
    """Return the classes of a CSV; with `by_category`, with their categories if it has that column."""
    try:
        reader = csv.reader(text.splitlines(keepends=True), strict=True)
        header = [name.strip().lower() for name in next(reader, [])]
        index = next((header.index(name) for name in ID_COLUMNS if name in header), None)
        if index is None or "name" not in header:
            found = ", ".join(header) or "(none)"
            raise MicrotomeError(f"{path} has the columns {found}; expected name and one of {', '.join(ID_COLUMNS)}")
        rows = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise MicrotomeError(f"{path} is not a CSV: {error}") from error
    for line, cells in rows:
        if len(cells) != len(header):
            raise MicrotomeError(f"line {line} of {path} has {len(cells)} fields, its header {len(header)}")
    names = [cells[header.index("name")].strip() for _, cells in rows]
    of = header.index("category") if by_category and "category" in header else None
    categories = ["" if of is None else cells[of].strip() for _, cells in rows]
    short = [name.partition(";")[0].strip() or name for name in names]
    taken = Counter(zip(short, categories, strict=True))
    return [
        Row(line, cells[index].strip(), first if taken[first, category] == 1 else name, category)
        for (line, cells), name, first, category in zip(rows, names, short, categories, strict=True)
    ]
