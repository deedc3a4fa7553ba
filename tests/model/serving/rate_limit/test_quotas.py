"""What a limit's setting may say, and what it means."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from model.serving.rate_limit.quotas import MAX_UNITS, read_quotas

TIMES = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400}


@given(
    amount=st.integers(1, 10**9),
    many=st.integers(1, 30),
    time=st.sampled_from(sorted(TIMES)),
    spelled=st.sampled_from(["{}/{} {}s", "{} per {} {}", " {}/{}{} "]),
)
def test_a_limit_says_an_amount_and_a_time(amount: int, many: int, time: str, spelled: str) -> None:
    (quota,) = read_quotas("STORY_LIMIT_STORIES", spelled.format(amount, many, time), "client", "stories")
    assert (quota.amount, quota.unit, quota.seconds) == (amount, 1, many * TIMES[time])
    assert quota.cost(stories=3, tokens=100) == 3


@given(amount=st.integers(1, 10**9), tokens=st.integers(1, 10**6))
def test_very_many_tokens_are_counted_in_larger_units_and_never_too_low(amount: int, tokens: int) -> None:
    (quota,) = read_quotas("STORY_LIMIT_TOKENS", f"{amount}/minute", "all", "tokens")
    assert quota.amount <= MAX_UNITS
    assert amount * (1 - 2 / MAX_UNITS) <= quota.allowed <= amount
    assert quota.cost(1, tokens) * quota.unit >= tokens
    assert quota.cost(1, tokens) == math.ceil(tokens / quota.unit)


def test_several_limits_hold_together_and_each_has_a_window_of_its_own() -> None:
    quotas = read_quotas("STORY_LIMIT_STORIES", "5/second; 2000/day", "client", "stories")
    assert [str(quota) for quota in quotas] == ["5 stories per second", "2000 stories per day"]
    assert len({quota.key("192.0.2.1") for quota in quotas}) == 2


def test_what_all_share_has_one_window_and_clients_have_their_own() -> None:
    (mine,) = read_quotas("STORY_LIMIT_STORIES", "5/minute", "client", "stories")
    (ours,) = read_quotas("STORY_LIMIT_ALL_STORIES", "5/minute", "all", "stories")
    assert mine.key("192.0.2.1") != mine.key("192.0.2.2")
    assert ours.key("192.0.2.1") == ours.key("192.0.2.2")


def test_off_is_no_limit() -> None:
    assert read_quotas("STORY_LIMIT_STORIES", " Off ", "client", "stories") == []


@pytest.mark.parametrize(
    "text", ["30", "0/minute", "minute", "30/fortnight", "-1/minute", "5/second,", "2/2year"]
)
def test_anything_else_is_refused_in_one_line_that_names_the_setting(text: str) -> None:
    with pytest.raises(InputError, match="must be like 30/minute") as raised:
        read_quotas("STORY_LIMIT_TOKENS", text, "client", "tokens")
    assert raised.value.param == "STORY_LIMIT_TOKENS"
    assert "\n" not in str(raised.value)


@given(st.text(max_size=40))
def test_no_text_does_anything_else(text: str) -> None:
    try:
        quotas = read_quotas("STORY_LIMIT_TOKENS", text, "client", "tokens")
    except InputError:
        return
    assert all(quota.amount >= 1 and quota.seconds >= 1 for quota in quotas)
