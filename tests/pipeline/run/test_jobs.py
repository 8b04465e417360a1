"""Jobs are forked from one process, end with whoever asked for them, and run without that process as well."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from workflow_run import ROOT

from pipeline.run import jobs
from pipeline.workers import processes

SCRIPT = ROOT / "workflow" / "scripts" / "job.py"
# A job in place of the workflow's: it says what it was given, waits, and ends with a status.
STAND_IN = """
import os, sys, time, pathlib
def job(manifest, log):
    print(os.environ["GIVEN"], manifest, log, os.getppid(), flush=True)
    pathlib.Path(log).write_text(str(os.getpid()))
    try:
        time.sleep(float(manifest))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return 4
    return 3
from pipeline.workers import processes
run = job
def job(manifest, log):
    processes.interruptible()
    return run(manifest, log)
from pipeline.run import jobs
jobs.job = job
import socket
jobs.serve(socket.socket(fileno=int(sys.argv[1])))
"""


@pytest.fixture
def server(monkeypatch):
    """The process that forks jobs, with the stand-in for what a job does."""
    popen = subprocess.Popen

    def start(command, **options):
        assert command[1:3] == ["-m", "pipeline.run.jobs"]
        return popen([command[0], "-c", STAND_IN, command[3]], **options)

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(jobs.subprocess, "Popen", start)
    found = jobs.start()
    monkeypatch.undo()
    assert found is not None
    yield found
    found.stop()


def asked(seconds: float, log: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, SCRIPT, str(seconds), log],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"GIVEN": "given", "PYTHONPATH": str(ROOT)},
    )


def process_of(log: Path) -> psutil.Process:
    """The process of a stand-in's job, once it has begun."""
    for _ in range(600):
        if log.exists() and log.read_text():
            return psutil.Process(int(log.read_text()))
        time.sleep(0.05)
    raise TimeoutError


def test_a_job_has_the_streams_the_environment_and_the_status(server, tmp_path):
    client = asked(0, tmp_path / "log")
    said, _ = client.communicate(timeout=60)
    assert said == f"given 0 {tmp_path / 'log'} {server.process.pid}\n"
    assert client.returncode == 3


def test_jobs_run_side_by_side_and_leave_nothing(server, tmp_path):
    clients = [asked(0.5, tmp_path / f"log{number}") for number in range(4)]
    pids = {process_of(tmp_path / f"log{number}").pid for number in range(4)}
    assert len(pids) == 4
    for client in clients:
        client.communicate(timeout=60)
    time.sleep(0.2)
    assert psutil.Process(server.process.pid).children() == [], "not even zombies"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_client_reaches_the_job(server, tmp_path, number):
    client = asked(600, tmp_path / "log")
    process_of(tmp_path / "log")
    client.send_signal(number)
    said, _ = client.communicate(timeout=10)
    assert said.endswith("interrupted\n")
    assert client.returncode == 4


def test_a_killed_client_ends_its_job(server, tmp_path):
    client = asked(600, tmp_path / "log")
    job = process_of(tmp_path / "log")
    client.kill()
    client.communicate()
    assert psutil.wait_procs([job], timeout=5)[1] == []


def test_a_killed_job_is_reported(server, tmp_path):
    client = asked(600, tmp_path / "log")
    process_of(tmp_path / "log").kill()
    client.communicate(timeout=5)
    assert client.returncode == 128 + signal.SIGKILL


def test_a_job_outlives_the_process_that_forked_it(server, tmp_path):
    client = asked(1, tmp_path / "log")
    process_of(tmp_path / "log")
    server.process.kill()
    client.communicate(timeout=10)
    assert client.returncode == 3


def test_what_jobs_share_has_one_thread():
    """Only then a fork at any moment is safe."""
    names = ", ".join(jobs.PRELOADED)
    code = f"import pipeline.run.jobs, {names}, threading, sys; print(threading.active_count(), 'torch' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert said.stdout == "1 False\n"


def test_where_no_process_forks_jobs_each_is_its_own(monkeypatch, tmp_path):
    """The address is stale, or there is none: the job then runs in the process that Snakemake started, and says why."""
    monkeypatch.setenv(processes.PLAN, str(tmp_path / "no plan"))
    for path in (None, str(tmp_path / "gone")):
        if path is not None:
            monkeypatch.setenv(jobs.SOCKET, path)
        done = subprocess.run(
            [sys.executable, SCRIPT, "results/done/a.json", tmp_path / "log"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 1
        assert "no plan" in done.stderr
