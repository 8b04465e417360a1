"""Error messages for a configuration that is refused."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from pipeline.config.base import Strict
from pipeline.config.networks import NetworkSpec
from pipeline.config.recipe import Recipe
from pipeline.errors import nearest


def explain(item: Any, root: type[BaseModel]) -> str:
    """Return a message for one pydantic error: which key of the model `root` it concerns, and what to do."""
    location = [str(part) for part in item["loc"]]
    where = ".".join(location) or "the top level"
    if item["type"] == "extra_forbidden":
        own = _keys_at(location, root)
        hint = nearest(location[-1], own)
        if not hint:
            hint = nearest(location[-1], known_keys()) if location[-1] in known_keys() else f"; there are: {_list(own)}"
        return f"{where}: unknown key{hint}"
    if item["type"] == "missing":
        return f"{where}: missing"
    if item["type"] == "union_tag_invalid":
        key, tag, tags = (item["ctx"][part] for part in ("discriminator", "tag", "expected_tags"))
        known = tags.replace("'", "").split(", ")
        return f"{where}.{key.strip(chr(39))}: {tag!r} is not one of {', '.join(known)}{nearest(tag, known)}"
    found = "" if item["type"] == "value_error" else f" (found {item['input']!r})"
    if item["type"] in ("model_type", "dict_type"):
        return f"{where}: Input should be a section of keys{found}"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}{found}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _keys_at(location: Sequence[str], root: type[BaseModel]) -> set[str]:
    """Return the keys of the section that contains a location, skipping names that the user chose."""
    sections: list[type[BaseModel]] = [root]
    for part in location[:-1]:
        fields = (section.model_fields[part] for section in sections if part in section.model_fields)
        sections = [model for field in fields for model in _models(field.annotation)] or sections
    return {key for section in sections for key in section.model_fields}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the sections in a type: of a dictionary's values, of each member of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def known_keys() -> set[str]:
    """Return every key of every section."""
    sections: list[type[BaseModel]] = [Strict, NetworkSpec]
    keys: set[str] = set()
    while sections:
        section = sections.pop()
        keys |= set(section.model_fields)
        sections += section.__subclasses__()
    return keys | set(Recipe.model_fields)
