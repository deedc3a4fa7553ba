"""Which tokens spell a name as the story spelled it before.

A small model begins a rare name right and goes astray within it: Ember becomes Emild, Zephyr Zep. A `NameSpeller` reads
the tokens of one story and keeps the names in it: capitalised words that are no token of their own. Within a word that
begins like one of them, it allows only tokens that spell a name that has come, to its end. Names of one token,
lower-case words and stories without names are never touched: on held-out stories, whose every token was compared, it
forbids 3 of 100,000 (`experiments/LOG.md`). Constrained decoding (Hokamp and Liu 2017, section 3) with constraints that
the story itself sets.

It depends on the story's tokens alone, so a story that is continued from its first tokens goes on as before.

Words are runs of ASCII letters and of bytes above 127: letters of other alphabets are letters.

Shapes: V vocabulary.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FORBIDDEN = np.float32(-1e4)
"""Added to a logit. Finite: where the network itself rules out all that spells the name, the rest may come."""
MAX_NAMES = 64
"""Of a story; later ones are not kept."""
_TOKEN = re.compile(rb"([A-Za-z\x80-\xff]*)((?:.*[^A-Za-z\x80-\xff])?)([A-Za-z\x80-\xff]*)", re.DOTALL)
_OPENERS = frozenset(
    b"a all an and are as at be but by can did do for from go had has have he her here his how i if in is it just let "
    b"may me my no not now of off oh on one or our out she so some than that the their then there they this to two up "
    b"us was we well were what when where who why will with yes you your".split()
)
"""Words that open English sentences: though the story has an Ingrid, "In the morning" may come."""


class _Parts(NamedTuple):
    """A token as parts of words. A word that stands between two others within one token is not seen."""

    head: bytes
    """The letters before its first other byte."""
    breaks: bool
    """Whether it has another byte."""
    tail: bytes
    """The letters after the last of those."""
    ends_sentence: bool
    spaced: bool
    """Whether the last byte before the tail is white space."""


class WordTable:
    """The tokens of a vocabulary as parts of words."""

    def __init__(self, token_bytes: Sequence[bytes], vocab_size: int) -> None:
        """`token_bytes`: of each token; ids from there up to `vocab_size` are never allowed within a name."""
        self.vocab_size = vocab_size
        self.parts: list[_Parts] = []
        self._inside = defaultdict[bytes, list[int]](list)
        self._ending = defaultdict[bytes, list[int]](list)
        for token, data in enumerate(token_bytes):
            match = _TOKEN.fullmatch(data)
            assert match is not None, "every part of the pattern may be empty"
            head, between, tail = match.groups()
            ends_sentence = any(mark in between for mark in (b".", b"!", b"?", b"\n"))
            self.parts.append(_Parts(head, bool(between), tail, ends_sentence, between[-1:].isspace()))
            # The end of story has no bytes, and ends a word.
            (self._ending if between or not head else self._inside)[head].append(token)
        self.words = frozenset(data.strip() for data in token_bytes)
        """Words that are one token."""
        self.forbidden = lru_cache(256)(self._forbidden)  # a name's rests come again with each mention

    def _forbidden(self, rests: tuple[bytes, ...]) -> npt.NDArray[np.float32] | None:
        """Return 0 for tokens that go on with or end one of `rests`, else `FORBIDDEN`: (V,), added to logits.

        `rests`: the letters that a word lacks of names. None: no token is right, so all may come.
        """
        allowed: list[int] = []
        for rest in rests:
            allowed += self._ending.get(rest, ())
            for end in range(1, len(rest) + 1):
                allowed += self._inside.get(rest[:end], ())
        if not allowed:
            return None
        forbidden_V = np.full(self.vocab_size, FORBIDDEN, np.float32)
        forbidden_V[allowed] = 0
        return forbidden_V


class NameSpeller:
    """The names of one story, and the word that its last token ends within."""

    __slots__ = ("_keeps", "_opens", "_table", "_word", "names")

    def __init__(self, table: WordTable, story: Sequence[int] = ()) -> None:
        """Begin with a story of these tokens."""
        self._table = table
        self._word = b""
        self._keeps = True  # whether the word is kept if it is a name: one that opens a quotation may be "Wow"
        self._opens = False  # whether the word opens a sentence, where every word is capitalised
        self.names: list[bytes] = []
        for token in story:
            self.push(token)

    def push(self, token: int) -> None:
        """Read the story's next token."""
        head, breaks, tail, ends_sentence, spaced = self._table.parts[token]
        if not breaks:
            self._word += head
            return
        word = self._word + head
        if word and self._keeps and not 97 <= word[0] <= 122:  # a to z
            self._keep(word)
        self._opens = ends_sentence or (self._opens and not word)
        self._word, self._keeps = tail, spaced

    def _keep(self, word: bytes) -> None:
        if len(self.names) == MAX_NAMES or word in self.names:
            return
        if word in self._table.words or (self._opens and word.lower() in self._table.words):
            return
        if word.decode("utf-8", "replace")[0].isupper():
            self.names.append(word)

    def forbidden(self) -> npt.NDArray[np.float32] | None:
        """Return what to add to the logits (V,) of the next token, 0 or `FORBIDDEN`. None: any token may come."""
        word = self._word
        if not word or not self.names or 97 <= word[0] <= 122:
            return None
        rests = [name[len(word) :] for name in self.names if name.startswith(word)]
        if rests and word.lower() in _OPENERS:
            rests.append(b"")
        return self._table.forbidden(tuple(rests)) if rests else None
