"""DeepLIFT, Deep SHAP and linear SHAP in the stage: maps of the library, laws, references in the ids, and refusals."""

import hashlib

import numpy as np
import pytest
import torch
import xarray as xr
from experiments import SIZE, copied, job, lines, run, scenes

from pipeline import attribute
from pipeline.errors import MicrotomeError
from pipeline.networks.build import load
from pipeline.networks.forward import normalise
from pipeline.run import experiment as run_experiment
from pipeline.run import planner, preflight
from pipeline.stages.attribute.inputs import chosen

pytestmark = pytest.mark.usefixtures("workers")
STAGES = ("ingest", "network", "attribute")
OWN = '''
from collections import OrderedDict

from torch import nn


def linear():
    return nn.Sequential(OrderedDict(a=nn.Conv2d(3, 4, 3, 2), flatten=nn.Flatten(), head=nn.Linear(196, 5)))


def pooled():
    return nn.Sequential(OrderedDict(
        a=nn.Conv2d(3, 4, 3), act=nn.ReLU(inplace=True), pool=nn.AdaptiveMaxPool2d(3), flatten=nn.Flatten(),
        head=nn.Linear(36, 5),
    ))


def plain():
    return nn.Sequential(OrderedDict(
        a=nn.Conv2d(3, 4, 3, 2), act=nn.ReLU(), b=nn.Conv2d(4, 4, 3), relu=nn.ReLU(), flatten=nn.Flatten(),
        head=nn.Linear(100, 5),
    ))
'''  # fmt: skip
METHODS = {
    "deeplift": None,
    "revealed": {"method": "deeplift", "rule": "reveal_cancel", "networks": ["plain"]},
    "exact": {"method": "deeplift", "max": "shapley", "networks": ["plain"]},
    "deep_shap": {"references": 3, "seed": 1},
    "linear_shap": {"networks": ["linear"]},
}
AMONG = ("linear", "pooled", "plain")


def experiment(folder, methods=METHODS, among=AMONG, **how):
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(OWN)
    raw = scenes(folder)
    raw["datasets"]["scenes"] |= {"images": {"train": 21, "validation": 12}, "shard_images": 8}
    raw["networks"] = {
        name: {
            "module": f"{folder / 'own.py'}:{name}",
            "weights": "random",
            "seed": at,
            "layers": ["a"],
            "numerics": {"micro_batch": 4},
        }
        for at, name in enumerate(AMONG)
        if name in among
    }
    raw["attribute"] = {"explained": {"images": 7, "methods": methods, "keep": ["channels"]} | how}
    return raw


@pytest.fixture(scope="module")
def made(workers, tmp_path_factory):
    return run(experiment(tmp_path_factory.mktemp("differences")), *STAGES)


def folder_of(made, network):
    return made.results / "scenes" / network / "attributions" / "explained"


def opened(made, method, network):
    return xr.open_zarr(folder_of(made, network) / f"{method}.zarr", consolidated=True)


def plain(made, network):
    """The network, all images as it takes them, the slots of those explained, and the images."""
    images = xr.open_zarr(made.results / "scenes/images.zarr")
    spec = made.networks[network]
    net = load(spec, made.results / "networks" / network / "model.safetensors")
    one = job(made, "attribute", "scenes", network, "explained")
    return net, normalise(torch.from_numpy(images.image.values), spec), chosen(one.images, one.settings), images


def references(images, count, seed):
    train = np.flatnonzero(images.split.values == "train")
    ids = images.image_id.values
    return sorted(train, key=lambda slot: hashlib.sha256(f"{seed}:{ids[slot]}".encode()).digest())[:count]


@pytest.mark.parametrize("network", AMONG)
def test_maps_are_those_of_the_library_and_keep_their_laws(made, network):
    net, inputs, slots, images = plain(made, network)
    own = references(images, 3, 1)
    black = normalise(torch.zeros((1, 3, SIZE, SIZE), dtype=torch.uint8), made.networks[network])
    options = {
        "deeplift": {"baseline": black},
        "revealed": {"baseline": black, "rule": "reveal_cancel"},
        "exact": {"baseline": black, "max": "shapley"},
        "deep_shap": {"background": inputs[own]},
        "linear_shap": {"background": inputs[images.split.values == "train"]},
    }
    predicted = net(inputs[slots]).argmax(1)
    for method, how in METHODS.items():
        if (how or {}).get("networks", [network]) != [network]:
            continue
        store = opened(made, method, network)
        found = getattr(attribute, store.attrs["method"])(net, inputs[slots], predicted, **options[method])
        same = np.isclose(store.attribution.values[slots], found.map, atol=2e-5 * float(found.map.abs().max()))
        assert same.mean() > (0.98 if network == "pooled" else 0.9999)  # even areas tie in windows, up to rounding
        np.testing.assert_allclose(
            store.channel_attribution.values.sum(1)[slots], store.attribution.values[slots], atol=1e-5
        )
        assert store.residual.values[slots].max() < 1e-4
        if "phi0" in found.facts:
            np.testing.assert_allclose(store.phi0.values[slots], found.facts["phi0"].detach(), rtol=1e-4, atol=1e-6)
            lacking = store.attribution.values[slots].sum((1, 2)) - store.score.values[slots] + store.phi0.values[slots]
            assert np.abs(lacking).max() < 1e-4


def test_phi0_is_the_mean_score_of_the_references(made):
    net, inputs, slots, images = plain(made, "pooled")
    store = opened(made, "deep_shap", "pooled")
    expected = net(inputs[references(images, 3, 1)]).mean(0)[torch.from_numpy(store.target.values[slots])]
    np.testing.assert_allclose(store.phi0.values[slots], expected.detach(), rtol=1e-5, atol=1e-6)
    net, inputs, slots, images = plain(made, "linear")
    store = opened(made, "linear_shap", "linear")
    expected = net(inputs[images.split.values == "train"]).mean(0)[torch.from_numpy(store.target.values[slots])]
    np.testing.assert_allclose(store.phi0.values[slots], expected.detach(), rtol=1e-4, atol=1e-6)


def test_an_image_explained_alone_has_the_bits_that_it_has_among_others(made, tmp_path):
    few = run(experiment(tmp_path, images=1), *STAGES)
    for network in AMONG:
        _, _, (slot,), _ = plain(few, network)
        for path in sorted(folder_of(few, network).glob("*.zarr")):
            alone, among = (opened(each, path.stem, network) for each in (few, made))
            for array in set(alone.data_vars) - {"image_id"}:
                np.testing.assert_array_equal(alone[array].values[slot], among[array].values[slot], err_msg=path.stem)


def test_a_baseline_of_each_image_is_that_of_the_image(tmp_path):
    methods = {name: METHODS[name] for name in ("deeplift", "revealed")}
    several, one = (
        run(experiment(tmp_path / str(count), methods, ["plain"], baseline="uniform", images=count), *STAGES)
        for count in (5, 1)
    )
    _, _, (slot,), _ = plain(one, "plain")
    for method in methods:
        alone, among = (opened(each, method, "plain") for each in (one, several))
        assert np.nanmax(among.residual.values) < 1e-4 and len(np.unique(among.baseline_score.values)) > 3
        for array in ("attribution", "baseline_score", "residual"):
            np.testing.assert_array_equal(alone[array].values[slot], among[array].values[slot])


CHANGED = [
    ({"baseline": "white"}, ["deeplift", "exact", "revealed"]),
    ({"methods": METHODS | {"deep_shap": {"references": 3, "seed": 2}}}, ["deep_shap"]),
    ({"methods": METHODS | {"deep_shap": {"references": 2, "seed": 1}}}, ["deep_shap"]),
    ({"methods": METHODS | {"exact": METHODS["exact"] | {"max": "cross"}}}, ["exact"]),
]


@pytest.mark.parametrize(("change", "grown"), CHANGED, ids=[str(change)[:70] for change, _ in CHANGED])
def test_what_a_change_computes_again(made, tmp_path, change, grown):
    raw = copied(made, made.config.model_dump(), tmp_path)
    again = planner.make(run_experiment.parse(raw))
    raw["attribute"]["explained"] |= change
    before = {path.stem: lines(path) for path in folder_of(again, "plain").glob("*.ledger")}
    after = run(raw, "attribute")
    changed = {path.stem for path in folder_of(after, "plain").glob("*.ledger") if lines(path) != before[path.stem]}
    assert changed == set(grown)


def test_other_references_are_another_id(made):
    from dataclasses import replace

    from pipeline.stages.attribute import tasks
    from pipeline.stages.attribute.inputs import shards_of
    from pipeline.stages.attribute.stage import ids_of, methods_of, targets_of

    one = job(made, "attribute", "scenes", "plain", "explained")
    _, found = tasks.examine_network(one.model, one.images.size, [])
    pixels = np.zeros((3, 3, SIZE, SIZE), np.uint8)
    methods = methods_of(one.settings)
    work = tasks.Work(
        one.model, found, targets_of(one.settings), "black", methods, {}, {}, background={"deep_shap": pixels}
    )
    shards = shards_of(one)
    same, other = (
        ids_of(one, replace(work, background={"deep_shap": each}), "deep_shap", shards) for each in (pixels, pixels + 1)
    )
    assert same == ids_of(one, work, "deep_shap", shards) and set(same.values()).isdisjoint(other.values())


REFUSED = [
    ({"deep_shap": {"split": "test"}}, "has no split 'test'"),
    ({"linear_shap": {"split": "test"}}, "has no split 'test'"),
    ({"deep_shap": {"references": 0}}, "greater than 0"),
    ({"deeplift": {"rule": "rescaled"}}, "rule"),
    ({"deeplift": {"rule": "reveal_cancel", "max": "shapley"}}, "`reveal_cancel` has no rule for max pooling"),
]


@pytest.mark.parametrize(("methods", "message"), REFUSED, ids=lambda each: str(each)[:60])
def test_bad_input_is_refused_while_the_plan_is_made(tmp_path, methods, message):
    with pytest.raises(MicrotomeError) as error:
        planner.make(run_experiment.parse(experiment(tmp_path, methods)))
    assert message in str(error.value)


INSPECTED = [
    ({"deep_shap": {"references": 22}}, "pooled", "22 references of split 'train', which has 21 valid images"),
    ({"linear_shap": None}, "pooled", "methods.linear_shap: network 'pooled': the logits are not linear in the input"),
    (
        {"deeplift": {"rule": "reveal_cancel"}},
        "pooled",
        "RevealCancel: operation 'adaptive_max_pool2d' in module 'pool' has no rule; these apply: saliency",
    ),
    ({"deeplift": {"max": "shapley"}}, "pooled", "'adaptive_max_pool2d' in module 'pool' has windows of unequal size"),
    ({"linear_shap": None, "score": "probability"}, "linear", "Linear SHAP explains logits, and `score` is"),
]  # fmt: skip


def test_what_a_network_does_not_have_is_refused_before_any_work(tmp_path):
    raw = experiment(tmp_path)
    raw["attribute"] = {}
    for at, (methods, network, _) in enumerate(INSPECTED):
        methods = dict(methods)
        how = {"score": methods.pop("score")} if "score" in methods else {}
        raw["attribute"][f"case{at}"] = {"methods": methods, "networks": [network]} | how
    plan = planner.make(run_experiment.parse(raw))
    with pytest.raises(MicrotomeError) as error:
        preflight.check(plan)
    for at, (_, _, message) in enumerate(INSPECTED):
        said = [line for line in str(error.value).splitlines() if f"attribute.case{at}" in line]
        assert said and message in said[0], (at, said, str(error.value))
    assert not plan.results.joinpath("scenes").exists()


def test_the_plan_tells_what_it_takes(made):
    preflight.check(made)
    more, fewer = (
        job(made, "attribute", "scenes", name, "explained").stage.cost(
            job(made, "attribute", "scenes", name, "explained"), False
        )
        for name in ("plain", "pooled")
    )
    assert more.memory > 0 and {store.name for store in fewer.stores} == {"deeplift", "deep_shap"}
    assert len(more.stores) == 4
