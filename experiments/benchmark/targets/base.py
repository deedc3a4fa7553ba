"""What the benchmark knows of whoever it asks: one coroutine a request, and one way to fail."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from experiments.benchmark.sample import FailureKind
from model.generation import GenerationRequest


class Listener(Protocol):
    """Notes the time of what happens to one story. Each method is to be called at once."""

    def arrived(self, tokens: int) -> None:
        """A message brought so many tokens; 0: the target does not say how many."""
        ...

    def whole(self) -> None:
        """The target said that the story has ended; what is still to be tidied up takes none of its time."""
        ...


class Failed(Exception):
    """The request was not answered with a whole story."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(" ".join(message.split())[:300])
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Ending:
    """How a story ended."""

    finish: str
    """`stop` or `length`."""
    tokens: int
    """By the server's usage, else by token ids."""


class Target(Protocol):
    """Somebody who writes stories. It works between entering and leaving `running`."""

    @property
    def name(self) -> str:
        """As people would call it; no secret, no folder above the model's own."""
        ...

    @property
    def digest(self) -> str | None:
        """Digest of the model folder that writes; None: the target does not say. Known while `running`."""
        ...

    @property
    def cold_start_means(self) -> str:
        """What `write_cold` measures here, in words."""
        ...

    @property
    def cold_starts(self) -> int:
        """How many of them can be made: what was woken once may stay awake."""
        ...

    def running(self) -> AbstractAsyncContextManager[None]:
        """Start on entry, let go on exit. Raises `StoryError` if the target cannot be used at all."""
        ...

    async def write(self, request: GenerationRequest, listener: Listener) -> Ending:
        """Write one story. Raises `Failed`."""
        ...

    async def write_cold(self, request: GenerationRequest, listener: Listener) -> Ending:
        """Write one story from as cold as this target can be made. Raises `Failed`."""
        ...

    def processes(self) -> list[int]:
        """Ids of the processes of this machine that serve; empty: none, or not to be found."""
        ...
