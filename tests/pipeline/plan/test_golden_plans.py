"""No id moves: every plan is the recorded one, step by step."""

import json

import pytest
from golden_plans import RECORD, plans

GOLDEN = json.loads(RECORD.read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return plans(tmp_path_factory.mktemp("golden"))


def test_the_same_configurations_are_recorded(made):
    assert list(made) == list(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_every_step_is_the_recorded_one(made, name):
    for found, recorded in zip(made[name], GOLDEN[name], strict=True):
        found = json.loads(json.dumps(found))
        changed = {key for key in recorded["settings"] if found["settings"].get(key) != recorded["settings"][key]}
        assert found == recorded, f"{recorded['step']}: {sorted(changed) or 'its parents'} changed, and with it the id"


def test_every_stage_is_among_them(made):
    assert {step["step"].split()[0] for step in made["everything"]} == {
        "ingest", "concepts", "randomize", "network", "extract", "dissect", "ablate", "calibrate", "sight", "probes",
        "grams", "similarity", "report",
    }  # fmt: skip
