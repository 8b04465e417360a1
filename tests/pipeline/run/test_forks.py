"""Jobs are forked from one process, end with whoever asked for them, and run without that process as well."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from workflow_run import ROOT

from pipeline.run import forks
from pipeline.workers import pool, processes

SCRIPT = ROOT / "workflow" / "scripts" / "job.py"
# A job in place of the workflow's: it says what it was given, waits, and ends with a status.
STAND_IN = """
import os, sys, time, pathlib
def work(manifest, log):
    print(os.environ["GIVEN"], os.environ["OMP_NUM_THREADS"], manifest, log, os.getppid(), flush=True)
    pathlib.Path(log).write_text(str(os.getpid()))
    try:
        time.sleep(float(manifest))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return 4
    return 3
from pipeline.workers import processes
def run_job(manifest, log):
    processes.interruptible()
    return work(manifest, log)
from pipeline.run import forks
forks.run_job = run_job
import socket
forks.serve(socket.socket(fileno=int(sys.argv[1])))
"""


@pytest.fixture
def server(monkeypatch):
    """The process that forks jobs, with the stand-in for what a job does."""
    popen = subprocess.Popen

    def start(command, **options):
        assert command[-2] == "pipeline.run.forks"
        return popen([command[0], "-c", STAND_IN, command[-1]], **options)

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(forks.subprocess, "Popen", start)
    found = forks.start()
    monkeypatch.undo()
    assert found is not None
    yield found
    pool.stop_pool(found)
    del os.environ[forks.SOCKET]


def asked(seconds: float, log: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, SCRIPT, str(seconds), log],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"GIVEN": "given", "OMP_NUM_THREADS": "8", "PYTHONPATH": str(ROOT)},
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
    assert said == f"given 1 0 {tmp_path / 'log'} {server.pid}\n"
    assert client.returncode == 3


def test_jobs_run_side_by_side_and_leave_nothing(server, tmp_path):
    clients = [asked(0.5, tmp_path / f"log{number}") for number in range(4)]
    pids = {process_of(tmp_path / f"log{number}").pid for number in range(4)}
    assert len(pids) == 4
    for client in clients:
        client.communicate(timeout=60)
    time.sleep(0.2)
    assert psutil.Process(server.pid).children() == [], "not even zombies"


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
    server.kill()
    client.communicate(timeout=10)
    assert client.returncode == 3


def test_the_socket_goes_with_the_process(server):
    folder = Path(os.environ[forks.SOCKET]).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    pool.stop_pool(server)
    assert not folder.exists()


def test_where_no_socket_can_be_made(monkeypatch, tmp_path, capfd):
    """A path of over 107 characters is none for a socket."""
    long = tmp_path / ("a" * 100)
    long.mkdir()
    monkeypatch.setattr(forks.tempfile, "tempdir", str(long))
    assert forks.start() is None
    assert "each job is a process of its own" in capfd.readouterr().err
    assert list(long.iterdir()) == []


@pytest.fixture
def listener(monkeypatch, tmp_path):
    """A process for jobs that does what a test wants."""
    with socket.socket(socket.AF_UNIX) as found:
        path = str(tmp_path / "s")
        found.bind(path)
        found.listen(1)
        monkeypatch.setenv(forks.SOCKET, path)
        monkeypatch.setenv(processes.PLAN, str(tmp_path / "no plan"))
        yield found


def test_a_signal_before_the_job_begins_ends_it(listener, tmp_path):
    """Nothing has been forked that could answer: the client does not do the job after it was told to end."""
    client = asked(0, tmp_path / "log")
    connection, _ = listener.accept()
    connection.recv(4)
    time.sleep(0.3)
    client.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    connection.close()
    client.communicate(timeout=10)
    assert client.returncode == 128 + signal.SIGTERM


def test_a_job_that_fails_before_it_begins_is_done_by_the_client(listener, tmp_path):
    client = asked(0, tmp_path / "log")
    connection, _ = listener.accept()
    connection.send(bytes([1]))
    connection.close()
    _, said = client.communicate(timeout=30)
    assert client.returncode == 1 and "no plan" in said


def test_what_jobs_share_has_one_thread():
    """Only then a fork at any moment is safe."""
    names = ", ".join(forks.PRELOADED)
    code = (
        f"import pipeline.run.forks, {names}, threading, sys; print(threading.active_count(), 'torch' in sys.modules)"
    )
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
            monkeypatch.setenv(forks.SOCKET, path)
        done = subprocess.run(
            [sys.executable, SCRIPT, "results/done/a.json", tmp_path / "log"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 1
        assert "no plan" in done.stderr
