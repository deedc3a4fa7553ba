"""`--since` in its three forms."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.ab.since import parse_since
from model.errors import InputError

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-03", datetime(2026, 11, 3, tzinfo=UTC)),
        ("2026-11-03T08:00", datetime(2026, 11, 3, 8, tzinfo=UTC)),
        ("2026-11-03T08:00+02:00", datetime(2026, 11, 3, 6, tzinfo=UTC)),
        ("90m", NOW - timedelta(minutes=90)),
        ("12h", NOW - timedelta(hours=12)),
        ("2w", NOW - timedelta(days=14)),
    ],
)
def test_a_day_a_moment_or_how_long_ago(text: str, moment: datetime) -> None:
    assert parse_since(text, NOW) == moment.timestamp()


@given(st.text(max_size=30))
def test_anything_else_is_one_line_that_says_what_is_allowed(text: str) -> None:
    said = ""
    try:
        parse_since(text, NOW)
    except InputError as error:
        said = str(error)
    assert not said or said.startswith("since must be a day (2026-11-03), a moment")
    assert "\n" not in said
