"""What stands before a backend that the public may use: limits, and a memory of what was told.

    guard = Guard.of(settings)
    backend = guard.over(open_backend(…))
    service = create_service(backend, options, guard)

One guard for all that one process serves, so page and routes count together. Both parts share a Redis with the other
replicas where there is one, and go on alone while it is gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from model.serving.backend import Backend
from model.serving.rate_limit.limiter import Limiter

if TYPE_CHECKING:
    from model.serving.cache.stores import Stories
    from model.serving.redis import RedisLink
    from model.settings import Settings


@dataclass(frozen=True, slots=True)
class Guard:
    """The default one lets everything in and remembers nothing."""

    limiter: Limiter = field(default_factory=Limiter)
    stories: Stories | None = None
    link: RedisLink | None = None

    @classmethod
    def of(cls, settings: Settings) -> Guard:
        """The guard that the settings ask for. Raises `InputError`."""
        from model.serving.cache.stores import Memory, Stories
        from model.serving.redis import RedisLink

        link = None if settings.redis_url is None else RedisLink(settings.redis_url.get_secret_value())
        stories = None
        if settings.story_cache:
            ttl = settings.story_cache_ttl
            stories = Stories(Memory(settings.story_cache_bytes, ttl), ttl, link)
        return cls(Limiter.of(settings, link), stories, link)

    def over(self, backend: Backend) -> Backend:
        """`backend` with the memory before it. Where several write in turn, each of them needs this."""
        from model.serving.cache.backend import remembering

        return remembering(backend, self.stories)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Close what is open to Redis at the end."""
        try:
            yield
        finally:
            if self.link is not None:
                await self.link.aclose()
