"""The whole report: what the page holds, that it is safe and the same every time, and that odd results work."""

import base64
import hashlib
import html.parser
import re
import shutil
from pathlib import Path

import pytest
from report_results import write_results

from pipeline.errors import MicrotomeError
from pipeline.report import Comparison, build

HOSTILE = '<script>alert("1")</script>'
LAYERS = [("stem", 3), ("features.2", 4)]
MODEL = {
    "architecture": f"cnn {HOSTILE}",
    "parameters": 1234567,
    "accuracy": {"train": 0.99, "validation": 0.977},
    "curve": [{"step": 0, "loss": 2.5, "accuracy": 0.1}, {"step": 10, "loss": 1.0, "accuracy": None}],
}


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text, of an HTML page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def links(self) -> list[str]:
        return [
            value or "" for _, attrs in self.tags for key, value in attrs.items() if key in ("src", "href", "srcset")
        ]


def report(results: Path, *comparisons: Comparison, title: str = "A report", cards: int = 3) -> Path:
    out = results / "report" / "test"
    build(
        results,
        out,
        title,
        comparisons or [Comparison("scenes", "cnn", "cnn-untrained")],
        {"revision": "abc"},
        2,
        cards,
    )
    return out


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose every free text is hostile: concepts, categories, classes, image ids, layers, settings, title."""
    results = write_results(
        tmp_path_factory.mktemp("hostile"),
        {"cnn": [("a$b_{1}", 2), (f"layer {HOSTILE}", 3)], "cnn-untrained": [("a$b_{1}", 2), (f"layer {HOSTILE}", 3)]},
        concepts=[(HOSTILE, f"truth/_{HOSTILE}"), ("$x^2$ & 'quotes\"", "truth/海 $("), ("=1+1", "_c")],
        permuted=["cnn"],
        classes=[HOSTILE, '" onerror="alert(1)'],
        ids=[f"{number}/{HOSTILE}" for number in range(12)],
        model=MODEL,
    )
    out = results / "report"
    build(results, out, HOSTILE, [Comparison("scenes", "cnn", "cnn-untrained")], {HOSTILE: {"x": [HOSTILE]}}, 2, 2)
    return out


def test_nothing_from_data_is_interpreted(hostile: Path) -> None:
    page = Page(hostile / "index.html")
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on") or key == "style"]
    assert HOSTILE in page.text  # it is shown, as text


def test_page_needs_nothing_from_elsewhere(hostile: Path) -> None:
    page = Page(hostile / "index.html")
    anchors = {f"#{attrs['id']}" for _, attrs in page.tags if attrs.get("id")}
    links = page.links()
    assert len(links) > 10
    for link in links:
        assert link in anchors or (hostile / link).is_file(), link
    assert "url(" not in page.source and "@import" not in page.source


def test_policy_allows_only_our_style_and_images(hostile: Path) -> None:
    source = (hostile / "index.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', source)
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL)
    assert policy and style
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy[1]
    assert "default-src 'none'" in policy[1] and "script-src" not in policy[1] and "unsafe" not in policy[1]


def test_every_image_has_a_text(hostile: Path) -> None:
    texts = [attrs.get("alt") for tag, attrs in Page(hostile / "index.html").tags if tag == "img"]
    assert len(texts) == 5 and all(texts)  # three figures, two cards


def test_figures_hold_no_script_and_no_link(hostile: Path) -> None:
    figures = sorted((hostile / "figures").glob("*.svg"))
    assert len(figures) == 6
    for figure in figures:
        source = figure.read_text(encoding="utf-8")
        assert "<script>" not in source
        assert not re.search(r'(href|src)="(?!#)', source)
        assert "<dc:date>" not in source


def test_same_results_same_bytes(tmp_path: Path) -> None:
    results = write_results(tmp_path / "results", {"cnn": LAYERS}, permuted=["cnn"], model=MODEL)
    comparison = Comparison("scenes", "cnn")
    first = contents(report(results, comparison))
    shutil.rmtree(results / "report")
    assert contents(report(results, comparison)) == first


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_shows_the_counts_of_every_run(tmp_path: Path) -> None:
    strength = {"cnn": 0.5, "cnn-untrained": 0.0}
    networks = {"cnn": LAYERS, "cnn-untrained": LAYERS}
    out = report(write_results(tmp_path, networks, strength=strength, permuted=["cnn"], model=MODEL))
    text = " ".join(Page(out / "index.html").text.split())
    assert "4 of 4 detectors in the last layer, features.2" in text
    assert "0 of 4 the same, untrained" in text and "0 of 4 the same, labels permuted" in text
    assert "97.7 % validation accuracy, 99.0 % in training" in text
    assert "parameters1 234 567" in text
    assert "quantile0.01" in text and "revisionabc" in text


@pytest.mark.parametrize("case", ["no detectors", "one unit", "no controls", "no cards asked for"])
def test_odd_results_work(tmp_path: Path, case: str) -> None:
    networks = {"cnn": [("only", 1)] if case == "one unit" else LAYERS}
    strength = {"cnn": 0.0 if case == "no detectors" else 0.4}
    if case != "no controls":
        networks["cnn-untrained"] = networks["cnn"]
    results = write_results(tmp_path, networks, strength=strength)
    control = None if case == "no controls" else "cnn-untrained"
    out = report(results, Comparison("scenes", "cnn", control), cards=0 if case == "no cards asked for" else 3)
    text = " ".join(Page(out / "index.html").text.split())
    match case:
        case "no detectors":
            assert "has an IoU above 0.04" in text and "0 of 4" in text
        case "one unit":
            assert "of the 1 unit in only, the last layer, 1 responds" in text and "The only detector." in text
        case "no controls":
            assert "Not measured here: the same network untrained and label maps permuted over the images." in text
        case _:
            assert not list((out / "figures").glob("card-*")) and "Best units" not in text


def test_many_layers_and_long_names(tmp_path: Path) -> None:
    layers = [(f"encoder.layers.encoder_layer_{number}.mlp", 2) for number in range(11)]
    concepts = [(f"{'a long name of a concept ' * 3}{number}", f"source{number}/c") for number in range(20)]
    out = report(write_results(tmp_path, {"cnn": layers}, concepts=concepts, images=4), Comparison("scenes", "cnn"))
    text = Page(out / "index.html").text
    assert all(layer in text for layer, _ in layers)
    assert "source7/c" in text  # categories keep their source where it tells them apart


def test_figures_of_an_earlier_report_are_removed_and_other_files_kept(tmp_path: Path) -> None:
    results = write_results(tmp_path, {"cnn": [("stem", 4)]})
    out = report(results, Comparison("scenes", "cnn"), cards=4)
    (out / "figures" / "notes.txt").write_text("mine")
    assert len(list((out / "figures").glob("card-*.png"))) == 4
    report(results, Comparison("scenes", "cnn"), cards=1)
    assert len(list((out / "figures").glob("card-*.png"))) == 1
    assert (out / "figures" / "notes.txt").exists()
    assert not list(out.rglob("*.partial"))


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
            report(results, Comparison("scenes", "cnn"))
    units.unlink()
    with pytest.raises(MicrotomeError, match=r"units\.csv, which does not exist"):
        report(results, Comparison("scenes", "cnn"))
    shutil.rmtree(results / "scenes" / "layers" / "cnn00" / "dissect-d1" / "iou.zarr")
    with pytest.raises(MicrotomeError, match=r"needs the store .*iou\.zarr"):
        report(results, Comparison("scenes", "cnn"))
    assert not (results / "report" / "test" / "index.html").exists()
