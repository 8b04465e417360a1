"""Write docs/api.md, the public functions and classes, from their docstrings: `python workflow/api_page.py`."""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "api.md"
sys.path.insert(0, str(ROOT))

import kernels  # noqa: E402
import pipeline  # noqa: E402
from pipeline import attribute  # noqa: E402

HEAD = """# Public functions

`python workflow/api_page.py` writes this page from the docstrings. Everything else in `pipeline/` can change with any
release. `help(function)` gives shapes, units, errors and the source of each.
"""


def page() -> str:
    """Return the page as Markdown: what a program reads results with, then the kernels, a section a module."""
    parts = [HEAD, "## Results\n", _entry("pipeline", pipeline.open_results)]
    parts.append("[What an experiment's results hold](results.md), array by array.\n")
    methods = [_entry(attribute.__name__, getattr(attribute, name)) for name in ("explain", *attribute.FUNCTIONS)]
    parts += ["## pipeline.attribute\n", "[Which pixels made a network say so](attribution.md).\n", "".join(methods)]
    for module in _modules(kernels):
        entries = [_entry(module.__name__, one) for one in _public(module)]
        if entries:
            parts += [f"## {module.__name__}\n", f"{_first(module)}\n", "".join(entries)]
    return "\n".join(parts)


def _modules(package: ModuleType) -> Iterator[ModuleType]:
    for found in sorted(pkgutil.walk_packages(package.__path__, package.__name__ + "."), key=lambda one: one.name):
        yield importlib.import_module(found.name)


def _public(module: ModuleType) -> list[object]:
    """Return the functions and classes that a module defines under a public name, in the order of the file."""
    own = [
        one
        for name, one in vars(module).items()
        if not name.startswith("_") and getattr(one, "__module__", None) == module.__name__ and one.__doc__
    ]
    return [one for one in own if inspect.isfunction(one) or inspect.isclass(one)]


def _entry(module: str, one: object) -> str:
    assert inspect.isfunction(one) or inspect.isclass(one)
    names = ", ".join(inspect.signature(one).parameters)
    return f"- `{module}.{one.__name__}({names})`: {_first(one)}\n"


def _first(one: object) -> str:
    """Return the first sentence of a docstring: it may run over several lines."""
    return " ".join((inspect.getdoc(one) or "").split("\n\n")[0].split())


if __name__ == "__main__":
    FILE.write_text(page())
