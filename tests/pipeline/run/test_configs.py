"""The ready-made configurations: they parse, and they plan on data in the layout that they describe."""

from pathlib import Path

import miniatures
import pytest
import torchvision
import yaml

from pipeline.networks import inspection
from pipeline.networks.inspection import Request
from pipeline.plan import step as plan
from pipeline.run import experiment, planner

FOLDER = Path(__file__).parents[3] / "config"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_they_parse_and_are_named_as_their_files(file):
    wanted = experiment.load(file)
    assert wanted.name == (file.stem if file.stem != "config" else "demo")


def planned(name: str, folder: Path, monkeypatch) -> plan.Plan:
    """The plan of a configuration beside miniatures of its data, with untrained networks; no torchvision is asked."""
    monkeypatch.chdir(folder)
    raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    for network in raw["networks"].values():
        network["weights"] = "random"
    for dataset in raw["datasets"].values():
        dataset["verify"] = False
    return planner.make(experiment.parse(raw))


def layers_of(made: plan.Plan, network: str) -> list[tuple[str, tuple[int, ...]]]:
    spec = made.networks[network]
    request = {
        "network": inspection.NetworkSpec.of(spec).model_dump(),
        "input_shape": (3, 224, 224),
        "layers": spec.layers,
    }
    found = inspection.inspect(**{k: getattr(Request.model_validate(request), k) for k in Request.model_fields})
    return [(layer.name, layer.shape) for layer in found.layers]


def test_the_papers_experiment(tmp_path, monkeypatch, in_process):
    miniatures.places365(tmp_path / "data/places365")
    segmenter = tmp_path / "data/models/upernet-convnext-small"
    segmenter.mkdir(parents=True)
    (segmenter / "config.json").write_text("{}")
    (segmenter / "model.safetensors").write_bytes(b"")
    made = planned("places365-vgg16", tmp_path, monkeypatch)
    labels = made.step("concepts", "places365").settings
    assert labels["sources"] == ["ade20k"] and list(labels["segmenters"]["ade20k"]["checkpoint"]) == [
        "model.safetensors"
    ]
    assert made.step("ingest", "places365").settings["size"] == [224, 224]
    how = made.step("dissect", "places365", "vgg16").settings["dissect"]
    assert (how["quantile"], how["positions"], how["border"]) == (0.01, "upsampled", "zeros")
    vgg16 = torchvision.models.vgg16().features
    relus = [f"features.{at}" for at, layer in enumerate(vgg16) if type(layer).__name__ == "ReLU"]
    layers = layers_of(made, "vgg16")
    assert [name for name, _ in layers] == relus and len(relus) == 13
    assert layers[0][1] == (64, 224, 224) and layers[-1][1] == (512, 14, 14)


def test_two_networks_on_imagenet(tmp_path, monkeypatch, in_process):
    miniatures.imagenet_folders(tmp_path / "data/imagenet")
    made = planned("imagenet-resnet50-vit", tmp_path, monkeypatch)
    assert made.step("ingest", "imagenet").settings["images"] == len(miniatures.VALIDATION)
    assert [shape for _, shape in layers_of(made, "resnet50")] == [
        (256, 56, 56),
        (512, 28, 28),
        (1024, 14, 14),
        (2048, 7, 7),
    ]
    assert [shape for _, shape in layers_of(made, "vit")] == [(768, 14, 14)] * 4
