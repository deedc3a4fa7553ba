"""The record of colours: what it allows, and that nobody can make it point at nothing."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from model.serving.deployments.colours import (
    COLOURS,
    Colour,
    Colours,
    ColoursError,
    colour_named,
    other,
    parse,
)

A, B = "https://a.example", "https://b.example"


def both() -> Colours:
    return Colours(active="blue").placed("blue", A, "1").placed("green", B, "2")


def test_there_are_two_colours_and_each_knows_the_other() -> None:
    assert set(get_args(Colour)) == set(COLOURS)
    assert [other(colour) for colour in COLOURS] == ["green", "blue"]
    with pytest.raises(InputError, match="colour must be one of blue, green, got 'red'"):
        colour_named("red")


def test_a_switch_moves_new_stories_and_a_rollback_moves_them_back() -> None:
    switched = both().switched("green")
    assert (switched.active, switched.url, switched.previous, switched.idle) == ("green", B, "blue", "blue")
    back = switched.rolled_back()
    assert (back.active, back.url, back.previous) == ("blue", A, "green")
    assert back.rolled_back().active == "green"


def test_a_switch_to_where_stories_go_already_changes_nothing() -> None:
    record = both()
    assert record.switched("blue") is record


def test_nobody_can_switch_to_a_colour_without_a_proven_deployment() -> None:
    record = Colours(active="blue").placed("blue", A, "1")
    with pytest.raises(ColoursError, match="green has no deployment that passed its check"):
        record.switched("green")
    assert record.switched("blue").active == "blue"


def test_a_rollback_never_leads_to_another_version_than_the_one_before() -> None:
    switched = both().switched("green")
    with pytest.raises(ColoursError, match="what ran before the last switch is gone"):
        switched.placed("blue", None, None).rolled_back()
    with pytest.raises(ColoursError, match="what ran before the last switch is gone"):
        switched.placed("blue", None, None).placed("blue", A, "3").rolled_back()
    assert switched.placed("blue", "https://moved.example", "1").rolled_back().url == "https://moved.example"


def test_an_address_must_be_one() -> None:
    for wrong in ("a.example", "ftp://a.example", "http://", ""):
        with pytest.raises(InputError, match=r"url must be an http\(s\) address"):
            both().placed("green", wrong, "1")


def test_a_slash_at_the_end_does_not_double_later() -> None:
    assert both().placed("blue", f"{A}/", "1").url == A


_steps = st.lists(
    st.one_of(
        st.tuples(st.just("place"), st.sampled_from(COLOURS), st.sampled_from([None, A, B])),
        st.tuples(st.just("switch"), st.sampled_from(COLOURS), st.none()),
        st.tuples(st.just("rollback"), st.none(), st.none()),
    ),
    max_size=12,
)


@given(_steps)
def test_whatever_happens_the_record_stays_whole_and_survives_being_stored(
    steps: list[tuple[str, Colour, str]],
) -> None:
    record = Colours(active="blue").placed("blue", A, "1")
    for number, (what, colour, url) in enumerate(steps):
        before = record
        try:
            if what == "place":
                record = record.placed(colour, url, f"v{number}")
            elif what == "switch":
                record = record.switched(colour)
                assert record.url is not None
            else:
                record = record.rolled_back()
                assert record.url is not None
        except ColoursError:
            record = before
        assert record is before or record.generation == before.generation + 1
        assert record.previous != record.active
        assert all((record.urls[both] is None) == (record.versions[both] is None) for both in COLOURS)
        assert parse(json.dumps(record.as_dict()), "here") == record


@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
            ),
            max_leaves=8,
        ).map(json.dumps),
    )
)
def test_what_is_no_record_is_told_in_one_line_and_breaks_nothing(stored: bytes | str) -> None:
    with pytest.raises(ColoursError, match=r"^here does not hold a record of colours: "):
        parse(stored, "here")


@given(
    field=st.sampled_from(["active", "previous", "urls", "versions", "changed", "generation"]),
    value=st.one_of(
        st.integers(),
        st.just("red"),
        st.lists(st.none()),
        st.just({"blue": None}),
        st.just({"blue": 7, "green": 7}),
        st.just({"blue": "javascript:x", "green": None}),
        st.just(float("inf")),
        st.booleans(),
    ),
)
def test_a_record_with_one_wrong_field_is_refused(field: str, value: object) -> None:
    whole = both().as_dict()
    good = {"changed": (int, float), "generation": (int,)}
    if type(value) in good.get(field, ()) and value != float("inf"):
        return
    if field == "versions" and value == {"blue": "javascript:x", "green": None}:
        return  # a version may be called anything
    with pytest.raises(ColoursError, match="does not hold a record of colours"):
        parse(json.dumps({**whole, field: value}), "here")
