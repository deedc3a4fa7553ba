"""Counts of words and of what is said again, against counts by hand and by dictionary."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.quality.text import distinct, repeated, words


def test_words_are_runs_of_letters_in_lower_case() -> None:
    assert words('"Tim\'s dog," said Zoë - 2 times!') == ["tim's", "dog", "said", "zoë", "2", "times"]


def test_repeats_are_counted_in_runs() -> None:
    # Runs of "a b c d a b c d": abcd bcda cdab dabc abcd - one of five has stood before.
    sequence = words("a b c d a b c d")
    assert repeated(sequence, 4) == pytest.approx(1 / 5)
    assert distinct(sequence, 2) == pytest.approx(4 / 7)
    assert distinct(sequence, 1) == 0.5


@given(st.text("abc .'\n\"", max_size=60), st.integers(1, 4))
def test_shares_are_those_of_a_count_of_runs(text: str, size: int) -> None:
    sequence = words(text)
    counts = Counter(tuple(sequence[start : start + size]) for start in range(len(sequence) - size + 1))
    if not counts:
        assert distinct(sequence, size) is None
        assert repeated(sequence, size) is None
        return
    again = sum(count - 1 for count in counts.values())
    assert repeated(sequence, size) == pytest.approx(again / counts.total())
    assert distinct(sequence, size) == pytest.approx(len(counts) / counts.total())
