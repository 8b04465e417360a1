"""The parts of a report page: the interface between a stage's page and the site around it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A figure that `style.draw` wrote; its files are relative to the report's folder.

    `files` maps a format (`svg`, `pdf`, `png`, `csv`) to its file. `kind` names the caption in `workflow/report/`;
    `labels` describe it in `snakemake --report`.
    """

    kind: str
    alt: str
    caption: str
    files: Mapping[str, str]
    on_page: Mapping[str, str]
    """The SVG files that the page shows, by `wide`, `wide-dark`, `narrow`, `narrow-dark`."""
    size: Mapping[str, tuple[int, int]]
    """Width and height in CSS pixels of `wide` and `narrow`, so that a page does not jump while they load."""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def written(self) -> list[str]:
        return list(dict.fromkeys([*self.files.values(), *self.on_page.values()]))


@dataclass(frozen=True)
class Picture:
    """Images for the overview, for example of a unit.

    `file` holds `images` squares side by side; `link` leads to their subject.
    """

    file: str
    images: int
    alt: str
    title: str
    text: str
    link: str


@dataclass(frozen=True)
class Page:
    """One page of the report.

    Attributes
    ----------
    file : its name in the report's folder, for example `ablation.html`.
    title : heading, and the text of links to it. It may be any text: templates escape it.
    template : the page's own template in `templates/`, which extends `page.html.j2`.
    values : what the template shows, by name.
    summary : one sentence for the overview: the page's subject.
    findings : sentences for the overview, computed from the numbers and true for any numbers.
    figures : all figures of the page; the overview shows the first too.
    pictures : a few pictures for the overview.
    files : its other files, relative to the report's folder.
    methods : template with the stage's definitions for the methods page; empty: none.
    methods_values : what that template shows, by name.
    scripts : our scripts in `templates/`, which become one, allowed by its digest.
    """

    file: str
    title: str
    template: str
    values: Mapping[str, Any]
    summary: str = ""
    findings: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    pictures: Sequence[Picture] = ()
    files: Sequence[str] = ()
    methods: str = ""
    methods_values: Mapping[str, Any] = field(default_factory=dict)
    scripts: Sequence[str] = ()
