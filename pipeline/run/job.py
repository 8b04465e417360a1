"""A job of the workflow, in a process of its own: one stage, its log, and readable errors."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import TextIO

from pipeline.errors import MicrotomeError, explained
from pipeline.plan.job import Job
from pipeline.run import planner
from pipeline.stages.registry import STAGES
from pipeline.storage.lock import taken_over
from pipeline.storage.redact import without_home
from pipeline.workers import processes
from pipeline.workers.processes import PLAN


def run_job(manifest: str, log: str) -> int:
    """Make a step's manifest as a job of the workflow; return its exit status.

    Errors that users can act on are printed without a traceback. Output goes to the terminal and to `log`, whose folder
    exists; time and memory to the table of the same name.
    """
    processes.end_with_main()
    processes.interruptible()
    began = time.time()
    plan = planner.read(Path(os.environ[PLAN]))
    step = plan.steps[Path(manifest).relative_to(plan.results).as_posix()]
    with _Both(sys.stderr, Path(log)) as both, contextlib.redirect_stderr(both):
        try:
            STAGES[step.stage].run(Job(plan, step, STAGES))
        except MicrotomeError as error:
            if why := processes.orphaned():  # the pool goes with the main process, and may be missed first
                processes.end(why)
            about = "" if str(error).startswith(step.name) else f"{step.name}: "
            print(f"error: {about}{error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(f"interrupted: {step.name}; finished shards are kept; rerun to resume", file=sys.stderr)
        except Exception as error:
            main = processes.main()
            said = explained(error) if isinstance(error, OSError) else None
            if said is None and main is not None:
                said = taken_over(plan.results, *main[:2])
            if said is None:
                traceback.print_exc()
            else:
                print(f"error: {step.name}: {said}", file=sys.stderr)
        else:
            _benchmark(Path(log).with_suffix(".tsv"), time.time() - began)
            return 0
    return 1


def _benchmark(path: Path, seconds: float) -> None:
    """Write a job's time (s) and largest memory (MiB) as Snakemake's benchmarks do; workers are not part of it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    clock = str(datetime.timedelta(seconds=round(seconds)))
    row = (f"{seconds:.4f}", clock, f"{used.ru_maxrss / 1024:.2f}", f"{used.ru_utime + used.ru_stime:.2f}")
    with contextlib.suppress(OSError):
        path.write_text("\t".join(("s", "h:m:s", "max_rss", "cpu_time")) + "\n" + "\t".join(row) + "\n")


class _Both(io.TextIOBase):
    """A stream that writes to the terminal and to a file; if the file cannot be written, the terminal still works."""

    def __init__(self, terminal: TextIO, path: Path) -> None:
        self.terminal = terminal
        self.file: TextIO | None = None
        with contextlib.suppress(OSError):
            self.file = path.open("w", encoding="utf-8")

    def write(self, text: str) -> int:
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.write(without_home(text))
                self.file.flush()  # at once: buffered text would fail again when the file is closed
        return self.terminal.write(text)

    def flush(self) -> None:
        self.terminal.flush()

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()
        super().close()

    def isatty(self) -> bool:
        return self.terminal.isatty()
