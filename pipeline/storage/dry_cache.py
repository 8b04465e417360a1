"""Where a dry run keeps what it found: it makes no results folder, and writes into none but its place for caches."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from pipeline.storage import SCRATCH
from pipeline.storage.redact import home


def place(results: Path) -> Path:
    """Return the folder for the caches of a dry run; it is made by the first file that is written there.

    It is the results folder's own, if that can be written. Otherwise it is `microtome/<digest of the results folder's
    path>` in the user's folder for caches (XDG_CACHE_HOME, else ~/.cache); without one, a new temporary folder.
    """
    if os.access(results, os.W_OK | os.X_OK):
        return results / SCRATCH
    known = _of_user(results)
    return known if known is not None else Path(tempfile.mkdtemp(prefix="microtome-"))


def take_over(results: Path) -> None:
    """Move what dry runs found before there was a results folder into that folder."""
    known = _of_user(results)
    if not (results / SCRATCH).exists() and known is not None and known.is_dir():
        with contextlib.suppress(OSError):  # then it is found again
            results.mkdir(parents=True, exist_ok=True)
            shutil.move(known, results / SCRATCH)


def _of_user(results: Path) -> Path | None:
    if given := os.environ.get("XDG_CACHE_HOME"):
        base = Path(given)
    elif (folder := home()) is not None:
        base = folder / ".cache"
    else:
        return None
    there = next((path for path in (base, *base.parents) if path.exists()), base)
    if not os.access(there, os.W_OK | os.X_OK):
        return None
    return base / "microtome" / hashlib.sha256(os.fsencode(results.absolute())).hexdigest()[:20]
