"""The plans of the experiments of config/, without their data: files of their number and names, weights at random.

    python -m tests.bench.paper_plans FOLDER

Writes stand-ins below FOLDER (1.3 GB; images are links to one file), and what `make plan` says of each configuration
into docs/experiments.md.
"""

import csv
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs/experiments.md"
PLACES_IMAGES, PLACES_CLASSES = 36_500, 365
IMAGENET_IMAGES, IMAGENET_CLASSES = 50_000, 1000
CIFAR_IMAGES = 10_000


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        places365(folder / "data")
        imagenet(folder / "data")
        cifar10(folder / "data")
        (folder / "config").symlink_to(ROOT / "config")
    for name in ("places365-vgg16", "imagenet-resnet50-vit", "cifar10"):
        said = "".join(f"    {line}\n" for line in plan(folder, name))
        begin, end = f"<!-- made by python -m tests.bench.paper_plans: {name} -->\n", "<!-- end -->"
        before, rest = DOCS.read_text().split(begin)
        _, after = rest.split(end, 1)
        DOCS.write_text(f"{before}{begin}\n{said}\n{end}{after}")
        print(f"{name}\n{said}", flush=True)


def plan(folder: Path, name: str) -> Iterator[str]:
    """What `make plan` says before Snakemake's list of jobs: the table, and whether the results fit the disk."""
    command = [ROOT / ".venv/bin/snakemake", "--snakefile", ROOT / "Snakefile", "--configfile", f"config/{name}.yaml"]
    if name != "cifar10":  # the lists and the devkit are not the published ones
        command += ["--config", f'datasets={{"{name.split("-")[0]}": {{"verify": false}}}}']
    run = subprocess.run(
        [*command, "--dry-run", "--quiet", "rules"],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for line in run.stdout.splitlines():
        if line.startswith("SNAKEMAKE"):
            return
        asked = line.startswith(("Using workflow", "Assuming", "asking", "inspecting", "WorkflowError", "  File"))
        if line and not asked:
            yield line.rstrip()


def picture(path: Path, size: tuple[int, int]) -> Path:
    """One picture of noise, (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    Image.fromarray(pixels).resize(size).save(path)
    return path


def link(path: Path, to: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.hardlink_to(to)


def save(network: torch.nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)


def places365(data: Path) -> None:
    import torchvision
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    root = data / "places365"
    one = picture(root / "one.jpg", (256, 256))
    classes = "".join(f"/p/place{n:03} {n}\n" for n in range(PLACES_CLASSES))
    (root / "categories_places365.txt").write_text(classes)
    names = [f"Places365_val_{n + 1:08d}.jpg" for n in range(PLACES_IMAGES)]
    listed = "".join(f"{name} {n % PLACES_CLASSES}\n" for n, name in enumerate(names))
    (root / "places365_val.txt").write_text(listed)
    for name in names:
        link(root / "val_256" / name, one)
    save(torchvision.models.vgg16(num_classes=PLACES_CLASSES), data / "models/vgg16_places365.pt")
    objects = [f"object {n}" for n in range(150)]
    published = ROOT.parent / "shared/data/vocab/ade20k_objectInfo150.csv"
    if published.exists():
        with published.open(newline="") as file:
            objects = [row["Name"].replace(";", ", ") for row in csv.DictReader(file)]
    backbone = ConvNextConfig(
        depths=[3, 3, 27, 3], hidden_sizes=[96, 192, 384, 768], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    labels = dict(enumerate(objects))
    settings = UperNetConfig(
        backbone_config=backbone, id2label=labels, label2id={name: n for n, name in labels.items()}, num_labels=150
    )
    UperNetForSemanticSegmentation(settings).save_pretrained(data / "models/upernet-convnext-small")


def imagenet(data: Path) -> None:
    import torchvision

    root = data / "imagenet"
    one = picture(root / "one.jpg", (500, 375))
    wnids = [f"n{n:08d}" for n in range(IMAGENET_CLASSES)]
    truth = [wnids[n % IMAGENET_CLASSES] for n in range(IMAGENET_IMAGES)]
    for n, wnid in enumerate(truth):
        link(root / "val" / wnid / f"ILSVRC2012_val_{n + 1:08d}.JPEG", one)
    torch.save(({wnid: (f"class {wnid}",) for wnid in wnids}, truth), root / "meta.bin")
    save(torchvision.models.resnet50(), data / "models/resnet50.pt")
    save(torchvision.models.vit_b_16(), data / "models/vit_b_16.pt")


def cifar10(data: Path) -> None:
    root = data / "cifar10"
    one = picture(root / "one.png", (32, 32))
    for n in range(CIFAR_IMAGES):
        link(root / "test" / f"class{n % 10}" / f"{n:05}.png", one)
    builders = runpy.run_path(str(ROOT / "config/networks/cifar.py"))
    for builder, file in (
        ("resnet20", "cifar_resnet20.pt"),
        ("resnet56", "cifar_resnet56.pt"),
        ("vit", "cifar_vit_d4h4_torchvision.pt"),
    ):
        save(builders[builder](), data / "models" / file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
