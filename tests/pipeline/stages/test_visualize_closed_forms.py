"""Closed forms through the whole stage: what a linear unit and class want to see, less the squared norm."""

import numpy as np
import pytest
import xarray as xr
from experiments import SIZE, run, tiny
from visualizations import experiment

from pipeline.networks.build import load

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workers")]
LINEAR = """
from collections import OrderedDict

from torch import nn


def linear(size=16):
    return nn.Sequential(OrderedDict(a=nn.Conv2d(3, 2, size), flatten=nn.Flatten()))
"""
L2 = 40.0


def test_a_linear_network_less_its_squared_norm(tmp_path):
    """w x / m - l2 |x|^2 / n is highest at x = n w / (2 m l2).

    Pictures are stored as float32, whose numbers near 0.5 are 6e-8 apart: pixels are compared to 5e-7, and what is
    maximised, in float64 at the stored picture, to 1e-8.
    """
    (tmp_path / "linear.py").write_text(LINEAR)
    still = {"shift": 0, "turn": 0, "zoom": 1, "keep": ["float"]}
    maximise = {"steps": 600, "expert": ["l2"], "l2": L2, "restarts": 1, **still}
    raw = experiment(tmp_path, units={"a": "all"}, classes=[0, 1], projections=None, maximise=maximise)
    raw["datasets"]["scenes"]["concepts"] = []
    raw["networks"]["cnn"] = tiny(tmp_path, module=f"{tmp_path / 'linear.py'}:linear", layers=["a"])
    made = run(raw, "ingest", "network", "extract", "visualize")
    spec, folder = made.networks["cnn"], made.results / "scenes/cnn"
    weight = load(spec, made.results / "networks/cnn/model.safetensors").a.weight.detach().double().numpy()
    mean, std = (np.array(each).reshape(-1, 1, 1) for each in (spec.preprocessing.mean, spec.preprocessing.std))
    values = 3 * SIZE * SIZE
    for store, group in (("maximised-pixels", "a"), ("class-models-pixels", "logit")):
        found = xr.open_zarr(folder / f"visualizations/wishes/{store}.zarr", group=group, consolidated=False)
        for row, scale in enumerate(found.attrs["scales"]):
            best = values * weight[row] / (2 * scale * L2)
            pixels = mean + std * best
            assert np.abs(pixels - mean).max() > 0.05 and pixels.min() > 0 and pixels.max() < 1, (
                "it fits in, and is not grey"
            )
            stored = found.input.values[row].astype(np.float64)
            np.testing.assert_allclose(stored, pixels, rtol=0, atol=5e-7)
            reached, most = (
                (weight[row] * x).sum() / scale - L2 * (x**2).mean() for x in ((stored - mean) / std, best)
            )
            assert most - 1e-8 <= reached <= most + 1e-12
            assert np.abs(found.picture.values[row] - 255 * pixels).max() <= 0.5 + 1e-3
