"""Stop strings, found in a stream of text as it comes.

A stop string may lie across the borders of chunks, and none of it may be sent. So the matcher holds back the end of the
text as long as it may still become a stop string, and not one character more.
"""

from __future__ import annotations

from collections.abc import Sequence


def _borders(word: str) -> list[int]:
    """For each prefix of `word`, the length of its longest proper suffix that is also a prefix of `word`.

    The failure function of Knuth, Morris and Pratt (1977): how far a match falls back on a wrong letter.
    """
    lengths = [0] * (len(word) + 1)
    matched = 0
    for end in range(1, len(word)):
        while matched and word[end] != word[matched]:
            matched = lengths[matched]
        if word[end] == word[matched]:
            matched += 1
        lengths[end + 1] = matched
    return lengths


class StopMatcher:
    """Lets text through up to the first of several stop strings.

    The first is the one that is complete first, and of those complete at once the longest: a definition that
    does not depend on how the text was cut. What was released, joined, is the text before that stop string.
    """

    __slots__ = ("_borders", "_first", "_matched", "_words", "held", "stopped")

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(words)
        self._borders = [_borders(word) for word in self._words]
        self._matched = [0] * len(self._words)
        self._first = {word[0] for word in self._words}
        self.held = ""
        """Text that came and was not released: it may be the beginning of a stop string."""
        self.stopped = False
        """Whether a stop string was met; no text is released after it."""

    def push(self, text: str) -> str:
        """Take in `text` and return what may be shown now."""
        if self.stopped:
            return ""
        if not self.held and self._first.isdisjoint(text):
            return text
        whole = self.held + text
        for index in range(len(self.held), len(whole)):
            length = self._advance(whole[index])
            if length:
                self.stopped = True
                self.held = ""
                return whole[: index + 1 - length]
        keep = len(whole) - max(self._matched)
        self.held = whole[keep:]
        return whole[:keep]

    def flush(self) -> str:
        """The text held back, which no stop string will claim any more: the stream has ended."""
        text, self.held = self.held, ""
        self._matched = [0] * len(self._words)
        return text

    def _advance(self, letter: str) -> int:
        """Move every match on by one letter; the length of the longest stop string complete now, else 0."""
        complete = 0
        for which, word in enumerate(self._words):
            borders = self._borders[which]
            matched = self._matched[which]
            while matched and word[matched] != letter:
                matched = borders[matched]
            if word[matched] == letter:
                matched += 1
            if matched == len(word):
                complete = max(complete, matched)
                matched = borders[matched]
            self._matched[which] = matched
        return complete
