"""No id moves: every plan is the recorded one, step by step."""

import json

import pytest
from golden_plans import RECORD, plans

GOLDEN = json.loads(RECORD.read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return plans(tmp_path_factory.mktemp("golden"))


def by_name(steps):
    """The steps of a plan by name, whatever their order; that of the parents of each stays."""
    found = {step["step"]: step for step in steps}
    assert len(found) == len(steps), "a name stands for one step"
    return found


def test_the_same_configurations_are_recorded(made):
    assert list(made) == list(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_every_step_is_the_recorded_one(made, name):
    steps, golden = by_name(json.loads(json.dumps(made[name]))), by_name(GOLDEN[name])
    assert steps.keys() == golden.keys()
    for step, recorded in golden.items():
        found, settings = steps[step], steps[step]["settings"]
        changed = {
            key for key in {*settings, *recorded["settings"]} if settings.get(key) != recorded["settings"].get(key)
        }
        assert found == recorded, f"{step}: {sorted(changed) or 'its parents'} changed, and with it the id"


def test_parents_come_before_their_children(made):
    for steps in made.values():
        done = set()
        for step in steps:
            assert set(step["parents"]) <= done, step["step"]
            done.add(step["step"])


def test_every_stage_is_among_them(made):
    assert {step["step"].split()[0] for step in made["everything"]} == {
        "ingest", "concepts", "randomize", "network", "extract", "dissect", "ablate", "calibrate", "sight", "probes",
        "grams", "similarity", "report",
    }  # fmt: skip
