"""The ASGI application of the service, to be served alone or as a route of another.

shared = SharedState.from_settings(settings)
service = create_service(shared.with_cache(open_backend(…)), options, shared)
"""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Self

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from model.serving.backend import Backend, FingerprintedBackend
from model.serving.cache import CachingBackend, LRUCache, ResponseCache
from model.serving.http import chat, completions, health, response, simple
from model.serving.http.chat import ChatBody
from model.serving.http.middleware import RequestContextMiddleware, outer_middleware
from model.serving.http.openapi import schemas_of
from model.serving.http.schemas import CompletionBody, SimpleBody
from model.serving.http.simple import Sockets
from model.serving.metrics import Meter
from model.serving.rate_limit import Limiter
from model.serving.redis import RedisLink
from model.serving.session import GenerationManager
from model.settings import ServiceOptions, Settings


@dataclass(frozen=True, slots=True)
class SharedState:
    """The default has no limits and no cache."""

    limiter: Limiter = field(default_factory=Limiter)
    cache: ResponseCache | None = None
    redis: RedisLink | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
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


PATHS = ("/v1", "/api/generate", "/api/health", "/health", "/ping", "/metrics", "/openapi.json", "/socket.io")
"""Paths of the service, each with everything below it, for an application that has others beside them."""


class Service(FastAPI):
    """The application, with what its server needs to start it and to drain it."""

    manager: GenerationManager
    sockets: Sockets
    shared: SharedState
    meter: Meter
    """Its registry also takes metrics of an application that carries the service."""

    def openapi(self) -> dict[str, Any]:
        """Return the description of the service; FastAPI knows nothing of bodies that the routes read themselves."""
        if self.openapi_schema is None:
            document = super().openapi()
            document["components"]["schemas"] |= schemas_of(CompletionBody, ChatBody, SimpleBody)
        assert self.openapi_schema is not None
        return self.openapi_schema

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the backend; on exit close open connections."""
        async with self.shared.running(), self.manager.running():
            try:
                yield
            finally:
                await self.sockets.close()


def create_service(
    backend: Backend, options: ServiceOptions | None = None, shared: SharedState | None = None
) -> Service:
    """Make the service over `backend`, which it runs; without `shared`, there are no rate limits.

    An application that carries it (`ServiceRoute`) has to enter `Service.running` itself.
    """
    options = options or ServiceOptions()
    shared = shared or SharedState()
    root_path = options.settings.story_root_path
    meter = Meter(backend, options.name)
    for collector in (shared.limiter, shared.cache, shared.redis):
        if collector is not None:
            meter.registry.register(collector)
    manager = GenerationManager(backend, limiter=shared.limiter, observers=[meter], options=options)

    @contextlib.asynccontextmanager
    async def lifespan(app: Service) -> AsyncIterator[None]:
        async with app.running():
            yield

    context = Middleware(RequestContextMiddleware, backend=backend, meter=meter, options=options)
    service = Service(
        title="write-me-a-story",
        version=health.version(),
        lifespan=lifespan,
        docs_url=None,  # both pages would load scripts from a foreign host
        redoc_url=None,
        redirect_slashes=False,
        middleware=[*outer_middleware(options), context],
        servers=[{"url": root_path}] if root_path else None,
    )
    service.manager = manager
    service.shared = shared
    service.meter = meter
    service.sockets = Sockets(manager)
    response.install(service)
    for routes in (completions, chat, simple):
        service.include_router(routes.router(manager))
    service.include_router(health.router(manager, meter))
    service.mount("/socket.io", service.sockets.app)
    return service


class ServiceRoute(BaseRoute):
    """The whole service as one route of another application, under the paths it has alone.

    A mount would cut its prefix off the path, and there are several; and the other application's handlers would answer
    the service's errors in their own form.
    """

    def __init__(self, service: ASGIApp) -> None:
        self._service = service

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        path = scope.get("path", "")
        ours = path.startswith(tuple(f"{own}/" for own in PATHS)) or path in PATHS
        return (Match.FULL if ours and scope["type"] in ("http", "websocket") else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._service(scope, receive, send)
