"""Records: typed models of what manifests hold, both settings and results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A model that is written as JSON with only the fields that were set.

    A field left at its default enters no id and no manifest, so a new field changes nothing that exists. Reading
    ignores unknown keys: a manifest of another version may have more.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    def written(self) -> dict[str, Any]:
        """Return the fields that were set, as JSON values; sections of the configuration keep all of their keys."""
        return {name: _plain(getattr(self, name)) for name in type(self).model_fields if name in self.model_fields_set}

    @classmethod
    def read(cls, value: Mapping[str, Any]) -> Self:
        """Return the record from what `written` returned."""
        return cls.model_validate(dict(value))


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.written()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
