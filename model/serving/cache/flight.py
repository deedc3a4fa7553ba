"""A story that several readers follow while it is written.

One task reads the backend's stream, so the story does not depend on the reader who asked first: it goes on while
anyone listens, and is cancelled as the last one leaves. Each reader is given it from its beginning, at its own pace.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import Self

from model.errors import StoryError
from model.generation import Chunk, Completion, FinishReason, Usage, merge_chunks
from model.serving.backend import Stream

CACHE = "cache"
"""The `served_by` of a cache hit."""


class SingleFlight:
    """The story. `begin` opens its stream; `ended` is called once, when it is over and before any reader sees so."""

    def __init__(self, begin: Callable[[], Awaitable[Stream]], ended: Callable[[SingleFlight], None]) -> None:
        self._begin = begin
        self._ended = ended
        self.stream: Stream | None = None
        self.chunks: list[Chunk] = []
        self.completion: Completion | None = None
        """How it ended, where it did."""
        self.failure: Exception | None = None
        """What its stream raised."""
        self.over = False
        self.abandoned = False
        """Whether all readers have left; it takes no new ones then."""
        self.loop = asyncio.get_running_loop()
        self._joined = 0
        self._readers: set[int] = set()  # their numbers: one that is let go of must be able to leave
        self._waiting: list[asyncio.Future[None]] = []
        self.task = asyncio.create_task(self._fly())

    def join(self) -> Subscriber:
        """One more reader."""
        number = self._joined
        self._joined += 1
        self._readers.add(number)
        return Subscriber(self, number)

    def leave(self, reader: int) -> None:
        """The reader of this number listens no more; with the last one the story ends. Harmless twice."""
        self._readers.discard(reader)
        self.wake()
        if self._readers or self.over or self.abandoned:
            return
        self.cancel()

    def cancel(self) -> None:
        """End the story at the next step, whoever listens."""
        if self.over:
            return
        self.abandoned = True
        if self.stream is None:
            self.task.cancel()
        else:
            self.stream.cancel()

    def wake(self) -> None:
        """Have all readers look for what is new."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()

    async def news(self) -> None:
        """Returns when there is something to look for."""
        future: asyncio.Future[None] = self.loop.create_future()
        self._waiting.append(future)
        await future

    async def opened(self) -> None:
        """Returns when the stream is open. Raises what opening it raised."""
        while self.stream is None and not self.over:
            await self.news()
        if self.stream is None:
            raise self.failure or StoryError("the story was stopped before it began")

    async def _fly(self) -> None:
        try:
            self.stream = stream = await self._begin()
            if self.abandoned:
                stream.cancel()
            self.wake()
            async for chunk in stream:
                self.chunks.append(chunk)
                self.wake()
            self.completion = stream.completion
        except Exception as error:
            self.failure = error
        finally:
            self.over = True
            try:
                self._ended(self)
            finally:
                self.wake()


class Subscriber:
    """A `model.serving.backend.Stream` of a flight, for one reader. Cancel it from any thread; read it in its loop."""

    def __init__(self, flight: SingleFlight, number: int) -> None:
        """Number 0 is the one who asked first."""
        self._flight = flight
        self._number = number
        self._at = 0  # of the chunks, so many were taken
        self._began = time.perf_counter()
        self._first_at = self._last_at = 0.0
        self._left = False
        self._completion: Completion | None = None

    @property
    def served_by(self) -> str:
        """Who writes, as the stream itself says."""
        stream = self._flight.stream
        assert stream is not None, "a reader is handed out once the stream is open"
        return stream.served_by

    @property
    def completion(self) -> Completion:
        """How the story ended for this reader. Raises `StoryError` while it is being read."""
        if self._completion is None:
            raise StoryError("the story is still being written: its completion comes with its end")
        return self._completion

    def cancel(self) -> None:
        """Leave. The story ends here, and everywhere if nobody else listens."""
        flight = self._flight
        if self._left or flight.over:
            return
        self._left = True
        with contextlib.suppress(RuntimeError):  # a loop that is closed has nothing left to stop
            flight.loop.call_soon_threadsafe(flight.leave, self._number)

    async def opened(self) -> None:
        """Wait until the story has begun. Raises what the backend raised; whoever gives up waiting leaves."""
        try:
            await self._flight.opened()
        except BaseException:
            self.cancel()
            raise

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        flight = self._flight
        while self._completion is None:
            if self._gone():
                self._completion = self._end()
            elif self._at < len(flight.chunks):
                return self._take()
            elif flight.over:
                self._completion = self._end()
                if flight.failure is not None and not self._left:
                    raise flight.failure
            else:
                await flight.news()
        raise StopAsyncIteration

    def _take(self) -> Chunk:
        """All that has come, as one chunk: more than one waits for a reader who is late."""
        chunks = self._flight.chunks
        chunk = chunks[self._at] if self._at + 1 == len(chunks) else merge_chunks(chunks[self._at :])
        self._at = len(chunks)
        if chunk.tokens:
            self._last_at = time.perf_counter()
            self._first_at = self._first_at or self._last_at
        return chunk

    def _gone(self) -> bool:
        """Whether this reader left while others listen. The last one sees how the story ends."""
        if not self._left:
            return False
        self._flight.leave(self._number)  # which the loop may not have come to yet
        return not self._flight.abandoned

    def _end(self) -> Completion:
        whole = self._flight.completion
        told = self._flight.chunks[: self._at]
        if whole is not None and self._flight.over and not self._gone():
            return (
                whole
                if self._number == 0
                else replace(whole, usage=self._usage(whole.usage.prompt_tokens, told))
            )
        finish: FinishReason = "cancelled" if self._left else "error"
        chunk = merge_chunks(told)
        return Completion(chunk.text, finish, self._usage(0, told), chunk.logprobs)

    def _usage(self, prompt_tokens: int, told: list[Chunk]) -> Usage:
        """What this reader was told, by its own clock."""
        return usage_of(told, prompt_tokens, self._began, self._first_at, self._last_at)

    def __del__(self) -> None:
        self.cancel()


class Replay:
    """A `model.serving.backend.Stream` of a story that was told before: all its chunks at once, one after the other."""

    served_by = CACHE

    def __init__(self, chunks: tuple[Chunk, ...], finish: FinishReason, prompt_tokens: int) -> None:
        self._chunks = chunks
        self._finish: FinishReason = finish
        self._prompt_tokens = prompt_tokens
        self._began = time.perf_counter()
        self._cancelled = False
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion:
        """As `Subscriber.completion`; its times are those of this telling."""
        if self._completion is None:
            raise StoryError("the story is still being told: its completion comes with its end")
        return self._completion

    def cancel(self) -> None:
        """Leave off."""
        self._cancelled = True

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        told: list[Chunk] = []
        first = last = 0.0
        for chunk in self._chunks:
            if self._cancelled:
                break
            told.append(chunk)
            if chunk.tokens:
                last = time.perf_counter()
                first = first or last
            yield chunk
        finish: FinishReason = self._finish if len(told) == len(self._chunks) else "cancelled"
        chunk = merge_chunks(told)
        usage = usage_of(told, self._prompt_tokens, self._began, first, last)
        self._completion = Completion(chunk.text, finish, usage, chunk.logprobs)


def usage_of(told: list[Chunk], prompt_tokens: int, began: float, first: float, last: float) -> Usage:
    """Counts of what was told, and seconds from `began` to its first and last token."""
    ended = (last or time.perf_counter()) - began
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=sum(len(chunk.tokens) for chunk in told),
        queued=0.0,
        ttft=first - began if first else ended,
        duration=ended,
    )
