"""Sections: the keys of the configuration that belong to stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from pipeline.config.base import UNTRAINED, Name, Strict
from pipeline.config.networks import Network
from pipeline.errors import nearest


@dataclass(frozen=True)
class Selection:
    """The networks and data sets that the key `only` keeps; `named` is true if it names a network."""

    networks: Mapping[str, Network]
    datasets: Sequence[str]
    named: bool

    def kept(self, networks: Iterable[str]) -> list[str]:
        """Return the given networks that are kept; a control stays with its network."""
        return [name for name in networks if name.removesuffix(UNTRAINED) in self.networks]


def _nothing_to_check(core: Any, section: Any) -> None:
    pass


def _unchanged(core: Any, section: Any, selection: Selection) -> Any:
    return section


@dataclass(frozen=True)
class Section:
    """A stage's key of the configuration.

    `check` and `narrowed` take the whole configuration, a `pipeline.config.core.Core`, before the section.

    Attributes
    ----------
    key, type, default, description : of the configuration's field.
    check : raises `ValueError` if the section refers to something that does not exist.
    narrowed : returns the section without what `only` leaves out.
    """

    key: str
    type: Any
    description: str
    default: Any = None
    check: Callable[[Any, Any], None] = _nothing_to_check
    narrowed: Callable[[Any, Any, Selection], Any] = _unchanged


class Chosen(Strict):
    """A section that applies to some networks on some data sets, or to all if it names none."""

    controls: ClassVar[bool] = True  # whether untrained controls may be named

    networks: list[str] | None = Field(None, description="only these networks; default: all")
    datasets: list[Name] | None = Field(None, description="only on these data sets; default: all")

    def applies(self, network: str, dataset: str) -> bool:
        """Return whether the section applies to a network on a data set; a control has to be named."""
        named = not network.endswith(UNTRAINED) if self.networks is None else network in self.networks
        return named and (self.datasets is None or dataset in self.datasets)

    def names(self) -> list[str]:
        """Return every network that is named."""
        return list(self.networks or ())

    def narrowed(self, selection: Selection) -> dict[str, Any]:
        """Return the keys that change if only a selection is kept."""
        kept: dict[str, Any] = {}
        if self.networks is not None:
            kept["networks"] = selection.kept(self.networks)
        if self.datasets is not None:
            kept["datasets"] = [name for name in self.datasets if name in selection.datasets]
        return kept

    @classmethod
    def section(cls, key: str, description: str) -> Section:
        """Return the section as a stage declares it."""

        def check(core: Any, section: Chosen | None) -> None:
            if section is None:
                return
            networks = core.with_controls() if cls.controls else list(core.networks)
            asked = ("network", section.names(), networks), ("data set", section.datasets, list(core.datasets))
            for kind, wished, known in asked:
                for name in wished or ():
                    if name not in known:
                        raise ValueError(f"{key}: no {kind} {name!r}{nearest(name, known)}")

        def narrowed(core: Any, section: Chosen | None, selection: Selection) -> Chosen | None:
            return section.model_copy(update=section.narrowed(selection)) if section is not None else None

        return Section(key, cls | None, description, check=check, narrowed=narrowed)
