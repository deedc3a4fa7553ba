"""The names of a story and the tokens that misspell them, from its whole text: slow and plain."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

OPENERS = {b"i", b"in", b"we", b"be", b"and"}
"""Some of the words that open English sentences."""


def names_of(text: bytes, words: set[bytes]) -> list[bytes]:
    """The names that `text` has finished: capitalised words that are none of `words`, which are tokens."""
    found: list[bytes] = []
    for match in re.finditer(rb"[A-Za-z\x80-\xff]+(?=[^A-Za-z\x80-\xff])", text):
        word, before = match[0], text[: match.start()]
        if before and not before[-1:].isspace():
            continue
        separator = re.search(rb"[^A-Za-z\x80-\xff]*\Z", before)
        assert separator is not None
        opens = re.search(rb"[.!?\n]", separator[0]) is not None
        known = word in words or (opens and word.lower() in words)
        if word.decode("utf-8", "replace")[0].isupper() and not known and word not in found:
            found.append(word)
    return found[:64]


def misspelling(token_bytes: Sequence[bytes], tokens: Sequence[int]) -> np.ndarray:
    """Of each token (V,), whether it may not follow `tokens`."""
    text = b"".join(token_bytes[token] for token in tokens)
    words = {data.strip() for data in token_bytes}
    match = re.search(rb"[A-Za-z\x80-\xff]*\Z", text)
    assert match is not None
    word = match[0]
    names = [name for name in names_of(text, words) if word and name.startswith(word)]
    wrong = np.zeros(len(token_bytes), bool)
    if not names:
        return wrong
    for token, data in enumerate(token_bytes):
        letters = re.match(rb"[A-Za-z\x80-\xff]*", data)
        assert letters is not None
        longer, goes_on = word + letters[0], bool(data) and letters[0] == data
        if word.lower() in OPENERS and not letters[0]:
            continue
        wrong[token] = not any(name.startswith(longer) if goes_on else name == longer for name in names)
    return np.zeros(len(token_bytes), bool) if wrong.all() else wrong
