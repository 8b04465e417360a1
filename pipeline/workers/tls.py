"""TLS certificates of a scheduler and its workers: configured ones, or temporary ones of a single pool.

Dask reads keys from their files. Keys never enter a configuration, plan, store, manifest, log or report.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import MicrotomeError

if TYPE_CHECKING:
    from distributed import Security


def security(files: Mapping[str, str]) -> Security:
    """Return mutually authenticated TLS settings from the files `ca`, `certificate` and `key`.

    Raises `MicrotomeError` if a file cannot be read, and says which of the three it is.
    """
    from distributed import Security

    paths = check(files)
    given = {"tls_ca_file": paths["ca"]}
    for role in ("client", "scheduler", "worker"):
        given |= {f"tls_{role}_cert": paths["certificate"], f"tls_{role}_key": paths["key"]}
    return Security(require_encryption=True, **given)


def check(files: Mapping[str, str]) -> dict[str, str]:
    """Return the paths of `files`; raises as `security` does."""
    paths = {what: str(Path(path).expanduser()) for what, path in files.items()}
    for what, path in paths.items():
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise MicrotomeError(f"cluster.tls.{what}: the file cannot be read: {error.strerror}") from None
    return paths


def temporary(scratch: Path) -> dict[str, str]:
    """Create a key and its certificate for one pool in a private folder; return the files for `security`."""
    from distributed import Security

    try:
        made = Security.temporary().get_tls_config_for_role("scheduler")
    except ImportError:
        raise MicrotomeError(
            "workers are reached over TLS (`cluster.kind` is slurm, or the settings of Dask require encryption), which "
            "needs the package `cryptography`: install .[slurm]"
        ) from None
    # Named like the scratch folder, relative to the folder in which jobs start: job scripts contain these names.
    folder = scratch / Path(tempfile.mkdtemp(prefix="tls-", dir=scratch)).name
    files = {}
    for what, name in (("certificate", "cert"), ("key", "key")):
        file = folder / f"{what}.pem"
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(made[name])
        files[what] = str(file)
    return {"ca": files["certificate"], **files}


def clear(scratch: Path) -> None:
    """Remove the keys of pools that have ended."""
    for folder in scratch.glob("tls-*"):
        shutil.rmtree(folder, ignore_errors=True)
