"""The section `audit` of the configuration, and the content of an audit's id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
    model_validator,
)

from pipeline.config.base import Name, Strict
from pipeline.config.section import Chosen, Section, Selection
from pipeline.errors import nearest
from pipeline.stages.audit.declared import TestOptions
from pipeline.stages.audit.options import TESTS
from pipeline.storage.record import Record

if TYPE_CHECKING:
    from pipeline.config.core import Core


class _Tests(Strict):
    """Tests by name, each with its options."""

    @model_validator(mode="after")
    def _some(self) -> _Tests:
        if not self.options():
            raise ValueError(f"name at least one of {', '.join(TESTS)}")
        return self

    @model_serializer(mode="wrap")
    def _named(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the tests that are not asked for: written as null, they would be read as named."""
        return {name: told for name, told in serialize(self).items() if told is not None}

    def options(self) -> dict[str, TestOptions]:
        """Return the options of the tests that are asked for, by name."""
        named = {name: getattr(self, name) for name in TESTS}
        return {name: options for name, options in named.items() if options is not None}


Tests = create_model(
    "Tests",
    __base__=_Tests,
    __doc__=_Tests.__doc__,
    **{name: (test.options | None, Field(None, description=test.says)) for name, test in TESTS.items()},  # type: ignore[call-overload]
)


def _by_name(tests: Any) -> Any:
    """Return tests as a mapping of names to options, from a list of names or a mapping with empty entries."""
    if isinstance(tests, (list, tuple)):
        if twice := next((each for at, each in enumerate(tests) if each in tests[:at]), None):
            raise ValueError(f"{twice!r} is named twice")
        if not all(isinstance(each, str) for each in tests):
            raise ValueError("a list of names, or a mapping of names to options")
        tests = dict.fromkeys(tests)
    if not isinstance(tests, Mapping):
        return tests
    return {name: {} if options is None else options for name, options in tests.items()}


class Audit(Chosen):
    """One audit: explanations of an experiment of `attribute`, and the tests that they are put to."""

    controls: ClassVar[bool] = True

    attributions: Name = Field(description="an experiment of `attribute`: its images and maps are the audit's")
    tests: Annotated[Tests, BeforeValidator(_by_name, json_schema_input_type=list[str] | Tests)] = Field(  # type: ignore[valid-type]
        description="a list of tests, or a mapping of tests to options"
    )
    without: list[str] = Field([], description="controls that are left out, for example `random`")


Audits = dict[Name, Audit]


def check(core: Core, section: Audits) -> None:
    """Raise `ValueError` where an audit names an experiment, network or data set that is not there."""
    experiments = core.section("attribute")
    for name, asked in section.items():
        where = f"audit.{name}"
        Audit.section(where, "").check(core, asked)
        if asked.attributions not in experiments:
            raise ValueError(
                f"{where}.attributions: no experiment {asked.attributions!r} of `attribute`"
                f"{nearest(asked.attributions, experiments)}"
            )
        explained = experiments[asked.attributions]
        for network in asked.networks or ():
            if not any(explained.applies(network, dataset) for dataset in core.datasets):
                raise ValueError(
                    f"{where}.networks: attribute.{asked.attributions} does not explain network {network!r}: name it "
                    f"in its `networks`"
                )
        for dataset in asked.datasets or ():
            if explained.datasets is not None and dataset not in explained.datasets:
                raise ValueError(f"{where}.datasets: attribute.{asked.attributions} explains no images of {dataset!r}")
        chosen = asked.networks if asked.networks is not None else core.with_controls()
        for test, options in asked.tests.options().items():
            for network in options.networks or ():
                if network not in chosen:
                    raise ValueError(
                        f"{where}.tests.{test}.networks: no network {network!r} of the audit{nearest(network, chosen)}"
                    )
        known = sorted({control for test in asked.tests.options() for control in TESTS[test].controls})
        for control in asked.without:
            if control not in known:
                raise ValueError(f"{where}.without: no control {control!r}{nearest(control, known)}")


def narrowed(core: Core, section: Audits, selection: Selection) -> Audits:
    """Return the audits with the networks and data sets that stay; none that names others alone."""
    found = {}
    for name, asked in section.items():
        kept = asked.narrowed(selection)
        if all(kept.get(key) != [] for key in ("networks", "datasets")):
            found[name] = asked.model_copy(update=kept)
    return found


class Settings(Record):
    """What is audited, by which tests.

    Attributes
    ----------
    attributions : the experiment of `attribute`. pairs : (data set, network), in their order.
    tests : options by name. without : controls that are left out.
    reads : what tests read of files that no stage ingests, by test and data set.
    """

    attributions: str
    pairs: list[tuple[str, str]]
    tests: dict[str, dict[str, Any]]
    without: list[str]
    reads: dict[str, dict[str, Any]] = Field(default_factory=dict)


def tests_of(settings: Settings) -> dict[str, TestOptions]:
    """Return the options of each test by name."""
    return {name: TESTS[name].options.model_validate(told) for name, told in settings.tests.items()}


SECTION = Section(
    "audit",
    Audits,
    "whether explanations tell the truth; audits by name",
    default={},
    check=check,
    narrowed=narrowed,
)
