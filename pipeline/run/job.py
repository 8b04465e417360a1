"""A job of the workflow, in a process of its own: one stage, its log, and readable errors."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import MicrotomeError, explained
from pipeline.plan.job import Job
from pipeline.run import planner
from pipeline.stages.registry import STAGES
from pipeline.storage.lock import taken_over
from pipeline.storage.redact import without_home
from pipeline.workers import processes
from pipeline.workers.processes import PLAN


def job(stage: str, wildcards: Any, log: str) -> None:
    """Run one stage as a job of the workflow; print errors that users can act on without a traceback.

    Output goes to the terminal and to `log`, whose folder exists.
    """
    processes.end_with_main()
    processes.interruptible()
    plan = planner.read(Path(os.environ[PLAN]))
    named = (wildcards.get(name) for name in ("dataset", "network", "experiment"))
    step = plan.wanted(stage, wildcards["id"], *named)
    with _Both(sys.stderr, Path(log)) as both, contextlib.redirect_stderr(both):
        try:
            STAGES[stage].run(Job(plan, step, STAGES))
        except MicrotomeError as error:
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
            return
    sys.exit(1)


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
