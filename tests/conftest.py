"""What all tests share: the same random numbers in every run, and one pool of workers, started by the first need."""

import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import threadpoolctl

from pipeline.config.cluster import Cluster
from pipeline.workers import client
from pipeline.workers import pool as cluster

# What tests compute themselves is compared to the bit with what workers computed: under the same limits of threads.
os.environ |= cluster.THREADS
threadpoolctl.threadpool_limits(1)  # of what is there before the variables: zarr's plugin of pytest imports numpy


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs the whole workflow, file by file the longest, comes first: what is short fills the processes' ends."""
    items.sort(key=lambda item: item.path.parent.name not in ("chaos", "real", "workflow"))


SLOW = (
    "tests/chaos/",
    "tests/real/",
    # Each case runs stages anew, or starts Snakemake several times.
    "tests/workflow/test_adding_a_stage.py",
    "tests/workflow/test_one_results_folder.py",
    "tests/workflow/test_privacy.py",
    "tests/workflow/test_profiles.py",
    "tests/workflow/test_shared_layers.py",
    "tests/workflow/test_slurm.py",
    "tests/pipeline/upkeep/test_incremental.py",
    "tests/pipeline/stages/test_compare.py",
    "tests/pipeline/stages/test_data_fraction.py",
    # Processes that are killed, sizes and times, a browser.
    "tests/pipeline/run/test_benches.py",
    "tests/pipeline/run/test_scale.py",
    "tests/pipeline/stages/test_report_browser.py",
    "tests/pipeline/workers/test_pool.py",
    "tests/pipeline/workers/test_processes.py",
    "tests/pipeline/workers/test_threads.py",
    # Oracles of other libraries, which take seconds to import.
    "tests/pipeline/networks/test_library_networks.py",
    "tests/pipeline/networks/test_published.py",
    "tests/pipeline/networks/test_zhang2017.py",
    "tests/pipeline/run/test_configs.py",
    "tests/pipeline/plan/test_golden_plans.py",
)
"""What `make test-slow` runs, and `make test` does not."""


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.relative_to(item.config.rootpath).as_posix().startswith(SLOW):
        item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature experiment that the real Snakefile finished, with its configuration: made once for all processes.

    Tests hard-link its results, and copy what they damage.
    """
    from workflow_run import mini, snakemake

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            snakemake(folder, mini(workers=1))
            (folder / "made").touch()
    return folder


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Networks with initial weights are the same ones whichever tests run before."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stages run on one pool for the whole session, so that its worker imports torch and compiles kernels once."""
    with cluster.pool(Cluster(workers=1), tmp_path_factory.mktemp("pool")) as address:
        os.environ[client.ADDRESS] = str(address)
        yield
        del os.environ[client.ADDRESS]


@pytest.fixture(scope="session")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address file of a second pool, for tests that hold what two workers make against what one has made."""
    with cluster.pool(Cluster(workers=2), tmp_path_factory.mktemp("pool")) as address:
        yield str(address)
