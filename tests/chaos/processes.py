"""The processes of a command under test: found by a mark in their environment, whoever their parent is by now."""

import contextlib
import os
import resource
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

MARK = "MICROTOME_CHAOS"  # environment variable: which run a process belongs to, inherited by all of its descendants

JOBS = "pipeline.run.forks"

ROLES: dict[str, Callable[[psutil.Process], bool]] = {
    "snakemake": lambda process: any(Path(word).name == "snakemake" for word in process.cmdline()[:3]),
    "client": lambda process: any(word.endswith("workflow/scripts/job.py") for word in process.cmdline()),
    "jobs": lambda process: JOBS in process.cmdline() and not ROLES["job"](process),
    "job": lambda process: (
        JOBS in process.cmdline() and (parent := process.parent()) is not None and JOBS in parent.cmdline()
    ),
    "pool": lambda process: "pipeline.workers.pool" in process.cmdline(),
    "worker": lambda process: "--multiprocessing-fork" in process.cmdline(),
}


class Running:
    """A command that was started in a session of its own, with everything it prints in a file."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        output: Path,
        environment: Mapping[str, str] | None = None,
        open_files: int | None = None,
    ) -> None:
        self.mark, self.output, self.began = uuid.uuid4().hex, output, time.time()
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | (environment or {}) | {MARK: self.mark},
                preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files)))
                if open_files
                else None,
            )

    @property
    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def processes(self, role: str | None = None) -> list[psutil.Process]:
        """The living processes of the run, all or those of one role, oldest first."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                if process.status() == psutil.STATUS_ZOMBIE or process.environ().get(MARK) != self.mark:
                    continue
                if role is None or ROLES[role](process):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def send(self, role: str, number: int, which: int = 0) -> bool:
        """Send a signal to one process of a role; False where there is none."""
        found = self.processes(role)
        if not found:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            found[which % len(found)].send_signal(number)
        return True

    def interrupt(self) -> None:
        """What Ctrl-C in a terminal does: SIGINT for every process of the foreground group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)

    def interrupt_all(self) -> None:
        """SIGINT for every process of the run, of whatever session, as a job manager sends it."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGINT)

    def kill_all(self) -> None:
        """kill -9 of everything at one moment: all are stopped before the first is killed, so none can react."""
        stopped: set[psutil.Process] = set()
        while new := set(self.processes()) - stopped:
            for process in new:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()
            stopped |= new
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def wait(self, seconds: float) -> int:
        """The exit status; a command that takes longer is killed and `TimeoutError` raised."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise TimeoutError(f"the command hung: it took more than {seconds:.0f} s") from None

    def gone_within(self, seconds: float) -> float | None:
        """Wait until no process of the run is left; return after how many seconds that was, None if it never was."""
        began = time.monotonic()
        while (spent := time.monotonic() - began) < seconds:
            self.process.poll()
            if not self.processes():
                return spent
            time.sleep(0.1)
        return None
