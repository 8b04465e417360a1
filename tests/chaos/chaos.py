"""Disturb a command in every way, end it, and compare its results, byte for byte, with those of an undisturbed run.

    python tests/chaos/chaos.py --results results -- snakemake --configfile config/config.yaml

The command is run undisturbed first, unless the results folder is finished. Then each fault works on a copy in that
place; in the end the undisturbed results are put back. The folder needs room for two more copies. Prints a table, and
ends with exit status 1 if a promise was broken; the disturbed folder is then kept beside the other.
"""

import argparse
import fnmatch
import random
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import damage
import folder
import kills
import resources
import two_runs
from case import BrokenPromiseError, Case, NotPossibleError, Outcome, tail
from processes import Running

Fault = Callable[[Case], Outcome]


def faults(undisturbed: Path, seed: int = 0) -> dict[str, Fault]:
    """Every fault by its name, for the stages, stores and ledgers that there are."""
    draw = random.Random(seed)
    stages = folder.steps(undisturbed)
    found: dict[str, Fault] = {}

    def add(name: str, function: Callable[..., Outcome], *arguments: str) -> None:
        found["-".join(filter(None, [name, *arguments])).replace(" ", "-").replace("/", "-")] = partial(
            _call, function, arguments
        )

    for stage in stages:
        add("kill-all", kills.everything, stage)
    for number in range(3):
        add("kill-all-any-time", kills.everything_at_any_time, str(number))
    add("kill-all-twice", kills.everything_twice, "")
    if len(stages) > 2:
        add("in-sequence", kills.in_sequence, *(stages[len(stages) * part // 3] for part in range(3)))
    for name, function, count in (
        ("kill-snakemake", kills.snakemake_alone, 3),
        ("sigterm", kills.sigterm, 2),
        ("sigint", kills.sigint, 2),
        ("ctrl-c", kills.ctrl_c, 2),
        ("sigint-all", kills.sigint_all, 2),
        ("ctrl-c-twice", kills.ctrl_c_twice, 1),
        ("kill-worker", kills.worker, 3),
        ("kill-job", kills.job, 2),
        ("kill-client", kills.client, 2),
        ("kill-jobs", kills.jobs, 2),
        ("kill-pool", kills.pool, 2),
        ("sigterm-pool", kills.pool_sigterm, 1),
        ("why", kills.asked_why, 1),
        ("power-cut", damage.after_power_cut, 2),
        ("scratch-deleted", two_runs.scratch_deleted, 1),
        ("two-runs", two_runs.second_is_refused, 1),
        ("two-checkouts", two_runs.other_checkout, 1),
        ("two-runs-without-lock", two_runs.without_lock, 2),
        ("read-only", resources.read_only, 1),
        ("no-worker-survives", resources.no_worker_survives, 1),
    ):
        for stage in draw.sample(stages, min(count, len(stages))):
            add(name, function, stage)
    add("two-runs-same-moment", two_runs.same_moment, "")
    for stage in stages:
        add("disk-full", resources.disk_full, stage)
    add("little-memory", resources.little_memory, "extract" if "extract" in stages else stages[-1])
    add("ulimit", resources.few_open_files, "256")
    for mode in ("sys.exit", "graceful", "segfault"):
        add("workers-die", resources.workers_die, mode)
    for at, (group, files) in enumerate(damage.groups(undisturbed).items()):
        add("damage", damage.refused, group, damage.kind_for(undisturbed, files, at))
    for at, stage in enumerate(sorted({found["stage"] for found in folder.manifests(undisturbed).values()})):
        add("manifest", damage.manifest, stage, list(damage.KINDS)[at % len(damage.KINDS)])
    for at, name in enumerate(sorted({path.stem for path in undisturbed.rglob("*.ledger")})):
        add("ledger", damage.ledger, name, ("truncated", "flipped", "emptied", "deleted")[at % 4])
    add("repair", damage.repair, "")
    add("repair-metadata", damage.repair_metadata, "")
    return found


def _call(function: Callable[..., Outcome], arguments: Sequence[str], case: Case) -> Outcome:
    return function(case, *arguments)


def describe(fault: Fault) -> str:
    function, arguments = fault.args  # type: ignore[attr-defined]
    said = function.__doc__.splitlines()[0]
    detail = " ".join(word for word in arguments if word and not word.isdigit())
    return f"{said} ({detail})" if detail else said


def undisturbed_run(command: Sequence[str], cwd: Path, scratch: Path) -> None:
    running = Running(command, cwd, scratch / "undisturbed.txt")
    try:
        if running.wait(24 * 3600):
            raise SystemExit(f"the undisturbed run failed:\n{tail(running.said)}")
    finally:
        running.kill_all()


def run(
    command: Sequence[str], cwd: Path, results: Path, only: Sequence[str], seed: int, scratch: Path
) -> list[tuple[str, str, Outcome | BrokenPromiseError | NotPossibleError]]:
    """Every chosen fault: its name, what it is, and how it ended."""
    results = results.absolute()
    undisturbed = results.with_name(results.name + ".undisturbed")
    if undisturbed.exists():
        raise SystemExit(f"{undisturbed} is there: of an earlier run? Rename it to {results.name} or remove it")
    undisturbed_run(command, cwd, scratch)
    results.rename(undisturbed)
    rows: list[tuple[str, str, Outcome | BrokenPromiseError | NotPossibleError]] = []
    try:
        found = faults(undisturbed, seed)
        chosen = [name for name in found if not only or any(fnmatch.fnmatch(name, one) for one in only)]
        if not chosen:
            raise SystemExit(f"no fault is called {' or '.join(only)}; there are: {', '.join(found)}")
        for name in chosen:
            own = scratch / name
            own.mkdir()
            case = Case(command, cwd, results, undisturbed, own, random.Random(f"{seed} {name}"))
            began = time.monotonic()
            end: Outcome | BrokenPromiseError | NotPossibleError
            try:
                end = found[name](case)
            except (BrokenPromiseError, NotPossibleError) as error:
                end = error
            except Exception:
                end = BrokenPromiseError(f"the fault itself failed:\n{traceback.format_exc()}")
            finally:
                case.end_all()
            if isinstance(end, BrokenPromiseError) and results.exists():
                folder.copy(results, results.with_name(f"{results.name}.{own.name}"))
            rows.append((name, describe(found[name]), end))
            print(f"{time.monotonic() - began:6.1f} s  {name}: {_line(end)}", file=sys.stderr, flush=True)
    finally:
        if results.exists():
            folder.remove(results)
            results.rmdir()
        undisturbed.rename(results)
    return rows


def _line(end: Outcome | BrokenPromiseError | NotPossibleError) -> str:
    match end:
        case Outcome():
            return f"{end.happened} | {end.kept} | {end.compared}"
        case NotPossibleError():
            return f"skipped: {end}"
    return f"BROKEN: {end}"


def table(rows: Sequence[tuple[str, str, Outcome | BrokenPromiseError | NotPossibleError]]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| fault | what happened | kept work | compared bytes |", "|---|---|---|---|"]
    for name, what, end in rows:
        match end:
            case Outcome():
                cells = [end.happened, end.kept, end.compared]
            case NotPossibleError():
                cells = [f"skipped: {end}", "", ""]
            case _:
                cells = [f"**broken**: {str(end).splitlines()[0]}", "", ""]
        cells = [cell.replace("|", "\\|") for cell in cells]
        lines.append(f"| `{name}`: {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="the folder that the command writes")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="these faults; may hold * and ?")
    parser.add_argument("--seed", type=int, default=0, help="decides moments and bits")
    parser.add_argument("command", nargs="+", help="after --")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        rows = run(given.command, Path.cwd(), given.results, given.only, given.seed, Path(scratch))
    broken = [name for name, _, end in rows if isinstance(end, BrokenPromiseError)]
    print(f"`{shlex.join(given.command)}`, seed {given.seed}\n\n{table(rows)}")
    print(f"\n{len(rows)} faults, {len(broken)} broken promises", *broken, sep="\n  ", file=sys.stderr)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
