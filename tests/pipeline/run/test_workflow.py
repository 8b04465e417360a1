"""What a job prints goes to the terminal, whatever becomes of its log."""

import contextlib
import io
import sys
from pathlib import Path

import pytest

from pipeline.run.job import _Both


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_log_on_a_full_disk_hides_nothing():
    terminal = io.StringIO()
    with _Both(terminal, Path("/dev/full")) as both, contextlib.redirect_stderr(both):
        print("error: the disk is full", file=sys.stderr)
    assert terminal.getvalue() == "error: the disk is full\n"


def test_a_log(tmp_path):
    terminal = io.StringIO()
    with _Both(terminal, tmp_path / "log") as both:
        print("one", file=both)
        assert (tmp_path / "log").read_text() == "one\n", "there at once"
    with _Both(terminal, tmp_path / "no folder" / "log") as both:
        print("two", file=both)
    assert terminal.getvalue() == "one\ntwo\n"
