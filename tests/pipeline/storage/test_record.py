"""Records: what was set is written, nothing else; what a manifest of another version says is passed over."""

import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config.networks import Numerics, Preprocessing
from pipeline.storage.identity import digest
from pipeline.storage.record import Record


class Inner(Record):
    size: tuple[int, int]
    name: str = "x"
    limit: int | None = None


class Outer(Record):
    one: Inner
    more: list[Inner] = Field(default_factory=list)
    named: dict[str, Inner] = Field(default_factory=dict)
    kind: Literal["a", "b"] = "a"
    free: dict[str, Any] = Field(default_factory=dict)


class Section(BaseModel):
    """As a section of the configuration: strict, and with defaults that count."""

    model_config = ConfigDict(extra="forbid")
    quantile: float = 0.005
    sizes: tuple[int, int] | None = None


class Holds(Record):
    section: Section
    optional: Section | None = None
    by_name: dict[str, Section] = Field(default_factory=dict)


def test_fields_that_were_not_set_are_not_written():
    assert Inner(size=(3, 4)).written() == {"size": [3, 4]}
    assert Outer(one=Inner(size=(3, 4))).written() == {"one": {"size": [3, 4]}}


def test_a_field_that_was_set_to_its_default_is_written():
    assert Inner(size=(3, 4), name="x").written() == {"size": [3, 4], "name": "x"}
    assert Inner(size=(3, 4), limit=None).written() == {"size": [3, 4], "limit": None}
    assert Inner(size=(3, 4)).model_copy(update={"limit": 5}).written() == {"size": [3, 4], "limit": 5}


def test_fields_are_written_in_their_order_whatever_the_order_of_setting():
    assert list(Inner(limit=1, name="n", size=(1, 2)).written()) == ["size", "name", "limit"]


def test_records_within_records_are_written_alike():
    whole = Outer(
        kind="b",
        one=Inner(size=(1, 2), limit=3),
        more=[Inner(size=(5, 6)), Inner(size=(7, 8), name="n")],
        named={"k": Inner(size=(9, 9))},
        free={"a": [1, {"b": (2, Inner(size=(0, 0)))}]},
    )
    assert whole.written() == {
        "one": {"size": [1, 2], "limit": 3},
        "more": [{"size": [5, 6]}, {"size": [7, 8], "name": "n"}],
        "named": {"k": {"size": [9, 9]}},
        "kind": "b",
        "free": {"a": [1, {"b": [2, {"size": [0, 0]}]}]},
    }


def test_sections_of_the_configuration_are_written_whole():
    """A default of the configuration is part of what an output depends on."""
    held = Holds(section=Section(), by_name={"k": Section(sizes=(1, 2))})
    assert held.written() == {
        "section": {"quantile": 0.005, "sizes": None},
        "by_name": {"k": {"quantile": 0.005, "sizes": [1, 2]}},
    }
    assert Holds.read(held.written()) == held


@pytest.mark.parametrize("section", [Preprocessing(), Preprocessing(mean=(0.1, 0.2, 0.3)), Numerics()])
def test_sections_that_stages_have(section):
    class Settings(Record):
        own: type(section)

    assert Settings(own=section).written() == {"own": section.model_dump(mode="json")}
    assert Settings.read(json.loads(json.dumps(Settings(own=section).written()))).own == section


def test_unknown_keys_are_passed_over():
    read = Outer.read({"one": {"size": [3, 4], "later": 1}, "more": [{"size": [1, 2], "later": {}}], "later": [None]})
    assert read == Outer(one=Inner(size=(3, 4)), more=[Inner(size=(1, 2))])
    assert read.written() == {"one": {"size": [3, 4]}, "more": [{"size": [1, 2]}]}


@pytest.mark.parametrize("wrong", [{}, {"size": [1]}, {"size": None}, {"size": [1, 2], "limit": "many"}])
def test_what_does_not_fit_is_refused(wrong):
    with pytest.raises(ValidationError):
        Inner.read(wrong)


def test_a_new_field_moves_no_id():
    class Later(Inner):
        added: str = "y"

    assert digest(Later(size=(3, 4)).written()) == digest(Inner(size=(3, 4)).written())
    assert digest(Later(size=(3, 4), added="y").written()) != digest(Inner(size=(3, 4)).written())
    assert Later.read(Inner(size=(3, 4)).written()).added == "y"


def test_a_record_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        Inner(size=(3, 4)).name = "y"


INNER = st.builds(
    lambda size, given: Inner(size=size, **given),
    st.tuples(st.integers(), st.integers()),
    st.fixed_dictionaries({}, optional={"name": st.text(), "limit": st.none() | st.integers()}),
)


@given(
    one=INNER,
    given=st.fixed_dictionaries(
        {},
        optional={
            "more": st.lists(INNER, max_size=3),
            "named": st.dictionaries(st.text(), INNER, max_size=3),
            "kind": st.sampled_from("ab"),
            "free": st.dictionaries(st.text(), st.lists(st.none() | st.integers() | st.text()), max_size=3),
        },
    ),
)
def test_what_is_written_is_read_again(one, given):
    made = Outer(one=one, **given)
    text = json.dumps(made.written())
    assert set(json.loads(text)) == {"one", *given}
    read = Outer.read(json.loads(text))
    assert read == made and json.dumps(read.written()) == text
