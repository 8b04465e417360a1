"""The site: the pages of all stages in one frame, between an overview, methods and provenance.

A page is allowed its own style sheet and at most one script of ours, by their digests, and images from its own folder;
nothing else. All that comes from data is escaped.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.errors import MicrotomeError
from pipeline.plan import stage
from pipeline.report import words
from pipeline.report.experiment import Experiment
from pipeline.report.page import Page
from pipeline.stages.report import pages, provenance
from pipeline.stages.report.overview import overview

PACKAGE = Path(__file__).parents[2]
FOLDERS_OF_TEMPLATES = (PACKAGE / "report/templates", *sorted(PACKAGE.glob("stages/*/templates")))
FOLDERS = ("figures", "tables", "units", "attributions", "visualizations", "interventions")
"""What a report owns besides its pages: a file in here that this report did not write is an earlier one's."""
REORDERING = dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")
"""Characters that turn the text after them around, to the end of the paragraph: no name may do that to a sentence."""
METHODS = "What the words and numbers of these pages mean, how they were computed, and where they come from."


def build(experiment: Experiment, wanted: Sequence[stage.PageModule]) -> list[Page]:
    """Write the report, with these pages of stages, into `experiment.out`; return its pages, the overview first.

    Files of an earlier report there that this one lacks are removed; other files stay. The same results give the same
    bytes.

    Raises
    ------
    MicrotomeError
        When a file is missing or not what the results contract says. Pages of an earlier report then stay.
    """
    for folder in FOLDERS:
        (experiment.out / folder).mkdir(parents=True, exist_ok=True)
    of_stages = pages.pages(experiment, wanted)
    defined = {name: value for page in of_stages for name, value in page.methods_values.items()}
    methods = Page("methods.html", "Methods", "methods.html.j2", {"parts": of_parts(of_stages)} | defined, METHODS)
    last = [methods, provenance.page(experiment)]
    site = [overview(experiment, [*of_stages, *last]), *of_stages, *last]
    _different_files(site)
    folders = list(dict.fromkeys((*FOLDERS_OF_TEMPLATES, *pages.templates(wanted))))
    html = {page.file: render(experiment, page, site, folders) for page in site}
    for file, text in html.items():
        temporary = experiment.out / f"{file}.partial"
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
        temporary.replace(experiment.out / file)
    remove_others(experiment.out, set(written(site)))
    return site


def written(site: Sequence[Page]) -> list[str]:
    """Return every file of a report, relative to its folder."""
    return [
        file
        for page in site
        for file in (page.file, *page.files, *(file for figure in page.figures for file in figure.written))
    ]


def of_parts(of_stages: Sequence[Page]) -> list[str]:
    """Return the templates of methods, each once, in the order of the pages."""
    return list(dict.fromkeys(page.methods for page in of_stages if page.methods))


def render(
    experiment: Experiment, page: Page, site: Sequence[Page], folders: Sequence[Path] = FOLDERS_OF_TEMPLATES
) -> str:
    """Return the HTML of one page; templates and scripts are in `folders`."""
    style, script = ("\n".join(_ours(name, folders) for name in names) for names in (("style.css",), page.scripts))
    return (
        environment(folders)
        .get_template(page.template)
        .render(
            dict(page.values)
            | {
                "experiment": experiment,
                "page": page,
                "site": site,
                "style": Markup(style),
                "style_digest": digest(style),
                "script": Markup(script),
                "script_digest": digest(script),
            }
        )
        .translate(REORDERING)
    )


def environment(folders: Sequence[Path]) -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "number": words.number,
        "decimal": words.decimal,
        "percent": words.percent,
        "plural": words.plural,
        "seconds": words.seconds,
        "data": data,
    }
    return found


def data(value: Any) -> Markup:
    """Return JSON for a `<script type="application/json">`: nothing in it can end the element or begin another one.

    All but ASCII is escaped too, so also the line separators that JavaScript knows and JSON does not.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    text = re.sub(r"(?<!\\)((?:\\\\)*)\\u(?:202[a-e]|206[6-9])", r"\1\\ufffd", text)
    return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))


def digest(text: str) -> str:
    """Return the digest of a style sheet or a script as a content-security policy names it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def remove_others(out: Path, keep: set[str]) -> None:
    """Remove pages, figures, tables and pictures of an earlier report."""
    for path in [*out.glob("*.html"), *(path for folder in FOLDERS for path in (out / folder).rglob("*"))]:
        ours = path.suffix in (".html", ".svg", ".pdf", ".png", ".csv", ".jpg")
        if path.is_file() and ours and path.relative_to(out).as_posix() not in keep:
            path.unlink()
    pictured = ("units", "attributions", "visualizations")
    for folder in sorted(path for name in pictured for path in (out / name).glob("*/")):
        if not any(folder.iterdir()):
            folder.rmdir()


def _ours(name: str, folders: Sequence[Path]) -> str:
    return next(path for folder in folders if (path := folder / name).exists()).read_text(encoding="utf-8")


def _different_files(site: Sequence[Page]) -> None:
    files: Mapping[str, str] = {}
    for page in site:
        if page.file in files:
            raise MicrotomeError(f"two pages of the report are named {page.file}: {files[page.file]} and {page.title}")
        files = {**files, page.file: page.title}
