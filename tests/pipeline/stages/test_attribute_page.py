"""The page of attributions: its numbers against plain ones, its sentences, and hand-made results of every kind."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attribution_results import write_attributions
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report_results import write_results
from scipy.stats import spearmanr

from kernels.attribution.agreement import rank_correlation, resized
from pipeline.config.report import Figures
from pipeline.errors import MicrotomeError
from pipeline.plan.stage import PageModule
from pipeline.report.experiment import Experiment, Made
from pipeline.report.page import Page
from pipeline.stages.attribute import page as of_page
from pipeline.stages.attribute import pictures, sentences
from pipeline.stages.attribute.found import (
    Attributions,
    explained_images,
    page_of,
    read_attributions,
    unit_relevance_of,
)
from pipeline.stages.report.site import build

METHODS = {
    "saliency": "saliency",
    "ig": "integrated_gradients",
    "hires": "hires_cam",
    "product": "gradient_x_input",
    "grad_cam": "grad_cam",
}
RESIDUALS = {"ig": [0.001, 0.02, 0.3, 0.0, 0.01], "hires": 1e-7}
TOLERANCES = {"ig": {"tolerance": 0.05}}


def experiment_of(root: Path, *made: tuple[str, str], dataset: str = "scenes", dissected: bool = False) -> Experiment:
    """An experiment of (network, experiment)s, which writes no PDF and no PNG."""
    steps = [Made("attribute", dataset, network, "a1", 1.0, {}, name) for network, name in made]
    if dissected:
        steps += [Made("dissect", dataset, network) for network, _ in made]
    return Experiment(root, root / "report", "A report", tuple(steps), figures=Figures(formats=[]))


def pages_of(experiment: Experiment) -> list[Page]:
    for folder in ("figures", "tables", "attributions"):
        (experiment.out / folder).mkdir(parents=True, exist_ok=True)
    return of_page.pages(experiment)


def data_of(file: Path) -> Any:
    found = re.search(r'id="explained-data">(.*?)</script>', file.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def table(experiment: Experiment, page: Page, kind: str) -> list[dict[str, str]]:
    (figure,) = (figure for figure in page.figures if figure.kind == kind)
    with (experiment.out / figure.files["csv"]).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_results(tmp_path, {"cnn": [("features", 3)]})


def test_what_is_read_is_what_was_written(results: Path) -> None:
    maps = {"ig": np.arange(5 * 32 * 32, dtype=float).reshape(5, 32, 32)}
    write_attributions(results, METHODS, residuals=RESIDUALS, settings=TOLERANCES, maps=maps)
    found = read_attributions(results, "scenes", "cnn", "explained")
    assert read_attributions(results, "scenes", "cnn", "explained", "a1").slots == found.slots
    assert sorted(found.slots) == [2, 3, 5, 9, 10] and found.slots != sorted(found.slots)
    ig = found.methods[1]
    assert (ig.name, ig.title, ig.tolerance, ig.signed) == ("ig", "Integrated gradients", 0.05, True)
    assert ig.known.tolist() == pytest.approx(RESIDUALS["ig"]) and ig.beyond[:, 0].nonzero()[0].tolist() == [5]
    assert (ig.maps([9, 10])[:, 0] == maps["ig"][3:]).all()
    assert np.isnan(ig.maps([8])).all() and not found.methods[0].signed
    assert found.target[[0, 1, 4]].tolist() == [[-1]] * 3 and found.ranks == 1
    assert found.baseline_score[2, 0] == pytest.approx(found.score[2, 0] - 1, abs=1e-6)
    with pytest.raises(MicrotomeError, match="is not what the stage `attribute` writes"):
        read_attributions(results, "scenes", "cnn", "other")
    assert sorted(path.name for path in (ig.store.path / "attribution/c").iterdir()) == ["0", "1", "2"]
    (ig.store.path / "attribution/c/0/0/0").write_bytes(b"damaged")
    with pytest.raises(MicrotomeError):
        ig.maps([2])


def test_the_page(results: Path) -> None:
    write_attributions(results, METHODS, residuals=RESIDUALS, settings=TOLERANCES, note="a note")
    experiment = experiment_of(results, ("cnn", "explained"))
    site = build(experiment, [PageModule("pipeline.stages.attribute.page", 75, here=True)])
    page = next(page for page in site if page.file == "attribution-scenes-cnn.html")
    said = "\n".join(page.findings)
    assert "1 of 2 methods whose law is measured keeps it within the tolerance on every image: HiResCAM." in said
    assert "Integrated gradients misses its law by more than the tolerance of 0.05 on 1 of 5 images" in said
    assert "the largest residual is 0.3." in said and "No residual is known of Gradient × input" in said
    html = (experiment.out / page.file).read_text()
    assert "1 of 5" in html and "features (a note)" in html and "95th percentile" not in html and "99.5th" in html
    assert "The baseline of Integrated gradients is a black image." in html
    assert {figure.kind for figure in page.figures} == {
        "attributions", "attribution-residuals", "attribution-alike"
    }  # fmt: skip
    for file in (*page.files, *(file for figure in page.figures for file in figure.written)):
        assert (experiment.out / file).stat().st_size
    for name in page.files:
        with Image.open(experiment.out / name) as picture:
            assert picture.size == (6 * 128, 128)
    data = data_of(experiment.out / page.file)["experiments"][0]
    found = read_attributions(results, "scenes", "cnn", "explained")
    assert [row[0] for row in data["images"]] == [str(found.ids[slot]) for slot in found.slots]
    assert data["laws"] == [1, 2] and data["images"][0][6][0][1] == pytest.approx(1e-7, rel=1e-4)
    beyond = [row["beyond_tolerance"] for row in table(experiment, page, "attribution-residuals")]
    assert len(beyond) == 10 and sum(map(int, beyond)) == 1
    (experiment.out / "attributions/scenes-cnn/0-0999.jpg").write_bytes(b"an earlier report's")
    build(experiment, [PageModule("pipeline.stages.attribute.page", 75, here=True)])
    assert not (experiment.out / "attributions/scenes-cnn/0-0999.jpg").exists()
    build(experiment_of(results), [PageModule("pipeline.stages.attribute.page", 75, here=True)])
    assert list((experiment.out / "attributions").iterdir()) == []


def test_right_or_wrong_is_said_only_where_it_is_known(results: Path) -> None:
    labels = np.arange(12) % 2
    write_attributions(results, METHODS, target=np.array([0, 0, 1, 1, 0]))
    found = read_attributions(results, "scenes", "cnn", "explained")
    assert (
        found.right(labels)[[2, 3, 5, 9, 10]].tolist() == [1, 0, 1, 1, 1] and (found.right(labels)[[0, 1]] == -1).all()
    )
    assert found.class_name(1) == "road" and "the class that the network predicts" in sentences.what_was_explained(
        found
    )
    for changes in ({"targets": "label"}, {"targets": {"class": 1}}, {"logits": 1000}):
        write_attributions(results, METHODS, target=np.array([0, 0, 1, 1, 0]), **changes)
        found = read_attributions(results, "scenes", "cnn", "explained")
        assert (found.right(labels) == -1).all()
    assert found.class_name(1) == "class 1"
    write_attributions(results, METHODS, targets={"contrast": [1, 0]}, target=np.full(5, 1))
    found = read_attributions(results, "scenes", "cnn", "explained")
    assert "the logit of road less that of beach is explained" in sentences.what_was_explained(found)


def test_several_classes_of_an_image(results: Path) -> None:
    write_attributions(results, METHODS, targets={"top": 2}, residuals=RESIDUALS, settings=TOLERANCES)
    experiment = experiment_of(results, ("cnn", "explained"))
    (page,) = pages_of(experiment)
    assert sum(name.endswith("-1.jpg") for name in page.files) == 5 == len(page.files) / 2
    with Image.open(experiment.out / "attributions/scenes-cnn/0-0000-1.jpg") as picture:
        assert picture.size == (5 * 128, 128)
    data = page.values["explained"]["experiments"][0]
    assert all(len(row[3]) == len(row[4]) == len(row[6]) == 2 for row in data["images"])
    assert "on 2 of 10 explanations" in "\n".join(page.findings)
    assert "each of its 2 most probable classes" in page.summary


def test_methods_without_laws_and_a_single_method(results: Path) -> None:
    write_attributions(results, {"saliency": "saliency"})
    (page,) = pages_of(experiment_of(results, ("cnn", "explained")))
    assert page.findings == ["None of the methods has a law that its maps could be held against."]
    assert [figure.kind for figure in page.figures] == ["attributions"]


def test_images_without_a_map_and_maps_without_values(results: Path) -> None:
    maps = {"ig": np.full((5, 32, 32), np.nan), "hires": np.zeros((5, 4, 4))}
    write_attributions(results, METHODS, maps=maps)
    experiment = experiment_of(results, ("cnn", "explained"))
    (page,) = pages_of(experiment)
    pairs = {(row["method_a"], row["method_b"]): row for row in table(experiment, page, "attribution-alike")}
    assert pairs["Saliency", "Integrated gradients"]["rank_correlation"] == ""
    assert pairs["Integrated gradients", "HiResCAM"]["images"] == "0"
    assert pairs["Saliency", "Gradient × input"]["images"] == "5"
    with Image.open(experiment.out / page.files[0]) as opened:
        strip = np.asarray(opened)
    assert (abs(strip[:, 2 * 128 + 8 : 3 * 128 - 8].astype(int) - 160) < 6).all()  # no map
    assert (strip[:, 3 * 128 + 8 : 4 * 128 - 8] > 250).all()  # a map without values


def test_beside_the_untrained_network(results: Path) -> None:
    write_attributions(results, METHODS, seed=1)
    fewer = {name: kind for name, kind in METHODS.items() if name != "hires"}
    write_attributions(results, fewer, network="cnn-untrained", slots=(2, 3, 5), seed=2)
    experiment = experiment_of(results, ("cnn", "explained"), ("cnn-untrained", "explained"))
    (page,) = pages_of(experiment)
    rows = {row["method"]: row for row in table(experiment, page, "attribution-untrained")}
    assert rows["HiResCAM"]["images"] == "0" and rows["HiResCAM"]["rank_correlation"] == ""
    assert rows["Saliency"]["compared"] == "magnitude" and rows["Grad-CAM"]["compared"] == "signed"
    trained, untrained = (read_attributions(results, "scenes", name, "explained") for name in ("cnn", "cnn-untrained"))
    maps = [found.methods[-1].maps([2, 3, 5])[:, 0] for found in (trained, untrained)]
    plain = rank_correlation(*(resized(each, (32, 32)).reshape(3, -1) for each in maps))
    assert float(rows["Grad-CAM"]["rank_correlation"]) == pytest.approx(plain.mean())
    assert sum(name.endswith("-untrained.jpg") for name in page.files) == 3
    assert "Beside the untrained network, the maps of" in "\n".join(page.findings)
    (alone,) = pages_of(experiment_of(results, ("cnn-untrained", "explained")))  # a page of its own
    assert alone.title == "Attribution, cnn-untrained"


def test_several_experiments_and_links_with_units(results: Path) -> None:
    write_attributions(results, METHODS)
    write_attributions(results, {"saliency": "saliency", "again": "saliency"}, experiment="second", slots=(0, 4))
    experiment = experiment_of(results, ("cnn", "explained"), ("cnn", "second"), dissected=True)
    (page,) = pages_of(experiment)
    assert [each["name"] for each in page.values["explained"]["experiments"]] == ["explained", "second"]
    assert page.findings[0].startswith("explained: ") and page.findings[-1].startswith("second: ")
    assert "Saliency (again)" in page.findings[-1]
    assert page.values["units"] == "network-scenes-cnn.html"
    assert page_of(experiment, "scenes", "cnn") == page.file and page_of(experiment, "scenes", "vit") == ""
    assert explained_images(experiment, "scenes", "cnn") == {0, 2, 3, 4, 5, 9, 10}
    assert pages_of(experiment_of(results)) == []


def test_rank_correlations_are_those_of_scipy() -> None:
    random = np.random.default_rng(0)
    maps = [random.integers(-3, 4, (6, 5)).astype(np.float32) for _ in range(3)]
    control = [maps[0], None, -maps[2]]
    alike, trained = pictures.compare(maps, control, [True, True, False], (6, 5))
    for a in range(3):
        for b in range(3):
            pair = [np.abs(maps[at]) if 2 in (a, b) else maps[at] for at in (a, b)]
            assert alike[a, b] == pytest.approx(spearmanr(pair[0].ravel(), pair[1].ravel()).statistic)
    assert trained[[0, 2]].tolist() == pytest.approx([1, 1]) and np.isnan(trained[1])


def test_pictures_show_signs_and_the_strongest_half_percent() -> None:
    values = np.zeros((20, 20), np.float32)
    values[:10, :10], values[10:, 10:] = 2, -1
    values[0, 0] = 1000  # one pixel of 400 does not make the others pale
    drawn = np.asarray(pictures.tile(values, True, (20, 20)))
    assert drawn[5, 5].tolist() == list(pictures.FOR) and drawn[5, 15].tolist() == [255] * 3
    assert drawn[15, 15, 2] > drawn[15, 15, 0] and drawn[15, 15].min() > min(pictures.AGAINST)
    assert np.asarray(pictures.tile(np.abs(values), False, (20, 20)))[5, 5].tolist() == list(pictures.MUCH)
    assert pictures.tile_size((50, 100)) == (128, 64)


NUMBERS = st.floats(0, 10, allow_nan=False)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.one_of(NUMBERS, st.just(np.nan)), min_size=3, max_size=3), min_size=1, max_size=4), st.data()
)
def test_sentences_are_true_for_any_numbers(residuals: list[list[float]], data: st.DataObject) -> None:
    kinds = data.draw(
        st.lists(st.sampled_from(["ig", "cam", "saliency"]), min_size=len(residuals), max_size=len(residuals))
    )
    found = made_up(residuals, kinds)
    said = list(sentences.of_laws(found))
    laws = [each for each in found.methods if each.facts.law]
    assert said and all(sentence.endswith(".") and "nan" not in sentence for sentence in said)
    beyond = [each for each in laws if each.known.size and each.known.max() > each.tolerance]
    assert sum("misses its law" in sentence for sentence in said) == len(beyond)
    kept = sum(bool(each.known.size) for each in laws) - len(beyond)
    assert any(sentence.startswith(f"{kept} of ") for sentence in said) == (kept > 0)
    values = {slot: np.array(data.draw(st.lists(st.floats(-1, 1) | st.just(np.nan), min_size=len(kinds), max_size=len(kinds)))) for slot in range(3)}  # fmt: skip # noqa: E501
    means = sentences.Means.of(values, (len(kinds),))
    for at in range(len(kinds)):
        known = [float(each[at]) for each in values.values() if not np.isnan(each[at])]
        assert means.count[at] == len(known)
        assert means.mean[at] == pytest.approx(np.mean(known)) if known else np.isnan(means.mean[at])
        if len(known) > 1:
            assert means.half[at] == pytest.approx(1.96 * np.std(known, ddof=1) / len(known) ** 0.5)
    for sentence in sentences.of_training(found, means):
        assert "nan" not in sentence and "–" not in sentence


def made_up(residuals: list[list[float]], kinds: list[str]) -> Attributions:
    """An experiment of methods with these residuals of three images, without stores."""
    from pipeline.stages.attribute.found import MethodMaps
    from pipeline.stages.attribute.options import METHODS as KNOWN
    from pipeline.stages.attribute.results import Explained
    from pipeline.storage.store import StoreRef

    target = np.zeros((3, 1), int)
    methods = []
    for at, (own, kind) in enumerate(zip(residuals, kinds, strict=True)):
        kind = {"ig": "integrated_gradients"}.get(kind, kind)
        facts = Explained(name=f"m{at}", method=kind, law=KNOWN[kind].law, images=3, beyond=0, size=(4, 4))
        residual = np.array(own)[:, None] if KNOWN[kind].law else np.full((3, 1), np.nan)
        methods.append(MethodMaps(facts, StoreRef(Path(), {}), 0.5, target, residual))
    shared = {"targets": "predicted", "score": "logit", "split": "a", "classes": ["x"], "image_size": [4, 4]}
    ids, scores = np.array(["a", "b", "c"]), np.zeros((3, 1))
    return Attributions("d", "n", "e", methods, shared, ids, target, scores, scores)


def test_means_are_the_same_whichever_task_ends_first(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed runs showed it: the order of a sum is that of the tasks, not that of their ends."""
    write_attributions(results, METHODS, residuals=RESIDUALS, settings=TOLERANCES)
    made = []
    for order in (1, -1):

        def ended(_: object, function: Any, tasks: Any, *rest: object, order: int = order) -> Any:
            return [function(*task) for task in tasks[::order]]

        monkeypatch.setattr("pipeline.workers.tasks.run_tasks", ended)
        experiment = replace(experiment_of(results, ("cnn", "explained")), workers=object())
        assert list(experiment.map(lambda at: at, [(at,) for at in range(5)], "")) == list(range(5))
        (page,) = pages_of(experiment)
        made.append([(experiment.out / file).read_bytes() for figure in page.figures for file in figure.written])
    assert made[0] == made[1]


def test_contributions_of_both_signs_are_columns_without_a_law(results: Path) -> None:
    write_attributions(results, {"lrp": "lrp", "saliency": "saliency"}, residuals={"lrp": 0.5}, signs=["lrp"])
    found = read_attributions(results, "scenes", "cnn", "explained")
    assert [method.name for method in found.methods] == ["lrp", "lrp.relevance", "lrp.counter_relevance", "saliency"]
    assert found.titles() == ["LRP", "LRP, positive contributions", "LRP, negative contributions", "Saliency"]
    whole, positive, negative = (each.maps([2, 3]) for each in found.methods[:3])
    np.testing.assert_allclose(positive + negative, whole)
    assert [bool(each.facts.law) for each in found.methods[:3]] == [True, False, False]
    assert found.methods[0].beyond.any() and not found.methods[1].known.size
    experiment = experiment_of(results, ("cnn", "explained"))
    (page,) = pages_of(experiment)
    with Image.open(experiment.out / page.files[0]) as picture:
        assert picture.size == (5 * 128, 128)
    said = "".join(page.findings)
    assert "No residual is known" not in said
    assert "By LRP, biases and constants keep 25\u00a0% of the score in magnitude (median over images)" in said


def test_a_local_model_that_depends_on_the_draw_is_said(results: Path) -> None:
    write_attributions(results, {"lime": "lime"})
    (page,) = pages_of(experiment_of(results, ("cnn", "explained")))
    said = "".join(page.findings)
    assert "LIME have a median R² of 0.80" in said and "correlation of 0.25: other copies would give other maps" in said


def test_images_of_the_highest_relevance_are_those_that_plain_sorting_gives(results: Path) -> None:
    random = np.random.default_rng(1)
    relevance = random.normal(size=(5, 7))
    relevance[:, 3] = -1
    relevance[2, 5] = np.nan
    write_attributions(results, {"lrp": "lrp"}, units={"lrp": {"a/b": relevance}})
    (layer,) = unit_relevance_of(experiment_of(results, ("cnn", "explained")), "scenes", "cnn").items()
    assert layer[0] == "a/b" and layer[1].title == "LRP"
    slots = np.array([2, 3, 5, 9, 10])
    shown = np.ones(12, bool)
    shown[9] = False
    for unit, found in zip((6, 3, 5), layer[1].most_relevant([6, 3, 5], shown, 3), strict=True):
        own = [
            at for at in np.argsort(-relevance[:, unit], kind="stable") if relevance[at, unit] > 0 and shown[slots[at]]
        ]
        assert found == slots[own[:3]].tolist()
