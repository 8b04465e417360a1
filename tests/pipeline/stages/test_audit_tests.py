"""Faithfulness, sanity and place as tests of a run, and what of them is refused before any work."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from experiments import SIZE, audited_numbers, run, scenes, tiny, write_image

from pipeline.errors import MicrotomeError
from pipeline.networks.build import build
from pipeline.run import experiment as run_experiment
from pipeline.run import planner
from pipeline.stages.registry import jobs

METHODS = {"saliency": None, "gradient_x_input": None, "grad_cam": {"layer": "a"}}
FAITHFUL = {
    "deletion": {"steps": 4},
    "insertion": {"steps": 4, "fillers": ["blur", "mean"]},
    "road": {"shares": [0.3, 0.6]},
    "sensitivity_n": {"shares": [0.1, 0.5], "sets": 6},
    "infidelity": {"sets": 6},
    "log_odds": None,
    "stability": {"draws": 2},
    "linear_view": {"radii": [1, 30], "draws": 4},
    "layer_randomisation": {"groups": 3},
    "label_randomisation": {"network": "other"},
}
PLACE = {"concept_of": {"*": ["sky", "grass"]}, "category": "truth/object"}


def experiment(folder: Path, tests: Any, classes: int = 12) -> dict[str, Any]:
    """Scenes and two small networks with weights of their own, explained and audited."""
    raw = scenes(folder)
    raw["networks"] = {
        name: tiny(folder, arguments={"classes": classes}, weights=str(folder / f"{name}.pt"), seed=seed)
        for seed, name in enumerate(("cnn", "other"))
    }
    for seed, (name, spec) in enumerate(raw["networks"].items()):
        if not (folder / f"{name}.pt").exists():
            parsed = run_experiment.parse(scenes(folder, networks={"tiny": {**spec, "weights": "random"}}))
            torch.manual_seed(seed)
            network = build(parsed.networks["tiny"])
            torch.save(
                {key: each + 0.3 * torch.randn_like(each) for key, each in network.state_dict().items()},
                folder / f"{name}.pt",
            )
    raw["attribute"] = {"explained": {"images": 8, "networks": ["cnn", "other"], "methods": METHODS}}
    raw["audit"] = {"honest": {"attributions": "explained", "networks": ["cnn", "other"], "tests": tests}}
    return raw


def table(made: Any) -> dict[tuple[str, str, str, str], dict[str, str]]:
    with (made.results / "audit" / "honest" / "audit.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["network"], row["method"], row["test"], row["measure"]): row for row in rows}


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_every_test_has_its_rows_and_its_controls(tmp_path: Path) -> None:
    tests = (
        FAITHFUL
        | {"mass": {"category": "truth/object", "concepts": ["sky", "road"]}}
        | {"localisation": PLACE | {"thresholds": 10}, "pointing": PLACE | {"tolerance": 2}}
    )
    made = run(experiment(tmp_path, tests), "ingest", "concepts", "network", "attribute", "audit")
    rows = table(made)
    assert {key[2] for key in rows} == set(tests)
    for test, measure in (
        ("deletion", "probability_black"),
        ("insertion", "score_mean"),
        ("road", "accuracy_most_first"),
        ("sensitivity_n", "correlation.0.1"),
        ("infidelity", "scaled_infidelity"),
        ("log_odds", "change"),
        ("localisation", "max_box_acc"),
        ("pointing", "energy"),
        ("mass", "energy.sky"),
    ):
        for method in (*METHODS, "control:random", "control:edges"):
            row = rows["cnn", method, test, measure]
            assert row["state"] == "", row
            assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
    assert (
        rows["cnn", "control:whole", "pointing", "hit"]["value"]
        == rows["cnn", "control:whole", "pointing", "area"]["value"]
    )
    for method in METHODS:
        last = [
            float(rows["cnn", method, "layer_randomisation", f"cascading_rank.{at}/3"]["value"]) for at in (1, 2, 3)
        ]
        assert len(set(last)) == 3, "each step changes the maps"
        row = rows["cnn", method, "stability", "rank_correlation"]
        assert 0.5 < float(row["value"]) <= 1
    assert not any(key[0] == "other" for key in rows if key[2] == "label_randomisation"), "compared with itself"
    assert float(rows["cnn", "saliency", "label_randomisation", "rank"]["value"]) < 0.99
    view = [row for key, row in rows.items() if key[2] == "linear_view" and key[1] == "grad_cam"]
    assert {row["state"] for row in view} == {"not defined"}
    near, far = (float(rows["cnn", "saliency", "linear_view", f"r2.{each}"]["value"]) for each in (1, 30))
    assert near > 0.9
    assert far < near


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_boxes_of_a_table_are_those_of_the_images_as_the_network_sees_them(tmp_path: Path) -> None:
    """Images of twice the size: boxes shrink with them, and those of images that are not there are left out."""
    draw, lines, boxes = np.random.default_rng(0), ["image,label"], ["path,class,xmin,ymin,xmax,ymax"]
    truths = {}
    for at in range(8):
        write_image(tmp_path, f"i{at}", draw.integers(0, 256, (2 * SIZE, 2 * SIZE, 3), np.uint8))
        lines.append(f"i{at}.png,{'ab'[at % 2]}")
        x, y = (int(each) for each in draw.integers(0, 16, 2))
        if at != 3:
            boxes.append(f"images/i{at}.png,{'ab'[at % 2]},{x},{y},{x + 12},{y + 14}".replace("images/", ""))
            truths[f"i{at}.png"] = x, y
    boxes.append("elsewhere.png,c,0,0,1,1")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    (tmp_path / "boxes.csv").write_text("\n".join(boxes))
    located = {"boxes": str(tmp_path / "boxes.csv")}
    raw = experiment(tmp_path, {"pointing": located | {"tolerance": 1}, "localisation": located | {"thresholds": 8}}, 2)
    raw["datasets"] = {
        "photos": {"kind": "csv", "root": str(tmp_path / "images"), "table": str(tmp_path / "labels.csv")}
        | {"resize": {"squash": [SIZE, SIZE]}, "shard_images": 4, "split": {"all": "validation"}}
    }
    raw["attribute"]["explained"] |= {"targets": "label", "networks": ["cnn"]}
    raw["audit"]["honest"]["networks"] = ["cnn"]
    made = run(raw, "ingest", "network", "attribute", "audit")
    cell = made.results / "audit" / "honest" / "cells" / "photos" / "cnn" / "pointing" / "saliency.zarr"
    found = xr.open_zarr(cell, consolidated=False)
    energy, hit, area = (audited_numbers(found, measure) for measure in ("energy", "hit", "area"))
    images = xr.open_zarr(made.results / "photos" / "images.zarr", consolidated=True)
    maps = xr.open_zarr(
        made.results / "photos" / "cnn" / "attributions" / "explained" / "saliency.zarr", consolidated=True
    )
    for slot, name in enumerate(images.image_id.values.tolist()):
        values = maps.attribution.values[slot]
        if name not in truths:
            assert np.isnan(energy[slot])
            continue
        x, y = truths[name]
        centres = np.arange(SIZE) + 0.5
        inside = np.outer((centres >= y / 2) & (centres < (y + 14) / 2), (centres >= x / 2) & (centres < (x + 12) / 2))
        assert energy[slot] == pytest.approx(values[inside].sum() / values.sum(), rel=1e-5)
        assert hit[slot] == inside.ravel()[values.argmax()]
        assert area[slot] == pytest.approx(inside.mean())
    rows = table(made)
    assert rows["cnn", "saliency", "pointing", "hit"]["images"] == "7"
    iou = float(rows["cnn", "control:whole", "localisation", "cam.iou"]["value"])
    assert iou == pytest.approx(6 * 7 / SIZE**2)
    assert float(rows["cnn", "control:whole", "localisation", "max_box_acc"]["value"]) == 0
    assert rows["cnn", "saliency", "localisation", "cam.top5_error"]["state"] == ""


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_networks_with_images_and_tests_of_their_own(tmp_path: Path) -> None:
    """A control with fewer images, a first network without a test, segments of label maps, another untrained twin."""
    parts = {
        "method": "kernel_shap",
        "samples": 8,
        "segments": {"kind": "labels", "category": "truth/object", "count": 3},
    }
    tests = {
        "stability": {"networks": ["other"], "draws": 1},
        "log_odds": {"networks": ["other", "other-untrained"]},
        "layer_randomisation": {"groups": 1, "networks": ["other"]},
    }
    raw = experiment(tmp_path, tests)
    raw["controls"] = {"images": 5}
    named = ["cnn", "other", "other-untrained"]
    raw["attribute"]["explained"] |= {"networks": named, "methods": {"saliency": None, "parts": parts}}
    raw["audit"]["honest"]["networks"] = named
    stages = "ingest", "concepts", "network", "attribute", "audit"
    made = run(raw, *stages)
    (audit,) = (each for each in jobs(made) if each.stage.name == "audit")
    assert audit.read().result["images"] == {"scenes": 8}
    group = xr.open_zarr(made.results / "audit" / "honest" / "audit.zarr", group="scenes")
    cells = made.results / "audit" / "honest" / "cells" / "scenes"
    images = {}
    for network, test, measure in (
        ("other", "stability", "rank_correlation"),
        ("other", "log_odds", "change"),
        ("other-untrained", "log_odds", "change"),
    ):
        own = audited_numbers(xr.open_zarr(cells / network / test / "parts.zarr", consolidated=False), measure)
        known = np.flatnonzero(~np.isnan(own))
        images[network, test] = len(known)
        where = {"image_network": network, "image_method": "parts", "image_measure": f"{test}.{measure}"}
        placed = group.by_image.sel(where)
        np.testing.assert_array_equal(placed.values, own[group.slot.values])
        assert set(known) <= set(group.slot.values.tolist())
    assert list(images.values()) == [8, 8, 5]
    rows = table(made)
    assert {key[0] for key in rows} == {"other", "other-untrained"}
    assert {row["state"] for row in rows.values()} == {""}, "segments of label maps are read for any test"

    def written() -> dict[str, int]:
        return {str(each.relative_to(cells)): len(each.read_text().splitlines()) for each in cells.rglob("*.ledger")}

    before = written()
    raw["networks"]["other"]["seed"] = 7  # of a checkpoint: only its untrained twin changes
    run(raw, *stages)
    again = {name for name, lines in written().items() if lines != before[name]}
    assert {name for name in again if name.startswith("other/")} == {
        f"other/layer_randomisation/{method}.ledger" for method in ("parts", "saliency")
    }


REFUSED = [
    ({"pointing": None}, "give `boxes`, or `concept_of`"),
    ({"pointing": {"boxes": "/no/such.csv"}}, "audit.honest.tests.pointing.boxes: no file or folder /no/such.csv"),
    ({"pointing": {"boxes": "BOXES", "class_of": {"x": "nothing"}}}, "class_of: 'x' is 'nothing', which is no class"),
    ({"pointing": {"concept_of": {"nothing": "sky", "*": None}, "category": "truth/object"}}, "no class 'nothing'"),
    ({"pointing": {"concept_of": {"city street": "sky"}, "category": "truth/object"}}, "has no concept, nor have"),
    ({"pointing": {"concept_of": {"*": "sky"}, "category": "thing"}}, "category: no category 'thing'"),
    ({"pointing": {"concept_of": {"*": "sky"}}}, "category: name one of"),
    (
        {"pointing": {"concept_of": {"*": "skye"}, "category": "truth/object"}},
        "no concept 'skye' of 'scenes'; nearest: sky",
    ),
    ({"localisation": {"boxes": "BOXES", "rules": []}}, "rules"),
    ({"localisation": {"boxes": "BOXES", "rules": ["cams"]}}, "rules"),
    ({"localisation": {"boxes": "WRONG"}}, "tests.localisation.boxes: line 2"),
    ({"mass": {"category": "truth/object", "concepts": ["skies"]}}, "mass.concepts: no concept 'skies'"),
    ({"mass": {"category": "truth", "concepts": ["sky"]}}, "mass.category: no category 'truth'"),
    ({"label_randomisation": None}, "network"),
    ({"label_randomisation": {"network": "nobody"}}, "label_randomisation.network: no network 'nobody'"),
    ({"label_randomisation": {"network": "third"}}, "no network 'third' of the audit on 'scenes'"),
    (
        {"label_randomisation": {"network": "other", "networks": ["other"]}},
        "tests.label_randomisation: none of the audit's networks is put to it",
    ),
    ({"deletion": {"fillers": ["grey"]}}, "fillers"),
    ({"road": {"shares": [0.9, 0.1]}}, "ascending"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("refused")
    (made / "boxes.csv").write_text("path,class,xmin,ymin,xmax,ymax\na,b,0,0,1,1\n")
    (made / "wrong.csv").write_text("path,class,xmin,ymin,xmax,ymax\na,b,0,0,zero,1\n")
    return made


def planned(folder: Path, tests: Any) -> None:
    text = json.dumps(tests).replace("BOXES", str(folder / "boxes.csv")).replace("WRONG", str(folder / "wrong.csv"))
    raw = experiment(folder, json.loads(text))
    raw["networks"]["third"] = tiny(folder)
    planner.make(run_experiment.parse(raw))


@pytest.mark.parametrize(("tests", "message"), REFUSED, ids=lambda each: str(each)[:60])
def test_bad_input_is_refused_while_the_plan_is_made(folder: Path, tests: Any, message: str) -> None:
    with pytest.raises(MicrotomeError) as error:
        planned(folder, tests)
    assert message in str(error.value)


def test_a_library_that_is_not_installed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    there = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "cv2" else there(name, *rest))
    with pytest.raises(MicrotomeError, match=r"rules: grab_cut needs OpenCV, .*\[boxes\]"):
        planned(folder, {"localisation": {"boxes": "BOXES", "rules": ["grab_cut"]}})


def test_a_network_that_is_not_trained_has_nothing_to_forget(folder: Path) -> None:
    raw = experiment(folder, ["layer_randomisation"])
    raw["networks"]["cnn"]["weights"] = "random"
    with pytest.raises(MicrotomeError, match="layer_randomisation: network 'cnn' is not trained"):
        planner.make(run_experiment.parse(raw))


def test_other_boxes_are_another_audit(folder: Path) -> None:
    """The boxes themselves are part of the id, and not when their file was written."""

    def step_id(text: str) -> str:
        (folder / "own.csv").write_text(f"path,class,xmin,ymin,xmax,ymax\n{text}\n")
        raw = experiment(folder, {"pointing": {"boxes": str(folder / "own.csv")}})
        return next(each.id for each in planner.make(run_experiment.parse(raw)).steps.values() if each.stage == "audit")

    first = step_id("a,b,0,0,1,1")
    assert step_id("a,b,0.0,0,1,1") == first
    assert step_id("a,b,0,0,1,2") != first


def test_the_untrained_twin_is_part_of_the_id_where_a_test_runs_it(folder: Path) -> None:
    def audit(tests: list[str], seed: int) -> Any:
        raw = experiment(folder, tests)
        raw["networks"]["cnn"]["seed"] = seed
        return next(each for each in planner.make(run_experiment.parse(raw)).steps.values() if each.stage == "audit")

    assert audit(["log_odds"], 1).id == audit(["log_odds"], 2).id
    assert audit(["layer_randomisation"], 1).id != audit(["layer_randomisation"], 2).id


def test_label_maps_that_a_method_reads_are_parents(folder: Path) -> None:
    raw = experiment(folder, ["log_odds"])
    plain = planner.make(run_experiment.parse(raw))
    parted = {"method": "lime", "segments": {"kind": "labels", "category": "truth/object"}}
    raw["attribute"]["explained"]["methods"] = {"lime": parted}
    found = planner.make(run_experiment.parse(raw))
    parents = [
        {each.steps[path].stage for step in each.steps.values() if step.stage == "audit" for path in step.parents}
        for each in (plain, found)
    ]
    assert [("concepts" in each) for each in parents] == [False, True]
