"""The digest of each stage's numerical code, kept in `versions.json`: a stage whose code changes needs another VERSION.

    python tests/support/stage_versions.py                       VERSION was raised: record the new code
    python tests/support/stage_versions.py --same-numbers STAGE  the code changed, its results did not: record it

The digest covers the syntax tree without docstrings and annotations of arguments, so comments, formatting and types do
not matter.
"""

import argparse
import ast
import functools
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("versions.json")


@dataclass(frozen=True)
class Versioned:
    """A module with a version, and the files and folders of the code that decides its numbers."""

    module: str
    attribute: str
    code: tuple[str, ...]

    @property
    def version(self) -> int:
        return getattr(importlib.import_module(self.module), self.attribute)

    def now(self) -> dict[str, Any]:
        """What the record should hold: the version and the digest of every file."""
        return {"version": self.version, "code": {name: syntax_digest(ROOT / name) for name in files(self.code)}}


def versioned() -> dict[str, Versioned]:
    """Every stage that names its code, the scenes, and the layer ids."""
    from pipeline.stages.registry import STAGES

    found = {name: Versioned(_home(name), "VERSION", stage.code) for name, stage in STAGES.items() if stage.code}
    found["scenes"] = Versioned(
        "pipeline.data.scenes", "VERSION", ("kernels/images/colour_names.py", "pipeline/data/scenes")
    )
    found["layer_id"] = Versioned("pipeline.networks.layer_id", "_VERSION", ("pipeline/networks/layer_id.py",))
    return found


def _home(stage: str) -> str:
    """The module of a stage that holds its version: one that `stage` imports, where others need it too."""
    inside = (ROOT / "pipeline" / "stages" / stage).glob("*.py")
    (name,) = (path.stem for path in inside if re.search(r"^VERSION = \d", path.read_text(), re.MULTILINE))
    return f"pipeline.stages.{stage}.{name}"


def files(code: tuple[str, ...]) -> list[str]:
    """The Python files of some paths, relative to the repository; a path that holds none is an error."""
    found = []
    for name in code:
        path = ROOT / name
        inside = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        if not inside or not all(file.is_file() for file in inside):
            raise FileNotFoundError(f"CODE names {name!r}, which is no Python file and no folder of them")
        found += [file.relative_to(ROOT).as_posix() for file in inside]
    return found


@functools.cache
def imports(name: str) -> tuple[str, ...]:
    """The project's own modules that a file imports, wherever in it, as paths relative to the repository."""
    return tuple(_imports(name))


def _imports(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.partition(".")[0] in ("pipeline", "kernels")
        ):
            inside = node.module.replace(".", "/")
            for path in (f"{inside}/{alias.name}.py" for alias in node.names):
                found = (each for each in (path, f"{inside}.py", f"{inside}/__init__.py") if (ROOT / each).exists())
                yield next(found)


def syntax_digest(path: Path) -> str:
    return digest_of(path.read_text())


@functools.cache
def digest_of(source: str) -> str:
    return hashlib.sha256(repr(_written(ast.parse(source))).encode()).hexdigest()[:20]


def _written(node: Any) -> Any:
    """A syntax tree as nested tuples; written here, since `ast.dump` differs between versions of Python."""
    if isinstance(node, list):
        return tuple(_written(one) for one in node)
    if not isinstance(node, ast.AST):
        return repr(node)
    return (type(node).__name__, *_fields(node))


def _fields(node: ast.AST) -> Iterator[tuple[str, Any]]:
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns") and isinstance(node, ast.arg | ast.FunctionDef):
            continue
        if name == "body" and isinstance(value, list) and _is_docstring(value[0] if value else None):
            value = value[1:]
        if value not in (None, []):
            yield name, _written(value)


def _is_docstring(statement: Any) -> bool:
    value = getattr(statement, "value", None)
    return isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str)


def complaint(
    name: str, recorded: dict[str, Any] | None, now: dict[str, Any], module: str, attribute: str
) -> str | None:
    """What an author has to do about a stage, or None when the record is as the code."""
    if recorded == now:
        return None
    command = "python tests/support/stage_versions.py"
    if recorded is None or recorded["version"] < now["version"]:
        return f"{name}: {attribute} is new: record it with `{command}`"
    if recorded["version"] > now["version"]:
        return f"{name}: {attribute} went from {recorded['version']} back to {now['version']}; versions only rise"
    old, new = recorded["code"], now["code"]
    changed = sorted(file for file in set(old) | set(new) if old.get(file) != new.get(file))
    return (
        f"{name}: {', '.join(changed)} changed. If stored results change with it, raise {attribute} in {module} and "
        f"run `{command}`; if the numbers are the same, run `{command} --same-numbers {name}`"
    )


def read_record() -> dict[str, Any]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--same-numbers", nargs="+", default=[], metavar="STAGE", choices=sorted(versioned()))
    same = parser.parse_args(arguments).same_numbers
    record, left = read_record(), []
    for name, one in versioned().items():
        before, now = record.get(name), one.now()
        if name in same or before is None or before["version"] < now["version"]:
            record[name] = now
        elif said := complaint(name, before, now, one.module, one.attribute):
            left.append(said)
    RECORD.write_text(json.dumps({name: record[name] for name in versioned() if name in record}, indent=1) + "\n")
    print("\n".join(left) or "recorded")
    return 1 if left else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
