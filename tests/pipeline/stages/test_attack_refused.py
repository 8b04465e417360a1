"""What the section `attack` refuses, by key, before any work."""

import pytest
from attacks import experiment
from experiments import VIT, tiny

from pipeline.errors import MicrotomeError
from pipeline.run import experiment as run_experiment
from pipeline.run import planner, preflight

REFUSED = [
    ({"pairs": [["frm", "farm"]]}, r"attack.fooled.pairs: no class 'frm' in data set 'scenes'.*farm"),
    ({"pairs": [["farm", "farm"]]}, r"attack.fooled.pairs: both classes are 'farm'"),
    ({"pairs": [[3, 3]]}, r"attack.fooled.pairs: both classes are 3"),
    ({"pairs": [["farm", 4], [3, 4]]}, r"attack.fooled.pairs: .* is named twice, by name or by index"),
    ({"pairs": [[12, 3]], "start": "label"}, r"attack.fooled.pairs: no image has class 12"),
    ({"pairs": [], "untargeted": False}, r"pairs: name pairs of classes"),
    ({"norms": {"linf": [-2]}}, r"norms.linf"),
    ({"norms": {"linf": [0.5]}}, r"norms.linf"),
    ({"norms": {"l2": [0]}}, r"norms.l2"),
    ({"norms": {}}, r"norms: 'pgd' needs bounds"),
    ({"norms": {"l2": [1.0]}}, r"methods: `square` is of linf"),
    ({"methods": ["cw_l2"]}, r"norms: `cw_l2` has no bound"),
    ({"methods": ["pgd", "pgd"]}, r"'pgd' is named twice"),
    ({"steps": 0}, r"steps"),
    ({"split": "tset"}, r"attack.fooled.split"),
    ({"networks": ["cn"]}, r"attack.fooled: no network 'cn'.*cnn"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda each: str(each)[:40])
def test_refused_by_key(tmp_path, change, message):
    with pytest.raises(MicrotomeError, match=message):
        planner.make(run_experiment.parse(experiment(tmp_path, **change)))


LESS = """
import torch
from torch import nn


class Cut(nn.Module):
    def forward(self, x):
        return x.detach()


def flat(classes=12):
    return nn.Sequential(Cut(), nn.Conv2d(3, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.mark.slow
def test_refused_by_the_inspection(tmp_path):
    """What the network lacks, all at once."""
    raw = experiment(tmp_path, pairs=[[3, 99]])
    (tmp_path / "less.py").write_text(LESS)
    raw["networks"]["flat"] = {"module": f"{tmp_path / 'less.py'}:flat", "weights": "random", "layers": []}
    raw["networks"]["few"] = tiny(tmp_path, arguments={"classes": 3})
    of_any = {"untargeted": True, "pairs": [], "norms": {"linf": [2]}, "methods": ["apgd_dlr"]}
    raw["attack"]["flat"] = {"networks": ["flat"], **of_any}
    raw["attack"]["few"] = {"networks": ["few"], **of_any, "pairs": [[0, 1]], "start": "predicted"}
    raw["attack"]["other"] = {"networks": ["few"], **of_any}
    with pytest.raises(MicrotomeError) as error:
        preflight.check(planner.make(run_experiment.parse(raw)))
    for told in (
        r"attack.fooled.pairs: class 99 of network 'cnn', which gives 12 logits",
        r"attack.flat: network 'flat': .*gradient",
        r"attack.few.methods: the targeted `apgd_dlr` needs 4 classes, and network 'few' gives 3 logits: use `apgd_ce`",
        r"attack.other: network 'few' gives 3 logits, and the images of 'scenes' have 12 classes.*start: predicted",
    ):
        assert error.match(told), told


def test_a_transformer_may_be_attacked(tmp_path):
    """Settings that fit are not refused, whatever the network."""
    (tmp_path / "vit.py").write_text(VIT)
    raw = experiment(tmp_path, networks=["vit"])
    raw["networks"]["vit"] = {"module": f"{tmp_path / 'vit.py'}:vit", "weights": "random", "layers": []}
    plan = planner.make(run_experiment.parse(raw))
    assert plan.step("attack", "scenes", "vit", "fooled").settings["ranked"] is False
