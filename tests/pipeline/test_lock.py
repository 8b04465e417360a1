"""One run at a time on a results folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import MicrotomeError
from pipeline.lock import RunLock

ROOT = Path(__file__).parents[2]
HOLD = "import sys; from pathlib import Path; from pipeline.lock import RunLock; lock = RunLock(Path(sys.argv[1])); "
HOLD += "lock.acquire(); print('held', flush=True); sys.stdin.read()"


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
    with pytest.raises(MicrotomeError, match="not said who it is"):
        RunLock(tmp_path).acquire()
    lock.file.close()


def test_a_results_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(MicrotomeError, match=r"results cannot be written: (Not a directory|File exists)"):
        RunLock(tmp_path / "results").acquire()
