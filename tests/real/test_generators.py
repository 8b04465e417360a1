"""Pictures among those of generators that others trained: a DCGAN of faces, and the decoder of an autoencoder."""

import numpy as np
import pytest
import torch
import xarray as xr
from experiments import run, scenes, tiny

from pipeline.config.networks import NetworkSpec
from pipeline.networks.build import build

pytestmark = pytest.mark.usefixtures("workers")
GENERATORS = {
    "faces": ("DCGAN", "faces_dcgan64_generator_fp16.pt", {"kind": "normal", "shape": [100, 1, 1]}, [-1, 1]),
    "decoder": ("tae_decoder", "taef2_decoder_fp16.pt", {"kind": "normal", "shape": [32, 8, 8]}, [0, 1]),
}


def test_pictures_are_those_of_the_stored_latents(beside_data):
    module = beside_data / "data/modules.py"
    raw = scenes(beside_data)
    raw["datasets"]["scenes"] |= {"size": 64, "images": {"train": 2, "validation": 8}, "concepts": []}
    raw["networks"] = {"cnn": tiny(beside_data, arguments={"classes": 12, "units": 6}, seed=3, layers=["b"])}
    raw["generators"] = {
        name: {
            "module": f"{module}:{builder}",
            "weights": str(beside_data / "data/models" / weights),
            "latent": latent,
            "output": output,
        }
        for name, (builder, weights, latent, output) in GENERATORS.items()
    }
    maximise = {"steps": 4, "generators": list(GENERATORS), "expert": [], "restarts": 1}
    wishes = {"networks": ["cnn"], "units": {"b": [0, 4]}, "maximise": maximise, "first_layers": False}
    raw["visualize"] = {"wishes": wishes}
    made = run(raw, "ingest", "network", "extract", "visualize")
    for name, (builder, weights, latent, (low, high)) in GENERATORS.items():
        path = made.results / f"scenes/cnn/visualizations/wishes/maximised-latent-{name}.zarr"
        store = xr.open_zarr(path, group="b", consolidated=False)
        network = build(NetworkSpec(module=f"{module}:{builder}")).eval()
        state = torch.load(beside_data / "data/models" / weights)
        network.load_state_dict({key: value.float() for key, value in state.items()})
        latents = torch.from_numpy(np.array(store.latent.values)).reshape(-1, *latent["shape"])
        with torch.no_grad():
            pictures = ((network(latents) - low) / (high - low)).clamp(0, 1).numpy()
        assert len(pictures) == 2 and np.abs(np.rint(255 * pictures) - store.picture.values).max() <= 1
        assert pictures.std((1, 2, 3)).min() > 0.02, "pictures, not one colour"
        assert (store.found.values > 0).any() and (store.reached.values > store.started.values).any()
