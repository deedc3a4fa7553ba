"""A backend whose stories move only when a test says so.

Faked, because the order of events is what these tests are about: who asks, who leaves and what comes in between. The
real engine stands behind the same memory in `test_backend.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from model.generation import Chunk, Completion, FinishReason, GenerationRequest, Usage
from model.serving.backend import Health, ModelInfo, Stream

LENGTH = 5
"""Words of a story, each one token."""


def words(fingerprint: str, request: GenerationRequest) -> list[str]:
    """The story: it tells who wrote it, and for what."""
    return [f"{fingerprint}:{request.prompt}:{request.sampling.seed}:{number} " for number in range(LENGTH)]


class Tape:
    """A stream that plays as far as `allowed`."""

    served_by = "tape"

    def __init__(self, fingerprint: str, request: GenerationRequest) -> None:
        self.fingerprint = fingerprint
        self.words = words(fingerprint, request)
        self.allowed = 0
        self.cancelled = False
        self.ending: FinishReason = "stop"
        self.failure: Exception | None = None
        self.news = asyncio.Event()
        self._completion: Completion | None = None

    @property
    def over(self) -> bool:
        return self._completion is not None

    @property
    def completion(self) -> Completion:
        assert self._completion is not None
        return self._completion

    def cancel(self) -> None:
        self.cancelled = True
        self.news.set()

    def play(self, count: int) -> None:
        self.allowed += count
        self.news.set()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        told: list[str] = []
        finish = self.ending
        for number, word in enumerate(self.words):
            while number >= self.allowed and not self.cancelled and self.failure is None:
                self.news.clear()
                await self.news.wait()
            if self.failure is not None:
                raise self.failure
            if self.cancelled:
                finish = "cancelled"
                break
            told.append(word)
            yield Chunk(word, (number,))
            finish = self.ending
        usage = Usage(prompt_tokens=7, completion_tokens=len(told), queued=0.0, ttft=0.1, duration=0.2)
        self._completion = Completion("".join(told), finish, usage)


class Tapes:
    """The backend. `fingerprint` can change at any time, as when blue is switched to green."""

    name = "tapes"
    capacity = 8
    model = ModelInfo("tapes", "0" * 64)

    def __init__(self) -> None:
        self.now = "blue"
        self.streams: list[Tape] = []
        self.refuse: Exception | None = None
        self.gate = asyncio.Event()  # cleared: a story that begins waits until it is set
        self.gate.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    def health(self) -> Health:
        return Health(True, self.name, "plays", None)

    async def fingerprint(self) -> str | None:
        return self.now

    def fingerprint_of(self, stream: Stream) -> str | None:
        assert isinstance(stream, Tape)
        return stream.fingerprint

    async def submit(self, request: GenerationRequest) -> Tape:
        await self.gate.wait()
        if self.refuse is not None:
            raise self.refuse
        tape = Tape(self.now, request)
        self.streams.append(tape)
        return tape
