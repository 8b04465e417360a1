"""Error messages for a configuration that is refused."""

import re
from collections.abc import Iterable, Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.config.base import Strict
from pipeline.config.networks import NetworkSpec
from pipeline.config.recipe import Recipe
from pipeline.errors import nearest

# How pydantic calls the members of a union in the location of an error, and a last part that is a plain type.
_MEMBER = re.compile(r"(literal|function-\w+|nullable|list|tuple|dict)\[.*|constrained-\w+")
_PLAIN_TYPES = ("str", "int", "float", "bool")


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Return a message for each error: which key of the model `root` it concerns, and what to do.

    Where a value may be of several kinds, pydantic gives an error of each kind; those of the kinds that the value is
    plainly not of are left out.
    """
    items = error.errors(include_url=False)
    places = [_place(item["loc"]) for item in items]
    of_kinds = [len(place) < len(item["loc"]) for place, item in zip(places, items, strict=True)]
    places = [_untagged(place, root) for place in places]
    found = []
    for at, (place, item) in enumerate(zip(places, items, strict=True)):
        rest = [other for other in range(len(items)) if other != at and of_kinds[at] and of_kinds[other]]
        here = [items[other] for other in rest if places[other] == place]
        of_section = any(places[other][: len(place)] == place for other in rest)
        if item["type"] == "literal_error" and isinstance(item["input"], dict) and of_section:
            continue
        if item["type"] == "model_type" and any(other["type"] == "literal_error" for other in here):
            continue
        if item["type"].endswith("_type") and any(not other["type"].endswith("_type") for other in here):
            continue
        section = " or a section of keys" if any(other["type"] == "model_type" for other in here) else ""
        found.append(_explained(item, place, root, section if item["type"] == "literal_error" else ""))
    return list(dict.fromkeys(found))


def _place(location: Sequence[Any]) -> tuple[str, ...]:
    """Return a location without the kinds of values that pydantic tried."""
    parts = [str(part) for part in location]
    own = [part for part in parts if not _MEMBER.fullmatch(part)]
    return tuple(own[:-1] if len(own) > 1 and own[-1] in _PLAIN_TYPES else own)


def _untagged(location: Sequence[str], root: type[BaseModel]) -> tuple[str, ...]:
    """Return a location without the tags by which pydantic tells sections of several kinds apart."""
    here: list[Any] = [root]
    kept = []
    for part in location:
        sections = [section for each in here for section in _sections(each)]
        tagged = [section for section in sections if part in _tags(section)]
        if len(sections) > 1 and tagged:
            here = tagged
            continue
        kept.append(part)
        fields = [section.model_fields[part].annotation for section in sections if part in section.model_fields]
        here = fields or [each for outer in here for each in _contents(outer)] or here
    return tuple(kept)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the sections that a value may be, those that it may contain left out."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, UnionType):
        for part in get_args(annotation):
            yield from _sections(part)


def _contents(annotation: Any) -> Iterator[Any]:
    """Yield the types of what a list or a mapping contains."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        for part in get_args(annotation):
            yield from _contents(part)
    else:
        yield from get_args(annotation)[-1:]


def _tags(section: type[BaseModel]) -> set[str]:
    """Return the values that tell a section from those of other kinds."""
    literals = (
        get_args(field.annotation) for field in section.model_fields.values() if get_origin(field.annotation) is Literal
    )
    return {str(values[0]) for values in literals if len(values) == 1}


def _explained(item: Any, location: Sequence[str], root: type[BaseModel], section: str) -> str:
    where = ".".join(location) or "the top level"
    if item["type"] == "extra_forbidden":
        own = _keys_at(location, root)
        if location[-1] in own:  # of another kind of value at this place
            return f"{where}: unknown key of this kind: another kind has it"
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
    known = re.findall("'([^']*)'", item["ctx"]["expected"]) if item["type"] == "literal_error" else []
    hint = nearest(item["input"], known) if isinstance(item["input"], str) else ""
    if item["type"] in ("model_type", "dict_type"):
        return f"{where}: Input should be a section of keys{found}"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}{section}{found}{hint}"


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
