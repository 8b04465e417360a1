"""Networks trained on ImageNet give the accuracies measured for their weights, on 100 images of ImageNet.

They were measured on the middle of each image, its corner rounded down. A data set's `crop` rounds to the nearest, as
torchvision does; that moves one image of either network over the line.
"""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.networks import Network
from pipeline.data.decode import Geometry, decode
from pipeline.networks.build import load
from pipeline.networks.forward import normalise

SIZE = 224
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


@pytest.fixture
def samples(beside_data, monkeypatch):
    """Pictures uint8 (image, 3, 224, 224), the middle of each, and labels (image,)."""
    monkeypatch.chdir(beside_data)
    with Path("data/imagenet_samples/labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pixels = [middle(decode(f"data/imagenet_samples/images/{row['file']}", Geometry(), 10**7)) for row in rows]
    return torch.from_numpy(np.stack(pixels)), np.array([int(row["class_index"]) for row in rows])


def middle(pixels: np.ndarray) -> np.ndarray:
    top, left = ((side - SIZE) // 2 for side in pixels.shape[1:])
    return pixels[:, top : top + SIZE, left : left + SIZE]


@pytest.mark.parametrize(
    ("architecture", "weights", "preprocessing", "first", "among_five"),
    [
        ("squeezenet1_0", "imagenet_squeezenet1_0.pt", {}, 0.59, 0.84),
        ("mobilenet_v2", "imagenet_mobilenet_v2_plain.pt", HALF, 0.75, 0.94),
    ],
)
def test_published_accuracy(samples, architecture, weights, preprocessing, first, among_five):
    network = Network(torchvision=architecture, weights=f"data/models/{weights}", preprocessing=preprocessing)
    built = load(network).to(memory_format=torch.channels_last)
    images, labels = samples
    with torch.no_grad():
        logits = torch.cat([built(normalise(batch, network)) for batch in images.split(20)])
    best = logits.topk(5).indices.numpy() == labels[:, None]
    assert (round(float(best[:, 0].mean()), 2), round(float(best.any(1).mean()), 2)) == (first, among_five)
