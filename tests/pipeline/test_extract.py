"""Extraction: activations as they are, at a scale that holds them, once for each shard and layer."""

import itertools
import json

import numpy as np
import pytest
import torch
import zarr
from experiments import SIZE, labelled_images, lines, run, scenes, segmentation, tiny, write_image

from pipeline import extract
from pipeline.errors import MicrotomeError
from pipeline.images import Images
from pipeline.layers import Recorder
from pipeline.networks import load

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
        logits, outputs = record(extract.normalise(torch.from_numpy(pixels), spec))
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


def tasks_of(plan):
    """The tasks of an extraction, as `run` makes them, into stores of their own."""
    step = next(plan.of_stage("extract"))
    images, model = Images.of(plan, step), extract.model_of(plan, step)
    prepared = extract.prepare(model, images.size, extract.VERSION)

    def into(folder):
        layers = [extract.Layer(id, folder / id / "activations.zarr", *rest) for id, *rest in prepared.layers]
        layers = [extract.open_layer(layer, images) for layer in layers]
        extract.open_logits(folder / "logits.zarr", images, prepared.classes)
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
                extract.network_of.cache_clear()  # another worker takes over
            done = extract.extract_shard(*tasks[k])
            for layer in tasks[k][5]:
                written = {name: list(value) for name, value in done.files[layer.id].items()}
                assert written == by_the_pool[layer.id, str(k)]


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
        MicrotomeError, match=r"network 'tiny', layer 'bright': the output for image 'street/07\.png' of"
    ):
        run(wide(tmp_path, "bright", value=value), *STAGES)
    assert not list((tmp_path / "results").glob("photos/tiny/done/extract.*"))


def test_scales():
    assert extract.scale_for(1.0, headroom=True) == extract.scale_for(0.0, headroom=True) == 1.0
    assert extract.scale_for(512.0, headroom=True) == extract.scale_for(2.0**-6, headroom=True) == 1.0
    assert extract.scale_for(513.0, headroom=True) == 2.0**5
    for largest in (1e6, 65505.0, 3.4e38, 2.0**16):
        assert 2**14 <= largest / extract.scale_for(largest) < 2**15
    for largest in (1e-30, 1e-8, 1e6, 1e30):
        assert 2**4 <= largest / extract.scale_for(largest, headroom=True) < 2**5


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
    step = next(step for step in plan.of_stage("extract") if step.network == "tiny")
    with pytest.raises(MicrotomeError, match=r"model\.safetensors is not what was written"):
        extract.run(plan, step)


def test_a_bound_counts_images_and_not_shards():
    images = Images(None, {}, 24, (4, 4), 8, [], {"validation": {"0": 1, "1": 8, "2": 8}})
    assert images.shards("validation") == [0, 1, 2]
    assert images.shards("validation", 1) == [0]
    assert images.shards("validation", 2) == [0, 1]
    assert images.shards("validation", 9) == [0, 1]
    assert images.shards("validation", 99) == [0, 1, 2]
