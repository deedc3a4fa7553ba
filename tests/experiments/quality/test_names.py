"""Names are found, kept and confused as a reader would say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.quality.names import (
    OPENING_WORDS,
    all_kept,
    holds,
    names_in,
    share_kept,
    speaks_to_himself,
    split_opening,
)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("The dog saw Lily and Tom.", {"Lily", "Tom"}),
        ('She ran. Then he said, "Come!"', set()),
        ("They met, Max and I, and I'm OK.", {"Max"}),
        ("He asked Mr. Bear and Dr Fox.", {"Fox"}),
    ],
)
def test_a_name_is_a_capital_in_mid_sentence(text: str, names: set[str]) -> None:
    assert names_in(text) == names


def test_a_name_is_a_word_of_its_own() -> None:
    assert holds("It was Tim's ball.", "Tim")
    assert not holds("Timmy ran.", "Tim")
    assert all_kept("Lily saw Tom.", ["Tom", "Lily"])
    assert not all_kept("Lily saw a tom.", ["Tom", "Lily"])


def test_names_of_prompt_and_opening_are_looked_for_behind_the_opening() -> None:
    opening = " She met Max and a cat." + " and so on" * 12
    assert len(opening.split()) > OPENING_WORDS
    prompt = "Lily went out."
    assert share_kept(prompt, opening + " Lily said to Max: hello.", ["Lily"]) == 1
    assert share_kept(prompt, opening + " Max slept.", ["Lily"]) == 0.5
    assert share_kept(prompt, opening + " They slept.", ["Lily"]) == 0
    assert share_kept(prompt, " Lily slept.", ["Lily"]) is None, "over with its opening"
    assert share_kept("it rained.", opening.replace("Max", "a fox") + " It rained on.", []) is None, "no name"


@given(st.text("ab \n.", max_size=300), st.integers(1, 50))
def test_an_opening_and_the_rest_are_the_whole(text: str, count: int) -> None:
    opening, rest = split_opening(text, count)
    assert opening + rest == text
    assert len(opening.split()) == min(count, len(text.split()))


@pytest.mark.parametrize(
    ("text", "confused"),
    [
        ('Tom said, "Come, Tom!" Lily ran.', True),
        ('Tom asked: "Where is Tom?" Lily did not know.', True),
        ('Tom said, "Come, Lily!" They ran.', False),
        ('Tom said, "Come!" Then Lily said, "Tom, wait!"', False),
        ('"I am Tom," said Tom to Lily.', False),
    ],
)
def test_only_who_speaks_to_himself_by_name_is_confused(text: str, confused: bool) -> None:
    assert speaks_to_himself(text, ["Lily", "Tom"]) == confused
