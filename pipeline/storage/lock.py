"""Locks: one run at a time on a results folder, one job at a time on shared layers.

Where the file system supports kernel locks, they are used, and a crash leaves none behind. Elsewhere, the lock on a
results folder is a file with a heartbeat: its holder rewrites it every few seconds. When the heartbeat stops, the lock
is free.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self

from pipeline.errors import MicrotomeError, explained
from pipeline.storage import SCRATCH

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
BEAT = 5.0  # seconds between heartbeats
PATIENCE = 4  # missed heartbeats after which a holder counts as dead


class RunLock:
    """The lock on a results folder. It ends with the process.

    Attributes: `left_open`, whether the previous run failed to release the lock; known once the lock is held.
    """

    def __init__(self, results: Path) -> None:
        self.path = results / SCRATCH / "lock"
        self.file: IO[str] | None = None
        self.left_open = False
        self.since = time.time()
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock, or raise `MicrotomeError` with host, pid and start time of the run that holds it."""
        if self.file is not None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
        except OSError as error:
            raise MicrotomeError(
                f"the results folder {self.path.parent.parent} cannot be written: {explained(error) or error.strerror}"
            ) from error
        beating = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse(file)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            if not self._abandoned(file):
                self._refuse(file)
            beating = True
        file.seek(0)
        self.left_open = bool(file.read())
        self.file = file
        self._write(0)
        if beating:
            # If two runs waited for the same dead holder, the last writer gets the lock.
            time.sleep(BEAT / 5)
            file.seek(0)
            if _parsed(file.read()).get("pid") != os.getpid():
                self.file = None
                self._refuse(file)
            threading.Thread(target=self._beat, daemon=True, name="lock").start()

    def release(self) -> None:
        """Release the lock and mark the folder as clean; do nothing if the lock is not held."""
        if self.file is None:
            return
        self._released.set()
        self.file.truncate(0)
        self.file.close()
        self.file = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock. If an earlier run left it open, keep that mark, so that the next run still cleans up."""
        if self.left_open and self.file is not None:
            self._released.set()
            self.file.close()
            self.file = None
        self.release()

    def _refuse(self, file: IO[str]) -> None:
        file.seek(0)
        holder = file.read()
        file.close()
        raise MicrotomeError(f"another run works on {self.path.parent.parent}: {_describe(holder)}")

    def _write(self, beat: int) -> None:
        assert self.file is not None
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": self.since, "folder": str(Path.cwd())}
        # Write a fixed length in one call, without emptying the file first: another run may be reading it.
        text = json.dumps(holder | {"beat": f"{beat:09d}"}).encode()
        os.pwrite(self.file.fileno(), text, 0)
        os.ftruncate(self.file.fileno(), len(text))

    def _beat(self) -> None:
        beat = 0
        while not self._released.wait(BEAT):
            beat += 1
            with contextlib.suppress(OSError, ValueError):  # the disk is full, or the lock was just released
                self._write(beat)

    def _abandoned(self, file: IO[str]) -> bool:
        """Return whether nobody holds the lock, on a file system without kernel locks."""

        def read() -> str:
            file.seek(0)
            return file.read()

        before = read()
        holder = _parsed(before)
        if not before or (holder.get("host") == socket.gethostname() and not _runs(holder.get("pid"))):
            return True
        end = time.monotonic() + PATIENCE * BEAT
        while time.monotonic() < end:
            time.sleep(BEAT / 5)
            if read() != before:
                return False
        return True


def taken_over(results: Path, host: str, pid: int) -> str | None:
    """Return why the lock on a results folder no longer belongs to process `pid` on `host`; None if it still does.

    A deleted lock file counts as lost, since it keeps no other run out.
    """
    try:
        holder = (results / SCRATCH / "lock").read_text()
    except OSError:
        return f"the lock on {results} was deleted while this run worked; another run may have written there"
    value = _parsed(holder)
    if (value.get("host"), value.get("pid")) == (host, pid):
        return None
    return f"the lock on {results} was deleted while this run worked; it now belongs to {_describe(holder)}"


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait for the lock `path` and hold it, so that jobs of one run take turns at writing the stores of shared layers.

    On a file system without locks, a lock in this machine's temporary folder takes its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            fcntl.flock(stack.enter_context(path.open("a")), fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:20]
            here = Path(tempfile.gettempdir(), f"microtome-{os.getuid()}-{name}.lock")
            fcntl.flock(stack.enter_context(here.open("a")), fcntl.LOCK_EX)
        yield


def _runs(pid: Any) -> bool:
    return isinstance(pid, int) and Path(f"/proc/{pid}").exists()


def _parsed(holder: str) -> dict[str, Any]:
    try:
        value = json.loads(holder)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _describe(holder: str) -> str:
    try:
        value = _parsed(holder)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value["since"]))
        return f"pid {value['pid']} on {value['host']}, in {value['folder']}, since {since}"
    except (KeyError, TypeError):
        return "an unknown holder"
