"""Provenance of results: the code's revision and the versions of packages."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "numpy", "numba", "zarr", "dask", "snakemake")


@functools.cache
def provenance() -> dict[str, Any]:
    """Return package versions and the git revision, for readers of a result. No id depends on them."""
    root = Path(__file__).parents[2]
    try:
        git = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        git = ""
    return {
        "revision": git or "unknown",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }
