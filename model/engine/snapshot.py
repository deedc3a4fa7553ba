"""A story saved at a token, and the states from which it can be gone on with.

The network's state has a constant size, so a story can be forked at any token for the price of one copy.
Where the state of just that token was not kept, an earlier one serves: the tokens between are fed again, one
by one, by the same decode step that fed them first, and so give the same bits. A fork with the same settings
therefore goes on exactly as the story itself would have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.runtimes.protocol import Logits


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A story as it stood after one of its tokens. Immutable; it can be continued any number of times.

    `prompt + text` is the whole story so far.
    """

    prompt: str
    """What stood before the stream that was saved began to write."""
    text: str
    """What that stream had written, whole characters."""
    held: str
    """The end of `text` that was held back from the reader, as the beginning of a stop string. A continuation
    begins with it, unless it adds a prompt of its own."""
    tail: bytes
    """The first bytes of a character that the last token left unfinished."""
    tokens: tuple[int, ...]
    """All tokens of the story, of its prompt too, without the leading end-of-story token."""
    state: Any
    """The runtime's state after the first `state.position` tokens, the leading one counted."""
    logits: Logits | None
    """The logits (V,) that follow the last token, where the state has already taken it in; else None."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the state takes."""
        return int(self.state.nbytes)


class KeptStates:
    """The states of one stream at many of its tokens, within `limit` bytes.

    All are kept as long as they fit. When they do not, every other one is dropped and from then on only every
    second is taken, then every fourth …: so at most `stride` - 1 tokens must be fed again to fork anywhere,
    and `stride` is less than twice the bytes of all states by `limit`.
    """

    def __init__(self, first: int, limit: int) -> None:
        """`first` is the position from which the stride is counted."""
        self._first = first
        self._limit = limit
        self._states: dict[int, Any] = {}
        self.stride = 1
        self.nbytes = 0

    def wants(self, position: int) -> bool:
        """Whether the state at `position` should be kept: asked first, since reading it costs a copy."""
        return (position - self._first) % self.stride == 0

    def add(self, state: Any) -> None:
        """Keep a state, and thin the others out until all fit."""
        self._states[state.position] = state
        self.nbytes += state.nbytes
        while self.nbytes > self._limit and self._states:
            self.stride *= 2
            self._states = {at: kept for at, kept in self._states.items() if self.wants(at)}
            self.nbytes = sum(kept.nbytes for kept in self._states.values())

    def latest(self, position: int) -> Any | None:
        """The kept state that is the latest at or before `position`, if there is one."""
        before = [at for at in self._states if at <= position]
        return self._states[max(before)] if before else None
