"""(To be said.)"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

RESERVED = ("networks", "layers", "done", "logs", "similarity", "randomization", "report")


ENDINGS = (".zarr", ".ledger", ".csv", ".json")  # of files that stand beside the folders of networks


UNTRAINED = "-untrained"  # suffix of the control network that stands beside every network


TRUTH = "truth"  # concept source: the label maps that come with a data set


PIXELS = "pixels"  # concept source: colour names of the pixels


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


Kept = Literal["full", "pooled", "none"]


Share = Annotated[float, Field(gt=0, le=1)]


Positive = Annotated[float, Field(gt=0)]


Many = Annotated[int, Field(ge=1, le=100_000)]  # of what is done so often: more is a slip, and would never end


class Strict(BaseModel):
    # An infinite number means nothing for any key, and JSON, which ids are made of, has none.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _named_once(lists: Mapping[str, Sequence[Any] | None]) -> None:
    """Raise where a list, by its key, has an entry twice."""
    for key, entries in lists.items():
        for at, entry in enumerate(entries or ()):
            if entry in (entries or ())[:at]:
                raise ValueError(f"{key}: {entry!r} is named twice")
