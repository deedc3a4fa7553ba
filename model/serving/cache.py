"""Serve repeated seeded requests from a cache, and coalesce identical concurrent ones.

Only deterministic responses are cached: same prompt and parameters, same seed (or greedy), same fingerprint of the
backend. While the backend does not know its fingerprint (`FingerprintedBackend`), every request is forwarded. A
response that failed or was cancelled is not kept. Responses lie in memory and in the Redis that replicas share.

Concurrent requests with one key share a `SingleFlight`: one task reads the backend's stream, so it does not depend on
the client that asked first. It goes on while anyone is subscribed and is cancelled when the last one leaves. Each
subscriber gets the stream from its beginning, at its own pace.
"""

import asyncio
import contextlib
import hashlib
import json
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Literal, Self, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import ConfigDict, TypeAdapter, ValidationError

from model.errors import StoryError
from model.generation import (
    Chunk,
    Completion,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenLogprob,
    merge_chunks,
)
from model.serving.backend import CACHE, BackendWrapper, FingerprintedBackend, RecordedStream, Stream
from model.serving.redis import RedisLink, RedisUnavailableError

CacheOutcome = Literal["hit", "joined", "miss", "bypassed"]
"""Served from the cache; coalesced with a running request; generated; not cacheable."""
OUTCOMES: tuple[CacheOutcome, ...] = get_args(CacheOutcome)

FORMAT = 3
"""Changes with the stored form and with what the engine makes of a request, so that a process never reads another."""
PREFIX = "story:cache:"
OVERHEAD = 300
"""Bytes that an entry takes beside its data: key, times and the table's own, measured with `tracemalloc`."""
MAX_FRACTION = 8
"""An entry larger than the limit divided by this is not kept: it would evict all others."""


def cache_key(fingerprint: str, request: GenerationRequest) -> str:
    """Return the key of the response to `request` by a backend with this fingerprint."""
    sampling = {field.name: getattr(request.sampling, field.name) for field in fields(SamplingParams)}
    for field in fields(SamplingParams):
        if field.type is float:
            sampling[field.name] = float(sampling[field.name])  # 1 and 1.0 are equal, and are written differently
    if request.sampling.temperature == 0:
        del sampling["seed"]  # nothing is drawn, so any seed gives the same response
    parts = [FORMAT, fingerprint, request.prompt, request.max_tokens, sampling, request.stop, request.logprobs]
    parts.append(repr(request.wishes))
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()


@dataclass(frozen=True, slots=True)
class CachedResponse:
    """A complete response."""

    chunks: tuple[Chunk, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, chunks: list[Chunk], completion: Completion) -> Self:
        """Make the entry for a finished stream."""
        usage = completion.usage
        return cls(tuple(chunks), completion.finish_reason, usage.prompt_tokens, usage.completion_tokens)

    def as_bytes(self) -> bytes:
        """Encode as JSON, without names. Numbers come back as the same bits."""
        chunks = [
            (chunk.text, chunk.tokens, [(one.token, one.text, one.logprob, one.alternatives) for one in chunk.logprobs])
            for chunk in self.chunks
        ]
        parts = [self.finish_reason, self.prompt_tokens, self.completion_tokens, chunks]
        return json.dumps(parts, ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self | None:
        """Decode; None for anything but an encoded response, since Redis may hold anything."""
        try:
            finish, prompt_tokens, completion_tokens, stored = _STORED.validate_json(data)
        except ValidationError:
            return None
        chunks = [Chunk(text, ids, tuple(TokenLogprob(*one) for one in logprobs)) for text, ids, logprobs in stored]
        return cls(tuple(chunks), finish, prompt_tokens, completion_tokens)


_StoredLogprob = tuple[int, str, float, tuple[tuple[int, str, float], ...]]
_StoredChunk = tuple[str, tuple[int, ...], tuple[_StoredLogprob, ...]]
_STORED = TypeAdapter(
    tuple[Literal["stop", "length"], int, int, tuple[_StoredChunk, ...]], config=ConfigDict(strict=True)
)


class LRUCache:
    """At most `limit` bytes of entries, each for `ttl` seconds; the least recently used is evicted first."""

    def __init__(self, limit: int, ttl: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._ttl = ttl
        self._clock = clock
        self._entries: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self.bytes = 0
        """Memory of all entries."""
        self.evictions = 0
        """Entries removed before they expired."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> bytes | None:
        """Return the entry under `key`, if there is one that has not expired."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        expires, data = entry
        if expires <= self._clock():
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep an entry, unless it is too large."""
        size = len(data) + OVERHEAD
        if size > self._limit // MAX_FRACTION:
            return
        if key in self._entries:
            self._drop(key)
        while self.bytes + size > self._limit:
            self._drop(next(iter(self._entries)))
            self.evictions += 1
        self._entries[key] = (self._clock() + self._ttl, data)
        self.bytes += size

    def _drop(self, key: str) -> None:
        _, data = self._entries.pop(key)
        self.bytes -= len(data) + OVERHEAD


class ResponseCache(Collector):
    """Responses in memory, and in Redis where there is one and it answers."""

    def __init__(self, memory: LRUCache, ttl: int, redis: RedisLink | None = None) -> None:
        self.memory = memory
        self._ttl = ttl
        self._redis = redis
        self.requests: Counter[CacheOutcome] = Counter()

    async def get(self, key: str) -> CachedResponse | None:
        """Return the response under `key`."""
        if (data := self.memory.get(key)) is not None:
            return CachedResponse.from_bytes(data)
        if (redis := self._redis) is None:
            return None
        try:
            found = await redis.call(lambda: redis.client.get(PREFIX + key))
        except RedisUnavailableError:
            return None
        if not isinstance(found, bytes) or (response := CachedResponse.from_bytes(found)) is None:
            return None
        self.memory.put(key, found)
        return response

    def put(self, key: str, response: CachedResponse) -> None:
        """Keep a response; the write to Redis happens in the background."""
        data = response.as_bytes()
        self.memory.put(key, data)
        if (redis := self._redis) is not None:
            redis.fire_and_forget(lambda: redis.client.set(PREFIX + key, data, ex=self._ttl))

    def collect(self) -> Iterable[Metric]:
        """Yield the cache's metrics."""
        requests = CounterMetricFamily(
            "story_cache_requests",
            "Requests by cache outcome: hit, joined (coalesced with a running request), miss, "
            "bypassed (not cacheable, as without a seed).",
            labels=["outcome"],
        )
        for outcome in OUTCOMES:
            requests.add_metric([outcome], self.requests[outcome])
        yield requests
        yield GaugeMetricFamily("story_cache_bytes", "Memory used by cached responses.", self.memory.bytes)
        yield GaugeMetricFamily("story_cache_stories", "Cached responses in memory.", len(self.memory))
        yield CounterMetricFamily(
            "story_cache_evictions", "Cached responses evicted before they expired.", self.memory.evictions
        )


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
        self.changed = asyncio.Event()
        """Set when something has happened; there is a new one then."""

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
        self.changed.set()
        self.changed = asyncio.Event()

    async def opened(self) -> None:
        """Wait until the stream is open. Raises what opening it raised."""
        while self.stream is None and not self.over:
            await self.changed.wait()
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
            if self.cancelled and not flight.abandoned:  # the last one to leave sees how the stream ends
                self.end("cancelled")
            elif self._at < len(chunks := flight.chunks):
                # Several wait for a client that reads slowly.
                chunk = chunks[self._at] if self._at + 1 == len(chunks) else merge_chunks(chunks[self._at :])
                self._at = len(chunks)
                self.add(chunk)
                return chunk
            elif flight.over:
                if (whole := flight.completion) is None:
                    self.end("cancelled" if self.cancelled else "error")
                else:
                    self.ended = whole if self._first else replace(whole, usage=self.usage(whole.usage.prompt_tokens))
                if flight.failure is not None and not self.cancelled:
                    raise flight.failure
            else:
                await flight.changed.wait()
        raise StopAsyncIteration


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
            flight.stream = stream = await self.backend.submit(request)
            if flight.abandoned:
                stream.cancel()
            flight.wake()
            async for chunk in stream:
                flight.chunks.append(chunk)
                flight.wake()
            flight.completion = stream.completion
        except Exception as error:
            flight.failure = error
        else:
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
