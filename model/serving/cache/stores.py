"""Where told stories are kept: in this process's memory, bounded, and in a Redis that replicas share."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Literal, get_args

from model.serving.cache.story import Told
from model.serving.redis import RedisGoneError, RedisLink

Asked = Literal["hit", "joined", "miss", "bypassed"]
"""Told from memory; followed while it was written for another; written; not to be told from memory at all."""

ASKED: tuple[Asked, ...] = get_args(Asked)

PREFIX = "story:told:"
OVERHEAD = 300
"""Bytes that an entry takes beside its story: key, times and the table's own, measured with `tracemalloc`."""
LARGEST_SHARE = 8
"""A story larger than this part of the memory is not kept: it would push out all others."""


class Memory:
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


class Stories:
    """Told stories: from memory, else from Redis, where there is one and it answers."""

    def __init__(self, memory: Memory, ttl: int, link: RedisLink | None = None) -> None:
        self.memory = memory
        self._ttl = ttl
        self._link = link
        self.asked: Counter[Asked] = Counter()
        """Stories that were asked for, by what was found."""

    async def get(self, key: str) -> Told | None:
        """The story under `key`."""
        if (data := self.memory.get(key)) is not None:
            return Told.from_bytes(data)
        if (link := self._link) is None:
            return None
        try:
            found = await link.ask(lambda: link.client.get(PREFIX + key))
        except RedisGoneError:
            return None
        if not isinstance(found, bytes) or (told := Told.from_bytes(found)) is None:
            return None
        self.memory.put(key, found)
        return told

    def put(self, key: str, told: Told) -> None:
        """Keep a story; nobody waits for Redis to have it."""
        data = told.as_bytes()
        self.memory.put(key, data)
        if (link := self._link) is not None:
            link.later(lambda: link.client.set(PREFIX + key, data, ex=self._ttl))
