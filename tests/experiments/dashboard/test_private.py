"""No address and no folder of the store's reaches a visitor; all else does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.dashboard.private import target_name, without_places

NAME = st.text("abcXYZ019_-.", min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cannot be read: No such file: '/srv/lily/mlruns/1/a.json'", "cannot be read: No such file: '…'"),
        ("see ~/stories/one and C:\\Users\\lily\\x", "see … and …"),
        ("sqlite:////srv/x.db (locked)", "… (locked)"),
        ("postgresql://lily:secret@db.example:5432/mlflow", "…"),
        ("2,000 tokens/s at 3/4 of the load, bits/byte", "2,000 tokens/s at 3/4 of the load, bits/byte"),
        ("either/or: pass", "either/or: pass"),
    ],
)
def test_places_are_left_out_and_units_stay(text: str, told: str) -> None:
    assert without_places(text) == told


@given(st.lists(NAME, min_size=2, max_size=5), st.sampled_from(["/", "file:///", "s3://", "~/"]))
def test_no_part_of_a_place_is_left(parts: list[str], root: str) -> None:
    assert without_places(f"at {root}{'/'.join(parts)} today") == "at … today"


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("local", "local"),
        ("local (mine)", "local (mine)"),
        ("models:/story-writer@champion", "story-writer@champion"),
        ("http://10.0.0.7:8000", "a server"),
        ("https://user:pw@host/x", "a server"),
    ],
)
def test_a_target_is_told_by_what_it_is(target: str, told: str) -> None:
    assert target_name(target) == told
