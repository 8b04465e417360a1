"""The real Snakefile, in a process of its own and as a user starts it; and what a results folder holds."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.storage.manifest import Manifest
from pipeline.workers import client

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests/workflow/networks" / "tiny.py")
PARSING = str(ROOT / "tests/workflow/networks" / "parsing.py")


def mini(**cluster: Any) -> dict[str, Any]:
    """The smallest experiment: eight scenes, one layer; `cluster` is its section."""
    return {
        "name": "mini",
        "results": "results",
        "datasets": {"scenes": {"kind": "scenes", "size": 32, "images": {"train": 0, "validation": 8}}},
        "networks": {"tiny": {"module": f"{TINY}:tiny", "weights": "random", "layers": ["0.1"]}},
        "cluster": cluster,
    }


def snakemake(folder: Path, config: Mapping[str, Any] | Path, *arguments: str, code: int = 0) -> str:
    """Run the workflow in `folder` on a configuration; return all that it printed.

    Its exit status has to be `code`. A pool of workers of the test session is not for it: it starts its own.
    """
    if isinstance(config, Path):
        file = config
    else:
        file = folder / f"{config['name']}.yaml"
        file.write_text(yaml.safe_dump(dict(config)))
    environment = {key: value for key, value in os.environ.items() if key != client.ADDRESS}
    if {"-n", "--dry-run"} & set(arguments):
        environment["XDG_CACHE_HOME"] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "snakemake", "--snakefile", ROOT / "Snakefile", *arguments, "--configfile", file],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, f"exit status {done.returncode}, expected {code}:\n{done.stdout}"
    return done.stdout


def linked(finished: Path, folder: Path) -> Path:
    """A results folder that shares its files with a finished one: for tests that replace files and damage none."""
    shutil.copytree(finished / "results", folder / "results", copy_function=os.link)
    return folder / "results"


def written(results: Path) -> set[str]:
    """Every file of a results folder but caches."""
    return {
        path.relative_to(results).as_posix()
        for path in results.rglob("*")
        if path.is_file() and path.relative_to(results).parts[0] != ".microtome"
    }


def states(results: Path) -> dict[str, tuple[int, int, str]]:
    """Inode, time and digest of every file but caches: the same only where nothing was written again."""
    return {
        name: ((results / name).stat().st_ino, (results / name).stat().st_mtime_ns, digest_of(results / name))
        for name in written(results)
    }


def contents(results: Path) -> dict[str, str]:
    """Digest of every file that holds results: neither manifests, ledgers and logs, nor the reports, which have times.

    Of a manifest there is the digest of its output.
    """
    found = {}
    for name in written(results):
        path = results / name
        if "done" in path.parts and path.suffix == ".json":
            found[name] = Manifest.read(path).digest
        elif not name.startswith("report/") and "logs" not in path.parts and path.suffix != ".ledger":
            found[name] = digest_of(path)
    return {name: digest for name, digest in found.items() if not name.startswith("report/")}


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ledger_shards(ledger: Path) -> list[str]:
    """The shards a ledger records, one entry for each time a shard was made."""
    entries = [json.loads(line.rpartition("\t")[0]) for line in ledger.read_text().splitlines()]
    return [entry["shard"] for entry in entries if entry["files"]]


def jobs_run(said: str) -> dict[str, int]:
    """How often each rule ran to its end, from what Snakemake printed."""
    rules = re.findall(
        r"Finished jobid: \d+ \(Rule: (\w+)\)", said
    )  # a progress line of a job may follow without a break
    return {rule: rules.count(rule) for rule in rules if rule.startswith("make_")}
