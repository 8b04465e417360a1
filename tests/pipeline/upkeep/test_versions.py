"""No stage's numerical code changes without its author saying whether the numbers change."""

import json

import golden_plans
import pytest
import stage_versions
from stage_versions import ROOT, complaint, digest_of, files, imports, main, read_record, versioned

from pipeline.stages.extract.settings import THRESHOLDS
from pipeline.stages.registry import STAGES


@pytest.mark.parametrize("name", sorted(versioned()))
def test_the_code_is_that_of_the_recorded_version(name):
    one = versioned()[name]
    said = complaint(name, read_record().get(name), one.now(), one.module, one.attribute)
    assert said is None, said


def test_every_stage_has_a_version_and_names_its_own_code():
    for name, stage in STAGES.items():
        assert isinstance(stage.version, int) and stage.version >= 1
        home = f"pipeline/stages/{name}"
        if stage.code:
            assert stage.version == versioned()[name].version
            own = {f"{home}/{file}.py" for file in ("stage", "settings", "tasks", "results")}
            assert {file for file in own if (ROOT / file).exists()} <= set(files(stage.code)), name
    assert [name for name, stage in STAGES.items() if not stage.code] == ["report"]
    assert {"ingest", "concepts", "network", "extract", "dissect", "scenes", "layer_id"} <= set(versioned())


def test_the_version_of_thresholds_of_layers_that_are_not_stored_is_that_of_the_dissection():
    assert STAGES["dissect"].version == THRESHOLDS


# What only finds, moves and keeps bytes: ids and digests hold what it found. What a stage names is none of it.
NAMED = {file for one in versioned().values() for file in files(one.code)}
FINDS = {
    path.relative_to(ROOT).as_posix()
    for package in ("storage", "config", "workers", "data", "plan")
    for path in (ROOT / "pipeline" / package).rglob("*.py")
}
DESCRIBES = {f"pipeline/networks/{name}.py" for name in ("identity", "layer", "opened", "published")}
PLUMBING = (FINDS - NAMED) | DESCRIBES | {"pipeline/errors.py"}
# What lists a data set: each id holds the digest of the listing, or of the pixels.
LISTS = {
    f"pipeline/data/{name}.py" for name in ("arrays", "csv_tables", "kinds", "listing", "published_layouts", "snapshot")
}
# Imported, and of a version of their own, or not used for results of the stage.
ALONE = {
    "ingest": {
        "kernels/images/colour_names.py",  # by the scenes
        "pipeline/data/label_maps.py",  # by `concepts`
        "pipeline/networks/layers.py",  # of it, which output counts: `returned` is named
    },
    "concepts": LISTS,
    "randomize": LISTS | {"pipeline/networks/layers.py"},  # of it, which output counts: `returned` is named
    "network": LISTS | {"pipeline/networks/layers.py"},
    "dissect": LISTS
    # Those layers go by the version of `extract`; a forecast tells the memory of a forward pass.
    | {f"pipeline/networks/{name}.py" for name in ("forward", "layers", "prepare")},
    "ablate": LISTS | {"pipeline/networks/layer_id.py"},  # the manifest of the extraction has the ids
    "extract": {
        "pipeline/stages/extract/replaced.py",  # what was there before is kept
        # Counts of layers that are not stored go by the version of `dissect`.
        *(f"kernels/dissection/{name}.py" for name in ("brackets", "half", "threshold")),
        "pipeline/stages/extract/pictures.py",
        "pipeline/networks/generators.py",  # latents for the check of layers: those of images are stored
    },
    "intervene": LISTS
    | {"pipeline/data/decode.py"}  # of label maps in files, which generated images do not have
    | {"pipeline/stages/dissect/found.py"},  # a reader of the parent's tables
    "attribute": {"pipeline/networks/segmenters.py"},  # which categories label maps have: the parent's id knows
    "audit": {
        "pipeline/networks/segmenters.py",  # which categories label maps have: the parent's id knows
        "pipeline/stages/attribute/found.py",  # readers of the parents' tables
        "pipeline/stages/dissect/found.py",
        "kernels/images/colour_names.py",  # of label maps, by the scenes
        *(f"pipeline/data/{name}.py" for name in ("csv_tables", "decode", "kinds")),  # boxes: their digest is in the id
    },
    "probes": {"pipeline/networks/layer_id.py"},  # the manifest of the extraction has the ids
    "visualize": {
        # Of these, the name of a group, the form of a class, whether outputs are those of a softmax, and its type.
        "pipeline/stages/attribute/results.py",
        "pipeline/stages/attribute/settings.py",
        "pipeline/networks/explainable.py",
        "pipeline/networks/fitness.py",
        # Compositions of scenes: a generator's id holds their version.
        "pipeline/data/scenes/__init__.py",
        "pipeline/data/scenes/composed.py",
        "pipeline/networks/layer_id.py",  # the manifest of the extraction has the ids
        "pipeline/stages/dissect/found.py",  # readers of the parents' tables
        "pipeline/stages/extract/found.py",
    },
    "attack": {
        # Of these, the form of a class, whether outputs are those of a softmax, and its type.
        "pipeline/stages/attribute/settings.py",
        "pipeline/networks/explainable.py",
        "pipeline/networks/fitness.py",
        "pipeline/networks/layer_id.py",
    },
    "layer_id": {"pipeline/networks/layers.py"},
}


def parents_of(name: str) -> set[str]:
    """The stages that steps of a stage read, in some plan that is recorded; their versions are in its ids."""
    steps = [step for plan in json.loads(golden_plans.RECORD.read_text()).values() for step in plan]
    return {parent.split()[0] for step in steps if step["step"].split()[0] == name for parent in step["parents"]}


@pytest.mark.parametrize("name", sorted(versioned()))
def test_the_code_of_a_stage_is_all_that_it_computes_with(name):
    code = set(files(versioned()[name].code))
    used = {module for file in code for module in imports(file)}
    promised = {f"pipeline/stages/{stage}/{file}.py" for stage in parents_of(name) for file in ("results", "settings")}
    assert used - code - PLUMBING - promised - ALONE.get(name, set()) == set()


def test_nothing_else_is_excused():
    """What is no longer imported needs no excuse."""
    for name, excused in ALONE.items():
        used = {module for file in files(versioned()[name].code) for module in imports(file)}
        assert excused - LISTS <= used, name
        assert excused & used, name


@pytest.mark.parametrize("name", sorted(set(versioned()) & set(STAGES)))
def test_what_a_stage_names_is_used_by_it(name):
    """A folder may hold more, and what is loaded by name alone."""
    left, used = [f"pipeline/stages/{name}/stage.py"], set()
    while left:
        if (file := left.pop()) not in used:
            used.add(file)
            left += imports(file)
    assert {file for file in versioned()[name].code if file.endswith(".py")} <= used


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
        stage_versions, "syntax_digest", lambda path: "new" if path.name == "colour_names.py" else original(path)
    )
    assert main([]) == 1 and "concepts: kernels/images/colour_names.py changed" in capsys.readouterr().out
    assert read_record() == recorded
    assert main(["--same-numbers", "concepts"]) == 1
    assert read_record()["concepts"]["code"]["kernels/images/colour_names.py"] == "new"
    assert read_record()["dissect"] == recorded["dissect"]
    assert main(["--same-numbers", "concepts", "dissect", "scenes", "intervene"]) == 0
    with monkeypatch.context() as raised:
        raised.setattr("pipeline.stages.concepts.stage.VERSION", 99)
        assert main([]) == 0
    assert read_record()["concepts"]["version"] == 99
    assert main([]) == 1 and "versions only rise" in capsys.readouterr().out


def test_code_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"CODE names 'pipeline/absent\.py'"):
        files(("pipeline/absent.py",))
