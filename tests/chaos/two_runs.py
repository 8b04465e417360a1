"""Two runs on one results folder at once."""

import shutil
import subprocess
from pathlib import Path

import folder
from case import ROOT, BrokenPromiseError, Case, NotPossibleError, Outcome

EARLY = 0.1  # the second run takes seconds to start, and the first must still work then


def second_is_refused(case: Case, stage: str) -> Outcome:
    """A second run while the first works"""
    case.without(stage)
    first = case.start()
    case.moment(first, stage, EARLY)
    (main,) = first.processes("snakemake") or (None,)
    second = case.start()
    said = case.end(second)
    if main is None or second.process.returncode == 0:
        raise BrokenPromiseError(f"the second was not refused:\n{said[-2000:]}")
    return _first_ends(case, first, main.pid, said)


def other_checkout(case: Case, stage: str) -> Outcome:
    """A second run, from another checkout, while the first works"""
    try:
        inside = case.results.relative_to(case.cwd)
    except ValueError:
        raise NotPossibleError("the results folder is not below the folder that the command runs in") from None
    case.without(stage)
    clone, command = _checkout(case)
    where = clone / case.cwd.relative_to(ROOT) if case.cwd.is_relative_to(ROOT) else case.cwd
    if case.cwd.is_relative_to(ROOT):
        (where / inside).parent.mkdir(parents=True, exist_ok=True)
        (where / inside).symlink_to(case.results)
    try:
        first = case.start()
        case.moment(first, stage, EARLY)
        (main,) = first.processes("snakemake") or (None,)
        second = case.start(command=command, cwd=where)
        said = case.end(second)
        if main is None or second.process.returncode == 0:
            raise BrokenPromiseError(f"the second was not refused:\n{said[-2000:]}")
        outcome = _first_ends(case, first, main.pid, said)
        said = case.end(case.start(command=command, cwd=where), 0)
        if "Nothing to be done" not in said:
            raise BrokenPromiseError(f"the other checkout does not find everything done:\n{said[-2000:]}")
        outcome.happened += "; afterwards the other checkout finds nothing to be done"
        return outcome
    finally:
        shutil.rmtree(clone)


def _checkout(case: Case) -> tuple[Path, list[str]]:
    """Another copy of the code, and the command that runs there."""
    clone = case.scratch / "checkout"
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    program = case.cwd / case.command[0]
    words = [str(program) if program.exists() else case.command[0], *case.command[1:]]
    return clone, [word.replace(f"{ROOT}/Snakefile", f"{clone}/Snakefile") for word in words]


def _first_ends(case: Case, first: object, pid: int, said: str) -> Outcome:
    if "Traceback" in said or "another run" not in said or f"pid {pid}" not in said:
        first.kill_all()  # type: ignore[attr-defined]
        raise BrokenPromiseError(f"the second does not say that pid {pid} holds the folder:\n{said[-2000:]}")
    case.end(first, 0)  # type: ignore[arg-type]
    line = next(line for line in said.splitlines() if "another run" in line)
    shown = line[line.index("another run") :].split(", in ")[0].replace(str(case.results), case.results.name)
    return Outcome(f"the second ended: “{shown} ...”; the first went on", "", case.same())


def same_moment(case: Case, _: str) -> Outcome:
    """Two runs started at the same moment"""
    case.empty()
    both = [case.start(), case.start()]
    said = [case.end(running) for running in both]
    codes = [running.process.returncode for running in both]
    if sorted(codes)[0] != 0:
        raise BrokenPromiseError(
            f"none of two did the work, exit statuses {codes}:\n{said[0][-1500:]}\n{said[1][-1500:]}"
        )
    if any("Traceback" in text for text in said):
        raise BrokenPromiseError(f"a traceback was printed:\n{said[0][-1500:]}\n{said[1][-1500:]}")
    return Outcome(f"exit statuses {codes[0]} and {codes[1]}", "", case.same())


def without_lock(case: Case, stage: str) -> Outcome:
    """Two runs that both believe they hold the lock (its file was deleted in between)"""
    case.without(stage)
    first = case.start()
    if not case.moment(first, stage, EARLY):
        raise BrokenPromiseError(f"the first run did not work:\n{first.said[-2000:]}")
    for lock in (case.results / ".microtome").glob("lock*"):
        lock.unlink()
    second = case.start()
    said = [case.end(running) for running in (first, second)]
    codes = [first.process.returncode, second.process.returncode]
    if any("Traceback" in text for text in said):
        raise BrokenPromiseError(f"a traceback was printed:\n{said[0][-2500:]}\n{said[1][-2500:]}")
    outcome = case.goes_on()
    outcome.happened = f"exit statuses {codes[0]} and {codes[1]}; then a third run"
    return outcome


def scratch_deleted(case: Case, stage: str) -> Outcome:
    """`.microtome` and `.snakemake` deleted between two runs, the first of which was killed"""
    case.without(stage)
    running = case.start()
    case.moment(running, stage)
    running.kill_all()
    shutil.rmtree(case.results / ".microtome")
    shutil.rmtree(case.cwd / ".snakemake", ignore_errors=True)
    outcome = case.goes_on(folder.Finished.of(case.results))
    outcome.happened = "the next run went on"
    return outcome
