"""Segmentation networks as sources of concepts: label maps, what is refused before work, what is made again."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from experiments import SIZE, job, labelled_images, lines, run, segmentation, write_image
from torch.nn.functional import interpolate

from kernels.images.segmentation import best_class
from pipeline.config.networks import Head, NetworkSpec, Segmenter
from pipeline.data.label_maps import read_class_list
from pipeline.errors import MicrotomeError
from pipeline.networks import inspection, published
from pipeline.networks.build import build, load
from pipeline.networks.checkpoint import write_safetensors
from pipeline.networks.segmenters import Model, channels, concepts, inspect, label_maps, memory_need, scores, settings
from pipeline.plan import inspected
from pipeline.run import experiment, forecast, planner, preflight
from pipeline.stages.dissect import intersections, thresholds
from pipeline.stages.extract import stage as extract
from pipeline.storage.identity import FileDigests, digest

NAMES = [f"street/{k:02}" for k in range(10)]
STAGES = ("ingest", "concepts", "network", "extract", "dissect")
PARSING = """
import torch
from torch import nn


class Parsing(nn.Module):
    '''Maps of half the side: four object classes, background first; two parts; features that are no scores.'''

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.Tanh())
        self.object = nn.Conv2d(6, 4, 1, bias=False)
        self.part = nn.Conv2d(6, 2, 1, bias=False)

    def forward(self, x):
        h = self.trunk(x)
        return {"object": self.object(h), "part": self.part(h), "features": h.mean((2, 3))}


class Values(Parsing):
    def forward(self, x):
        assert float(x.abs().sum()) >= 0  # a value: not on the meta device
        return super().forward(x)["object"]


class Fixed(Parsing):
    def forward(self, x):
        if x.shape[2:] != (20, 28):
            raise ValueError(f"expected 20 x 28 pixels, not {tuple(x.shape[2:])}")
        return super().forward(x)


class Infinite(Parsing):
    '''Infinite scores on an image whose mean exceeds 0.9.'''

    def forward(self, x):
        out = super().forward(x)
        return out | {"object": out["object"] / (x.mean((1, 2, 3)) < 0.9).float().view(-1, 1, 1, 1)}


class Returns(Parsing):
    def forward(self, x):
        return [x]
"""
OBJECTS = "0 nothing\n1 tree\n2 pond\n3 lamp\n"


@pytest.fixture
def parsing(tmp_path):
    """A function that gives the section of a segmenter; the weights are drawn from a seed."""
    file = tmp_path / "parsing.py"
    file.write_text(PARSING)
    (tmp_path / "objects.txt").write_text(OBJECTS)
    (tmp_path / "parts.csv").write_text("Idx,Name\n1,leaf;foliage\n2,bulb\n")

    def section(seed=1, kind="Parsing", **changes):
        spec = NetworkSpec(module=f"{file}:{kind}", seed=seed)
        network = build(spec)
        weights = tmp_path / f"{kind}-{seed}.safetensors"
        write_safetensors(weights, network.state_dict())
        return {
            "module": spec.module,
            "weights": str(weights),
            "preprocessing": {"mean": [0.4, 0.4, 0.4], "std": [0.3, 0.3, 0.3]},
            "numerics": {"micro_batch": 3},
            "categories": {
                "object": {"output": "object", "classes": str(tmp_path / "objects.txt"), "void": [0]},
                "part": {"output": "part", "classes": str(tmp_path / "parts.csv"), "first": 1},
            },
        } | changes

    return section


def described(folder, section, **changes):
    """An experiment on `labelled_images` with the segmenter `ours`."""
    changes = {"concepts": ["truth", "ours"], "dissect": {"quantile": 0.2}} | changes
    return segmentation(folder, **changes) | {"segmenters": {"ours": section}}


def stored(made, dataset="photos"):
    return zarr.open_group(made.results / dataset / "concepts.zarr", mode="r", use_consolidated=False)


def made(folder) -> list[str]:
    return [entry["shard"] for entry in lines(folder / "results/photos/concepts.ledger")]


def expected(spec: Segmenter, pixels: np.ndarray, output: str) -> tuple[np.ndarray, np.ndarray]:
    """The best channel at every pixel in float64, and where two are too close to tell in float32."""
    network = load(spec).double()
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (spec.preprocessing.mean, spec.preprocessing.std)
    )
    x = (torch.from_numpy(pixels).double() / 255 - mean) / std
    with torch.inference_mode():
        large = interpolate(network(x)[output], pixels.shape[2:], mode="bilinear", align_corners=False)
    two = large.topk(2, dim=1).values
    return large.argmax(1).numpy(), ((two[:, 0] - two[:, 1]) < 1e-5).numpy()


# Label maps -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("workers")
def test_label_maps_are_those_of_the_best_class(tmp_path, parsing):
    labelled_images(tmp_path, NAMES)
    done = run(described(tmp_path, parsing()), "ingest", "concepts")
    group = stored(done)
    assert group["category"][:].astype(object).tolist() == ["truth/thing", "ours/object", "ours/part"]
    table = group.attrs["concepts"]
    names = [entry["name"] for entry in table.values()]
    assert names == ["left side", "blob", "tree", "pond", "lamp", "leaf", "bulb"]
    pixels = zarr.open_group(done.results / "photos/images.zarr", mode="r", use_consolidated=False)["image"][:]
    numbers = {"object": np.array([0, 3, 4, 5]), "part": np.array([6, 7])}
    for place, (category, number) in enumerate(numbers.items(), start=1):
        best, close = expected(done.config.segmenters["ours"], pixels, category)
        assert close.mean() < 0.001
        found = group["label_map"][:, place]
        np.testing.assert_array_equal(found[~close], number[best][~close])
        assert len(np.unique(found)) == len(number), "every class is somewhere"


@pytest.mark.usefixtures("workers")
def test_a_size_of_its_own_for_folders_without_label_maps(tmp_path, parsing):
    labelled_images(tmp_path, [f"{kind}/{k}" for kind in ("day", "night") for k in range(3)])
    section = parsing(kind="Fixed", resize=[20, 28])
    raw = described(tmp_path, section)
    raw["datasets"] = {
        "photos": {
            "kind": "imagefolder",
            "root": str(tmp_path / "images"),
            "shard_images": 4,
            "concepts": ["pixels", "ours"],
        }
    }
    done = run(raw, "ingest", "concepts")
    assert stored(done)["category"][:].astype(object).tolist() == ["pixels/colour", "ours/object", "ours/part"]
    pixels = zarr.open_group(done.results / "photos/images.zarr", mode="r", use_consolidated=False)["image"][:]
    spec = done.config.segmenters["ours"]
    network = load(spec)
    x = (torch.from_numpy(pixels).float() / 255 - 0.4) / 0.3
    with torch.inference_mode():
        large = interpolate(x, (20, 28), mode="bilinear", align_corners=False)
        best = interpolate(network(large)["object"], (SIZE, SIZE), mode="bilinear").argmax(1).numpy()
    first = next(int(n) for n, entry in stored(done).attrs["concepts"].items() if entry["name"] == "tree")
    found = stored(done)["label_map"][:, 1].astype(int)
    assert (np.where(found > 0, found - first + 1, 0) == best).mean() > 0.999


@pytest.mark.usefixtures("workers")
def test_scores_that_are_not_finite(tmp_path, parsing):
    labelled_images(tmp_path, NAMES)
    write_image(tmp_path, NAMES[4], np.full((SIZE, SIZE, 3), 255, np.uint8))
    with pytest.raises(MicrotomeError, match=f"segmenter 'ours': the scores for image '{NAMES[4]}.png' are not finite"):
        run(described(tmp_path, parsing(kind="Infinite")), "ingest", "concepts")


# What is made again ---------------------------------------------------------------------------------------------------


def chunks(results) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time and content of every chunk of the label maps."""
    folder = results / "photos/concepts.zarr"
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.glob("label_map/c/**/*")
        if path.is_file()
    }


@pytest.mark.usefixtures("workers")
def test_another_source_and_another_version_of_it(tmp_path, parsing, monkeypatch):
    labelled_images(tmp_path, NAMES)
    alone = described(tmp_path, parsing(), concepts=["truth"])
    first = run(alone, *STAGES)
    before = chunks(first.results)
    intersection = counts(first)

    raw = described(tmp_path, parsing())
    counted = []
    original = intersections.run_tasks

    def noted(client, function, tasks, total, label):
        tasks = list(tasks)
        of_concepts = function is intersections.count_run
        counted.extend((function.__name__, task[2].categories if of_concepts else ()) for task in tasks)
        return original(client, function, tasks, total, label)

    def refuse(*_):
        raise AssertionError("the network went over the images again")

    for module in (intersections, thresholds):
        monkeypatch.setattr(module, "run_tasks", noted)
    monkeypatch.setattr(extract, "run_tasks", refuse)
    second = run(raw, *STAGES)
    after = chunks(second.results)
    assert {name: after[name] for name in before} == before, "the truth stays, down to the inode"
    assert made(tmp_path)[3:] == [f"{shard} ours/{kind}" for shard in range(3) for kind in ("object", "part")]
    assert {name for name, _ in counted} == {"count_run"}, "no threshold is counted again"
    assert {categories for _, categories in counted} == {("ours/object", "ours/part")}
    np.testing.assert_array_equal(counts(second)[:, :2], intersection)

    again = described(tmp_path, parsing(seed=2))
    counted.clear()
    third = run(again, *STAGES)
    last = chunks(third.results)
    assert {name: last[name] for name in before} == before
    assert made(tmp_path)[9:] == [f"{shard} ours/{kind}" for shard in range(3) for kind in ("object", "part")]
    assert {categories for _, categories in counted} == {("ours/object", "ours/part")}
    assert stored(third).attrs["concepts"] == stored(second).attrs["concepts"]
    assert any(last[name][2] != after[name][2] for name in last)

    # A class list with another name: its category alone.
    (tmp_path / "parts.csv").write_text("Idx,Name\n1,leaf;foliage\n2,light\n")
    counted.clear()
    fourth = run(again, *STAGES)
    assert made(tmp_path)[15:] == [f"{shard} ours/part" for shard in range(3)]
    assert {categories for _, categories in counted} == {("ours/part",)}
    assert [entry["name"] for entry in stored(fourth).attrs["concepts"].values()][-2:] == ["bulb", "light"]
    monkeypatch.undo()
    fresh = run(again | {"results": str(tmp_path / "fresh")}, *STAGES)
    assert units(fresh) == units(fourth), "as in a folder of its own"


def counts(made) -> np.ndarray:
    layers = json.loads((made.results / "photos/tiny/layers.json").read_text())
    return np.concatenate(
        [zarr.open_group(made.results / "photos" / one["iou"], mode="r")["intersection"][:] for one in layers.values()]
    )


def units(made) -> list[dict[str, str]]:
    with (made.results / "photos/tiny/units.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# What is refused before work ------------------------------------------------------------------------------------------


def changed(section, path, value):
    *parents, last = path
    inner = section
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return section


OBJECT = ("categories", "object")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            (*OBJECT, "output"),
            "objects",
            r"category 'object': no output 'objects' \(there are: object, part\); nearest",
        ),
        ((*OBJECT, "output"), None, "category 'object': name its `output`, one of object, part"),
        ((*OBJECT, "channels"), [1, 4], r"channels 1 to 4 of output 'object', which has 4 \(0 to 3\)"),
        ((*OBJECT, "channels"), [0, 2], r"the 3 channels of output 'object' are the ids 0 to 2 .*; no channel for 3"),
        ((*OBJECT, "void"), [0, 255], "no channel for 255"),
        ((*OBJECT, "first"), 1, "are the ids 1 to 4 of .*, which has 0 to 3; no name for 4; no channel for 0"),
        (("categories", "part", "first"), 0, r"no name for 0; no channel for 2: .* set `first: 1`"),
        (("weights",), "nothing.pt", r"checkpoint nothing.pt does not exist"),
        (("module",), "Parsing.py:Parsing", "network file Parsing.py cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, parsing, path, value, message):
    spec = Segmenter.model_validate(changed(parsing(), path, value))
    with pytest.raises(MicrotomeError, match=message):
        inspect(spec, (SIZE, SIZE))


def test_networks_that_do_not_fit(tmp_path, parsing):
    size = (SIZE, SIZE)
    with pytest.raises(MicrotomeError, match=r"Fixed cannot take images of shape \(3, 16, 16\): .*expected 20 x 28"):
        inspect(Segmenter.model_validate(parsing(kind="Fixed")), size)
    with pytest.raises(MicrotomeError, match="a segmentation network returned list, expected a tensor or a mapping"):
        inspect(Segmenter.model_validate(parsing(kind="Returns")), size)
    with pytest.raises(MicrotomeError, match=r"returned no scores \(image, channel, y, x\), but logits \(2, 5\)"):
        scores({"logits": torch.zeros(2, 5), "loss": None}, torch.nn.Identity())
    weights = tmp_path / "other.safetensors"
    write_safetensors(weights, torch.nn.Conv2d(3, 4, 1).state_dict())
    with pytest.raises(MicrotomeError, match=r"checkpoint .*other.safetensors does not fit the network: .* missing"):
        inspect(Segmenter.model_validate(parsing(weights=str(weights))), size)


def test_a_network_that_needs_values_is_inspected_all_the_same(tmp_path, parsing):
    head = {"classes": str(tmp_path / "objects.txt"), "void": [0]}
    found = inspect(Segmenter.model_validate(parsing(kind="Values", categories={"object": head})), (SIZE, SIZE))
    assert found["object"].concepts == ("tree", "pond", "lamp")
    assert (found["object"].output, found["object"].number) == ("", (0, 1, 2, 3))


@pytest.fixture
def in_this_process(monkeypatch):
    """Networks are inspected in this process, which has imported torch."""

    def in_own_process(module, requests, what):
        assert module == "pipeline.networks.inspection"
        return json.loads(json.dumps(inspection.answer(json.loads(json.dumps(requests)))))

    monkeypatch.setattr(inspected, "in_own_process", in_own_process)


@pytest.mark.usefixtures("in_this_process")
def test_a_run_is_refused_before_any_work(tmp_path, parsing):
    labelled_images(tmp_path, NAMES[:2])
    raw = described(tmp_path, changed(parsing(), (*OBJECT, "output"), "objekt"))
    wanted = planner.make(experiment.parse(raw))
    with pytest.raises(MicrotomeError, match=r"segmenter 'ours' on 'photos': category 'object': no output 'objekt'"):
        preflight.check(wanted)


@pytest.mark.usefixtures("in_this_process")
def test_what_is_told_before_a_run(tmp_path, parsing):
    labelled_images(tmp_path, NAMES[:2])
    wanted = planner.make(experiment.parse(described(tmp_path, parsing())))
    preflight.check(wanted)
    assert preflight.sizes(wanted)[-1] == "segmenter 'ours' on 'photos': concepts, 3 of object, 2 of part"
    label = job(wanted, "concepts", "photos")
    without = estimated(wanted, label)
    assert (without.rate, without.seconds) == ("not measured", None)
    preflight.check(wanted, probe=True)
    cost = estimated(wanted, label)
    (found,), (probed,) = label.stage.questions(label), label.stage.speeds(label)
    found, probed = found.answer, probed.answer
    assert float(cost.rate) == pytest.approx(probed["images_per_second"], rel=0.01) and cost.seconds > 0
    spec = wanted.config.segmenters["ours"]
    assert found["memory"] == memory_need(spec, (SIZE, SIZE))
    assert cost.memory == without.memory > found["memory"]
    assert found["memory"] > 4 * 3 * sum(p.numel() for p in load(spec).parameters())


def estimated(made, asked):
    (cost,) = (each.cost for each in forecast.forecast(made) if each.name == asked.name)
    return cost


@pytest.mark.usefixtures("workers")
def test_a_segmenter_that_needs_more_memory_than_a_worker_has(tmp_path, parsing):
    labelled_images(tmp_path, NAMES[:2])
    raw = described(tmp_path, parsing()) | {"cluster": {"memory": "1.3 GB"}}
    raw["segmenters"]["ours"]["numerics"] = {"micro_batch": 100_000}
    with pytest.raises(MicrotomeError, match=r"concepts photos needs about .* `numerics.micro_batch` of the segmenter"):
        run(raw, "ingest", "concepts")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("datasets", "photos", "concepts"),
            ["truth", "our"],
            r"no source 'our' .* truth, pixels, ours\); nearest: ours",
        ),
        (("segmenters", "ours", "weights"), "train", "a segmenter needs trained weights, for example a file"),
        (("segmenters", "ours", "weights"), "random", "a segmenter needs trained weights, for example a file"),
        (("segmenters", "ours", "categories"), {}, "at least 1"),
        (("segmenters", "ours", "categories", "object", "channels"), [3, 1], "the first, 3, comes after the last, 1"),
        (("segmenters", "ours", "categories", "object", "outputs"), "x", "unknown key; nearest: output"),
        (("segmenters", "ours", "categories", "a/b"), {"classes": "x"}, "pattern"),
        (("segmenters", "pixels"), "ours", "sources of another kind"),
    ],
)
def test_configurations_that_are_refused(tmp_path, parsing, path, value, message):
    raw = described(tmp_path, parsing())
    raw = changed(raw, path, raw["segmenters"]["ours"] if value == "ours" else value)
    with pytest.raises(MicrotomeError, match=message):
        experiment.parse(raw)


def test_a_segmenter_that_no_data_set_names_need_not_be_there(tmp_path):
    labelled_images(tmp_path, NAMES[:2])
    head = {"classes": str(tmp_path / "none.txt")}
    absent = {"transformers": "absent/folder", "weights": "pretrained", "categories": {"object": head}}
    raw = segmentation(tmp_path) | {"segmenters": {"absent": absent}}
    assert "segmenters" not in planner.make(experiment.parse(raw)).step("concepts", "photos").settings
    raw["datasets"]["photos"]["concepts"] = ["absent"]
    with pytest.raises(MicrotomeError, match="segmenter 'absent': 'absent/folder' is neither a folder nor"):
        planner.make(experiment.parse(raw))


def test_ids_cover_what_label_maps_are_made_of(tmp_path, parsing):
    labelled_images(tmp_path, NAMES[:2])

    def id_of(raw):
        return planner.make(experiment.parse(raw)).step("concepts", "photos").id

    truth = id_of(segmentation(tmp_path))
    assert id_of(described(tmp_path, parsing(), concepts=["truth"])) == truth, "a segmenter that is not used"
    ids = [truth, id_of(described(tmp_path, parsing()))]
    for path, value in [
        (("weights",), parsing(seed=5)["weights"]),
        (("preprocessing", "mean"), [0.4, 0.4, 0.5]),
        (("resize",), [32, 32]),
        (("numerics", "micro_batch"), 4),
        ((*OBJECT, "void"), [0, 1]),
        ((*OBJECT, "channels"), [0, 3]),
    ]:
        ids.append(id_of(described(tmp_path, changed(parsing(), path, value))))
    (tmp_path / "objects.txt").write_text(OBJECTS + " ")
    ids.append(id_of(described(tmp_path, parsing())))
    (tmp_path / "parsing.py").write_text(PARSING + "\n")
    ids.append(id_of(described(tmp_path, parsing())))
    assert len(set(ids)) == len(ids)


# Class lists ----------------------------------------------------------------------------------------------------------


def test_one_list_of_several_categories(tmp_path):
    (tmp_path / "all.csv").write_text(
        "id,name,category\n0,unknown,\n1,wall;partition,stuff\n2,glass,material\n3,glass,object\n4,cup;mug,object\n"
    )

    def of(category, **changes):
        head = Head(classes=str(tmp_path / "all.csv"), **changes)
        outputs = {"logits": torch.zeros(1, 5, 2, 2), "aux": torch.zeros(1, 5, 2, 2)}
        return channels(category, head, outputs, read_class_list(head.classes, head.void, category))

    objects = of("object")
    assert (objects.output, objects.start, objects.stop) == ("logits", 0, 5)
    assert (objects.concepts, objects.number) == (("glass", "cup"), (0, 0, 0, 1, 2))
    assert of("material").number == (0, 0, 1, 0, 0)
    assert of("stuff").concepts == ("wall",)
    part = of("object", channels=[3, 4], first=3, output="aux")
    assert (part.output, part.start, part.stop, part.number) == ("aux", 3, 5, (1, 2))
    with pytest.raises(MicrotomeError, match=r"no class of category 'objects' \(there are: material, object, stuff\)"):
        of("objects")
    with pytest.raises(MicrotomeError, match=r"the 4 channels .* are the ids 0 to 3 of .*; no channel for 4"):
        of("object", channels=[0, 3])


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_torchvision(name):
    network = build(NetworkSpec(torchvision=name), device="meta")
    with torch.inference_mode():
        found = scores(network(torch.zeros(1, 3, 64, 96, device="meta")), network)
    assert found["out"].shape == (1, 21, 64, 96)


# transformers ---------------------------------------------------------------------------------------------------------

OF_FOUR = ["stage1", "stage2", "stage3", "stage4"]
LABELS = {0: "wall", 1: "sky ", 2: "lamp", 3: "void"}


def segformer(transformers):
    shape = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "num_encoder_blocks": 2}
    shape |= {"patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}
    made = transformers.SegformerConfig(**shape, decoder_hidden_size=16, id2label=LABELS)
    return transformers.SegformerForSemanticSegmentation(made), transformers.SegformerImageProcessor()


def upernet(transformers):
    backbone = transformers.ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1] * 4, out_features=OF_FOUR)
    made = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=16, id2label=LABELS
    )
    return transformers.UperNetForSemanticSegmentation(made), transformers.SegformerImageProcessor()


def mask2former(transformers):
    swin = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 64}
    backbone = transformers.SwinConfig(**swin, out_features=OF_FOUR)
    made = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=7, id2label=LABELS,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(made), transformers.Mask2FormerImageProcessor()


@pytest.mark.parametrize("kind", [segformer, upernet, mask2former])
def test_label_maps_are_those_of_the_library(tmp_path, kind):
    """From a folder, with the names that come with it, against the library's own post-processing."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    network, processor = kind(transformers)
    for parameter in network.parameters():  # so that not one class wins everywhere
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    network.eval().save_pretrained(tmp_path / "model")
    raw = segmentation(tmp_path, concepts=["ade"]) | {
        "segmenters": {
            "ade": {
                "transformers": str(tmp_path / "model"),
                "weights": "pretrained",
                "numerics": {"micro_batch": 2, "channels_last": False},
                "categories": {"object": {"classes": "model", "void": [3]}},
            }
        }
    }
    labelled_images(tmp_path, NAMES[:1])
    digests = FileDigests(tmp_path / "digests.json")
    spec = published.resolve(experiment.parse(raw), tmp_path, digests).segmenters["ade"]
    assert list(inspect(spec, (48, 64))["object"].concepts) == ["wall", "sky", "lamp"]
    assert concepts(spec) == {"object": ["wall", "sky", "lamp"]}

    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 48, 64), np.uint8)
    weights = digest(settings(spec, digests)["checkpoint"])
    found = label_maps(Model("ade", spec.model_dump_json(), weights), pixels, ["object"])["object"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.preprocessing.mean, spec.preprocessing.std))
    with torch.inference_mode():
        output = network((torch.from_numpy(pixels).float() / 255 - mean) / std)
    its = processor.post_process_semantic_segmentation(output, target_sizes=[(48, 64)] * 3)
    expected = np.array([1, 2, 3, 0])[torch.stack(list(its)).numpy()]
    assert (found == expected).mean() > 0.999  # batches of another size round differently
    assert len(np.unique(expected)) > 1
    with pytest.raises(MicrotomeError, match="its weights were changed during the run"):
        label_maps(Model("ade", spec.model_dump_json(), "other"), pixels, ["object"])


@pytest.mark.parametrize("kind", ["mask2former", "maskformer"])
def test_masks_become_classes_as_in_the_library(kind):
    transformers = pytest.importorskip("transformers")
    processor = {"mask2former": "Mask2FormerImageProcessor", "maskformer": "MaskFormerImageProcessor"}[kind]
    generator = torch.Generator().manual_seed(3)
    output = {
        "class_queries_logits": torch.randn(2, 9, 6, generator=generator) * 2,
        "masks_queries_logits": torch.randn(2, 9, 12, 16, generator=generator) * 4,
        "auxiliary": None,
    }
    network = torch.nn.Identity()
    network.config = SimpleNamespace(model_type=kind)
    found = scores(output, network)["logits"]
    assert found.shape == (2, 5, *((384, 384) if kind == "mask2former" else (12, 16)))
    its = getattr(transformers, processor)().post_process_semantic_segmentation(
        SimpleNamespace(**output), target_sizes=[(40, 56)] * 2
    )
    for own, expected in zip(found, its, strict=True):
        assert torch.equal(best_class(own, (40, 56)), expected)
        assert len(expected.unique()) > 2
    network.config = SimpleNamespace(model_type="eomt")
    with pytest.raises(MicrotomeError, match="how masks of eomt become classes is not known"):
        scores(output, network)
