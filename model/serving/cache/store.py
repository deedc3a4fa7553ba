"""Cached responses: their key, their stored form, an LRU cache in memory and the Redis that replicas share."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Literal, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import ConfigDict, TypeAdapter, ValidationError

from model.generation import Chunk, Completion, FinishReason, GenerationRequest, SamplingParams, TokenLogprob
from model.serving.redis import RedisLink, RedisUnavailableError

CacheOutcome = Literal["hit", "joined", "miss", "bypassed"]
"""Served from the cache; coalesced with a running request; generated; not cacheable."""
OUTCOMES: tuple[CacheOutcome, ...] = get_args(CacheOutcome)

FORMAT = 2
"""Changes with the stored form, so that a process never reads another form."""
PREFIX = "story:cache:"
OVERHEAD = 300
"""Bytes that an entry takes beside its data: key, times and the table's own, measured with `tracemalloc`."""
MAX_FRACTION = 8
"""An entry larger than the limit divided by this is not kept: it would evict all others."""


def cache_key(fingerprint: str, request: GenerationRequest) -> str:
    """Return the key of the response to `request` by a backend with this fingerprint."""
    sampling = {field.name: getattr(request.sampling, field.name) for field in fields(SamplingParams)}
    for field in fields(SamplingParams):
        if field.type == "float":
            sampling[field.name] = float(sampling[field.name])  # 1 and 1.0 are equal, and are written differently
    if request.sampling.temperature == 0:
        del sampling["seed"]  # nothing is drawn, so any seed gives the same response
    parts = [FORMAT, fingerprint, request.prompt, request.max_tokens, sampling, request.stop, request.logprobs]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()


@dataclass(frozen=True, slots=True)
class CachedResponse:
    """A complete response."""

    chunks: tuple[Chunk, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, chunks: list[Chunk], completion: Completion) -> CachedResponse:
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
    def from_bytes(cls, data: bytes) -> CachedResponse | None:
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
