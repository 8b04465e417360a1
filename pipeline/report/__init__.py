"""The report: one static page that shows which units detect which concepts, beside the controls.

`build` writes `index.html`, `figures/` and `tables/`. The page works offline and from a file, holds no script, loads
nothing from elsewhere, and shows names that come from data as text. The same results give the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """A network and the same network untrained, by their names in the results folder; None without that control.

    The other control, label maps permuted over the images, is shown when `units-permuted.csv` stands beside
    `units.csv`; `permuted_images` is how many images it was counted on, where that is known.
    """

    dataset: str
    network: str
    control: str | None = None
    permuted_images: int | None = None


def build(
    results: Path,
    out: Path,
    title: str,
    comparisons: Sequence[Comparison],
    provenance: Mapping[str, Any],
    top_images: int = 5,
    cards: int = 24,
) -> None:
    """Write the report of `comparisons` into `out`: `index.html`, `figures/`, `tables/`.

    Parameters
    ----------
    results : the results folder, read only.
    out : folder of this report alone. Figures and tables of an earlier report in it that this one lacks are removed.
    provenance : what the page's last section lists besides the settings found in the stores: ids, versions, revision.
        Values may be nested mappings and lists.
    top_images, cards : images on each card, and cards of each network.

    Raises
    ------
    MicrotomeError
        When a file is missing or not what the results contract says. An earlier `index.html` then stays as it is.
    """
    # matplotlib and jinja2 cost most of a second: not for those who only want `Comparison`
    from pipeline.report import page

    figures, tables = out / "figures", out / "tables"
    figures.mkdir(parents=True, exist_ok=True)
    tables.mkdir(exist_ok=True)
    sections = [page.section(results, figures, tables, comparison, top_images, cards) for comparison in comparisons]
    html = page.render(title, sections, provenance)
    temporary = out / "index.html.partial"
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(out / "index.html")
    written = {file for section in sections for file in section.files}
    for file in [*figures.iterdir(), *tables.iterdir()]:
        if file.suffix in (".svg", ".pdf", ".png", ".csv") and f"{file.parent.name}/{file.name}" not in written:
            file.unlink()
