"""Generate `config/schema.json` and `config/README.md` from the configuration's classes.

Editors complete and check a config with the schema; the page lists every key with its default and meaning. A test fails
when they differ from the classes: run `python -m pipeline.config`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipeline.config.datasets import PRESETS
from pipeline.run.experiment import Config
from pipeline.storage.atomic import write_atomically

FOLDER = Path(__file__).parents[2] / "config"
HEAD = """# Configuration

One YAML file describes one experiment: its data sets, its networks, and what is measured. `config.yaml` is the embedded
demo. Run a file of your own with

    make demo CONFIG=mine.yaml
    snakemake --configfile mine.yaml                      # the same
    snakemake --configfile mine.yaml --config only=cnn    # some networks or data sets, with commas between
    snakemake --configfile mine.yaml --config rescan=true # list data sets anew, where files were written in place

Paths are relative to the folder in which the command is given. A key that is not listed here is refused, with the
nearest names. Names of data sets, networks and experiments consist of at most 64 letters, digits, `.`, `_` and `-`, and
begin with a letter or digit. For completion in an editor, put this on a file's first line:

    # yaml-language-server: $schema=schema.json

`python -m pipeline.config` generates this page and `schema.json` from the classes in `pipeline/config/core.py`.
"""


def write() -> None:
    """Regenerate both files."""
    for name, text in documents().items():
        write_atomically(FOLDER / name, text)


def documents() -> dict[str, str]:
    """Return the contents of the two files, by name."""
    schema = Config.model_json_schema()
    sections = [section(*found, schema["$defs"]) for found in _sections(Config, "")]
    return {
        "schema.json": json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema, indent=1)
        + "\n",
        "README.md": "\n".join([HEAD, *sections, presets()]),
    }


def section(model: type[BaseModel], path: str, definitions: dict[str, Any]) -> str:
    """Return the heading, first paragraph and table of keys of one section."""
    properties = (definitions.get(model.__name__) or Config.model_json_schema())["properties"]
    about = " ".join((model.__doc__ or "").split("\n\n")[0].split())
    rows = []
    for name, field in model.model_fields.items():
        cells = [f"`{name}`", _values(properties[name], definitions), _default(field), _cell(field.description or "")]
        rows.append(f"| {' | '.join(cells)} |")
    head = [
        f"## {f'`{path}`' if path else 'Top level'}",
        "",
        about,
        "",
        "| key | value | default | |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows, ""])


def presets() -> str:
    """Return the table of dissection presets."""
    keys = list(next(iter(PRESETS.values())))
    rows = [f"| `{name}` | {' | '.join(str(values[key]) for key in keys)} |" for name, values in PRESETS.items()]
    head = ["## Presets of `dissect.method`", "", f"| method | {' | '.join(f'`{key}`' for key in keys)} |"]
    return "\n".join([*head, "|---" * (len(keys) + 1) + "|", *rows, ""])


def _sections(model: type[BaseModel], path: str) -> Iterator[tuple[type[BaseModel], str]]:
    """Yield every section with the path of its keys, followed by its subsections; each section occurs once."""
    seen: set[type[BaseModel]] = set()

    def walk(model: type[BaseModel], path: str) -> Iterator[tuple[type[BaseModel], str]]:
        if model in seen:
            return
        seen.add(model)
        yield model, path
        for name, field in model.model_fields.items():
            for inner, step in _models(field.annotation, name):
                key = next((key for key in ("kind", "method") if key in inner.model_fields), "")
                told = get_args(inner.model_fields[key].annotation) if key else ()
                named = " or ".join(told) if key == "kind" else next(iter(told), "")
                of = f" ({key}: {named})" if len(told) == 1 or (told and step.endswith(">")) else ""
                yield from walk(inner, f"{path.partition(' (')[0]}.{step}".removeprefix(".") + of)

    yield from walk(model, path)


def _models(annotation: Any, path: str) -> Iterator[tuple[type[BaseModel], str]]:
    """Yield the sections in a field's type with the path of their keys; `<name>` stands for the keys of a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, path
    by_name = getattr(annotation, "__origin__", None) is dict
    for inner in get_args(annotation):
        yield from _models(inner, f"{path}.<name>" if by_name and not path.endswith(">") else path)


def _default(field: Any) -> str:
    if field.default is PydanticUndefined and field.default_factory is None:
        return "**required**"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        given = {key: getattr(default, key) for key in default.model_fields_set}
        return f"`{json.dumps(given)}`" if given else ""
    return "" if default is None else f"`{json.dumps(default)}`"


def _values(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Describe the values that a JSON schema allows, in words."""
    if "$ref" in schema:
        return "a section"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            said = [_values(one, definitions) for one in schema[several] if one.get("type") != "null"]
            return " or ".join(dict.fromkeys(said))
    match schema.get("type"):
        case "array" if "prefixItems" in schema:
            count = len(schema["prefixItems"])
            return f"{count} number{'s' if count > 1 else ''}"
        case "array":
            return f"list of: {_values(schema['items'], definitions)}"
        case "object":
            inner = [schema.get("additionalProperties"), *schema.get("patternProperties", {}).values()]
            named = next((_values(one, definitions) for one in inner if isinstance(one, dict)), "any")
            return f"name: {named}"
        case "integer" | "number" as kind:
            return _bounded("whole number" if kind == "integer" else "number", schema)
        case "boolean":
            return "`true`, `false`"
        case "string":
            return "a name" if "pattern" in schema else "text"
    return "any"


def _bounded(kind: str, schema: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema and schema[key] < 2**53]
    return f"{kind} {', '.join(bounds)}".strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


if __name__ == "__main__":
    write()
