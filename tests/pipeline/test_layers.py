"""Imports run one way down the layers, in no circle; between stages only what a stage shows to others is imported.

Every import counts: at the top of a file, inside functions, and under `TYPE_CHECKING`.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = (
    ("kernels",),
    ("pipeline.errors", "pipeline.storage"),
    ("pipeline.config",),
    ("pipeline.workers",),
    ("pipeline.data",),
    ("pipeline.networks",),
    ("pipeline.plan",),
    ("pipeline.report",),
    ("pipeline.stages",),
    ("pipeline.run",),
    ("pipeline.upkeep", "pipeline.attribute", "pipeline.calibrate", "workflow"),
)
SHOWN = ("results", "found", "settings")
"""What other stages may import of a stage."""
ALSO = {
    ("dissect", "extract"): {"streaming", "pictures", "replaced"},
    ("audit", "attribute"): {"options", "again", "inputs", "explaining", "segments", "subject", "tasks", "work"},
}
"""What one stage may import of another beside that: dissect goes on with the layers that extract did not store, and
audit explains changed images and networks as attribute does."""


@cache
def files() -> dict[str, Path]:
    """Every Python file of the project by module name."""
    found = {}
    for top in ("kernels", "pipeline", "workflow"):
        for path in (ROOT / top).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


@cache
def imports() -> dict[str, set[str]]:
    """The project's modules that each module imports."""
    return {name: set(imported(path.read_text())) - {name} for name, path in files().items()}


def imported(source: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [module for name in names if (module := module_of(name)) is not None]


def module_of(name: str) -> str | None:
    """The module of the project that a name is, or is in."""
    while name and name not in files():
        name = name.rpartition(".")[0]
    return name or None


def layer(module: str) -> int | None:
    """The place of a module's layer; None for the packages above all, whose `__init__` re-exports."""
    found = [at for at, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")]
    return found[0] if found else None


def test_every_module_is_in_a_layer():
    assert [name for name in files() if layer(name) is None] == ["pipeline"]


@pytest.mark.parametrize("name", sorted(files()))
def test_no_import_runs_up(name):
    own = layer(name)
    up = [other for other in imports()[name] if own is not None and (layer(other) or 0) > own]
    assert not up, f"{name} imports {up}: move what it needs down, or itself up"


def test_no_circle():
    """A module that imports itself in the end, by any way."""
    reached: dict[str, set[str]] = {}

    def visit(name: str, path: tuple[str, ...]) -> set[str]:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if name not in reached:
            reached[name] = set()
            for other in imports()[name]:
                if files()[other].name != "__init__.py":
                    reached[name] |= {other} | visit(other, (*path, name))
        return reached[name]

    for name in files():
        visit(name, ())


@pytest.mark.parametrize("name", sorted(name for name in files() if name.count(".") > 2 and "pipeline.stages." in name))
def test_stages_import_only_what_others_show(name):
    stage = name.split(".")[2]
    for other in imports()[name]:
        parts = other.split(".")
        if parts[:2] != ["pipeline", "stages"] or len(parts) < 4 or parts[2] == stage:
            continue
        shown = {*SHOWN, *ALSO.get((stage, parts[2]), ())}
        assert parts[3] in shown, f"{name} imports {other}: of {parts[2]} others see {', '.join(sorted(shown))}"


def test_what_an_import_is():
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from pipeline.plan.job import Job
def f():
    import kernels.similarity.cka
    from pipeline.storage import store
    from pipeline.errors import MicrotomeError
"""
    assert imported(source) == [
        "pipeline.plan.job", "kernels.similarity.cka", "pipeline.storage.store", "pipeline.errors",
    ]  # fmt: skip
    assert layer("pipeline.errors") == layer("pipeline.storage.store") == 1 < layer("pipeline.plan.job")
