"""CPU seconds of a command with all that it starts: `python -m tests.bench.cpu_of_run -- snakemake --configfile ...`.

`time` counts the processes that somebody waited for; workers that are killed are not among them. This process adopts
what loses its parent, and waits for it.
"""

import ctypes
import os
import resource
import subprocess
import sys
import time

PR_SET_CHILD_SUBREAPER = 36


def measured(command: list[str]) -> tuple[int, float, float]:
    """Run a command; return its exit status, CPU seconds of all its processes, and seconds."""
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("this system has no subreapers")
    began = time.monotonic()
    code = subprocess.run(command).returncode
    spent = time.monotonic() - began
    try:
        while True:
            os.wait()
    except ChildProcessError:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return code, used.ru_utime + used.ru_stime, spent


if __name__ == "__main__":
    code, cpu, spent = measured(sys.argv[sys.argv.index("--") + 1 :])
    print(f"{cpu:.1f} CPU s, {spent:.1f} s, exit status {code}", file=sys.stderr)
    sys.exit(code)
