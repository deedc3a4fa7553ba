"""Wishes: what is allowed, and when a story meets them, or can no more."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from model.wishes import LONG, MAX_WORDS, SHORT, Wishes, ending_of, length_of

WISHES = st.builds(
    Wishes,
    words=st.lists(st.sampled_from(["fox", "sad"]), max_size=2).map(tuple),
    length=st.sampled_from([None, "short", "medium", "long"]),
    dialogue=st.sampled_from([None, True, False]),
    ending=st.sampled_from([None, "happy", "sad"]),
)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"words": ("two words",)}, "wishes.words must be single words of at most 40 letters each, got 'two words'"),
        ({"words": ("a" * 41,)}, "wishes.words must be single words of at most 40 letters each, got"),
        ({"words": ("\x03",)}, "wishes.words must be single words of at most 40 letters each, got"),
        ({"words": ("a",) * 9}, f"wishes.words must be at most {MAX_WORDS} words, got 9"),
        ({"length": "huge"}, "wishes.length must be one of short, medium, long, got 'huge'"),
        ({"ending": 1}, "wishes.ending must be one of happy, sad, got 1"),
        ({"dialogue": "yes"}, "wishes.dialogue must be true or false, got 'yes'"),
    ],
)
def test_a_wish_that_cannot_be_told_is_refused_by_its_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        Wishes(**values)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("He ran. They were happy and played all day.", "happy"),
        ("They laughed. Then it got dark. She was sad and cried. The end.", "sad"),
        ("The bird was not happy. It flew away.", "sad"),
        ("He was no longer sad. He went home.", "happy"),
        ("She was happy, but he was sad. They went home.", None),
        ("They went home. They went to bed.", None),
        ('She said, "I love you!" Then she hugged him.', "happy"),
        ("", None),
    ],
)
def test_an_ending_is_the_mood_of_the_last_two_sentences(text: str, ending: str | None) -> None:
    assert ending_of(text) == ending


def test_length_is_counted_in_words() -> None:
    assert [length_of("one, " * count) for count in (0, SHORT, SHORT + 1, LONG, LONG + 1)] == [
        *("short", "short", "medium", "medium", "long")
    ]


def test_each_wish_is_met_by_itself() -> None:
    story = 'Ember saw two cakes. "Oh!" said Ember. She was happy.'
    assert Wishes().met(story) == {}
    assert Wishes(words=("cake", "ember"), length="short", dialogue=True, ending="happy").met(story) == dict.fromkeys(
        ("words", "length", "dialogue", "ending"), True
    )
    assert Wishes(words=("cake", "Emb"), length="long", dialogue=False, ending="sad").met(story) == dict.fromkeys(
        ("words", "length", "dialogue", "ending"), False
    )


def test_what_is_not_met_is_counted_word_by_word() -> None:
    story = "Ember saw two cakes. She was happy."
    assert Wishes().unmet(story) == 0
    assert Wishes(words=("cake", "fox", "hat"), length="short", dialogue=True, ending="happy").unmet(story) == 3
    assert not Wishes()
    assert Wishes(dialogue=False)


@given(wishes=WISHES, words=st.lists(st.sampled_from(["fox", '"Oh!"', "sad.", "happy."]), max_size=LONG + 9))
def test_a_story_that_meets_its_wishes_was_lost_at_no_word(wishes: Wishes, words: list[str]) -> None:
    texts = [" ".join(words[:count]) for count in range(len(words) + 1)]
    if wishes.unmet(texts[-1]) == 0:
        assert not any(wishes.is_lost(text) for text in texts)


def test_a_story_is_lost_when_it_is_too_long_or_somebody_has_spoken() -> None:
    begun = "fox " * (SHORT + 1)
    assert [Wishes(length=length).is_lost(begun) for length in ("short", "medium", "long")] == [True, False, False]
    assert Wishes(length="medium").is_lost("fox " * (LONG + 1))
    assert [Wishes(dialogue=wished).is_lost('"Oh!"') for wished in (False, True)] == [True, False]
