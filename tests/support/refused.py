"""Make docs/what-is-refused.md from the tables in docs/refused: `python tests/support/refused.py`."""

import ast
import csv
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/what-is-refused.md"
COLUMNS = ["kind", "message", "what to do", "test"]
HEAD = """# What is refused, or told

Microtome refuses what it cannot read, or measures the rest and says so. Each row is one kind, with the message that you
see and what you can do. The test shows it. Made by `python tests/support/refused.py` from the tables in `docs/refused`.
"""


def rows() -> list[dict[str, str]]:
    """Return the rows of all tables, by file and in their order."""
    found = []
    for path in sorted((ROOT / "docs/refused").glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if table.fieldnames != COLUMNS:
                raise ValueError(f"{path.name} has the columns {table.fieldnames}, expected {COLUMNS}")
            found += list(table)
    return found


def page() -> str:
    """Return the page: one table, a row for each kind."""

    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|")

    lines = ["| kind | message | what to do | test |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cell(row[name]) for name in COLUMNS[:3])} | `{row['test']}` |" for row in rows()]
    return "\n".join([HEAD, *lines, ""])


def exists(test: str) -> bool:
    """Return whether a test's node id names a function, or a method of a class, of a test file."""
    file, *names = test.partition("[")[0].split("::")
    path = ROOT / file
    if not names or not path.is_file():
        return False
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for name in names:
        found = next((n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name), None)
        if found is None:
            return False
        body = found.body
    return isinstance(found, ast.FunctionDef) and found.name.startswith("test")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
