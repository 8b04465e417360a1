"""Which method finds the strokes that make a digit? The log-odds of Shrikumar et al. (ICML 2017), section 4.1.

    python -m tests.bench.log_odds_table split data/mnist/test10000.npz data/mnist/digits.npz
    snakemake network --configfile config/explain-digits.yaml
    python -m tests.bench.log_odds_table measure config/explain-digits.yaml [--images 1000] [--figure log-odds.svg]

`split` writes the digits with four of five images in the split `train`. `measure` takes the first validation images
that the trained network gets right. For each, the pixels that speak for its digit and against the most probable other
one are set to black, at most a fifth of them, and the change of the log-odds between both is noted. Methods are
compared image by image; intervals are of 95 % over 10,000 bootstrap samples of the images.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from kernels.attribution.log_odds import change_of_log_odds, erased
from pipeline import attribute
from pipeline.networks.build import load
from pipeline.networks.forward import normalise
from pipeline.run import experiment, planner

METHODS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "DeepLIFT, RevealCancel": ("deeplift", {"rule": "reveal_cancel"}),
    "DeepLIFT, rescale": ("deeplift", {}),
    "integrated gradients": ("integrated_gradients", {"steps": 32, "max_steps": 32}),
    "gradient x input": ("gradient_x_input", {}),
    "guided backpropagation x input": ("guided_backprop", {}),
}
BATCH = 100


def split(source: Path, to: Path) -> None:
    with np.load(source, allow_pickle=False) as file:
        x, y = file["x"], file["y"]
    parts = np.where(np.arange(len(x)) % 5 == 4, "validation", "train")
    np.savez_compressed(to, x=x, y=y, split=parts)
    print(f"{to}: {(parts == 'train').sum()} images to train on, {(parts == 'validation').sum()} others")


def measure(config: Path, images: int) -> tuple[float, dict[str, np.ndarray]]:
    """Return the network's accuracy on the validation images, and the changes of the log-odds by method."""
    plan = planner.make(experiment.load(config))
    spec = plan.networks["strided"]
    network = load(spec, plan.results / "networks" / "strided" / "model.safetensors")
    with np.load(plan.config.datasets["digits"].file, allow_pickle=False) as file:
        chosen = file["split"] == "validation"
        pixels, labels = file["x"][chosen], torch.from_numpy(file["y"][chosen].astype(np.int64))
    inputs = normalise(torch.from_numpy(pixels)[:, None].expand(-1, 3, -1, -1).contiguous(), spec)
    with torch.no_grad():
        logits = network(inputs)
    right = logits.argmax(1) == labels
    rows = right.nonzero()[:images, 0]
    inputs, labels, logits = inputs[rows], labels[rows], logits[rows]
    others = logits.scatter(1, labels[:, None], -torch.inf).argmax(1)
    changes = {name: changed(network, inputs, logits, labels, others, *METHODS[name]) for name in METHODS}
    return float(right.double().mean()), changes


def changed(
    network: torch.nn.Module,
    inputs: torch.Tensor,
    logits: torch.Tensor,
    of: torch.Tensor,
    against: torch.Tensor,
    method: str,
    options: dict[str, Any],
) -> np.ndarray:
    """Return the change of the log-odds of each image."""
    found = []
    for at in range(0, len(inputs), BATCH):
        some = slice(at, at + BATCH)
        maps = [_map(network, inputs[some], classes[some], method, options) for classes in (of, against)]
        with torch.no_grad():
            after = network(erased(inputs[some], torch.zeros(1), maps[0] - maps[1]))
        found.append(change_of_log_odds(logits[some], after, of[some], against[some]))
    return torch.cat(found).double().numpy()


def _map(
    network: torch.nn.Module, inputs: torch.Tensor, classes: torch.Tensor, method: str, options: dict[str, Any]
) -> torch.Tensor:
    found = getattr(attribute, method)(network, inputs, classes, **options)
    if method == "guided_backprop":
        return (found.values * inputs).sum(1)  # as in the paper: a gradient alone does not know which pixels are ink
    return found.map


def lines(changes: Mapping[str, np.ndarray]) -> list[str]:
    count = len(next(iter(changes.values())))
    rows = np.random.default_rng(0).integers(count, size=(10_000, count))
    ordered = sorted(changes, key=lambda name: -changes[name].mean())
    said = [
        f"{count} images",
        "| method | mean (95 %) | 5 % | 25 % | median | 75 % | 95 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ordered:
        low, high = np.quantile(changes[name][rows].mean(1), (0.025, 0.975))
        cells = " | ".join(f"{each:.2f}" for each in np.quantile(changes[name], (0.05, 0.25, 0.5, 0.75, 0.95)))
        said.append(f"| {name} | {changes[name].mean():.2f} ({low:.2f} to {high:.2f}) | {cells} |")
    said += ["", "| pair | mean difference (95 %) | the first is ahead, of the images |", "|---|---|---|"]
    for first, second in itertools.pairwise(ordered):
        lead = changes[first] - changes[second]
        low, high = np.quantile(lead[rows].mean(1), (0.025, 0.975))
        ahead, ties = (lead > 0).mean(), (lead == 0).mean()
        share = f"{100 * ahead:.0f} %" + (f", ties {100 * ties:.0f} %" if ties else "")
        said.append(f"| {first} – {second} | {lead.mean():.3f} ({low:.3f} to {high:.3f}) | {share} |")
    return said


def draw(changes: Mapping[str, np.ndarray], to: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "log-odds"  # the same bytes each time
    ordered = sorted(changes, key=lambda name: changes[name].mean())
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    axes.boxplot([changes[name] for name in ordered], orientation="horizontal", whis=(5, 95), showfliers=False)
    axes.set_yticks(range(1, len(ordered) + 1), ordered)
    axes.set_xlabel("fall of the log-odds")
    figure.savefig(to, dpi=150, metadata={"Date": None} if to.suffix == ".svg" else None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    own = commands.add_parser("split")
    own.add_argument("source", type=Path)
    own.add_argument("to", type=Path)
    own = commands.add_parser("measure")
    own.add_argument("config", type=Path)
    own.add_argument("--images", type=int, default=1000)
    own.add_argument("--figure", type=Path)
    given = parser.parse_args()
    if given.command == "split":
        split(given.source, given.to)
    else:
        torch.set_num_threads(1)
        accuracy, found = measure(given.config, given.images)
        print(f"{100 * accuracy:.2f} % of the validation images right")
        print("\n".join(lines(found)))
        if given.figure is not None:
            draw(found, given.figure)
