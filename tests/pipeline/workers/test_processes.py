"""Jobs end with the run that started them, answer to SIGTERM, and are found when they do not."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.config.cluster import Cluster
from pipeline.workers import client, processes

ROOT = Path(__file__).parents[3]
JOB = """
import sys, time
from pipeline.workers import processes
processes.end_with_main()
processes.interruptible()
try:
    print("works", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    {then}
"""
MAIN = """
import subprocess, sys, time
from pipeline.workers import processes
processes.announce()
job = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
print(job.pid, flush=True)
time.sleep(600)
"""


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


@pytest.fixture
def started():
    found: list[subprocess.Popen] = []
    yield found
    for process in found:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_a_job_ends_with_the_main_process(started):
    main = start(MAIN, JOB.format(then=""))
    started.append(main)
    job = psutil.Process(int(main.stdout.readline()))
    assert main.stdout.readline() == "works\n"
    time.sleep(0.7)
    assert job.is_running()
    main.send_signal(signal.SIGKILL)
    main.wait()
    assert psutil.wait_procs([job], timeout=5)[1] == []
    assert f"this job ends: the main process of this run, pid {main.pid}, is gone" in main.stderr.read()


def test_a_job_of_a_main_process_elsewhere_is_left_alone(started):
    job = start(JOB.format(then=""), MICROTOME_MAIN="another host 1 0.0")
    started.append(job)
    assert job.stdout.readline() == "works\n"
    time.sleep(1.2)
    assert job.poll() is None


def test_sigterm_is_an_interrupt(started):
    job = start(JOB.format(then="sys.exit(3)"))
    started.append(job)
    job.stdout.readline()
    job.terminate()
    assert job.wait(5) == 3
    assert job.stdout.read() == "interrupted\n"


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_that_is_followed_by_sigterm_is_one_interrupt(started, first):
    job = start(JOB.format(then="time.sleep(0.5); sys.exit(3)"))
    started.append(job)
    job.stdout.readline()
    job.send_signal(first)
    assert job.stdout.readline() == "interrupted\n"
    job.send_signal(signal.SIGTERM)
    job.send_signal(signal.SIGINT)
    assert job.wait(5) == 3


def test_what_hangs_after_sigterm_is_cut_off(started):
    job = start(JOB.format(then="time.sleep(600)"))
    started.append(job)
    job.stdout.readline()
    began = time.monotonic()
    job.terminate()
    assert job.wait(10) == 1
    assert 4 < time.monotonic() - began < 9


def test_whether_a_process_lives():
    own = psutil.Process()
    assert processes.lives(own.pid, processes.started(own.pid))
    assert not processes.lives(own.pid, processes.started(own.pid) - 60), "another process had this number before"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    began = processes.started(gone.pid)
    time.sleep(1)
    assert not processes.lives(gone.pid, began), "a zombie"
    gone.wait()
    assert not processes.lives(gone.pid, began)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system gives no ticks since boot")
@pytest.mark.parametrize("step", [-5, -0.5, 3600], ids=["5 s back", "half a second back", "1 h on"])
def test_a_clock_that_is_set_ends_no_job(monkeypatch, step):
    """When the wall clock is set, the system moves the time at which it says that it booted, and all that follows."""
    began, boot = processes.started(os.getpid()), psutil.boot_time()
    monkeypatch.setenv(processes.MAIN, f"{socket.gethostname()} {os.getpid()} {began}")
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot + step)
    assert processes.lives(os.getpid(), began)
    assert processes.orphaned() is None


def test_a_name_of_a_program_that_looks_like_the_end_of_its_name(tmp_path):
    program = tmp_path / ") R 1 2 3"
    program.symlink_to(sys.executable)
    process = subprocess.Popen([program, "-c", "import time; print(1, flush=True); time.sleep(60)"], stdout=-1)
    with process:
        process.stdout.readline()
        assert processes.started(process.pid) >= processes.started(os.getpid())
        process.kill()


def test_what_is_left_of_an_earlier_run_is_ended(tmp_path, started):
    """Only what belongs to this results folder; what does not end by itself is killed."""
    plans = tmp_path / "plans"
    left, other = (
        start(JOB.format(then=""), MICROTOME_PLAN=str(folder / "a.json")) for folder in (plans, tmp_path / "other")
    )
    started += [left, other]
    for process in started:
        process.stdout.readline()
    assert processes.end_leftovers(plans, seconds=0.2) == 1
    assert left.poll() is not None
    assert other.poll() is None
    assert processes.end_leftovers(plans) == 0


def test_no_process_imports_from_the_working_folder(tmp_path, monkeypatch):
    """Those that the pool starts for its workers neither."""
    for name in ("pipeline", "kernels", "torch", "yaml", "numpy", "distributed", "json", "multiprocessing"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working folder was imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(client.ADDRESS, raising=False)
    assert processes.in_own_process("pipeline.networks.inspection", [], "the inspection") == []
    with client.client(Cluster(workers=1), tmp_path / "scratch") as workers:
        (found,) = workers.run(lambda: (sys.path, str(Path.cwd()))).values()
    assert found[1] == str(tmp_path) and not {"", ".", str(tmp_path)} & set(found[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what is ignored")
def test_ctrl_c_does_nothing_to_our_programs_from_their_start_on(tmp_path):
    (tmp_path / "asked.json").write_text("[]")
    command = processes.program(
        "pipeline.networks.inspection", *map(str, (tmp_path / "asked.json", tmp_path / "a.json"))
    )
    process = subprocess.Popen(command, env=os.environ | processes.own_imports(), stderr=subprocess.PIPE, text=True)
    while not int(re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[0], 16) & 2:
        time.sleep(0.01)  # Python itself starts
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert (process.wait(), process.stderr.read()) == (0, "")
    process.stderr.close()
    assert (tmp_path / "a.json").read_text() == "[]"


def test_descendants(started):
    main = start(MAIN, JOB.format(then=""))
    started.append(main)
    job = int(main.stdout.readline())
    pids = [process.pid for process in processes.descendants()]
    assert main.pid in pids and job in pids
    assert not {main.pid, job} & {process.pid for process in processes.descendants(but=[main.pid])}
    processes.ask_to_end([psutil.Process(job)], signal.SIGKILL)
