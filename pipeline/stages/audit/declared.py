"""What a test of explanations declares about itself, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pipeline.config.base import Strict
from pipeline.stages.attribute.options import Method

if TYPE_CHECKING:
    from pipeline.config.datasets import AnyDataset
    from pipeline.plan.job import Job
    from pipeline.plan.stage import Draft
    from pipeline.stages.attribute.settings import Settings as Explained

LEAST = 4
"""Images that a test needs at least: fewer give no interval."""


class TestOptions(Strict):
    """The options that every test has."""

    __test__ = False  # no test of pytest

    images: Annotated[int, Field(ge=LEAST)] | None = Field(
        None, description="use only the first N of the explained images, ordered by a hash of their ids; default: all"
    )
    networks: list[str] | None = Field(None, description="only for these networks; default: those of the audit")

    def applies(self, network: str) -> bool:
        """Return whether a network of the audit is put to the test."""
        return self.networks is None or network in self.networks


@dataclass(frozen=True)
class Measure:
    """An array of a test's cells.

    Attributes
    ----------
    title : for readers.
    dims : of the array behind `image`, each with its `labels`.
    better : whether a `higher` or a `lower` value speaks for a method; empty: neither.
    """

    title: str
    dims: tuple[str, ...] = ()
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    better: Literal["higher", "lower", ""] = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each of `dims`."""
        return tuple(len(self.labels[dim]) for dim in self.dims)


@dataclass(frozen=True)
class Asked:
    """A test of an audit on one network and data set, while the plan is made.

    Attributes
    ----------
    where : the key of the test. spec : the data set. explained : what its explanations are made of.
    images : that are explained at most, before any is refused. networks : those of the audit on the data set.
    kept : what tests read once for the whole plan.
    """

    where: str
    dataset: str
    spec: AnyDataset
    network: str
    explained: Explained
    images: int
    networks: Sequence[str]
    draft: Draft
    kept: dict[Any, Any] = field(default_factory=dict)


def _everything(options: Any, method: Method) -> str:
    return ""


def _no_objection(options: Any, asked: Asked) -> Iterator[str]:
    yield from ()


@dataclass(frozen=True)
class Test:
    """What is known of a test besides its function.

    Attributes
    ----------
    title : for readers. says : one sentence, for the page.
    options : its model. measures : the arrays of its cells, given (options).
    shaped : the same of a network, given (options, job of `attribute`), where they depend on it; else None.
    cost : forwards an image, given (options, forwards that the method takes for a map, (height, width)).
    controls : names of controls that it measures as if they were methods. control : the one beside each method's value.
    parents : further stages that it reads, of the network on the data set, or of the data set; or given (options).
    copies : controls whose numbers are those of a further stage, by its name.
    compares : whether it runs other networks of the audit. forgets : whether it runs the untrained control.
    draws : whether it draws images of the data set again.
    library : the version of a library that its numbers depend on, given (options); None without any.
    defined : why it is not defined for a method, given (options, method); empty where it is.
    check : sentences on what it lacks, each `key: what to do`, given (options, asked).
    suits : sentences on networks that it cannot compare, like those of `check`, once networks are inspected, given
        (options, job of `attribute`, those of the audit's networks on the data set, by name); None: it compares none.
    prepare : what the main process makes for all images of a data set, given (options, job of `attribute`, what
        `reads` said while the plan was made).
    reads : what of files that no stage ingests the ids of its cells are made of, as JSON, given (options, asked).
    """

    __test__ = False  # no test of pytest

    title: str
    says: str
    options: type[TestOptions]
    measures: Callable[[Any], Mapping[str, Measure]]
    cost: Callable[[Any, float, tuple[int, int]], float]
    shaped: Callable[[Any, Job[Any]], Mapping[str, Measure]] | None = None
    controls: tuple[str, ...] = ()
    control: str = ""
    parents: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    compares: bool = False
    forgets: bool = False
    draws: bool = False
    library: Callable[[Any], str | None] | None = None
    defined: Callable[[Any, Method], str] = _everything
    check: Callable[[Any, Asked], Iterator[str]] = _no_objection
    suits: Callable[[Any, Job[Any], Mapping[str, Job[Any]]], Iterator[str]] | None = None
    prepare: Callable[[Any, Job[Any], Any], Any] | None = None
    reads: Callable[[Any, Asked], Any] | None = None

    def arrays(self, options: TestOptions, job: Job[Any]) -> Mapping[str, Measure]:
        """Return the arrays of its cells for a network on a data set."""
        return self.measures(options) if self.shaped is None else self.shaped(options, job)

    def stages(self, options: TestOptions) -> tuple[str, ...]:
        """Return the further stages that it reads with these options."""
        return self.parents if isinstance(self.parents, tuple) else self.parents(options)
