"""What tests of several modules share."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import torchvision_data


@pytest.fixture
def in_process(monkeypatch) -> list[dict]:
    """Torchvision answers in this process, which has imported it; returns the requests that were made."""
    asked: list[dict] = []

    def run(command, **_):
        assert command[:3] == [sys.executable, "-m", "pipeline.torchvision_data"]
        asked.append(json.loads(Path(command[3]).read_text()))
        torchvision_data.main(*command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(torchvision_data.subprocess, "run", run)
    return asked
