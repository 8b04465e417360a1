"""What the Snakefile does around its rules: plan, settle, inspect, lock, start workers, account for time."""

from __future__ import annotations

import atexit
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import MicrotomeError, explained
from pipeline.plan import settle
from pipeline.plan.job import Job
from pipeline.plan.stage import Stage
from pipeline.plan.step import Key, Step
from pipeline.run import experiment, forecast, forks, planner, preflight
from pipeline.stages.registry import STAGES
from pipeline.stages.report.results import Shown
from pipeline.storage.lock import RunLock
from pipeline.storage.manifest import Manifest
from pipeline.storage.redact import scrub_logs, user
from pipeline.workers import client, memory, pool, processes
from pipeline.workers.processes import PLAN

LEAST_MB = 4000  # the least memory of a worker, in a job's request to a queue
GRACE = 6  # seconds that jobs and workers have to end cleanly after an interrupt


class Run:
    """One invocation of the workflow.

    The main process makes the plan, checks the networks on the meta device, and sets stale manifests aside (unless
    `dry`; if another run holds the lock, `start` reports it). A job's process reads the plan. `files` and `overrides`
    are the sources of the configuration `raw`; the report quotes them in its commands.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        main: bool,
        dry: bool,
        files: Sequence[str | Path] = (),
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self.pool: subprocess.Popen | None = None
        self.forks: subprocess.Popen | None = None
        self.interrupted = False
        # Jobs and workers import this same code from any working folder, and nothing from that folder: an empty entry
        # stands for it.
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, given)])
        os.environ |= processes.SAFE_PATH
        os.environ.setdefault("LOGNAME", user())  # Snakemake and torch ask the system's list if no variable says
        if not main and PLAN in os.environ:
            self.plan = planner.read(Path(os.environ[PLAN]))
            return
        processes.announce()
        for file in files:
            experiment.refuse_repeated_keys(Path(file))
        atexit.register(scrub_logs, Path(".snakemake"), time.time() - 60)
        try:
            self._prepare(raw, dry, arguments(files, overrides or {}))
        except OSError as error:
            if (said := explained(error)) is None:
                raise
            raise MicrotomeError(said) from error

    def _prepare(self, raw: Mapping[str, Any], dry: bool, asked: Sequence[str]) -> None:
        wanted = experiment.parse({key: value for key, value in raw.items() if key != "rescan"})
        self.plan = planner.make(wanted, bool(raw.get("rescan")), asked, dry)
        self.lock = RunLock(self.plan.results)
        preflight.check(self.plan, probe=dry)
        costs = forecast.forecast(self.plan)
        for line in (*(self.plan.described if dry else ()), *self.plan.notices):
            print(line, file=sys.stderr)
        if dry:
            said = (*preflight.sizes(self.plan), *forecast.lines(self.plan, costs))
            for line in (*said, *settle.settle(self.plan, dry=True)):
                print(line, file=sys.stderr)
        forecast.check_disk(self.plan, costs)
        if dry:
            return
        self.refused: MicrotomeError | None = None
        try:
            self.lock.acquire()
        except MicrotomeError as error:
            self.refused = error
            return
        atexit.register(self.lock.release)
        if self.lock.left_open:
            self._clear_up()
        for line in settle.settle(self.plan):
            print(f"made again: {line}", file=sys.stderr)
        os.environ[PLAN] = str(planner.save(self.plan).absolute())

    def _clear_up(self) -> None:
        """Clean up after a run that did not end cleanly: wait for its processes, remove its temporary files."""
        from pipeline.storage.store import remove_partials

        print("the previous run did not end cleanly: cleaning up after it", file=sys.stderr)
        processes.end_leftovers(self.plan.scratch / "plans")
        pool.clear(self.plan.scratch)
        remove_partials(self.plan.results)
        # Snakemake would rerun a job that finished before it was marked as finished. Our jobs are finished once their
        # manifest exists, and manifests are written atomically.
        for marker in Path(".snakemake/incomplete").glob("*"):
            if marker.is_file():
                marker.unlink()

    @property
    def stages(self) -> list[Stage]:
        return list(STAGES.values())

    def path(self, stage: Stage, folder: str, suffix: str) -> str:
        """Return the file of a stage's jobs in `done` or `logs`, with Snakemake's wildcards."""
        home = stage.folder_of(Key("{dataset}", "{network}", "{experiment}"), self.plan.config.name)
        return str(self.plan.results / home / folder / f"{stage.name}.{{id}}.{suffix}")

    @property
    def command(self) -> str:
        """Return the shell command of every job, with Snakemake's names in braces."""
        script = Path(__file__).parents[2] / "workflow/scripts/job.py"
        python = f"{shlex.quote(sys.executable)} {shlex.quote(str(script))}".replace("{", "{{").replace("}", "}}")
        return f"{python} {{output:q}} {{log:q}}"

    def memory(self, stage: str, wildcards: Any, threads: int) -> int:
        """Return a job's megabytes, with one worker for each of `threads`, by the stage's own estimate."""
        job: Job[Any] = Job(self.plan, self._wanted(stage, wildcards), STAGES)
        estimate = job.stage.cost(job, False).memory if job.stage.cost is not None else None
        need = (estimate or 0) * memory.threads(self.plan.config.cluster) + memory.WORKER_BASE
        return threads * max(LEAST_MB, math.ceil(need / 1e6))

    def targets(self, stage: str) -> list[str]:
        """Return a stage's manifests, as Snakemake names them."""
        return [str(self.plan.results / step.manifest) for step in self.plan.of_stage(stage)]

    def parents(self, stage: str, wildcards: Any) -> list[str]:
        """Return the manifests that a job reads; refuse a job whose id differs from the plan's."""
        return [str(self.plan.results / parent) for parent in self._wanted(stage, wildcards).parents]

    def _wanted(self, stage: str, wildcards: Any) -> Step:
        named = (getattr(wildcards, name, None) for name in ("dataset", "network", "experiment"))
        return self.plan.wanted(stage, wildcards.id, *named)

    def figures(self) -> Iterator[tuple[str, str, dict[str, str]]]:
        """Yield path, kind and labels of every figure of the finished report; none if the report is pending."""
        for step in self.plan.of_stage("report"):
            manifest = _read(self.plan.results / step.manifest)
            for figure in Shown.of(manifest).figures if manifest else []:
                path = (self.plan.results / step.manifest).parent.parent / figure.file
                if path.exists():
                    yield str(path), figure.kind, figure.labels

    def start(self, elsewhere: bool = False) -> None:
        """Lock the results folder and start the workers, before the first job.

        Jobs that run `elsewhere`, such as jobs of a queue, have pools of their own there.
        """
        if self.refused is not None:
            raise self.refused
        kind = self.plan.config.cluster.kind
        if elsewhere and kind == "slurm":
            raise MicrotomeError(
                "jobs of Snakemake that ask SLURM for jobs: use `cluster: {kind: slurm}` with the profile `default`, "
                "or the profile `slurm` with `kind: local` or `gpu`"
            )
        self.began = time.time()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._interrupt)
        atexit.register(self.stop)
        if not elsewhere:
            self.forks = forks.start()
            if kind != "address":
                self.pool, address = pool.start_pool(self.plan.config.cluster, self.plan.scratch)
                os.environ[client.ADDRESS] = str(address.absolute())

    def stop(self, failed: bool = False) -> None:
        """Stop the processes that serve jobs, after the last one.

        A failed run leaves the lock file: the next run may have something to clean up.
        """
        for process in filter(None, (self.forks, self.pool)):
            pool.stop_pool(process)
        self.forks = self.pool = None
        if failed:
            atexit.unregister(self.lock.release)

    def _interrupt(self, number: int, frame: object) -> None:
        """Handle SIGTERM and Ctrl-C: ask jobs and workers to end, then kill them; a second signal kills at once.

        Snakemake's own handler of SIGTERM waits until the running jobs are done.
        """
        if self.interrupted:
            processes.ask_to_end(processes.descendants(), signal.SIGKILL)
            os._exit(128 + number)
        self.interrupted = True
        print(f"{signal.Signals(number).name}: stopping; finished shards are kept; rerun to resume", file=sys.stderr)
        served = [process for process in (self.forks, self.pool) if process is not None]
        processes.ask_to_end(processes.descendants(but=[process.pid for process in served]))
        for process in served:
            assert process.stdin is not None
            process.stdin.close()
        overdue = threading.Timer(GRACE, lambda: processes.ask_to_end(processes.descendants(), signal.SIGKILL))
        overdue.daemon = True
        overdue.start()
        raise KeyboardInterrupt

    def account(self) -> str:
        """Return how this run spent its time, one line per job, and where the report is."""
        lines = []
        for step in self.plan.steps.values():
            manifest = _read(self.plan.results / step.manifest)
            if manifest is not None and manifest.provenance["began"] >= self.began:
                lines.append(f"{manifest.provenance['seconds']:8.1f} s  {step.name}")
        lines.append(f"{time.time() - self.began:8.1f} s  in all; jobs overlap")
        for step in self.plan.of_stage("report"):
            if (self.plan.results / step.manifest).exists():
                report = (self.plan.results / step.manifest).parent.parent / "index.html"
                lines.append(f"The report: {report.resolve()}")
        return "\n".join(lines)


def arguments(files: Sequence[str | Path], overrides: Mapping[str, Any]) -> list[str]:
    """Return snakemake's arguments for a configuration; files below the working folder get relative paths."""
    given = []
    if files:
        named = (Path(file) for file in files)
        here = Path.cwd()
        given += ["--configfile", *(str(p.relative_to(here) if p.is_relative_to(here) else p) for p in named)]
    values = [f"{key}={value}" for key, value in overrides.items() if key != "rescan"]
    return [*given, "--config", *values] if values else given


def _read(path: Path) -> Manifest | None:
    try:
        return Manifest.read(path)
    except (FileNotFoundError, MicrotomeError):
        return None
