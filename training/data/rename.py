"""Renamed copies of stories: training data that teaches a model to copy names instead of reciting the ones it knows.

TinyStories has about 300 different names, so a small model learns them by heart and turns "Ember" into "Emily". In a
renamed copy, every name of a story is replaced by one from a pool of about 1,100 names, or by an invented one; the only
way to predict the later mentions is to look at the first one. Nobody could predict that first mention, so it can be
left out of the loss: the model then keeps the corpus's names for names of its own.

A name is found by its form: a word capitalised in mid-sentence that the corpus rarely writes in lower case. Its gender
follows from the pronouns behind it in the story, or else in the whole corpus.
"""

import hashlib
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Literal

Gender = Literal["girl", "boy", "unknown"]

_TABLE = tomllib.loads(Path(__file__).with_name("names.toml").read_text("utf-8"))
NOT_NAMES = frozenset(_TABLE["not_names"].split())
"""Words with a capital that are never renamed."""
HELD_OUT = frozenset(" ".join(_TABLE["held_out"].values()).split())
"""Names that no renamed story contains: those of the evaluation's prompts."""
GIRLS, BOYS, NOUNS = (
    tuple(sorted(set(_TABLE["pools"][kind].split()) - HELD_OUT)) for kind in ("girls", "boys", "nouns")
)
ONSETS, VOWELS, CODAS = (
    tuple(str(part).strip("_") for part in _TABLE["syllables"][kind].split()) for kind in ("onsets", "vowels", "codas")
)
"""Parts of invented names, likely ones several times."""
POOLS: dict[Gender, tuple[str, ...]] = {"girl": GIRLS, "boy": BOYS, "unknown": tuple(sorted({*GIRLS, *BOYS}))}
REAL, INVENTED = 0.65, 0.25
"""Shares of the new names that are real and invented; the rest are nouns."""
CAPITAL_SHARE = 0.5
"""A name is capitalised in at least this share of its uses in the corpus (sentence starts not counted)."""
SURE_SHARE = 0.95
"""The same, for a word that the story also has in lower case ("a water lily"), or only at sentence starts."""

_CAPITALISED = re.compile(r"\b[A-Z][a-z]+\b(?!['-][A-Z])")
_MIDDLE = re.compile(r"(?<=[\w,;] )" + _CAPITALISED.pattern)
_LOWER = re.compile(r"\b[a-z]+\b")
_WORD = re.compile(r"[A-Za-z]+")
_PRONOUNS = dict.fromkeys(("he", "him", "his", "himself"), "boy") | dict.fromkeys(
    ("she", "her", "hers", "herself"), "girl"
)


@dataclass(frozen=True, slots=True)
class Renamed:
    """One renamed copy."""

    text: str
    names: dict[str, str]
    """Old name to new name, in the order of their first mentions."""
    first_mentions: tuple[tuple[int, int], ...]
    """Start and end, in characters of `text`, of each new name's first mention, in ascending order."""

    def masked(self, offsets: Sequence[tuple[int, int]]) -> list[int]:
        """Places of the tokens, given by their (start, end) in `text`, that overlap a first mention."""
        return [
            place
            for place, (start, end) in enumerate(offsets)
            if any(first < end and start < last for first, last in self.first_mentions)
        ]


class Renamer:
    """Finds and replaces names, by what a pass over the corpus showed about its words.

    The result is a function of the corpus, `seed`, the story's identifier and the number of the copy.
    """

    def __init__(self, corpus: Iterable[str], *, seed: int = 0) -> None:
        self.seed = seed
        self.counts: Counter[str] = Counter(stories=0, copies=0, bytes=0, names=0, distinct_names=0)
        """What `copies` did: `bytes` of UTF-8 text and `names` replaced are over all copies; `without_names` and
        `nicknames` are stories without a copy."""
        self._distinct: set[str] = set()
        self._capital: Counter[str] = Counter()
        self.lower: Counter[str] = Counter()
        """The corpus's words in lower case."""
        self._votes: Counter[tuple[str, str]] = Counter()
        for text in corpus:
            middle = _MIDDLE.findall(text)
            self._capital.update(middle)
            self.lower.update(_LOWER.findall(text))
            self._votes.update(gender_votes(text, set(middle) - NOT_NAMES))

    def names_in(self, text: str) -> list[str]:
        """The names of a story in the order of their first mentions.

        A word that only begins sentences counts if it does so more than once and the corpus is sure of it.
        """
        middle, lower = set(_MIDDLE.findall(text)), set(_LOWER.findall(text))
        repeated = {word for word, count in Counter(_CAPITALISED.findall(text)).items() if count > 1}
        names = []
        for word in (middle | repeated) - NOT_NAMES:
            capital = self._capital[word]
            share = capital / max(1, capital + self.lower[word.lower()])
            plain = word in middle and word.lower() not in lower
            if share >= (CAPITAL_SHARE if plain else SURE_SHARE):
                names.append(word)
        mentions = _mentions(names).findall(text) if names else []
        return list(dict.fromkeys(mention.capitalize() for mention in mentions))

    def genders(self, text: str, names: Sequence[str]) -> list[Gender]:
        """Of each name, by the pronouns behind it in this story; without any, by those in the corpus."""
        in_story = gender_votes(text, set(names))

        def of(name: str) -> Gender:
            for votes in (in_story, self._votes):
                girl, boy = votes[name, "girl"], votes[name, "boy"]
                if girl != boy:
                    return "girl" if girl > boy else "boy"
            return "unknown"

        return [of(name) for name in names]

    def rename(self, text: str, *, story: str, copy: int) -> Renamed:
        """Replace every name of `text`, also where it is written in capitals; all else stays as it is.

        No two names become one, and no new name stands in the story already, in upper or lower case.

        Args:
            text: the story.
            story: its identifier, which the choice of names depends on.
            copy: number of the copy, which it depends on as well.
        """
        key = hashlib.blake2b(f"{self.seed}:{story}:{copy}".encode(), digest_size=8).digest()
        rng = Random(int.from_bytes(key, "big"))
        names = self.names_in(text)
        if not names:
            return Renamed(text, {}, ())
        taken = {word.lower() for word in _WORD.findall(text)}
        chosen: dict[str, str] = {}
        for name, gender in zip(names, self.genders(text, names), strict=True):
            chosen[name] = new = self._new_name(rng, gender, taken)
            taken.add(new.lower())
        forms = chosen | {old.upper(): new.upper() for old, new in chosen.items()}
        text = _mentions(chosen).sub(lambda mention: forms[mention.group()], text)
        first = (_mentions([new]).search(text) for new in chosen.values())
        return Renamed(text, chosen, tuple(sorted(mention.span() for mention in first if mention)))

    def copies(self, text: str, *, story: str, count: int) -> Iterator[Renamed]:
        """Up to `count` renamed copies of a story, none if it has no names or nicknames; adds to `counts`."""
        names = self.names_in(text)
        reason = "without_names" if not names else "nicknames" if has_nicknames(names) else ""
        self.counts.update(["stories", *filter(None, [reason])])
        for copy in range(0 if reason else count):
            renamed = self.rename(text, story=story, copy=copy)
            self._distinct.update(renamed.names.values())
            self.counts.update(copies=1, bytes=len(renamed.text.encode()), names=len(names))
            self.counts["distinct_names"] = len(self._distinct)
            yield renamed

    def _new_name(self, rng: Random, gender: Gender, taken: set[str]) -> str:
        while True:
            kind = rng.random()
            if kind < REAL:
                name = rng.choice(POOLS[gender])
            elif kind < REAL + INVENTED:
                name = invented_name(rng)
                if name in HELD_OUT or self.lower[name.lower()]:
                    continue
            else:
                name = rng.choice(NOUNS)
            if name.lower() not in taken and name not in NOT_NAMES:
                return name


def invented_name(rng: Random) -> str:
    """A pronounceable name of one to three syllables and 3 to 10 letters."""
    while True:
        syllables = rng.choice((1, 2, 2, 2, 3, 3))
        parts = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables)]
        name = "".join(parts) + rng.choice(CODAS)
        if rng.random() < 0.15:
            name = name.lstrip("bcdfghjklmnpqrstvwxz")
        if 3 <= len(name) <= 10:
            return name.capitalize()


def gender_votes(text: str, names: set[str]) -> Counter[tuple[str, str]]:
    """For each name and gender, how often a pronoun of that gender is the first one behind the name.

    Another name, or the end of the next sentence, ends the search.
    """
    votes: Counter[tuple[str, str]] = Counter()
    current: str | None = None
    ends = 0
    for word in re.findall(r"[A-Za-z]+|[.!?\n]", text):
        if word in names:
            current, ends = word, 0
        elif current is None:
            continue
        elif word in ".!?\n":
            ends += 1
            if ends == 2:
                current = None
        elif gender := _PRONOUNS.get(word.lower()):
            votes[current, gender] += 1
            current = None
    return votes


def has_nicknames(names: Iterable[str]) -> bool:
    """Whether one name begins another and both probably mean one person: Tim and Timmy, Sam and Sammy."""
    # Sorted, a name stands directly before those that it begins.
    return any(len(one) >= 3 and two.startswith(one) for one, two in pairwise(sorted(names)))


def _mentions(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern of each of the names as a word of its own, also in capitals."""
    return re.compile(rf"\b(?:{'|'.join(form for name in names for form in (name, name.upper()))})\b")
