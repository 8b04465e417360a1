"""No stage's numerical code changes without its author saying whether the numbers change."""

import pytest
import stage_versions
from stage_versions import complaint, digest_of, files, imports, main, read_record, versioned

from pipeline.stages.registry import STAGES


@pytest.mark.parametrize("name", sorted(versioned()))
def test_the_code_is_that_of_the_recorded_version(name):
    one = versioned()[name]
    said = complaint(name, read_record().get(name), one.now(), one.module, one.attribute)
    assert said is None, said


def test_every_stage_has_a_version_and_names_its_own_code():
    for name, stage in STAGES.items():
        assert isinstance(stage.VERSION, int) and stage.VERSION >= 1
        if hasattr(stage, "CODE"):
            assert stage.__name__.replace(".", "/") + ".py" in files(stage.CODE), name
    assert {"ingest", "concepts", "network", "extract", "dissect", "scenes", "layer_id"} <= set(versioned())


# What only finds, moves and keeps bytes: ids and digests hold what it found.
PLUMBING = {
    f"pipeline/{name}.py"
    for name in (
        "arrays", "cluster", "config", "datasets", "earlier", "errors", "identity", "images", "known_datasets",
        "label_maps", "layer_info", "listing", "lock", "manifest", "network", "plan", "privacy", "processes",
        "published", "recipe", "result_tables", "snapshot", "stage", "store", "tables",
    )
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(versioned()))
def test_the_code_of_a_stage_is_all_that_it_computes_with(name):
    code = set(files(versioned()[name].code))
    used = {module for file in code for module in imports(file)}
    assert used - code - PLUMBING - ALONE.get(name, set()) == set()


# Imported, and of a version of their own, or not used for results of the stage.
ALONE = {
    "ingest": {"kernels/images/colour_names.py"},  # by the scenes
    "network": {"pipeline/stages/randomize/stage.py"},  # whose manifest names the weights
    "calibrate": {"pipeline/stages/calibrate/plain_files.py"},  # the program beside the stage
    # Counts of layers that are not stored go by the version of `dissect`, and those layers by that of `extract`.
    "extract": {
        "kernels/dissection/half.py",
        "kernels/dissection/threshold.py",
        "pipeline/stages/dissect/stage.py",
        "pipeline/stages/extract/pictures.py",
    },
    "dissect": {"pipeline/networks/forward.py", "pipeline/networks/layers.py"},
    "layer_id": {"pipeline/networks/layers.py"},
}


SOURCE = '''
"""Module."""
def f(x: int, y=2) -> int:
    """Doc."""
    for i in range(x):
        y += i  # comment
    return f"{y!r:>{x}}" + 'text'
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # comment", ""),
        ('"""Doc."""', '"""Other words."""'),
        ('"""Module."""\n', ""),
        ("x: int", "x: float"),
        (" -> int", ""),
        ("range(x):", "range(\n        x,\n    ):"),
        ("'text'", '"text"'),
        ("y += i", "y  +=  (i)"),
        ("    return", "\n\n    return"),
    ],
)
def test_what_does_not_count(old, new):
    assert old in SOURCE
    assert digest_of(SOURCE.replace(old, new)) == digest_of(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("y=2", "y=3"),
        ("y=2", "y=2.0"),
        ("y += i", "y -= i"),
        ("    return", "        return"),
        ("'text'", "'Text'"),
        ("!r", "!s"),
        ("range(x)", "range(y)"),
        ("def f", "def g"),
    ],
)
def test_what_counts(old, new):
    assert old in SOURCE
    assert digest_of(SOURCE.replace(old, new)) != digest_of(SOURCE)


def test_what_an_author_is_told():
    before = {"version": 2, "code": {"a.py": "1", "b.py": "2"}}

    def said(**changes):
        return complaint("extract", before, before | changes, "pipeline.stages.extract.stage", "VERSION")

    assert said() is None
    assert "extract: b.py changed" in said(code={"a.py": "1", "b.py": "3"})
    assert "raise VERSION in pipeline.stages.extract.stage" in said(code={"a.py": "1"})
    assert "--same-numbers extract" in said(code={"a.py": "1", "b.py": "2", "c.py": "3"})
    assert "record it" in said(version=3, code={})
    assert "versions only rise" in said(version=1)


def test_recording(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage_versions, "RECORD", tmp_path / "versions.json")
    assert main([]) == 0
    recorded = read_record()
    assert set(recorded) == set(versioned())
    original = stage_versions.syntax_digest
    monkeypatch.setattr(
        stage_versions, "syntax_digest", lambda path: "new" if path.name == "colour.py" else original(path)
    )
    assert main([]) == 1 and "concepts: kernels/images/colour_names.py changed" in capsys.readouterr().out
    assert read_record() == recorded
    assert main(["--same-numbers", "concepts"]) == 1
    assert read_record()["concepts"]["code"]["kernels/images/colour_names.py"] == "new"
    assert read_record()["dissect"] == recorded["dissect"]
    assert main(["--same-numbers", "concepts", "dissect", "scenes"]) == 0
    with monkeypatch.context() as raised:
        raised.setattr("pipeline.stages.concepts.stage.VERSION", 99)
        assert main([]) == 0
    assert read_record()["concepts"]["version"] == 99
    assert main([]) == 1 and "versions only rise" in capsys.readouterr().out


def test_code_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"CODE names 'pipeline/absent\.py'"):
        files(("pipeline/absent.py",))
