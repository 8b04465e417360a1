"""What tests of several modules share."""

import json

import pytest

from pipeline.data import torchvision_data


@pytest.fixture
def in_process(monkeypatch) -> list[dict]:
    """Torchvision answers in this process, which has imported it; returns the requests that were made."""
    asked: list[dict] = []

    def in_own_process(module, request, what):
        assert module == "pipeline.data.torchvision_data"
        asked.append(request)
        return json.loads(json.dumps(torchvision_data.answer(json.loads(json.dumps(request)))))

    monkeypatch.setattr(torchvision_data, "in_own_process", in_own_process)
    return asked
