"""Processes of one run: who started them, whether that one still lives, and which are left of a run that does not.

The main process names itself in an environment variable. Jobs end when it is gone, however it went: otherwise they
would go on writing into a results folder that the next run has taken over. The pool of workers has its own line to it
(`pipeline.workers.pool`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from pipeline.errors import MicrotomeError

MAIN = "MICROTOME_MAIN"  # environment variable: host, pid and start of the main process
PLAN = "MICROTOME_PLAN"  # environment variable: the plan that the main process made, for its jobs


def in_own_process(module: str, request: Any, what: str) -> Any:
    """The answer of `python -m module request.json answer.json`, which may import what costs this process seconds.

    Raises `MicrotomeError`, beginning with `what`, if the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(request))
        process = subprocess.run(
            [sys.executable, "-m", module, str(asked), str(answered)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            stdout=sys.stderr,
        )
        if process.returncode:
            raise MicrotomeError(f"{what} failed with exit status {process.returncode}")
        return json.loads(answered.read_bytes())


def announce() -> None:
    """In the main process: let those that it starts know who it is."""
    own = psutil.Process()
    os.environ[MAIN] = f"{socket.gethostname()} {own.pid} {own.create_time():.2f}"


def main() -> tuple[str, int, float] | None:
    """In a job: host, pid and start of the main process, where one announced itself."""
    if MAIN not in os.environ:
        return None
    host, pid, began = os.environ[MAIN].rsplit(" ", 2)
    return host, int(pid), float(began)


def end_with_main() -> None:
    """In a job: end within a second of the main process, when that runs on this machine."""
    if (known := main()) is None or known[0] != socket.gethostname():
        return
    _, pid, began = known

    def watch() -> None:
        while lives(pid, began):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end with main").start()


def lives(pid: int, began: float | None = None) -> bool:
    """Whether there is a process with this number that has not ended; with `began`, the one that began then."""
    try:
        process = psutil.Process(pid)
        # The clock that start times are read from may be adjusted by parts of a second.
        same = began is None or abs(process.create_time() - began) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def interruptible() -> None:
    """In a job: SIGTERM is Ctrl-C, and the first of them counts: Ctrl-C in a terminal is followed by the main process's
    SIGTERM. What hangs on the way out is cut off after 5 seconds."""

    interrupted = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal interrupted
        if interrupted:  # not SIG_IGN: Python prints a traceback of a signal that comes while it is being set
            return
        interrupted = True
        overdue = threading.Timer(5, lambda: os._exit(1))
        overdue.daemon = True
        overdue.start()
        raise KeyboardInterrupt

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, interrupt)


def descendants(but: Iterable[int] = ()) -> list[psutil.Process]:
    """All processes below this one, without those with these numbers and what is below them."""
    found = []
    for child in psutil.Process().children():
        if child.pid not in but:
            found.append(child)
            with contextlib.suppress(psutil.NoSuchProcess):
                found += child.children(recursive=True)
    return found


def ask_to_end(processes: Iterable[psutil.Process], number: int = signal.SIGTERM) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def end_leftovers(plans: Path, seconds: float = 10) -> int:
    """End what is left of earlier runs: processes of this machine whose plan lies in this folder, but not our own.

    They end by themselves when their main process has gone; those that do not within `seconds` are killed. Returns how
    many there were. To be called by who holds the lock on the results folder.
    """
    own = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            plan = process.environ().get(PLAN)
            if plan and Path(plan).resolve().parent == plans.resolve() and process.pid not in own:
                left.append(process)
    _, hanging = psutil.wait_procs(left, timeout=seconds)
    ask_to_end(hanging, signal.SIGKILL)
    psutil.wait_procs(hanging, timeout=5)
    return len(left)
