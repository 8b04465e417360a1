"""The most telling faults, on the miniature with weights that are drawn and not trained; `make chaos` runs all."""

import random
import sys
from pathlib import Path

import chaos
import damage
import kills
import pytest
import resources
import two_runs
import yaml
from case import ROOT, Case, NotPossibleError

from pipeline import cluster

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by /proc")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A folder with the results of an undisturbed run, and the command that made them."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    wanted = yaml.safe_load((Path(__file__).parent / "miniature.yaml").read_text())
    net = wanted["networks"]["net"]
    net |= {"module": f"{ROOT}/tests/workflow/networks/tiny.py:tiny", "weights": "random"}
    del net["train"]
    (cwd / "miniature.yaml").write_text(yaml.safe_dump(wanted))
    command = [sys.executable, "-m", "snakemake", "--snakefile", f"{ROOT}/Snakefile", "--configfile", "miniature.yaml"]
    chaos.undisturbed_run(command, cwd, cwd)
    (cwd / "results").rename(cwd / "undisturbed")
    return command, cwd


@pytest.fixture
def case(undisturbed, tmp_path, monkeypatch):
    monkeypatch.delenv(cluster.ADDRESS, raising=False)
    command, cwd = undisturbed
    made = Case(command, cwd, cwd / "results", cwd / "undisturbed", tmp_path, random.Random(0))
    yield made
    made.end_all()


def test_killed_twice(case):
    outcome = kills.everything_twice(case, "")
    assert outcome.compared == f"same, {len(case.truth)} files"


def test_snakemake_alone_is_killed(case):
    assert "shards: all" in kills.snakemake_alone(case, "extract").kept


def test_sigterm(case):
    assert "no process left" in kills.sigterm(case, "dissect").happened


def test_damage_is_refused_found_and_repaired(case):
    (images,) = (group for group in damage.groups(case.undisturbed) if group == "images.zarr/image")
    assert "concepts, extract" in damage.refused(case, images, "flipped").happened
    assert damage.repair(case, "").compared == f"same, {len(case.truth)} files"


def test_a_full_disk(case):
    try:
        outcome = resources.disk_full(case, "0.4")
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    assert "the disk is full" in outcome.happened


def test_two_runs_of_which_none_holds_the_lock(case):
    assert "third run" in two_runs.without_lock(case, "extract").happened
