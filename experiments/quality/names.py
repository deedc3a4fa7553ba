"""Does a story keep its names? Those that its prompt gives, and those it brings up in its opening.

A name is recognised by its form: a word that stands in mid-sentence with a capital letter. That overlooks a name
which only ever opens sentences, and takes Monday for one; both hold for every model alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

OPENING_WORDS = 40
"""Of the continuation: about the first three sentences."""
CAPITALISED = re.compile(r"(?<=[\w,;] )[A-Z][a-z]+\b")
"""Behind a word or a comma and one space. "I", "I'm" and "OK" are no names."""
TITLES = {"Mr", "Mrs", "Ms", "Dr"}
ADDRESSED = r'\b{name} (?:said|asked|replied|answered)(?: to [^,."]{{1,20}})?[,:]? "[^"]*\b{name}\b'
"""Somebody who speaks to himself by name."""


def split_opening(text: str, count: int = OPENING_WORDS) -> tuple[str, str]:
    """A continuation's first `count` words, with what stands between them, and the rest."""
    for number, word in enumerate(re.finditer(r"\S+", text), 1):
        if number == count:
            return text[: word.end()], text[word.end() :]
    return text, ""


def names_in(text: str) -> set[str]:
    """Capitalised words in mid-sentence."""
    return set(CAPITALISED.findall(text)) - TITLES


def holds(text: str, name: str) -> bool:
    """Whether `name` stands in `text` as a word of its own; "Tim's" holds Tim, and "Timmy" does not."""
    return re.search(rf"\b{re.escape(name)}\b", text) is not None


def all_kept(continuation: str, names: Iterable[str]) -> bool:
    """Whether each of the prompt's names comes again in the continuation."""
    return all(holds(continuation, name) for name in names)


def share_kept(prompt: str, continuation: str, names: Iterable[str]) -> float | None:
    """Of the names given, and those found in prompt and opening, the share that comes again after the opening.

    None where there is no name, or where the story is over with its opening.
    """
    opening, rest = split_opening(continuation)
    wanted = {*names, *names_in(prompt + opening)}
    if not wanted or not rest.strip():
        return None
    return sum(holds(rest, name) for name in wanted) / len(wanted)


def speaks_to_himself(story: str, names: Iterable[str]) -> bool:
    """Whether somebody of `names` addresses himself by name."""
    return any(re.search(ADDRESSED.format(name=re.escape(name)), story) for name in names)
