"""The process that forks a run's jobs, after it imported what they all need.

A Python process of its own imports for seconds what a job needs, and a small job computes for one. The main process
starts this one (`python -m pipeline.run.forks DESCRIPTOR`) with a listening socket; `workflow/scripts/job.py`, which
Snakemake runs, connects to it. A job holds that connection alone: it closes if the job is killed, and the job ends if
it closes. This process ends with the main process, whose pipe is its stdin. It has one thread, so that it can fork at
any moment.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import NoReturn

from pipeline.run.job import run_job
from pipeline.workers import processes
from pipeline.workers.pool import ARITHMETIC

SOCKET = "MICROTOME_JOBS"  # environment variable: the path of this process's socket
PRELOADED = ("distributed", "zarr")
PATIENCE = 10  # seconds for a request to arrive whole
BEGUN = b"b"  # what a job sends once it has begun, before its status


def start() -> subprocess.Popen | None:
    """Start the process that forks jobs; it ends when its stdin closes.

    Return None where forking is not safe, or no socket can be made: jobs then are processes of their own.
    """
    if not sys.platform.startswith("linux"):
        return None
    folder = tempfile.mkdtemp(prefix="microtome-")  # of this user alone
    path = str(Path(folder) / "jobs")
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(128)
            process = subprocess.Popen(
                processes.program("pipeline.run.forks", str(listener.fileno())),
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                env=os.environ | ARITHMETIC | processes.SAFE_PATH,
                start_new_session=True,  # Ctrl-C in the terminal reaches the clients, which pass it on
            )
    except OSError as error:
        shutil.rmtree(folder)
        print(f"each job is a process of its own: no socket in {folder} ({error})", file=sys.stderr)
        return None
    os.environ[SOCKET] = path
    return process


def serve(listener: socket.socket) -> None:
    """Fork a job for each connection, until stdin closes."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system forgets jobs that have ended
    for name in PRELOADED:
        importlib.import_module(name)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _run(connection)
        connection.close()


def _run(connection: socket.socket) -> NoReturn:
    """Run one job in this process, which was forked for it; answer with its exit status."""
    status, done = 1, threading.Event()
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        connection.settimeout(PATIENCE)
        head, streams, _, _ = socket.recv_fds(connection, 4, 3)
        request = json.loads(_received(connection, int.from_bytes(head, "big")))
        connection.settimeout(None)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.update(request["environment"] | ARITHMETIC)
        connection.send(BEGUN)
        threading.Thread(target=_listen, args=(connection, done), daemon=True, name="end with the client").start()
        status = run_job(request["manifest"], request["log"])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        done.set()  # the client goes as soon as it has the status
        with contextlib.suppress(OSError):
            connection.send(bytes([status]))
        os._exit(status)


def _received(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        if not (piece := connection.recv(size - len(found))):
            raise EOFError("the client is gone")
        found += piece
    return found


def _listen(connection: socket.socket, done: threading.Event) -> None:
    """Pass on the signals that the client gets; end this job if the client is gone before it is done."""
    with contextlib.suppress(OSError):
        while number := connection.recv(1):
            os.kill(os.getpid(), number[0])
    if not done.is_set():
        processes.end("the process that Snakemake started for it is gone")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
