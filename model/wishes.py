"""What a story is wished to have, and the rules that check a story.

The engine draws stories until one meets its wishes (best of n by rejection, as in Stiennon et al. 2020, arXiv
2009.01325, with these rules for the reward), `DRAWS` at most: no model needs to be trained for that.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from model.errors import InputError

Length = Literal["short", "medium", "long"]
Ending = Literal["happy", "sad"]

MAX_WORDS = 8
MAX_WORD_CHARS = 40
SHORT, LONG = 130, 180
"""A short story has at most `SHORT` words, a long one more than `LONG`. A quarter of TinyStories is short, a fifth
long."""
DRAWS = 32
"""Stories that are generated for one with wishes, at most; the one that meets most of them is taken."""
DRAWN_TOKENS = 8_000
"""Tokens after which no other is begun: as many as 32 usual stories have."""

_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?\"])\s+")
_TAIL = re.compile(r"[a-z']+|[.!?,]")
_ENDING_SENTENCES = 2
_NEGATION_REACH = 3
_NEGATED = """
not never no longer without nothing nobody stop stopped stopping wasn't weren't didn't couldn't isn't don't won't can't
"""
_HAPPY = """
happy happily smile smiled smiles smiling laugh laughed laughing fun friend friends love loved loves hug hugged hugs
proud glad safe joy joyful enjoy enjoyed play played playing best great wonderful thank thanked relieved excited
celebrate celebrated cheered grateful thankful delighted kind better fixed amazing beautiful special peace
"""
_SAD = """
sad sadly cry cried crying cries tears alone lonely die died dead lifeless sorry hurt hurts pain scared afraid ruined
broke broken angry mad punished wished regret regretted late gone miss missed upset unhappy disappointed empty stuck
trapped sick sobbed wept destroyed ashamed forgotten fear frightened lost bad worse hungry guilty trouble
"""
_NEGATIONS = frozenset(_NEGATED.split())
_BALANCE = dict.fromkeys(_HAPPY.split(), 1) | dict.fromkeys(_SAD.split(), -1)


def length_of(text: str) -> Length:
    """By the number of words."""
    count = len(_WORD.findall(text))
    return "short" if count <= SHORT else "long" if count > LONG else "medium"


def ending_of(text: str) -> Ending | None:
    """By the words of its last two sentences, "The end." not counted; None where neither mood prevails.

    A word behind a negation counts for the other mood.
    """
    sentences = [part for part in _SENTENCE_END.split(text.strip()) if part.lower() != "the end."]
    tail = _TAIL.findall(" ".join(sentences[-_ENDING_SENTENCES:]).lower())
    balance = 0
    for place, word in enumerate(tail):
        negated = not _NEGATIONS.isdisjoint(tail[max(0, place - _NEGATION_REACH) : place])
        balance += -_BALANCE.get(word, 0) if negated else _BALANCE.get(word, 0)
    return "happy" if balance > 0 else "sad" if balance < 0 else None


def has_dialogue(text: str) -> bool:
    """Whether somebody speaks, in quotation marks."""
    return any(mark in text for mark in '"\u201c\u201e')


def has_word(text: str, word: str) -> bool:
    """Whether `word` stands in the text, in any case, also in the plural or the possessive."""
    return re.search(rf"\b{re.escape(word)}(?:'?s)?\b", text, re.IGNORECASE) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """All are optional. Raises `InputError` that names the bad one."""

    words: tuple[str, ...] = ()
    """Words or names that the story is to have."""
    length: Length | None = None
    dialogue: bool | None = None
    """Whether somebody is to speak."""
    ending: Ending | None = None

    def __post_init__(self) -> None:
        if len(self.words) > MAX_WORDS:
            raise InputError("wishes.words", f"must be at most {MAX_WORDS} words, got {len(self.words)}")
        for word in self.words:
            if not isinstance(word, str) or len(word) > MAX_WORD_CHARS or not _WORD.fullmatch(word):
                raise InputError(
                    "wishes.words", f"must be single words of at most {MAX_WORD_CHARS} letters each, got {word!r}"
                )
        for name, allowed in (("length", get_args(Length)), ("ending", get_args(Ending))):
            if getattr(self, name) not in (None, *allowed):
                raise InputError(f"wishes.{name}", f"must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not isinstance(self.dialogue, bool | None):
            raise InputError("wishes.dialogue", f"must be true or false, got {self.dialogue!r}")

    def __bool__(self) -> bool:
        """Whether anything is wished."""
        return self != Wishes()

    def unmet(self, story: str) -> int:
        """How many wishes the whole story does not meet; each word is one."""
        others = [met for name, met in self.met(story).items() if name != "words"]
        return others.count(False) + sum(not has_word(story, word) for word in self.words)

    def is_lost(self, begun: str) -> bool:
        """Whether no story that begins so meets all wishes: it is too long already, or somebody has spoken."""
        too_long = self.length not in (None, "long") and length_of(begun) not in ("short", self.length)
        return too_long or (self.dialogue is False and has_dialogue(begun))

    def met(self, story: str) -> dict[str, bool]:
        """Of each wish, whether the whole story meets it: `words` (all of them), `length`, `dialogue`, `ending`."""
        checks = {
            "words": all(has_word(story, word) for word in self.words) if self.words else None,
            "length": None if self.length is None else length_of(story) == self.length,
            "dialogue": None if self.dialogue is None else has_dialogue(story) == self.dialogue,
            "ending": None if self.ending is None else ending_of(story) == self.ending,
        }
        return {name: met for name, met in checks.items() if met is not None}
