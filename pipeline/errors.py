"""Errors that users can act on."""

import contextlib
import difflib
import errno
from collections.abc import Iterable, Iterator

ADVICE = {
    errno.ENOSPC: "the disk is full: free some space; finished work is kept; rerun to resume",
    errno.EDQUOT: "the disk quota is exhausted: free some space; finished work is kept; rerun to resume",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EMFILE: "too many open files: raise the limit, for example with `ulimit -n 1024`",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOMEM: "out of memory: lower `cluster.workers`, or `shard_images` of the data set",
}


class MicrotomeError(Exception):
    """An error whose message says what was found, what was expected, and what to do; it needs no traceback."""


class DamagedError(MicrotomeError):
    """Results on disk are not what was written, or not what they say they are: whatever reads them has to stop."""


@contextlib.contextmanager
def about(what: str) -> Iterator[None]:
    """Prefix errors raised inside the block with the part of the configuration that they concern."""
    try:
        yield
    except MicrotomeError as error:
        if str(error).startswith(what):
            raise
        raise MicrotomeError(f"{what}: {error}") from error


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return `; nearest: a, b, c` for an unknown name, or an empty string if nothing comes close."""
    found = difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
    return f"; nearest: {', '.join(found)}" if found else ""


def explained(error: OSError) -> str | None:
    """Return what the machine refused and what to do about it, with the file; None for other kinds of error."""
    advice = ADVICE.get(error.errno or 0)
    return f"{error.filename}: {advice}" if advice and error.filename else advice
