"""What a data set of 1.3 million images costs before an image is decoded, beside one of a thousand.

python -m tests.bench.bench_listing [IMAGES]

The images are not there: their folders are, and a snapshot of what would lie in them. CPU seconds, since the machine
may be shared; peak memory of the process that did it.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pipeline.plan.step import Plan
from pipeline.run import experiment, planner
from pipeline.stages.dissect import work
from pipeline.stages.registry import jobs
from tests.support.large_listing import decoded_by_nobody, large

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", type=int, default=1_300_000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.images)
        return
    for count in (1000, arguments.images):
        with tempfile.TemporaryDirectory() as folder:
            # In a process of its own, so that its peak memory is its own.
            command = [sys.executable, "-m", "tests.bench.bench_listing", str(count), "--measure", folder]
            subprocess.run(command, check=True, cwd=ROOT)


def measure(folder: Path, count: int) -> None:
    print(f"{count:,} images", flush=True)
    raw = large(folder, count)
    wanted = experiment.parse(raw)
    made: Plan = report("plan, the first time", planner.make, wanted)
    report("plan, at every later start", planner.make, wanted)
    dry_run(folder, raw)
    (ingest,) = jobs(made, "ingest")
    with decoded_by_nobody():
        report("ingest, all but decoding", ingest.stage.run, ingest)
    (extract,) = jobs(made, "extract")
    images = extract.images
    counted = report("images that count", work.counted_images, images, "validation", images.shards("validation"), [])
    report("id of that choice", work.basis, counted)


def report(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    began = time.process_time()
    result = function(*arguments)
    spent, peak = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"  {what:30s} {spent:7.2f} s   peak {peak / 1e3:5.0f} MB", flush=True)
    return result


def dry_run(folder: Path, raw: dict[str, Any]) -> None:
    """`make plan`, twice: the first one inspects the network."""
    (folder / "large.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--dry-run", "--quiet", "rules"]
    for what in ("make plan, the first time", "make plan, later"):
        before = children()
        subprocess.run(
            [*command, "--configfile", folder / "large.yaml"],
            cwd=folder,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        print(f"  {what:30s} {children() - before:7.2f} s", flush=True)


def children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
