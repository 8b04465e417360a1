"""What is wrong is refused before any work: by name, with a reason, and with nothing written but caches."""

import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file
from workflow_run import TINY, snakemake, written

from pipeline.errors import MicrotomeError
from pipeline.run import experiment as run_experiment
from pipeline.run import planner, preflight

WEIGHTS = {
    "0.0.weight": (6, 3, 3, 3),
    "0.0.bias": (6,),
    "0.2.weight": (5, 6, 3, 3),
    "0.2.bias": (5,),
    "3.weight": (3, 5),
    "3.bias": (3,),
}


class Payload:
    """Unpickled, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def experiment():
    return {
        "name": "refused",
        "results": "results",
        "datasets": {"scenes": {"kind": "scenes", "size": 32, "images": {"train": 0, "validation": 4}}},
        "networks": {"tiny": {"module": f"{TINY}:tiny", "weights": "random", "layers": ["0.1"]}},
        "cluster": {"workers": 1},
    }


def weights(**changes):
    """A state dict of `tiny`; a change is a shape, or None for a key that is left out."""
    shapes = WEIGHTS | changes
    return {key: np.zeros(shape, np.float32) for key, shape in shapes.items() if shape is not None}


def test_unknown_keys(tmp_path, experiment):
    experiment["datasets"]["scenes"]["dissect"] = {"quantle": 0.01}
    experiment["networks"]["tiny"]["layer"] = "auto"
    experiment["dataset"] = {}
    said = snakemake(tmp_path, experiment, code=1)
    for expected in (
        "datasets.scenes.dissect.quantle: unknown key; nearest: quantile",
        "networks.tiny.layer: unknown key; nearest: layers",
        "dataset: unknown key; nearest: dataset",
    ):
        assert expected in said
    assert "Traceback" not in said
    assert not (tmp_path / "results").exists()


def test_wrong_networks(tmp_path, experiment, monkeypatch):
    """All of them at once: each is told with its file or layer, and no pickled code runs."""
    monkeypatch.chdir(tmp_path)
    executed = tmp_path / "executed"
    files = {
        "missing": weights(**{"3.bias": None}),
        "extra": weights(**{"4.bias": (3,)}),
        "shape": weights(**{"3.weight": (4, 5)}),
        "whole": weights(),
    }
    for name, state in files.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"0.0.weight": Payload(executed)}))
    tiny = experiment["networks"].pop("tiny")
    for name in (
        "missing.safetensors",
        "extra.safetensors",
        "shape.safetensors",
        "truncated.safetensors",
        "empty.pt",
        "code.pt",
    ):
        experiment["networks"][name.partition(".")[0]] = tiny | {"weights": name}
    experiment["networks"]["layer"] = tiny | {"layers": ["0.1", "0.one"]}
    experiment["networks"]["function"] = tiny | {"module": f"{TINY}:tinny"}

    with pytest.raises(MicrotomeError) as error:
        preflight.check(planner.make(run_experiment.parse(experiment)))
    said = str(error.value)
    told = {
        name: next((line for line in said.splitlines() if f"network '{name}' on 'scenes': " in line), "")
        for name in experiment["networks"]
    }
    expected = {
        "missing": ("missing.safetensors", "1 keys missing (3.bias)"),
        "extra": ("extra.safetensors", "1 keys too many (4.bias)"),
        "shape": ("shape.safetensors", "3.weight (4, 5), expected (3, 5)"),
        "truncated": ("truncated.safetensors", "cannot be read: truncated"),
        "empty": ("empty.pt", "is empty (0 bytes)"),
        "code": ("code.pt", "is refused: it holds pickled objects"),
        "layer": ("'0.one'", "nearest"),
        "function": ("'tinny'", "nearest: tiny"),
    }
    assert {name: [part for part in parts if part not in told[name]] for name, parts in expected.items()} == {
        name: [] for name in expected
    }, said
    assert not executed.exists()
    assert not written(tmp_path / "results")


def test_data_and_networks_that_are_not_there(tmp_path, experiment, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    tiny = experiment["networks"]["tiny"]

    def refused(**changes):
        with pytest.raises(MicrotomeError) as error:
            planner.make(run_experiment.parse(experiment | changes))
        assert not (tmp_path / "results").exists() or not written(tmp_path / "results")
        return str(error.value)

    assert "no images in empty" in refused(datasets={"photos": {"kind": "imagefolder", "root": "empty"}})
    assert "nosuch" in refused(datasets={"photos": {"kind": "imagefolder", "root": "nosuch"}})
    assert "no images" in refused(datasets={"scenes": {"kind": "scenes", "images": {"train": 0, "validation": 0}}})
    assert "nosuch.pt" in refused(networks={"tiny": tiny | {"weights": "nosuch.pt"}})
    assert "nosuch.py" in refused(networks={"tiny": tiny | {"module": "nosuch.py:tiny"}})
    assert "nearest: scenes" in refused(networks={"tiny": tiny | {"datasets": ["scene"]}})
