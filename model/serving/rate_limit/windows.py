"""Moving windows that count what was taken: in this process's memory, and in a Redis that replicas share."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from limits.aio.storage import RedisStorage

if TYPE_CHECKING:
    from model.serving.redis import RedisLink

MAX_WINDOWS = 100_000
"""Windows in memory; beyond, the least recently used are forgotten."""
PREFIX = "story:limits"


@dataclass(slots=True)
class Taken:
    """What one request took from a window."""

    at: float
    cost: int
    window: _Window | None


@dataclass(slots=True)
class _Window:
    seconds: float
    used: int = 0
    entries: deque[Taken] = field(default_factory=deque)
    """Oldest first."""

    def expire(self, now: float) -> None:
        """Forget what was taken longer ago than the window reaches."""
        while self.entries and self.entries[0].at <= now - self.seconds:
            old = self.entries.popleft()
            self.used -= old.cost
            old.window = None


class MemoryWindows:
    """Windows in memory, by name. Used from one thread at a time.

    The `limits` library has such windows too. They look through all clients at each request (1.3 ms of processor time
    for ten clients, 29 ms for ten thousand; these take 8 µs with five thousand) and cannot refund.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, most: int = MAX_WINDOWS) -> None:
        self._clock = clock
        self._most = most
        self._windows: OrderedDict[str, _Window] = OrderedDict()  # in the order of their last use

    def __len__(self) -> int:
        return len(self._windows)

    def take(self, key: str, amount: int, seconds: float, cost: int) -> Taken | float:
        """Take `cost` from the window `key`, which allows `amount` in any `seconds`; `cost` is at most `amount`.

        Where that is too much now, take nothing and return the seconds until it may be taken.
        """
        now = self._clock()
        self._tidy(now)
        window = self._windows.setdefault(key, _Window(seconds))
        self._windows.move_to_end(key)
        window.expire(now)
        if window.used + cost <= amount:
            taken = Taken(now, cost, window)
            window.entries.append(taken)
            window.used += cost
            return taken
        over = window.used + cost - amount
        for entry in window.entries:
            over -= entry.cost
            if over <= 0:
                return max(entry.at + seconds - now, 1e-3)
        raise AssertionError("a full window holds the entries that fill it")

    @staticmethod
    def refund(taken: Taken, cost: int) -> None:
        """Give back part of what was taken, all at most; expired entries are back already."""
        if taken.window is not None:
            taken.window.used -= cost
            taken.cost -= cost

    def _tidy(self, now: float) -> None:
        """Drop empty windows, two at most, so that they go faster than new ones come."""
        for _ in range(2):
            key = next(iter(self._windows), None)
            if key is None:
                return
            window = self._windows[key]
            window.expire(now)
            if window.entries and len(self._windows) < self._most:
                return
            del self._windows[key]


class RedisWindows:
    """Windows in Redis: those of the `limits` library, with a refund. Raises `RedisUnavailableError`.

    Times are wall clock, as the library has it, so the replicas' clocks have to agree to about a second.
    """

    def __init__(self, redis: RedisLink) -> None:
        self._redis = redis
        # With a pool, the address is not used for connecting.
        self._storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=PREFIX,
            connection_pool=redis.pool,  # type: ignore[arg-type]
        )

    async def take(self, key: str, amount: int, seconds: int, cost: int) -> float:
        """Take `cost` as `MemoryWindows.take` does; returns 0, or the seconds until it may be taken."""
        if await self._redis.call(lambda: self._storage.acquire_entry(key, amount, seconds, cost)):
            return 0.0
        # Newest first: when the entry at this place has expired, there is room.
        blocking = await self._redis.call(lambda: self._redis.client.lindex(f"{PREFIX}:{key}", amount - cost))
        return 1e-3 if blocking is None else max(float(blocking) + seconds - time.time(), 1e-3)

    def refund(self, key: str, cost: int) -> None:
        """Give back so much in the background.

        The newest entries go, which need not be those that were taken: the rest expires earlier by as much as the
        request lasted. The library does not tell the time under which it stored them.
        """
        if cost > 0:
            self._redis.fire_and_forget(lambda: self._redis.client.lpop(f"{PREFIX}:{key}", cost))
