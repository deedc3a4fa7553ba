"""Words, and how often a text says the same again.

Words are runs of letters, digits and apostrophes, in lower case: "Tim's" is one, and a full stop is none. The figures
are crude on purpose, so that each can be checked by reading the stories.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

WORD = re.compile(r"[\w']+")


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())


def distinct(sequence: Sequence[str], size: int) -> float | None:
    """Different runs of `size` words over all of them, above 0 and at most 1; None where there is no such run."""
    runs = list(zip(*(sequence[start:] for start in range(size)), strict=False))
    return len(set(runs)) / len(runs) if runs else None


def repeated(sequence: Sequence[str], size: int) -> float | None:
    """Share of the runs of `size` words that stood in the sequence before; None where there is no such run."""
    share = distinct(sequence, size)
    return None if share is None else 1 - share
