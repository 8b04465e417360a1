"""Extraction: activations as they are, at a scale that holds them, once for each shard and layer."""

import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from experiments import SIZE, job, labelled_images, lines, run, scenes, segmentation, tiny, write_image
from PIL import Image

from pipeline.data.images import Images
from pipeline.errors import MicrotomeError
from pipeline.networks import forward
from pipeline.networks.build import load
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import Recorder
from pipeline.run import experiment
from pipeline.run.planner import make
from pipeline.stages.extract import layers as extract_layers
from pipeline.stages.extract import stage as extract
from pipeline.stages.extract import tasks as extract_tasks
from pipeline.storage.store import write_whole
from pipeline.upkeep import damage

pytestmark = pytest.mark.usefixtures("workers")
NAMES = [f"street/{k:02}" for k in range(10)]
STAGES = ("ingest", "network", "extract")


def described(plan, network="tiny"):
    """The layers of a network by name, as its manifest has them."""
    step = next(step for step in plan.of_stage("extract") if step.network == network)
    return {entry["name"]: entry for entry in plan.manifest(step).result["layers"]}


def store(plan, layer, network="tiny"):
    (dataset,) = plan.config.datasets
    folder = plan.results / dataset / "layers" / described(plan, network)[layer]["id"]
    return zarr.open_group(folder / "activations.zarr", mode="r", use_consolidated=False)


def forwards(plan, layer, network="tiny") -> list[str]:
    """The shards whose activations of a layer were written so far."""
    (dataset,) = plan.config.datasets
    folder = plan.results / dataset / "layers" / described(plan, network)[layer]["id"]
    return [entry["shard"] for entry in lines(folder / "activations.ledger")]


def expected(plan, layer, network="tiny"):
    """What torch gives for all images in one batch, float32 (image, unit, y, x)."""
    (dataset,) = plan.config.datasets
    spec = plan.networks[network]
    pixels = zarr.open_group(plan.results / dataset / "images.zarr", mode="r", use_consolidated=False)["image"][:]
    model = load(spec, plan.results / "networks" / network / "model.safetensors")
    with Recorder(model, [layer]) as record:
        logits, outputs = record(forward.normalise(torch.from_numpy(pixels), spec))
    return outputs[layer].numpy(), logits.numpy()


def test_activations_are_those_of_torch(tmp_path):
    labelled_images(tmp_path, NAMES)
    plan = run(segmentation(tmp_path), *STAGES)
    for layer, shape in [("a", (4, 8, 8)), ("b", (5, 4, 4))]:
        wanted, logits = expected(plan, layer)
        group = store(plan, layer)
        assert group["activation"].shape == (10, *shape) and group["activation"].dtype == np.float16
        assert group.attrs["scale"] == described(plan)[layer]["scale"] == 1.0
        np.testing.assert_allclose(group["activation"][:].astype(float), wanted, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(group["maximum"][:], wanted.max((2, 3)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(group["mean"][:], wanted.mean((2, 3)), rtol=1e-5, atol=1e-6)
        assert group["maximum"].dtype == group["mean"].dtype == np.float32
    written = zarr.open_group(plan.results / "photos/tiny/logits.zarr", mode="r", use_consolidated=False)["logits"]
    np.testing.assert_allclose(written[:], logits, rtol=1e-5, atol=1e-6)


def plan_of(raw):
    return make(experiment.parse(raw))


def tasks_of(plan):
    """The tasks of an extraction, as `run` makes them, into stores of their own."""
    wanted = job(plan, "extract", "photos", "tiny")
    images, model, settings = wanted.images, wanted.model, wanted.settings
    prepared = extract_tasks.prepare_extraction(model, images.size, settings.layers, extract.VERSION)

    def into(folder):
        layers = []
        for info in prepared.layers:
            id = prepared.ids[info.name]
            layers.append(
                extract_layers.LayerStore(id, folder / id / "activations.zarr", info, prepared.scales[info.name])
            )
        layers = [extract_layers.open_layer(layer, images) for layer in layers]
        extract_layers.open_logits(folder / "logits.zarr", images, prepared.classes)
        return [
            (model, images.store, images.files_of(k), k, images.range(k), layers, folder / "logits.zarr")
            for k in range(3)
        ]

    return into


def test_the_same_bits_in_any_order_and_on_any_number_of_workers(tmp_path):
    labelled_images(tmp_path, NAMES)
    plan = run(segmentation(tmp_path), *STAGES)
    by_the_pool = {
        (entry["id"], line["shard"]): line["files"]
        for entry in described(plan).values()
        for line in lines(plan.results / "photos/layers" / entry["id"] / "activations.ledger")
    }
    into = tasks_of(plan)
    for number, order in enumerate(itertools.permutations(range(3))):
        tasks = into(tmp_path / str(number))
        for k in order:
            if k == 1:
                forward.network_of.cache_clear()  # another worker takes over
            done = extract_tasks.extract_shard(*tasks[k])
            for layer in tasks[k][5]:
                written = {name: list(value) for name, value in done.files[layer.id].items()}
                assert written == by_the_pool[layer.id, str(k)]


def test_threads_of_one_worker_give_the_same_bits(tmp_path):
    """As a worker with a GPU has them: they share the network, and the hooks on it."""
    labelled_images(tmp_path, NAMES)
    plan = run(segmentation(tmp_path), *STAGES)
    forward.network_of.cache_clear()
    into = tasks_of(plan)
    expected = [extract_tasks.extract_shard(*task).files for task in into(tmp_path / "one")]
    forward.network_of.cache_clear()
    with ThreadPoolExecutor(3) as threads:
        for number in range(4):
            tasks = into(tmp_path / f"three-{number}")
            found = threads.map(lambda task: extract_tasks.extract_shard(*task).files, tasks)
            assert list(found) == expected
    assert forward.network_of.cache_info().misses == 1, "loaded once"


def test_one_more_layer_is_extracted_alone(tmp_path):
    labelled_images(tmp_path, NAMES)
    raw = segmentation(tmp_path)
    raw["networks"]["tiny"]["layers"] = ["b"]
    run(raw, *STAGES)
    raw["networks"]["tiny"]["layers"] = ["a", "b"]
    plan = run(raw, *STAGES)
    assert list(described(plan)) == ["a", "b"]
    assert sorted(forwards(plan, "a")) == sorted(forwards(plan, "b")) == ["0", "1", "2"]
    assert len(lines(plan.results / "photos/tiny/logits.ledger")) == 3


def test_a_network_with_another_head_shares_its_layers(tmp_path):
    labelled_images(tmp_path, NAMES)
    raw = segmentation(tmp_path)
    first = run(raw, *STAGES)
    state = load(first.networks["tiny"]).state_dict()
    state["head.weight"] = state["head.weight"] + 1
    torch.save(state, tmp_path / "new-head.pt")
    state["b.0.bias"] = state["b.0.bias"] + 1
    torch.save(state, tmp_path / "new-b.pt")
    for name in ("new-head", "new-b"):
        raw["networks"][name] = tiny(tmp_path, weights=str(tmp_path / f"{name}.pt"))
    plan = run(raw, *STAGES)
    names = ("tiny", "new-head", "new-b")
    assert len({described(plan, name)["a"]["id"] for name in names}) == 1
    assert described(plan, "tiny")["b"] == described(plan, "new-head")["b"]
    assert described(plan, "new-b")["b"]["id"] != described(plan, "tiny")["b"]["id"]
    assert len(forwards(plan, "a")) == 3
    logits = [
        zarr.open_group(plan.results / f"photos/{name}/logits.zarr", mode="r", use_consolidated=False)["logits"][:]
        for name in names
    ]
    assert (logits[0] != logits[1]).any()


def test_appended_images_need_a_forward_of_the_touched_shards_alone(tmp_path):
    labelled_images(tmp_path, NAMES)
    run(segmentation(tmp_path), *STAGES)
    labelled_images(tmp_path, ["street/x", "street/y", "street/z"])
    plan = run(segmentation(tmp_path), *STAGES)
    assert sorted(forwards(plan, "a")[3:]) == ["2", "3"]
    np.testing.assert_allclose(store(plan, "a")["activation"][:], expected(plan, "a")[0], rtol=1e-3, atol=1e-6)
    assert len(list((plan.results / "photos/layers").glob("*/done/activations.*"))) == 2  # of two layers, one each


def test_a_touched_image_needs_no_forward(tmp_path):
    labelled_images(tmp_path, NAMES)
    run(segmentation(tmp_path), *STAGES)
    (tmp_path / f"images/{NAMES[3]}.png").touch()
    plan = run(segmentation(tmp_path), *STAGES)
    assert len(forwards(plan, "a")) == len(forwards(plan, "b")) == 3


def test_a_lost_chunk_is_made_again_alone(tmp_path):
    labelled_images(tmp_path, NAMES)
    plan = run(segmentation(tmp_path), *STAGES)
    layer = plan.results / "photos/layers" / described(plan)["b"]["id"]
    before = store(plan, "b")["activation"][:]
    (layer / "activations.zarr/activation/c/1/0/0/0").unlink()
    (plan.results / next(plan.of_stage("extract")).manifest).unlink()
    plan = run(segmentation(tmp_path), *STAGES)
    assert forwards(plan, "b")[3:] == ["1"] and len(forwards(plan, "a")) == 3
    np.testing.assert_array_equal(store(plan, "b")["activation"][:], before)


def test_a_control_of_fewer_images(tmp_path):
    labelled_images(tmp_path, NAMES)
    raw = segmentation(tmp_path) | {"controls": {"images": 5}}
    checkpoint = tmp_path / "weights.pt"
    torch.manual_seed(9)
    first = run(segmentation(tmp_path), "ingest")
    torch.save({k: v + 0.01 for k, v in load(first.networks["tiny"]).state_dict().items()}, checkpoint)
    raw["networks"]["tiny"]["weights"] = str(checkpoint)
    plan = run(raw, *STAGES)
    assert sorted(forwards(plan, "a", "tiny")) == ["0", "1", "2"]
    assert sorted(forwards(plan, "a", "tiny-untrained")) == ["0", "1"]
    absent = store(plan, "a", "tiny-untrained")["activation"][8:]
    assert np.isnan(absent).all()


def test_what_is_kept_equals_what_one_forward_of_the_shard_gives(tmp_path):
    """Taken micro-batch by micro-batch, in the memory format of the network, and yet the same bits."""
    raw = scenes(tmp_path)
    raw["datasets"]["scenes"]["images"] = {"train": 0, "validation": 7}  # 4 + 3: the second batch is padded
    plan = run(raw, *STAGES)
    spec = plan.networks["tiny"]
    pixels = zarr.open_group(plan.results / "scenes/images.zarr", mode="r", use_consolidated=False)["image"][:]
    model = load(spec, plan.results / "networks/tiny/model.safetensors").to(memory_format=torch.channels_last)
    batches = [pixels[:4], np.concatenate([pixels[4:], np.zeros_like(pixels[:1])])]
    for layer in ("a", "b"):
        outputs = []
        for batch in batches:
            with Recorder(model, [layer]) as record:
                outputs.append(record(forward.normalise(torch.from_numpy(batch), spec))[1][layer])
        whole, group = torch.cat(outputs)[:7], store(plan, layer)
        np.testing.assert_array_equal(group["activation"][:], whole.half().numpy())
        np.testing.assert_array_equal(group["maximum"][:], whole.amax((2, 3)).numpy())
        np.testing.assert_array_equal(group["mean"][:], whole.mean((2, 3)).numpy())


# Pooled ---------------------------------------------------------------------------------------------------------------


def test_a_layer_without_its_maps_and_back(tmp_path):
    labelled_images(tmp_path, NAMES)
    raw = segmentation(tmp_path)
    raw["networks"]["tiny"]["store"] = {"a": "pooled"}
    every = (*STAGES, "concepts", "dissect")
    plan = run(raw, *every)
    maximum = store(plan, "a")["maximum"][:]
    assert np.isfinite(maximum).all() and np.isnan(store(plan, "a")["activation"][:]).all()
    assert np.isfinite(store(plan, "b")["activation"][:]).all()
    pooled = described(plan)["a"]
    assert pooled["store"] == "pooled" and "store" not in described(plan)["b"]
    recorded = json.loads((plan.results / pooled["manifest"]).read_text())["manifest"]["files"]
    assert "activations.zarr/maximum/c/0/0" in recorded and not any("activation/c" in name for name in recorded)
    assert list(json.loads((plan.results / "photos/tiny/layers.json").read_text())) == ["b"]

    raw["networks"]["tiny"]["store"] = "full"
    plan = run(raw, *every)
    assert described(plan)["a"]["id"] == pooled["id"]  # the same folder
    assert sorted(forwards(plan, "a")[3:]) == ["0", "1", "2"] and len(forwards(plan, "b")) == 3
    np.testing.assert_array_equal(store(plan, "a")["activation"][:].max((2, 3)), maximum.astype(np.float16))
    np.testing.assert_array_equal(store(plan, "a")["maximum"][:], maximum)
    assert list(json.loads((plan.results / "photos/tiny/layers.json").read_text())) == ["a", "b"]

    raw["networks"]["tiny"]["store"] = {"a": "pooled"}
    plan = run(raw, *every)
    assert len(forwards(plan, "a")) == 6  # the full one serves
    assert described(plan)["a"] == pooled
    assert damage.verify(plan.results) == []


def test_maps_of_other_images_do_not_stay_where_a_pooled_layer_is_made_again(tmp_path):
    labelled_images(tmp_path, NAMES)
    raw = segmentation(tmp_path)
    run(raw, *STAGES)
    labelled_images(tmp_path, NAMES[:1], seed=1)
    raw["networks"]["tiny"]["store"] = {"a": "pooled"}
    plan = run(raw, *STAGES)
    (remade,) = forwards(plan, "a")[3:]
    maps = store(plan, "a")["activation"]
    own = slice(4 * int(remade), 4 * int(remade) + 4)
    assert np.isnan(maps[own]).all() and np.isfinite(np.delete(maps[:], np.r_[own], axis=0)).all()
    raw["networks"]["tiny"]["store"] = "full"
    plan = run(raw, *STAGES)
    assert forwards(plan, "a")[4:] == [remade]
    np.testing.assert_allclose(store(plan, "a")["activation"][:], expected(plan, "a")[0], rtol=1e-3, atol=1e-6)


def test_an_id_knows_of_the_key_only_where_it_is_set(tmp_path):
    labelled_images(tmp_path, NAMES)
    raw = segmentation(tmp_path)
    plain = plan_of(raw).step("extract", "photos", "tiny")
    raw["networks"]["tiny"]["store"] = "full"
    assert plan_of(raw).step("extract", "photos", "tiny") == plain and "store" not in plain.settings
    raw["networks"]["tiny"]["store"] = {"a": "pooled"}
    assert plan_of(raw).step("extract", "photos", "tiny").id != plain.id


# Numbers beyond float16 -----------------------------------------------------------------------------------------------


def wide(folder, function, **arguments):
    raw = segmentation(folder)
    tiny_file = tiny(folder)["module"].rpartition(":")[0]
    raw["networks"] = {
        "tiny": {
            "module": f"{tiny_file}:{function}",
            "arguments": arguments,
            "weights": "random",
            "layers": ["huge", "back"] if function == "wide" else ["bright"],
            "preprocessing": {"mean": [0, 0, 0], "std": [1, 1, 1]},
        }
    }
    return raw


@pytest.mark.parametrize(("huge", "minute"), [(1e6, 1e-8), (1.0, 1e-3), (-3e7, 2e-12)])
def test_a_power_of_two_brings_values_into_reach(tmp_path, huge, minute):
    labelled_images(tmp_path, NAMES)
    plan = run(wide(tmp_path, "wide", huge=huge, minute=minute), *STAGES)
    pixels = zarr.open_group(plan.results / "photos/images.zarr", mode="r", use_consolidated=False)["image"][:] / 255
    for layer, factor in [("huge", huge), ("back", minute)]:
        scale = store(plan, layer).attrs["scale"]
        assert np.frexp(scale)[0] == 0.5  # a power of two
        half = store(plan, layer)["activation"][:]
        assert np.isfinite(half).all()
        np.testing.assert_allclose(half.astype(float) * scale, pixels * factor, rtol=1e-3, atol=abs(factor) * 1e-6)
        np.testing.assert_allclose(store(plan, layer)["maximum"][:], (pixels * factor).max((2, 3)), rtol=1e-5)
    ordinary = abs(huge) < 10
    assert (store(plan, "huge").attrs["scale"] == 1) == ordinary


def test_a_value_beyond_the_headroom_is_extracted_at_a_larger_scale(tmp_path):
    labelled_images(tmp_path, NAMES)
    raw = wide(tmp_path, "bright", value=3e8)
    first = run(raw, *STAGES)
    assert store(first, "bright").attrs["scale"] == 1.0
    assert len(forwards(first, "bright")) == 3
    plan = run(raw, "ingest")
    ids = zarr.open_group(plan.results / "photos/images.zarr", mode="r", use_consolidated=False)["image_id"][:]
    name = str(ids[9]).removesuffix(".png")
    write_image(tmp_path, name, np.full((SIZE, SIZE, 3), 255, np.uint8))
    plan = run(raw, *STAGES)
    scale = store(plan, "bright").attrs["scale"]
    assert scale == described(plan)["bright"]["scale"] == 2.0**14  # 3e8 < 2^29, to lie below 2^15
    half = store(plan, "bright")["activation"][:].astype(float) * scale
    np.testing.assert_allclose(half[9], 3e8, rtol=1e-3)
    assert sorted(forwards(plan, "bright")[3:]) == ["0", "1", "2"]
    assert (half[:9] < 1.01).all()

    again = run(raw | {"name": "other"}, *STAGES)
    assert len(forwards(again, "bright")) == 6  # the scale stays


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_value_that_is_not_finite_is_named(tmp_path, value):
    labelled_images(tmp_path, NAMES)
    write_image(tmp_path, "street/07", np.full((SIZE, SIZE, 3), 255, np.uint8))
    with pytest.raises(
        MicrotomeError, match=r"network 'tiny', layer 'bright': unit 0: its output for image 'street/07\.png' of"
    ):
        run(wide(tmp_path, "bright", value=value), *STAGES)
    assert not list((tmp_path / "results").glob("photos/tiny/done/extract.*"))


def test_scales():
    assert forward.scale_for(1.0, headroom=True) == forward.scale_for(0.0, headroom=True) == 1.0
    assert forward.scale_for(512.0, headroom=True) == forward.scale_for(2.0**-6, headroom=True) == 1.0
    assert forward.scale_for(513.0, headroom=True) == 2.0**5
    for largest in (1e6, 65505.0, 3.4e38, 2.0**16):
        assert 2**14 <= largest / forward.scale_for(largest) < 2**15
    for largest in (1e-30, 1e-8, 1e6, 1e30):
        assert 2**4 <= largest / forward.scale_for(largest, headroom=True) < 2**5


# What the manifests say -----------------------------------------------------------------------------------------------


def test_the_manifests_of_layers_and_network(tmp_path):
    plan = run(scenes(tmp_path), *STAGES)
    step = next(plan.of_stage("extract"))
    manifest = plan.manifest(step)
    assert manifest.result["shards"] == [0, 1, 2, 3]
    for entry in described(plan).values():
        assert manifest.includes[entry["manifest"]] == entry["digest"]
        folder = plan.results / "scenes/layers" / entry["id"]
        own = json.loads((plan.results / entry["manifest"]).read_text())["manifest"]["files"]
        on_disk = {
            path.relative_to(folder).as_posix() for path in folder.glob("activations.zarr/**/*") if path.is_file()
        }
        assert set(own) == on_disk
        for name, (size, _) in own.items():
            assert (folder / name).stat().st_size == size


def test_a_split_without_images(tmp_path):
    raw = scenes(tmp_path)
    raw["datasets"]["scenes"]["images"] = {"train": 4, "validation": 0}
    with pytest.raises(MicrotomeError, match=r"'scenes' has no split 'validation'; it has train \(4 images\)"):
        run(raw, *STAGES)


def test_weights_that_are_not_what_was_written_are_refused(tmp_path):
    labelled_images(tmp_path, NAMES)
    plan = run(segmentation(tmp_path), "ingest", "network")
    file = plan.results / "networks" / "tiny" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # the last bit of a weight: still a finite number
    file.write_bytes(data)
    wanted = job(plan, "extract", "photos", "tiny")
    with pytest.raises(MicrotomeError, match=r"model\.safetensors is not what was written"):
        wanted.stage.run(wanted)


def test_a_bound_counts_images_and_not_shards():
    images = Images(None, {}, 24, (4, 4), 8, [], {"validation": {"0": 1, "1": 8, "2": 8}}, [])
    assert images.shards("validation") == [0, 1, 2]
    assert images.shards("validation", 1) == [0]
    assert images.shards("validation", 2) == [0, 1]
    assert images.shards("validation", 9) == [0, 1]
    assert images.shards("validation", 99) == [0, 1, 2]


def test_a_network_of_grey_images(tmp_path):
    """It gets the luma of the pixels, and a coloured network of the same file gets the pixels."""
    file = tmp_path / "grey.py"
    file.write_text(
        "from torch import nn\n"
        "def one(): return nn.Sequential(nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    grey = {"module": f"{file}:one", "weights": "random", "layers": ["0"], "datasets": ["scenes"]}
    raw = scenes(tmp_path, networks={"grey": grey | {"preprocessing": {"mean": [0.25], "std": [0.5]}}})
    made = run(raw, *STAGES)
    scale, activation = stored(made, "grey", "0")
    pixels = zarr.open(made.results / "scenes/images.zarr")["image"][:]
    luma = np.stack([np.asarray(Image.fromarray(each.transpose(1, 2, 0)).convert("L")) for each in pixels])
    network = load(made.networks["grey"], made.results / "networks/grey/model.safetensors")
    with torch.no_grad():
        expected = network[0](((torch.from_numpy(luma)[:, None] / 255) - 0.25) / 0.5).numpy()
    extracted = np.isfinite(activation).all((1, 2, 3))
    assert extracted.sum() > 8
    np.testing.assert_allclose(activation[extracted] * scale, expected[extracted], atol=2e-3)


def test_a_network_without_a_head_has_no_logits(tmp_path):
    """Logits that a network of this name had before are gone."""
    networks = {"tiny": tiny(tmp_path)}
    made = run(scenes(tmp_path, networks=networks), *STAGES)
    assert (made.results / "scenes/tiny/logits.zarr").exists()
    file = tmp_path / "headless.py"
    file.write_text("from torch import nn\ndef maps(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n")
    headless = {"module": f"{file}:maps", "weights": "random", "layers": ["1"]}
    made = run(scenes(tmp_path, networks={"tiny": headless}), *STAGES)
    assert not (made.results / "scenes/tiny/logits.zarr").exists()
    step = made.step("extract", "scenes", "tiny")
    assert made.manifest(step).files == {}
    assert stored(made, "tiny", "1")[1].shape[1] == 4
    # And back: the head is computed again although nothing else is.
    made = run(scenes(tmp_path, networks=networks), *STAGES)
    logits = zarr.open(made.results / "scenes/tiny/logits.zarr")["logits"][:]
    assert np.isfinite(logits).all(1).sum() >= 20


def stored(made, network, layer):
    """Scale and activations of a layer."""
    (entry,) = [
        e for e in made.manifest(made.step("extract", "scenes", network)).result["layers"] if e["name"] == layer
    ]
    store = zarr.open(made.results / "scenes/layers" / entry["id"] / "activations.zarr")
    return store.attrs["scale"], store["activation"][:].astype(np.float32)


def test_an_edited_module_with_the_same_weights_gives_its_own_logits(tmp_path):
    """The head computes something else; the layers before it are what they were."""
    raw = scenes(tmp_path)
    made = run(raw, "ingest", "network", "extract")
    store = made.results / "scenes/tiny/logits.zarr"
    weights = weights_of(made)
    before = zarr.open_group(store, mode="r")["logits"][:]
    layers = [len(lines(path)) for path in sorted(made.results.glob("scenes/layers/*/*.ledger"))]
    module = tmp_path / "network.py"
    pooled = "pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),\n        head"
    assert pooled in module.read_text()
    module.write_text(module.read_text().replace(pooled, pooled.replace("Avg", "Max")))
    again = run(raw, "ingest", "network", "extract")
    assert weights_of(again) == weights
    after = zarr.open_group(store, mode="r")["logits"][:]
    validation = np.isfinite(before).all(1)
    assert validation.any() and (before[validation] != after[validation]).any(1).all()
    assert [len(lines(path)) for path in sorted(made.results.glob("scenes/layers/*/*.ledger"))] == layers


def weights_of(made) -> str:
    return made.manifest(made.step("network", network="tiny")).result["weights_sha256"]


def test_the_first_unit_that_is_not_finite_is_named():
    for value in (math.nan, math.inf, -math.inf):
        maps = torch.ones(3, 5, 2, 2)
        maps[1, 4, 0, 1] = maps[1, 3, 1, 1] = maps[2, 0, 0, 0] = value
        layer = extract_layers.LayerStore(
            "id", Path(), LayerInfo("conv", (5, 2, 2), "map", 0, "float32", "Conv2d"), 1.0
        )
        kept = extract_tasks.Kept.empty(layer, 3)
        kept.take(0, maps)
        with pytest.raises(forward.NonFiniteError) as error:
            forward.refuse_non_finite(kept.largest, "conv", 64, kept.maximum + kept.mean)
        assert error.value.args == ("conv", 65, 3)


@pytest.mark.parametrize("scale", [1.0, 2.0**-10, 2.0**20])
def test_units_of_which_few_bits_are_stored_are_told(tmp_path, capsys, scale):
    largest = scale * np.array([[1.0, 2.0**-17, 2.0**-15, 0.0], [3.0, -(2.0**-18), 0.0, 0.0]], np.float32)
    files = write_whole(tmp_path / "activations.zarr", {"maximum": (("image", "unit"), largest)}, {})
    layer = extract_layers.LayerStore(
        "id", tmp_path / "activations.zarr", LayerInfo("conv", (4, 2, 2), "map", 0, "float32", "Conv2d"), scale
    )
    step = SimpleNamespace(name="extract d n", images=SimpleNamespace(range=lambda _: (0, 2)))
    assert extract.coarse_units(step, layer, files, [0]) == [1]
    assert "fewer than 8 bits of unit 1 are stored (1 of 4 units)" in capsys.readouterr().err
    stored = np.float32(np.float16(largest / scale)) * scale
    error = np.abs(stored - largest).max(0) / np.maximum(np.abs(largest).max(0), 1e-30)
    assert error[[0, 2]].max() <= 2.0**-9
