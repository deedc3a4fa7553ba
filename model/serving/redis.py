"""Optional shared Redis for rate limits and cache. On failure, callers fall back to in-process state.

A call returns within `TIMEOUT` or raises `RedisUnavailableError`; once Redis has failed, it raises at once, so no
request waits for a Redis that is down. A background task pings it after growing delays until it answers. Loss and
return are logged once each.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from model.errors import InputError, StoryError

TIMEOUT = 0.25
"""Seconds for one response, a new connection included. A healthy Redis takes a millisecond."""
RETRY_DELAYS = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Seconds before each ping while it is down; the last one repeats."""
CONNECTIONS = 256

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class RedisUnavailableError(StoryError):
    """Redis does not answer; the caller goes on without it."""


class RedisLink(Collector):
    """A connection pool to a Redis that may be down. Used from one event loop."""

    def __init__(self, url: str) -> None:
        """Connect at the first use. Raises `InputError` when `url` is not the address of a Redis."""
        import redis.asyncio
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        try:
            pool = redis.asyncio.ConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                socket_timeout=TIMEOUT,
                socket_connect_timeout=TIMEOUT,
                # One retry: a connection that lay idle may have been closed, and a new one costs little.
                retry=Retry(NoBackoff(), 1),
            )
        except ValueError:
            raise InputError("REDIS_URL", "must start with redis://, rediss:// or unix://") from None
        self.pool = pool
        self.client: redis.asyncio.Redis = redis.asyncio.Redis(connection_pool=pool)
        self._errors = (redis.RedisError, OSError, TimeoutError)
        self.up = True
        """Whether the last call succeeded."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reconnecting: asyncio.Task[Any] | None = None
        self.losses = 0

    def collect(self) -> Iterable[Metric]:
        """Yield the connection's metrics."""
        yield GaugeMetricFamily(
            "story_redis_up", "1 while Redis answers; 0: limits and cache are per process.", self.up
        )
        yield CounterMetricFamily("story_redis_losses", "Times the connection to Redis was lost.", self.losses)

    async def call(self, how: Callable[[], Awaitable[Result]]) -> Result:
        """Await `how`. Raises `RedisUnavailableError`, at once while Redis is known to be down."""
        if not self.up:
            raise RedisUnavailableError("Redis does not answer")
        try:
            async with asyncio.timeout(TIMEOUT):
                return await how()
        except self._errors as error:
            self._lost(error)
            raise RedisUnavailableError("Redis does not answer") from None

    def fire_and_forget(self, how: Callable[[], Awaitable[object]]) -> None:
        """Run `how` in the background; while Redis is down, drop it."""

        async def run() -> None:
            with contextlib.suppress(RedisUnavailableError):
                await self.call(how)

        if self.up:
            self._start(run())

    async def aclose(self) -> None:
        """Finish what runs in the background, and close the connections. The link can be used again afterwards."""
        if self._reconnecting:
            self._reconnecting.cancel()
        tasks = list(self._tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=TIMEOUT)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.up = True
        with contextlib.suppress(*self._errors):
            await self.client.aclose()
            await self.pool.disconnect()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _lost(self, error: BaseException) -> None:
        if not self.up:
            return
        self.up = False
        self.losses += 1
        reason = str(error) or type(error).__name__
        log.warning("Redis is gone (%s): limits and cache are this process's own until it is back", reason)
        self._reconnecting = self._start(self._reconnect())

    async def _reconnect(self) -> None:
        for delay in itertools.chain(RETRY_DELAYS, itertools.repeat(RETRY_DELAYS[-1])):
            await asyncio.sleep(delay)
            with contextlib.suppress(*self._errors):
                async with asyncio.timeout(TIMEOUT):
                    await self.client.ping()
                self.up = True
                log.warning("Redis is back: limits and cache are shared again")
                return
