"""Small experiments for tests: configurations, files to go with them, stages run one after the other, and what a report
is made of."""

import copy
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.plan import settle
from pipeline.plan.job import Job
from pipeline.plan.step import Plan
from pipeline.run import experiment, planner
from pipeline.stages.registry import STAGES, jobs

SIZE = 16
NETWORK = """
from collections import OrderedDict

import torch
from torch import nn


def block(channels, units, stride):
    return nn.Sequential(nn.Conv2d(channels, units, 3, stride, padding=1), nn.ReLU())


def tiny(units=5, classes=3):
    return nn.Sequential(OrderedDict(
        a=block(3, 4, 2), b=block(4, units, 2), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
        head=nn.Linear(units, classes),
    ))


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def headed(**layers):
    return nn.Sequential(OrderedDict(
        **layers, plain=nn.Conv2d(3, 2, 1), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
    ))


def wide(huge, minute):
    return headed(huge=Times(huge), back=Times(minute / huge))


class Bright(nn.Module):
    '''Ordinary on most images; on one whose mean exceeds 0.9 it gives `value`.'''

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.where(x.mean((1, 2, 3), keepdim=True) > 0.9, self.value, x)


def bright(value):
    return headed(bright=Bright(float(value)))
"""


# A transformer of torchvision, whose weights are large enough for its attention to differ from a mean.
VIT = """
from torch import nn
from torchvision.models import VisionTransformer


def vit(classes=12):
    network = VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=20, num_classes=classes
    )
    for weight in network.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.6)
    return network
"""


def scenes(folder: Path, **changes: Any) -> dict[str, Any]:
    """A configuration on scenes of 16 x 16 pixels with a random network; `changes` replace its sections."""
    return {
        "name": "mini",
        "results": str(folder / "results"),
        "datasets": {
            "scenes": {
                "kind": "scenes",
                "size": SIZE,
                "shard_images": 8,
                "images": {"train": 6, "validation": 20},
                "concepts": ["truth", "pixels"],
            }
        },
        "networks": {"tiny": tiny(folder)},
    } | changes


def tiny(folder: Path, **changes: Any) -> dict[str, Any]:
    """A network of two small layers, `a` and `b`."""
    file = folder / "network.py"
    if not file.exists():
        file.write_text(NETWORK)
    return {
        "module": f"{file}:tiny",
        "weights": "random",
        "layers": ["a", "b"],
        "numerics": {"micro_batch": 4},
    } | changes


def labelled_images(folder: Path, names: Iterable[str], seed: int = 0) -> None:
    """Write images/<name>.png of noise and maps/<name>.png of the classes 0 (void), 1 and 2; and classes.txt."""
    (folder / "classes.txt").write_text("1 left side\n2 blob\n")
    for name in names:
        rng = np.random.default_rng([seed, *name.encode()])
        write_image(folder, name, rng.integers(0, 200, (SIZE, SIZE, 3), np.uint8))
        label_map = np.zeros((SIZE, SIZE), np.uint8)
        label_map[:, : rng.integers(2, 8)] = 1
        y, x = rng.integers(0, 10, 2)
        label_map[y : y + 5, x + 3 : x + 9] = 2
        write_label_map(folder, name, label_map)


def write_image(folder: Path, name: str, pixels: np.ndarray) -> None:
    path = folder / "images" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_label_map(folder: Path, name: str, label_map: np.ndarray) -> None:
    path = folder / "maps" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(label_map).save(path)


def segmentation(folder: Path, **changes: Any) -> dict[str, Any]:
    """A configuration on `labelled_images`; `changes` are those of the data set."""
    dataset = {
        "kind": "segmentation",
        "root": str(folder / "images"),
        "label_maps": {"thing": {"folder": str(folder / "maps"), "classes": str(folder / "classes.txt"), "void": [0]}},
        "shard_images": 4,
        "max_bad_fraction": 0.5,
    }
    return {
        "name": "mini",
        "results": str(folder / "results"),
        "datasets": {"photos": dataset | changes},
        "networks": {"tiny": tiny(folder)},
    }


def run(raw: Mapping[str, Any], *stages: str) -> Plan:
    """Make the plan of a configuration, settle it, and run the wanted stages that are not finished."""
    made = planner.make(experiment.parse(raw))
    settle.settle(made)
    for each in jobs(made):
        if each.stage.name in stages and not each.manifest.exists():
            each.stage.run(each)
    return made


def job(made: Plan, stage: str, *names: str) -> Job:
    """The job of a stage for these names, as `Plan.step` takes them."""
    return Job(made, made.step(stage, *names), STAGES)


def copied(made: Plan, raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration of an experiment that was run, with a copy of its results, for a test that changes them."""
    shutil.copytree(made.results, folder / "results")
    return {**copy.deepcopy(dict(raw)), "results": str(folder / "results")}


def shown(made: Plan, stage: str, out: Path, formats: Sequence[str] = ("png",)) -> Any:
    """What the report knows of the steps of a stage, an `Experiment`; its figures and tables go below `out`."""
    from pipeline.config.report import Figures
    from pipeline.report.experiment import Experiment, Made

    for folder in ("figures", "tables"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    steps = tuple(map(Made.of, jobs(made, stage)))
    return Experiment(made.results, out, "Mine", steps, figures=Figures(formats=list(formats)))


def hsic1(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased HSIC of features (image, feature), as its definition is written."""
    n = len(x)
    k, m = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    total = np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k @ m).sum() / (n - 2)
    return total / (n * (n - 3))


def lines(ledger: Path) -> list[dict[str, Any]]:
    """The entries of a ledger file, one for each shard that was made, in the order in which they were."""
    entries = [json.loads(line.rpartition("\t")[0]) for line in ledger.read_text().splitlines()]
    return [entry for entry in entries if entry["files"]]


def audited_numbers(cell: Any, measure: str) -> np.ndarray:
    """Return a measure, (image, ...), of a cell of an audit, which may share its array with others."""
    array, names = next(each for each in cell.attrs["arrays"].items() if measure in each[1])
    values = cell[array].values
    return values if len(names) == 1 else values[:, names.index(measure)]
