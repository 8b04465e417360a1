"""What the section `visualize` refuses, by key, before any work."""

import pytest
from experiments import run
from visualizations import experiment

from pipeline.errors import MicrotomeError
from pipeline.run import experiment as run_experiment
from pipeline.run import planner, preflight

REFUSED = [
    ({"classes": ["frm"]}, r"no class 'frm' in data set 'scenes'.*farm"),
    ({"maximise": {"l2": -1}}, r"l2"),
    ({"maximise": {"expert": ["l2", "l2"]}}, r"'l2' is named twice"),
    ({"maximise": {"steps": 0}}, r"steps"),
    ({"units": {"a": []}}, r"units"),
    ({"maximise": None}, r"classes: models of classes are maximised"),
    ({"units": {}, "classes": []}, r"projections: are of units"),
    ({"classes": ["farm", 3]}, r"visualize.wishes.classes: class 3 is named twice, by name and by its index"),
    ({"maximise": {"generators": ["faces"]}}, r"visualize.wishes.maximise.generators: no generator 'faces'"),
    ({"split": "train"}, r"visualize.wishes.split: activations of 'scenes' are those of split 'validation'"),
    ({"networks": ["cn"]}, r"visualize.wishes: no network 'cn'.*cnn"),
]


@pytest.mark.parametrize(("change", "told"), REFUSED, ids=lambda each: str(each)[:40])
def test_refused_by_key(tmp_path, change, told):
    with pytest.raises(MicrotomeError, match=told):
        planner.make(run_experiment.parse(experiment(tmp_path, **change)))


def test_best_units_need_a_dissection(tmp_path):
    raw = experiment(tmp_path, units={"a": "best"}, classes=[], projections=None)
    raw["datasets"]["scenes"]["concepts"] = []
    with pytest.raises(
        MicrotomeError, match=r"visualize.wishes.units.a: `best` units are detectors, and network 'cnn'"
    ):
        planner.make(run_experiment.parse(raw))


OF_THE_NETWORK = [
    ({"units": {"a": [4]}}, r"visualize.wishes.units.a: no unit 4 in network 'cnn', whose layer has 4, from 0 on"),
    ({"units": {"aa": "all"}}, r"visualize.wishes.units: 'aa' is not among the layers of network 'cnn'.*a"),
    ({"classes": [12]}, r"visualize.wishes.classes: class 12 of network 'cnn', which gives 12 logits"),
]


@pytest.mark.slow
def test_refused_by_the_inspection(tmp_path):
    """What the network lacks, all at once."""
    raw = experiment(tmp_path)
    raw["visualize"] = {
        f"wishes{at}": raw["visualize"]["wishes"] | change for at, (change, _) in enumerate(OF_THE_NETWORK)
    }
    with pytest.raises(MicrotomeError) as error:
        preflight.check(planner.make(run_experiment.parse(raw)))
    for at, (_, told) in enumerate(OF_THE_NETWORK):
        assert error.match(told.replace("wishes", f"wishes{at}"))


GENERATOR = """
from torch import nn


def maker(side=4):
    return nn.Sequential(nn.ConvTranspose2d(5, 3, side, bias=False), nn.Upsample(scale_factor=4), nn.Tanh())
"""


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_generators(tmp_path):
    """Pictures among those that a generator makes; one of another size is refused."""
    import numpy as np
    import torch
    import xarray as xr

    from pipeline.config.networks import NetworkSpec
    from pipeline.networks.build import build

    (tmp_path / "maker.py").write_text(GENERATOR)
    module = f"{tmp_path / 'maker.py'}:maker"
    for side in (4, 5):
        torch.save(build(NetworkSpec(module=module, arguments={"side": side})).state_dict(), tmp_path / f"{side}.pt")
    raw = experiment(tmp_path, projections=None, classes=[], units={"b": [0, 4]}, first_layers=False)
    latent = {"kind": "normal", "shape": [5, 1, 1]}
    raw["generators"] = {
        f"of{side}": {
            "module": module,
            "weights": str(tmp_path / f"{side}.pt"),
            "arguments": {"side": side},
            "latent": latent,
            "output": [-1, 1],
        }
        for side in (4, 5)
    }
    raw["visualize"]["wishes"]["maximise"] = {"steps": 5, "generators": ["of4"], "expert": []}
    stages = ("ingest", "network", "concepts", "extract", "dissect", "visualize")
    made = run(raw, *stages)
    folder = made.results / "scenes/cnn/visualizations/wishes"
    store = xr.open_zarr(folder / "maximised-latent-of4.zarr", group="b", consolidated=False)
    network = build(NetworkSpec(module=module))
    network.load_state_dict(torch.load(tmp_path / "4.pt"))
    with torch.no_grad():
        pictures = (network(torch.from_numpy(np.array(store.latent.values)).reshape(2, 5, 1, 1)) + 1) / 2
    assert np.abs(np.rint(255 * pictures.numpy()) - store.picture.values).max() <= 1
    assert store.term.values.tolist() == ["score", "latent"] and not (folder / "maximised-pixels.zarr").exists()
    raw["visualize"]["wishes"]["maximise"]["generators"] = ["of5"]
    with pytest.raises(MicrotomeError, match=r"maximise.generators: 'of5': it makes images of 20 x 20 pixels"):
        run(raw, *stages)
