"""Black boxes in the stage of attribution: their stores, the segments that they share, and what is refused."""

import csv
import json

import numpy as np
import pytest
import torch
import xarray as xr
from experiments import SIZE, VIT, copied, job, labelled_images, lines, run, scenes, segmentation, tiny

import pipeline
from kernels.attribution import lime as surrogate
from pipeline import attribute
from pipeline.errors import MicrotomeError
from pipeline.networks.build import load
from pipeline.networks.forward import normalise
from pipeline.run import experiment as run_experiment
from pipeline.run import planner, preflight
from pipeline.stages.attribute.inputs import chosen
from pipeline.stages.attribute.stage import warn
from pipeline.upkeep import unreferenced
from pipeline.workers import client

pytestmark = pytest.mark.usefixtures("workers")
STAGES = ("ingest", "concepts", "network", "attribute")
GRID = {"kind": "grid", "cells": [2, 3]}
LABELS = {"kind": "labels", "category": "truth/object", "count": 4}
BOTH = {
    "saliency": None,
    "lime": {"segments": GRID, "samples": 40},
    "shap": {"method": "kernel_shap", "segments": GRID, "samples": 40},
    "rise": {"segments": GRID, "samples": 40, "softmax": False},
    "objects": {"method": "kernel_shap", "segments": LABELS, "samples": "exact", "networks": ["cnn"]},
    "patches": {"method": "kernel_shap", "segments": "patches", "samples": 40, "networks": ["vit"]},
}


def experiment(folder, those=BOTH, among=("cnn", "vit"), **how):
    """Scenes, a small CNN and a small ViT, explained."""
    (folder / "vit.py").write_text(VIT)
    raw = scenes(folder)
    raw["datasets"]["scenes"] |= {"images": {"train": 24, "validation": 20}, "shard_images": 8}
    every = {
        "cnn": tiny(folder, arguments={"classes": 12, "units": 6}, seed=3, layers=["a", "b"]),
        "vit": {"module": f"{folder / 'vit.py'}:vit", "weights": "random", "seed": 1, "layers": ["encoder"]},
    }
    raw["networks"] = {name: every[name] | {"numerics": {"micro_batch": 4}} for name in among}
    raw["attribute"] = {"explained": {"images": 9, "methods": those, "baseline": "mean"} | how}
    return raw


@pytest.fixture(scope="module")
def made(workers, tmp_path_factory):
    return run(experiment(tmp_path_factory.mktemp("segments")), *STAGES)


def folder_of(made, network="cnn", name="explained"):
    return made.results / "scenes" / network / "attributions" / name


def opened(made, method, network="cnn"):
    return xr.open_zarr(folder_of(made, network) / f"{method}.zarr", consolidated=True)


def parted(made, kind, network="cnn"):
    (path,) = folder_of(made, network).glob(f"segments-{kind}-*.zarr")
    return xr.open_zarr(path, consolidated=True)


def slots_of(made, network="cnn"):
    one = job(made, "attribute", "scenes", network, "explained")
    return chosen(one.images, one.settings)


def plain(made, network, slots):
    """The network, these images as it takes them, their predicted classes, the baseline, and the seeds."""
    from pipeline.stages.attribute.explaining import seed_of

    images = xr.open_zarr(made.results / "scenes/images.zarr")
    spec = made.networks[network]
    net = load(spec, made.results / "networks" / network / "model.safetensors")
    mean = np.rint(images.image.values[images.split.values == "train"].mean(0)).astype(np.uint8)
    inputs = normalise(torch.from_numpy(images.image.values[slots]), spec)
    baseline = normalise(torch.from_numpy(mean)[None], spec)
    return net, inputs, net(inputs).argmax(1), baseline, [seed_of(str(each)) for each in images.image_id.values[slots]]


@pytest.mark.parametrize("network", ["cnn", "vit"])
def test_values_are_those_of_the_library(made, network):
    slots = slots_of(made, network)
    net, inputs, predicted, baseline, seeds = plain(made, network, slots)
    assert len(slots) == 9
    for method, how in BOTH.items():
        if method == "saliency" or how.get("networks", [network]) != [network]:
            continue
        store = opened(made, method, network)
        kind, options = store.attrs["method"], {"samples": how["samples"]}
        segments = how["segments"]
        if method == "objects":
            segments = torch.from_numpy(parted(made, "labels").segments.values[slots].astype(np.int64))
        elif method == "patches":
            segments = {"kind": "grid", "cells": [4, 4]}
        options |= {"softmax": False} if method == "rise" else {}
        found = attribute.explain(
            kind, net, inputs, predicted, baseline=baseline, seeds=seeds, segments=segments, batch=4, **options
        )
        largest = float(found.map.abs().max())
        np.testing.assert_allclose(store.attribution.values[slots], found.map, atol=5e-5 * largest)
        width = found.facts["value"].shape[1]
        np.testing.assert_allclose(store.value.values[slots][:, :width], found.facts["value"], atol=5e-5 * largest)
        assert np.isnan(store.value.values[slots][:, width:]).all()
        np.testing.assert_allclose(store.score.values[slots], found.facts["score"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            store.baseline_score.values[slots], found.facts["baseline_score"], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_array_equal(store.samples.values[slots], found.facts["samples"])
        assert store.residual.values[slots].max() < 1e-5 if kind == "kernel_shap" else store.attrs["law"] == ""


def test_stores_say_what_they_explain(made):
    assert opened(made, "lime").attrs["score"] == "probability"
    assert opened(made, "lime").attrs["note"] == "explains the probability, not the logit"
    assert opened(made, "rise").attrs["score"] == opened(made, "shap").attrs["score"] == "logit"
    assert opened(made, "rise").attrs["note"] == ""
    slots = slots_of(made)
    net, inputs, *_ = plain(made, "cnn", slots)
    wanted = net(inputs).softmax(1).amax(1).detach()
    np.testing.assert_allclose(opened(made, "lime").score.values[slots], wanted, rtol=1e-4)
    result = job(made, "attribute", "scenes", "cnn", "explained").read().result
    notes = {each["name"]: each["note"] for each in result["methods"]}
    assert notes["lime"].startswith("explains the probability") and "note" in result["methods"][2]


def test_segments_are_stored_once_for_all_methods_of_a_setting(made):
    slots = slots_of(made)
    assert sorted(path.name.split("-")[1] for path in folder_of(made).glob("segments-*.zarr")) == ["grid", "labels"]
    assert sorted(path.name.split("-")[1] for path in folder_of(made, "vit").glob("segments-*.zarr")) == [
        "grid",
        "patches",
    ]
    store = parted(made, "grid")
    assert store.segments.dims == ("image", "y", "x") and store.feature.dims == ("image", "segment")
    y, x = np.mgrid[:SIZE, :SIZE]
    np.testing.assert_array_equal(store.segments.values[slots[0]], y * 2 // SIZE * 3 + x * 3 // SIZE)
    np.testing.assert_array_equal(store.feature.values[slots], np.tile(np.arange(6), (9, 1)))
    others = np.setdiff1d(np.arange(store.sizes["image"]), slots)
    assert (store.segments.values[others] == -1).all() and (store.feature.values[others] == -1).all()
    value = opened(made, "shap").value.values[slots]
    np.testing.assert_array_equal(
        opened(made, "shap").attribution.values[slots],
        np.take_along_axis(value[:, :, None], store.segments.values[slots].reshape(9, -1, 1), 1).reshape(9, SIZE, SIZE),
    )
    assert json.loads(json.dumps(store.attrs["settings"])) == {"kind": "grid", "cells": [2, 3]}


def test_objects_of_the_label_maps_are_players(made):
    slots, store = slots_of(made), parted(made, "labels")
    maps = xr.open_zarr(made.results / "scenes/concepts.zarr")
    category = maps.category.values.tolist().index("truth/object")
    labels = maps.label_map.values[slots, category]
    concepts = store.attrs["concepts"]
    for labelled, own, feature in zip(labels, store.segments.values[slots], store.feature.values[slots], strict=True):
        numbers = feature[own]
        sizes = {number: (labelled == number).sum() for number in np.unique(labelled[labelled > 0])}
        kept = set(np.unique(numbers).tolist()) - {0}
        assert len(np.unique(own)) <= 4 and kept <= set(sizes)
        assert all(str(number) in concepts for number in kept)
        np.testing.assert_array_equal(numbers, np.where(np.isin(labelled, sorted(kept)), labelled, 0))
        assert not set(sizes) - kept or min(sizes[n] for n in kept) >= max(sizes[n] for n in set(sizes) - kept)
    objects = opened(made, "objects")
    assert objects.value.dims == ("image", "segment") and objects.sizes["segment"] == 4
    assert (objects.samples.values[slots] == 2 ** objects.players.values[slots]).all()
    # What the report shows first: images that together cover the concepts that matter.
    rows = surrogate.by_feature(objects.value.values[slots], store.feature.values[slots], max(map(int, concepts)) + 1)
    assert len(set(surrogate.pick(rows, 3))) == 3


def test_the_table_has_numbers_of_fits_and_errors(made):
    with (folder_of(made) / "attributions.csv").open() as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    assert list(rows) == [name for name, how in BOTH.items() if (how or {}).get("networks") != ["vit"]]
    slots = slots_of(made)
    assert float(rows["lime"]["r2_median"]) == pytest.approx(np.median(opened(made, "lime").r2.values[slots]), abs=1e-5)
    assert rows["lime"]["stability_median"] != "" and rows["shap"]["r2_median"] == ""
    error = opened(made, "shap").standard_error.values[slots]
    assert float(rows["shap"]["standard_error_mean"]) == pytest.approx(error.mean(), rel=1e-4)
    assert float(rows["shap"]["forwards"]) == pytest.approx(opened(made, "shap").samples.values[slots].mean() + 1)
    assert float(rows["shap"]["residual_worst"]) < 1e-12 and rows["saliency"]["samples_mean"] == ""


def test_an_image_explained_alone_has_the_bits_that_it_has_among_others(made, tmp_path):
    few = run(experiment(tmp_path, images=1), *STAGES)
    for network in ("cnn", "vit"):
        (slot,) = slots_of(few, network)
        for path in sorted(folder_of(few, network).glob("*.zarr")):
            alone, among = (opened(each, path.stem, network) for each in (few, made))
            for array in alone.data_vars:
                if array != "image_id":
                    values = alone[array].values[slot], among[array].values[slot]
                    np.testing.assert_array_equal(*values, err_msg=f"{path.stem} {array}")


def test_two_workers_and_an_interrupted_run_give_the_same_bytes(made, tmp_path, monkeypatch, two_workers):
    monkeypatch.setenv(client.ADDRESS, two_workers)
    again = planner.make(run_experiment.parse(copied(made, made.config.model_dump(), tmp_path)))
    folder = folder_of(again)
    for path in folder.glob("done/*"):
        path.unlink()
    for ledger in folder.glob("*.ledger"):
        kept = ledger.read_bytes().splitlines(keepends=True)
        ledger.write_bytes(b"".join(kept[: 2 if ledger.stem in ("lime", "saliency") else 1]))
    one = job(again, "attribute", "scenes", "cnn", "explained")
    one.stage.run(one)
    before, after = (job(each, "attribute", "scenes", "cnn", "explained").read() for each in (made, again))
    assert before.digest == after.digest and before.files == after.files


def test_a_change_computes_its_method_alone_and_what_is_dropped_is_swept(made, tmp_path):
    raw = copied(made, made.config.model_dump(), tmp_path)
    again = planner.make(run_experiment.parse(raw))
    before = {path.stem: lines(path) for path in folder_of(again).glob("*.ledger")}
    methods = raw["attribute"]["explained"]["methods"]
    methods["lime"] = methods["lime"] | {"model": "tree"}
    del methods["objects"]
    after = run(raw, "attribute")
    changed = {path.stem for path in folder_of(after).glob("*.ledger") if lines(path) != before[path.stem]}
    assert changed == {"lime"}
    with xr.open_zarr(folder_of(after) / "lime.zarr") as tree:
        explained = np.isfinite(tree.score.values)
        assert tree.sizes["node"] == 15 and np.isfinite(tree.node_segment.values[explained, 0]).all()
        np.testing.assert_array_equal(tree.node_mean.values[explained, 0], tree.intercept.values[explained])
    gone = [path.name for path in unreferenced.folders(after.results) if "cnn" in path.parts]
    assert sorted(name.partition("-")[0] for name in gone if "attributions" not in name) == ["objects.zarr", "segments"]


def test_an_appended_image_computes_its_shard(tmp_path):
    labelled_images(tmp_path, [f"town/{at}" for at in range(10)])
    methods = {
        "lime": {"segments": GRID, "samples": 40},
        "things": {"method": "kernel_shap", "segments": {"kind": "labels", "category": "truth/thing"}},
    }
    raw = segmentation(tmp_path, concepts=["truth"]) | {"attribute": {"mine": {"methods": methods}}}
    before = run(raw, *STAGES)
    folder = before.results / "photos/tiny/attributions/mine"
    shards = {path.name: len(lines(path)) for path in folder.glob("*.ledger")}
    assert len(shards) == 4 and len(set(shards.values())) == 1
    labelled_images(tmp_path, ["town/10"])
    run(raw, *STAGES)
    assert {path.name: len(lines(path)) for path in folder.glob("*.ledger")} == {k: n + 1 for k, n in shards.items()}


def test_ranks_have_values_of_their_own(tmp_path):
    methods = {"shap": {"method": "kernel_shap", "segments": GRID, "samples": 64}}
    made = run(experiment(tmp_path, methods, ["cnn"], targets={"top": 2}, images=3), *STAGES)
    store, slots = opened(made, "shap"), slots_of(made)
    assert store.value.dims == ("image", "rank", "segment")
    net, inputs, _, baseline, seeds = plain(made, "cnn", slots)
    second = net(inputs).sort(1, descending=True).indices[:, 1]
    found = attribute.kernel_shap(net, inputs, second, baseline=baseline, seeds=seeds, segments=GRID, samples=64)
    np.testing.assert_allclose(store.value.values[slots, 1], found.facts["value"], rtol=1e-3, atol=1e-6)


def test_superpixels_of_the_pixels(tmp_path):
    pytest.importorskip("skimage", reason="scikit-image, the extra `segments`, is not installed")
    methods = {
        "shap": {"method": "kernel_shap", "segments": {"kind": "slic", "count": 8}, "samples": 64},
        "lime": {"segments": {"kind": "slic", "count": 8}, "samples": 64},
    }
    made = run(experiment(tmp_path, methods, ["cnn"]), *STAGES)
    slots, store = slots_of(made), parted(made, "slic")
    assert store.segments.values[slots].max() < 8 and (opened(made, "shap").players.values[slots] > 1).all()
    assert ((store.feature.values[slots] >= 0).sum(1) == store.segments.values[slots].max((1, 2)) + 1).all()


REFUSED = [
    ({"lime": {"segments": {"kind": "grid", "cells": [1, 1]}}}, "a grid of one cell is one segment"),
    ({"lime": {"segments": {"kind": "slic", "count": 1}}}, "greater than or equal to 2"),
    ({"lime": {"segments": "cubes"}}, "'cubes' is not one of slic, grid, patches, labels"),
    ({"lime": {"segments": {"kind": "slic", "counts": 3}}}, "unknown key"),
    ({"lime": {"samples": 60}}, "methods.lime.samples: 60 of up to 50 segments, expected at least 100"),
    ({"lime": {"samples": 2}}, "greater than or equal to 4"),
    ({"lime": {"kernel": "cosine"}}, "masks_cosine"),
    ({"lime": {"model": "tree", "features": 3}}, "a tree has no such bound"),
    (
        {"kernel_shap": {"samples": "exact"}},
        "`exact` plays all of at most 2^12 copies, and there are up to 50",
    ),
    ({"kernel_shap": {"samples": "exact", "segments": GRID, "tolerance": 0.1}}, "leaves no error"),
    ({"kernel_shap": {"tolerance": 0.1, "max_samples": 100}}, "max_samples: 100 is below `samples`, 512"),
    ({"segments-mine": {"method": "rise"}}, "names of stores of segments begin so: rename it"),
    ({"lime": {"segments": {"kind": "labels", "category": "truth/thing"}}}, "no category 'truth/thing' of 'scenes'"),
    ({"lime": {"segments": {"kind": "labels"}}}, "category: missing"),
]


@pytest.mark.parametrize(("methods", "message"), REFUSED, ids=lambda each: str(each)[:60])
def test_bad_input_is_refused_while_the_plan_is_made(tmp_path, methods, message):
    with pytest.raises(MicrotomeError) as error:
        planner.make(run_experiment.parse(experiment(tmp_path, methods, ["cnn"])))
    assert message in str(error.value)


def test_label_maps_that_are_not_there_are_refused_while_the_plan_is_made(tmp_path):
    raw = experiment(tmp_path, {"lime": {"segments": LABELS}}, ["cnn"])
    raw["attribute"]["explained"]["split"] = "train"
    with pytest.raises(MicrotomeError, match="split 'train' of 'scenes' has no label maps, which are those of 'valid"):
        planner.make(run_experiment.parse(raw))
    raw = experiment(tmp_path, {"lime": {"segments": LABELS}}, ["cnn"])
    raw["datasets"]["scenes"]["concepts"] = []
    with pytest.raises(MicrotomeError, match=r"methods\.lime\.segments: data set 'scenes' has no label maps"):
        planner.make(run_experiment.parse(raw))


def test_what_a_network_or_a_machine_does_not_have_is_refused_before_any_work(tmp_path, monkeypatch):
    methods = {
        "patched": {"method": "lime", "segments": "patches"},
        "fine": {"method": "lime", "segments": {"kind": "grid", "cells": [17, 2]}, "samples": 100},
        "slic": {"method": "kernel_shap"},
    }
    from pipeline.stages.attribute import segments

    monkeypatch.setattr(segments.util, "find_spec", lambda name: None)
    plan = planner.make(run_experiment.parse(experiment(tmp_path, methods, ["cnn"])))
    with pytest.raises(MicrotomeError) as error:
        preflight.check(plan)
    said = str(error.value)
    assert "methods.patched.segments: network 'cnn' has no patches: the network computes no attention" in said
    assert "methods.fine.segments.cells: 17 x 2 cells of 16 x 16 pixels" in said
    assert "methods.slic.segments.kind: slic needs scikit-image, which is not installed: install the extra" in said
    assert not plan.results.joinpath("scenes").exists()
    few = {"patched": {"method": "lime", "segments": "patches", "samples": 20}}
    plan = planner.make(run_experiment.parse(experiment(tmp_path, few, ["vit"])))
    with pytest.raises(MicrotomeError, match="samples: 20 of up to 16 segments, expected at least 32"):
        preflight.check(plan)


def test_the_plan_tells_forwards_of_shared_copies_once(made):
    preflight.check(made)
    cost = {}
    for name, methods in {
        "one": {"lime": {"segments": GRID, "samples": 40}},
        "two": {"lime": {"segments": GRID, "samples": 40}, "rise": {"segments": GRID, "samples": 40}},
        "other": {"lime": {"segments": GRID, "samples": 40}, "rise": {"segments": GRID, "samples": 44}},
    }.items():
        from pipeline.stages.attribute.options import OPTIONS
        from pipeline.stages.attribute.stage import unshared

        options = {each: OPTIONS[each](**how) for each, how in methods.items()}
        cost[name] = len(unshared(options))
    assert cost == {"one": 1, "two": 1, "other": 2}
    one = job(made, "attribute", "scenes", "cnn", "explained")
    foretold = {store.name for store in one.stage.cost(one, False).stores}
    assert foretold == {path.stem for path in folder_of(made).glob("*.zarr")}


def test_every_store_is_in_open_results(made):
    found = pipeline.open_results(made.results)["scenes"]["cnn"].attributions["explained"]
    assert set(found) == {path.stem for path in folder_of(made).glob("*.zarr")}


def test_images_of_one_segment_are_told(made, capsys):
    one = job(made, "attribute", "scenes", "cnn", "explained")
    warn(one, "lime", {"players": np.array([1.0, 5.0, np.nan])}, 12)
    assert (
        "lime: 1 of 2 explanations have at most one segment that differs from the baseline" in capsys.readouterr().err
    )
    warn(one, "lime", {"players": np.array([4.0, 5.0])}, 12)
    assert not capsys.readouterr().err


def test_a_page_begins_with_what_sp_lime_picks(made):
    from pipeline.stages.attribute.found import PICKED, read_attributions

    found = read_attributions(made.results, "scenes", "cnn", "explained")
    values = np.abs(opened(made, "lime").value.values[found.slots])
    features = parted(made, "grid").feature.values[found.slots]
    weights = np.zeros((len(values), features.max() + 1))
    for image, row in enumerate(features):
        for segment, feature in enumerate(row):
            weights[image, feature] += values[image, segment]
    importance, covered, best = np.sqrt(weights.sum(0)), np.zeros(weights.shape[1], bool), []
    while len(best) < min(PICKED, len(values)):
        gains = [-1 if at in best else importance[(weights[at] > 0) & ~covered].sum() for at in range(len(values))]
        best.append(int(np.argmax(gains)))
        covered |= weights[best[-1]] > 0
    assert found.picked == [found.slots[at] for at in best]
    assert found.shown[: len(best)] == found.picked and sorted(found.shown) == sorted(found.slots)
    assert found.score[found.slots, 0] == pytest.approx(opened(made, "saliency").score.values[found.slots])
