"""What every fault needs: the command, its undisturbed results, and how to end a disturbed run and compare."""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import folder
from processes import Running

ROOT = Path(__file__).parents[2]


class BrokenPromiseError(Exception):
    """A fault did what it must not do: wrong bytes, lost work, a hang, an error that does not say what is wrong."""


class NotPossibleError(Exception):
    """A fault cannot be made here, and why."""


@dataclass
class Outcome:
    """One row of the table."""

    happened: str
    kept: str
    compared: str


@dataclass
class Case:
    """One fault: where it is made and what is compared with.

    `undisturbed` is a finished results folder that nobody touches; `results` the one that the command writes.
    """

    command: Sequence[str]
    cwd: Path
    results: Path
    undisturbed: Path
    scratch: Path
    random: random.Random
    log: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        self.truth = folder.contents(self.undisturbed)
        self.started: list[Running] = []
        self.duration = sum(folder.seconds(self.undisturbed, stage) for stage in folder.steps(self.undisturbed))
        self.patience = 120 + 10 * self.duration
        self.temporary = self.scratch / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)

    # The folder before the fault

    def empty(self) -> None:
        folder.remove(self.results)

    def without(self, *stages: str, stores: bool = True) -> None:
        """The undisturbed results, but for these stages and all that reads them."""
        folder.copy(self.undisturbed, self.results)
        folder.forget(self.results, stages, stores)

    # Runs

    def start(
        self, *more: str, cwd: Path | None = None, command: Sequence[str] = (), open_files: int | None = None
    ) -> Running:
        running = Running(
            [*(command or self.command), *more],
            cwd or self.cwd,
            self.scratch / f"output-{len(self.started)}.txt",
            environment={"TMPDIR": str(self.temporary)},
            open_files=open_files,
        )
        self.started.append(running)
        return running

    def end_all(self) -> None:
        """Whatever is left of the runs that were started."""
        for running in self.started:
            running.kill_all()

    def end(self, running: Running, *codes: int) -> str:
        """Wait for a run that must end with one of these exit statuses; return what it said."""
        try:
            code = running.wait(self.patience)
        except TimeoutError as error:
            raise BrokenPromiseError(f"{error}:\n{tail(running.said)}") from None
        if codes and code not in codes:
            raise BrokenPromiseError(f"exit status {code}, expected {codes}:\n{tail(running.said)}")
        return running.said

    def fails(self, running: Running, *naming: str) -> str:
        """Wait for a run that must fail, by an error of one line that names all of these."""
        said = self.end(running)
        if running.process.returncode == 0:
            raise BrokenPromiseError(f"ended with exit status 0:\n{tail(said)}")
        if "Traceback" in said:
            raise BrokenPromiseError(f"a traceback in place of an error:\n{tail(said)}")
        if missing := [word for word in naming if word.lower() not in said.lower()]:
            raise BrokenPromiseError(f"the error does not say {missing}:\n{tail(said)}")
        return said

    def upkeep(self, command: str, path: Path | None = None) -> tuple[int, list[str]]:
        """`python -m pipeline.upkeep` on the results folder, or on a path: exit status and lines."""
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.upkeep", command, path or self.results],
            cwd=self.cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=self.patience,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        if "Traceback" in done.stdout:
            raise BrokenPromiseError(f"{command} ends in a traceback:\n{tail(done.stdout)}")
        return done.returncode, done.stdout.splitlines()

    def configuration(self) -> Path:
        """The configuration file of the command."""
        words = list(self.command)
        if "--configfile" not in words:
            raise NotPossibleError("the command names no --configfile")
        return self.cwd / words[words.index("--configfile") + 1]

    # Moments

    def moment(self, running: Running, stage: str, latest: float = 1) -> bool:
        """Wait for a random moment of this stage's jobs, their end at the latest; False if the run ended before.

        `latest` is a share of their time.
        """
        share = latest * self.random.random()
        while not self._job_began(running, stage):
            if running.process.poll() is not None:
                return False
            time.sleep(0.01)
        end = time.monotonic() + share * folder.seconds(self.undisturbed, stage)
        done = f"done/{stage}.*.json"
        wanted = len(list(folder.beside(self.undisturbed, done)))
        while time.monotonic() < end and running.process.poll() is None:
            if len(list(folder.beside(self.results, done))) >= wanted:
                break
            time.sleep(0.01)
        return running.process.poll() is None

    def _job_began(self, running: Running, stage: str) -> bool:
        for log in folder.beside(self.results, f"logs/{stage}.*.log"):
            with contextlib.suppress(FileNotFoundError):
                if log.stat().st_mtime >= running.began:
                    return True
        return False

    # The end

    def goes_on(self, kept: folder.Finished | None = None) -> Outcome:
        """The plain command again: it ends well, keeps what was finished, leaves nothing behind: the same bytes."""
        kept = kept or folder.Finished()
        self.end(self.start(), 0)
        lost = kept.lost(folder.Finished.of(self.results))
        if lost:
            raise BrokenPromiseError(f"finished work was made again: {some(lost)}")
        return Outcome("", f"{kept}: all", self.same())

    def same(self) -> str:
        """Compare every file with the undisturbed results."""
        found = folder.contents(self.results)
        before, now = folder.revisions(self.undisturbed), folder.revisions(self.results)
        if not now <= before:
            raise SystemExit(f"the code was changed under the test: from revision {before} to {now}")
        if found != self.truth:
            missing, extra = sorted(self.truth.keys() - found.keys()), sorted(found.keys() - self.truth.keys())
            other = sorted(name for name in found.keys() & self.truth.keys() if found[name] != self.truth[name])
            raise BrokenPromiseError(
                f"not the same bytes: {len(other)} files differ ({some(other)}), {len(missing)} are missing "
                f"({some(missing)}), {len(extra)} are too many ({some(extra)})"
            )
        if left := folder.leftovers(self.results):
            raise BrokenPromiseError(f"left behind: {some(left)}")
        return f"same, {len(found)} files"


def tail(said: str, lines: int = 25) -> str:
    return "\n".join(said.splitlines()[-lines:])


def some(names: Sequence[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
