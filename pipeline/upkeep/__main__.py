"""The commands of `make`.

python -m pipeline.upkeep verify RESULTS                          compare every chunk file with what was recorded
python -m pipeline.upkeep repair RESULTS                          verify, then forget damaged files: the next run
                                                                  recomputes them
python -m pipeline.upkeep gc RESULTS [--configs FILES] [--yes]    list what no network refers to, and experiments
                                                                  that none of FILES names; --yes removes it
python -m pipeline.upkeep why CONFIG [--only NAMES]               list what would run, why, and what it costs
python -m pipeline.upkeep recompute CONFIG STAGE [--only NAMES]   delete a stage's outputs: the next run
                                                                  recomputes them
"""

import argparse
import sys
from pathlib import Path

from pipeline.config.core import Core
from pipeline.errors import MicrotomeError, explained
from pipeline.run import experiment
from pipeline.storage import SCRATCH
from pipeline.storage.lock import RunLock
from pipeline.storage.object_storage import size_of
from pipeline.upkeep import damage, unreferenced


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.upkeep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("verify", "repair", "gc"):
        command = commands.add_parser(name)
        command.add_argument("results", type=Path)
        if name == "gc":
            command.add_argument("--yes", action="store_true", help="remove it")
            command.add_argument(
                "--configs", type=Path, nargs="+", default=[], help="all configurations that write to this folder"
            )
    for name in ("why", "recompute"):
        command = commands.add_parser(name)
        command.add_argument("config", type=Path)
        if name == "recompute":
            command.add_argument("stage")
        command.add_argument("--only", metavar="NAMES", help="these networks or data sets, with commas between")
    given = parser.parse_args(arguments)
    try:
        return {"verify": verify, "repair": repair, "gc": gc, "why": why, "recompute": recompute}[given.command](given)
    except OSError as error:
        if (said := explained(error)) is None:
            raise
        raise MicrotomeError(said) from error


def verify(given: argparse.Namespace) -> int:
    findings = damage.look(_results(given))
    print("\n".join(map(str, findings.damaged)) or "every file is what was written")
    for path in findings.changed:
        print(f"{path}: what it records changed while this looked: a run works on it, so look again later")
    return 1 if findings.damaged else 0


def repair(given: argparse.Namespace) -> int:
    with RunLock(_results(given)):
        found = damage.repair(given.results)
    print("\n".join(map(str, found)) or "every file is what was written")
    return 0


def gc(given: argparse.Namespace) -> int:
    total = 0
    with RunLock(_results(given)):
        configs = [experiment.load(path) for path in given.configs]
        dropped = unreferenced.experiments(given.results, configs) if configs else []
        folders = [each for each in unreferenced.folders(given.results) if not set(each.parents) & set(dropped)]
        for folder in folders + dropped:
            if not folder.exists():
                print(f"             {folder} is gone meanwhile")
                continue
            total += (size := size_of(folder))
            print(f"{size / 1e9:8.3f} GB  {folder}")
            if given.yes:
                unreferenced.remove(folder)
    print(f"{total / 1e9:8.3f} GB in all {'removed' if given.yes else '(add --yes, or YES=1 with make, to remove)'}")
    return 0


def why(given: argparse.Namespace) -> int:
    from pipeline.upkeep.why import explain

    print("\n".join(explain(_wanted(given))) or "nothing would run")
    return 0


def recompute(given: argparse.Namespace) -> int:
    from pipeline.upkeep.recompute import discard

    wanted = _wanted(given)
    with RunLock(Path(wanted.results)):
        removed = discard(wanted, given.stage)
    print("\n".join(removed) or "nothing of it is there")
    return 0


def _results(given: argparse.Namespace) -> Path:
    """Return the results folder; refuse any other folder, so that nothing is read or written there."""
    if not given.results.is_dir():
        raise MicrotomeError(f"{given.results}: no such results folder")
    if not (given.results / SCRATCH).is_dir() and next(damage.manifests(given.results), None) is None:
        raise MicrotomeError(f"{given.results} is no results folder: it has neither {SCRATCH}/ nor a manifest")
    return given.results


def _wanted(given: argparse.Namespace) -> Core:
    wanted = experiment.load(given.config)
    return experiment.select(wanted, given.only) if given.only else wanted


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MicrotomeError as error:
        sys.exit(f"error: {error}")
