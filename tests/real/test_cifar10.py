"""The accuracy for which the CIFAR-10 networks are published comes out of the stores of the workflow."""

import json

import numpy as np
import xarray
from workflow_run import ROOT, snakemake

ACCURACY = {"resnet20": 0.915, "vit": 0.717}  # measured by those who brought the weights here, on these 1,000 images


def test_published_accuracy(beside_data):
    one_layer = {name: {"layers": [layer]} for name, layer in (("resnet20", "layer3"), ("vit", "encoder.layers"))}
    snakemake(
        beside_data,
        ROOT / "config/cifar10.yaml",
        "dissect",
        "--config",
        f"networks={json.dumps(one_layer)}",
        'controls={"images": 64}',
        "only=resnet20,vit",
    )
    results = beside_data / "results"
    images = xarray.open_zarr(results / "cifar10/images.zarr")
    assert images.attrs["classes"] == sorted(images.attrs["classes"])
    assert bool(images.valid.all())
    assert images.sizes["image"] == 1000
    for name, expected in ACCURACY.items():
        logits = xarray.open_zarr(results / "cifar10" / name / "logits.zarr").logits
        accuracy = float((logits.values.argmax(1) == images.label.values).mean())
        assert round(accuracy, 3) == expected, name
        layers = json.loads((results / "cifar10" / name / "layers.json").read_text())
        (layer,) = layers.values()
        stored = xarray.open_zarr(results / "cifar10" / layer["activations"])
        assert stored.activation.shape == ((1000, 64, 8, 8) if name == "resnet20" else (1000, 128, 8, 8))
        assert np.isfinite(stored.maximum.values).all()
