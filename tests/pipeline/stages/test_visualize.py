"""The stage of feature pictures: what it stores against plain computation, what is made again, and what is refused."""

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from experiments import SIZE, VIT, copied, job, lines, run
from visualizations import WISHES, experiment

import pipeline
from pipeline.config.report import Figures
from pipeline.errors import MicrotomeError
from pipeline.networks.build import load
from pipeline.networks.forward import normalise
from pipeline.plan import settle
from pipeline.report.experiment import Experiment, Made
from pipeline.run import experiment as run_experiment
from pipeline.run import planner
from pipeline.stages.registry import jobs
from pipeline.stages.visualize import facts, stage
from pipeline.stages.visualize import page as of_page
from pipeline.stages.visualize.found import page_of, wanted_by
from pipeline.workers import client

pytestmark = pytest.mark.usefixtures("workers")
STAGES = ("ingest", "network", "concepts", "extract", "dissect", "visualize")
RULES = ["deconvnet", "guided_backprop", "gradient"]


@pytest.fixture(scope="module")
def made(workers, tmp_path_factory):
    """Run once, for the tests that read; those that change something take a copy."""
    return run(experiment(tmp_path_factory.mktemp("visualize")), *STAGES)


def folder_of(made, network="cnn", name="wishes"):
    return made.results / "scenes" / network / "visualizations" / name


def opened(made, store, group, **names):
    return xr.open_zarr(folder_of(made, **names) / f"{store}.zarr", group=group, consolidated=False)


def table(made, name="visualizations"):
    with (folder_of(made) / f"{name}.csv").open() as stream:
        return list(csv.DictReader(stream))


def plain(made):
    spec = made.networks["cnn"]
    return load(spec, made.results / "networks/cnn/model.safetensors"), spec


def tensor(values):
    return torch.from_numpy(np.array(values))  # a copy that may be written to


def outputs(net, layer, inputs):
    kept = {}
    handle = net.get_submodule(layer).register_forward_hook(lambda _, __, out: kept.update(out=out))
    net(inputs)
    handle.remove()
    return kept["out"]


def test_reached_is_what_the_network_gives_for_the_stored_picture(made):
    net, spec = plain(made)
    for way, layer in itertools.product(("pixels", "maco"), ("a", "b")):
        store = opened(made, f"maximised-{way}", layer)
        units, best = store.unit.values, store.best.values
        assert units.tolist() == ([0, 4, 2] if layer == "b" else [0, 1, 2, 3])
        maps = outputs(net, layer, normalise(tensor(store.picture.values), spec))
        found = maps[torch.arange(len(units)), tensor(units)].flatten(1).amax(1).detach().numpy()
        reached = store.reached.values
        np.testing.assert_allclose(reached[np.arange(len(units)), best], found, rtol=1e-4, atol=1e-5)
        assert (best == reached.argmax(1)).all()
        rounded = np.rint(255 * store.input.values)
        assert np.abs(rounded - store.picture.values).max() <= 1 and store.input.dtype == np.float32


def test_classes_have_two_scores(made):
    net, spec = plain(made)
    for way in ("pixels", "maco"):
        for score in ("logit", "log_probability"):
            store = opened(made, f"class-models-{way}", score)
            classes = store["class"].values
            assert classes.tolist() == [made_classes(made).index("farm"), 4]
            logits = net(normalise(tensor(store.picture.values), spec)).detach()
            values = logits if score == "logit" else logits.log_softmax(1)
            found = values[torch.arange(2), tensor(classes)].numpy()
            np.testing.assert_allclose(store.reached.values.max(1), found, rtol=1e-4, atol=1e-5)


def made_classes(made):
    return xr.open_zarr(made.results / "scenes/images.zarr").attrs["classes"]


def test_the_data_stands_beside(made):
    extracted = xr.open_zarr(made.results / "scenes/images.zarr")
    split = extracted.split.values == "validation"
    paths = run_layers(made)
    for layer in ("a", "b"):
        store = opened(made, "maximised-pixels", layer)
        maximum = xr.open_zarr(made.results / "scenes" / paths[layer]["activations"]).maximum.values[split]
        np.testing.assert_array_equal(store.data_maximum.values, maximum.max(0)[store.unit.values])
        threshold = xr.open_zarr(made.results / "scenes" / paths[layer]["thresholds"]).threshold.values
        np.testing.assert_array_equal(store.threshold.values, threshold[store.unit.values])
    rows = {(row["subject"], row["number"], row["way"]): row for row in table(made)}
    assert len(rows) == 2 * (4 + 3) + 2 * 2 * 2
    for row in rows.values():
        assert row["beats_data"] == str(int(float(row["reached"]) > float(row["data_maximum"])))
        assert float(row["lowest"]) <= float(row["reached"]) == float(row["highest"])


def run_layers(made):
    return json.loads((made.results / "scenes/cnn/layers.json").read_text())


def test_trajectories_hold_every_term(made):
    store = opened(made, "maximised-pixels", "b")
    assert store.term.values.tolist() == ["score", "l2", "tv", "gaussian"]
    values = store.trajectory.values
    assert values.shape == (3, 2, 4, 4) and np.isfinite(values).all()
    assert (values[:, :, 1:3] >= 0).all() and (values[:, :, 3] <= 0).all()
    assert opened(made, "maximised-maco", "b").term.values.tolist() == ["score"]


@pytest.mark.parametrize("layer", ["a", "b"])
def test_projections_by_hand(made, layer):
    """The gradient of the single activation, by torch, lies in the receptive field, where the projection shows it."""
    net, spec = plain(made)
    store, images = opened(made, "projections", layer), xr.open_zarr(made.results / "scenes/images.zarr")
    assert store.attrs["reach"] == "closed form" and store.sizes["place"] == 3 and store.method.values.tolist() == RULES
    split = np.flatnonzero(images.split.values == "validation")
    whole = outputs(net, layer, normalise(tensor(images.image.values[split]), spec)).detach().flatten(2).amax(2)
    for row, unit in enumerate(store.unit.values.tolist()):
        order = np.argsort(-whole[:, unit].numpy(), kind="stable")[:3]
        np.testing.assert_allclose(store.value.values[row], whole[:, unit].numpy()[order], rtol=1e-4, atol=1e-6)
        for place, slot in enumerate(store.image.values[row].tolist()):
            given = normalise(tensor(images.image.values[slot : slot + 1]), spec).requires_grad_()
            y, x = store.position.values[row, place]
            value = outputs(net, layer, given)[0, unit, y, x]
            assert float(value.detach()) == pytest.approx(float(store.value.values[row, place]), rel=1e-4, abs=1e-6)
            (gradient,) = torch.autograd.grad(value, given)
            top, left, bottom, right = store.field.values[row, place].tolist()
            outside = gradient[0].clone()
            outside[:, top:bottom, left:right] = 0
            assert not outside.any()
            scale = float(store.scale.values[row, place, 2])
            assert scale == pytest.approx(float(gradient.abs().max()), rel=1e-4, abs=1e-7)
            shown = (store.projection.values[row, place, 2].astype(float) - 128) / 127 * scale
            expected = gradient[0, :, top:bottom, left:right].numpy()
            np.testing.assert_allclose(shown[:, : bottom - top, : right - left], expected, atol=scale / 250 + 1e-9)
            assert not shown[:, bottom - top :].any() and not shown[:, :, right - left :].any()


def test_results_open_by_experiment_store_and_layer(made):
    found = pipeline.open_results(made.results)["scenes"]["cnn"].visualizations["wishes"]
    assert set(found) == {
        *("projections", "filters", "maximised-pixels", "maximised-maco"),
        *("class-models-pixels", "class-models-maco"),
    }
    assert found["maximised-maco"]["b"].picture.dims == ("unit", "channel", "y", "x")
    assert set(found["class-models-pixels"]) == {"logit", "log_probability"} and set(found["filters"]) == {"a.0"}


GROUPS = [
    ("projections", "a", ["layer", "reach", "settings", "split", "image_size"]),
    *(
        (store, group, [own, "way", "settings", "split", "scales", "image_size", "statistics_images"])
        for store, group, own in [("maximised-maco", "b", "layer"), ("class-models-pixels", "logit", "score")]
    ),
    ("filters", "a.0", ["module", "stride", "kernel"]),
]


@pytest.mark.parametrize(("store", "group", "names"), GROUPS, ids=lambda each: str(each)[:20])
def test_groups_have_the_attributes_that_the_docs_list(made, store, group, names):
    attrs = opened(made, store, group).attrs
    assert set(attrs) == set(names)
    _, _, section = (Path(__file__).parents[3] / "docs/results.md").read_text().partition("### Visualizations")
    paragraphs = [each for each in section.partition("\n### ")[0].split("\n\n") if each.startswith("Attributes")]
    assert any(all(f"`{name}`" in each for name in names) for each in paragraphs)
    if "settings" in names:
        asked = made.config.model_dump()["visualize"]["wishes"]
        assert attrs["settings"] == asked["projections" if store == "projections" else "maximise"]


def test_first_layers(made):
    net, _ = plain(made)
    store, (row,) = opened(made, "filters", "a.0"), table(made, "first-layers")
    np.testing.assert_array_equal(store.filter.values, net.a[0].weight.detach().numpy())
    assert store.attrs["stride"] == [2, 2] and row["module"] == "a.0" and row["filters"] == "4"
    assert float(row["aliasing_mean"]) == pytest.approx(float(store.aliasing.values.mean()), rel=1e-6)


def test_two_workers_and_an_interrupted_run_give_the_same_bytes(made, tmp_path, monkeypatch, two_workers):
    monkeypatch.setenv(client.ADDRESS, two_workers)
    again = planner.make(run_experiment.parse(copied(made, made.config.model_dump(), tmp_path)))
    folder = folder_of(again)
    for path in folder.glob("done/*"):
        path.unlink()
    for ledger in folder.glob("*.ledger"):
        kept = ledger.read_bytes().splitlines(keepends=True)
        ledger.write_bytes(b"".join(kept[:1]))
    one = job(again, "visualize", "scenes", "cnn", "wishes")
    left, count = one.stage.pending(one)
    one.stage.run(one)
    before, after = (job(each, "visualize", "scenes", "cnn", "wishes").read() for each in (made, again))
    assert before.digest == after.digest and before.files == after.files
    assert after.provenance["made"] == left == count - 5 and after.provenance["shards"] == count


CHANGED = [
    ({"maximise": {**WISHES["maximise"], "tv": 1.0}}, ["class-models-pixels", "maximised-pixels"]),
    ({"maximise": {**WISHES["maximise"], "crop": 0.7}}, ["class-models-maco", "maximised-maco"]),
    ({"projections": {"images": 3, "units": 3, "methods": ["gradient"]}}, ["projections"]),
    ({"units": {"a": "all"}, "maximise": {**WISHES["maximise"], "expert": ["l2", "tv", "gaussian"]}}, []),
    ({"classes": [4]}, ["class-models-maco", "class-models-pixels"]),
]


@pytest.mark.parametrize(("change", "grown"), CHANGED, ids=lambda each: str(each)[:40])
def test_what_a_change_draws_again(made, tmp_path, change, grown):
    raw = copied(made, made.config.model_dump(), tmp_path)
    before = {path.stem: lines(path) for path in folder_of(planner.make(run_experiment.parse(raw))).glob("*.ledger")}
    raw["visualize"]["wishes"] |= change
    after = run(raw, "visualize")
    changed = {path.stem for path in folder_of(after).glob("*.ledger") if lines(path) != before[path.stem]}
    assert sorted(changed) == grown
    named = {name.partition(".zarr")[0] for name in job(after, "visualize", "scenes", "cnn", "wishes").read().files}
    there = {path.stem for path in folder_of(after).glob("*.zarr")}
    assert there == {name for name in named if not name.endswith(".csv")}


def test_statistics_take_images_of_all_shards(made, monkeypatch):
    monkeypatch.setattr(stage, "STATISTICS", 9)
    one = job(made, "visualize", "scenes", "cnn", "wishes")
    shown, ids = facts.counted(one), one.images.image_ids()
    found = stage.statistics_of(one, shown)
    slots = [shard * one.images.shard_images + place for shard, _, places in found for place in places]
    assert slots == facts.first_by_hash(np.flatnonzero(shown), ids, 9).tolist() != np.flatnonzero(shown)[:9].tolist()
    assert [digest for _, digest, _ in found] == [one.images.contents[shard] for shard, _, _ in found]


def test_naming_one_more_class_draws_no_other_again(made, tmp_path):
    """The log-probability is told beside that of chance among all classes of the network, whichever are chosen."""
    assert opened(made, "class-models-pixels", "log_probability").attrs["scales"] == [math.log(12)] * 2
    raw = copied(made, made.config.model_dump(), tmp_path)
    before = planner.make(run_experiment.parse(raw))
    ids = class_parts(before)
    raw["visualize"]["wishes"]["classes"] = [*raw["visualize"]["wishes"]["classes"], 2]
    after = planner.make(run_experiment.parse(raw))
    settle.settle(after)
    added = class_parts(after)
    assert len(ids) == 4 and len(added) == 8 and ids.items() < added.items()


def class_parts(made):
    one = job(made, "visualize", "scenes", "cnn", "wishes")
    rows, _ = stage.rows_of(one, facts.counted(one))
    parts = stage.parts_of(one, [row for row in rows if not row.of_units])
    return {key: id for own in parts.values() for key, id in own.ids.items()}


def test_a_transformer_depends_on_everything(tmp_path):
    (tmp_path / "vit.py").write_text(VIT)
    raw = experiment(tmp_path)
    raw["networks"] = {
        "vit": {"module": f"{tmp_path / 'vit.py'}:vit", "weights": "random", "seed": 1, "layers": ["encoder"]}
    }
    raw["networks"]["vit"]["numerics"] = {"micro_batch": 4}
    wishes = {"networks": ["vit"], "units": {"encoder": [1, 5]}, "maximise": {"steps": 2, "restarts": 1}}
    raw["visualize"] = {"wishes": wishes | {"projections": {"images": 2, "methods": ["gradient"]}}}
    made = run(raw, *STAGES)
    store = opened(made, "projections", "encoder", network="vit")
    assert store.attrs["reach"] == "everything" and store.projection.shape[-2:] == (SIZE, SIZE)
    assert (store.field.values == [0, 0, SIZE, SIZE]).all()
    raw["visualize"]["wishes"]["projections"]["methods"] = ["deconvnet"]
    with pytest.raises(MicrotomeError, match=r"visualize.wishes.projections.methods: 'deconvnet' of network 'vit'"):
        run(raw, "visualize")


def shown(made, out):
    for folder in ("figures", "tables", "visualizations"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    steps = tuple(Made.of(each) for each in jobs(made) if each.manifest.exists())
    return Experiment(made.results, out, "Mine", steps, figures=Figures(formats=[]))


def test_the_page_says_what_the_numbers_do(made, tmp_path):
    given = shown(made, tmp_path)
    (page,) = of_page.pages(given)
    assert page.file == page_of(given, "scenes", "cnn") == "visualization-scenes-cnn.html"
    assert all((tmp_path / file).is_file() for file in page.files)
    wanted = wanted_by(given, "scenes", "cnn")
    assert set(wanted) == {"a", "b"} and set(wanted["b"]) == {0, 2, 4}
    assert all(told[0] in page.files and told[1] == 2 for units in wanted.values() for told in units.values())
    rows = [row for row in table(made) if (row["subject"], row["way"]) == ("b", "maco")]
    beats = sum(int(row["beats_data"]) for row in rows)
    assert any(said.startswith(f"b, MACO: of 3 units, the pictures of {beats} score") for said in page.findings)
    assert sum("-projections" in file for file in page.files) == 6


def test_a_constant_unit_is_refused_by_name_and_left_out_of_all(made, tmp_path):
    raw = copied(made, made.config.model_dump(), tmp_path)
    (tmp_path / "dead.py").write_text(DEAD)
    raw["networks"]["cnn"]["module"] = f"{tmp_path / 'dead.py'}:tiny"
    raw["networks"]["cnn"]["arguments"] = {}
    raw["visualize"]["wishes"] |= {"classes": [], "projections": None, "units": {"a": [1, 0]}}
    with pytest.raises(MicrotomeError, match=r"visualize.wishes.units.a: unit 1 of network 'cnn' has the same highest"):
        run(raw, *STAGES)
    raw["visualize"]["wishes"]["units"] = {"a": "all"}
    after = run(raw, *STAGES)
    assert opened(after, "maximised-pixels", "a").unit.values.tolist() == [0, 2]
    (note,) = job(after, "visualize", "scenes", "cnn", "wishes").read().result["notes"]
    assert note == "layer 'a': 1 units are constant on the images and left out: 1"


DEAD = """
from collections import OrderedDict

import torch
from torch import nn


def tiny():
    network = nn.Sequential(OrderedDict(
        a=nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()), b=nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()),
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
    ))
    with torch.no_grad():
        network.a[0].weight[1] = 0
        network.a[0].bias[1] = -1
    return network
"""


def test_a_gradient_that_is_not_a_number_is_refused_by_the_unit(made, tmp_path):
    """Else the noise that an ascent starts from would stand for what unit 1 wants to see."""
    raw = copied(made, made.config.model_dump(), tmp_path)
    (tmp_path / "broken.py").write_text(BROKEN)
    raw["networks"]["cnn"]["module"] = f"{tmp_path / 'broken.py'}:tiny"
    raw["networks"]["cnn"]["arguments"] = {}
    maximise = {"steps": 1, "expert": ["l2"], "restarts": 1}
    raw["visualize"]["wishes"] |= {"classes": [], "projections": None, "units": {"a": [0, 1]}, "maximise": maximise}
    with pytest.raises(MicrotomeError, match=r"network 'cnn', a: the score of unit 1 or its gradient is not finite"):
        run(raw, *STAGES)
    raw["visualize"]["wishes"]["units"] = {"a": [0]}
    after = run(raw, *STAGES)
    store = opened(after, "maximised-pixels", "a")
    assert store.unit.values.tolist() == [0] and "input" not in store, "what `keep` left is gone"


BROKEN = """
from collections import OrderedDict

import torch
from torch import nn


class Broken(nn.Module):
    def forward(self, x):
        x = 1 * x
        if x.requires_grad:
            x.register_hook(lambda gradient: torch.cat([
                gradient[:, :1], torch.where(gradient[:, 1:] == 0, gradient[:, 1:], torch.nan),
            ], 1))
        return x


def tiny():
    return nn.Sequential(OrderedDict(
        a=nn.Sequential(nn.Conv2d(3, 2, 3), Broken()), b=nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU()),
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
    ))
"""
