"""One job: `python job.py MANIFEST LOG`. The process for jobs forks it; without one, it runs in this process."""

import contextlib
import json
import os
import signal
import socket
import sys

ADDRESS = os.environ.get("MICROTOME_JOBS")
BEGUN = b"b"


def asked(manifest: str, log: str) -> int | None:
    """Have the job forked, with this process's streams and environment; return its exit status, None if none can be."""
    if ADDRESS is None:
        return None
    connection = socket.socket(socket.AF_UNIX)
    told = []

    def tell(number: int, _: object) -> None:
        told.append(number)
        with contextlib.suppress(OSError):
            connection.send(bytes([number]))

    request = json.dumps({"manifest": manifest, "log": log, "environment": dict(os.environ)}).encode()
    begun, answer = False, b""
    with contextlib.suppress(OSError):
        connection.connect(ADDRESS)
        socket.send_fds(connection, [len(request).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(request)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, tell)
        # A job says that it has begun, and then its status; if it is killed, the connection closes.
        begun = connection.recv(1) == BEGUN
        answer = connection.recv(1) if begun else b""
    if begun:
        return answer[0] if answer else 128 + signal.SIGKILL
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    return 128 + told[0] if told else None


if __name__ == "__main__":
    status = asked(*sys.argv[1:])
    if status is None:
        from pipeline.workers.pool import THREADS

        os.environ |= THREADS  # as in a job that is forked, before numpy is imported
        from pipeline.run.job import run_job

        status = run_job(*sys.argv[1:])
    sys.exit(status)
