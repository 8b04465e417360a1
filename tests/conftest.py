"""What all tests share: the same random numbers in every run, and one pool of workers, started by the first need."""

import os
import sys
from collections.abc import Iterator

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
