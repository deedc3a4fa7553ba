"""Where told stories are kept: in this process's memory, bounded, and in a Redis that replicas share."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Literal, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from model.serving.cache.story import CachedResponse
from model.serving.redis import RedisLink, RedisUnavailableError

CacheOutcome = Literal["hit", "joined", "miss", "bypassed"]
"""Served from the cache; coalesced with a running request; generated; not cacheable."""
OUTCOMES: tuple[CacheOutcome, ...] = get_args(CacheOutcome)

PREFIX = "story:told:"
OVERHEAD = 300
"""Bytes that an entry takes beside its story: key, times and the table's own, measured with `tracemalloc`."""
LARGEST_SHARE = 8
"""A story larger than this part of the memory is not kept: it would push out all others."""


class LRUCache:
    """Stories by key, `limit` bytes of them at most, each for `ttl` seconds; the least asked for goes first."""

    def __init__(self, limit: int, ttl: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._ttl = ttl
        self._clock = clock
        self._entries: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self.bytes = 0
        """What all entries take."""
        self.evictions = 0
        """Stories that had to go before their time."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> bytes | None:
        """The story under `key`, if it is there."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        until, data = entry
        if until <= self._clock():
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep a story, unless it is too large."""
        size = len(data) + OVERHEAD
        if size > self._limit // LARGEST_SHARE:
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
    """Told stories: from memory, else from Redis, where there is one and it answers."""

    def __init__(self, memory: LRUCache, ttl: int, link: RedisLink | None = None) -> None:
        self.memory = memory
        self._ttl = ttl
        self._link = link
        self.requests: Counter[CacheOutcome] = Counter()

    def describe(self) -> Iterable[Metric]:
        return ()

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

    async def get(self, key: str) -> CachedResponse | None:
        """The story under `key`."""
        if (data := self.memory.get(key)) is not None:
            return CachedResponse.from_bytes(data)
        if (link := self._link) is None:
            return None
        try:
            found = await link.call(lambda: link.client.get(PREFIX + key))
        except RedisUnavailableError:
            return None
        if not isinstance(found, bytes) or (told := CachedResponse.from_bytes(found)) is None:
            return None
        self.memory.put(key, found)
        return told

    def put(self, key: str, told: CachedResponse) -> None:
        """Keep a story; nobody waits for Redis to have it."""
        data = told.as_bytes()
        self.memory.put(key, data)
        if (link := self._link) is not None:
            link.fire_and_forget(lambda: link.client.set(PREFIX + key, data, ex=self._ttl))
