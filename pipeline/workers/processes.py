"""Processes of one run: who started them, whether that process is alive, and what a dead run left behind.

The main process names itself in an environment variable. Jobs end when it is gone, for whatever reason; otherwise they
would keep writing into a results folder that the next run has taken over. The pool of workers has its own pipe to the
main process (`pipeline.workers.pool`).
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
from typing import Any, NoReturn

import psutil

from pipeline.errors import MicrotomeError

MAIN = "MICROTOME_MAIN"  # environment variable: host and pid of the main process, and when it started
SAFE_PATH = {"PYTHONSAFEPATH": "1"}  # as `python -P`, also of what Python starts: no import from the working folder
PLAN = "MICROTOME_PLAN"  # environment variable: the plan that the main process wrote for its jobs


def in_own_process(module: str, request: Any, what: str) -> Any:
    """Run `python -m module request.json answer.json` and return its answer.

    The module may import libraries that would take this process seconds. Raises `MicrotomeError`, beginning with
    `what`, if the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(request))
        process = subprocess.run(
            program(module, str(asked), str(answered)),
            env=os.environ | own_imports(),
            stdin=subprocess.DEVNULL,  # nobody answers
            stdout=sys.stderr,
        )
        if process.returncode:
            raise MicrotomeError(f"{what} failed with exit status {process.returncode}")
        return json.loads(answered.read_bytes())


def program(module: str, *arguments: str) -> list[str]:
    """Return the command of one of our programs, as `python -m module`, to which Ctrl-C does nothing from its start on.

    Whoever started it ends it, and answers the person.
    """
    return [sys.executable, "-c", _PROGRAM, module, *arguments]


_PROGRAM = (
    "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); del sys.argv[0]; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def own_imports() -> dict[str, str]:
    """Return the variables with which Python imports what this process imports, and nothing of the working folder.

    Users have files named `pipeline.py` or `torch.py` beside their configuration.
    """
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **SAFE_PATH}


def announce() -> None:
    """Announce this process as the main process to those that it starts."""
    pid = os.getpid()
    os.environ[MAIN] = f"{socket.gethostname()} {pid} {started(pid)}"


def started(pid: int) -> float:
    """Return when a process started, in clock ticks since boot, so that a wall clock that is set changes nothing.

    Where the system gives no ticks, return seconds of the wall clock. Raises `psutil.NoSuchProcess`.
    """
    try:
        # The name of the program, in parentheses, may hold anything.
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return psutil.Process(pid).create_time()


def main() -> tuple[str, int, float] | None:
    """Return host and pid of the main process, and when it `started`; None if no process announced itself."""
    if MAIN not in os.environ:
        return None
    host, pid, began = os.environ[MAIN].rsplit(" ", 2)
    return host, int(pid), float(began)


def end_with_main() -> None:
    """End this job within a second after the main process ends, if that runs on this machine."""
    if (known := main()) is None or known[0] != socket.gethostname():
        return

    def watch() -> None:
        while (why := orphaned()) is None:
            time.sleep(0.5)
        end(why)

    threading.Thread(target=watch, daemon=True, name="end with main").start()


def orphaned() -> str | None:
    """Return that the main process is gone, if it ran on this machine; None while it lives, or if there is none."""
    if (known := main()) is None or known[0] != socket.gethostname() or lives(*known[1:]):
        return None
    return f"the main process of this run, pid {known[1]}, is gone"


def end(why: str) -> NoReturn:
    """End this job at once, from any of its threads, and say why in its log."""
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone too
        print(f"this job ends: {why}; finished shards are kept; rerun to resume", file=sys.stderr, flush=True)
    os._exit(1)


def lives(pid: int, began: float | None = None) -> bool:
    """Return whether the process with this pid is alive; with `began`, whether it is the one that `started` then."""
    try:
        same = began is None or abs(started(pid) - began) < 1
        return same and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def interruptible() -> None:
    """Treat SIGTERM like Ctrl-C in this job, and react to the first signal only.

    After Ctrl-C in a terminal, the main process also sends SIGTERM. A shutdown that hangs is cut off after 5 seconds.
    """

    interrupted = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal interrupted
        if interrupted:  # not SIG_IGN: Python prints a traceback of a signal that arrives while it is being set
            return
        interrupted = True
        overdue = threading.Timer(5, lambda: os._exit(1))
        overdue.daemon = True
        overdue.start()
        raise KeyboardInterrupt

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, interrupt)


def descendants(but: Iterable[int] = ()) -> list[psutil.Process]:
    """List all processes below this one, except those with these pids and their descendants."""
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
    """End what earlier runs left: processes of this machine, other than our own, whose plan is in this folder.

    They end by themselves once their main process is gone; those still alive after `seconds` are killed. Returns how
    many there were. The caller has to hold the lock on the results folder.
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
