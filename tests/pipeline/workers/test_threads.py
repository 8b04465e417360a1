"""One thread for each library that computes: with more, sums have another order, and results other bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl

from pipeline.config.cluster import Cluster
from pipeline.workers import client as workers_client
from pipeline.workers.pool import THREADS
from pipeline.workers.tasks import run_tasks

ROOT = Path(__file__).parents[3]
MANY = dict.fromkeys(THREADS, "4")


def pools() -> list[tuple[str, int]]:
    """The pools of threads of a process that has computed with all libraries that have any, and their sizes."""
    import numba
    import scipy.linalg
    import torch

    from kernels.calibration.reliability import softmax

    square = np.random.default_rng(0).standard_normal((64, 64))
    square @ square, scipy.linalg.solve(square, square), torch.from_numpy(square) @ torch.from_numpy(square)
    softmax(square)
    found = [(pool["user_api"], pool["num_threads"]) for pool in threadpoolctl.threadpool_info()]
    return [*found, ("torch", torch.get_num_threads()), ("numba", numba.get_num_threads())]


def limited(found: list[tuple[str, int]]) -> None:
    assert {"blas", "openmp", "torch", "numba"} <= {name for name, _ in found}, "every kind of pool was there"
    assert [pool for pool in found if pool[1] != 1] == []


def test_tests_compute_with_one_thread():
    limited(pools())


def test_workers_compute_with_one_thread(workers, tmp_path):
    with workers_client.client(Cluster(workers=1), tmp_path) as client:
        (found,) = run_tasks(client, pools, [()], 1, "pools")
    limited(found)


def python(folder: Path, code: str, *arguments: str, **environment: str) -> list:
    """Run a program that writes `pools.json` in a folder; the pools that it had."""
    given = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, env=given, check=True, capture_output=True)
    return [tuple(pool) for pool in json.loads((folder / "pools.json").read_text())]


TELL = """
import json
from pathlib import Path

def tell():
    from tests.pipeline.workers.test_threads import pools
    Path("pools.json").write_text(json.dumps(pools()))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a machine of one core has one thread in any case")
def test_more_threads_are_seen_where_there_are_more(tmp_path):
    found = python(tmp_path, f"{TELL}\ntell()", **MANY)
    assert all(count > 1 for _, count in found), found
    with pytest.raises(AssertionError):
        limited(found)


CALIBRATE = f"""{TELL}
import runpy, sys

assert not {{"numpy", "torch", "scipy", "numba"}} & set(sys.modules)
try:
    runpy.run_module("pipeline.calibrate", run_name="__main__", alter_sys=True)
finally:
    tell()
"""


def test_the_program_for_plain_files_computes_with_one_thread(tmp_path):
    """`python -m pipeline.calibrate`, whatever the environment says; asked at its end."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 90)
    logits = generator.standard_normal((90, 3)) + 2 * np.eye(3)[labels]
    np.savez(tmp_path / "one.npz", logits=logits, labels=labels)
    arguments = ("one.npz", "--splits", "2", "--methods", "temperature", "--out", "calibrated")
    limited(python(tmp_path, CALIBRATE, *arguments, **MANY))
    assert (tmp_path / "calibrated/one/calibration.csv").exists()
