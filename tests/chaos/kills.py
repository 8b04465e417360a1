"""Faults that end processes: the whole run or one part of it, by SIGKILL, SIGTERM or SIGINT, at any moment."""

import shutil
import signal
import time
from collections.abc import Callable

import folder
from case import BrokenPromiseError, Case, Outcome
from processes import Running

GONE = 10.0  # seconds after which no process of a run that was told to end may be left


def everything(case: Case, stage: str) -> Outcome:
    """kill -9 of all processes at one moment"""
    case.without(stage)
    running = case.start()
    case.moment(running, stage)
    running.kill_all()
    return _goes_on(case, "everything gone at once")


def everything_at_any_time(case: Case, _: str) -> Outcome:
    """kill -9 of all processes at a moment of the whole run, start included"""
    case.empty()
    _kill_at(case, case.random.random())
    return _goes_on(case, "everything gone at once")


def everything_twice(case: Case, _: str) -> Outcome:
    """kill -9 of all processes, of the run that goes on as well, and `.snakemake` deleted in between"""
    case.empty()
    _kill_at(case, case.random.uniform(0.2, 0.6))
    first = folder.Finished.of(case.results)
    shutil.rmtree(case.cwd / ".snakemake", ignore_errors=True)
    _kill_at(case, case.random.uniform(0.2, 0.6))
    if lost := first.lost(folder.Finished.of(case.results)):
        raise BrokenPromiseError(f"the second run made finished work again: {lost[:4]}")
    return _goes_on(case, f"everything gone at once, {first} finished; then again")


def in_sequence(case: Case, first: str, second: str, third: str) -> Outcome:
    """kill -9 of all processes; of Snakemake alone in the next run; SIGTERM in the one after"""
    case.empty()
    kept = folder.Finished()
    took = []
    for stage, end in (
        (first, Running.kill_all),
        (second, lambda running: running.send("snakemake", signal.SIGKILL)),
        (third, lambda running: running.send("snakemake", signal.SIGTERM)),
    ):
        running = case.start()
        if not case.moment(running, stage):
            raise BrokenPromiseError(f"the run ended before {stage}:\n{running.said[-3000:]}")
        end(running)
        took.append(_gone(running))
        _no_traceback(running)
        after = folder.Finished.of(case.results)
        if lost := kept.lost(after):
            raise BrokenPromiseError(f"finished work was made again: {lost[:4]}")
        kept = after
    return _goes_on(case, f"no process left after {took[1]:.1f} s and {took[2]:.1f} s")


def asked_why(case: Case, stage: str) -> Outcome:
    """kill -9 of all processes, then `make why` and a dry run, twice each"""
    case.without(stage)
    running = case.start()
    case.moment(running, stage)
    running.kill_all()
    kept, before = folder.Finished.of(case.results), folder.contents(case.results)
    said = []
    for _ in range(2):
        code, lines = case.upkeep("why", case.configuration())
        case.end(case.start("--dry-run"), 0)
        said.append((code, lines))
    if said[0] != said[1] or said[0][0] or not said[0][1]:
        raise BrokenPromiseError(f"`why` says {said[0]}, then {said[1]}")
    if folder.Finished.of(case.results) != kept or folder.contents(case.results) != before:
        raise BrokenPromiseError("asking changed files")
    return _goes_on(case, "both named what a run would do, twice the same, and changed nothing")


def snakemake_alone(case: Case, stage: str) -> Outcome:
    """kill -9 of the Snakemake process alone"""
    return _end_by(case, stage, lambda running: running.send("snakemake", signal.SIGKILL))


def sigterm(case: Case, stage: str) -> Outcome:
    """SIGTERM to the Snakemake process"""
    return _end_by(case, stage, lambda running: running.send("snakemake", signal.SIGTERM))


def sigint(case: Case, stage: str) -> Outcome:
    """SIGINT to the Snakemake process"""
    return _end_by(case, stage, lambda running: running.send("snakemake", signal.SIGINT))


def ctrl_c(case: Case, stage: str) -> Outcome:
    """Ctrl-C: SIGINT to every process of the terminal"""
    return _end_by(case, stage, Running.interrupt)


def sigint_all(case: Case, stage: str) -> Outcome:
    """SIGINT to every process: Snakemake, jobs, pool, workers"""
    return _end_by(case, stage, Running.interrupt_all)


def ctrl_c_twice(case: Case, stage: str) -> Outcome:
    """Ctrl-C, and half a second later again"""

    def twice(running: Running) -> None:
        running.interrupt()
        time.sleep(0.5)
        running.interrupt()

    return _end_by(case, stage, twice)


def worker(case: Case, stage: str) -> Outcome:
    """kill -9 of a Dask worker"""
    case.without(stage)
    running = case.start()
    case.moment(running, stage)
    hit = running.send("worker", signal.SIGKILL, case.random.randrange(8))
    kept = folder.Finished.of(case.results)
    case.end(running, 0)
    if lost := kept.lost(folder.Finished.of(case.results)):
        raise BrokenPromiseError(f"finished work was made again: {lost[:4]}")
    return Outcome(
        "another worker took its tasks; the run went on" if hit else "there was none", f"{kept}: all", case.same()
    )


def job(case: Case, stage: str) -> Outcome:
    """kill -9 of a job's process"""
    return _some_part(case, stage, "job", signal.SIGKILL)


def client(case: Case, stage: str) -> Outcome:
    """kill -9 of the process that Snakemake runs for a job, which waits for it"""
    return _some_part(case, stage, "client", signal.SIGKILL)


def jobs(case: Case, stage: str) -> Outcome:
    """kill -9 of the process that forks jobs"""
    return _some_part(case, stage, "jobs", signal.SIGKILL)


def pool(case: Case, stage: str) -> Outcome:
    """kill -9 of the pool, which holds scheduler and nannies"""
    return _some_part(case, stage, "pool", signal.SIGKILL)


def pool_sigterm(case: Case, stage: str) -> Outcome:
    """SIGTERM to the pool"""
    return _some_part(case, stage, "pool", signal.SIGTERM)


def _kill_at(case: Case, share: float) -> None:
    running = case.start()
    time.sleep(share * case.duration)
    running.kill_all()


def _end_by(case: Case, stage: str, end: Callable[[Running], object]) -> Outcome:
    """A signal that must end the whole run within seconds."""
    case.without(stage)
    running = case.start()
    case.moment(running, stage)
    end(running)
    spent = _gone(running)
    _no_traceback(running)
    return _goes_on(case, f"no process left after {spent:.1f} s")


def _gone(running: Running) -> float:
    """After how many seconds no process of a run was left; too many are a broken promise."""
    spent = running.gone_within(GONE)
    if spent is None:
        left = [" ".join(process.cmdline())[:120] for process in running.processes()]
        raise BrokenPromiseError(f"after {GONE:.0f} s these processes are still there: {left}")
    return spent


def _some_part(case: Case, stage: str, role: str, number: int) -> Outcome:
    """The end of one process, which the run may survive or not; if not, it must say so."""
    case.without(stage)
    running = case.start()
    case.moment(running, stage)
    running.send(role, number)
    case.end(running)
    code = running.process.returncode
    spent = _gone(running)
    _no_traceback(running)
    return _goes_on(case, f"the run ended with exit status {code}, all processes {spent:.1f} s later")


def _no_traceback(running: Running) -> None:
    if "Traceback" in running.said:
        raise BrokenPromiseError(f"a traceback was printed:\n{running.said[-3000:]}")


def _goes_on(case: Case, happened: str) -> Outcome:
    outcome = case.goes_on(folder.Finished.of(case.results))
    outcome.happened = f"{happened}; the next run went on"
    return outcome
