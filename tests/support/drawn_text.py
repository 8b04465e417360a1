"""Text of a figure that is cut off at its edges."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from pipeline.report import style

TOLERANCE = 0.01  # inches: fonts are hinted


def cut_off(figure: Figure) -> Iterator[str]:
    """Yield each text that is not wholly within the figure, as it was laid out."""
    dpi, figure.dpi = figure.dpi, 300  # at fewer, hinting moves the ends of long names
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
            hidden |= {label for tick in ticks for label in (tick.label1, tick.label2)}
            hidden |= set() if axes.axison else set(axis.findobj(Text))
    edge = TOLERANCE * figure.dpi
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in hidden:
            box = text.get_window_extent(renderer)
            if min(box.x0, box.y0) < -edge or box.x1 > figure.bbox.x1 + edge or box.y1 > figure.bbox.y1 + edge:
                yield text.get_text()
    figure.dpi = dpi


def collect(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return a list that gets (file, text) for each text that is cut off in a figure that the report writes."""
    found: list[tuple[str, str]] = []
    write = style._write_svg

    def written(figure: Figure, file: Path, dark: Path) -> None:
        write(figure, file, dark)
        found.extend((file.name, text) for text in cut_off(figure))

    monkeypatch.setattr(style, "_write_svg", written)
    return found
