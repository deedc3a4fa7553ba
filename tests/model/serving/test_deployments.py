"""The deployment record: what it allows, and that nobody can make it point at nothing."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from model.serving.deployments import (
    DEPLOYMENTS,
    Deployment,
    DeploymentError,
    DeploymentState,
    deployment_named,
    other,
)

A, B = "https://a.example", "https://b.example"


def both() -> DeploymentState:
    return DeploymentState(active="blue").updated("blue", A, "1").updated("green", B, "2")


def test_there_are_two_deployments_and_each_knows_the_other() -> None:
    assert set(get_args(Deployment)) == set(DEPLOYMENTS)
    assert [other(deployment) for deployment in DEPLOYMENTS] == ["green", "blue"]
    with pytest.raises(InputError, match="deployment must be one of blue, green, got 'red'"):
        deployment_named("red")


def test_a_switch_moves_new_stories_and_a_rollback_moves_them_back() -> None:
    switched = both().switched("green")
    assert (switched.active, switched.url, switched.previous, switched.idle) == ("green", B, "blue", "blue")
    back = switched.rolled_back()
    assert (back.active, back.url, back.previous) == ("blue", A, "green")
    assert back.rolled_back().active == "green"


def test_a_switch_to_where_stories_go_already_changes_nothing() -> None:
    record = both()
    assert record.switched("blue") is record


def test_nobody_can_switch_to_a_deployment_without_a_proven_deployment() -> None:
    record = DeploymentState(active="blue").updated("blue", A, "1")
    with pytest.raises(DeploymentError, match="green has no deployment that passed its check"):
        record.switched("green")
    assert record.switched("blue").active == "blue"


def test_a_rollback_never_leads_to_another_version_than_the_one_before() -> None:
    switched = both().switched("green")
    with pytest.raises(DeploymentError, match="what ran before the last switch is gone"):
        switched.updated("blue", None, None).rolled_back()
    with pytest.raises(DeploymentError, match="what ran before the last switch is gone"):
        switched.updated("blue", None, None).updated("blue", A, "3").rolled_back()
    assert switched.updated("blue", "https://moved.example", "1").rolled_back().url == "https://moved.example"


def test_an_address_must_be_one() -> None:
    for wrong in ("a.example", "ftp://a.example", "http://", ""):
        with pytest.raises(InputError, match=r"url must be an http\(s\) address"):
            both().updated("green", wrong, "1")


def test_a_slash_at_the_end_does_not_double_later() -> None:
    assert both().updated("blue", f"{A}/", "1").url == A


_steps = st.lists(
    st.one_of(
        st.tuples(st.just("place"), st.sampled_from(DEPLOYMENTS), st.sampled_from([None, A, B])),
        st.tuples(st.just("switch"), st.sampled_from(DEPLOYMENTS), st.none()),
        st.tuples(st.just("rollback"), st.none(), st.none()),
    ),
    max_size=12,
)


@given(_steps)
def test_whatever_happens_the_record_stays_whole_and_survives_being_stored(
    steps: list[tuple[str, Deployment, str]],
) -> None:
    record = DeploymentState(active="blue").updated("blue", A, "1")
    for number, (what, deployment, url) in enumerate(steps):
        before = record
        try:
            if what == "place":
                record = record.updated(deployment, url, f"v{number}")
            elif what == "switch":
                record = record.switched(deployment)
                assert record.url is not None
            else:
                record = record.rolled_back()
                assert record.url is not None
        except DeploymentError:
            record = before
        assert record is before or record.generation == before.generation + 1
        assert record.previous != record.active
        assert all((record.urls[both] is None) == (record.versions[both] is None) for both in DEPLOYMENTS)
        assert DeploymentState.parse(record.model_dump_json(), "here") == record


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
    with pytest.raises(DeploymentError, match=r"^here does not hold a deployment record: "):
        DeploymentState.parse(stored, "here")


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
    whole = both().model_dump()
    good = {"changed": (int, float), "generation": (int,)}
    if type(value) in good.get(field, ()) and value != float("inf"):
        return
    if field == "versions" and value == {"blue": "javascript:x", "green": None}:
        return  # a version may be called anything
    with pytest.raises(DeploymentError, match="does not hold a deployment record"):
        DeploymentState.parse(json.dumps({**whole, field: value}), "here")
