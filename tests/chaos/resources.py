"""Faults of what a run needs: space, a folder that can be written, open files, workers that live."""

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import folder
import psutil
from case import BrokenPromiseError, Case, NotPossibleError, Outcome
from processes import Running

MOUNTED = "50%"  # of the machine's memory: room for results twice over


def disk_full(case: Case, stage: str) -> Outcome:
    """The disk is full, later it is not"""
    with _mounted(case.results, "-t", "tmpfs", "-o", f"size={MOUNTED}", "tmpfs"):
        folder.copy(case.undisturbed, case.results)
        whole = shutil.disk_usage(case.results).used
        case.without(stage)
        used = shutil.disk_usage(case.results).used
        room = used + int(case.random.uniform(0.05, 0.6) * (whole - used))
        _mount("-o", f"remount,size={room}", str(case.results))
        said = case.fails(case.start(), "disk is full")
        code, lines = case.upkeep("verify")
        if code:
            raise BrokenPromiseError(f"something that is not whole is called finished: {lines}")
        _mount("-o", f"remount,size={MOUNTED}", str(case.results))
        return _went_on(case, said, "disk is full", "with space")


def read_only(case: Case, stage: str) -> Outcome:
    """The results folder cannot be written, later it can"""
    case.without(stage)
    with _mounted(case.results, "--bind", str(case.results)):
        _mount("-o", "remount,ro,bind", str(case.results))
        said = case.fails(case.start(), "read-only")
        _mount("-o", "remount,rw,bind", str(case.results))
        return _went_on(case, said, "read-only", "when it could be written")


def few_open_files(case: Case, count: str) -> Outcome:
    """`ulimit -n` so low"""
    case.empty()
    running = case.start(open_files=int(count))
    said = case.end(running)
    if running.process.returncode == 0:
        return Outcome("it works", "", case.same())
    if "Traceback" in said or "open files" not in said.lower():
        raise BrokenPromiseError(f"neither works nor says what is missing:\n{said[-3000:]}")
    outcome = case.goes_on(folder.Finished.of(case.results))
    outcome.happened = "an error that says so; without the limit, the next run went on"
    return outcome


def workers_die(case: Case, mode: str) -> Outcome:
    """distributed's chaos plugin `KillWorker` on every worker, all along"""
    case.empty()
    running = case.start()
    seen = _kill_workers(case, running, mode)
    code = running.wait(case.patience)
    if "Traceback" in running.said:
        raise BrokenPromiseError(f"a traceback was printed:\n{running.said[-3000:]}")
    happened = f"{len(seen)} workers lived and died; exit status {code}"
    if code:
        outcome = case.goes_on(folder.Finished.of(case.results))
        outcome.happened = happened + "; the next run went on"
        return outcome
    return Outcome(happened, "", case.same())


def _kill_workers(case: Case, running: Running, mode: str, life: float = 6.0) -> set[int]:
    """Register the plugin with the run's scheduler; return the pids of all workers that there were, when it is over."""
    from distributed import Client
    from distributed.chaos import KillWorker

    end = time.monotonic() + case.patience
    client = None
    seen: set[int] = set()
    while running.process.poll() is None and time.monotonic() < end:
        if client is None:
            for file in case.results.glob(".microtome/pool-*.json"):
                with contextlib.suppress(ValueError, OSError, KeyError):
                    client = Client(json.loads(file.read_text())["address"], timeout=10, set_as_default=False)
                    client.register_plugin(KillWorker(delay=life, mode=mode), name="chaos")
        seen |= {process.pid for process in running.processes("worker")}
        time.sleep(0.5)
    if client is not None:
        with contextlib.suppress(Exception):
            client.close(timeout=1)
    return seen


def little_memory(case: Case, stage: str) -> Outcome:
    """`cluster.memory` below what a task needs"""
    if "--config" in case.command:
        raise NotPossibleError("the command has a --config of its own")
    case.without(stage)
    said = case.fails(case.start("--config", "cluster={memory: 600MB}"), "cluster.memory")
    return _went_on(case, said, "cluster.memory", "with more")


def no_worker_survives(case: Case, stage: str) -> Outcome:
    """Every worker killed after a second, as the system does where memory lacks"""
    case.without(stage)
    running = case.start()
    case.moment(running, stage)
    end = time.monotonic() + case.patience
    while running.process.poll() is None and time.monotonic() < end:
        for process in running.processes("worker"):
            with contextlib.suppress(psutil.NoSuchProcess):
                if time.time() - process.create_time() > 1:
                    process.kill()
        time.sleep(0.2)
    said = case.fails(running, "workers")
    return _went_on(case, said, "workers", "with workers that live")


def _went_on(case: Case, said: str, words: str, then: str) -> Outcome:
    """Go on after an error, with the line that said it."""
    line = next((line.strip() for line in said.splitlines() if words in line.lower()), "")
    shown = line.replace(str(case.results), case.results.name)[:160]
    outcome = case.goes_on(folder.Finished.of(case.results))
    outcome.happened = f"“{shown}”; {then}, the next run went on"
    return outcome


@contextlib.contextmanager
def _mounted(target: Path, *arguments: str) -> Iterator[None]:
    target.mkdir(parents=True, exist_ok=True)
    _mount(*arguments, str(target))
    try:
        yield
    finally:
        for _ in range(50):
            if subprocess.run(["umount", str(target)], capture_output=True).returncode == 0:
                break
            time.sleep(0.2)
        else:
            raise RuntimeError(f"{target} cannot be unmounted")


def _mount(*arguments: str) -> None:
    if shutil.which("mount") is None:
        raise NotPossibleError("there is no `mount`")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise NotPossibleError(f"mounting is not permitted here ({done.stderr.strip()})")
