"""The stage of attribution: what it stores against its own library, what is made again, and what is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from experiments import NETWORK, SIZE, VIT, copied, job, labelled_images, lines, run, scenes, segmentation, tiny
from PIL import Image

import pipeline
from pipeline import attribute
from pipeline.errors import MicrotomeError
from pipeline.networks.build import load
from pipeline.networks.forward import normalise
from pipeline.run import experiment as run_experiment
from pipeline.run import planner, preflight
from pipeline.stages.attribute.inputs import chosen, read_baseline
from pipeline.stages.attribute.options import METHODS
from pipeline.stages.attribute.stage import warn
from pipeline.upkeep import damage, unreferenced
from pipeline.upkeep.__main__ import main as upkeep
from pipeline.workers import client

pytestmark = pytest.mark.usefixtures("workers")
STAGES = ("ingest", "network", "attribute")
BOTH = {
    "saliency": None,
    "gradient_x_input": None,
    "ig": {"method": "integrated_gradients", "steps": 4, "max_steps": 8, "tolerance": 0.05},
    "smooth": {"method": "smooth_grad", "draws": 2},
    "grad_cam": None,
    "hires_cam": {"networks": ["cnn"], "layer": {"cnn": "b"}},
    "cam": {"networks": ["cnn"], "layer": "b"},
    "guided": {"method": "guided_backprop", "networks": ["cnn"]},
    "guided_grad_cam": {"networks": ["cnn"]},
    "occlusion": {"window": 8, "stride": 8, "networks": ["cnn"]},
    "rollout": {"networks": ["vit"]},
    "attention_relevance": {"networks": ["vit"]},
    "lrp": {"rule": "epsilon"},
    "deeplift": None,
    "kernel_shap": {"segments": {"kind": "grid", "cells": [2, 2]}, "networks": ["cnn"]},
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
    raw["attribute"] = {"explained": {"images": 13, "methods": those} | how}
    return raw


@pytest.fixture(scope="module")
def made(workers, tmp_path_factory):
    """Run once, for the tests that read; those that change something take a copy."""
    return run(experiment(tmp_path_factory.mktemp("attribute"), keep=["channels"]), *STAGES)


def folder_of(made, network="cnn", name="explained"):
    return made.results / "scenes" / network / "attributions" / name


def opened(made, method, network="cnn", name="explained"):
    return xr.open_zarr(folder_of(made, network, name) / f"{method}.zarr", consolidated=True)


def plain(made, network):
    """The network, its images as it takes them, and their ids."""
    images = xr.open_zarr(made.results / "scenes/images.zarr")
    spec = made.networks[network]
    net = load(spec, made.results / "networks" / network / "model.safetensors")
    return net, normalise(torch.from_numpy(images.image.values), spec), images


def explained_slots(made, network="cnn"):
    one = job(made, "attribute", "scenes", network, "explained")
    return chosen(one.images, one.settings)


@pytest.mark.parametrize("network", ["cnn", "vit"])
def test_maps_are_those_of_the_library(made, network):
    net, inputs, images = plain(made, network)
    slots = explained_slots(made, network)
    assert len(slots) == 13 and set(images.split.values[slots]) == {"validation"}
    predicted = net(inputs[slots]).argmax(1)
    black = normalise(torch.zeros((1, 3, SIZE, SIZE), dtype=torch.uint8), made.networks[network])
    options = {
        "ig": {"steps": 4, "max_steps": 8, "tolerance": 0.05, "baseline": black},
        "hires_cam": {"layer": "b"},
        "cam": {"layer": "b"},
        "occlusion": {"window": 8, "stride": 8, "baseline": black},
        "lrp": {"rule": "epsilon"},
        "deeplift": {"baseline": black},
        "kernel_shap": {"segments": {"kind": "grid", "cells": [2, 2]}, "baseline": black},
    }
    checked = 0
    for method, how in BOTH.items():
        if method == "smooth" or (how or {}).get("networks", [network]) != [network]:
            continue
        store = opened(made, method, network)
        kind = store.attrs["method"]
        found = getattr(attribute, kind)(net, inputs[slots], predicted, **options.get(method, {}))
        np.testing.assert_allclose(store.attribution.values[slots], found.map, atol=2e-5 * float(found.map.abs().max()))
        np.testing.assert_array_equal(store.target.values[slots], predicted)
        np.testing.assert_allclose(store.residual.values[slots], found.residual, atol=1e-4)
        if found.values is not None:
            stored = store.channel_attribution.values[slots]
            np.testing.assert_allclose(stored, found.values, atol=2e-5 * float(found.values.abs().max()))
        checked += 1
    assert checked == {"cnn": 12, "vit": 8}[network]


def test_images_that_are_not_explained_are_nan_without_a_target(made):
    store = opened(made, "saliency")
    others = np.setdiff1d(np.arange(store.sizes["image"]), explained_slots(made))
    assert np.isnan(store.attribution.values[others]).all() and (store.target.values[others] == -1).all()
    assert np.isnan(store.score.values[others]).all()
    assert store.image_id.values.tolist() == xr.open_zarr(made.results / "scenes/images.zarr").image_id.values.tolist()
    assert store.attrs["units"] == "score per unit of input" and store.attrs["maps"] == "image"


def test_the_table_says_how_well_laws_are_kept(made):
    with (folder_of(made) / "attributions.csv").open() as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    assert list(rows) == [name for name, how in BOTH.items() if (how or {}).get("networks") != ["vit"]]
    assert float(rows["cam"]["residual_worst"]) < 1e-5 and rows["cam"]["beyond_tolerance"] == "0"
    assert rows["saliency"]["residual_worst"] == "" and rows["saliency"]["law"] == ""
    stored = opened(made, "ig").residual.values[explained_slots(made)]
    known = stored[~np.isnan(stored)]
    assert float(rows["ig"]["residual_median"]) == pytest.approx(np.median(known), rel=1e-6)
    assert float(rows["ig"]["beyond_tolerance"]) == pytest.approx((known > 0.05).mean(), abs=1e-6)
    assert {row["images"] for row in rows.values()} == {"13"}


def test_an_image_explained_alone_has_the_bits_that_it_has_among_others(made, tmp_path):
    few = run(experiment(tmp_path, images=1, keep=["channels"]), *STAGES)
    for network in ("cnn", "vit"):
        (slot,) = explained_slots(few, network)
        for path in sorted(folder_of(few, network).glob("*.zarr")):
            alone, among = (opened(each, path.stem, network) for each in (few, made))
            for array in alone.data_vars:
                if array != "image_id":
                    np.testing.assert_array_equal(
                        alone[array].values[slot], among[array].values[slot], err_msg=path.stem
                    )


def test_two_workers_and_an_interrupted_run_give_the_same_bytes(made, tmp_path, monkeypatch, two_workers):
    monkeypatch.setenv(client.ADDRESS, two_workers)
    again = planner.make(run_experiment.parse(copied(made, made.config.model_dump(), tmp_path)))
    folder = folder_of(again)
    for path in folder.glob("done/*"):
        path.unlink()
    for ledger in folder.glob("*.ledger"):
        kept = ledger.read_bytes().splitlines(keepends=True)
        ledger.write_bytes(b"".join(kept[:1]))
    one = job(again, "attribute", "scenes", "cnn", "explained")
    one.stage.run(one)
    before, after = (job(each, "attribute", "scenes", "cnn", "explained").read() for each in (made, again))
    assert before.digest == after.digest and before.files == after.files
    assert after.provenance["made"] == 2 and after.provenance["shards"] == 3


def test_an_appended_image_computes_its_shard(tmp_path):
    labelled_images(tmp_path, [f"town/{at}" for at in range(10)])
    raw = segmentation(tmp_path) | {"attribute": {"mine": {"methods": {"saliency": None}}}}
    before = run(raw, *STAGES)
    (network,) = before.networks
    store = folder_of_photos(before, network) / "saliency"
    shards = len(lines(store.with_suffix(".ledger")))
    labelled_images(tmp_path, ["town/10"])
    after = run(raw, *STAGES)
    assert len(lines(folder_of_photos(after, network) / "saliency.ledger")) == shards + 1
    fresh = run(raw | {"results": str(tmp_path / "fresh")}, *STAGES)
    grown, once = (xr.open_zarr(folder_of_photos(each, network) / "saliency.zarr") for each in (after, fresh))
    for id in once.image_id.values:
        maps = [each.attribution.values[each.image_id.values == id] for each in (grown, once)]
        np.testing.assert_array_equal(*maps)


def folder_of_photos(made, network):
    return made.results / "photos" / network / "attributions" / "mine"


def test_another_method_computes_that_alone_and_a_dropped_one_is_swept(made, tmp_path):
    raw = copied(made, made.config.model_dump(), tmp_path)
    again = planner.make(run_experiment.parse(raw))
    before = {path.name: lines(path) for path in folder_of(again).glob("*.ledger")}
    methods = raw["attribute"]["explained"]["methods"]
    del methods["occlusion"]
    methods["layer_cam"] = {"method": "layer_cam"}
    methods["ig"] = methods["ig"] | {"steps": 8}
    after = run(raw, "attribute")
    grown = {path.name for path in folder_of(after).glob("*.ledger") if lines(path) != before.get(path.name)}
    assert grown == {"layer_cam.ledger", "ig.ledger"}
    assert [path.name for path in unreferenced.folders(after.results) if "attributions" in path.parts] == [
        "occlusion.zarr"
    ]


def test_an_experiment_that_no_configuration_names_is_swept(made, tmp_path, capsys):
    raw = copied(made, made.config.model_dump(), tmp_path)
    configs = []
    for name in ("kept", "renamed"):
        sections = raw["attribute"] if name == "kept" else {name: raw["attribute"]["explained"]}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(raw | {"attribute": sections}, default=str))
        configs.append(str(tmp_path / f"{name}.yaml"))
    results = str(raw["results"])
    folders = sorted(Path(results).glob("*/*/attributions/explained"))
    assert len(folders) > 1
    for given, swept in (([], False), (configs, False), (configs[:1], False), (configs[1:], True)):
        assert upkeep(["gc", results, *(["--configs", *given] if given else [])]) == 0
        said = capsys.readouterr().out
        assert {str(folder) in said for folder in folders} == {swept}
    assert upkeep(["gc", results, "--configs", *configs[1:], "--yes"]) == 0
    assert not any(folder.exists() for folder in folders) and damage.verify(Path(results)) == []
    (tmp_path / "other.yaml").write_text(json.dumps(raw | {"results": str(tmp_path / "others")}, default=str))
    with pytest.raises(MicrotomeError, match=r"has the results folder .*others, not "):
        upkeep(["gc", results, "--configs", str(tmp_path / "other.yaml")])


CHANGED = [
    ({"targets": {"class": 2}}, True),
    ({"targets": "label"}, True),
    ({"score": "probability"}, True),
    ({"baseline": "white"}, ["ig", "occlusion", "deeplift", "kernel_shap"]),
    ({"images": 20}, True),
]


@pytest.mark.parametrize(("change", "grown"), CHANGED, ids=lambda each: str(each))
def test_what_a_change_computes_again(made, tmp_path, change, grown):
    raw = copied(made, made.config.model_dump(), tmp_path)
    again = planner.make(run_experiment.parse(raw))
    raw["attribute"]["explained"] |= change
    if change.get("score"):  # CAM explains logits alone
        del raw["attribute"]["explained"]["methods"]["cam"]
    before = {path.stem: lines(path) for path in folder_of(again).glob("*.ledger")}
    after = run(raw, "attribute")
    changed = {path.stem for path in folder_of(after).glob("*.ledger") if lines(path) != before[path.stem]}
    segments = {name for name in changed if name.startswith("segments-")}
    assert bool(segments) == ("images" in change)  # which the network, the target and the baseline do not change
    assert changed - segments == (
        set(raw["attribute"]["explained"]["methods"]) - {"rollout", "attention_relevance"}
        if grown is True
        else set(grown)
    )


TARGETS = [
    ("label", lambda logits, label: label),
    ({"class": 3}, lambda logits, label: np.full(len(label), 3)),
    ({"contrast": [3, 1]}, lambda logits, label: np.full(len(label), 3)),
]


@pytest.mark.parametrize(("targets", "wanted"), TARGETS, ids=[str(each) for each, _ in TARGETS])
def test_targets(tmp_path, targets, wanted):
    made = run(experiment(tmp_path, {"saliency": None, "cam": {"layer": "b"}}, ["cnn"], targets=targets), *STAGES)
    net, inputs, images = plain(made, "cnn")
    slots, store = explained_slots(made), opened(made, "cam")
    logits = net(inputs[slots]).detach().numpy()
    picked = wanted(logits, images.label.values[slots])
    score = logits[np.arange(len(slots)), picked] - (logits[:, 1] if targets == {"contrast": [3, 1]} else 0)
    np.testing.assert_array_equal(store.target.values[slots], picked)
    np.testing.assert_allclose(store.score.values[slots], score, rtol=1e-4, atol=1e-6)
    assert np.nanmax(store.residual.values) < 1e-4


def test_the_most_probable_classes_have_a_dimension(tmp_path):
    made = run(experiment(tmp_path, {"saliency": None}, ["cnn"], targets={"top": 3}), *STAGES)
    net, inputs, _ = plain(made, "cnn")
    slots, store = explained_slots(made), opened(made, "saliency")
    assert store.attribution.dims == ("image", "rank", "y", "x") and store.target.dims == ("image", "rank")
    logits = net(inputs[slots]).detach()
    np.testing.assert_array_equal(store.target.values[slots], logits.sort(1, descending=True).indices[:, :3])
    for rank in range(3):
        found = attribute.saliency(net, inputs[slots], logits.sort(1, descending=True).indices[:, rank])
        np.testing.assert_allclose(store.attribution.values[slots, rank], found.map, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("baseline", ["white", "blur", "uniform", "mean", {"mean": "validation"}, "file"])
def test_baselines_are_images(tmp_path, baseline):
    if baseline == "file":
        Image.fromarray(np.full((SIZE, SIZE, 3), 99, np.uint8)).save(tmp_path / "own.png")
        baseline = {"file": str(tmp_path / "own.png")}
    methods = {"ig": {"method": "integrated_gradients", "steps": 2, "max_steps": 2}}
    made = run(experiment(tmp_path, methods, ["cnn"], baseline=baseline), *STAGES)
    net, _, images = plain(made, "cnn")
    slots, store = explained_slots(made), opened(made, "ig")
    pixels = {
        "white": lambda: np.full_like(images.image.values[slots], 255),
        "mean": lambda: np.rint(images.image.values[images.split.values == "train"].mean(0)),
        "file": lambda: np.full_like(images.image.values[slots], 99),
    }
    name = baseline if isinstance(baseline, str) else next(iter(baseline))
    if name in pixels and baseline != {"mean": "validation"}:
        given = torch.from_numpy(np.broadcast_to(pixels[name](), (len(slots), 3, SIZE, SIZE)).astype(np.uint8).copy())
        logits = net(normalise(given, made.networks["cnn"])).detach().numpy()
        wanted = logits[np.arange(len(slots)), store.target.values[slots]]
        np.testing.assert_allclose(store.baseline_score.values[slots], wanted, rtol=1e-4, atol=1e-5)
    assert np.isfinite(store.baseline_score.values[slots]).all()


REFUSED = [
    ({"methods": {"salience": None}}, "'salience' is not one of"),
    ({"methods": {"mine": {"method": "griund_cam"}}}, "'griund_cam' is not one of"),
    ({"methods": {"saliency": {"steps": 3}}}, "unknown key"),
    ({"methods": {"ig": {"method": "integrated_gradients", "steps": 0}}}, "greater than 0"),
    ({"methods": {"ig": {"method": "integrated_gradients", "steps": 9, "max_steps": 8}}}, "is below `steps`"),
    ({"methods": {"saliency": {"networks": ["nobody"]}}}, "no network 'nobody'"),
    ({"methods": {"grad_cam": {"layer": {"nobody": "a"}}}}, "no network 'nobody'"),
    ({"networks": ["nobody"]}, "no network 'nobody'"),
    ({"methods": {"saliency": {"method": "occlusion"}}}, "is called like another: rename it"),
    ({"methods": {"saliency": {"networks": []}}}, "none of its networks is one of the experiment"),
    ({"datasets": ["nowhere"]}, "no data set 'nowhere'"),
    ({"methods": {}}, "at least 1"),
    ({"targets": {"class": 1, "top": 2}}, "give one of `class`, `top`, `contrast`"),
    ({"targets": "everything"}, "targets"),
    ({"split": "test"}, "has no split 'test'"),
    ({"baseline": {"mean": "nowhere"}}, "has no split 'nowhere'"),
    ({"baseline": {"file": "/no/such.png"}}, "no file"),
    ({"targets": {"class": "unicorn"}}, "no class 'unicorn' in data set 'scenes'"),
    ({"targets": {"contrast": [1, 1]}}, "both classes are 1"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda each: str(each)[:60])
def test_bad_input_is_refused_while_the_plan_is_made(tmp_path, change, message):
    with pytest.raises(MicrotomeError) as error:
        planner.make(run_experiment.parse(experiment(tmp_path, {"saliency": None}, ["cnn"], **change)))
    assert message in str(error.value)


INSPECTED = [
    ({"methods": {"grad_cam": {"layer": "nine"}}}, "no layer 'nine'"),
    ({"methods": {"grad_cam": {"layer": "pool"}}}, "layer 'pool' has one position, and a map needs several"),
    ({"methods": {"rollout": None}}, "methods.rollout: network 'cnn': the network computes no attention"),
    ({"methods": {"guided_backprop": None}, "networks": ["vit"]}, "these apply: saliency, gradient_x_input"),
    ({"methods": {"cam": None}, "networks": ["vit"]}, "global mean or sum pooling and one linear map do not end"),
    ({"targets": {"class": 12}}, "class 12 of network 'cnn', which gives 12 logits"),
    ({"targets": {"top": 13}}, "top 13 of network 'cnn', which gives 12 logits"),
    ({"methods": {"cam": {"layer": "b"}}, "score": "probability"}, "CAM explains logits, and `score` is 'probability'"),
    ({"methods": {"occlusion": {"window": 99}}}, "window: 99 pixels, and images have 16 x 16"),
]


def test_what_a_network_does_not_have_is_refused_before_any_work(tmp_path):
    raw = experiment(tmp_path, {"saliency": None})
    raw["attribute"] = {
        f"case{at}": {"methods": {"saliency": None}, "networks": ["cnn"]} | change
        for at, (change, _) in enumerate(INSPECTED)
    }
    (tmp_path / "end.py").write_text(
        NETWORK + "\n\ndef probable():\n    return nn.Sequential(tiny(classes=12), nn.Softmax(1))\n"
    )
    raw["networks"]["probable"] = {"module": f"{tmp_path / 'end.py'}:probable", "weights": "random", "layers": ["0.a"]}
    raw["attribute"]["probable"] = {"methods": {"saliency": None}, "networks": ["probable"]}
    plan = planner.make(run_experiment.parse(raw))
    with pytest.raises(MicrotomeError) as error:
        preflight.check(plan)
    for at, (_, message) in enumerate(INSPECTED):
        said = [line for line in str(error.value).splitlines() if f"attribute.case{at}" in line]
        assert said and message in said[0], (at, said)
    assert "attribute.probable.score: network 'probable' ends in a softmax" in str(error.value)
    assert not plan.results.joinpath("scenes").exists()


def test_a_network_that_ends_in_softmax_is_explained_as_asked(tmp_path):
    (tmp_path / "end.py").write_text(
        NETWORK + "\n\ndef probable():\n    return nn.Sequential(tiny(classes=12), nn.Softmax(1))\n"
    )
    raw = experiment(tmp_path, {"saliency": None}, ["cnn"], score="log_probability")
    raw["networks"] = {"cnn": {"module": f"{tmp_path / 'end.py'}:probable", "weights": "random", "layers": ["0.a"]}}
    made = run(raw, *STAGES)
    net, inputs, _ = plain(made, "cnn")
    slots, store = explained_slots(made), opened(made, "saliency")
    np.testing.assert_allclose(store.score.values[slots], net(inputs[slots]).amax(1).log().detach(), rtol=1e-4)


def test_controls_are_explained_if_they_are_named(tmp_path):
    raw = experiment(tmp_path, {"saliency": None}, ["cnn"], networks=["cnn", "cnn-untrained"])
    torch.manual_seed(1)
    net = load(
        planner.make(run_experiment.parse(experiment(tmp_path, {"saliency": None}, ["cnn"]))).networks["cnn"],
        None,
    )
    torch.save(net.state_dict(), tmp_path / "cnn.pt")
    raw["networks"]["cnn"]["weights"] = str(tmp_path / "cnn.pt")
    raw["controls"] = {"images": 5}
    made = run(raw, *STAGES)
    assert len(explained_slots(made)) == 13 and len(explained_slots(made, "cnn-untrained")) == 5


def test_every_method_of_an_image_is_in_open_results(made):
    found = pipeline.open_results(made.results)["scenes"]["cnn"].attributions["explained"]
    assert set(found) == {path.stem for path in folder_of(made).glob("*.zarr")}
    assert found["ig"].attribution.dims == ("image", "y", "x")


def test_the_plan_tells_forwards_bytes_and_memory(made):
    preflight.check(made)
    one = job(made, "attribute", "scenes", "cnn", "explained")
    cost = one.stage.cost(one, False)
    assert cost.images == 13 and cost.memory > 0
    stores = made.results / "scenes/cnn/attributions/explained"
    assert {store.name for store in cost.stores} == {path.stem for path in stores.glob("*.zarr")}
    assert set(METHODS) >= {each.method for each in one.config.attribute["explained"].methods.values()}


def test_fewer_images_leave_no_maps_of_the_others(made, tmp_path):
    raw = copied(made, made.config.model_dump(), tmp_path)
    raw["attribute"]["explained"] |= {"images": 2, "keep": []}
    after = run(raw, "attribute")
    slots, store = explained_slots(after), opened(after, "saliency")
    assert len(slots) == 2 and "channel_attribution" not in store
    assert np.flatnonzero(store.target.values >= 0).tolist() == slots.tolist()
    assert np.flatnonzero(np.isfinite(store.attribution.values).any((1, 2))).tolist() == slots.tolist()


def test_a_name_may_become_another_method(made, tmp_path):
    raw = copied(made, made.config.model_dump(), tmp_path)
    raw["attribute"]["explained"]["methods"] |= {"smooth": {"method": "gradient_x_input"}, "ig": {"method": "saliency"}}
    after = run(raw, "attribute")
    assert opened(after, "smooth").attrs["method"] == "gradient_x_input" and opened(after, "smooth").attrs["law"] == ""
    assert "intercept" in opened(after, "ig") and "steps" not in opened(after, "ig")
    np.testing.assert_array_equal(opened(after, "ig").attribution.values, opened(made, "saliency").attribution.values)


def test_classes_by_name_are_those_of_the_data_set_alone(tmp_path):
    raw = experiment(tmp_path, {"saliency": None}, ["cnn"], targets={"class": "forest"})
    raw["networks"]["cnn"]["arguments"]["classes"] = 20
    plan = planner.make(run_experiment.parse(raw))
    with pytest.raises(MicrotomeError, match="gives 20 logits, and the images of 'scenes' have 12 classes"):
        preflight.check(plan)


def test_a_baseline_of_another_size_or_turned_is_seen_before_any_work(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[0] = 255
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = read_baseline(tmp_path / "turned.png", (SIZE, SIZE), "here", "scenes")
    assert (turned[:, :, -1] == 255).all() and not turned[:, :, :-1].any()
    Image.fromarray(pixels[:8]).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no image")
    said = {"small.png": "has 8 x 16 pixels, and the images of 'scenes' have 16 x 16", "text.png": "cannot be read"}
    for name, message in said.items():
        methods, file = {"ig": {"method": "integrated_gradients"}}, str(tmp_path / name)
        raw = experiment(tmp_path, methods, ["cnn"], baseline={"file": file})
        with pytest.raises(MicrotomeError, match=message):
            preflight.check(planner.make(run_experiment.parse(raw)))


def test_a_baseline_that_the_network_is_sure_about_is_told(made, capsys):
    store = opened(made, "ig")
    likely = store.baseline_probability.values[explained_slots(made)]
    assert ((likely >= 0) & (likely <= 1)).all() and np.isnan(store.baseline_probability.values).any()
    one = job(made, "attribute", "scenes", "cnn", "explained")
    warn(one, "ig", {"baseline_probability": np.array([0.3, 0.7])}, 12)
    assert "ig: the network gives the target a probability of 0.50 for the baseline" in capsys.readouterr().err
    warn(one, "ig", {"baseline_probability": np.array([0.3, 0.7])}, 2)  # that of chance
    warn(one, "ig", {"baseline_probability": np.array([0.1])}, 12)
    assert not capsys.readouterr().err
