"""The most telling faults, on the miniature with one worker, no training and no report; `make chaos` runs all."""

import random
import sys
from pathlib import Path

import chaos
import damage
import kills
import pytest
import resources
import yaml
from case import ROOT, Case, NotPossibleError

from pipeline.workers import client

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by /proc")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A folder with the results of an undisturbed run, and the command that made them."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    wanted = yaml.safe_load((Path(__file__).parent / "miniature.yaml").read_text())
    net = wanted["networks"]["net"]
    net |= {"module": f"{ROOT}/tests/workflow/networks/tiny.py:tiny", "weights": "random"}
    del (
        net["train"],
        wanted["similarity"],
        wanted["sight"],
        wanted["randomize"],
    )  # of the network and its control, and of the network
    wanted["cluster"]["workers"] = 1
    (cwd / "miniature.yaml").write_text(yaml.safe_dump(wanted))
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "dissect",
        "--snakefile",
        f"{ROOT}/Snakefile",
        "--configfile",
        "miniature.yaml",
    ]
    chaos.undisturbed_run(command, cwd, cwd)
    (cwd / "results").rename(cwd / "undisturbed")
    return command, cwd


@pytest.fixture
def case(undisturbed, tmp_path, monkeypatch):
    monkeypatch.delenv(client.ADDRESS, raising=False)
    command, cwd = undisturbed
    made = Case(command, cwd, cwd / "results", cwd / "undisturbed", tmp_path, random.Random(0))
    yield made
    made.end_all()


def test_killed_interrupted_and_gone_on(case):
    outcome = kills.in_sequence(case, "concepts", "extract", "dissect")
    assert "shards: all" in outcome.kept
    assert outcome.compared == f"same, {len(case.truth)} files"


def test_damage_is_refused(case):
    (images,) = (group for group in damage.groups(case.undisturbed) if group == "images.zarr/image")
    happened = damage.refused(case, images, "flipped").happened
    assert happened.startswith("refused by name when ") and "nothing else" in happened
    readers = happened.removeprefix("refused by name when ").partition(" ran again")[0].split(", ")
    assert {"concepts", "extract"} <= set(readers)


def test_only_damage_is_made_again(case):
    assert damage.repair(case, "").compared == f"same, {len(case.truth)} files"


def test_a_full_disk(case):
    try:
        outcome = resources.disk_full(case, "extract")
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    assert "the disk is full" in outcome.happened
