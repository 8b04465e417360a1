"""A network that drops the batch of one image is refused where a stage may give it one image alone."""

import pytest
from experiments import scenes

from pipeline.errors import MicrotomeError
from pipeline.networks import inspection
from pipeline.plan import inspected
from pipeline.run import experiment, planner, preflight

NETWORK = """
from torch import nn


class Net(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 12)
        self.how = how

    def forward(self, x):
        pooled = self.pool(self.conv(x))
        if self.how == "fails" and len(x) < 2:
            raise ValueError("too few images")
        return self.head(pooled.squeeze() if self.how == "squeeze" else pooled.flatten(1))


def net(how):
    return Net(how)
"""
SAID = {"squeeze": r"it returns \(12,\), expected \(1, 12\)", "fails": "it fails: ValueError: too few images"}


def check(folder, monkeypatch, how, **more):
    monkeypatch.setattr(inspected, "in_own_process", lambda _, requests, what: inspection.answer(requests))
    (folder / "net.py").write_text(NETWORK)
    net = {"module": f"{folder / 'net.py'}:net", "arguments": {"how": how}, "weights": "random", "layers": ["conv"]}
    raw = scenes(folder, networks={"net": net | more})
    preflight.check(planner.make(experiment.parse(raw)))


@pytest.mark.parametrize("how", SAID)
def test_a_micro_batch_of_one_image_is_refused(tmp_path, monkeypatch, how):
    message = rf"'net' on 'scenes', numerics.micro_batch: it cannot take one image alone \({SAID[how]}\)"
    with pytest.raises(MicrotomeError, match=message):
        check(tmp_path, monkeypatch, how, numerics={"micro_batch": 1})
    check(tmp_path, monkeypatch, how, numerics={"micro_batch": 2})


@pytest.mark.parametrize("how", SAID)
def test_ablation_is_refused(tmp_path, monkeypatch, how):
    message = rf"'net' on 'scenes', ablate: it cannot take one image alone \({SAID[how]}\), and a unit may change one"
    with pytest.raises(MicrotomeError, match=message):
        check(tmp_path, monkeypatch, how, ablate={"layers": ["conv"]})


def test_other_networks_take_one_image(tmp_path, monkeypatch):
    check(tmp_path, monkeypatch, "flatten", numerics={"micro_batch": 1}, ablate={"layers": ["conv"]})
