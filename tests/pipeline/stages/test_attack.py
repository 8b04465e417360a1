"""The stage of attacks: what it stores against the network itself, what is made again, and what is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from attacks import FOOLED, experiment
from experiments import copied, job, lines, run, shown

import pipeline
from pipeline.errors import MicrotomeError
from pipeline.networks.build import load
from pipeline.networks.forward import normalise
from pipeline.networks.pixels import inputs_of
from pipeline.run import experiment as run_experiment
from pipeline.run import planner, preflight
from pipeline.stages.attack import page as of_page
from pipeline.workers import client

pytestmark = pytest.mark.usefixtures("workers")
BEFORE = ("ingest", "network", "concepts", "extract", "dissect", "ablate")
ATTACKS = ["pgd-linf-8", "pgd-linf-24", "pgd-l2-1.5", "apgd_ce-linf-8", "apgd_ce-linf-24", "apgd_ce-l2-1.5"]
ATTACKS += ["apgd_dlr-linf-8", "apgd_dlr-linf-24", "apgd_dlr-l2-1.5", "cw_l2", "square-linf-8", "square-linf-24"]
PAIRS = ["3-7", "7-3", "untargeted"]


@pytest.fixture(scope="module")
def made(workers, tmp_path_factory):
    """Run once, for the tests that read; those that change something take a copy."""
    return run(experiment(tmp_path_factory.mktemp("attack")), *BEFORE, "attack")


def folder_of(made, network="cnn", name="fooled"):
    return made.results / "scenes" / network / "attacks" / name


def opened(made, store, group):
    return xr.open_zarr(folder_of(made) / f"{store}.zarr", group=group, consolidated=False)


def table(made, name="attacks"):
    with (folder_of(made) / f"{name}.csv").open() as stream:
        return list(csv.DictReader(stream))


def of_network(made):
    spec = made.networks["cnn"]
    net = load(spec, made.results / "networks/cnn/model.safetensors")
    return lambda pixels: net(normalise(torch.from_numpy(np.array(pixels)), spec)).detach().numpy(), net, spec


def test_what_is_stored_is_what_the_network_says(made):
    said, _, _ = of_network(made)
    images = xr.open_zarr(made.results / "scenes/images.zarr").image.values
    before = said(images).argmax(1)
    attacked_any = 0
    for attack in ATTACKS:
        for pair in PAIRS:
            store = opened(made, attack, pair)
            state = store.state.values
            rows = np.flatnonzero(state >= 1)
            attacked_any += len(rows)
            if not len(rows):
                continue
            after = said(store.image.values[rows]).argmax(1)
            np.testing.assert_array_equal(store.predicted_before.values[rows], before[rows])
            np.testing.assert_array_equal(store.predicted.values[rows], after)
            target = store.attrs["target"]
            good = after == target if target is not None else after != before[rows]
            np.testing.assert_array_equal(state[rows] == 2, good)
            if target is not None:
                assert (before[rows] == store.attrs["source"]).all()
            delta = store.image.values[rows].astype(np.int64) - images[rows]
            np.testing.assert_array_equal(store.linf.values[rows], np.abs(delta).max((1, 2, 3)))
            length = np.sqrt((delta.astype(np.float64) ** 2).sum((1, 2, 3))) / 255
            np.testing.assert_allclose(store.l2.values[rows], length, rtol=1e-6)
            if (bound := store.attrs["epsilon"]) is not None:
                assert (store[store.attrs["norm"]].values[rows] <= bound).all() and (
                    store.excess.values[rows] == 0
                ).all()
            assert (store.image.values[state < 1] == 0).all()
    assert attacked_any > 20


def test_images_that_were_wrong_are_counted_apart(made):
    store = opened(made, "cw_l2", "3-7")
    state, before = store.state.values, store.predicted_before.values
    assert ((before == 3) == (state >= 1))[state >= 0].all() and (state >= 0).sum() == FOOLED["images"]
    row = next(row for row in table(made) if row["attack"] == "cw_l2" and row["source"] == "farm")
    assert int(row["images"]) == (state >= 0).sum() and int(row["attacked"]) == (state >= 1).sum()
    assert int(row["succeeded"]) == (state == 2).sum()


def test_units_are_those_of_the_network(made):
    _, net, spec = of_network(made)
    images = xr.open_zarr(made.results / "scenes/images.zarr").image.values
    twin = (
        load(made.networks["cnn-untrained"], made.results / "networks/cnn-untrained/model.safetensors")
        if (made.results / "networks/cnn-untrained").is_dir()
        else None
    )
    order = xr.open_zarr(made.results / "scenes/cnn/ablation.zarr", group="b", consolidated=False).order.values
    store, units = opened(made, "pgd-linf-24", "untargeted"), opened(made, "pgd-linf-24-units", "untargeted")
    rows = np.flatnonzero(store.state.values >= 1)

    def maps(network, pixels):
        kept = {}
        handle = network.b.register_forward_hook(lambda _, __, out: kept.update(out=out.detach()))
        network(normalise(torch.from_numpy(np.array(pixels)), spec))
        handle.remove()
        return kept["out"].numpy()

    before, after = maps(net, images[rows]), maps(net, store.image.values[rows])
    np.testing.assert_allclose(units.peak.values[rows], before.max((2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(units.peak_attacked.values[rows], after.max((2, 3)), rtol=1e-5, atol=1e-6)
    assert ("peak_untrained" in units) == (twin is not None)
    for at, row in enumerate(rows):
        chosen = np.concatenate([order[store[key].values[row]][:4] for key in ("predicted_before", "predicted")])
        known = chosen >= 0
        wanted = (after - before)[at, chosen[known]]
        np.testing.assert_allclose(units.change.values[row][known], wanted, rtol=1e-4, atol=1e-5)
        assert np.isnan(units.change.values[row][~known]).all()
        source = int(store.predicted_before.values[row])
        if known[:4].all():
            with torch.no_grad():
                masked = torch.from_numpy(before[at : at + 1].copy())
                masked[:, chosen[:4]] = 0
                logits = net.head(masked.mean((2, 3)))[0].numpy()
            margin = logits[source] - np.delete(logits, source).max()
            assert units.margin_without.values[row] == pytest.approx(margin, rel=1e-4, abs=1e-5)


def test_tables_are_of_what_is_stored(made):
    rows = [row for row in table(made, "attack-units") if row["attack"] == "pgd-linf-24" and row["shown"] == "attack"]
    assert [(row["important_to"], row["rank"]) for row in rows] == [
        *((of, str(rank)) for of in ("source", "target") for rank in range(1, 5)),
        *(("random", ""), ("others", "")),
    ]
    order = xr.open_zarr(made.results / "scenes/cnn/ablation.zarr", group="b", consolidated=False).order.values
    by_slot = {}
    for pair in PAIRS:
        store, units = opened(made, "pgd-linf-24", pair), opened(made, "pgd-linf-24-units", pair)
        for row in np.flatnonzero(store.state.values >= 1):
            unit = order[int(store.predicted_before.values[row])][0]
            change = float(units.peak_attacked.values[row, unit]) - float(units.peak.values[row, unit])
            by_slot.setdefault(row, []).append(change if unit >= 0 else np.nan)
    means = np.array([np.nanmean(np.abs(each)) for each in by_slot.values() if not np.isnan(each).all()])
    assert float(rows[0]["absolute"]) == pytest.approx(means.mean(), rel=1e-5) and int(rows[0]["images"]) == len(means)
    checks = table(made, "attack-checks")
    assert {row["check"] for row in checks} >= {
        "a success changes the prediction",
        "no distance is above the bound",
        "a larger bound reaches as far",
        "gradients reach as far as squares",
    }
    assert all(row["holds"] == "1" for row in checks if row["check"].startswith(("a success", "no distance")))
    foretold = table(made, "attack-predicted")
    assert {row["by"] for row in foretold} == {"margin_without", "margin_before", "loss_of_margin"}
    moved = [row for row in table(made, "attack-moved") if row["attack"] == "cw_l2" and row["source"] == "farm"]
    changes = [float(row["absolute"]) for row in moved]
    assert changes == sorted(changes, reverse=True)


def test_results_open_by_experiment_store_and_pair(made):
    found = pipeline.open_results(made.results)["scenes"]["cnn"].attacks["fooled"]
    assert set(found) == {*ATTACKS, *(f"{attack}-units" for attack in ATTACKS)}
    assert set(found["cw_l2"]) == set(PAIRS) and found["cw_l2"]["3-7"].image.dims == ("image", "channel", "y", "x")


def test_docs_list_arrays_and_attributes(made):
    _, _, section = (Path(__file__).parents[3] / "docs/results.md").read_text().partition("### Attacks")
    section = section.partition("\n### ")[0]
    for store in ("pgd-linf-8", "pgd-linf-8-units"):
        data = opened(made, store, "3-7")
        for name in (*data.data_vars, *data.attrs):
            assert f"`{name}`" in section, name
    for name in ("attacks", "attack-checks", "attack-units", "attack-moved", "attack-predicted"):
        for column in table(made, name)[0]:
            assert f"`{column}`" in section or column.endswith(("_low", "_high")), column


@pytest.mark.parametrize("change", [{}, {"per_image": True, "mean": None, "std": None}], ids=["scaled", "whitened"])
def test_moved_pixels_are_inputs(made, change):
    spec = made.networks["cnn"]
    given = spec.preprocessing.model_dump() | change
    spec = spec.model_copy(
        update={"preprocessing": type(spec.preprocessing)(**{k: v for k, v in given.items() if v is not None})}
    )
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(inputs_of(pixels.float(), spec), normalise(pixels.clone(), spec))


def test_two_workers_and_an_interrupted_run_give_the_same_bytes(made, tmp_path, monkeypatch, two_workers):
    monkeypatch.setenv(client.ADDRESS, two_workers)
    again = planner.make(run_experiment.parse(copied(made, made.config.model_dump(), tmp_path)))
    folder = folder_of(again)
    for path in folder.glob("done/*"):
        path.unlink()
    for ledger in folder.glob("*.ledger"):
        kept = ledger.read_bytes().splitlines(keepends=True)
        ledger.write_bytes(b"".join(kept[:1]))
    one = job(again, "attack", "scenes", "cnn", "fooled")
    left, count = one.stage.pending(one)
    one.stage.run(one)
    before, after = (job(each, "attack", "scenes", "cnn", "fooled").read() for each in (made, again))
    assert before.digest == after.digest and before.files == after.files
    assert left == after.provenance["made"] == count - 1


CHANGED = [
    (
        {"norms": {"linf": [8, 24, 40], "l2": [1.5]}},
        ["apgd_ce-linf-40", "apgd_dlr-linf-40", "pgd-linf-40", "square-linf-40"],
    ),
    ({"searches": 4}, ["cw_l2"]),
    ({"methods": ["pgd"]}, []),
]


@pytest.mark.parametrize(("change", "grown"), CHANGED, ids=lambda each: str(each)[:30])
def test_what_a_change_attacks_again(made, tmp_path, change, grown):
    raw = copied(made, made.config.model_dump(), tmp_path)
    folder = folder_of(planner.make(run_experiment.parse(raw)))
    before = {path.stem: lines(path) for path in folder.glob("*.ledger")}
    raw["attack"]["fooled"] |= change
    after = run(raw, "attack")
    changed = {path.stem for path in folder.glob("*.ledger") if lines(path) != before.get(path.stem)}
    assert sorted(each for each in changed if not each.endswith("-units")) == grown
    named = {name.partition(".zarr")[0] for name in job(after, "attack", "scenes", "cnn", "fooled").read().files}
    assert {path.stem for path in folder.glob("*.zarr")} == {name for name in named if not name.endswith(".csv")}


def test_the_plan_tells_forwards_bytes_and_memory(made):
    preflight.check(made)
    one = job(made, "attack", "scenes", "cnn", "fooled")
    cost = one.stage.cost(one, False)
    assert cost.images == 36
    assert {store.name for store in cost.stores} == set(ATTACKS) and cost.memory > 0


def test_the_page_of_the_report(made, tmp_path):
    (page,) = of_page.pages(shown(made, "attack", tmp_path))
    assert page.file == "attacks-scenes-cnn.html" and len(page.figures) == 4
    assert any("judged on 8 bits" in each for each in page.findings)
    for file in page.files:
        assert (tmp_path / file).is_file()
    strips = [strip for one in page.values["sections"] for strip in one.strips]
    assert strips and strips[0].files


def test_no_image_right_is_refused(made, tmp_path):
    raw = copied(made, made.config.model_dump(), tmp_path)
    raw["attack"]["fooled"] |= {"pairs": [[11, 2]], "untargeted": False, "start": "label", "images": 1}
    with pytest.raises(MicrotomeError, match=r"of \d+ images, network 'cnn' recognises none.*start: predicted"):
        run(raw, "attack")


def test_manifest_says_what_was_reached(made):
    result = json.loads(next((folder_of(made) / "done").glob("attack.*.json")).read_text())["manifest"]["result"]
    assert [one["attack"] for one in result["reached"][::3]] == ATTACKS and result["layer"] == "b"
