"""One job: `python job.py MANIFEST LOG`. The process for jobs forks it; without one, it runs in this process."""

import contextlib
import json
import os
import signal
import socket
import sys

SOCKET = os.environ.get("MICROTOME_JOBS")


def asked(manifest: str, log: str) -> int | None:
    """Have the job forked, with this process's streams and environment; return its exit status, None if none can be."""
    if SOCKET is None:
        return None
    connection = socket.socket(socket.AF_UNIX)

    def tell(number: int, _: object) -> None:
        with contextlib.suppress(OSError):
            connection.send(bytes([number]))

    request = json.dumps({"manifest": manifest, "log": log, "environment": dict(os.environ)}).encode()
    began = answer = b""
    with contextlib.suppress(OSError):
        connection.connect(SOCKET)
        socket.send_fds(connection, [len(request).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(request)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, tell)
        # A job says that it has begun, and then its status; if it is killed, the connection closes.
        began = connection.recv(1)
        answer = connection.recv(1) if began else b""
    if not began:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        return None
    return answer[0] if answer else 128 + signal.SIGKILL


if __name__ == "__main__":
    status = asked(*sys.argv[1:])
    if status is None:
        from pipeline.run.job import job

        status = job(*sys.argv[1:])
    sys.exit(status)
