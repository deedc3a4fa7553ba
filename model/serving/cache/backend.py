"""Serve repeated seeded requests from a cache and coalesce identical concurrent ones.

Only deterministic responses are cached: same prompt and parameters, same seed (or greedy), same fingerprint of the
backend. While the backend does not know its fingerprint (`FingerprintedBackend`), every request is forwarded. A
response that failed or was cancelled is not kept.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from model.generation import GenerationRequest
from model.serving.backend import Backend, FingerprintedBackend, Health, ModelInfo, Stream
from model.serving.cache.flight import Replay, SingleFlight
from model.serving.cache.stores import ResponseCache
from model.serving.cache.story import CachedResponse, key_of


class CachingBackend:
    """`backend`, and the stories that it has told. Used from one event loop."""

    def __init__(self, backend: FingerprintedBackend, stories: ResponseCache) -> None:
        self.backend = backend
        self.stories = stories
        self._flights: dict[str, SingleFlight] = {}
        self._all: set[SingleFlight] = set()  # those too that nobody can join

    @property
    def name(self) -> str:
        """That of the backend."""
        return self.backend.name

    @property
    def model(self) -> ModelInfo:
        """That of the backend."""
        return self.backend.model

    @property
    def capacity(self) -> int:
        """Streams that the backend writes and lets wait; what is told from memory needs no place."""
        return self.backend.capacity

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the backend; on exit end what is being written."""
        async with self.backend.running():
            try:
                yield
            finally:
                tasks = [flight.task for flight in self._all]
                for flight in list(self._all):
                    flight.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def health(self) -> Health:
        """That of the backend."""
        return self.backend.health()

    async def submit(self, request: GenerationRequest) -> Stream:
        """Tell the story from memory, follow it where it is being written just now, or have it written."""
        outcomes = self.stories.requests
        if not request.cacheable:
            outcomes["bypassed"] += 1
            return await self.backend.submit(request)
        fingerprint = await self.backend.fingerprint()
        key = None if fingerprint is None else key_of(fingerprint, request)
        flight = self._under_way(key)
        if flight is None and key is not None:
            told = await self.stories.get(key)
            if told is not None:
                outcomes["hit"] += 1
                return Replay(told.chunks, told.finish_reason, told.prompt_tokens)
            flight = self._under_way(key)  # another reader may have been faster meanwhile
        outcomes["miss" if flight is None else "joined"] += 1
        reader = (flight or self._begin(key, request)).join()
        await reader.opened()
        return reader

    def _under_way(self, key: str | None) -> SingleFlight | None:
        flight = None if key is None else self._flights.get(key)
        return None if flight is None or flight.abandoned else flight

    def _begin(self, key: str | None, request: GenerationRequest) -> SingleFlight:
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
        told = CachedResponse.of(flight.chunks, completion)
        # A writer that does not tell its tokens could not be told again with the same counts.
        complete = sum(len(chunk.tokens) for chunk in told.chunks) == told.completion_tokens
        fingerprint = self.backend.fingerprint_of(
            stream
        )  # which may not be the one that was expected to write
        if fingerprint is not None and complete:
            self.stories.put(key_of(fingerprint, request), told)


def cached_backend(backend: Backend, stories: ResponseCache | None) -> Backend:
    """`backend` with a memory, where there is one and the backend can say which edition of the model writes."""
    if stories is None or not isinstance(backend, FingerprintedBackend):
        return backend
    return CachingBackend(backend, stories)
