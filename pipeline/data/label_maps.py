"""Label maps on disk (PNG images whose pixels are class indices), read as concept numbers aligned with their images."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.decode import (
    Geometry,
    Refused,
    Stamp,
    opened,
    same_shape,
    size_and_orientation,
    transform_label_map,
    turn_upright,
)
from pipeline.errors import MicrotomeError, nearest

LARGEST = 2**16 - 1  # largest index in a 16-bit PNG, and largest concept number
ID_COLUMNS = ("id", "idx", "index")
INDEX_MODES = ("1", "L", "P", "I;16", "I")  # Pillow's modes; older releases had "I" for 16 bits
COMMENTS = ("#", "//", "%")
LEADING = re.compile(r"(-?[0-9]+)([:;,.)=|]\s*|\s+|$)(.*)")  # `3 road`, `3: road`, `3,road`
TRAILING = re.compile(r"(.*?\S)\s*[:;,=|\s]\s*(-?[0-9]+)(?:\.0+)?[,;]?")  # `road 3`, `road: 3`
_BYTE = r"[0-9]{1,3}"
COLOUR = re.compile(rf"(^|.*[\s,;:(\[])({_BYTE}[\s,;]+{_BYTE}[\s,;]+{_BYTE}[)\]]?([\s,;]+.*)?|.*#[0-9a-fA-F]{{6}}\b.*)")
PUNCTUATION = ":;,.=|[]{}#"  # no name begins or ends with these: the line is of another format
NOTHING = re.compile(
    r"_*(void|nothing|none|null|others?|bg|n/?a|no|not|rest|clutter|dummy|empty|invalid|missing|back[ _-]?ground|"
    r"ignored?|ambiguous|border|boundary|outside|un(known|label?led|defined|annotated|classified|assigned|specified)|"
    r"no[nt]?[ _-].*|unlabeled|outlier|class[ _-]?0)(?![a-z]).*",
    re.IGNORECASE,
)
HEADINGS = ("name", "names", "class", "classes", "label", "labels", "category", "categories", "class_name", "concept")
GREY_STEPS = {"L;2": 85, "L;4": 17}  # Pillow spreads grey of 2 and 4 bits over 0 to 255


@dataclass(frozen=True)
class ClassList:
    """The meaning of the indices in a category's label maps.

    path: the file the list was read from, for messages.
    marked: whether its lines hold comments, separators or their index last. Earlier versions read such a list by its
        lines alone, so `digest` tells the two readings apart.
    names: index in the files -> name of the concept.
    void: indices that mean nothing (unlabelled, border); they need no name, and if they have one, it is not a concept.
    """

    path: Path
    names: Mapping[int, str]
    void: frozenset[int]
    marked: bool = False

    def digest(self, of: Callable[[str], str]) -> str:
        """Return the digest of the list, given that of its file."""
        return of(str(self.path)) + (" by marks" if self.marked else "")

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
    upright: bool = True,
    listed: Stamp | None = None,
) -> np.ndarray:
    """Return uint16 (height, width): the concept number at each pixel of the transformed image, 0 for nothing.

    lookup: from `classes.lookup(numbers)`, made once. image_size: (height, width) of the image (`size_of`). upright:
    whether both are turned by their EXIF orientation. listed: size and time of the label map, as it was listed.

    Raises `ChangedError` if it is not what was listed, and `Refused`: as `read_label_map`; an index that is not in the
    class list; a shape that differs from the image's.
    """
    try:
        indices = read_label_map(path, max_pixels, upright, listed)
        numbers = lookup[indices]
        if numbers.min() < 0:
            y, x = np.unravel_index(np.argmin(numbers), numbers.shape)
            known = f"{classes.path.name} ({min(classes.names)} to {max(classes.names)})"
            raise Refused(f"index {indices[y, x]} at row {y}, column {x} is neither in {known} nor void")
        return transform_label_map(numbers.astype(np.uint16), geometry, image_size)
    except Refused as error:
        raise Refused(f"label map {Path(path).name}: {error.reason}") from error


def check_orientation(path: Path | str, image_size: tuple[int, int], orientation: int, max_pixels: int) -> None:
    """Raise `Refused` if an image with an EXIF orientation has a label map without one that may lie on either form.

    image_size: (height, width) of the upright image. A map that has the shape of the upright image alone lies on it.
    """
    if orientation == 1:
        return
    (rows, columns), of_map = size_and_orientation(path, max_pixels, formats=("PNG",))
    if of_map != 1:
        return
    height, width = image_size
    sideways = orientation >= 5
    if sideways and same_shape(rows, columns, height, width) and not same_shape(rows, columns, width, height):
        return
    raise Refused(
        f"the image has the EXIF orientation {orientation}, its label map {Path(path).name} has none: give the data "
        "set `exif: turn` if label maps lie on the upright images, `exif: ignore` if they lie on the pixels as stored"
    )


def read_label_map(path: Path | str, max_pixels: int, upright: bool = True, listed: Stamp | None = None) -> np.ndarray:
    """Return uint16 (height, width): the indices stored in a PNG of grey (1 to 16 bits) or palette colours.

    It is turned by its EXIF orientation if `upright`.

    Indices are read as stored: palettes are not looked up, and grey of few bits is not spread over 0 to 255.

    Raises `Refused`: not a PNG, colours instead of indices, or as `pipeline.data.decode.decode`.
    """
    with opened(path, ("PNG",), max_pixels, listed) as image:
        mode, raw_mode = image.mode, str(image.tile[0][3])
        image.load()
        indices = np.asarray(turn_upright(image, image) if upright else image)
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
    numbered_here: bool = False  # by its place in the list, which gives no index


def read_class_list(path: Path | str, void: Iterable[int] = (), category: str | None = None) -> ClassList:
    """Read the names of the indices of label maps, or of the channels of a segmentation network.

    A file that ends in .csv has a header with one of `ID_COLUMNS` and `name`. Of synonyms, such as `building;edifice`,
    the first is the name, unless another class has it too. In any other file, every line is `id name` (also `id:
    name`, `id,name`), or `name id`, or a name alone, numbered from 0 in line order; lines that begin with `#` are
    comments beside indices. Headings `-- 13 person --` with lines `1 head` below them, as in ADE20K's list of parts,
    give `person head`.

    With `category`, a list that has a column `category` gives the classes of this category only; all others are void.

    Raises `MicrotomeError`: the file cannot be read, a line is not understood or may mean two things (colours, numbers
    in some of the names), index 0 is void and the name of the first line does not say so, an index or the name of a
    concept appears twice, an index is over 65535, no class is of the category, nothing is left that is not void.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MicrotomeError(f"cannot read the class list {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise MicrotomeError(f"the class list {path} is not text in UTF-8: {error}") from error
    is_csv = path.suffix.lower() == ".csv"
    rows, marked = (_rows_of_csv(path, text, category is not None), False) if is_csv else _rows_of_lines(path, text)
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
    classes = ClassList(path, names, frozenset(void) | _other_categories(path, rows, category), marked)
    if rows and rows[0].numbered_here and 0 in classes.void and not NOTHING.fullmatch(rows[0].name):
        raise MicrotomeError(
            f"{path} has names alone, numbered from 0, and 0 is void: is {rows[0].name!r} void, or index 1? Write `0 "
            f"{rows[0].name}` or `1 {rows[0].name}`, and so on"
        )
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


def _rows_of_lines(path: Path, text: str) -> tuple[list[Row], bool]:
    """Return the classes of a text file, and whether it is `marked`."""
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    filled = [(number, line) for number, line in lines if line]
    if filled and _heading(filled[0][1]):
        return _rows_of_parts(filled), False
    said = [(number, line) for number, line in filled if not line.startswith(COMMENTS)]
    for number, line in said:
        if COLOUR.fullmatch(line):
            raise MicrotomeError(
                f"line {number} of {path}, {line!r}, holds a colour; label maps hold indices: write `3 road` alone"
            )
    first = [LEADING.fullmatch(line) for _, line in said]
    last = [TRAILING.fullmatch(line) for _, line in said]
    if said and first[0]:
        rows = [_leading(path, number, line, found) for (number, line), found in zip(said, first, strict=True)]
        _check_one_number(path, said, [TRAILING.fullmatch(row.name) for row in rows], [row.index for row in rows])
        separated = any(found and found[2].strip() for found in first)
        return rows, separated or len(said) < len(filled)
    if said and all(last) and len({found[1] for found in last if found}) == len(said):
        rows = [Row(number, f[2], f[1]) for (number, _), f in zip(said, last, strict=True) if f]
        _check_one_number(path, said, [TRAILING.fullmatch(row.name) for row in rows], [row.index for row in rows])
        return rows, True
    return _names_alone(path, lines, filled), False


def _check_one_number(
    path: Path, said: Sequence[tuple[int, str]], again: Sequence[re.Match[str] | None], index: Sequence[str]
) -> None:
    """Refuse a list whose every line has a second number behind its name, `7 road 0`: either may be the index."""
    own = [found for found in again if found]
    if 1 < len(own) == len(again) == len({found[1] for found in own}) and [found[2] for found in own] != [*index]:
        number, line = said[0]
        raise MicrotomeError(
            f"line {number} of {path}, {line!r}, and all others have two numbers; write `3 road`, the index that label "
            "maps hold and the name"
        )


def _leading(path: Path, number: int, line: str, found: re.Match[str] | None) -> Row:
    """Return the class of a line `id name`."""
    if found is None:
        return Row(number, *_halves(line))
    index, _, name = found.groups()
    again = LEADING.fullmatch(name)
    if again and again[1] != index:
        raise MicrotomeError(f"line {number} of {path}, {line!r}, begins with two numbers; write one index and a name")
    return Row(number, index, name)


def _names_alone(path: Path, lines: Sequence[tuple[int, str]], filled: Sequence[tuple[int, str]]) -> list[Row]:
    """Return the classes of lines that hold a name each, numbered from 0."""
    between = [number for number, line in lines if not line and number < filled[-1][0]] if filled else []
    if between:
        raise MicrotomeError(
            f"line {between[0]} of {path} is empty; it would shift the indices of the names that follow"
        )
    for index, (number, line) in enumerate(filled):
        begins, ends = LEADING.fullmatch(line), TRAILING.fullmatch(line)
        found = begins[1] if begins else ends[2] if ends else ""
        if line.startswith(COMMENTS) or line[0] in PUNCTUATION or line[-1] in PUNCTUATION:
            odd = f"{'begins' if line.startswith(COMMENTS) or line[0] in PUNCTUATION else 'ends'} with a mark"
        elif index == 0 and line.casefold() in HEADINGS:
            odd = "is a heading"
        elif begins or (found and found != str(index)):
            odd = f"{'begins' if begins else 'ends'} with the number {found}"
        else:
            continue
        raise MicrotomeError(
            f"line {number} of {path}, {line!r}, {odd}, in a list of names alone, where it would be index {index}: "
            "write every line as `3 road`, index and name"
        )
    return [Row(number, str(index), line, numbered_here=True) for index, (number, line) in enumerate(filled)]


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
        places = [header.index(name) for name in ID_COLUMNS if name in header]
        index = places[0] if places else None
        if index is None or "name" not in header:
            found = ", ".join(header) or "(none)"
            raise MicrotomeError(f"{path} has the columns {found}; expected name and one of {', '.join(ID_COLUMNS)}")
        rows = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise MicrotomeError(f"{path} is not a CSV: {error}") from error
    for line, cells in rows:
        if len(cells) != len(header):
            raise MicrotomeError(f"line {line} of {path} has {len(cells)} fields, its header {len(header)}")
        if len({cells[place].strip() for place in places}) > 1:
            raise MicrotomeError(
                f"line {line} of {path} has other numbers in {' and '.join(header[at] for at in places)}; keep the "
                "column of the indices that label maps hold"
            )
    names = [cells[header.index("name")].strip() for _, cells in rows]
    of = header.index("category") if by_category and "category" in header else None
    categories = ["" if of is None else cells[of].strip() for _, cells in rows]
    short = [name.partition(";")[0].strip() or name for name in names]
    taken = Counter(zip(short, categories, strict=True))
    return [
        Row(line, cells[index].strip(), first if taken[first, category] == 1 else name, category)
        for (line, cells), name, first, category in zip(rows, names, short, categories, strict=True)
    ]
