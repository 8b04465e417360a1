"""One style for all figures, fit for a paper, and the files of a figure.

The same numbers give the same bytes: no dates, fixed ids. In SVG, letters are outlines; in PDF, the font is embedded.
The colours are those of Okabe and Ito, distinct under every common colour blindness; lines also differ in their dashes.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG

from pipeline.report.experiment import Experiment
from pipeline.report.page import Figure
from pipeline.report.tables import write_table

NARROW = 3.5
"""Width in inches of what the page shows on a phone: one column of a journal."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800", "#8A8F98")
HATCHES = ("", "////", "....", "xxxx")
INK, MUTED, GRID = "#1c2024", "#5b6470", "#d9dde2"
RUN_COLOURS = {"trained": "#0a6fb0", "untrained": "#c25400", "permuted": "#6b7280"}
RUN_TITLES = {"trained": "trained", "untrained": "untrained", "permuted": "labels permuted"}
RUN_STYLES: dict[str, dict[str, Any]] = {
    "trained": {"linestyle": "-", "linewidth": 1.6},
    "untrained": {"linestyle": "--", "linewidth": 1.2},
    "permuted": {"linestyle": ":", "linewidth": 1.4},
}
ON_DARK = {
    INK: "#e8eaed",
    MUTED: "#a3abb5",
    GRID: "#3a4048",
    RUN_COLOURS["trained"]: "#56b4e9",
    RUN_COLOURS["untrained"]: "#f0a04b",
    RUN_COLOURS["permuted"]: "#a3abb6",
}
"""What replaces the colours of text and lines on a dark ground; as matplotlib writes them, in lower case. The colours
of categories stay."""
SETTINGS: Any = {
    "svg.hashsalt": "microtome",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "text.parse_math": False,
    "text.color": INK,
    "axes.titlesize": 8.5,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.2,
    "legend.handleheight": 1.0,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
}


def draw(
    experiment: Experiment,
    name: str,
    drawing: Callable[[float], matplotlib.figure.Figure],
    *,
    kind: str,
    alt: str,
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """Write a figure in every wanted format, and its numbers as CSV.

    Parameters
    ----------
    name : of the files, without suffix.
    drawing : draws the figure at a width in inches, in this module's style; it may arrange its panels by the width.
    kind : type of figure; `workflow/report/<kind>.rst` is its caption in Snakemake's report.
    alt : description for people who cannot see it. caption : the text below it.
    header, rows : its numbers, written to `tables/<name>.csv`. Text is made safe for spreadsheets.
    """
    files = {"svg": f"figures/{name}.svg"}
    on_page: dict[str, str] = {}
    size: dict[str, tuple[int, int]] = {}
    inches = {"wide": experiment.figures.inches}
    if inches["wide"] > NARROW:
        inches["narrow"] = NARROW
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        # Characters that the bundled font lacks show as boxes in figures; the page itself shows them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for shape, width in inches.items():
            ending = "" if shape == "wide" else f"-{shape}"
            figure = drawing(width)
            on_page |= {shape: f"figures/{name}{ending}.svg", f"{shape}-dark": f"figures/{name}{ending}-dark.svg"}
            size[shape] = round(96 * figure.get_figwidth()), round(96 * figure.get_figheight())
            _write_svg(figure, experiment.out / on_page[shape], experiment.out / on_page[f"{shape}-dark"])
            if shape == "wide":
                for ending in experiment.figures.formats:
                    files[ending] = f"figures/{name}.{ending}"
                    _WRITE[ending](figure, experiment.out / files[ending], experiment.figures.dpi)
    files["csv"] = f"tables/{name}.csv"
    write_table(experiment.out / files["csv"], header, rows)
    return Figure(kind, alt, caption, files, on_page, size, labels or {})


def grid_of(panels: int, width: float, most: int) -> tuple[int, int]:
    """Return rows and columns for panels at a width in inches.

    At most `most` panels stand side by side, each at least 1.1 inches wide.
    """
    columns = max(1, min(panels, most, int(width / 1.1)))
    return math.ceil(panels / columns), columns


def shorten(text: str, limit: int) -> str:
    """Return at most `limit` characters, cut in the middle: the ends tell layers apart."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) * 2 // 3
    return f"{text[: limit - 1 - tail]}…{text[-tail:]}"


def colour_style(position: int) -> dict[str, Any]:
    """Return the colour at this position, with a hatch once the eight colours are used up."""
    turn, colour = divmod(position, len(COLOURS))
    return {"facecolor": COLOURS[colour], "hatch": HATCHES[turn % len(HATCHES)]}


def bare(panel: Axes, *sides: str) -> None:
    """Remove lines of the frame, for example `left`, and their ticks; keep the labels."""
    for side in sides:
        panel.spines[side].set_visible(False)
        panel.tick_params(axis="y" if side in ("left", "right") else "x", length=0)


# The canvas writes the file, not the figure: `savefig` would draw everything twice, the first time for the layout.


def _write_svg(figure: matplotlib.figure.Figure, file: Path, dark: Path) -> None:
    """Write the figure without a background, and once more in the colours for a dark one."""
    figure.patch.set_alpha(0)
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    figure.patch.set_alpha(1)
    figure.set_layout_engine("none")  # one layout pass is enough
    svg = file.read_text(encoding="utf-8")
    for light, other in ON_DARK.items():
        svg = svg.replace(light, other)
    dark.write_text(svg, encoding="utf-8")


def _write_pdf(figure: matplotlib.figure.Figure, file: Path, dpi: int) -> None:
    FigureCanvasPdf(figure).print_pdf(file, metadata={"CreationDate": None})


def _write_png(figure: matplotlib.figure.Figure, file: Path, dpi: int) -> None:
    figure.dpi = dpi
    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})


_WRITE = {"pdf": _write_pdf, "png": _write_png}
