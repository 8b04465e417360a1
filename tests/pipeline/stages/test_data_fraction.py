"""Copies of a network that are trained on parts of the images: which parts, what is made for them, what is refused."""

import csv
import itertools
import json

import numpy as np
import pytest
import xarray as xr
from experiments import VIT, run, scenes, shown, tiny

from pipeline.errors import MicrotomeError
from pipeline.networks import inspection
from pipeline.plan import inspected
from pipeline.run import experiment as run_experiment
from pipeline.run import forecast, planner, preflight
from pipeline.stages.network.tasks import part_of

STAGES = ("ingest", "network", "grams", "similarity")


def experiment(folder, **fractions):
    """A CNN trained for four steps, and copies of it on parts of the images."""
    raw = scenes(folder)
    raw["datasets"]["scenes"]["images"] = {"train": 120, "validation": 16}
    recipe = {"steps": 4, "batch_size": 8, "threads": 1}
    raw["networks"] = {
        "cnn": tiny(folder, arguments={"classes": 12}, weights="train", train={"dataset": "scenes", "recipe": recipe})
    }
    asked = {"network": "cnn", "fractions": [0.5, 0.25, 1.0]} | fractions
    raw["similarity"] = {"data_fraction": {"data": asked}, "images": 16, "minibatch": 8, "neighbours": 3}
    return raw


def test_copies_are_trained_compared_and_not_dissected(tmp_path, workers):
    raw = experiment(tmp_path)
    made = planner.make(run_experiment.parse(raw))
    names = [step.network for step in made.of_stage("network")]
    assert names == ["cnn", "cnn-untrained", "cnn-data0.25", "cnn-data0.5"]
    assert [step.network for step in made.of_stage("dissect")] == ["cnn", "cnn-untrained"]
    assert [step.network for step in made.of_stage("grams")] == ["cnn-data0.25", "cnn-data0.5", "cnn"]
    made = run(raw, *STAGES)
    facts = {
        name: json.loads((made.results / "networks" / name / "model.json").read_text())
        for name in ("cnn", "cnn-data0.25", "cnn-data0.5")
    }
    assert facts["cnn"]["train_images"] == 120
    assert abs(facts["cnn-data0.5"]["train_images"] - 60) <= 6 and abs(facts["cnn-data0.25"]["train_images"] - 30) <= 6
    assert len({one["weights_sha256"] for one in facts.values()}) == 3
    assert {one["validation_images"] for one in facts.values()} == {16}
    found = xr.open_zarr(made.results / "similarity/data/cka.zarr")
    assert found.attrs["fractions"] == {"cnn-data0.25": 0.25, "cnn-data0.5": 0.5}
    assert found.layer_a.values.tolist() == [
        f"{name}/{layer}" for name in ("cnn-data0.25", "cnn-data0.5", "cnn") for layer in "ab"
    ]
    # As the full network, and as each other: all began with the same random weights.
    assert np.isfinite(found.cka.values).all() and float(found.cka.sel(layer_a="cnn/a", layer_b="cnn-data0.5/a")) > 0.5


def test_a_smaller_part_lies_within_a_larger_one():
    rng = np.random.default_rng(0)
    label = rng.integers(-1, 5, 700)
    mask = rng.random(700) < 0.9
    label[:3] = [7, 7, 7]
    names = np.array([f"image {at}" for at in range(700)])
    parts = [part_of(mask, label, names, fraction, 0) for fraction in (0.01, 0.1, 0.3, 0.99, 1.0)]
    for smaller, larger in itertools.pairwise(parts):
        assert (larger | ~smaller).all()
    np.testing.assert_array_equal(parts[-1], mask & (label >= 0))
    for fraction, part in zip((0.01, 0.1, 0.3), parts, strict=False):
        for one in (0, 1, 2, 3, 4, 7):
            there = (mask & (label == one)).sum()
            assert (part & (label == one)).sum() == max(1, round(fraction * there))
    assert (part_of(mask, label, names, 0.1, 1) != parts[1]).any()
    # It goes by the ids: images that come move no other.
    grown = part_of(np.append(mask, True), np.append(label, 7), np.append(names, "another"), 0.1, 0)
    assert (grown[:-1] == parts[1])[label != 7].all()


def test_ids_stay(tmp_path):
    raw = experiment(tmp_path)
    made = planner.make(run_experiment.parse(raw))
    settings = made.step("network", network="cnn").settings["train"]
    assert "fraction" not in settings
    assert made.step("network", network="cnn-data0.5").settings["train"] == settings | {"fraction": 0.5}
    raw["similarity"]["compare"] = {"data-only": {"networks": ["cnn"]}}
    both = planner.make(run_experiment.parse(raw))
    assert set(made.steps) - set(both.steps) == {made.step("report").manifest}
    del raw["similarity"]
    plain = planner.make(run_experiment.parse(raw))
    assert {path for path, step in plain.steps.items() if step.stage != "report"} < set(made.steps)
    again = planner.read(planner.save(made))
    assert again.steps == made.steps and again.networks == made.networks


def test_a_fraction_of_ones_own(tmp_path):
    """`fraction` can be asked of any network; its copies have parts of that part."""
    raw = experiment(tmp_path)
    raw["networks"]["cnn"]["train"]["fraction"] = 0.5
    made = planner.make(run_experiment.parse(raw))
    assert made.step("network", network="cnn").settings["train"]["fraction"] == 0.5
    assert made.step("network", network="cnn-data0.5").settings["train"]["fraction"] == 0.25


def test_what_a_run_would_take(tmp_path, monkeypatch):
    """Copies have the layers and the speed of their network, which alone is inspected."""
    asked = []

    def in_own_process(module, requests, what):
        asked.extend(requests)
        return json.loads(json.dumps(inspection.answer(json.loads(json.dumps(requests)))))

    monkeypatch.setattr(inspected, "in_own_process", in_own_process)
    raw = experiment(tmp_path)
    raw["similarity"]["layers"] = {"cnn": "all"}
    made = planner.make(run_experiment.parse(raw))
    preflight.check(made)
    assert len(asked) == 1
    costs = {each.job.name: each.cost for each in forecast.forecast(made)}
    assert costs["grams scenes cnn-data0.5"].stores[0].raw == costs["grams scenes cnn"].stores[0].raw > 0


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"network": "cn"}, r"data_fraction.data: no network 'cn'.*cnn"),
        ({"fractions": [0.0]}, r"fractions.0"),
        ({"fractions": [1.5]}, r"fractions.0"),
        ({"fractions": []}, r"data_fraction.data.fractions"),
        ({"fractions": [1]}, r"fractions: 1 alone is the network itself"),
        ({"fractions": [0.5, 0.5]}, r"fractions: 0.5 is there twice"),
        ({"dataset": "scene"}, r"data_fraction.data: no data set 'scene'.*scenes"),
        ({"fraction": [0.5]}, r"data_fraction.data.fraction: unknown key.*fractions"),
        ({"network": "vit"}, r"network 'vit' is not trained here \(weights: 'random'\)"),
        ({"network": "cnn", "fractions": [0.1]}, r"copy would be called 'cnn-data0.1', as a network is"),
    ],
)
def test_what_is_refused(tmp_path, fractions, message):
    raw = experiment(tmp_path, **fractions)
    (tmp_path / "vit.py").write_text(VIT)
    raw["networks"]["vit"] = {"module": f"{tmp_path / 'vit.py'}:vit", "weights": "random"}
    raw["networks"]["cnn-data0.1"] = raw["networks"]["vit"]
    with pytest.raises(MicrotomeError, match=message):
        run_experiment.parse(raw)


def test_names_and_empty_sections_that_are_refused(tmp_path):
    raw = experiment(tmp_path)
    raw["similarity"]["compare"] = {"data": {"networks": ["cnn"]}}
    with pytest.raises(MicrotomeError, match=r"data_fraction.data: `compare` has a comparison of this name"):
        run_experiment.parse(raw)
    raw["similarity"] = {}
    with pytest.raises(MicrotomeError, match=r"give networks to `compare`, or a `data_fraction`"):
        run_experiment.parse(raw)


def test_fewer_images_than_classes(tmp_path):
    with pytest.raises(MicrotomeError, match=r"'cnn-data0.05': 0.05 of the 120 images .* are 6, and they are of 12 cl"):
        planner.make(run_experiment.parse(experiment(tmp_path, fractions=[0.05])))


def test_only_keeps_it_with_its_network(tmp_path):
    raw = experiment(tmp_path)
    (tmp_path / "vit.py").write_text(VIT)
    raw["networks"]["vit"] = {"module": f"{tmp_path / 'vit.py'}:vit", "weights": "random"}
    kept = run_experiment.parse(raw | {"only": "cnn"})
    assert kept.similarity is not None and list(kept.similarity.comparisons) == ["data"]
    assert run_experiment.parse(json.loads(kept.model_dump_json())) == kept
    assert run_experiment.parse(raw | {"only": "vit"}).similarity is None


def test_the_page_of_the_report(tmp_path, workers):
    from pipeline.stages.report.site import render
    from pipeline.stages.similarity import page

    made = run(experiment(tmp_path), *STAGES)
    compared = shown(made, "similarity", tmp_path / "report", formats=())
    (found,) = page.pages(compared)
    cka = xr.open_zarr(made.results / "similarity/data/cka.zarr").cka
    for fraction in ("0.25", "0.5"):
        values = {
            layer: float(cka.sel(layer_a=f"cnn-data{fraction}/{layer}", layer_b=f"cnn/{layer}")) for layer in "ab"
        }
        low, high = sorted(values, key=values.__getitem__)
        said = next(each for each in found.findings if each.startswith(f"Trained on {100 * float(fraction):.1f}"))
        assert f"at {low}, with a CKA of {values[low]:.3f}" in said and f"at {high}, {values[high]:.3f}" in said
    assert sum(" uniform" in each for each in found.findings) == 2, "each copy against the network itself"
    assert found.figures[0].kind == "similarity-fractions"
    with (tmp_path / "report" / found.figures[0].files["csv"]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["fraction"], row["layer"]) for row in rows] == [(f, layer) for f in ("0.25", "0.5") for layer in "ab"]
    assert float(rows[2]["cka"]) == pytest.approx(float(cka.sel(layer_a="cnn-data0.5/a", layer_b="cnn/a")))
    assert render(compared, found, [found]).count("<figure>") == len(found.figures)
