"""The stage of audits: what it measures against the library, what is measured again, and what is refused."""

import csv

import numpy as np
import pytest
import torch
import xarray as xr
from experiments import audited_numbers, copied, job, lines, run, scenes, shown, tiny
from scipy import stats

import pipeline
from pipeline import attribute
from pipeline.errors import MicrotomeError
from pipeline.networks.build import load
from pipeline.networks.forward import normalise
from pipeline.run import experiment as run_experiment
from pipeline.run import planner
from pipeline.stages.audit.axioms import AXIOMS
from pipeline.stages.audit.page import pages
from pipeline.stages.audit.stage import STAGE, pending
from pipeline.workers import client

STAGES = ("ingest", "concepts", "network", "extract", "dissect", "ablate", "attribute", "audit")
METHODS = {
    "saliency": None,
    "ig": {"method": "integrated_gradients", "steps": 4, "max_steps": 4},
    "grad_cam": {"layer": "b"},
    "lrp": {"layers": ["b"]},
    "deeplift": None,
    "guided": {"method": "guided_backprop"},
}


def experiment(folder, tests=("axioms", "ablation"), methods=METHODS, **how):
    """Scenes and a small CNN, explained and audited."""
    raw = scenes(folder)
    raw["datasets"]["scenes"] |= {"images": {"train": 24, "validation": 20}, "shard_images": 8}
    cnn = tiny(folder, arguments={"classes": 12, "units": 6}, seed=3, layers=["a", "b"])
    raw["networks"] = {"cnn": cnn | {"ablate": {"layers": ["b"], "images": 20, "sizes": [1], "draws": 1}}}
    raw["networks"]["other"] = tiny(folder)
    raw["attribute"] = {"explained": {"networks": ["cnn"], "images": 13, "targets": "label", "methods": methods}}
    raw["audit"] = {
        "honest": {"attributions": "explained", "tests": tests if isinstance(tests, dict) else list(tests)} | how
    }
    return raw


def planned(raw):
    return planner.make(run_experiment.parse(raw), dry=True)


# Refused before any work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attributions": "explaind"}, "no experiment 'explaind' of `attribute`; nearest: explained"),
        ({"tests": ["axiom"]}, "audit.honest.tests.axiom: unknown key; nearest: axioms"),
        ({"tests": []}, "name at least one of axioms"),
        ({"tests": ["axioms", "axioms"]}, "'axioms' is named twice"),
        ({"networks": ["other"]}, "attribute.explained does not explain network 'other'"),
        ({"networks": ["cn"]}, "no network 'cn'; nearest: cnn"),
        ({"datasets": ["scene"]}, "no data set 'scene'; nearest: scenes"),
        ({"without": ["rando"]}, "no control 'rando'; nearest: random"),
        ({"tests": {"ablation": {"images": 3}}}, "audit.honest.tests.ablation.images"),
        ({"tests": {"axioms": {"images": 14}}}, "14 images, and 13 of 'scenes' are explained"),
        ({"tests": {"axioms": {"networks": ["vit"]}}}, "audit.honest.tests.axioms.networks: no network 'vit'"),
        ({"tests": {"ablation": {"layers": ["c"]}}}, "ablation.layers: no unit of 'c' is removed from 'cnn'"),
    ],
)
def test_bad_input_is_refused_by_key(tmp_path, change, said):
    with pytest.raises(MicrotomeError, match=r"audit\.honest") as caught:
        planned(experiment(tmp_path, **change))
    assert said in str(caught.value)


def test_what_the_ablation_lacks_is_refused(tmp_path):
    raw = experiment(tmp_path)
    del raw["networks"]["cnn"]["ablate"]
    with pytest.raises(MicrotomeError, match="it reads what the stage `ablate` makes of 'cnn'"):
        planned(raw)
    with pytest.raises(MicrotomeError, match="no method of the experiment has relevance of units of 'cnn' \\(saliency"):
        planned(experiment(tmp_path, methods={"saliency": None, "lrp": None}))
    raw = experiment(tmp_path)
    raw["attribute"]["explained"]["images"] = 3
    with pytest.raises(MicrotomeError, match="3 images of 'scenes' are explained, expected 4 at least"):
        planned(raw)


def test_the_name_of_the_folder_is_reserved(tmp_path):
    raw = experiment(tmp_path)
    raw["networks"]["audit"] = raw["networks"]["cnn"]
    with pytest.raises(MicrotomeError, match="the name 'audit' is reserved"):
        planned(raw)


def test_a_test_more_moves_the_audit_alone(tmp_path):
    plain, more = planned(experiment(tmp_path, tests=["axioms"])), planned(experiment(tmp_path))
    moved = {step.name for step in more.steps.values()} - {
        step.name for step in more.steps.values() if step.manifest in plain.steps
    }
    assert moved == {"audit honest", "report"}


# What comes out -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return experiment(tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="module")
def made(workers, raw):
    """Run once, for the tests that read; those that change something take a copy."""
    return run(raw, *STAGES)


@pytest.fixture(scope="module")
def rows(made):
    with (made.results / "audit/honest/audit.csv").open() as stream:
        return list(csv.DictReader(stream))


def outcome(rows, method, measure, network="cnn"):
    (found,) = (row for row in rows if (row["method"], row["measure"], row["network"]) == (method, measure, network))
    return found


def cell(made, test, method):
    return xr.open_zarr(made.results / f"audit/honest/cells/scenes/cnn/{test}/{method}.zarr")


@pytest.mark.slow
def test_laws_of_a_network_are_measured(made, rows):
    assert outcome(rows, "lrp", "conservation")["state"] == "holds"
    assert outcome(rows, "lrp", "halves")["state"] == "fails"
    assert outcome(rows, "deeplift", "completeness")["state"] == "holds"
    assert float(outcome(rows, "deeplift", "completeness")["value"]) < 1e-12  # in float64
    assert outcome(rows, "saliency", "completeness")["state"] == "fails"
    assert outcome(rows, "grad_cam", "completeness")["state"] == "not defined"
    assert outcome(rows, "guided", "spelled")["state"] == "refused"
    assert "'clamp' in module" in outcome(rows, "guided", "spelled")["note"]
    assert outcome(rows, "grad_cam", "folded")["state"] == "not defined"  # there is no BatchNorm
    assert {row["state"] for row in rows if row["measure"] == "determinism"} <= {"holds", "not defined"}
    assert outcome(rows, "deeplift", "implementation", "functions")["state"] == "fails"
    law = audited_numbers(cell(made, "axioms", "ig"), "residual")[:, list(AXIOMS).index("own_law")]
    stored = xr.open_zarr(made.results / "scenes/cnn/attributions/explained/ig.zarr").residual.values
    assert (~np.isnan(law)).sum() == 4
    np.testing.assert_array_equal(law[~np.isnan(law)], stored[~np.isnan(law)].astype(float))


@pytest.mark.slow
def test_relevance_of_units_is_that_of_the_library(made):
    images = xr.open_zarr(made.results / "scenes/images.zarr")
    spec = made.networks["cnn"]
    net = load(spec, made.results / "networks/cnn/model.safetensors")
    slots = np.flatnonzero(~np.isnan(cell(made, "ablation", "grad_cam")["relevance.b"].values).any(1))
    inputs = normalise(torch.from_numpy(images.image.values[slots]), spec)
    black = normalise(torch.zeros((1, 3, *inputs.shape[2:]), dtype=torch.uint8), spec)
    target = torch.from_numpy(images.label.values[slots])

    def head(maps):  # what follows the layer, as a network of its maps
        return net.head(net.flatten(net.pool(maps)))

    with torch.no_grad():
        output, first = (net.b(net.a(each)) for each in (inputs, black))
    leaf = output.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(head(leaf).gather(1, target[:, None]).sum(), leaf)
    expected = {
        "grad_cam": gradient.mean((2, 3)) * output.sum((2, 3)),
        "ig": ((output - first) * gradient).sum((2, 3)),  # the head is linear
        "deeplift": ((output - first) * gradient).sum((2, 3)),
        "lrp": None,
    }
    for method, values in expected.items():
        found = cell(made, "ablation", method)["relevance.b"].values[slots]
        if values is None:
            own = xr.open_zarr(made.results / "scenes/cnn/attributions/explained/lrp-relevance.zarr", group="b")
            values = own.relevance[slots].values
        np.testing.assert_allclose(found, np.asarray(values), atol=1e-5 * float(abs(values).max()))
    assert attribute.lrp(net, inputs, target, layers=["b"]).units["b"].shape == found.shape


@pytest.mark.slow
def test_relevance_is_held_against_losses(made, rows):
    losses = xr.open_zarr(made.results / "scenes/cnn/ablation.zarr", group="b")
    judged = losses.balanced_accuracy_loss.sel(split="validation").values
    images, store = xr.open_zarr(made.results / "scenes/images.zarr"), cell(made, "ablation", "grad_cam")
    labels, relevance = images.label.values, store["relevance.b"].values
    explained = np.flatnonzero(~np.isnan(relevance).any(1))
    found = {}
    for c in np.unique(labels[explained]):
        own = explained[labels[explained] == c]
        alike = np.ptp(judged[:, c]) == 0  # the class loses the same by every unit, mostly nothing
        found[int(c)] = np.nan if alike else stats.spearmanr(relevance[own].mean(0), judged[:, c]).statistic
    known = [each for each in found.values() if not np.isnan(each)]
    assert known, "no class of this network loses anything"
    assert float(outcome(rows, "grad_cam", "rank.b")["value"]) == pytest.approx(np.mean(known), abs=1e-6)
    names = images.attrs["classes"]
    for c, value in found.items():
        row = outcome(rows, "grad_cam", f"rank.b.{names[c]}")
        assert row["value"] == "" if np.isnan(value) else float(row["value"]) == pytest.approx(value, abs=1e-6)
    with (made.results / "audit/honest/audit-concepts.csv").open() as stream:
        shares = [row for row in csv.DictReader(stream) if row["method"] == "grad_cam"]
    totals = {}
    for row in shares:
        totals[row["class"]] = totals.get(row["class"], 0) + float(row["relevance"])
    assert totals and all(total == pytest.approx(1, abs=1e-5) or total == 0 for total in totals.values())


@pytest.mark.slow
def test_results_open_as_arrays(made, rows):
    found = pipeline.open_results(made.results).audit["honest"]["scenes"]
    one = found.sel({"network": "cnn", "method": "deeplift", "measure": "axioms.completeness"})
    assert str(one.state.values) == "holds"
    assert float(one.value) == pytest.approx(float(outcome(rows, "deeplift", "completeness")["value"]), rel=1e-6)
    assert str(found.test.sel(measure="ablation.rank.b").values) == "ablation"


@pytest.mark.slow
def test_the_page_shows_the_audit(made, tmp_path):
    (page,) = pages(shown(made, "audit", tmp_path))
    assert [one.name for one in (each.found for each in page.values["sections"])] == ["honest"]
    assert any("small functions with exact answers" in each for each in page.findings)
    assert len(page.figures) == 3  # laws on functions and on the network, and the ablation
    assert {each.method for each, *_ in page.values["sections"][0].shares} >= {"grad_cam", "lrp", "control:random"}
    assert [(tmp_path / file).exists() for file in page.files] == [True, True]
    assert all((tmp_path / file).exists() for figure in page.figures for file in figure.written)


@pytest.mark.slow
def test_what_a_change_measures_again(raw, made, tmp_path):
    own = copied(made, raw, tmp_path)
    cells = tmp_path / "results/audit/honest/cells/scenes/cnn"

    def measured():
        return {path.relative_to(cells).as_posix(): len(lines(path)) for path in sorted(cells.rglob("*.ledger"))}

    before = measured()
    own["attribute"]["explained"]["methods"] = METHODS | {"gradient_x_input": None}
    again = run(own, *STAGES)
    after = measured()
    assert {name for name in after if after[name] != before.get(name)} == {
        "axioms/gradient_x_input.ledger", "ablation/gradient_x_input.ledger",
    }  # fmt: skip
    assert pending(job(again, "audit", None, None, "honest"))[0] == 0
    own["audit"]["honest"]["tests"] = ["axioms"]
    done = run(own, *STAGES)
    gone = {path.parent.name for path in STAGE.unreferenced(done.results, set())}
    assert measured() == after and gone == {"ablation", "controls"}
    own["audit"]["honest"]["tests"] = ["axioms", "ablation"]
    own["networks"]["cnn"]["ablate"]["images"] = 12
    run(own, *STAGES)
    final = measured()
    assert {name for name in final if final[name] != after[name]} == {"ablation/controls/other_split.ledger"}
    losses = xr.open_zarr(tmp_path / "results/scenes/cnn/ablation.zarr", group="b").balanced_accuracy_loss
    ranked = next(each for each in losses.split.values.tolist() if each != "validation")
    copied_losses = xr.open_zarr(cells / "ablation/controls/other_split.zarr", consolidated=False)["relevance.b"].values
    slots = np.flatnonzero(~np.isnan(copied_losses).any(1))
    labels = xr.open_zarr(tmp_path / "results/scenes/images.zarr").label.values[slots]
    np.testing.assert_array_equal(copied_losses[slots], losses.sel(split=ranked).values[:, labels].T)


@pytest.mark.slow
def test_an_interrupted_run_and_two_workers_give_the_same_bytes(raw, made, tmp_path, two_workers, monkeypatch):
    own = copied(made, raw, tmp_path)
    done = job(made, "audit", None, None, "honest").read()
    folder = tmp_path / "results/audit/honest"
    for ledger in folder.rglob("*.ledger"):
        text = ledger.read_text().splitlines(keepends=True)
        ledger.write_text("".join(text[: len(text) // 2]))
    for manifest in (folder / "done").glob("*.json"):
        manifest.unlink()
    monkeypatch.setenv(client.ADDRESS, two_workers)
    again = job(run(own, *STAGES), "audit", None, None, "honest").read()
    assert again.digest == done.digest and again.files == done.files
