"""The stages of similarity against plain loops in float64; what is made again; and what is refused."""

import csv
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from experiments import VIT, hsic1, labelled_images, lines, run, scenes, segmentation, shown, tiny, write_image

import pipeline
from pipeline.data.minibatches import Batching, minibatches
from pipeline.errors import MicrotomeError
from pipeline.networks.build import load
from pipeline.networks.forward import normalise
from pipeline.networks.layers import Recorder, resolve, to_maps
from pipeline.run import experiment as run_experiment
from pipeline.run import planner
from pipeline.workers import client

pytestmark = pytest.mark.usefixtures("workers")
STAGES = ("ingest", "network", "grams", "similarity")
BLOCKS = [f"encoder.layers.encoder_layer_{block}" for block in range(2)]
INPLACE = """
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.conv(x)
        out += x.mean(1, keepdim=True)
        return self.relu(out)


def inplace():
    return nn.Sequential(Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def experiment(folder, compare=None, **how):
    """Scenes, a small CNN and a small ViT, compared on twenty images in minibatches of six."""
    (folder / "vit.py").write_text(VIT)
    raw = scenes(folder)
    raw["datasets"]["scenes"] |= {"concepts": ["truth"], "images": {"train": 6, "validation": 20}}
    vit = {"module": f"{folder / 'vit.py'}:vit", "weights": "random", "layers": BLOCKS, "seed": 1}
    raw["networks"] = {
        "cnn": tiny(folder, arguments={"classes": 12, "units": 6}, seed=3),
        "vit": vit | {"numerics": {"micro_batch": 4}},
    }
    compare = compare or {"both": {"networks": ["cnn", "vit"]}}
    raw["similarity"] = {"compare": compare, "images": 20, "minibatch": 6, "neighbours": 3} | how
    return raw


def outputs(made, network, names, forms=("whole",)):
    """{(layer, features): (image, feature) float64} of all images, from a plain forward."""
    images = zarr.open_group(made.results / "scenes" / "images.zarr", mode="r", use_consolidated=False)
    spec = made.networks[network]
    model = load(spec, made.results / "networks" / network / "model.safetensors")
    pixels = normalise(torch.from_numpy(images["image"][:]), spec)
    infos = {info.name: info for info in resolve(model, names, tuple(pixels.shape[1:]))}
    with Recorder(model, names) as record:
        _, found = record(pixels)
    out = {}
    for name in names:
        maps, special = to_maps(found[name], infos[name])
        for form in forms:
            if form == "whole":
                out[name, form] = found[name]
            elif form == "pooled" and infos[name].spatial:
                out[name, form] = maps.mean((2, 3))
            elif form == "class_token" and special is not None:
                out[name, form] = special[:, 0]
            elif form == "spatial" and special is not None:
                out[name, form] = maps
    return {key: value.double().flatten(1).numpy() for key, value in out.items()}


def opened(made, name="both"):
    return xr.open_zarr(made.results / "similarity" / name / "cka.zarr")


def contents(made):
    """Digest of every file of the two stages that holds results."""
    files = [
        *(made.results / "similarity").rglob("*"),
        *(path for network in ("cnn", "vit") for path in (made.results / "scenes" / network).rglob("grams.zarr/**/*")),
    ]
    return {
        path.relative_to(made.results).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and not {"done", "logs"} & set(path.parts)
    }


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"last": "weigh", "epochs": 2, "seed": 5},
        {"replacement": True, "epochs": 2, "features": ["whole", "class_token", "spatial", "pooled"]},
    ],
)
def test_cka_is_that_of_plain_forwards(tmp_path, how):
    made = run(experiment(tmp_path, **how), *STAGES)
    forms = tuple(how.get("features", ["whole"]))
    layers = {}
    for network, names in (("cnn", ["a", "b"]), ("vit", BLOCKS)):
        layers |= {(network, *key): value for key, value in outputs(made, network, names, forms).items()}
    found = opened(made)
    suffix = {"whole": "", "class_token": " [class token]", "spatial": " [spatial]", "pooled": " [pooled]"}
    assert found.layer_a.values.tolist() == [f"{n}/{layer}{suffix[f]}" for n, layer, f in layers]
    sizes = (found.image.values >= 0).sum(1)
    assert sizes.tolist() == [6, 6, 6] * how.get("epochs", 1), "two images are left over, too few even to be weighed"
    weights = sizes * (sizes - 3) if how.get("last") == "weigh" else np.ones(len(sizes))
    batches = [row[row >= 0] for row in found.image.values]
    features = list(layers.values())
    for a in range(len(features)):
        for b in range(a, len(features)):
            xy, xx, yy = (
                sum(w * hsic1(p[batch], q[batch]) for w, batch in zip(weights, batches, strict=True))
                for p, q in ((features[a], features[b]), (features[a],) * 2, (features[b],) * 2)
            )
            assert float(found.cka[a, b]) == pytest.approx(xy / np.sqrt(xx * yy), abs=1e-6)
    np.testing.assert_array_equal(found.cka.values, found.cka.values.T)
    assert (found.note.values == "").all()
    assert found.attrs["dataset"] == "scenes" and found.attrs["networks"] == ["cnn", "vit"]
    assert found.attrs["minibatch"] == 6 and found.attrs["estimator"] == "unbiased"
    assert found.attrs["counted"] == len(np.unique(found.image.values))
    check_table(found, made)


def check_table(found, made):
    with (made.results / "similarity/both/cka.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    count = found.sizes["layer_a"]
    assert len(rows) == count * (count + 1) // 2
    across = rows[count - 1]
    assert (across["network_a"], across["layer_a"]) == ("cnn", found.layer_a.values[0].removeprefix("cnn/"))
    assert (across["network_b"], across["layer_b"]) == ("vit", found.layer_a.values[-1].removeprefix("vit/"))
    for column in ("cka", "standard_error", "influence", "cka_biased", "neighbours", "procrustes_shuffled"):
        assert float(across[column]) == pytest.approx(float(found[column][0, -1]), rel=1e-6)
    assert int(across["most_influential"]) == int(found.most_influential[0, -1])


def test_smaller_last_minibatch_is_dropped_or_weighed(tmp_path):
    """21 images in minibatches of eight: the last has five, enough for HSIC1."""
    raw = experiment(tmp_path, images=21, minibatch=8, last="weigh")
    raw["datasets"]["scenes"]["images"]["validation"] = 21
    made = run(raw, *STAGES)
    found = opened(made)
    assert (found.image.values >= 0).sum(1).tolist() == [8, 8, 5]
    assert found.weight.values.tolist() == [40, 40, 10]
    x, y = outputs(made, "cnn", ["a", "b"]).values()
    batches = [row[row >= 0] for row in found.image.values]

    def unbiased(p, q):
        return sum(len(batch) * (len(batch) - 3) * hsic1(p[batch], q[batch]) for batch in batches)

    def biased(p, q):
        centred = [[z[batch] - z[batch].mean(0) for z in (p, q)] for batch in batches]
        return sum(((k @ k.T) * (m @ m.T)).sum() for k, m in centred)

    for name, summed in (("cka", unbiased), ("cka_biased", biased)):
        expected = summed(x, y) / np.sqrt(summed(x, x) * summed(y, y))
        assert float(found[name][0, 1]) == pytest.approx(expected, abs=1e-6), name
    raw["similarity"]["last"] = "drop"
    found = opened(run(raw, *STAGES))
    assert found.weight.values.tolist() == [1, 1] and found.attrs["last"] == "drop"


def test_outputs_are_taken_before_they_are_overwritten(tmp_path):
    (tmp_path / "inplace.py").write_text(INPLACE)
    raw = experiment(tmp_path)
    raw["networks"]["cnn"] |= {"module": f"{tmp_path / 'inplace.py'}:inplace", "arguments": {}}
    raw["similarity"] |= {"layers": {"cnn": "all"}}
    raw["networks"]["cnn"]["layers"] = ["0"]
    made = run(raw, *STAGES)
    features = outputs(made, "cnn", ["0.conv"])["0.conv", "whole"]
    found = opened(made)
    names = [name for name in found.layer_a.values.tolist() if name.startswith("cnn/")]
    assert names == ["cnn/0.conv", "cnn/0.relu", "cnn/0", "cnn/1", "cnn/2"], "in execution order"
    hsic = [hsic1(features[batch], features[batch]) for batch in found.image.values]
    np.testing.assert_allclose(found.hsic.values[:, 0, 0], hsic, rtol=1e-5)
    assert float(found.cka.sel(layer_a="cnn/0.conv", layer_b="cnn/0.relu")) < 0.999


def test_the_same_bits_for_any_workers_and_after_a_cut(tmp_path, monkeypatch, two_workers):
    raw = experiment(tmp_path)
    made = run(raw, *STAGES)
    before = contents(made)
    assert sum("grams.zarr/gram/c" in name for name in before) == 6 and any("cka.csv" in name for name in before)
    for step in (made.step("grams", "scenes", "vit"), made.step("similarity", experiment="both")):
        (made.results / step.manifest).unlink()
    ledger = made.results / "scenes/vit/grams.ledger"
    whole = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(whole[0] + whole[1][: len(whole[1]) // 2])
    shutil.rmtree(made.results / "similarity/both/cka.zarr")
    run(raw, *STAGES)
    assert contents(made) == before
    good = [line for line in ledger.read_bytes().splitlines() if line.rpartition(b"\t")[2].isdigit()]
    assert len(good) == 3, "two of three minibatches were made again"

    for network in ("cnn", "vit"):
        shutil.rmtree(made.results / "scenes" / network)
    shutil.rmtree(made.results / "similarity")
    monkeypatch.setenv(client.ADDRESS, two_workers)
    run(raw, *STAGES)
    assert contents(made) == before


def grams_made(made, network):
    return len(lines(made.results / "scenes" / network / "grams.ledger"))


def test_one_network_changes_and_the_other_is_not_asked(tmp_path):
    raw = experiment(tmp_path)
    made = run(raw, *STAGES)
    cka = opened(made).cka.values
    raw["networks"]["vit"]["seed"] = 2
    again = run(raw, *STAGES)
    assert (grams_made(again, "cnn"), grams_made(again, "vit")) == (3, 6)
    now = opened(again).cka.values
    np.testing.assert_array_equal(now[:2, :2], cka[:2, :2])
    assert (now[2:, 2:] != cka[2:, 2:]).any()
    # Another measure, or another comparison of the same networks: no forward at all.
    raw["similarity"] |= {"neighbours": 2}
    raw["similarity"]["compare"]["alone"] = {"networks": ["vit"]}
    more = run(raw, *STAGES)
    assert (grams_made(more, "cnn"), grams_made(more, "vit")) == (3, 6)
    np.testing.assert_allclose(opened(more, "alone").cka.values, now[2:, 2:], rtol=1e-12)
    assert pipeline.open_results(more.results).similarity["alone"].attrs["neighbours"] == 2


def test_a_changed_image_costs_its_minibatches(tmp_path):
    labelled_images(tmp_path, [f"town/{i}" for i in range(16)])
    raw = segmentation(tmp_path)
    raw["similarity"] = {"compare": {"self": {"networks": ["tiny"]}}, "images": 16, "minibatch": 4, "neighbours": 2}
    made = run(raw, *STAGES)
    ledger = made.results / "photos/tiny/grams.ledger"
    assert len(lines(ledger)) == 4
    write_image(tmp_path, "town/3", np.full((16, 16, 3), 90, np.uint8))
    run(raw, *STAGES)
    assert len(lines(ledger)) == 5
    for path in (tmp_path / "images").rglob("*.png"):
        os.utime(path)
    run(raw, *STAGES)
    assert len(lines(ledger)) == 5


def test_a_constant_layer_is_said_to_be(tmp_path):
    raw = experiment(tmp_path)
    file = tmp_path / "dead.py"
    file.write_text(
        "from torch import nn\n\n\ndef dead():\n    conv = nn.Conv2d(3, 2, 3)\n    conv.weight.data.zero_()\n"
        "    return nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    raw["networks"]["cnn"] |= {"module": f"{file}:dead", "arguments": {}, "layers": ["0"]}
    made = run(raw, *STAGES)
    found = opened(made)
    assert np.isnan(found.cka.values[0]).all() and np.isfinite(found.cka.values[1:, 1:]).all()
    assert str(found.note.values[0, 1]) == "cnn/0: the same for all images of a minibatch"
    assert found.note.values[1, 2] == ""
    facts = made.manifest(made.step("similarity", experiment="both")).result
    assert facts["undefined"] == ["cnn/0"] and facts["uniformity"]["cnn"] == [None, None]
    with (made.results / "similarity/both/cka.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1]["cka"] == "" and rows[1]["note"].startswith("cnn/0: the same")


def test_the_page_of_the_report(tmp_path):
    from pipeline.report.experiment import Experiment
    from pipeline.stages.report.site import render
    from pipeline.stages.similarity import page

    raw = experiment(tmp_path, {"both": {"networks": ["cnn", "vit"]}, "alone": {"networks": ["vit"]}})
    plan_made = run(raw, *STAGES)
    compared = shown(plan_made, "similarity", tmp_path / "report")
    (found,) = page.pages(compared)
    cka = opened(plan_made).cka.values
    # What the sentences say is what the numbers say.
    uniform = {"cnn": cka[0, 1], "vit": cka[2, 3]}
    for network, value in uniform.items():
        said = next(each for each in found.findings if each.startswith(f"Two different layers of {network} have"))
        assert f"CKA of {value:.3f} ±" in said
    facts = compared.of_stage("similarity")[0].result
    (a, b, difference, error) = facts["difference"][0]
    assert (a, b) == ("cnn", "vit") and difference == pytest.approx(uniform["vit"] - uniform["cnn"], abs=1e-12)
    sure = abs(difference) > 2 * error
    assert any("is more uniform than" in each for each in found.findings) == sure
    assert any("equally uniform within the error" in each for each in found.findings) != sure
    best = cka[:2, 2:].max()
    assert any(each.startswith("Most alike of cnn and vit are ") and f"{best:.3f}" in each for each in found.findings)
    kinds = [figure.kind for figure in found.figures]
    assert kinds == ["similarity", "similarity-neighbours"] * 2
    for figure in found.figures:
        assert all((tmp_path / "report" / file).stat().st_size for file in figure.written)
    with (tmp_path / "report" / found.figures[0].files["csv"]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and float(rows[1]["cka"]) == pytest.approx(cka[0, 1])
    html = render(compared, found, [found])
    assert "cnn and vit" in html and html.count("<figure>") == 4
    assert page.pages(Experiment(plan_made.results, tmp_path / "report", "None", ())) == []


def test_minibatches():
    ids = [f"image {i}" for i in range(40)]
    how = Batching(images=30, minibatch=8, epochs=2, replacement=False, last="weigh", seed=0)
    slots = np.arange(5, 40)

    def changed(**keys):
        return how.model_copy(update=keys)

    found = minibatches(slots, ids, how, "x")
    assert [len(one.images) for one in found] == [8, 8, 8, 6] * 2
    for epoch in (0, 1):
        assert sorted(i for one in found if one.epoch == epoch for i in one.images) == list(range(5, 35))
    assert found[0].images != found[4].images and found[3].weight == 18
    assert minibatches(slots, ids, changed(seed=1), "x") != found
    # The order goes by the ids and not by the slots.
    moved = minibatches(slots[::-1][5:][::-1], ["", *ids], changed(images=29), "x")
    assert {len(one.images) for one in moved} == {8, 5}
    drawn = minibatches(slots, ids, changed(replacement=True, epochs=30), "x")
    assert all(len(set(one.images)) == 8 for one in drawn) and len(drawn) == 90
    assert len({i for one in drawn[:3] for i in one.images}) < 24
    with pytest.raises(MicrotomeError, match="x: 3 images, and at least 4 are needed"):
        minibatches(slots[:3], ids, how, "x")
    with pytest.raises(MicrotomeError, match="30 images make no minibatch of 64"):
        minibatches(slots, ids, changed(minibatch=64, last="drop"), "x")


def test_layers_of_different_images_are_refused(tmp_path):
    raw = experiment(tmp_path)
    made = run(raw, *STAGES)
    step = made.step("grams", "scenes", "vit")
    manifest = made.manifest(step)
    type(manifest)(**{**manifest.__dict__, "result": manifest.result | {"images": "0" * 20}}).write(
        made.results / step.manifest
    )
    (made.results / made.step("similarity", experiment="both").manifest).unlink()
    with pytest.raises(MicrotomeError, match="layers of vit and cnn are of different images"):
        run(raw, *STAGES)


def test_values_that_are_not_finite_are_refused(tmp_path):
    raw = experiment(tmp_path)
    raw["networks"]["cnn"] |= {
        "module": f"{tmp_path / 'network.py'}:wide", "arguments": {"huge": 3e38, "minute": 1.0},
        "layers": ["huge"],
    }  # fmt: skip
    with pytest.raises(
        MicrotomeError, match=r"network 'cnn', layer 'huge': unit 0: its output for image .* is not finite"
    ):
        run(raw, *STAGES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compare": {"x": {"networks": ["cnn", "vot"]}}}, r"similarity.compare.x: no network 'vot'.*vit"),
        ({"compare": {"x": {"networks": ["cnn", "cnn"]}}}, r"compare.x: 'cnn' is named twice"),
        ({"compare": {"x": {"networks": []}}}, r"similarity.compare.x.networks"),
        ({"compare": {"x": {"networks": ["cnn-untrained"]}}}, r"a random network has no control"),
        ({"compare": {"x": {"networks": ["cnn"], "dataset": "scene"}}}, r"no data set 'scene'.*scenes"),
        ({"compare": {"x": {"networks": ["cnn", "vit"], "dataset": "other"}}}, r"not all of its networks see data set"),
        ({"minibatch": 3}, r"similarity.minibatch"),
        ({"images": 3}, r"similarity.images"),
        ({"neighbours": 6}, r"neighbours: 6 is not below the minibatch of 6"),
        ({"features": ["whole", "whole"]}, r"features: 'whole' is named twice"),
        ({"layers": {"vti": "all"}}, r"similarity.layers: no network 'vti'.*vit"),
        ({"epoch": 2}, r"similarity.epoch: unknown key.*epochs"),
    ],
)
def test_configurations_that_are_refused(tmp_path, change, message):
    raw = experiment(tmp_path)
    raw["datasets"]["other"] = raw["datasets"]["scenes"] | {"seed": 2}
    raw["networks"]["vit"]["datasets"] = ["scenes"]
    raw["similarity"] |= change
    with pytest.raises(MicrotomeError, match=message):
        run_experiment.parse(raw)


def test_too_few_images_are_refused_before_any_work(tmp_path):
    raw = experiment(tmp_path)
    raw["similarity"] |= {"images": 100, "minibatch": 64}
    with pytest.raises(MicrotomeError, match=r"similarity\.\w+, split 'validation' of 'scenes': \d+ images make no"):
        planner.make(run_experiment.parse(raw))
    raw["similarity"]["last"] = "weigh"
    planner.make(run_experiment.parse(raw))
    raw["datasets"]["scenes"]["images"]["train"] = 3
    raw["similarity"]["split"] = "train"
    with pytest.raises(MicrotomeError, match=r"split 'train' of 'scenes': 3 images, and at least 4 are needed"):
        planner.make(run_experiment.parse(raw))
    del raw["similarity"]
    raw["sight"] = {"split": "train"}
    with pytest.raises(MicrotomeError, match=r"sight, split 'train' of 'scenes': 3 images"):
        planner.make(run_experiment.parse(raw))


def test_networks_without_a_common_data_set(tmp_path):
    raw = experiment(tmp_path)
    raw["datasets"]["other"] = raw["datasets"]["scenes"] | {"seed": 2}
    with pytest.raises(MicrotomeError, match=r"share scenes, other: name one as `dataset`"):
        run_experiment.parse(raw)
    raw["networks"]["cnn"]["datasets"], raw["networks"]["vit"]["datasets"] = ["scenes"], ["other"]
    with pytest.raises(MicrotomeError, match=r"share no data set \(cnn: scenes; vit: other\)"):
        run_experiment.parse(raw)


def test_only_keeps_the_comparisons_that_it_can(tmp_path):
    raw = experiment(tmp_path, {"both": {"networks": ["cnn", "vit"]}, "alone": {"networks": ["vit"]}})
    kept = run_experiment.parse(raw | {"only": "vit"})
    assert kept.similarity is not None and list(kept.similarity.compare) == ["alone"]
    assert run_experiment.parse(raw | {"only": "cnn"}).similarity is None
    assert run_experiment.parse(json.loads(kept.model_dump_json())) == kept


def test_unknown_layers_and_lacking_features(tmp_path):
    raw = experiment(tmp_path, layers={"cnn": ["a", "bb"]})
    with pytest.raises(MicrotomeError, match=r"layer 'bb' is not in"):
        run(raw, *STAGES)
    raw = experiment(tmp_path, features=["class_token"])
    with pytest.raises(MicrotomeError, match=r"none of its layers has class_token"):
        run(raw, *STAGES)


def test_other_steps_keep_their_ids(tmp_path):
    raw = experiment(tmp_path)
    made = planner.make(run_experiment.parse(raw))
    del raw["similarity"]
    plain = planner.make(run_experiment.parse(raw))
    assert {path for path, step in plain.steps.items() if step.stage != "report"} < set(made.steps)
    assert made.step("grams", "scenes", "vit").manifest.startswith("scenes/vit/done/grams.")
    assert made.step("similarity", experiment="both").manifest.startswith("similarity/both/done/similarity.")
