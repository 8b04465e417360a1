"""Both ways to run on SLURM, on a real one: a controller, a node and their keys, started here for this test."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from workflow_run import ROOT, contents, jobs_run, mini, snakemake

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
PLUGIN = Path(sys.executable).parent.parent / "slurm"
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/socket
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
MinJobAge=600
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=200000
PartitionName=long Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a SLURM with one node, which is this machine; its node claims 16 cores."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking or os.geteuid():
        pytest.skip(f"a real SLURM needs {', '.join(lacking) or 'root'} (Debian: slurmctld slurmd slurm-client munge)")
    folder = tmp_path / "slurm"
    for part in (folder, folder / "state", folder / "spool"):
        part.mkdir(mode=0o755)
    key, host = folder / "key", socket.gethostname().partition(".")[0]
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    ports = dict(zip(("controller", "node"), free_ports(2), strict=True))
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=host, folder=folder, **ports))
    monkeypatch.setenv("SLURM_CONF", str(configuration))
    # Snakemake's plugin takes all variables of SLURM from its jobs, and with them where this one is.
    (folder / "bin").mkdir()
    (folder / "bin" / "srun").write_text(f'#!/bin/sh\nSLURM_CONF={configuration} exec {shutil.which("srun")} "$@"\n')
    (folder / "bin" / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    files = [f"--{each}={folder / each}" for each in ("socket", "pid-file", "log-file", "seed-file")]
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *files],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", host],
    ]
    started = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("w") as out:
                started.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
            time.sleep(1)
        deadline = time.monotonic() + 60
        while "idle" not in asked("sinfo", "--noheader", "--format=%T"):
            assert time.monotonic() < deadline, [path.read_text()[-2000:] for path in folder.glob("*.out")]
            time.sleep(0.5)
        yield folder
    finally:
        subprocess.run(["scancel", "--user=root"], check=False, capture_output=True)
        for process in reversed(started):
            process.terminate()
            process.wait(30)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def asked(*command: str) -> str:
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout


def test_both_ways(slurm, tmp_path, monkeypatch):
    """Jobs of Snakemake, and workers of a pool: the same bytes as without SLURM, and no job is left behind."""
    plain, by_jobs, by_workers = (tmp_path / name for name in ("plain", "jobs", "workers"))
    for folder in (plain, by_jobs, by_workers):
        folder.mkdir()
    snakemake(plain, mini(workers=1), "dissect")

    queue = {"partition": "long", "walltime": "00:10:00", "processes": 2}
    snakemake(by_workers, mini(kind="slurm", workers=2, memory="2 GB", slurm=queue), "dissect")
    finished = asked("squeue", "--states=all", "--noheader", "--format=%j")
    assert "microtome" in finished.split()

    monkeypatch.setenv("PYTHONPATH", str(PLUGIN))
    profile = ("--workflow-profile", str(ROOT / "profiles/slurm"), "--slurm-no-account")
    quick = ("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2")
    said = snakemake(by_jobs, mini(workers=1), *profile, *quick, "dissect")
    assert sum(jobs_run(said).values()) == 5

    assert contents(by_workers / "results") == contents(by_jobs / "results") == contents(plain / "results")
    assert asked("squeue", "--noheader", "--states=pending,running,completing") == ""
