"""ASGI middleware: request ids, a bound on bodies, errors and logs; security headers; other origins; the root path.

Pure ASGI, since a middleware that reads responses would buffer streams.
"""

import logging
import re
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.serving.backend import Backend
from model.serving.http.response import as_service_error, foreign_origin, too_large
from model.serving.logs import new_request_id, request_id
from model.serving.metrics import Meter
from model.settings import ServiceOptions

log = logging.getLogger(__name__)
access_log = logging.getLogger("story.request")

QUIET_ROUTES = ("/api/health", "/health", "/ping", "/metrics")
"""Polled so often that successful requests would flood the log."""
PROTECTED = ("/api/generate", "/socket.io")
"""Paths whose GET requests have an effect too."""
VALID_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What a client may call its request; anything else is replaced, for it ends up in logs and headers."""

SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "referrer-policy": "same-origin",  # the page's address can hold a prompt
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=()",
    "cross-origin-opener-policy": "same-origin",
    # Gradio's page needs inline scripts and styles, so these rules restrict what it does not need.
    "content-security-policy": "frame-ancestors 'self'; base-uri 'self'; object-src 'none'; form-action 'self'",
}


class RequestContextMiddleware:
    """Gives each request an id, bounds its body, turns exceptions into error responses, and logs it."""

    def __init__(self, app: ASGIApp, *, backend: Backend, meter: Meter, options: ServiceOptions) -> None:
        self._app = app
        self._backend = backend
        self._meter = meter
        self._name, self._max_body = options.name, options.settings.story_max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if VALID_ID.fullmatch(given) else new_request_id()
        token = request_id.set(name)
        started = time.perf_counter()
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = MutableHeaders(scope=message)
                named["x-request-id"] = name
                if "x-story-backend" not in named:
                    named["x-story-backend"] = self._name or self._backend.health().served_by
            await send(message)

        try:
            if int(headers.get("content-length", "0")) > self._max_body:
                raise too_large(self._max_body)
            await self._app(scope, _bounded(receive, self._max_body), send_named)
        except ClientDisconnect:
            log.debug("request %s: the client disconnected before its body had come", name)
        except Exception as error:
            failure = as_service_error(error)
            if not status:
                await failure.response()(scope, receive, send_named)
        finally:
            if status:
                route = self._meter.answered(scope["path"], status)
                if route not in QUIET_ROUTES or status >= 400:
                    took = round(time.perf_counter() - started, 4)
                    access_log.info("request", extra={"route": route, "status": status, "seconds": took})
            request_id.reset(token)


def _bounded(receive: Receive, limit: int) -> Receive:
    """Return `receive` that raises once a body, which need not announce its length, has grown too long."""
    taken = 0

    async def bounded() -> Message:
        nonlocal taken
        message = await receive()
        if message["type"] == "http.request":
            taken += len(message.get("body", b""))
            if taken > limit:
                raise too_large(limit)
        return message

    return bounded


class SecurityHeadersMiddleware:
    """Adds `SECURITY_HEADERS` where a response does not set them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class SameOriginMiddleware:
    """Refuses requests that pages of other sites make, except those of `origins`.

    CORS only keeps such a page from reading a response; this keeps its request from having an effect. Concerned are
    unsafe methods, WebSockets and `PROTECTED` paths. As Go's `CrossOriginProtection` does, it believes
    `Sec-Fetch-Site`, which no script can set, and where a browser does not send that (to a host without TLS), compares
    `Origin` with `Host`. Programs send neither, and pass.
    """

    def __init__(self, app: ASGIApp, *, origins: Sequence[str]) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self._concerned(scope) or self._same(Headers(scope=scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: 403
        else:
            await foreign_origin().response()(scope, receive, send)

    def _concerned(self, scope: Scope) -> bool:
        safe = scope["type"] == "http" and scope["method"] in ("GET", "HEAD", "OPTIONS")
        return not safe or scope["path"].startswith(PROTECTED)

    def _same(self, headers: Headers) -> bool:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin in self._origins or site in ("same-origin", "none"):
            return True
        return site is None and (origin is None or urlsplit(origin).netloc == headers.get("host"))


class RootPathMiddleware:
    """Removes the path under which a proxy publishes the application, for proxies that leave it in place."""

    def __init__(self, app: ASGIApp, *, root_path: str) -> None:
        self._app = app
        self._root = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and scope["path"].startswith(f"{self._root}/"):
            scope = {**scope, "path": scope["path"].removeprefix(self._root)}
        await self._app(scope, receive, send)


def outer_middleware(options: ServiceOptions) -> list[Middleware]:
    """Return what surrounds an application, outermost first: security headers, root path, policy for other origins.

    Where an application has a `CORSMiddleware`, Gradio's own, which allows every origin, does nothing.
    """
    root_path, origins = options.settings.story_root_path, options.settings.story_origins or ()
    return [
        Middleware(SecurityHeadersMiddleware),
        *([Middleware(RootPathMiddleware, root_path=root_path)] if root_path else []),
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id", "cache-control"],
            expose_headers=["x-request-id", "x-story-backend", "retry-after"] if origins else [],
            max_age=600,
        ),
        Middleware(SameOriginMiddleware, origins=origins),
    ]
