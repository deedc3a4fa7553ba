"""Wishes: what is allowed, what the header says, and when a story meets them."""

from __future__ import annotations

from typing import Any

import pytest

from model.errors import InputError
from model.wishes import LONG, MAX_WORDS, SHORT, Wishes, ending_of, length_of


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


def test_the_header_tells_what_is_wished_and_nothing_else() -> None:
    assert Wishes().header() == ""
    wishes = Wishes(words=("cake", "Ember", "o'clock"), length="short", dialogue=False, ending="sad")
    assert wishes.header() == "\x02words: cake, Ember, o'clock; length: short; dialogue: no; ending: sad\x03"
    assert Wishes(dialogue=True).header() == "\x02dialogue: yes\x03"


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
