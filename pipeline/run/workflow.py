"""What the Snakefile does around its rules: plan, settle, inspect, lock, pool of workers, and the account of time."""

from __future__ import annotations

import atexit
import math
import os
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
from pipeline.run import experiment, forecast, planner, preflight
from pipeline.stages.registry import STAGES
from pipeline.storage.lock import RunLock
from pipeline.storage.manifest import Manifest
from pipeline.storage.redact import scrub_logs
from pipeline.workers import client, memory, processes
from pipeline.workers import pool as cluster
from pipeline.workers.processes import PLAN

LEAST_MB = 4000  # of a worker, in what a job asks a queue for
GRACE = 6  # seconds that jobs and workers have to end in good order after an interrupt


class Run:
    """One invocation of the workflow.

    In the main process it makes the plan, checks the networks on the meta device, and sets outdated manifests aside
    (unless `dry`, or another run holds the lock: then `start` says so). In a job's process it reads the plan.
    `files` and `overrides` are where the configuration `raw` comes from: for the commands that a report names.
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
        self.interrupted = False
        # Jobs and workers import this same code, from any working directory.
        own = str(Path(__file__).parents[2])
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH")]))
        if not main and PLAN in os.environ:
            self.plan = planner.read(Path(os.environ[PLAN]))
            return
        processes.announce()
        atexit.register(scrub_logs, Path(".snakemake"), time.time() - 60)
        try:
            self._prepare(raw, dry, arguments(files, overrides or {}))
        except OSError as error:
            if (said := explained(error)) is None:
                raise
            raise MicrotomeError(said) from error

    def _prepare(self, raw: Mapping[str, Any], dry: bool, asked: Sequence[str]) -> None:
        wanted = experiment.parse({key: value for key, value in raw.items() if key != "rescan"})
        self.plan = planner.make(wanted, bool(raw.get("rescan")), asked)
        self.lock = RunLock(self.plan.results)
        preflight.check(self.plan, probe=dry)
        costs = forecast.forecast(self.plan)
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
        """The run before did not end in good order: wait for what is left of it, remove its temporary files."""
        from pipeline.storage.store import remove_partials

        print("the run before did not end in good order: clearing up after it", file=sys.stderr)
        processes.end_leftovers(self.plan.scratch / "plans")
        cluster.clear(self.plan.scratch)
        remove_partials(self.plan.results)
        # Snakemake would run a job again that was done and not yet noted as done. Ours are done when their manifest is
        # there, which is written whole.
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

    def memory(self, stage: str, wildcards: Any, threads: int) -> int:
        """Return the megabytes of a job with a worker for each of `threads`, by the stage's own estimate."""
        job = Job(self.plan, self._wanted(stage, wildcards), STAGES)
        estimate = job.stage.cost(job, False).memory if job.stage.cost is not None else None
        need = (estimate or 0) * memory.threads(self.plan.config.cluster) + memory.WORKER_BASE
        return threads * max(LEAST_MB, math.ceil(need / 1e6))

    def targets(self, stage: str) -> list[str]:
        """The manifests of a stage, as Snakemake names them."""
        return [str(self.plan.results / step.manifest) for step in self.plan.of_stage(stage)]

    def parents(self, stage: str, wildcards: Any) -> list[str]:
        """The manifests that a job reads; a job whose id is not the wanted one is refused."""
        return [str(self.plan.results / parent) for parent in self._wanted(stage, wildcards).parents]

    def _wanted(self, stage: str, wildcards: Any) -> Step:
        named = (getattr(wildcards, name, None) for name in ("dataset", "network", "experiment"))
        return self.plan.wanted(stage, wildcards.id, *named)

    def figures(self) -> Iterator[tuple[str, str, dict[str, str]]]:
        """Path, kind and labels of every figure of the finished report; none where it is still to be made."""
        for step in self.plan.of_stage("report"):
            manifest = _read(self.plan.results / step.manifest)
            for figure in manifest.result["figures"] if manifest else []:
                path = (self.plan.results / step.manifest).parent.parent / figure["file"]
                if path.exists():
                    yield str(path), figure["kind"], figure["labels"]

    def start(self, elsewhere: bool = False) -> None:
        """Before the first job: no other run holds the results folder; start the workers.

        Jobs that run `elsewhere`, as jobs of a queue, have pools of their own there.
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
        if elsewhere or kind == "address":
            return
        self.pool, address = cluster.start_pool(self.plan.config.cluster, self.plan.scratch)
        os.environ[client.ADDRESS] = str(address.absolute())
        atexit.register(self.stop)

    def stop(self, failed: bool = False) -> None:
        """After the last job. A run that failed leaves the lock's file: there may be something to clear up."""
        if self.pool is not None:
            cluster.stop_pool(self.pool)
            self.pool = None
        if failed:
            atexit.unregister(self.lock.release)

    def _interrupt(self, number: int, frame: object) -> None:
        """SIGTERM and Ctrl-C: jobs and workers are told to end, and killed if they do not; a second one does not wait.

        Snakemake's own answer to SIGTERM is to wait until the running jobs are done.
        """
        if self.interrupted:
            processes.ask_to_end(processes.descendants(), signal.SIGKILL)
            os._exit(128 + number)
        self.interrupted = True
        print(f"{signal.Signals(number).name}: stopping; finished shards are kept, run again to go on", file=sys.stderr)
        processes.ask_to_end(processes.descendants(but=[self.pool.pid] if self.pool else []))
        if self.pool is not None and self.pool.stdin is not None:
            self.pool.stdin.close()
        overdue = threading.Timer(GRACE, lambda: processes.ask_to_end(processes.descendants(), signal.SIGKILL))
        overdue.daemon = True
        overdue.start()
        raise KeyboardInterrupt

    def account(self) -> str:
        """How the time of this run was spent, a line a job, and where the report is."""
        lines = []
        for step in self.plan.steps.values():
            manifest = _read(self.plan.results / step.manifest)
            if manifest is not None and manifest.provenance["began"] >= self.began:
                lines.append(f"{manifest.provenance['seconds']:8.1f} s  {step.name}")
        lines.append(f"{time.time() - self.began:8.1f} s  in all; jobs overlap")
        for step in self.plan.of_stage("report"):
            if (self.plan.results / step.manifest).exists():
                report = self.plan.results / "report" / self.plan.config.name / "index.html"
                lines.append(f"The report: {report.resolve()}")
        return "\n".join(lines)


def arguments(files: Sequence[str | Path], overrides: Mapping[str, Any]) -> list[str]:
    """The arguments of snakemake that give a configuration; files below the working folder are named from there."""
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
