"""LRP in the library and in the stage: options, the account of every image, relevance of units, what is refused."""

import csv

import numpy as np
import pytest
import torch
import xarray as xr
from experiments import NETWORK, SIZE, VIT, copied, job, lines, run, scenes, tiny
from torch import nn
from torch.nn import functional as F

import pipeline
from pipeline import attribute
from pipeline.errors import MicrotomeError
from pipeline.networks.build import load
from pipeline.networks.forward import normalise
from pipeline.run import experiment as run_experiment
from pipeline.run import planner, preflight
from pipeline.stages.attribute.inputs import chosen
from pipeline.stages.attribute.options import OPTIONS
from pipeline.stages.attribute.stage import warn

STAGES = ("ingest", "network", "attribute")
METHODS = {
    "lrp": {"layers": {"cnn": ["a", "b"], "vit": ["encoder.layers.encoder_layer_1"]}, "keep": ["signs"]},
    "strong": {"method": "lrp", "alpha": 2, "networks": ["cnn"], "layers": ["b"]},
    "mixed": {
        "method": "lrp",
        "rule": "epsilon",
        "rules": {"a.*": {"rule": "z_b"}, "depth 2": {"rule": "gamma", "gamma": 0.5}},
        "networks": ["cnn"],
    },
    "expanded": {"method": "lrp", "preset": "attn_lrp", "networks": ["vit"]},
}


def experiment(folder, those=METHODS, among=("cnn", "vit"), **how):
    (folder / "vit.py").write_text(VIT)
    raw = scenes(folder)
    raw["datasets"]["scenes"] |= {"images": {"train": 6, "validation": 20}, "shard_images": 8}
    every = {
        "cnn": tiny(folder, arguments={"classes": 12, "units": 6}, seed=3, layers=["a", "b"]),
        "vit": {"module": f"{folder / 'vit.py'}:vit", "weights": "random", "seed": 1, "layers": ["encoder"]},
    }
    raw["networks"] = {name: every[name] | {"numerics": {"micro_batch": 4}} for name in among}
    raw["attribute"] = {"explained": {"images": 13, "methods": those} | how}
    return raw


@pytest.fixture(scope="module")
def made(workers, tmp_path_factory):
    return run(experiment(tmp_path_factory.mktemp("lrp"), keep=["channels"]), *STAGES)


def folder_of(made, network="cnn"):
    return made.results / "scenes" / network / "attributions" / "explained"


def opened(made, store, network="cnn", group=None):
    return xr.open_zarr(folder_of(made, network) / f"{store}.zarr", group=group, consolidated=group is None)


def plain(made, network):
    images = xr.open_zarr(made.results / "scenes/images.zarr")
    spec = made.networks[network]
    net = load(spec, made.results / "networks" / network / "model.safetensors")
    return net, normalise(torch.from_numpy(images.image.values), spec)


def explained_slots(made, network="cnn"):
    one = job(made, "attribute", "scenes", network, "explained")
    return chosen(one.images, one.settings)


@pytest.mark.parametrize("network", ["cnn", "vit"])
def test_stores_hold_what_the_library_says(made, network):
    net, inputs = plain(made, network)
    slots = explained_slots(made, network)
    black, white = (
        normalise(torch.full((1, 3, SIZE, SIZE), each, dtype=torch.uint8), made.networks[network])[0]
        for each in (0, 255)
    )
    for name, options in METHODS.items():
        if options.get("networks", [network]) != [network]:
            continue
        options = {key: each for key, each in options.items() if key not in ("networks", "method")}
        if isinstance(options.get("layers"), dict):
            options["layers"] = options["layers"][network]
        bounded = {"bounds": (black, white)} if OPTIONS["lrp"](**options).bounded else {}
        found = attribute.lrp(net, inputs[slots], **bounded, **options)
        store = opened(made, name, network)
        scale = float(found.map.abs().max())
        np.testing.assert_allclose(store.attribution.values[slots], found.map, atol=2e-5 * scale)
        for fact in ("bias", "leak", "magnitude"):
            np.testing.assert_allclose(
                store[fact].values[slots],
                found.facts[fact],
                rtol=1e-3,
                atol=1e-5 * float(found.facts["magnitude"].max()),
            )
        stored = sum(store[each].values[slots] for each in ("bias", "leak"))
        total = store.attribution.values[slots].sum((1, 2)) + stored
        np.testing.assert_allclose(total, store.score.values[slots], atol=1e-4 * float(found.facts["magnitude"].max()))
        assert np.nanmax(store.residual.values) < 1e-5
        assert ("relevance" in store) == (name == "lrp")
        for layer in options.get("layers", []):
            units = opened(made, f"{name}-relevance", network, layer)
            assert units.relevance.dims == ("image", "unit") and units.attrs["layer"] == layer
            np.testing.assert_allclose(units.relevance.values[slots], found.units[layer], atol=2e-5 * scale * 256)
            assert units.image_id.values.tolist() == store.image_id.values.tolist()
    signs = opened(made, "lrp", network)
    both = signs.relevance.values + signs.counter_relevance.values
    np.testing.assert_allclose(both[slots], signs.attribution.values[slots], atol=1e-5 * np.nanmax(abs(both)))


def test_an_image_explained_alone_has_the_bits_that_it_has_among_others(workers, made, tmp_path):
    few = run(experiment(tmp_path, images=1, keep=["channels"]), *STAGES)
    for network in ("cnn", "vit"):
        (slot,) = explained_slots(few, network)
        for name, options in METHODS.items():
            if options.get("networks", [network]) != [network]:
                continue
            alone, among = (opened(each, name, network) for each in (few, made))
            for array in set(alone.data_vars) - {"image_id"}:
                np.testing.assert_array_equal(alone[array].values[slot], among[array].values[slot], err_msg=array)
    alone, among = (opened(each, "lrp-relevance", group="b").relevance.values for each in (few, made))
    (slot,) = explained_slots(few)
    np.testing.assert_array_equal(alone[slot], among[slot])


def test_the_table_and_the_manifest_know_of_it(made):
    with (folder_of(made) / "attributions.csv").open() as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    assert list(rows) == ["lrp", "strong", "mixed"]
    assert all(float(row["residual_worst"]) < 1e-5 and row["law"] for row in rows.values())
    manifest = job(made, "attribute", "scenes", "cnn", "explained").read()
    (first, *_) = manifest.result["methods"]
    assert first["units"] == ["a", "b"]
    names = {name for name in manifest.files if name.startswith("lrp-relevance.zarr/")}
    assert {"lrp-relevance.zarr/zarr.json", "lrp-relevance.zarr/a/zarr.json"} <= names
    assert all((folder_of(made) / name).is_file() for name in names)
    stored = {path.relative_to(folder_of(made)).as_posix() for path in folder_of(made).glob("*-relevance.zarr/**/*")}
    assert {name for name in stored if (folder_of(made) / name).is_file()} == {
        name for name in manifest.files if "-relevance.zarr/" in name
    }


def test_the_plan_tells_every_store(made):
    preflight.check(made)
    one = job(made, "attribute", "scenes", "cnn", "explained")
    foretold = {store.name: store.raw for store in one.stage.cost(one, False).stores}
    assert foretold.keys() == {path.stem for path in folder_of(made).glob("*.zarr")}
    assert all(raw > 0 for raw in foretold.values())


def test_results_open_by_method_and_layer(made):
    found = pipeline.open_results(made.results)["scenes"]["cnn"]
    assert set(found.attributions["explained"]) == {"lrp", "strong", "mixed"}
    assert set(found.relevance["explained"]["lrp"]) == {"a", "b"}
    assert found.relevance["explained"]["strong"]["b"].relevance.shape[1] == 6


def test_other_layers_leave_the_maps_alone(made, tmp_path):
    raw = copied(made, made.config.model_dump(), tmp_path)
    again = planner.make(run_experiment.parse(raw))
    raw["attribute"]["explained"]["methods"]["lrp"]["layers"]["cnn"] = ["a"]
    before = {path.name: lines(path) for path in folder_of(again).glob("*.ledger")}
    after = run(raw, "attribute")
    grown = {path.name for path in folder_of(after).glob("*.ledger") if lines(path) != before.get(path.name)}
    assert grown == {"lrp-relevance.ledger"}
    assert sorted(path.name for path in (folder_of(after) / "lrp-relevance.zarr").glob("*/")) == ["a"]
    np.testing.assert_array_equal(
        opened(after, "lrp-relevance", group="a").relevance.values,
        opened(made, "lrp-relevance", group="a").relevance.values,
    )


def test_fewer_images_leave_no_relevance_of_the_others(made, tmp_path):
    raw = copied(made, made.config.model_dump(), tmp_path)
    raw["attribute"]["explained"] |= {"images": 2}
    after = run(raw, "attribute")
    slots = explained_slots(after)
    for group in ("a", "b"):
        found = opened(after, "lrp-relevance", group=group).relevance.values
        assert np.flatnonzero(np.isfinite(found).any(1)).tolist() == slots.tolist() and len(slots) == 2


def test_the_most_probable_classes_have_a_dimension(workers, tmp_path):
    raw = experiment(tmp_path, {"lrp": {"layers": ["b"]}}, ["cnn"], targets={"top": 2}, images=3)
    made = run(raw, *STAGES)
    units, store = opened(made, "lrp-relevance", group="b"), opened(made, "lrp")
    assert units.relevance.dims == ("image", "rank", "unit") and units.relevance.shape[1:] == (2, 6)
    slots = explained_slots(made)
    assert np.isfinite(units.relevance.values[slots]).all() and store.bias.dims == ("image", "rank")
    others = np.setdiff1d(np.arange(len(units.relevance)), slots)
    assert np.isnan(units.relevance.values[others]).all()


REFUSED = [
    ({"lrp": {"alpha": 2, "beta": 2}}, "methods.lrp.*alpha - beta is 0, expected 1: with alpha 2, beta is 1"),
    ({"lrp": {"alpha": 1, "beta": -1}}, "beta.*greater than or equal to 0"),
    ({"lrp": {"alpha": 0.5}}, "alpha.*greater than or equal to 1"),
    ({"lrp": {"rule": "alphabeta"}}, "rule"),
    ({"lrp": {"rule": "epsilon", "gamma": 0.5}}, "gamma: the rule `epsilon` has none"),
    ({"lrp": {"rules": {"a.*": {"rule": "z_b", "alpha": 2}}}}, "alpha: the rule `z_b` has none"),
    ({"lrp": {"rules": {"a.*": "zb"}}}, "rule"),
    ({"lrp": {"rule": "z_b"}}, "rule"),
    ({"lrp": {"preset": "lrp"}}, "preset"),
    ({"lrp": {"keep": ["channels"]}}, "keep"),
    ({"lrp": {"layers": {"nobody": ["a"]}}}, "no network 'nobody'"),
    ({"lrp": None, "lrp-relevance": {"method": "saliency"}}, "is called like the relevance of units of 'lrp': rename"),
]


@pytest.mark.parametrize(("methods", "message"), REFUSED, ids=lambda each: str(each)[:60])
def test_bad_options_are_refused_by_key(tmp_path, methods, message):
    with pytest.raises(MicrotomeError, match=f"(?s){message}"):
        planner.make(run_experiment.parse(experiment(tmp_path, methods, ["cnn"])))


def test_alpha_and_beta_are_compared_with_a_tolerance():
    from pipeline.stages.attribute.options import Lrp

    assert 4.1 - 3.1 != 1
    assert Lrp(alpha=4.1, beta=3.1).beta == 3.1 and Lrp(alpha=1.3).beta is None


INSPECTED = [
    ("cnn", {"rules": {"c.*": "epsilon"}}, "rules: network 'cnn': 'c.*' matches no module"),
    ("cnn", {"layers": ["bb"]}, "layers: network 'cnn': no layer 'bb'; nearest: b"),
    (
        "normed",
        {"layers": ["c"]},
        "layers: network 'normed': layer 'c' has no relevance of its own: it is folded into the BatchNorm",
    ),
    ("vit", {"alpha": 2}, "alpha: network 'vit': above 1, relevance grows from layer to layer where there is no ReLU"),
    (
        "cnn",
        {"rules": {"b.*": "z_b"}},
        "rules: network 'cnn': `z_b` is a rule of the layer that reads the input itself",
    ),
    ("whitened", {"rules": {"a.*": "z_b"}}, "rules: network 'whitened': `z_b` needs bounds of the inputs"),
    ("odd", {}, "network 'odd': LRP: operation 'cumprod' in module 'Odd' has no rule; these apply: saliency"),
]


def test_what_a_network_does_not_have_is_refused_before_any_work(tmp_path):
    raw = experiment(tmp_path, {"saliency": None})
    (tmp_path / "more.py").write_text(
        NETWORK
        + "\n\nclass Odd(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        + "        self.net = tiny(classes=12)\n\n    def forward(self, x):\n        return self.net(x).cumprod(1)\n"
        + "\n\ndef normed():\n    return nn.Sequential(OrderedDict(c=nn.Conv2d(3, 4, 3), d=nn.BatchNorm2d(4), "
        + "e=nn.AdaptiveAvgPool2d(1), f=nn.Flatten(), g=nn.Linear(4, 12)))\n"
    )
    for name, layers in (("odd", ["net.a"]), ("normed", ["d"])):
        function = "Odd" if name == "odd" else name
        raw["networks"][name] = {"module": f"{tmp_path / 'more.py'}:{function}", "weights": "random", "layers": layers}
    raw["networks"]["whitened"] = raw["networks"]["cnn"] | {"preprocessing": {"per_image": True}}
    raw["attribute"] = {
        f"case{at}": {"methods": {"lrp": options}, "networks": [network]}
        for at, (network, options, _) in enumerate(INSPECTED)
    }
    plan = planner.make(run_experiment.parse(raw))
    with pytest.raises(MicrotomeError) as error:
        preflight.check(plan)
    for at, (_, _, message) in enumerate(INSPECTED):
        said = [line for line in str(error.value).splitlines() if f"attribute.case{at}" in line]
        assert said and message in said[0], (at, said)
    assert not plan.results.joinpath("scenes").exists()


def test_relevance_that_cancels_is_told(made, capsys):
    one = job(made, "attribute", "scenes", "cnn", "explained")
    warn(one, "lrp", {"magnitude": np.array([30.0, 5.0]), "score": np.array([-2.0, 1.0])}, 12)
    assert (
        "lrp: for 50% of the explanations, relevance adds up to more than 10 times the score" in capsys.readouterr().err
    )
    warn(one, "lrp", {"magnitude": np.array([3.0]), "score": np.array([1.0])}, 12)
    assert not capsys.readouterr().err


# The library ----------------------------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(F.relu(self.first(x)).mean(1))


def test_any_floating_point_input_is_explained():
    net, x = Words().double().eval(), torch.randn(2, 5, 4, dtype=torch.float64)
    found = attribute.lrp(net, x, rule="epsilon", epsilon=0)
    assert found.map is None and found.values.shape == x.shape and found.residual.max() < 1e-14
    product = attribute.gradient_x_input(net, x).values
    torch.testing.assert_close(found.values, product, atol=1e-12, rtol=0)
    with pytest.raises(MicrotomeError, match="beta: alpha - beta is 2"):
        attribute.lrp(net, x, alpha=2, beta=0)
    with pytest.raises(MicrotomeError, match="rules: 'furst' matches no module; nearest: first"):
        attribute.lrp(net, x, rules={"furst": "epsilon"})
    with pytest.raises(MicrotomeError, match="z_b needs the bounds"):
        attribute.lrp(net, x, rules={"first": "z_b"})


def test_units_of_layers_and_bounds_in_the_library():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).eval()
    x = torch.rand(2, 3, 8, 8)
    found = attribute.lrp(net, x, layers=["1", "5"], rules={"0": "z_b"}, bounds=(0.0, torch.ones(3, 1, 1)))
    assert found.units["1"].shape == (2, 4) and found.units["5"].shape == (2, 3)
    torch.testing.assert_close(found.units["5"].sum(1).float(), net(x).amax(1))
    assert found.residual.max() < 1e-5
    with pytest.raises(MicrotomeError, match="layer '0' has no relevance of its own"):
        attribute.lrp(net, x, layers=["0"])
    with pytest.raises(MicrotomeError, match="no layer '11'"):
        attribute.lrp(net, x, layers=["11"])
