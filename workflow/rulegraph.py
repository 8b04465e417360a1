"""Draw the graph of the rules of config/config.yaml, docs/figures/rulegraph.svg: `python workflow/rulegraph.py`.

Snakemake names the rules and what each reads; graphviz is not needed. The same rules give the same bytes.
"""

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Line

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "figures" / "rulegraph.svg"
sys.path.insert(0, str(ROOT))

from pipeline.report.style import COLOURS, INK, SETTINGS  # noqa: E402

Reads = Mapping[str, Sequence[str]]
Place = tuple[str, int]
"""A rule at the level of its box, or its line at one further down."""
ACROSS, DOWN, WIDTH, HEIGHT = 1.35, 0.72, 1.15, 0.3  # inches from box to box, and of a box
SWEEPS = 8


def rules(command: Sequence[str] = (str(Path(sys.executable).with_name("snakemake")),)) -> Reads:
    """Return the rules that make files, each with those that it reads, as Snakemake says them."""
    asked = [*command, "--rulegraph", "--quiet", "all"]
    graph = subprocess.run(asked, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    names = dict(re.findall(r'^\t(\d+)\[label = "(\w+)"', graph, re.M))
    edges = [(names[one], names[other]) for one, other in re.findall(r"^\t(\d+) -> (\d+)$", graph, re.M)]
    made = [name for name in names.values() if name.startswith("make_")]
    return {name: sorted(one for one, other in edges if other == name) for name in sorted(made)}


def levels(reads: Reads) -> dict[str, int]:
    """Return the level of every rule: one below the lowest that it reads."""
    found: dict[str, int] = {}

    def level(name: str) -> int:
        if name not in found:
            found[name] = 1 + max(map(level, reads[name]), default=-1)
        return found[name]

    for name in reads:
        level(name)
    return found


def lines(reads: Reads, level: Mapping[str, int]) -> list[tuple[Place, Place]]:
    """Return the pieces of the lines, from one level to the next: a rule has one line, which its readers leave."""
    found = set()
    for name, parents in reads.items():
        for parent in parents:
            stops: list[Place] = [(parent, at) for at in range(level[parent], level[name])]
            found.update(zip(stops, [*stops[1:], (name, level[name])], strict=True))
    return sorted(found)


def arranged(places: Iterable[Place], pieces: Sequence[tuple[Place, Place]]) -> dict[Place, float]:
    """Return where each place lies across: near the mean of what it is joined to above and below."""
    rows: dict[int, list[Place]] = {}
    for place in sorted(places):
        rows.setdefault(place[1], []).append(place)
    across: dict[Place, float] = {}
    for row in rows.values():
        across |= {place: at - (len(row) - 1) / 2 for at, place in enumerate(row)}
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for at in sorted(rows, reverse=not down):
            mean = {}
            for place in rows[at]:
                ends = [across[a if down else b] for a, b in pieces if place == (b if down else a)]
                mean[place] = sum(ends) / len(ends) if ends else across[place]
            rows[at].sort(key=lambda place: (mean[place], place))
            across |= {place: k - (len(rows[at]) - 1) / 2 for k, place in enumerate(rows[at])}
    return across


def draw(reads: Reads) -> Figure:
    level = levels(reads)
    pieces = lines(reads, level)
    boxes = [(name, at) for name, at in level.items()]
    across = arranged({*boxes, *(place for piece in pieces for place in piece)}, pieces)
    styles = {}
    for k, name in enumerate(sorted(level, key=lambda name: (level[name], name))):
        turn, colour = divmod(k, len(COLOURS))
        styles[name] = {"edgecolor": COLOURS[colour], "linestyle": ("-", "--")[turn % 2]}
    left, right = min(across.values()), max(across.values())
    width, height = ACROSS * (right - left + 1), DOWN * (max(level.values()) + 1)
    figure = Figure((width, height), facecolor="white")
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set(xlim=(0, width), ylim=(height, 0))
    panel.set_axis_off()

    def point(place: Place) -> tuple[float, float]:
        return ACROSS * (across[place] - left + 0.5), DOWN * (place[1] + 0.5)

    for one, other in pieces:
        (x, y), (to, below) = point(one), point(other)
        y, below = y + HEIGHT / 2, below - HEIGHT / 2
        bend = (below - y) / 2
        path = [(x, y), (x, y + bend), (to, below - bend), (to, below)]
        steps = [Line.MOVETO, Line.CURVE4, Line.CURVE4, Line.CURVE4]
        if other not in boxes:  # past the boxes of its level
            path, steps = [*path, (to, below + HEIGHT)], [*steps, Line.LINETO]
        panel.add_patch(PathPatch(Line(path, steps), fill=False, linewidth=1.3, **styles[one[0]]))
    for name, at in boxes:
        x, y = point((name, at))
        corner = x - WIDTH / 2, y - HEIGHT / 2
        box = FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.07", zorder=2, **styles[name])
        box.set(facecolor="white", linewidth=1.5)
        panel.add_patch(box)
        panel.text(x, y, name, color=INK, ha="center", va="center", zorder=3)
    return figure


def main() -> None:
    with matplotlib.rc_context(SETTINGS):
        FigureCanvasSVG(draw(rules())).print_svg(FILE, metadata={"Date": None})


if __name__ == "__main__":
    main()
