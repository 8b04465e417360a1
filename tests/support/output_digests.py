"""What the stages write for small experiments, file by file, as digests: to show that a change of code changes none.

    python tests/support/output_digests.py before.json                 before the change, on this machine
    python tests/support/output_digests.py after.json before.json      after it: names every file that is another

Experiments run from empty folders, in the same place each time. Bits are promised on one machine with one torch.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path(tempfile.gettempdir()) / "microtome-numbers"
EXPERIMENTS = ("basic", "stores", "data", "everything", "segmentation", "labelled", "table")
SKIPPED = ("digits", "libraries")


def run_all() -> dict[str, dict[str, str]]:
    """Digest of every file of every experiment, but for what tells times; reports are not made."""
    import golden_plans
    from chaos.folder import contents

    from pipeline.config.cluster import Cluster
    from pipeline.run import experiment, planner
    from pipeline.stages import registry
    from pipeline.workers import client
    from pipeline.workers import pool as cluster

    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    found = {}
    golden = json.loads(golden_plans.RECORD.read_text())
    with golden_plans.inside(FOLDER), cluster.pool(Cluster(workers=2), FOLDER / "pool") as address:
        os.environ[client.ADDRESS] = str(address)
        golden_plans.data(FOLDER)
        raws = {"chaos": golden_plans.ready_made()["chaos"]} | golden_plans.small(FOLDER)
        raws["data"]["segmenters"]["parsed"]["weights"] = parsing_weights()
        for name in ("chaos", *EXPERIMENTS):
            raw = raws[name] | {"results": str(FOLDER / "results" / name)}
            made = planner.make(experiment.parse(raw))
            # In the order that is recorded: networks with a layer in common may replace each other's stores.
            recorded = [step["step"] for step in golden[name]]
            for job in sorted(registry.jobs(made), key=lambda job: recorded.index(job.name)):
                if job.stage.name != "report":
                    job.stage.run(job)
            found[name] = contents(made.results)
    return found


def parsing_weights() -> str:
    """Write weights for the segmentation network of the tests; return their file."""
    import torch
    from safetensors.torch import save_file

    found: dict = {}
    exec((ROOT / "tests/workflow/networks/parsing.py").read_text(), found)
    torch.manual_seed(2)
    save_file(found["Parsing"]().state_dict(), FOLDER / "parsing.safetensors")
    return str(FOLDER / "parsing.safetensors")


def differences(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """The files that only one of the two has, or that differ."""
    flat = [
        {f"{name}/{file}": value for name, own in each.items() for file, value in own.items()}
        for each in (before, after)
    ]
    return sorted(file for file in flat[0].keys() | flat[1].keys() if flat[0].get(file) != flat[1].get(file))


def main(arguments: list[str]) -> int:
    found = run_all()
    Path(arguments[0]).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"{sum(map(len, found.values())):,} files of {len(found)} experiments")
    if len(arguments) == 1:
        return 0
    changed = differences(json.loads(Path(arguments[1]).read_text()), found)
    print("\n".join(changed) or "all are the same")
    return bool(changed)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    os.environ |= dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
    )
    sys.exit(main([str(Path(argument).absolute()) for argument in sys.argv[1:]]))
