"""The stage `sight` against plain loops and the networks themselves; what is made again; and what is refused."""

import csv
import hashlib
import math
import os
import shutil

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from experiments import VIT, copied, hsic1, labelled_images, lines, run, scenes, segmentation, shown, tiny, write_image
from torch import nn

import pipeline
from kernels.locality.receptive_field import extent
from pipeline.errors import MicrotomeError
from pipeline.networks import inspection
from pipeline.networks.build import load
from pipeline.networks.forward import normalise
from pipeline.networks.layers import resolve
from pipeline.plan import inspected
from pipeline.run import experiment as run_experiment
from pipeline.run import forecast, planner, preflight
from pipeline.stages.sight.tasks import gradients
from pipeline.workers import client

pytestmark = pytest.mark.usefixtures("workers")
STAGES = ("ingest", "network", "sight")
BLOCKS = [f"encoder.layers.encoder_layer_{block}" for block in range(2)]
RESIDUAL = """
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, units_in, units, stride):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(units_in, units, 3, stride, padding=1), nn.ReLU(), nn.Conv2d(units, units, 3, padding=1)
        )
        self.shortcut = nn.Conv2d(units_in, units, 1, stride) if units_in != units else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.conv(x)
        out += self.shortcut(x)
        return self.relu(out)


def residual(classes=12):
    stem, head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(4, classes)
    return nn.Sequential(stem, Block(3, 4, 2), Block(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
"""


def experiment(folder, **how):
    """Scenes, a CNN without skips, one with skips, and a ViT, on fourteen images in minibatches of six and two."""
    (folder / "vit.py").write_text(VIT)
    (folder / "residual.py").write_text(RESIDUAL)
    raw = scenes(folder)
    raw["datasets"]["scenes"] |= {"concepts": ["truth"], "images": {"train": 6, "validation": 20}}
    common = {"weights": "random", "numerics": {"micro_batch": 4}}
    raw["networks"] = {
        "cnn": tiny(folder, arguments={"classes": 12}, seed=3),
        "residual": {"module": f"{folder / 'residual.py'}:residual", "layers": ["1", "2", "5"], "seed": 2} | common,
        "vit": {"module": f"{folder / 'vit.py'}:vit", "layers": BLOCKS, "seed": 1} | common,
    }
    raw["sight"] = {"images": 16, "minibatch": 6, "gradients": 3} | how
    return raw


@pytest.fixture(scope="module")
def made(workers, tmp_path_factory):
    return run(experiment(tmp_path_factory.mktemp("sight")), *STAGES)


def opened(made, network):
    return xr.open_zarr(made.results / "scenes" / network / "sight.zarr").load()


def minibatches(made, network):
    store = xr.open_zarr(made.results / "scenes" / network / "sight-minibatches.zarr")
    return [row[row >= 0].tolist() for row in store.image.values]


def loaded(made, network):
    """The network, and all its images as it takes them, in float64."""
    images = zarr.open_group(made.results / "scenes" / "images.zarr", mode="r", use_consolidated=False)
    spec = made.networks[network]
    model = load(spec, made.results / "networks" / network / "model.safetensors")
    return model.double(), normalise(torch.from_numpy(images["image"][:]), spec).double(), images["label"][:]


def table(made, network, name):
    with (made.results / "scenes" / network / name).open(newline="") as file:
        return list(csv.DictReader(file))


def cka(x, y, batches):
    """Ratio of sums over minibatches, weighted n (n - 3); x, y (image, feature) by slot."""
    sums = np.zeros(3)
    for batch in batches:
        weight = len(batch) * (len(batch) - 3)
        pairs = (x[batch], y[batch]), (x[batch],) * 2, (y[batch],) * 2
        sums += [weight * hsic1(*pair) for pair in pairs]
    return sums[0] / math.sqrt(sums[1] * sums[2])


def test_every_image_counts_once(made):
    batches = minibatches(made, "vit")
    assert [len(batch) for batch in batches] == [6, 6, 4]
    assert len({slot for batch in batches for slot in batch}) == 16
    assert batches == minibatches(made, "cnn")
    found = opened(made, "vit")
    assert found.attrs["images"] == 16 and found.attrs["receptive_field_images"] == 9


@pytest.mark.parametrize(("network", "layers"), [("cnn", ["a", "b"]), ("residual", ["1", "2"]), ("vit", BLOCKS)])
def test_receptive_fields_are_gradients_of_single_images(made, network, layers):
    model, images, _ = loaded(made, network)
    infos = {info.name: info for info in resolve(model.float(), layers, tuple(images.shape[1:]))}
    model.double()
    found = opened(made, network)
    for name in layers:
        info, total = infos[name], np.zeros(images.shape[2:])
        y, x = info.shape[1] // 2, info.shape[2] // 2
        for batch in minibatches(made, network):
            for slot in batch[:3]:
                given = images[slot : slot + 1].clone().requires_grad_()
                kept = []
                hook = model.get_submodule(name).register_forward_hook(
                    lambda _, __, o, kept=kept: kept.append(o.clone())
                )
                model(given)
                hook.remove()
                (output,) = kept
                at = output[0, info.special + y * info.shape[2] + x] if output.ndim == 3 else output[0, :, y, x]
                total += torch.autograd.grad(at.sum(), given)[0].abs().mean(1)[0].numpy()
        field = found.receptive_field.sel(layer=name).values
        np.testing.assert_allclose(field, total / 9, rtol=1e-4, atol=1e-6 * field.max())
        expected = extent(field)
        assert float(found.receptive_radius.sel(layer=name)) == expected.radius
    row = table(made, network, "sight-receptive-fields.csv")[0]
    assert row["layer"] == layers[0] and float(row["radius"]) == pytest.approx(
        float(found.receptive_radius[0]), rel=1e-6
    )


def test_a_layer_without_positions_has_no_receptive_field(made):
    found = opened(made, "residual").sel(layer="5")
    assert np.isnan(found.receptive_field).all() and np.isnan(found.receptive_radius)
    assert "one position only" in str(found.receptive_note.values)


@pytest.mark.parametrize(("k", "d"), [(3, 1), (3, 6), (5, 3)])
def test_uniform_convolutions_have_the_closed_form(k, d):
    """A map wide enough for its borders not to matter: the standard deviation is sqrt(d (k^2 - 1) / 12)."""
    network = nn.Sequential(*(nn.Conv2d(1, 1, k, padding=k // 2, bias=False) for _ in range(d)))
    for weight in network.parameters():
        nn.init.constant_(weight, 1 / k**2)
    layers = resolve(network, [str(at) for at in range(d)], (1, 41, 41))
    fields, changes = gradients(network, torch.randn(2, 1, 41, 41), layers)
    assert changes.all()
    for at, field in enumerate(fields):
        expected = math.sqrt((at + 1) * (k**2 - 1) / 12)
        assert extent(field).deviation == pytest.approx([expected] * 2, rel=1e-5)
        assert field.sum() == pytest.approx(2, rel=1e-5), "two images"
    assert all(weight.requires_grad for weight in network.parameters()), "as before"


def test_attention_distances_are_those_of_torchs_own_weights(made):
    model, images, _ = loaded(made, "vit")
    given = {}
    for block in range(2):
        attention = model.encoder.layers[block].self_attention
        attention.register_forward_pre_hook(lambda _, args, block=block: given.update({block: args[0]}))
    slots = [slot for batch in minibatches(made, "vit") for slot in batch]
    with torch.no_grad():
        model(images[slots])
    place = np.stack(np.divmod(np.arange(16), 4), 1) * 4.0
    distance = np.linalg.norm(place[:, None] - place[None], axis=-1)
    found = opened(made, "vit")
    for block in range(2):
        x = given[block]
        _, weights = model.encoder.layers[block].self_attention(x, x, x, need_weights=True, average_attn_weights=False)
        spatial = weights.detach().numpy()[:, :, 1:, 1:]
        far = (spatial * distance).sum(-1)
        values = {
            "attention_distance": far.mean(-1),
            "attention_distance_renormalised": (far / spatial.sum(-1)).mean(-1),
        }
        for name, each in values.items():
            np.testing.assert_allclose(found[name][block], each.mean(0), rtol=1e-4)
            error = each.std(0, ddof=1) / 4
            np.testing.assert_allclose(found[f"{name}_standard_error"][block], error, rtol=1e-3)
    np.testing.assert_allclose(found.attention_uniform_distance, distance.mean())
    assert found.attention.values.tolist() == [f"{block}.self_attention" for block in BLOCKS]
    rows = table(made, "vit", "sight-attention.csv")
    assert len(rows) == 4 and rows[1]["head"] == "1"
    assert float(rows[1]["distance"]) == pytest.approx(float(found.attention_distance[0, 1]), rel=1e-6)


def vit_without(model, images, block, branch):
    """The plain forward of torchvision's ViT with one skip left out: outputs of both blocks, branches, logits."""
    x = model._process_input(images)
    x = torch.cat([model.class_token.expand(len(x), -1, -1), x], 1) + model.encoder.pos_embedding
    outputs, ratios = [], []
    for at, layer in enumerate(model.encoder.layers):
        y = layer.ln_1(x)
        y, _ = layer.self_attention(y, y, y, need_weights=False)
        ratios.append(x.norm(dim=-1) / y.norm(dim=-1))
        x = y if (at, "attention") == (block, branch) else x + y
        y = layer.mlp(layer.ln_2(x))
        ratios.append(x.norm(dim=-1) / y.norm(dim=-1))
        x = y if (at, "mlp") == (block, branch) else x + y
        outputs.append(x.flatten(1).numpy())
    return outputs, ratios, model.heads(model.encoder.ln(x)[:, 0]).argmax(1).numpy()


def test_skips_of_a_vit_are_those_of_its_forward_written_out(made):
    model, images, label = loaded(made, "vit")
    batches = minibatches(made, "vit")
    slots = [slot for batch in batches for slot in batch]
    found = opened(made, "vit")
    names = [f"{block} [{branch}]" for block in BLOCKS for branch in ("attention", "mlp")]
    assert found.skip.values.tolist() == names
    with torch.no_grad():
        whole, ratios, predicted = vit_without(model, images, None, None)
        for at, name in enumerate(names):
            ratio = ratios[at][slots].numpy()
            np.testing.assert_allclose(found.skip_ratio_special[at], ratio[:, 0].mean(), rtol=1e-4)
            np.testing.assert_allclose(found.skip_ratio_spatial[at], ratio[:, 1:].mean(), rtol=1e-4)
            error = ratio[:, 1:].mean(1).std(ddof=1) / 4
            np.testing.assert_allclose(found.skip_ratio_spatial_standard_error[at], error, rtol=1e-3)
            np.testing.assert_allclose(found.skip_ratio[at], ratio.mean(0), rtol=1e-4)
            lacking, _, without = vit_without(model, images, at // 2, ("attention", "mlp")[at % 2])
            right, left = (each[slots] == label[slots] for each in (predicted, without))
            assert float(found.accuracy_without_skip[at]) == pytest.approx(left.mean())
            assert float(found.accuracy_loss[at]) == pytest.approx(right.mean() - left.mean())
            paired = (right.astype(float) - left).std(ddof=1) / 4
            assert float(found.accuracy_loss_standard_error[at]) == pytest.approx(paired)
            assert float(found.predictions_changed[at]) == (predicted != without)[slots].mean()
            for layer in range(2):
                expected = cka(whole[layer], lacking[layer], batches)
                assert float(found.cka_without_skip[at, layer]) == pytest.approx(expected, abs=1e-5)
            within = cka(lacking[0], lacking[1], batches)
            assert float(found.cka_within_without_skip[at, 0, 1]) == pytest.approx(within, abs=1e-5), name
    assert found.attrs["accuracy"] == (predicted == label)[slots].mean() and found.attrs["labelled"] == 16
    rows = table(made, "vit", "sight-skips.csv")
    assert [row["skip"] for row in rows] == names and rows[1]["branch"] == "mlp"
    assert float(rows[2]["last_layer_cka"]) == pytest.approx(float(found.cka_without_skip[2, 1]), rel=1e-6)


def test_skips_of_a_residual_network(made):
    model, images, _ = loaded(made, "residual")
    slots = [slot for batch in minibatches(made, "residual") for slot in batch]
    found = opened(made, "residual")
    assert found.skip.values.tolist() == ["1", "2"]
    assert found.skip_shortcut.values.tolist() == ["projection", "identity"]
    with torch.no_grad():
        x = model[0](images)
        for at, block in enumerate(model[1:3]):
            z, branch = block.shortcut(x), block.conv(x)
            ratio = (z.norm(dim=1) / branch.norm(dim=1))[slots]
            np.testing.assert_allclose(found.skip_ratio_spatial[at], ratio.mean(), rtol=1e-4)
            x = (z + branch).relu()
        lacking = model[2].conv(model[:2](images)).relu()
        expected = cka(x.flatten(1).numpy(), lacking.flatten(1).numpy(), minibatches(made, "residual"))
    changed = found.cka_without_skip.sel(skip="2")
    assert float(changed.sel(layer="2")) == pytest.approx(expected, abs=1e-5)
    assert float(changed.sel(layer="1")) == pytest.approx(1, abs=1e-12), "nothing has changed before the addition"
    assert np.isnan(found.skip_ratio_special).all(), "maps have no class token"


@pytest.mark.parametrize(("network", "special"), [("residual", 0), ("vit", 1)])
def test_localisation_is_that_of_plain_loops(made, network, special):
    model, images, _ = loaded(made, network)
    batches = minibatches(made, network)
    found = opened(made, network)
    layer = found.attrs["localised_layer"]
    assert layer == ("2" if network == "residual" else BLOCKS[1])
    kept = []
    model.get_submodule(layer).register_forward_hook(lambda _, __, output: kept.append(output.clone()))
    with torch.no_grad():
        model(images)
    outputs = kept[0].numpy() if special else kept[0].flatten(2).transpose(1, 2).numpy()
    cells = outputs.shape[1] - special
    side = math.isqrt(cells)
    patch = 16 // side
    parts = images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5)
    parts = parts.reshape(len(images), cells, -1).numpy()
    assert found.localisation.shape == (cells + special, cells)
    rng = np.random.default_rng(0)
    for output, place in [(0, 0), *zip(rng.integers(0, cells + special, 12), rng.integers(0, cells, 12), strict=True)]:
        expected = cka(outputs[:, output], parts[:, place], batches)
        assert float(found.localisation[output, place]) == pytest.approx(expected, abs=1e-5)
    values = found.localisation.values[special:]
    own = np.eye(cells, dtype=bool)
    facts = found.attrs["localisation"]
    assert facts["own"][0] == pytest.approx(values[own].mean())
    assert facts["difference"][0] == pytest.approx(values[own].mean() - values[~own].mean())
    rows = table(made, network, "sight-localisation.csv")
    assert len(rows) == cells + special and rows[0]["output"] == ("special token 0" if special else "position")
    last = rows[-1]
    assert (last["y"], last["x"]) == (str(side - 1), str(side - 1))
    assert float(last["own"]) == pytest.approx(values[-1, -1], rel=1e-6)
    best = divmod(int(values[-1].argmax()), side)
    assert (int(last["best_y"]), int(last["best_x"])) == best


def test_what_a_network_lacks_is_said(made):
    found = opened(made, "cnn")
    absent = found.attrs["absent"]
    assert absent["attention"] == "it has no self-attention"
    assert absent["skips"].startswith("no addition of a branch") and set(absent) == {"attention", "skips"}
    assert "attention_distance" not in found and "skip_ratio" not in found and "localisation" in found
    folder = made.results / "scenes/cnn"
    assert not (folder / "sight-skips.csv").exists() and (folder / "sight-localisation.csv").exists()
    facts = made.manifest(made.step("sight", "scenes", "cnn")).result
    assert facts["absent"] == absent
    assert pipeline.open_results(made.results)["scenes"].path.name == "scenes"


def contents(results):
    files = [
        *results.rglob("sight-minibatches.zarr/**/*"),
        *results.rglob("sight.zarr/**/*"),
        *results.rglob("sight-*.csv"),
    ]
    return {
        path.relative_to(results).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file()
    }


def test_the_same_bits_for_any_workers_and_after_a_cut(made, tmp_path, monkeypatch, two_workers):
    raw = copied(made, experiment(made.results.parent), tmp_path)
    del raw["networks"]["cnn"], raw["networks"]["residual"]
    made = run(raw, *STAGES)
    before = contents(made.results)
    assert sum("vit/sight-minibatches.zarr/hsic_without/c" in name for name in before) == 3
    (made.results / made.step("sight", "scenes", "vit").manifest).unlink()
    ledger = made.results / "scenes/vit/sight-minibatches.ledger"
    whole = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(whole[0] + whole[1][: len(whole[1]) // 2])
    shutil.rmtree(made.results / "scenes/vit/sight.zarr")
    run(raw, *STAGES)
    assert contents(made.results) == before
    good = [line for line in ledger.read_bytes().splitlines() if line.rpartition(b"\t")[2].isdigit()]
    assert len(good) == 3, "two of three minibatches were made again"

    shutil.rmtree(made.results / "scenes/vit")
    monkeypatch.setenv(client.ADDRESS, two_workers)
    run(raw, *STAGES)
    assert contents(made.results) == before


def test_a_changed_image_costs_its_minibatch_and_a_network_its_own(tmp_path):
    labelled_images(tmp_path, [f"town/{i}" for i in range(16)])
    raw = segmentation(tmp_path)
    raw["networks"]["tiny"]["seed"] = 1
    raw["sight"] = {"images": 16, "minibatch": 4, "gradients": 1, "measures": ["localisation", "receptive_field"]}
    made = run(raw, *STAGES)
    ledger = made.results / "photos/tiny/sight-minibatches.ledger"
    assert len(lines(ledger)) == 4
    write_image(tmp_path, "town/3", np.full((16, 16, 3), 90, np.uint8))
    run(raw, *STAGES)
    assert len(lines(ledger)) == 5
    for path in (tmp_path / "images").rglob("*.png"):
        os.utime(path)
    run(raw, *STAGES)
    assert len(lines(ledger)) == 5
    raw["networks"]["tiny"]["seed"] = 2
    run(raw, *STAGES)
    assert len(lines(ledger)) == 9
    # Fewer measures: nothing of the others is left.
    raw["sight"]["measures"] = ["receptive_field"]
    run(raw, *STAGES)
    folder = made.results / "photos/tiny"
    assert sorted(path.name for path in folder.glob("sight-*.csv")) == ["sight-receptive-fields.csv"]
    assert "localisation" not in xr.open_zarr(folder / "sight.zarr")


def test_images_without_labels_and_networks_without_a_head(tmp_path):
    labelled_images(tmp_path, [f"town/{i}" for i in range(8)])
    raw = segmentation(tmp_path)
    (tmp_path / "residual.py").write_text(RESIDUAL)
    raw["networks"] = {
        "whole": {"module": f"{tmp_path / 'residual.py'}:residual", "weights": "random", "layers": ["1", "2"]},
    }
    raw["sight"] = {"images": 8, "minibatch": 8, "measures": ["skips"]}
    made = run(raw, *STAGES)
    found = xr.open_zarr(made.results / "photos/whole/sight.zarr").load()
    labels = zarr.open_group(made.results / "photos/images.zarr", mode="r", use_consolidated=False)["label"][:]
    assert (labels < 0).all()
    assert found.attrs["absent"]["accuracy"] == "none of the images has a label"
    assert np.isnan(found.accuracy_loss).all() and found.attrs["accuracy"] is None
    assert np.isfinite(found.predictions_changed).all()
    assert np.isnan(found.cka_without_skip_standard_error).all(), "a single minibatch"


def test_a_dead_layer_and_a_constant_patch_are_undefined(tmp_path):
    file = tmp_path / "dead.py"
    file.write_text(
        "from torch import nn\n\n\ndef dead():\n    conv = nn.Conv2d(3, 2, 3, 4)\n    conv.weight.data.zero_()\n"
        "    return nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    raw = experiment(tmp_path)
    raw["networks"] = {"dead": {"module": f"{file}:dead", "weights": "random", "layers": ["0"]}}
    made = run(raw, *STAGES)
    found = opened(made, "dead")
    assert np.isnan(found.receptive_radius).all() and "no pixel changes" in str(found.receptive_note.values[0])
    assert np.isnan(found.localisation).all() and (found.localisation_best == -1).all()
    assert found.attrs["localisation"]["own"] == [None, None]
    assert table(made, "dead", "sight-localisation.csv")[0]["note"] == "the same for all images of a minibatch"


FROZEN = """
import torch
from torch import nn


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, 2), nn.Linear(4, 12)

    def forward(self, x):
        x = self.conv1(x)
        with torch.CUT():
            x = self.conv2(x)
        return self.fc(x.mean((2, 3)))
"""


@pytest.mark.parametrize(("cut", "layers"), [("no_grad", ["conv1", "conv2"]), ("inference_mode", ["conv2"])])
def test_a_gradient_that_ends_is_named_with_its_module(tmp_path, cut, layers):
    from pipeline.stages.sight import page

    (tmp_path / "frozen.py").write_text(FROZEN.replace("CUT", cut))
    raw = experiment(tmp_path, measures=["receptive_field"])
    raw["networks"] = {"frozen": {"module": f"{tmp_path / 'frozen.py'}:Frozen", "weights": "random", "layers": layers}}
    made = run(raw, *STAGES)
    rows = {row["layer"]: row for row in table(made, "frozen", "sight-receptive-fields.csv")}
    why = f"no gradient reaches the input: it ends at `torch.{cut}` in the network's own forward"
    assert rows["conv2"]["note"] == why and rows["conv2"]["radius"] == ""
    absent = opened(made, "frozen").attrs["absent"]
    (found,) = page.pages(shown(made, "sight", tmp_path))
    if layers == ["conv2"]:
        assert absent == {"receptive_field": f"conv2: {why}"}
        assert found.values["sections"][0].absent == [f"No receptive fields: conv2: {why}."]
    else:
        assert rows["conv1"]["note"] == "" and float(rows["conv1"]["radius"]) > 0 and absent == {}
        assert f"frozen: conv2: {why}." in found.findings


def test_values_that_are_not_finite_are_refused(tmp_path):
    raw = experiment(tmp_path, measures=["localisation"])
    file = tmp_path / "huge.py"
    file.write_text(
        "import torch\nfrom torch import nn\n\n\nclass Huge(nn.Module):\n    def forward(self, x):\n"
        "        return x / 0\n\n\ndef huge():\n    return nn.Sequential(Huge(), nn.Conv2d(3, 2, 1))\n"
    )
    raw["networks"] = {"huge": {"module": f"{file}:huge", "weights": "random", "layers": ["0"]}}
    with pytest.raises(MicrotomeError, match=r"network 'huge', layer '0': unit 0: its output for image '.*' of"):
        run(raw, *STAGES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"networks": ["cnn", "vot"]}, r"sight: no network 'vot'.*vit"),
        ({"networks": ["cnn-untrained"]}, r"sight: no network 'cnn-untrained'"),
        ({"datasets": ["scene"]}, r"sight: no data set 'scene'.*scenes"),
        ({"layers": {"vti": "all"}}, r"sight: no network 'vti'.*vit"),
        ({"measures": ["attentions"]}, r"sight.measures.0"),
        ({"measures": []}, r"sight.measures"),
        ({"minibatch": 3}, r"sight.minibatch"),
        ({"gradient": 3}, r"sight.gradient: unknown key.*gradients"),
    ],
)
def test_configurations_that_are_refused(tmp_path, change, message):
    raw = experiment(tmp_path)
    raw["sight"] |= change
    with pytest.raises(MicrotomeError, match=message):
        run_experiment.parse(raw)


def test_unknown_layers_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(inspected, "in_own_process", lambda _, requests, what: inspection.answer(requests))
    raw = experiment(tmp_path, layers={"cnn": ["a", "bb"]}, networks=["cnn"])
    with pytest.raises(MicrotomeError, match=r"cnn.*layer 'bb' is not in"):
        preflight.check(planner.make(run_experiment.parse(raw)))
    raw["sight"]["layers"] = {"cnn": "all"}
    made = planner.make(run_experiment.parse(raw))
    preflight.check(made)
    costs = {each.job.name: each.cost for each in forecast.forecast(made)}
    assert (costs["sight scenes cnn"].images, costs["sight scenes cnn"].tasks) == (16, 3)


def test_unknown_layers_and_too_few_images(tmp_path):
    raw = experiment(tmp_path, layers={"cnn": ["a", "bb"]}, networks=["cnn"])
    with pytest.raises(MicrotomeError, match=r"layer 'bb' is not in"):
        run(raw, *STAGES)
    raw = experiment(tmp_path, networks=["cnn"])
    raw["datasets"]["scenes"]["images"]["validation"] = 3
    with pytest.raises(MicrotomeError, match=r"3 images"):
        run(raw, *STAGES)
    raw = experiment(tmp_path, networks=["cnn"], split="test")
    with pytest.raises(MicrotomeError, match=r"'test'"):
        planner.make(run_experiment.parse(raw))


def test_networks_that_are_looked_into(tmp_path):
    raw = experiment(tmp_path)
    raw["networks"]["cnn"] |= {"weights": "train", "train": {"dataset": "scenes"}}

    def looked(**how):
        made = planner.make(run_experiment.parse(raw | {"sight": how}))
        return [step.network for step in made.of_stage("sight")]

    assert looked() == ["cnn", "residual", "vit"]
    assert looked(networks=["cnn", "cnn-untrained"]) == ["cnn", "cnn-untrained"]
    assert looked(networks=["vit"], datasets=[]) == []
    kept = run_experiment.parse(raw | {"sight": {"networks": ["cnn", "vit"], "layers": {"cnn": "all"}}, "only": "vit"})
    assert kept.sight is not None and kept.sight.networks == ["vit"] and kept.sight.layers == {}
    assert run_experiment.parse(kept.model_dump()) == kept


def test_other_steps_keep_their_ids(tmp_path):
    raw = experiment(tmp_path)
    made = planner.make(run_experiment.parse(raw))
    step = made.step("sight", "scenes", "vit")
    assert step.manifest.startswith("scenes/vit/done/sight.")
    for key, value in {
        "images": 12,
        "gradients": 2,
        "seed": 1,
        "layers": {"vit": "all"},
        "measures": ["skips"],
    }.items():
        other = planner.make(run_experiment.parse(raw | {"sight": raw["sight"] | {key: value}}))
        assert other.step("sight", "scenes", "vit").id != step.id, key
    del raw["sight"]
    plain = planner.make(run_experiment.parse(raw))
    assert {path for path, step in plain.steps.items() if step.stage != "report"} < set(made.steps)


def test_the_page_of_the_report(made, tmp_path, monkeypatch):
    import drawn_text

    from pipeline.report.experiment import Experiment
    from pipeline.stages.report.site import render
    from pipeline.stages.sight import page

    of_sight = shown(made, "sight", tmp_path)
    cut_off = drawn_text.collect(monkeypatch)
    (found,) = page.pages(of_sight)
    assert cut_off == []
    said = "\n".join(found.findings)
    vit = opened(made, "vit")
    radius, error = (float(vit[f"receptive_radius{end}"][1]) for end in ("", "_standard_error"))
    assert "vit: the effective receptive field" in said and f"{radius:.1f} ± {error:.1f} px in {BLOCKS[1]}" in said
    distance = vit.attention_distance.values
    assert f"over {distance[0].min():.1f} to {distance[0].max():.1f} px on average" in said
    most = int(vit.accuracy_loss.values.argmax())
    assert (
        f"loses most without the skip of {vit.skip.values[most]}: {100 * float(vit.accuracy_loss[most]):.1f} ±" in said
    )
    for network in ("cnn", "residual", "vit"):
        own, _ = opened(made, network).attrs["localisation"]["own"]
        difference, error = opened(made, network).attrs["localisation"]["difference"]
        (sentence,) = (each for each in found.findings if each.startswith(f"{network}: a position of"))
        assert f"CKA of {own:.3f} ±" in sentence
        assert ("it knows where" in sentence) == (difference > 2 * error)
    kinds = [figure.kind for figure in found.figures]
    every = ["receptive-fields", "attention-distances", "skip-ratios", "skips-removed", "localisation"]
    assert kinds == [*every[::4], every[0], *every[2:], *every]
    for figure in found.figures:
        assert all((tmp_path / file).stat().st_size for file in figure.written)
    with (tmp_path / found.figures[-1].files["csv"]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["cka"]) == pytest.approx(float(vit.localisation[0, 0]))
    html = render(of_sight, found, [found])
    assert "No attention distances: it has no self-attention." in html and html.count("<figure>") == 11
    assert page.pages(Experiment(made.results, tmp_path, "None", ())) == []
