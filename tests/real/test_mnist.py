"""Networks of one channel on the digits of MNIST, with weights that others trained.

The first 2,000 test images go through the same preprocessing as in the stage `extract`, as grey images of three equal
channels.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.networks import Network
from pipeline.data.decode import Geometry, transform_image
from pipeline.networks.build import load
from pipeline.networks.forward import normalise
from pipeline.networks.inspection import inspect

COUNT = 2000
MODULE = "config/networks/mnist.py"


@pytest.fixture
def digits(beside_data, monkeypatch):
    """Pictures uint8 (image, 28, 28) and labels (image,)."""
    monkeypatch.chdir(beside_data)
    with np.load("data/mnist/test10000.npz") as file:
        return file["x"][:COUNT], file["y"][:COUNT]


@pytest.mark.parametrize(
    ("function", "weights", "statistics", "size", "expected", "layers"),
    [
        ("vit", "mnist_vit_d6.pt", (0.1307, 0.3081), 28, 0.962, 7),
        ("lenet5", "mnist_lenet5.pt", (0.0, 1.0), 32, 0.985, 2),
    ],
)
def test_published_accuracy(digits, function, weights, statistics, size, expected, layers):
    mean, std = statistics
    network = Network(
        module=f"{MODULE}:{function}",
        weights=f"data/models/{weights}",
        preprocessing={"mean": [mean], "std": [std]},
    )
    found = inspect(network, (1, size, size))
    assert (found.classes, len(found.layers)) == (10, layers)
    images, labels = digits
    geometry = Geometry(resize=(size, size), crop=None)
    coloured = np.stack([transform_image(Image.fromarray(image).convert("RGB"), geometry, 10**6) for image in images])
    built = load(network)
    with torch.no_grad():
        logits = [built(normalise(torch.from_numpy(batch), network)) for batch in np.array_split(coloured, 8)]
    assert round(float((torch.cat(logits).argmax(1).numpy() == labels).mean()), 3) == expected
