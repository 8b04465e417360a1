"""The profiles: what they share, and that SLURM would be asked for what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from workflow_run import ROOT, mini, snakemake

from pipeline.errors import MicrotomeError
from pipeline.run import experiment, planner
from pipeline.run.workflow import Run
from pipeline.stages.registry import STAGES

SHARED = {"rerun-triggers": ["params"], "rerun-incomplete": True, "nolock": True}
PLUGIN = Path(sys.executable).parent.parent / "slurm"  # installed apart: it adds a second to every start of snakemake


def profile(name):
    return yaml.safe_load((ROOT / "profiles" / name / "config.yaml").read_text())


@pytest.mark.parametrize("name", ["default", "local", "gpu", "slurm"])
def test_what_every_profile_says(name):
    assert profile(name).items() >= SHARED.items()


def test_the_profile_of_slurm_names_every_rule():
    rules = {f"make_{stage}" for stage in STAGES}
    assert set(profile("slurm")["set-threads"]) == rules
    assert set(profile("slurm")["set-resources"]) <= rules


SBATCH = """#!/usr/bin/env bash
echo "$@" >> asked
echo "sbatch: error: this is a stand-in" >&2
exit 1
"""


def test_the_profile_of_slurm(tmp_path, monkeypatch):
    """A dry run; then what `sbatch` is asked, by stand-ins for the commands of SLURM: this one refuses every job."""
    (tmp_path / "bin").mkdir()
    said_by = {"sbatch": SBATCH} | dict.fromkeys(
        ("sinfo", "squeue", "sacct", "sacctmgr"), "#!/usr/bin/env bash\necho lab\n"
    )
    for name, text in said_by.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(PLUGIN))
    arguments = ["--workflow-profile", str(ROOT / "profiles/slurm"), "--slurm-no-account"]

    said = snakemake(tmp_path, mini(workers=1), *arguments, "--dry-run")
    assert len(re.findall(r"^Job \d+: ", said, re.M)) == 6
    assert "mem_mb=4000" in said and "runtime=60" in said
    assert not (tmp_path / "asked").exists()

    said = snakemake(tmp_path, mini(workers=1), *arguments, code=1)
    asked = {line.partition("--comment rule_")[2].partition("_wild")[0]: line for line in jobs(tmp_path)}
    assert set(asked) == {"make_ingest", "make_network"}
    for part in ("-t 60 ", "--mem 32000 ", "--cpus-per-task=8", "--export=ALL"):
        assert part in asked["make_ingest"]
    for part in ("-t 1440 ", "--mem 4000 ", "--cpus-per-task=1"):
        assert part in asked["make_network"]
    # Jobs have pools of their own: none was started here.
    assert not list((tmp_path / "results" / ".microtome").glob("pool-*"))
    assert not (tmp_path / "results" / ".microtome" / "dask").exists()


def test_a_forgotten_configfile_is_said(tmp_path):
    command = [Path(sys.executable).with_name("snakemake"), "--snakefile", ROOT / "Snakefile", "--dry-run", "--quiet"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([*command, "--config", "only=nothing"], cwd=tmp_path, capture_output=True, env=environment)
    said = (done.stdout + done.stderr).decode()
    assert f"no --configfile was given: taking {ROOT / 'config/config.yaml'}" in said
    assert "only=nothing: no network or data set has this name" in said and not (tmp_path / "results").exists()


def jobs(folder):
    """What `sbatch` was asked, a line a job."""
    return (folder / "asked").read_text().splitlines()


def test_a_queue_within_a_queue_is_refused(tmp_path):
    asked = planner.make(experiment.parse(mini(kind="slurm", workers=2, memory="4 GB") | {"results": str(tmp_path)}))
    run = object.__new__(Run)
    run.plan, run.refused = asked, None
    with pytest.raises(MicrotomeError, match="jobs of Snakemake that ask SLURM for jobs"):
        run.start(elsewhere=True)


def test_the_profile_of_gpus_asks_for_them(tmp_path, monkeypatch):
    """It takes the place of the queue that a configuration names, but for its workers, too many where no GPU is."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpus = ("--workflow-profile", str(ROOT / "profiles/gpu"), "dissect")
    queue = {"kind": "slurm", "memory": "4 GB", "slurm": {"partition": "long"}}
    assert "torch sees 0 GPUs here for 1 workers" in snakemake(tmp_path, mini(workers=1, **queue), *gpus, code=1)
