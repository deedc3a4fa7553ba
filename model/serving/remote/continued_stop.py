"""Stop strings in a story that one writer began and another goes on with."""

from __future__ import annotations

from model.engine.stop import StopMatcher


class ContinuedStop:
    """Stop strings over a story whose beginning, `shown`, the reader has already.

    A stop string may begin in what was shown: text that was let through because it belonged to none can still
    be the start of one. Such a story ends there, and shows no more of it. So this looks at the whole story,
    where a matcher of the second writer alone would see that writer's part only.
    """

    def __init__(self, stop: tuple[str, ...], shown: str) -> None:
        self._matcher = StopMatcher(stop)
        self._matcher.push(shown)
        self._ahead = len(self._matcher.held)  # characters that the reader has, and the matcher still holds

    @property
    def met(self) -> bool:
        """Whether a stop string is complete."""
        return self._matcher.stopped

    def push(self, text: str) -> str:
        """What of `text`, and of what was held back, may be shown now."""
        return self._new(self._matcher.push(text))

    def flush(self) -> str:
        """What was held back, at the end of the story."""
        return self._new(self._matcher.flush())

    def _new(self, free: str) -> str:
        known = min(self._ahead, len(free))
        self._ahead -= known
        return free[known:]
