"""Moving windows in a Redis that replicas share: those of the `limits` library, and a way to give back.

Times are wall clock, as the library has it, so the replicas' clocks have to agree to about a second.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from limits.aio.storage import RedisStorage

if TYPE_CHECKING:
    from model.serving.redis import RedisLink

PREFIX = "story:limits"


class SharedWindows:
    """The windows over a `RedisLink`. Every method raises `RedisUnavailableError` where the link does."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        # With a pool, the address is not used for connecting.
        self._storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=PREFIX,
            connection_pool=link.pool,  # type: ignore[arg-type]
        )

    async def take(self, key: str, amount: int, seconds: int, cost: int) -> float:
        """Take `cost` as `MemoryWindows.take` does; returns 0, or the seconds until it may be taken."""
        if await self._link.call(lambda: self._storage.acquire_entry(key, amount, seconds, cost)):
            return 0.0
        # Newest first: when the entry at this place has aged, there is room.
        blocking = await self._link.call(lambda: self._link.client.lindex(f"{PREFIX}:{key}", amount - cost))
        return 1e-3 if blocking is None else max(float(blocking) + seconds - time.time(), 1e-3)

    def give_back(self, key: str, cost: int) -> None:
        """Give back so much, without waiting for it.

        The newest entries go, which need not be those that were taken: the rest ages by as much earlier as the
        story took. To know its own, the library would have to tell under which time it noted them.
        """
        if cost > 0:
            self._link.fire_and_forget(lambda: self._link.client.lpop(f"{PREFIX}:{key}", cost))
