"""Our own corpus is there, large enough, split, varied, and in the public domain by its own words."""

from __future__ import annotations

import re
from collections import Counter
from importlib import resources

import pytest

from model.errors import InputError
from training.data.corpus import load_own_stories, own_stories_folder


def test_there_are_enough_stories_and_enough_of_them_are_held_out() -> None:
    everything, held_out = load_own_stories(), load_own_stories("heldout")
    assert len(everything) >= 120
    assert len(held_out) >= 100
    assert len(load_own_stories("train")) >= 20
    assert Counter(load_own_stories("train") + held_out) == Counter(everything)


def test_no_split_but_the_known_ones() -> None:
    with pytest.raises(InputError, match='split must be "train", "heldout" or "all", got \'val\''):
        load_own_stories("val")  # type: ignore[arg-type]


def test_titles_and_endings_are_all_their_own_and_openings_nearly_all() -> None:
    stories = load_own_stories()
    assert len({story.title for story in stories}) == len(stories)
    openings = Counter(" ".join(story.text.split()[:8]) for story in stories)
    # "Once upon a time there was a little" may come twice; a template comes again and again.
    assert max(openings.values()) <= 2
    assert len(openings) >= 0.98 * len(stories)
    assert len({" ".join(story.text.split()[-8:]) for story in stories}) == len(stories)


def test_stories_are_short_plain_ascii_with_a_proper_end() -> None:
    for story in load_own_stories():
        assert story.text.isascii(), story.title
        assert 60 <= len(story.text.split()) <= 400, story.title
        assert re.fullmatch(r'["A-Z].*[.!?]["\']?', story.text, re.DOTALL), story.title


def test_many_names_carry_the_stories_and_many_speak() -> None:
    stories = load_own_stories()
    # A name is a capital letter inside a sentence.
    names = {name for story in stories for name in re.findall(r"[a-z,] ([A-Z][a-z]{2,})\b", story.text)}
    assert len(names) > 100
    assert sum('"' in story.text for story in stories) > len(stories) / 2


def test_the_licence_stands_beside_the_stories_and_travels_with_the_package() -> None:
    assert "CC0 1.0" in (own_stories_folder() / "README.md").read_text("utf-8")
    packed = {file.name for file in (resources.files("training") / "stories").iterdir()}
    assert {"README.md", "a.jsonl", "b.jsonl"} <= packed
