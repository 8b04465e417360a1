"""Do pictures that excite units hold the units' concepts? Judged by another network, which no ascent has seen.

    python -m tests.bench.honest_pictures RESULTS [--units 64] [--steps 96]

RESULTS is the results folder of the demo. For the units of `cnn` with the highest IoU whose concept some unit of `vit`
detects too, and for those of the untrained `cnn`, pictures are made by each way and put through the ViT. The ViT's best
detector of the concept stands for a segmenter: does it exceed its threshold in the region where the CNN's unit exceeds
its own? The same is asked of the detectors of the other units' concepts, which is chance. Given are shares of units,
and the difference with a 95 % interval by bootstrap over units.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import yaml
from torch.nn import functional

from kernels.visualization.priors import Spectrum
from pipeline.config.networks import Network
from pipeline.networks.build import load
from pipeline.networks.forward import normalise, placed
from pipeline.networks.layers import resolve, to_maps
from pipeline.stages.dissect.found import read_layers, read_unit_rows
from pipeline.stages.visualize.climbing import Climb
from pipeline.stages.visualize.settings import Maximise
from pipeline.stages.visualize.subject import Strongest
from pipeline.storage.read_back import open_store

SIZE = (64, 64)
WAYS = {"pixels": {}, "maco": {"expert": ["maco"]}}
BATCH = 16


@dataclass
class Subject:
    """A network of the demo, its layers and the rows of its units.csv."""

    spec: Network
    network: torch.nn.Module
    layers: dict[str, Any]
    rows: list[dict[str, Any]]

    def maps(self, layer: str, pictures: np.ndarray) -> torch.Tensor:
        (info,) = resolve(self.network, [layer], (3, *SIZE))
        kept = {}
        handle = self.network.get_submodule(layer).register_forward_hook(lambda _, __, out: kept.update(out=out))
        try:
            with torch.no_grad():
                self.network(normalise(torch.from_numpy(pictures), self.spec))
        finally:
            handle.remove()
        return to_maps(kept["out"], info)[0]

    def active(self, layer: str, unit: int, picture: np.ndarray) -> np.ndarray:
        """Where a unit exceeds its threshold on a picture, (y, x) bool."""
        threshold = float(open_store(self.layers[layer].thresholds)["threshold"][unit])
        maps = self.maps(layer, picture[None])[:, unit : unit + 1]
        return (functional.interpolate(maps, SIZE, mode="bilinear")[0, 0] > threshold).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--steps", type=int, default=96)
    given = parser.parse_args()
    torch.set_num_threads(1)
    judge = subject_of(given.results, "vit")
    detectors = best_detectors(judge)
    print("network        way      units   its own concept   another concept   difference, 95 % interval", flush=True)
    for name in ("cnn", "cnn-untrained"):
        own = subject_of(given.results, name)
        rows = [row for row in own.rows if row["concept"] in detectors and row["layer"].startswith("features.")]
        rows = sorted(rows, key=lambda row: (-row["iou"], row["layer"], row["unit"]))[: given.units]
        for way, options in WAYS.items():
            pictures = pictures_of(given.results, own, rows, way, {**options, "steps": given.steps, "restarts": 1})
            print(f"{name:14} {way:8} {len(rows):5}   {told(own, judge, detectors, rows, pictures)}", flush=True)


def subject_of(results: Path, name: str) -> Subject:
    raw = yaml.safe_load((Path(__file__).parents[2] / "config/config.yaml").read_text())
    told = raw["networks"][name.removesuffix("-untrained")]
    spec = Network(**told)
    network = placed(load(spec, results / "networks" / name / "model.safetensors"), spec)
    layers = {layer.name: layer for layer in read_layers(results / "scenes", results / f"scenes/{name}/layers.json")}
    return Subject(spec, network, layers, read_unit_rows(results / f"scenes/{name}/units.csv"))


def best_detectors(judge: Subject) -> dict[str, tuple[str, int]]:
    """The unit of the judge with the highest IoU with each concept that it detects."""
    found: dict[str, tuple[str, int]] = {}
    for row in sorted((row for row in judge.rows if row["concept"]), key=lambda row: -row["iou"]):
        if row["category"] in ("truth/object", "truth/part"):
            found.setdefault(row["concept"], (row["layer"], row["unit"]))
    return found


def pictures_of(
    results: Path, own: Subject, rows: list[dict[str, Any]], way: str, options: dict[str, Any]
) -> np.ndarray:
    """Make a picture of each unit, (unit, channel, y, x) uint8."""
    asked, images = Maximise(**options), open_store(results / "scenes/images.zarr")
    shown = np.flatnonzero(np.asarray(images["split"][:]) == "validation")[:512]
    spectrum = Spectrum.of(np.asarray(images["image"][int(shown[0]) : int(shown[-1]) + 1])[shown - shown[0]] / 255.0)
    made = np.zeros((len(rows), 3, *SIZE), np.uint8)
    for layer in sorted({row["layer"] for row in rows}):
        (info,) = resolve(own.network, [layer], (3, *SIZE))
        places = [at for at, row in enumerate(rows) if row["layer"] == layer]
        maximum = np.asarray(open_store(own.layers[layer].activations)["maximum"][int(shown[0]) : int(shown[-1]) + 1])
        for at in range(0, len(places), BATCH):
            some = places[at : at + BATCH]
            units = [rows[place]["unit"] for place in some]
            scale = torch.from_numpy(np.nanmax(maximum[shown - shown[0]][:, units], 0)).clamp_min(1e-6)
            seeds = [(0, unit, 0) for unit in units]
            target = Strongest(info, torch.tensor(units))
            climb = Climb(own.network, own.spec, target, scale, seeds, (3, *SIZE), asked, spectrum)
            made[some] = climb.run(way).rounded
    return made


def told(
    own: Subject,
    judge: Subject,
    detectors: dict[str, tuple[str, int]],
    rows: list[dict[str, Any]],
    pictures: np.ndarray,
) -> str:
    """Say how often the judge's detectors of the own, and of other concepts, fire where the unit does."""
    concepts = sorted({row["concept"] for row in rows})
    fires = np.zeros((len(rows), len(concepts)))
    for at, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        region = own.active(row["layer"], row["unit"], picture)
        for place, concept in enumerate(concepts):
            fires[at, place] = (judge.active(*detectors[concept], picture) & region).any()
    mine = np.array([concepts.index(row["concept"]) for row in rows])
    right = fires[np.arange(len(rows)), mine]
    chance = (fires.sum(1) - right) / max(1, len(concepts) - 1)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(rows), (10_000, len(rows)))
    low, high = np.quantile((right - chance)[drawn].mean(1), [0.025, 0.975])
    difference = right.mean() - chance.mean()
    return f"{right.mean():15.2f}   {chance.mean():15.2f}   {difference:5.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
