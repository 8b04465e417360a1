"""What is written for others names no home folder and no user: `~` stands for the home folder of whoever ran it.

Plans and memories below `.microtome` hold paths as they were configured; they are for this run, and for us alone.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import re
from pathlib import Path


@functools.cache
def _home(home: Path) -> re.Pattern[str] | None:
    names = sorted({str(home), str(home.resolve())} - {"/"}, key=len, reverse=True)
    return re.compile(f"(?:{'|'.join(map(re.escape, names))})(?![A-Za-z0-9._-])") if names else None


def without_home(text: str) -> str:
    """The text with `~` for the home folder, wherever it begins a path."""
    try:
        found = _home(Path.home())
    except RuntimeError:  # no home
        return text
    return found.sub("~", text) if found else text


def scrub_logs(folder: Path, since: float) -> None:
    """Take home folder and user out of the logs that Snakemake and its jobs on SLURM wrote; what cannot be written
    stays."""
    for path in (*folder.glob("log/*.log"), *folder.glob("slurm_logs/**/*.log")):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if path.stat().st_mtime >= since:
                said = path.read_text(encoding="utf-8")
                kept = re.sub(rf"^(\s*User: ){re.escape(getpass.getuser())}$", r"\1-", without_home(said), flags=re.M)
                if kept != said:
                    path.write_text(kept, encoding="utf-8")
