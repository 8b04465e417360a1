"""The plans of many configurations as `golden_plans.json` records them: id, settings and parents of every step.

    python tests/support/golden_plans.py    record the plans as they are now

An id decides what is recomputed, so a plan that changes makes every user's results stale. Where images are files, the
source of a data set (its path on this machine) is left out, and ids are computed again without it.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from PIL import Image

from pipeline.data import torchvision_data
from pipeline.plan.step import Plan, Step
from pipeline.run import experiment, planner
from pipeline.storage.identity import digest

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("golden_plans.json")


def picture(path: Path, colour: int, size: tuple[int, int] = (32, 32)) -> None:
    """Write an image whose bytes are the same with every version of Pillow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 90, 255 - colour)).save(path, "BMP")


def data(folder: Path) -> None:
    """Write what the ready-made configurations read, in miniature and with fixed times."""
    import miniatures

    for name in ("config", "kernels", "tests"):
        (folder / name).symlink_to(ROOT / name)
    root = folder / "data"
    for split, count in (("train", 6), ("test", 72)):
        for at, name in enumerate(("bird", "cat", "ship") * (count // 3)):
            picture(root / "cifar10" / split / name / f"{at}.bmp", at)
    miniatures.cifar10(root)
    miniatures.imagenet_folders(root / "imagenet")
    miniatures.places365(root / "places365")
    for at in range(5):
        picture(root / "camvid/images" / f"{at}.bmp", at)
        picture(root / "imagenet_samples/images" / f"{at}.bmp", at)
        label_map = root / "camvid/labels" / f"{at}.png"
        label_map.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 6), at).save(label_map, "BMP")
    (root / "camvid/classes.txt").write_text("0 sky\n1 road\n11 void\n")
    rows = "".join(f"{at}.bmp,{name}\n" for at, name in enumerate(("dog", "cat", "dog", "cat", "cow")))
    (root / "imagenet_samples/labels.csv").write_text("path,label\n" + rows)
    arrays(root / "mnist/test10000.npz")
    arrays(root / "mnist/digits.npz", split=["train", "validation"] * 15)
    models = "cifar_resnet20 cifar_resnet56 cifar_vit_d4h4_torchvision mnist_lenet5 mnist_vit_d6"
    models += " imagenet_squeezenet1_0 imagenet_mobilenet_v2_plain imagenet_efficientnet_lite0"
    models += " seg_voc_deeplabv3_mobilenetv2_fp16 vgg16_hed_bsds500_fp16"
    models += " mnist_dcgan_generator faces_dcgan64_generator_fp16"
    for name in models.split():
        (root / "models").mkdir(exist_ok=True)
        (root / "models" / f"{name}.pt").write_bytes(name.encode())
    for name in ("planted", "free"):
        (folder / "generators").mkdir(exist_ok=True)
        (folder / "generators" / f"{name}.safetensors").write_bytes(name.encode())
    segmenter = root / "models/upernet-convnext-small"
    segmenter.mkdir()
    (segmenter / "config.json").write_text("{}")
    (segmenter / "model.safetensors").write_bytes(b"")
    (root / "modules.py").write_bytes(b"deeplab_voc = None\n")
    miniatures.old(root)


def arrays(path: Path, **more: Sequence[str]) -> None:
    """Write images of 28 x 28 and labels as an npz, uncompressed, and more columns."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, x=np.zeros((30, 28, 28), np.uint8), y=np.arange(30) % 10, **more)


def ready_made() -> dict[str, dict[str, Any]]:
    """The configurations in `config/`, with weights and images of the miniatures, and the one of `make chaos`."""
    found = {}
    for file in sorted((ROOT / "config").glob("*.yaml")):
        raw = yaml.safe_load(file.read_text())
        for network in raw["networks"].values():
            if (
                str(network["weights"]) in ("DEFAULT", "pretrained")
                or network["weights"].startswith("IMAGENET")
                or (raw["name"] in ("places365-vgg16", "imagenet-resnet50-vit") and network["weights"] != "random")
            ):
                network["weights"] = "random"
        for dataset in raw["datasets"].values():
            if "verify" in dataset or dataset["kind"] in ("imagenet", "places365", "cifar10"):
                dataset["verify"] = False
        if raw["name"] == "calibration":
            raw["calibrate"]["datasets"] = ["mnist28"]
        if raw["name"] == "audit-camvid":
            raw["audit"]["things"]["tests"]["mass"]["concepts"] = ["sky", "road"]
        if raw["name"] == "audit-imagenet-samples":
            for test in ("localisation", "pointing"):
                raw["audit"]["place"]["tests"][test]["concept_of"] = {"dog": "dog", "*": None}
            for options in raw["audit"]["faithful"]["tests"].values():
                options["images"] = 5
        found[file.stem] = raw
    raw = yaml.safe_load((ROOT / "tests/chaos/miniature.yaml").read_text())
    raw["networks"]["net"]["module"] = "tests/workflow/networks/tiny.py:tiny"
    raw["randomize"]["noise"]["networks"]["tiny"]["module"] = "config/networks/zhang2017.py:tiny"
    return found | {"chaos": raw}


def small(folder: Path) -> dict[str, dict[str, Any]]:
    """Configurations of the tests that together use every section and most keys."""
    from experiments import labelled_images, scenes, segmentation, tiny
    from miniatures import old

    basic = scenes(folder)
    twelve = tiny(folder, arguments={"classes": 12, "units": 6}, seed=3)
    trained = twelve | {"weights": "train", "train": {"dataset": "scenes", "recipe": {"steps": 4, "batch_size": 8}}}
    spare = {key: value for key, value in twelve.items() if key in ("module", "arguments")}
    noise = {
        "dataset": "scenes",
        "crop": 12,
        "epochs": 2,
        "networks": {"small": spare | {"learning_rate": 0.02}},
        "runs": {"true": {"network": "small"}, "random": {"network": "small", "corruption": "random_labels"}},
    }
    of_run = {
        **twelve, "seed": 0, "weights": "randomize:noise/random", "preprocessing": {"per_image": True},
    }  # fmt: skip
    photos = folder / "photos"
    photos.mkdir()
    labelled_images(photos, [])
    for at in range(6):
        picture(photos / "images" / f"{at}.bmp", at, (16, 16))
        label_map = photos / "maps" / f"{at}.png"
        label_map.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), at % 3).save(label_map, "PNG", compress_level=0)
    (photos / "labels.csv").write_text("image,label\n" + "".join(f"{at}.bmp,{'ab'[at % 2]}\n" for at in range(6)))
    (photos / "table.csv").write_text("path,label,split\n" + "".join(f"{at}.bmp,x,train\n" for at in range(6)))
    (folder / "parsing.pt").write_bytes(b"weights")
    (folder / "things.txt").write_text("0 background\n1 round\n2 square\n")
    arrays(folder / "digits.npz")
    old(photos)
    os.utime(folder / "digits.npz", ns=(10**18, 10**18))
    parsing = {
        "module": "tests/workflow/networks/parsing.py:Parsing",
        "weights": str(folder / "parsing.pt"),
        "categories": {"thing": {"output": "thing", "classes": str(folder / "things.txt"), "void": [0]}},
    }
    data = basic["datasets"]["scenes"]
    plain = {"networks": {"tiny": tiny(folder)}}
    photos_of = segmentation(photos) | plain
    first = photos_of["datasets"]["photos"]
    return {
        "basic": basic,
        "stores": scenes(folder, networks={
            "pooled": tiny(folder, store={"a": "pooled"}), "streamed": tiny(folder, store="none", special_tokens=0),
            "mixed": tiny(folder, store={"b": "none"}, group="two"), "auto": tiny(folder, layers="auto", group="two"),
        }),
        "data": scenes(folder, segmenters={"parsed": parsing}, controls={"images": 8}, datasets={
            "scenes": data | {"concepts": ["truth", "pixels", "parsed"], "max_images": 10, "label_map_size": [8, 12]},
            "published": data | {"dissect": {"method": "cvpr2017", "min_iou": 0.1}, "seed": 4},
            "pnas": data | {"dissect": {"method": "pnas2020", "quantile": 0.02, "split": "train"}},
        }),
        "everything": scenes(
            folder,
            networks={"one": trained | {"ablate": {"layers": ["a"], "replace": "mean", "sizes": [2, 1], "draws": 2}},
                      "two": twelve | {"ablate": {}}, "noisy": of_run, "streamed": twelve | {"store": {"a": "none"}}},
            calibrate={"splits": 3, "share": 0.7, "methods": ["temperature", "isotonic"], "networks": ["one"]},
            probes={"networks": ["one", "one-untrained"], "shots": [2, 1], "features": ["pooled"], "draws": 2},
            sight={"images": 8, "minibatch": 4, "gradients": 2, "layers": {"one": ["a"]}, "measures": ["skips"]},
            similarity={
                "compare": {"both": {"networks": ["one", "two"]}, "control": {"networks": ["one-untrained"]}},
                "data_fraction": {"parts": {"network": "one", "fractions": [0.5, 0.75, 1]}},
                "images": 16, "minibatch": 4, "neighbours": 2, "layers": {"two": ["b"]}, "features": ["pooled"],
            },
            randomize={"noise": noise},
            report={"title": "All of it", "cards": 2},
        ) | {"datasets": {"scenes": data | {"images": {"train": 60, "validation": 60}}}},
        "segmentation": photos_of,
        "labelled": segmentation(photos, labels=f"{photos}/labels.csv", split={"share": {"train": 0.5, "test": 0.5}},
                                 dissect={"split": "test"}, resize={"squash": [12, 12]}) | plain,
        "table": photos_of | {"datasets": {"photos": {
            "kind": "csv", "root": first["root"], "table": str(photos / "table.csv"), "resize": 14, "crop": 12,
            "dissect": {"split": "train"}, "shard_images": 4,
        }}},
        "digits": photos_of | {"datasets": {"digits": {"kind": "npz", "file": str(folder / "digits.npz")}}},
        "libraries": scenes(folder, networks={
            "resnet": {"torchvision": "resnet18", "weights": "random", "arguments": {"num_classes": 12}},
            "vit": {"timm": "vit_tiny_patch16_224", "weights": "random", "arguments": {"img_size": 16},
                    "preprocessing": {"mean": [0.5], "std": [0.5]}, "numerics": {"channels_last": False}},
        }),
    }  # fmt: skip


def in_process(module: str, request: dict[str, Any], what: str) -> Any:
    """What torchvision says of a data set, without a process of its own."""
    return json.loads(json.dumps(torchvision_data.answer(json.loads(json.dumps(request)))))


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def plans(folder: Path, only: Callable[[str], bool] = lambda name: True) -> dict[str, list[dict[str, Any]]]:
    """Every plan by name, as it is recorded; files are written below `folder`, which is empty."""
    data(folder)
    found = {}
    # Processes that it starts find this code from any folder.
    here = patch.object(sys, "path", [str(ROOT), *sys.path])
    with inside(folder), here, patch.object(torchvision_data, "in_own_process", in_process):
        for name, raw in (ready_made() | small(folder)).items():
            if only(name):
                wanted = experiment.parse(raw | {"results": str(folder / "results" / name)})
                found[name] = described(planner.make(wanted))
    return found


def described(made: Plan) -> list[dict[str, Any]]:
    """The steps of a plan in order: name, id, settings, and parents by name."""
    files = any(data.kind != "scenes" for data in made.config.datasets.values())
    own: dict[str, str] = {}  # the id that is recorded, by the step's own
    found = []
    for step in made.steps.values():
        settings = dict(step.settings)
        settings.pop("code", None)  # of a report: a changed page is made again
        if files:
            settings.pop("source", None)
            settings["parents"] = [own.get(id, "a part of it") for id in settings["parents"]]
        own[step.id] = digest(settings) if files or step.stage == "report" else step.id
        found.append(
            {
                "step": step.name,
                "id": own[step.id],
                "manifest": step.manifest.replace(step.id, "*"),
                "parents": [made.steps[path].name for path in step.parents],
                "settings": settings,
            }
        )
    return found


def _line(step: Step | dict[str, Any]) -> str:
    return json.dumps(step, sort_keys=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = plans(Path(folder).resolve())
    # A line a step, so that a change can be read.
    body = ",\n".join(
        f"{json.dumps(name)}: [\n" + ",\n".join(map(_line, steps)) + "\n]" for name, steps in found.items()
    )
    RECORD.write_text("{\n" + body + "\n}\n")
    print(f"{sum(map(len, found.values()))} steps of {len(found)} configurations recorded")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.path.insert(0, str(Path(__file__).parent))
    main()
