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
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Self

from model.errors import StoryError
from model.generation import Chunk, Completion, GenerationRequest, merge_chunks
from model.serving.backend import CACHE, Backend, BackendWrapper, FingerprintedBackend, Stream, StreamRecorder, finished
from model.serving.cache.store import CachedResponse, ResponseCache, cache_key


class SingleFlight:
    """One running stream with any number of subscribers.

    `submit` opens it; `ended` is called once, when it is over and before any subscriber sees that.
    """

    def __init__(self, submit: Callable[[], Awaitable[Stream]], ended: Callable[[SingleFlight], None]) -> None:
        self._submit = submit
        self._ended = ended
        self.stream: Stream | None = None
        self.chunks: list[Chunk] = []
        self.completion: Completion | None = None
        """Set when the stream ended without an exception."""
        self.failure: Exception | None = None
        """What the stream raised."""
        self.over = False
        self.abandoned = False
        """All subscribers have left; it takes no new ones then."""
        self.loop = asyncio.get_running_loop()
        self._joined = 0
        self._subscribers: set[int] = set()  # numbers, not objects: one that is garbage-collected has to leave
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    def join(self) -> Subscriber:
        """Add a subscriber."""
        number = self._joined
        self._joined += 1
        self._subscribers.add(number)
        return Subscriber(self, number)

    def leave(self, number: int) -> None:
        """Remove a subscriber; the last one to leave cancels the stream. Harmless twice."""
        self._subscribers.discard(number)
        self._wake()
        if not (self._subscribers or self.over or self.abandoned):
            self.cancel()

    def cancel(self) -> None:
        """End the stream at the next step, whoever is subscribed."""
        if self.over:
            return
        self.abandoned = True
        if self.stream is None:
            self.task.cancel()
        else:
            self.stream.cancel()

    async def changed(self) -> None:
        """Wait until something has happened."""
        await self._changed.wait()

    async def opened(self) -> None:
        """Wait until the stream is open. Raises what opening it raised."""
        while self.stream is None and not self.over:
            await self.changed()
        if self.stream is None:
            raise self.failure or StoryError("the stream was cancelled before it started")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _run(self) -> None:
        try:
            self.stream = stream = await self._submit()
            if self.abandoned:
                stream.cancel()
            self._wake()
            async for chunk in stream:
                self.chunks.append(chunk)
                self._wake()
            self.completion = stream.completion
        except Exception as error:
            self.failure = error
        finally:
            self.over = True
            try:
                self._ended(self)
            finally:
                self._wake()


class Subscriber:
    """One client's `Stream` of a `SingleFlight`. Cancel it from any thread; read it in its loop."""

    def __init__(self, flight: SingleFlight, number: int) -> None:
        """`number`: 0 is the one that asked first."""
        self._flight = flight
        self._number = number
        self._at = 0  # index into the flight's chunks
        self._recorder = StreamRecorder()
        self._left = False
        self._completion: Completion | None = None

    @property
    def served_by(self) -> str:
        """As the shared stream says."""
        stream = self._flight.stream
        assert stream is not None, "a subscriber is handed out once the stream is open"
        return stream.served_by

    @property
    def completion(self) -> Completion:
        """How the stream ended for this subscriber. Raises `StoryError` while it is being read."""
        return finished(self._completion)

    def cancel(self) -> None:
        """Leave. The stream ends here, and everywhere if nobody else is subscribed."""
        flight = self._flight
        if self._left or flight.over:
            return
        self._left = True
        with contextlib.suppress(RuntimeError):  # a loop that is closed has nothing left to stop
            flight.loop.call_soon_threadsafe(flight.leave, self._number)

    async def opened(self) -> None:
        """Wait until the stream is open. Raises what the backend raised; a cancelled wait leaves."""
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
                await flight.changed()
        raise StopAsyncIteration

    def _take(self) -> Chunk:
        """Return all that has come as one chunk: several wait for a client that reads slowly."""
        chunks = self._flight.chunks
        chunk = chunks[self._at] if self._at + 1 == len(chunks) else merge_chunks(chunks[self._at :])
        self._at = len(chunks)
        self._recorder.add(chunk)
        return chunk

    def _gone(self) -> bool:
        """Whether this subscriber left while others stay. The last one sees how the stream ends."""
        if not self._left:
            return False
        self._flight.leave(self._number)  # which the loop may not have come to yet
        return not self._flight.abandoned

    def _end(self) -> Completion:
        whole = self._flight.completion
        if whole is not None and self._flight.over and not self._gone():
            if self._number == 0:
                return whole
            return replace(whole, usage=self._recorder.usage(whole.usage.prompt_tokens))
        return self._recorder.completion("cancelled" if self._left else "error", self._recorder.usage())

    def __del__(self) -> None:
        self.cancel()


class CachedStream:
    """A `Stream` of a cached response: its chunks one after the other, at once."""

    served_by = CACHE

    def __init__(self, response: CachedResponse) -> None:
        self._response = response
        self._recorder = StreamRecorder()
        self._cancelled = False
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion:
        """As `Subscriber.completion`; its times are those of this read."""
        return finished(self._completion)

    def cancel(self) -> None:
        """End before the next chunk."""
        self._cancelled = True

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        response, recorder = self._response, self._recorder
        for chunk in response.chunks:
            if self._cancelled:
                break
            recorder.add(chunk)
            yield chunk
        whole = len(recorder.chunks) == len(response.chunks)
        self._completion = recorder.completion(
            response.finish_reason if whole else "cancelled", recorder.usage(response.prompt_tokens)
        )


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
                tasks = [flight.task for flight in self._all]
                for flight in list(self._all):
                    flight.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def submit(self, request: GenerationRequest) -> Stream:
        """Serve from the cache, join the running stream of an equal request, or forward."""
        outcomes = self.cache.requests
        if not request.cacheable or request.echo or request.prompt_logprobs is not None:
            outcomes["bypassed"] += 1
            return await self.backend.submit(request)
        fingerprint = await self.backend.fingerprint()
        key = None if fingerprint is None else cache_key(fingerprint, request)
        flight = self._running(key)
        if flight is None and key is not None:
            response = await self.cache.get(key)
            if response is not None:
                outcomes["hit"] += 1
                return CachedStream(response)
            flight = self._running(key)  # an equal request may have started meanwhile
        outcomes["miss" if flight is None else "joined"] += 1
        subscriber = (flight or self._start(key, request)).join()
        await subscriber.opened()
        return subscriber

    def _running(self, key: str | None) -> SingleFlight | None:
        flight = None if key is None else self._flights.get(key)
        return None if flight is None or flight.abandoned else flight

    def _start(self, key: str | None, request: GenerationRequest) -> SingleFlight:
        def ended(flight: SingleFlight) -> None:
            if key is not None and self._flights.get(key) is flight:
                del self._flights[key]
            self._keep(request, flight)

        flight = SingleFlight(lambda: self.backend.submit(request), ended)
        if key is not None:
            self._flights[key] = flight
        self._all.add(flight)
        flight.task.add_done_callback(lambda _task: self._all.discard(flight))
        return flight

    def _keep(self, request: GenerationRequest, flight: SingleFlight) -> None:
        completion, stream = flight.completion, flight.stream
        if completion is None or stream is None or completion.finish_reason not in ("stop", "length"):
            return
        response = CachedResponse.of(flight.chunks, completion)
        # Without token ids the response could not be served again with the same counts.
        complete = sum(len(chunk.tokens) for chunk in response.chunks) == response.completion_tokens
        fingerprint = self.backend.fingerprint_of(stream)  # may differ from the one expected before it started
        if fingerprint is not None and complete:
            self.cache.put(cache_key(fingerprint, request), response)


def cached_backend(backend: Backend, cache: ResponseCache | None) -> Backend:
    """Wrap `backend` in `cache`, where there is one and the backend knows its fingerprint."""
    if cache is None or not isinstance(backend, FingerprintedBackend):
        return backend
    return CachingBackend(backend, cache)
