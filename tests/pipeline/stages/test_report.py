"""The whole report: what the pages hold, that they are safe and the same every time, and that odd results work."""

import base64
import csv
import hashlib
import html.parser
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_results import write_results

from pipeline.config.report import Figures, Report
from pipeline.errors import MicrotomeError
from pipeline.plan import stage
from pipeline.report.experiment import Experiment, Made
from pipeline.stages.dissect import cards
from pipeline.stages.registry import STAGES
from pipeline.stages.report import site
from pipeline.stages.report.pages import declared
from pipeline.stages.report.site import FOLDERS_OF_TEMPLATES, build
from pipeline.storage.manifest import Manifest, write_file
from pipeline.storage.read_back import read_text

HOSTILE = '<script>alert("1")</script>'
LAYERS = [("stem", 3), ("features.2", 4)]
MODEL = {
    "architecture": f"cnn {HOSTILE}",
    "parameters": 1234567,
    "accuracy": {"train": 0.99, "validation": 0.977},
    "curve": [{"step": 0, "loss": 2.5, "accuracy": 0.1}, {"step": 10, "loss": 1.0, "accuracy": None}],
}
DECLARED = declared(STAGES.values())
COMMAND = "snakemake report --configfile config/mine.yaml"


MINE = """
from pipeline.report.page import Page


def pages(experiment):
    (experiment.out / "tables/mine.csv").write_text("a\\n1\\n")
    values = {"answer": f"<{len(experiment.of_stage('mine'))}>"}
    findings = ["Without unit 3, <b> loses 2 %."]
    return [Page("mine.html", "Mine & more", "mine.html.j2", values, "About it.", findings, files=["tables/mine.csv"])]
"""
OTHER = """
from pipeline.report.page import Page


def pages(experiment):
    return [Page("mine.html", "Other", "mine.html.j2", {"answer": ""})]
"""


class Html(html.parser.HTMLParser):
    """Tags with their attributes, the text, and what scripts and data blocks hold, of an HTML page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.blocks: list[tuple[str | None, str]] = []
        self.source = file.read_text(encoding="utf-8")
        self.within = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.within = tag
        if tag == "script":
            self.blocks.append((dict(attrs).get("type"), ""))

    def handle_endtag(self, tag: str) -> None:
        self.within = ""

    def handle_data(self, data: str) -> None:
        if self.within == "script":
            kind, before = self.blocks[-1]
            self.blocks[-1] = kind, before + data
        elif self.within != "style":
            self.text += data

    def links(self) -> list[str]:
        return [
            value or "" for _, attrs in self.tags for key, value in attrs.items() if key in ("src", "href", "srcset")
        ]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def experiment(results: Path, *networks: str, title: str = "A report", **changes: Any) -> Experiment:
    """The experiment of networks that were dissected on `scenes`; `cnn` and its control where none are named."""
    made = tuple(Made("dissect", "scenes", name, seconds=1.5) for name in networks or ("cnn", "cnn-untrained"))
    out = results / "report" / "test"
    given: dict[str, Any] = {
        "report": Report(top_images=2, cards=3),
        "command": COMMAND,
        "versions": {"revision": "abc"},
    }
    return Experiment(results, out, title, made, **given | changes)


def report(results: Path, *networks: str, **changes: Any) -> Path:
    wanted = experiment(results, *networks, **changes)
    build(wanted, DECLARED)
    return wanted.out


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose every free text is hostile: concepts, categories, classes, image ids, layers, settings, title."""
    layers = [("a$b_{1}", 2), (f"layer {HOSTILE}", 3)]
    results = write_results(
        tmp_path_factory.mktemp("hostile"),
        {"cnn": layers, "cnn-untrained": layers},
        concepts=[(HOSTILE, f"truth/_{HOSTILE}"), ("$x^2$ & 'quotes\"", "truth/海 $("), ("=1+1", "_c")],
        permuted=["cnn"],
        classes=[HOSTILE, '" onerror="alert(1)', "\u2028<!--<script>"],
        ids=[f"{number}/{HOSTILE}" for number in range(12)],
        model=MODEL,
    )
    texts = {"title": HOSTILE, "versions": {HOSTILE: {"x": [HOSTILE]}}, "configuration": {"name": HOSTILE}}
    return report(results, figures=Figures(dpi=50), **texts)


PAGES = ["index.html", "network-scenes-cnn.html", "methods.html", "provenance.html"]


def test_pages_of_the_report(hostile: Path) -> None:
    assert sorted(path.name for path in hostile.glob("*.html")) == sorted(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_nothing_from_data_is_interpreted(hostile: Path, name: str) -> None:
    page = Html(hostile / name)
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on") or key == "style"]
    assert HOSTILE in page.text  # it is shown, as text
    files = FOLDERS_OF_TEMPLATES[0] / "elements.js", Path(cards.__file__).parent / "templates/browser.js"
    ours = "\n".join(file.read_text(encoding="utf-8") for file in files)
    scripts = [text for kind, text in page.blocks if kind != "application/json"]
    assert scripts == ([ours] if name.startswith("network") else [])
    for kind, text in page.blocks:
        if kind == "application/json":
            assert json.loads(text)["concepts"][0][0] == HOSTILE
            assert not set("<>&\u2028\u2029") & set(text)


@pytest.mark.parametrize("control", ["\u202e", "\u2067"])
def test_a_name_cannot_turn_the_text_after_it_around(tmp_path: Path, control: str) -> None:
    results = write_results(tmp_path, {"cnn": [("a", 6)]}, concepts=[(f"tree{control}", "truth/object")])
    made = (Made("dissect", "scenes", "cnn"),)
    build(Experiment(results, tmp_path / "report", f"Mine{control}", made, figures=Figures(formats=[])), DECLARED)
    for page in (tmp_path / "report").glob("*.html"):
        text = page.read_text()
        assert control not in text and f"\\u{ord(control):x}" not in text and "Mine\ufffd" in text
    ((_, block),) = (one for one in Html(tmp_path / "report" / "network-scenes-cnn.html").blocks if one[0])
    assert json.loads(block)["concepts"][0][0] == "tree\ufffd"


def test_coarse_units_and_notices_of_the_inspection_are_told(tmp_path: Path) -> None:
    results = write_results(tmp_path, {"cnn": [("a", 6), ("b", 2)]}, concepts=[("tree", "truth/object")])
    file = results / "scenes/cnn/layers.json"
    layers = json.loads(file.read_text())
    layers["b"]["coarse"] = [1]
    file.write_text(json.dumps(layers))
    extracted = Made("extract", "scenes", "cnn", notices=("it gives 4 logits, and the images have 12 classes",))
    made = (extracted, Made("dissect", "scenes", "cnn"))
    build(Experiment(results, tmp_path / "report", "Mine", made, figures=Figures(formats=[])), DECLARED)
    for name in ("index.html", "network-scenes-cnn.html"):
        words = Html(tmp_path / "report" / name).words
        assert "Told before the run: it gives 4 logits, and the images have 12 classes." in words, name
        assert "Of 1 unit of b (1), fewer than 8 bits are stored: values and thresholds are coarse." in words, name
    ((_, block),) = (one for one in Html(tmp_path / "report" / "network-scenes-cnn.html").blocks if one[0])
    data = json.loads(block)
    assert [data["units"][at][:2] for at in data["coarse"]] == [[1, 1]]


def test_a_backslash_in_a_name_stays_a_backslash() -> None:
    name = "\\u202e \\\\u202e \u202e"
    assert json.loads(site.data([name])) == [name.replace("\u202e", "\ufffd")]


@pytest.mark.parametrize("name", PAGES)
def test_pages_need_nothing_from_elsewhere(hostile: Path, name: str) -> None:
    page = Html(hostile / name)
    anchors = {f"#{attrs['id']}" for _, attrs in page.tags if attrs.get("id")}
    for link in page.links():
        assert link in anchors or (hostile / link.partition("#")[0]).is_file(), link
    assert "url(" not in page.source and "@import" not in page.source


@pytest.mark.parametrize("name", PAGES)
def test_policy_allows_only_our_style_script_and_images(hostile: Path, name: str) -> None:
    source = (hostile / name).read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', source)
    assert policy
    assert policy[1].startswith("default-src 'none'; img-src 'self' file:; ")
    assert "unsafe" not in policy[1]
    allowed = re.findall(r"<(style|script)>(.*?)</\1>", source, re.DOTALL)
    for kind, text in allowed:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy[1]
    assert len(allowed) == 2 or "script-src 'none'" in policy[1]


def test_every_image_has_a_text(hostile: Path) -> None:
    for name in PAGES:
        assert all(attrs.get("alt") for tag, attrs in Html(hostile / name).tags if tag == "img")


def test_every_figure_has_all_its_files_and_the_command(hostile: Path) -> None:
    page = Html(hostile / "network-scenes-cnn.html")
    figures = sum(tag == "figure" for tag, _ in page.tags)
    assert figures == 4 == page.words.count(COMMAND)
    for kind in ("detectors", "concepts", "iou", "training"):
        name = f"{kind}-scenes-cnn"
        for ending in (".svg", "-dark.svg", "-narrow.svg", "-narrow-dark.svg", ".pdf", ".png"):
            assert (hostile / "figures" / f"{name}{ending}").stat().st_size > 1000
        with (hostile / f"tables/{name}.csv").open(encoding="utf-8", newline="") as stream:
            rows = list(csv.reader(stream))
        assert len(rows) > 1
        assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@"))]


def test_figures_hold_no_script_no_link_and_no_date(hostile: Path) -> None:
    figures = sorted((hostile / "figures").glob("*.svg"))
    assert len(figures) == 16
    for figure in figures:
        source = figure.read_text(encoding="utf-8")
        assert "<script>" not in source
        assert not re.search(r'(href|src)="(?!#)', source)
        assert "<dc:date>" not in source


@pytest.mark.parametrize(("width", "inches"), [("one", 3.5), ("two", 7.1), (5.0, 5.0)])
def test_figures_are_as_wide_as_wanted_in_the_wanted_formats(tmp_path: Path, width: Any, inches: float) -> None:
    results = write_results(tmp_path, {"cnn": [("stem", 2)]})
    out = report(results, "cnn", figures=Figures(width=width, formats=["png"], dpi=100))
    with Image.open(out / "figures/detectors-scenes-cnn.png") as picture:
        assert picture.width == round(100 * inches)
    svg = (out / "figures/detectors-scenes-cnn.svg").read_text(encoding="utf-8")
    assert f'width="{72 * inches:g}pt"' in svg
    assert not list(out.rglob("*.pdf"))
    # What is one column wide already needs no other drawing for a phone.
    assert (out / "figures/detectors-scenes-cnn-narrow.svg").exists() == (width != "one")


def test_fonts_are_embedded_in_pdf(hostile: Path) -> None:
    assert b"/FontFile2" in (hostile / "figures/iou-scenes-cnn.pdf").read_bytes()


def test_same_results_same_bytes(tmp_path: Path) -> None:
    results = write_results(tmp_path / "results", {"cnn": LAYERS}, permuted=["cnn"], model=MODEL)
    first = contents(report(results, "cnn", figures=Figures(dpi=50)))
    shutil.rmtree(results / "report")
    assert contents(report(results, "cnn", figures=Figures(dpi=50))) == first


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_shows_the_counts_of_every_run(tmp_path: Path) -> None:
    strength = {"cnn": 0.5, "cnn-untrained": 0.0}
    networks = {"cnn": LAYERS, "cnn-untrained": LAYERS}
    out = report(write_results(tmp_path, networks, strength=strength, permuted=["cnn"], model=MODEL))
    words = Html(out / "network-scenes-cnn.html").words
    assert "4 of 4 detectors in the last layer, features.2" in words
    assert "0 of 4 the same, untrained" in words and "0 of 4 the same, labels permuted" in words
    assert "97.7 % validation accuracy, 99.0 % in training" in words
    words = Html(out / "provenance.html").words
    assert "parameters 1 234 567" in words or "parameters1 234 567" in words
    assert "revisionabc" in words
    words = Html(out / "index.html").words
    assert "1 network was cut into 2 layers, and each of its 7 units compared" in words
    assert "Of the 4 units in features.2, the last layer, 4 respond where a concept is" in words
    assert "against 0 in the same network untrained and 0 when the label maps are permuted" in words
    assert "3.0 s in all" in words  # two steps of 1.5 s


def test_data_of_the_browser_are_the_units(tmp_path: Path) -> None:
    results = write_results(tmp_path, {"cnn": LAYERS}, strength={"cnn": 0.2})
    out = report(results, "cnn", report=Report(cards=2, top_images=3))
    ((_, text),) = (block for block in Html(out / "network-scenes-cnn.html").blocks if block[0] == "application/json")
    data = json.loads(text)
    with (results / "scenes/cnn/units.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(data["units"]) == len(rows) == 7
    for unit, row in zip(data["units"], rows, strict=True):
        assert (data["layers"][unit[0]], str(unit[1])) == (row["layer"], row["unit"])
        label = data["concepts"][unit[2]] if unit[2] >= 0 else ["", None]
        assert label[0] == row["concept"]
        assert unit[3] == pytest.approx(float(row["iou"]), rel=1e-4)
    drawn = [unit for unit in data["units"] if len(unit) > 10]
    assert len(drawn) == 2 == len(list((out / "units/scenes-cnn").iterdir()))
    for unit in drawn:
        images, best, histogram, low, high, relevant = unit[10:]
        assert relevant == []
        assert len(images) == 3
        assert best[0][0] == unit[2] and best[0][1] == pytest.approx(unit[3], rel=1e-4)
        assert best[1][1] == pytest.approx(unit[3] / 2, rel=1e-4)
        assert sum(histogram) == 10 * 16  # positions of 10 images: the first is of another split, the second not valid
        assert low < unit[8] < high


@pytest.mark.parametrize("case", ["no detectors", "one unit", "no controls", "no cards asked for"])
def test_odd_results_work(tmp_path: Path, case: str) -> None:
    networks = {"cnn": [("only", 1)] if case == "one unit" else LAYERS}
    strength = {"cnn": 0.0 if case == "no detectors" else 0.4}
    if case != "no controls":
        networks["cnn-untrained"] = networks["cnn"]
    results = write_results(tmp_path, networks, strength=strength)
    out = report(results, *networks, report=Report(cards=0 if case == "no cards asked for" else 3))
    page = Html(out / "network-scenes-cnn.html")
    match case:
        case "no detectors":
            assert "has an IoU above 0.04" in page.words and "0 of 4" in page.words
            assert not list(out.glob("figures/concepts-*"))
        case "one unit":
            assert "Of the 1 unit in only, the last layer, 1 responds" in Html(out / "index.html").words
        case "no controls":
            assert "Not measured here: the same network untrained and label maps permuted" in page.words
        case _:
            assert not list((out / "units").rglob("*.jpg"))


def test_several_data_sets_and_names_that_look_alike(tmp_path: Path) -> None:
    for dataset, network in (("a-b", "c"), ("a", "b-c")):
        write_results(tmp_path, {network: [("stem", 2)]}, dataset=dataset)
    made = (Made("dissect", "a-b", "c"), Made("dissect", "a", "b-c"))
    out = tmp_path / "report"
    site_of = build(Experiment(tmp_path, out, "Two", made), DECLARED)
    assert [page.title for page in site_of][1:3] == ["c on a-b", "b-c on a"]
    assert (out / "network-a-b-c.html").exists() and (out / "network-a-b-c-2.html").exists()
    assert len(list((out / "units").iterdir())) == 2


def test_many_layers_and_long_names(tmp_path: Path) -> None:
    layers = [(f"encoder.layers.encoder_layer_{number}.mlp", 2) for number in range(11)]
    concepts = [(f"{'a long name of a concept ' * 3}{number}", f"source{number}/c") for number in range(20)]
    out = report(write_results(tmp_path, {"cnn": layers}, concepts=concepts, images=4), "cnn")
    source = (out / "network-scenes-cnn.html").read_text(encoding="utf-8")
    assert all(layer in source for layer, _ in layers)
    assert "source7/c" in source  # categories keep their source where it tells them apart


def test_files_of_an_earlier_report_are_removed_and_other_files_kept(tmp_path: Path) -> None:
    results = write_results(tmp_path, {"cnn": [("stem", 4)], "vit": [("stem", 4)]})
    out = report(results, "cnn", "vit", report=Report(cards=4))
    (out / "figures" / "notes.txt").write_text("mine")
    assert len(list((out / "units").rglob("*.jpg"))) == 8
    report(results, "cnn", report=Report(cards=1))
    assert len(list((out / "units").rglob("*.jpg"))) == 1
    assert not (out / "network-scenes-vit.html").exists() and not list(out.rglob("*-vit*"))
    assert (out / "figures" / "notes.txt").exists()
    assert not list(out.rglob("*.partial"))


def test_a_stage_adds_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/report.md promises: the page is listed, its findings are on the overview, its files are kept."""
    results = write_results(tmp_path, {"cnn": [("stem", 2)]})
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/mine.html.j2").write_text(
        '{% extends "page.html.j2" %}{% block content %}<p>{{ answer }} from {{ experiment.title }}</p>{% endblock %}'
    )
    (tmp_path / "my_page.py").write_text(MINE)
    (tmp_path / "my_other_page.py").write_text(OTHER)
    monkeypatch.syspath_prepend(tmp_path)
    mine = stage.PageModule("my_page", 15)
    wanted = experiment(results, "cnn")
    pages = build(wanted, declared([*STAGES.values(), replace(STAGES["ingest"], pages=(mine,))]))
    assert [page.title for page in pages][1:3] == ["cnn", "Mine & more"], "between the pages 10 and 20"
    written = site.written(pages)
    assert {"mine.html", "tables/mine.csv", "index.html", "tables/units-scenes-cnn.csv"} < set(written)
    assert all((wanted.out / file).is_file() for file in written)
    assert "<0> from A report" in Html(wanted.out / "mine.html").words
    index = Html(wanted.out / "index.html")
    assert "Mine & more" in index.words and "Without unit 3, <b> loses 2 %." in index.words
    assert "mine.html" in index.links()
    with pytest.raises(MicrotomeError, match=r"two pages of the report are named mine\.html: Mine & more and Other"):
        build(wanted, [mine, stage.PageModule("my_other_page", 16)])


def test_missing_and_mixed_up_files_are_refused(tmp_path: Path) -> None:
    networks = {"cnn": LAYERS, "cnn-untrained": [("stem", 3)]}
    results = write_results(tmp_path, networks)
    with pytest.raises(MicrotomeError, match="a control needs the same layers"):
        report(results)
    units = results / "scenes" / "cnn" / "units.csv"
    rows = units.read_text(encoding="utf-8")
    for text, message in (
        (rows.replace("features.2", "gone"), "layer 'gone' is not in layers.json"),
        (rows.replace(",0.0099", ",many"), "row 1: could not convert string to float: 'many'"),
        (rows.replace("ci_low", "low"), "lacks the columns ci_low"),
    ):
        units.write_text(text, encoding="utf-8")
        with pytest.raises(MicrotomeError, match=message):
            report(results, "cnn")
    units.unlink()
    with pytest.raises(MicrotomeError, match=r"units\.csv"):
        report(results, "cnn")
    shutil.rmtree(results / "scenes" / "layers" / "cnn00" / "dissect-d1" / "iou.zarr")
    with pytest.raises(MicrotomeError, match=r"there is no store .*iou\.zarr"):
        report(results, "cnn")
    assert not (results / "report" / "test" / "index.html").exists()


def test_a_table_that_is_not_what_was_written(tmp_path):
    files = write_file(tmp_path, "units.csv", b"layer,unit\n")
    Manifest(stage="dissect", id="1", digest="", files=files).write(tmp_path / "done/dissect.1.json")
    assert read_text(tmp_path / "units.csv").read() == "layer,unit\n"
    for damaged in (b"layer,unif\n", b"layer", b"\xa6", b""):
        (tmp_path / "units.csv").write_bytes(damaged)
        with pytest.raises(MicrotomeError, match=r"units\.csv is not what was written; run `make verify`"):
            read_text(tmp_path / "units.csv")
    (tmp_path / "units.csv").unlink()
    with pytest.raises(MicrotomeError, match=r"units\.csv; run `make repair`"):
        read_text(tmp_path / "units.csv")
    (tmp_path / "other.csv").write_bytes(b"\xa6")
    with pytest.raises(MicrotomeError, match=r"other\.csv is not text in UTF-8"):
        read_text(tmp_path / "other.csv")
