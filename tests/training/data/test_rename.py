"""Renamed stories: all but the names stays, names never merge, and the same question has the same answer."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.rename import (
    BOYS,
    GIRLS,
    HELD_OUT,
    NOUNS,
    Renamed,
    Renamer,
    gender_votes,
    has_nicknames,
    invented_name,
)

CORPUS = (
    "One day, Lily saw Tim. She waved. He ran to her. Then Spot barked at Timmy, and Mom smiled at Max.",
    "A girl named Lily had a cat. She said that Tom and Anna could come. One day, Tom lost his hat.",
    "There was a dog named Spot. He had a spot on his nose. The blue bird sang. The big bear ate.",
    "One day, Bear came to see Blue. The bear was big and the sky was blue, so blue.",
    "Here is Tim with Ann and Annie and Sam. Tim said he would go. On a hot day, Max ran. He was fast.",
)
KNOWN = ("Lily", "Tim", "Timmy", "Tom", "Anna", "Ann", "Annie", "Sam", "Max")
"""Words that this corpus makes names of."""
RENAMER = Renamer(CORPUS, seed=3)

SENTENCES = st.sampled_from(
    [
        "{0} went home.",
        "One day, {0} met {1}.",
        '"Look, {0}!" said {1}.',
        "{0}'s ball was red, and {1}'s was blue.",
        "{0}, {1} and {2} ran.",
        "Mom told Mr. {0} about it on Monday.",
        "He said he liked {1}.",
        "{0}! {0}! {0}!",
        "Then {0}-the-cat saw the sun; {2} slept.",
        "The bear spotted a lily.",
        "I saw God and Santa with {0}.",
    ]
)
STORIES = st.builds(
    lambda sentences, names, shout, joint: joint.join(sentences).format(
        *[name.upper() if shout else name for name in names]
    ),
    st.lists(SENTENCES, min_size=1, max_size=8),
    st.lists(st.sampled_from([*KNOWN, "Bear", "Qwert", "Zed"]), min_size=3, max_size=3, unique=True),
    st.booleans(),
    st.sampled_from([" ", "\n", "\n\n"]),
)


def rename(text: str, story: str = "story", copy: int = 0) -> Renamed:
    return RENAMER.rename(text, story=story, copy=copy)


def skeleton(text: str, names: list[str]) -> str:
    """The text with every name, also in capitals, replaced by its number."""
    for number, name in enumerate(names):
        text = re.sub(rf"\b{name}\b", f"<{number}>", text)
        text = re.sub(rf"\b{name.upper()}\b", f"<{number}!>", text)
    return text


@given(STORIES, st.text("0123456789abcdef", min_size=1, max_size=12), st.integers(0, 5))
def test_a_renamed_story_keeps_everything_else_byte_for_byte(text: str, story: str, copy: int) -> None:
    renamed = rename(text, story, copy)
    assert skeleton(renamed.text, list(renamed.names.values())) == skeleton(text, list(renamed.names))


@given(STORIES, st.integers(0, 5))
def test_names_never_merge_with_each_other_or_with_a_word_of_the_story(text: str, copy: int) -> None:
    renamed = rename(text, copy=copy)
    new = [name.lower() for name in renamed.names.values()]
    assert len(set(new)) == len(new)
    assert not set(new) & set(re.findall("[a-z]+", text.lower()))


@given(STORIES)
def test_no_old_name_is_left_and_none_is_held_out(text: str) -> None:
    renamed = rename(text)
    words = set(re.findall("[A-Za-z]+", renamed.text))
    for old, new in renamed.names.items():
        assert old not in words
        assert new not in HELD_OUT


@given(STORIES, st.text("0123456789abcdef", min_size=1, max_size=12), st.integers(0, 3))
def test_renaming_is_a_function_of_seed_story_and_copy(text: str, story: str, copy: int) -> None:
    assert rename(text, story, copy) == Renamer(CORPUS, seed=3).rename(text, story=story, copy=copy)


@given(STORIES)
def test_a_first_mention_is_reported_for_each_name_where_it_stands(text: str) -> None:
    renamed = rename(text)
    assert list(renamed.first_mentions) == sorted(renamed.first_mentions)
    found = [renamed.text[start:end].lower() for start, end in renamed.first_mentions]
    assert sorted(found) == sorted(name.lower() for name in renamed.names.values())
    for start, end in renamed.first_mentions:
        assert not re.search(rf"\b{renamed.text[start:end]}\b", renamed.text[:start], re.IGNORECASE)


def test_other_copies_and_seeds_and_stories_get_other_names() -> None:
    text = "One day, Lily met Tim."
    seeds = (Renamer(CORPUS, seed=seed).rename(text, story="a", copy=0) for seed in (1, 2))
    texts = [rename(text, "a", 0), rename(text, "a", 1), rename(text, "b", 0), *seeds]
    assert len({renamed.text for renamed in texts}) == len(texts)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("One day, Lily met Tim.", ["Lily", "Tim"]),
        ("Tim ran. Then Lily and Tim ran.", ["Tim", "Lily"]),
        ("Tim ran. Anna fell.", []),  # only at sentence starts, once each
        ("Tim ran. Tim fell. Anna saw Max.", ["Tim", "Max"]),  # repeatedly
        ("Spot ran. Spot fell. Then Tom saw the sun. Then it was hot.", ["Tom"]),  # but the corpus is not sure
        ("Then Mom and Daddy came on Monday, and God saw Mr. Max in May.", []),
        ("The bear met Bear. Then Blue came.", []),  # mostly in small letters
        ("Then Spot ran.", ["Spot"]),
        ("The spot was red. Then Spot ran.", []),  # only half a name, and a common word here
        ("A lily grew. Then Lily came.", ["Lily"]),  # always a name
        ("So Timmy and Tim met.", ["Timmy", "Tim"]),
        ("It was McTim.", []),
    ],
)
def test_names_are_found_by_their_form(text: str, names: list[str]) -> None:
    assert RENAMER.names_in(text) == names


def test_possessives_sentence_starts_and_capitals_follow() -> None:
    renamed = rename("Lily's cat saw Lily. LILY! LILY'S cat. Lilypad.")
    new = renamed.names["Lily"]
    assert renamed.text == f"{new}'s cat saw {new}. {new.upper()}! {new.upper()}'S cat. Lilypad."


@pytest.mark.parametrize(
    ("text", "name", "gender"),
    [
        ("One day, Qwert ran. She fell.", "Qwert", "girl"),
        ("One day, Qwert lost his hat. Then Zed came. She saw it.", "Qwert", "boy"),
        ("One day, Lily lost his hat.", "Lily", "boy"),  # the story knows better than the corpus
        ("One day, Lily ran.", "Lily", "girl"),
        ("One day, Qwert ran.", "Qwert", "unknown"),
        ("One day, Qwert ran. It was hot. The sun shone. She fell.", "Qwert", "unknown"),  # too far away
    ],
)
def test_gender_is_given_by_the_pronouns(text: str, name: str, gender: str) -> None:
    assert RENAMER.genders(text, [name, "Zed"])[0] == gender


def test_a_pronoun_belongs_to_the_nearest_name_before_it() -> None:
    assert gender_votes("Ann met Bo. He ran. Ann lost her hat and her bag.", {"Ann", "Bo"}) == {
        ("Bo", "boy"): 1,
        ("Ann", "girl"): 1,
    }


def test_stories_without_names_or_with_nicknames_get_no_copies_and_are_counted() -> None:
    renamer = Renamer(CORPUS)
    stories = ["The sun shone.", "Then Tim came, and Timmy went.", "So Lily met Tim.", "One day, Max ran."]
    copies = [list(renamer.copies(text, story=text, count=2)) for text in stories]
    assert [len(found) for found in copies] == [0, 0, 2, 2]
    report = dict(renamer.counts)
    distinct = report.pop("distinct_names")
    assert report.pop("bytes") == sum(len(copy.text) for found in copies for copy in found)
    assert report == {"stories": 4, "copies": 4, "names": 6, "without_names": 1, "nicknames": 1}
    assert 2 <= distinct <= 6


@pytest.mark.parametrize(
    ("names", "nicknames"), [(["Tim", "Timmy"], True), (["Bo", "Bobby"], False), (["Tim", "Tom"], False)]
)
def test_a_nickname_is_a_name_that_begins_another(names: list[str], nicknames: bool) -> None:
    assert has_nicknames(names) is nicknames


def test_held_out_names_are_in_no_pool_and_are_enough() -> None:
    assert not HELD_OUT & {*GIRLS, *BOYS, *NOUNS}
    assert len(HELD_OUT) >= 80


@given(st.integers(0, 2**32))
def test_invented_names_look_like_names(seed: int) -> None:
    assert re.fullmatch("[A-Z][a-z]{2,9}", invented_name(Random(seed)))


def test_masked_tokens_are_those_that_overlap_a_first_mention() -> None:
    renamed = Renamed("Then Ember saw Zed.", {}, ((5, 10), (15, 18)))
    offsets = [(0, 4), (4, 7), (7, 10), (10, 14), (14, 15), (15, 18), (18, 19)]
    assert renamed.masked(offsets) == [1, 2, 5]
