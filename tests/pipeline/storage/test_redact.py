"""What is taken out of texts and logs; tests/workflow/test_privacy.py looks at what a whole run leaves behind."""

import getpass
import os
from pathlib import Path

import pytest

from pipeline.storage import redact
from pipeline.storage.redact import scrub_logs, without_home


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOGNAME", "somebody")
    return tmp_path / "home"


def test_the_home_folder_is_a_tilde_where_it_begins_a_path(home):
    assert without_home(f"{home}/data and {home}") == "~/data and ~"
    assert without_home(f"{home}s/data") == f"{home}s/data"


def test_logs_of_snakemake_and_of_its_jobs_name_nobody(tmp_path, home):
    said = f"SNAKEMAKE\n  User: {getpass.getuser()}\n  Run directory: {home}/work\nUser: other\n"
    names = ("log/1.log", "slurm_logs/rule_a/x_1/2.log", "log/old.log", "other/3.log")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(said)
    os.utime(tmp_path / "log/old.log", (0, 0))
    scrub_logs(tmp_path, since=10)
    found = [Path(tmp_path / name).read_text() for name in names]
    assert found[:2] == ["SNAKEMAKE\n  User: -\n  Run directory: ~/work\nUser: other\n"] * 2
    assert found[2:] == [said] * 2, "of another run, or no log"


def test_a_user_without_a_name_and_without_a_home(tmp_path, monkeypatch):
    """As in a container that runs under any number."""
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert (redact.home(), redact.user()) == (None, str(os.getuid()))
    assert without_home("/root/data") == "/root/data"
    (tmp_path / "log").mkdir()
    (tmp_path / "log/1.log").write_text(f"  User: {os.getuid()}\n")
    scrub_logs(tmp_path, since=0)
    assert (tmp_path / "log/1.log").read_text() == "  User: -\n"
