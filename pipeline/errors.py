"""Errors that a user can act on."""

import difflib
from collections.abc import Iterable


class MicrotomeError(Exception):
    """An error whose message says what was found, what was expected, and what to do; no traceback is needed."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """`; nearest: a, b, c` for an unknown name, or an empty string when nothing comes close."""
    found = difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
    return f"; nearest: {', '.join(found)}" if found else ""
