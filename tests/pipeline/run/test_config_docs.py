"""`config/README.md` and `config/schema.json` are those of the classes, and say something of every key."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from pipeline.run.config_docs import FOLDER, _sections, documents
from pipeline.run.experiment import Config, load

CONFIGS = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", ["schema.json", "README.md"])
def test_the_files_are_as_generated(name):
    assert (FOLDER / name).read_text() == documents()[name], "run `python -m pipeline.config`"


def test_every_key_is_described():
    sections = [model for model, _ in _sections(Config, "")]
    assert {model.__name__ for model in sections} >= {"Dissect", "Recipe", "Network", "Squash", "Split", "LabelMaps"}
    for model in sections:
        assert model.__doc__ and model.__doc__ != BaseModel.__doc__, model
        for key, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{key} has no description"


def test_every_key_is_in_the_table():
    text = documents()["README.md"]
    for model, path in _sections(Config, ""):
        table = text.partition(f"## `{path}`" if path else "## Top level")[2].partition("\n## ")[0]
        assert {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")} == set(model.model_fields)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_configurations_that_come_along_are_accepted(path, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    assert load(path).name
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_demo_is_there():
    assert Path(FOLDER / "config.yaml") in CONFIGS
