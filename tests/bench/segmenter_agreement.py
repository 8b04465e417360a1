"""What a segmentation network as a source of concepts says, beside the ground truth: the agreement of unit labels.

    python -m tests.bench.segmenter_agreement [parsing] [lraspp] [--folder FOLDER]

Trains each named segmenter on the label maps of the embedded scenes, and the demo's CNN on their classes; dissects the
CNN with the ground truth and with the segmenters as sources; compares, category by category. Some minutes of CPU time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.nn.functional import cross_entropy, interpolate

import pipeline
from pipeline.config.networks import NetworkSpec
from pipeline.data.scenes import CATEGORIES, CONCEPTS, generate
from pipeline.networks.build import build
from pipeline.networks.checkpoint import write_safetensors
from pipeline.plan import settle
from pipeline.run import experiment, planner
from pipeline.stages.registry import jobs

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "config" / "config.yaml"
SIZE, TRAIN, VALIDATION = 64, 6000, 800
MEAN, STD = (0.45, 0.45, 0.42), (0.25, 0.25, 0.25)
HEADS = ("object", "part", "material")
CHANNELS = {name: 1 + len(CONCEPTS[name]) for name in HEADS}  # channel 0 is nothing
SEGMENTERS: dict[str, dict[str, Any]] = {
    "parsing": {
        "module": str(ROOT / "config/networks/parsing.py:parsing"),
        "arguments": {"channels": CHANNELS},
        "heads": HEADS,
        "resize": None,
        "steps": 300,
    },
    "lraspp": {
        "torchvision": "lraspp_mobilenet_v3_large",
        "arguments": {"num_classes": CHANNELS["object"]},
        "heads": ("object",),
        "resize": (128, 128),
        "steps": 120,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("segmenters", nargs="*", default=list(SEGMENTERS))
    parser.add_argument("--folder", type=Path, help="where checkpoints and results go, and are taken up from")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in HEADS:
            lines = ["0 nothing", *(f"{at} {concept}" for at, concept in enumerate(CONCEPTS[name], start=1))]
            (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
        for name in given.segmenters:
            if not (folder / f"{name}.safetensors").exists():
                train(name, folder / f"{name}.safetensors")
            accuracy(name, folder / f"{name}.safetensors")
        results = dissect(folder, given.segmenters)
        for name in given.segmenters:
            compare(results, name)


def network_of(name: str) -> torch.nn.Module:
    what = SEGMENTERS[name]
    spec = NetworkSpec(**{key: what[key] for key in ("module", "torchvision", "arguments") if key in what})
    return build(spec).to(memory_format=torch.channels_last)


def scores(name: str, network: torch.nn.Module, images: np.ndarray) -> dict[str, torch.Tensor]:
    """Scores (image, channel, y, x) of each head, at the size of the images uint8 (image, 3, y, x)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    x = (torch.from_numpy(np.ascontiguousarray(images)).float() / 255 - mean) / std
    if (resize := SEGMENTERS[name]["resize"]) is not None:
        x = interpolate(x, resize, mode="bilinear", align_corners=False, antialias=True)
    output = network(x.contiguous(memory_format=torch.channels_last))
    output = output if "out" not in output else {"object": output["out"]}
    return {head: interpolate(output[head], (SIZE, SIZE), mode="bilinear") for head in SEGMENTERS[name]["heads"]}


def train(name: str, path: Path, batch: int = 32) -> None:
    """Cross-entropy over all pixels; rare classes count for more, by the square root of how rare they are."""
    heads, steps = SEGMENTERS[name]["heads"], SEGMENTERS[name]["steps"]
    drawn = generate(0, 0, TRAIN, SIZE)
    labels = {head: drawn.label_map[:, CATEGORIES.index(head)] for head in heads}
    weight = {}
    for head in heads:
        share = np.bincount(labels[head][:2000].ravel(), minlength=CHANNELS[head]) / labels[head][:2000].size
        own = 1 / np.sqrt(share + 1e-4)
        weight[head] = torch.tensor(own / (own * share).sum(), dtype=torch.float32)
    torch.manual_seed(0)
    network, random = network_of(name).train(), np.random.default_rng(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # MobileNet's 0.01 is for longer trainings: its averages would not arrive
    optimiser = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps, pct_start=0.1)
    began = time.process_time()
    for step in range(steps):
        chosen = random.integers(0, TRAIN, batch)
        flip = -1 if random.random() < 0.5 else 1
        found = scores(name, network, drawn.image[chosen][..., ::flip])
        loss = torch.zeros(())
        for head in heads:
            wanted = torch.from_numpy(labels[head][chosen][..., ::flip].astype(np.int64))
            loss = loss + cross_entropy(found[head], wanted, weight=weight[head])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{name}: step {step} of {steps}, loss {loss.item():.2f}", flush=True)
    print(f"{name}: trained in {time.process_time() - began:.0f} CPU seconds")
    write_safetensors(path, network.state_dict())


def accuracy(name: str, path: Path) -> None:
    """Pixel accuracy and mean IoU on the validation scenes, concepts that do not occur left out."""
    from safetensors.torch import load_file

    network = network_of(name)
    network.load_state_dict(load_file(path))
    heads = SEGMENTERS[name]["heads"]
    counts = {head: np.zeros((CHANNELS[head], CHANNELS[head]), np.int64) for head in heads}
    for at in range(0, VALIDATION, 50):
        drawn = generate(0, at, 50, SIZE, "validation")
        with torch.inference_mode():
            found = scores(name, network, drawn.image)
        for head in heads:
            pair = drawn.label_map[:, CATEGORIES.index(head)] * np.int64(CHANNELS[head]) + found[head].argmax(1).numpy()
            counts[head] += np.bincount(pair.ravel(), minlength=CHANNELS[head] ** 2).reshape(counts[head].shape)
    for head, count in counts.items():
        there = count.sum(1) > 0
        iou = (np.diag(count) / (count.sum(0) + count.sum(1) - np.diag(count)).clip(1))[there][1:]
        print(
            f"{name}, {head}: {np.diag(count).sum() / count.sum():.1%} of the pixels right, "
            f"mean IoU of {len(iou)} concepts {iou.mean():.2f}"
        )


def dissect(folder: Path, names: list[str]) -> Any:
    """Run the stages on the demo's CNN, with the ground truth and the segmenters as sources; return the results."""
    demo = yaml.safe_load(DEMO.read_text())
    cnn = demo["networks"]["cnn"]
    cnn["module"] = str(ROOT / cnn["module"])
    raw = {
        "name": "agreement",
        "results": str(folder / "results"),
        "datasets": {
            "scenes": {
                "kind": "scenes",
                "size": SIZE,
                "images": {"train": TRAIN, "validation": VALIDATION},
                "concepts": ["truth", *names],
            }
        },
        "segmenters": {name: section(name, folder) for name in names},
        "networks": {"cnn": cnn},
    }
    (folder / "agreement.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    made = planner.make(experiment.parse(raw))
    settle.settle(made)
    for job in jobs(made):
        if job.stage.name != "report" and not job.is_control and not job.manifest.exists():
            job.stage.run(job)
    return pipeline.open_results(made.results)


def section(name: str, folder: Path) -> dict[str, Any]:
    """The section of a segmenter in the configuration."""
    what = SEGMENTERS[name]
    found = {key: what[key] for key in ("module", "torchvision", "arguments") if key in what}
    found |= {"weights": str(folder / f"{name}.safetensors"), "preprocessing": {"mean": list(MEAN), "std": list(STD)}}
    if what["resize"] is not None:
        found["resize"] = list(what["resize"])
    categories = {head: {"classes": str(folder / f"{head}.txt"), "void": [0]} for head in what["heads"]}
    if len(what["heads"]) > 1:
        categories = {head: one | {"output": head} for head, one in categories.items()}
    return found | {"categories": categories}


def compare(results: Any, name: str) -> None:
    """The best concept of every unit of the CNN by the segmenter and by the ground truth.

    "IoU kept": the IoU by the truth of the segmenter's labels, of the best, over the detectors by truth.
    """
    cnn = results["scenes"]["cnn"]
    layers = [cnn[layer].iou for layer in cnn]
    iou = np.concatenate([layer["iou"].values for layer in layers])
    names, categories = (np.array(layers[0][key].values.tolist()) for key in ("concept", "category"))
    least = layers[0].attrs["min_iou"]
    heads = SEGMENTERS[name]["heads"]
    print(f"\n{name}: {len(iou)} units of {len(layers)} layers; detectors have an IoU above {least}")
    print("| category | same label | of detectors | IoU kept | detectors by truth | by it | "
          "correlation of IoU | mean difference |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for head in [*heads, *(["all of them"] if len(heads) > 1 else [])]:
        own = heads if head == "all of them" else (head,)
        # The concepts of a category have one order in both sources.
        chosen = {s: iou[:, np.isin(categories, [f"{s}/{one}" for one in own])] for s in ("truth", name)}
        assert np.array_equal(*(names[np.isin(categories, [f"{s}/{one}" for one in own])] for s in chosen))
        best = {s: one.max(1) for s, one in chosen.items()}
        label = {s: one.argmax(1) for s, one in chosen.items()}
        same, detects = label["truth"] == label[name], best["truth"] > least
        its = np.take_along_axis(chosen["truth"], label[name][:, None], 1)[:, 0]
        kept = its[detects].sum() / best["truth"][detects].sum()
        print(
            f"| {head} | {same.mean():.0%} | {same[detects].mean():.0%} | {kept:.0%} | "
            f"{detects.sum()} | {(best[name] > least).sum()} | {np.corrcoef(best['truth'], best[name])[0, 1]:.2f} | "
            f"{(best[name] - best['truth']).mean():+.3f} |"
        )


if __name__ == "__main__":
    main()
