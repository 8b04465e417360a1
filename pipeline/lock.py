"""Kernel locks, which no crash leaves behind: one run at a time on a results folder, one job on shared layers."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.errors import MicrotomeError


class RunLock:
    """The lock on a results folder: `acquire` it, or learn who holds it; it goes with the process."""

    def __init__(self, results: Path) -> None:
        self.path = results / ".microtome" / "lock"
        self.file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock, or raise `MicrotomeError` that names host, pid and start of the run that holds it."""
        if self.file is not None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+")
        except OSError as error:
            raise MicrotomeError(
                f"the results folder {self.path.parent.parent} cannot be written: {error.strerror}"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read()
            file.close()
            raise MicrotomeError(f"another run works on {self.path.parent.parent}: {_describe(holder)}") from None
        file.truncate(0)
        json.dump(
            {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time(), "folder": str(Path.cwd())}, file
        )
        file.flush()
        self.file = file


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait for the lock `path` and hold it: for what jobs of one run write together, the stores of shared layers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _describe(holder: str) -> str:
    try:
        value = json.loads(holder)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value["since"]))
        return f"pid {value['pid']} on {value['host']}, in {value['folder']}, since {since}"
    except (ValueError, KeyError, TypeError):
        return "it has not said who it is"
