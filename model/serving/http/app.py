"""The parts put together: one application, to be served alone or as a route of another."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from model.serving.backend import Backend
from model.serving.http import completions, errors, simple, state
from model.serving.http.edge import RequestContextMiddleware
from model.serving.http.options import ServiceOptions
from model.serving.http.secured import SecurityHeadersMiddleware, cross_origin
from model.serving.http.session import GenerationManager
from model.serving.http.sockets import Sockets
from model.serving.metrics import Meter, MeteredBackend
from model.serving.shared_state import SharedState

PREFIXES = ("/v1/", "/api/generate", "/api/health", "/metrics", "/socket.io")
"""Where the service's addresses begin, for an application that has others beside them."""


class Service(FastAPI):
    """The application, with what whoever serves it needs to start it and to let it end."""

    manager: GenerationManager
    """Through which stories are let end."""
    sockets: Sockets
    shared: SharedState
    meter: Meter
    """Whose registry also takes figures of whoever carries the service."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the backend, and close what clients hold open at the end."""
        async with self.shared.running(), self.manager.backend.running():
            try:
                yield
            finally:
                await self.sockets.close()


def create_service(
    backend: Backend, options: ServiceOptions | None = None, shared: SharedState | None = None
) -> Service:
    """The service over `backend`, which it starts and stops with itself; without `shared`, there are no limits.

    Carried inside another application (`ServiceRoute`), it is that one's part to enter `Service.running`.
    """
    options = options or ServiceOptions()
    shared = shared or SharedState()
    meter = Meter(backend, options.name)
    backend = MeteredBackend(backend, meter)
    for collector in (shared.limiter, shared.cache, shared.redis):
        if collector is not None:
            meter.registry.register(collector)
    manager = GenerationManager(backend, meter, shared.limiter)

    @contextlib.asynccontextmanager
    async def lifespan(app: Service) -> AsyncIterator[None]:
        async with app.running():
            yield

    service = Service(
        title="write-me-a-story",
        version=state.version(),
        lifespan=lifespan,
        docs_url=None,  # both pages would load scripts from a foreign host
        redoc_url=None,
        redirect_slashes=False,
    )
    service.manager = manager
    service.shared = shared
    service.meter = meter
    service.sockets = Sockets(manager, options)
    errors.install(service)
    service.add_middleware(
        RequestContextMiddleware, backend=backend, meter=meter, name=options.name, max_body=options.max_body
    )
    for added in (
        *cross_origin(options.origins),
        Middleware(SecurityHeadersMiddleware),
    ):  # the last one is outermost
        service.add_middleware(added.cls, *added.args, **added.kwargs)
    service.include_router(completions.router(manager, options))
    service.include_router(simple.router(manager, options))
    service.include_router(state.router(manager, meter, options))
    service.mount("/socket.io", service.sockets.app)
    return service


class ServiceRoute(BaseRoute):
    """The whole service as one route of another application, at the addresses it has alone.

    A mount would cut its prefix off the path, and there are several; and the other application's handlers
    would answer the service's errors in their own form.
    """

    def __init__(self, service: ASGIApp) -> None:
        self._service = service

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether the address is one of the service's."""
        path = scope.get("path", "")
        ours = any(path == prefix.rstrip("/") or path.startswith(prefix) for prefix in PREFIXES)
        return (Match.FULL if ours and scope["type"] in ("http", "websocket") else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on as it came."""
        await self._service(scope, receive, send)
