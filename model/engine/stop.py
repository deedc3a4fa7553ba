"""Stop strings, found in a stream of text as it comes.

A stop string may lie across the borders of chunks, and none of it may be sent. So the matcher holds back the end of the
text as long as it may still become a stop string, and not one character more.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Lets text through up to the first of several stop strings.

    The first is the one that is complete first, and of those complete at once the longest: a definition that
    does not depend on how the text was cut. What was released, joined, is the text before that stop string.
    """

    __slots__ = ("_first", "_longest", "_words", "held", "stopped")

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(words)
        self._first = {word[0] for word in self._words}
        self._longest = max(map(len, self._words), default=0)
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
        found = [(start + len(word), start) for word in self._words if (start := whole.find(word)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return whole[: min(found)[1]]
        ends = range(max(0, len(whole) - self._longest + 1), len(whole))
        keep = next(
            (
                at
                for at in ends
                if whole[at] in self._first and any(word.startswith(whole[at:]) for word in self._words)
            ),
            len(whole),
        )
        self.held = whole[keep:]
        return whole[:keep]

    def flush(self) -> str:
        """The text held back, which no stop string will claim any more: the stream has ended."""
        text, self.held = self.held, ""
        return text
