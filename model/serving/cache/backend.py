"""A backend that serves repeated requests from a cache and coalesces identical concurrent ones.

Only deterministic responses are cached: same prompt and parameters, same seed (or greedy), same fingerprint of the
backend. While the backend does not know its fingerprint (`FingerprintedBackend`), every request is forwarded. A
response that failed or was cancelled is not kept.

Concurrent requests with one key share a `SingleFlight`: one task reads the backend's stream, so it does not depend on
the client that asked first. It goes on while anyone is subscribed and is cancelled when the last one leaves. Each
subscriber gets the stream from its beginning, at its own pace.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from dataclasses import replace
from typing import Self

from model.errors import StoryError
from model.generation import Chunk, Completion, GenerationRequest, merge_chunks
from model.serving.backend import CACHE, BackendWrapper, FingerprintedBackend, RecordedStream, Stream
from model.serving.cache.store import CachedResponse, ResponseCache, cache_key


class SingleFlight:
    """One running stream with any number of subscribers."""

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.chunks: list[Chunk] = []
        self.completion: Completion | None = None
        """Set when the stream ended without an exception."""
        self.failure: Exception | None = None
        """What the stream raised."""
        self.over = False
        self.abandoned = False
        """All subscribers have left; it takes no new ones then."""
        self.subscribers = 0
        self.task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def read(self, opening: Awaitable[Stream]) -> None:
        """Open the stream and read it to its end."""
        try:
            self.stream = stream = await opening
            if self.abandoned:
                stream.cancel()
            self.wake()
            async for chunk in stream:
                self.chunks.append(chunk)
                self.wake()
            self.completion = stream.completion
        except Exception as error:
            self.failure = error

    def leave(self) -> None:
        """Remove a subscriber; the last one to leave cancels the stream."""
        self.subscribers -= 1
        self.wake()
        if not self.subscribers:
            self.cancel()

    def cancel(self) -> None:
        """End the stream at the next step, whoever is subscribed."""
        self.abandoned = True
        if self.stream is not None:
            self.stream.cancel()
        elif self.task is not None:
            self.task.cancel()

    def wake(self) -> None:
        """Tell all who wait that something has happened."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Wait until something has happened."""
        await self._changed.wait()

    async def opened(self) -> None:
        """Wait until the stream is open. Raises what opening it raised."""
        while self.stream is None and not self.over:
            await self.changed()
        if self.stream is None:
            raise self.failure or StoryError("the stream was cancelled before it started")


class Subscriber(RecordedStream):
    """One client's `Stream` of a `SingleFlight`, which gives it all that has come in one chunk."""

    def __init__(self, flight: SingleFlight) -> None:
        super().__init__()
        self._flight = flight
        self._first = not flight.subscribers
        flight.subscribers += 1
        self._at = 0  # index into the flight's chunks

    @property
    def served_by(self) -> str:
        """As the shared stream says."""
        stream = self._flight.stream
        assert stream is not None, "a subscriber is handed out once the stream is open"
        return stream.served_by

    def cancel(self) -> None:
        """Leave. The stream ends here, and everywhere if nobody else is subscribed."""
        if not (self.cancelled or self._flight.over):
            self.cancelled = True
            self._flight.leave()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        flight = self._flight
        while self.ended is None:
            if self._gone:
                self.end("cancelled")
            elif self._at < len(chunks := flight.chunks):
                # Several wait for a client that reads slowly.
                chunk = chunks[self._at] if self._at + 1 == len(chunks) else merge_chunks(chunks[self._at :])
                self._at = len(chunks)
                self.add(chunk)
                return chunk
            elif flight.over:
                self._end()
                if flight.failure is not None and not self.cancelled:
                    raise flight.failure
            else:
                await flight.changed()
        raise StopAsyncIteration

    @property
    def _gone(self) -> bool:
        """Whether this subscriber left while others stay. The last one sees how the stream ends."""
        return self.cancelled and not self._flight.abandoned

    def _end(self) -> None:
        whole = self._flight.completion
        if whole is None:
            self.end("cancelled" if self.cancelled else "error")
        else:
            self.ended = whole if self._first else replace(whole, usage=self.usage(whole.usage.prompt_tokens))


class CachedStream(RecordedStream):
    """A `Stream` of a cached response: its chunks one after the other, at once. Its times are those of this read."""

    served_by = CACHE

    def __init__(self, response: CachedResponse) -> None:
        super().__init__()
        self._response = response

    def cancel(self) -> None:
        """End before the next chunk."""
        self.cancelled = True

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        response = self._response
        for chunk in response.chunks:
            if self.cancelled:
                break
            self.add(chunk)
            yield chunk
        whole = len(self.chunks) == len(response.chunks)
        self.end(response.finish_reason if whole else "cancelled", self.usage(response.prompt_tokens))


class CachingBackend(BackendWrapper[FingerprintedBackend]):
    """`backend` with a response cache. Used from one event loop."""

    def __init__(self, backend: FingerprintedBackend, cache: ResponseCache) -> None:
        super().__init__(backend)
        self.cache = cache
        self._flights: dict[str, SingleFlight] = {}
        self._all: set[SingleFlight] = set()  # those too that nobody can join

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the backend; on exit cancel open streams."""
        async with self.backend.running():
            try:
                yield
            finally:
                flights = list(self._all)
                for flight in flights:
                    flight.cancel()
                await asyncio.gather(*(flight.task for flight in flights if flight.task), return_exceptions=True)

    async def submit(self, request: GenerationRequest) -> Stream:
        """Serve from the cache, join the running stream of an equal request, or forward."""
        outcomes = self.cache.requests
        if not request.cacheable or request.echo or request.prompt_logprobs is not None:
            outcomes["bypassed"] += 1
            return await self.backend.submit(request)
        fingerprint = await self.backend.fingerprint()
        key = "" if fingerprint is None else cache_key(fingerprint, request)
        flight = self._running(key)
        if flight is None and key:
            response = await self.cache.get(key)
            if response is not None:
                outcomes["hit"] += 1
                return CachedStream(response)
            flight = self._running(key)  # an equal request may have started meanwhile
        outcomes["miss" if flight is None else "joined"] += 1
        flight = flight or self._start(key, request)
        subscriber = Subscriber(flight)
        try:
            await flight.opened()
        except BaseException:
            subscriber.cancel()
            raise
        return subscriber

    def _running(self, key: str) -> SingleFlight | None:
        flight = self._flights.get(key)
        return None if flight is None or flight.abandoned else flight

    def _start(self, key: str, request: GenerationRequest) -> SingleFlight:
        """Start a stream that equal requests can join, unless `key` is empty."""
        flight = SingleFlight()
        self._all.add(flight)
        if key:
            self._flights[key] = flight
        flight.task = asyncio.create_task(self._run(flight, key, request))
        return flight

    async def _run(self, flight: SingleFlight, key: str, request: GenerationRequest) -> None:
        try:
            await flight.read(self.backend.submit(request))
            self._keep(request, flight)
        finally:
            flight.over = True
            self._all.discard(flight)
            if self._flights.get(key) is flight:
                del self._flights[key]
            flight.wake()

    def _keep(self, request: GenerationRequest, flight: SingleFlight) -> None:
        completion, stream = flight.completion, flight.stream
        if completion is None or stream is None or completion.finish_reason not in ("stop", "length"):
            return
        response = CachedResponse.of(flight.chunks, completion)
        # Without token ids the response could not be served again with the same counts.
        complete = sum(len(chunk.tokens) for chunk in response.chunks) == response.completion_tokens
        # The fingerprint may differ from the one expected before it started.
        if stream.fingerprint is not None and complete:
            self.cache.put(cache_key(stream.fingerprint, request), response)
