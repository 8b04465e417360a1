"""Base of all sections: the strict model, common types, and reserved names."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from pipeline.storage.redact import home

RESERVED = ("networks", "layers", "done", "logs", "report")


ENDINGS = (".zarr", ".ledger", ".csv", ".json")  # endings of files beside the networks' folders


UNTRAINED = "-untrained"  # suffix of the untrained control of every network


TRUTH = "truth"  # concept source: the label maps that come with a data set


PIXELS = "pixels"  # concept source: colour names computed from the pixels


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def at_home(path: str) -> str:
    """Return a path with the home folder in place of a leading `~`."""
    if path != "~" and not path.startswith("~/"):
        return path
    if (folder := home()) is None:
        raise ValueError(f"there is no home folder for `~` in {path}: give the whole path")
    return str(folder) + path[1:]


PathName = Annotated[str, AfterValidator(at_home)]


Kept = Literal["full", "pooled", "none"]


Share = Annotated[float, Field(gt=0, le=1)]


Positive = Annotated[float, Field(gt=0)]


Many = Annotated[int, Field(ge=1, le=100_000)]  # a number of repetitions: a larger one is a typo and would never finish


class Strict(BaseModel):
    # Infinite numbers are meaningless for every key, and JSON, from which ids are computed, has none.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _named_once(lists: Mapping[str, Sequence[Any] | None]) -> None:
    """Raise `ValueError` if a list, given by its key, holds an entry twice."""
    for key, entries in lists.items():
        for at, entry in enumerate(entries or ()):
            if entry in (entries or ())[:at]:
                raise ValueError(f"{key}: {entry!r} is named twice")
