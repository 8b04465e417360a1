"""Redaction: files for others name no home folder and no user; `~` stands for the home folder.

Plans and caches below `.microtome` keep paths as configured, since only this user reads them.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import re
from pathlib import Path


@functools.cache
def _home(home: Path) -> re.Pattern[str] | None:
    names = sorted({str(home), str(home.resolve())} - {"/"}, key=len, reverse=True)
    return re.compile(f"(?:{'|'.join(map(re.escape, names))})(?![A-Za-z0-9._-])") if names else None


def home() -> Path | None:
    """Return the home folder; None if there is none: a user without an entry in the system's list, and without HOME."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def user() -> str:
    """Return the user's name; the number of a user without an entry in the system's list, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def without_home(text: str) -> str:
    """Return the text with `~` in place of the home folder, wherever a path begins with it."""
    if (folder := home()) is None:
        return text
    found = _home(folder)
    return found.sub("~", text) if found else text


def scrub_logs(folder: Path, since: float) -> None:
    """Remove home folder and user from the logs of Snakemake and its SLURM jobs, where they can be rewritten."""
    for path in (*folder.glob("log/*.log"), *folder.glob("slurm_logs/**/*.log")):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if path.stat().st_mtime >= since:
                said = path.read_text(encoding="utf-8")
                kept = re.sub(rf"^(\s*User: ){re.escape(user())}$", r"\1-", without_home(said), flags=re.M)
                if kept != said:
                    path.write_text(kept, encoding="utf-8")
