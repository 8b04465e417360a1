"""One run at a time on a results folder."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.errors import MicrotomeError
from pipeline.storage.lock import RunLock, one_at_a_time, taken_over

ROOT = Path(__file__).parents[3]
HOLD = "import sys; from pathlib import Path; from pipeline.storage.lock import RunLock; "
HOLD += "lock = RunLock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def other_run(tmp_path):
    """Another process that holds the lock on `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_second_run_is_told_who_holds_it(tmp_path, other_run):
    with pytest.raises(MicrotomeError, match=rf"another run works on .*: pid {other_run.pid} on .*, since 20"):
        RunLock(tmp_path).acquire()


def test_a_killed_run_leaves_nothing_behind(tmp_path, other_run):
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.acquire()  # again by the same run: nothing to do
    assert f'"pid": {os.getpid()}' in lock.path.read_text()
    lock.file.close()


def test_two_results_folders(tmp_path):
    locks = [RunLock(tmp_path / name) for name in "ab"]
    for lock in locks:
        lock.acquire()
    with pytest.raises(MicrotomeError, match="another run"):
        RunLock(tmp_path / "a").acquire()
    for lock in locks:
        lock.file.close()
    locks[0].file = None
    locks[0].acquire()
    locks[0].file.close()


def test_a_holder_who_has_not_said_who_it_is(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.path.write_text('{"half')
    with pytest.raises(MicrotomeError, match="an unknown holder"):
        RunLock(tmp_path).acquire()
    lock.file.close()


def test_a_results_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(MicrotomeError, match=r"results cannot be written: (Not a directory|File exists)"):
        RunLock(tmp_path / "results").acquire()


@pytest.fixture
def no_kernel_locks(monkeypatch):
    """A file system that has none, and a holder that shows signs of life ten times a second."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("pipeline.storage.lock.fcntl.flock", refuse)
    monkeypatch.setattr("pipeline.storage.lock.BEAT", 0.1)


@pytest.mark.usefixtures("no_kernel_locks")
def test_without_kernel_locks_a_living_holder_is_respected(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    assert not lock.left_open
    with pytest.raises(MicrotomeError, match=f"another run works on .*: pid {os.getpid()} on"):
        RunLock(tmp_path).acquire()
    lock.release()
    second = RunLock(tmp_path)
    second.acquire()
    assert not second.left_open, "the first gave it back"
    second.release()


@pytest.mark.usefixtures("no_kernel_locks")
@pytest.mark.parametrize("host", ["this", "another"])
def test_without_kernel_locks_a_dead_holder_is_not_waited_for_long(tmp_path, host):
    """On this machine its number says that it has ended; on another one it shows no sign of life."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lock = RunLock(tmp_path)
    lock.path.parent.mkdir()
    name = socket.gethostname() if host == "this" else "another-host"
    lock.path.write_text(json.dumps({"host": name, "pid": gone.pid, "since": 0, "folder": "x", "beat": 3}))
    began = time.monotonic()
    lock.acquire()
    assert lock.left_open
    assert time.monotonic() - began < (0.3 if host == "this" else 2)
    lock.release()


@pytest.mark.usefixtures("no_kernel_locks")
def test_a_holder_is_never_seen_half_written(tmp_path):
    """Its signs of life are read at any moment by who waits."""
    lock = RunLock(tmp_path)
    lock.acquire()
    stop = threading.Event()

    def beat():
        for number in range(10**9):
            if stop.is_set():
                return
            lock._write(number % 1000)

    beating = threading.Thread(target=beat)
    beating.start()
    seen = [lock.path.read_text() for _ in range(3000)]
    stop.set()
    beating.join()
    lock.release()
    assert {json.loads(text)["pid"] for text in seen} == {os.getpid()}


def test_what_a_run_leaves_in_the_lock(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.file.close()  # as a killed process leaves it
    after = RunLock(tmp_path)
    after.acquire()
    assert after.left_open
    after.release()
    assert after.path.read_text() == ""
    after.release()  # again: nothing to do


def test_a_lock_that_was_taken_away(tmp_path, other_run):
    own = socket.gethostname(), os.getpid()
    assert "it now belongs to pid" in taken_over(tmp_path, *own)
    assert taken_over(tmp_path, socket.gethostname(), other_run.pid) is None
    assert "deleted" in taken_over(tmp_path / "elsewhere", *own)


@pytest.mark.parametrize("kernel", [True, False])
def test_one_job_at_a_time(tmp_path, kernel, monkeypatch):
    if not kernel:
        flock, refused = fcntl.flock, str(tmp_path / "layers.lock")

        def only_elsewhere(file, operation):
            if file.name == refused:
                raise OSError(errno.ENOTSUP, "Operation not supported")
            flock(file, operation)

        monkeypatch.setattr("pipeline.storage.lock.fcntl.flock", only_elsewhere)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    inside, most = [], []

    def job():
        with one_at_a_time(tmp_path / "layers.lock"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    jobs = [threading.Thread(target=job) for _ in range(5)]
    for each in jobs:
        each.start()
    for each in jobs:
        each.join()
    assert most == [1] * 5
