"""Real images through the kinds `npz` and `csv`, against numpy and Pillow."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from experiments import job
from PIL import Image

from pipeline.run import experiment, planner

pytestmark = pytest.mark.usefixtures("workers")
MNIST = "data/mnist/test10000.npz"
NETWORK = {"torchvision": "resnet18", "weights": "random"}


def ingested(folder: Path, **dataset: Any) -> zarr.Group:
    raw = {
        "name": "real",
        "results": str(folder / "results"),
        "datasets": {"real": dataset},
        "networks": {"n": NETWORK},
    }
    made = planner.make(experiment.parse(raw))
    ingest = job(made, "ingest", "real")
    ingest.stage.run(ingest)
    assert ingest.read().result["refused"] == 0
    return zarr.open_group(folder / "results/real/images.zarr", mode="r", use_consolidated=False)


def test_mnist_as_an_npz(beside_data):
    stored = ingested(beside_data, kind="npz", file=str(beside_data / MNIST), max_images=500)
    with np.load(beside_data / MNIST, allow_pickle=False) as file:
        images, labels = file["x"], file["y"]
    index = np.array([int(name) for name in stored["image_id"][:]])
    assert len(set(index)) == 500 and stored.attrs["classes"] == [str(digit) for digit in range(10)]
    np.testing.assert_array_equal(stored["image"][:], np.repeat(images[index][:, None], 3, axis=1))
    np.testing.assert_array_equal(stored["label"][:], labels[index])
    assert np.bincount(stored["label"][:], minlength=10).min() > 25  # a random sample


def test_mnist_resized_for_a_network(beside_data):
    stored = ingested(beside_data, kind="npz", file=str(beside_data / MNIST), max_images=70, resize=32)
    with np.load(beside_data / MNIST, allow_pickle=False) as file:
        images = file["x"]
    for slot, name in enumerate(stored["image_id"][:]):
        resized = Image.fromarray(images[int(name)]).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(stored["image"][slot], np.asarray(resized).transpose(2, 0, 1))


def test_imagenet_samples_as_a_table(beside_data):
    folder = beside_data / "data/imagenet_samples"
    stored = ingested(beside_data, kind="csv", root=str(folder / "images"), table=str(folder / "labels.csv"), crop=224)
    with (folder / "labels.csv").open(newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    ids = stored["image_id"][:].astype(object).tolist()
    assert sorted(ids) == sorted(rows) and len(ids) == 100
    assert stored["label"][:].tolist() == [int(rows[name]["class_index"]) for name in ids]
    assert all(stored.attrs["classes"][int(row["class_index"])] == row["name"] for row in rows.values())
    assert stored.attrs["classes"][1] == "1"  # a class without an image has its number for a name
    for slot in (0, 50, 99):
        with Image.open(folder / "images" / ids[slot]) as image:
            pixels = np.asarray(image.convert("RGB"))
        top, left = (round((side - 224) / 2) for side in pixels.shape[:2])
        np.testing.assert_array_equal(
            stored["image"][slot], pixels[top : top + 224, left : left + 224].transpose(2, 0, 1)
        )
