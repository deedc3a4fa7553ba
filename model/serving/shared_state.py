"""Rate limiter, response cache and Redis connection of one process, so that page and routes count together.

shared = SharedState.from_settings(settings)
backend = shared.with_cache(open_backend(…))
service = create_service(backend, options, shared)
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from model.serving.backend import Backend, FingerprintedBackend
from model.serving.cache import CachingBackend, LRUCache, ResponseCache
from model.serving.rate_limit import Limiter
from model.serving.redis import RedisLink
from model.settings import Settings


@dataclass(frozen=True, slots=True)
class SharedState:
    """The default has no limits and no cache."""

    limiter: Limiter = field(default_factory=Limiter)
    cache: ResponseCache | None = None
    redis: RedisLink | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> SharedState:
        """Make what the settings ask for. Raises `InputError`."""
        redis = None if settings.redis_url is None else RedisLink(settings.redis_url.get_secret_value())
        cache = None
        if settings.story_cache:
            ttl = settings.story_cache_ttl
            cache = ResponseCache(LRUCache(settings.story_cache_bytes, ttl), ttl, redis)
        return cls(Limiter.from_settings(settings, redis), cache, redis)

    def with_cache(self, backend: Backend) -> Backend:
        """Wrap `backend` in the cache, if there is one and it knows its fingerprint; wrap each of several variants."""
        if self.cache is not None and isinstance(backend, FingerprintedBackend):
            return CachingBackend(backend, self.cache)
        return backend

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Close the Redis connections on exit."""
        try:
            yield
        finally:
            if self.redis is not None:
                await self.redis.aclose()
