"""The outermost layer: a name for each request, a bound for each body, no stack trace for anyone.

Pure ASGI, for a middleware that reads responses would hold back what should flow.
"""

from __future__ import annotations

import logging
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.serving.backend import Backend
from model.serving.http.errors import as_service_error, too_large
from model.serving.logs import new_request_id, request_id
from model.serving.metrics import Meter

log = logging.getLogger(__name__)

told = logging.getLogger("story.request")

WATCHING = ("/api/health", "/metrics")
"""Asked so often that good answers would drown the rest of the log."""
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What a client may call its request; anything else is replaced, for it ends up in logs and headers."""


class RequestContextMiddleware:
    """Wraps the application; see the module."""

    def __init__(self, app: ASGIApp, *, backend: Backend, meter: Meter, name: str, max_body: int) -> None:
        """`name`: of this copy, empty for that of the writer; `max_body` in bytes."""
        self._app = app
        self._backend = backend
        self._meter = meter
        self._name = name
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request through; whatever fails below becomes a response in the house's form."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if SANE_ID.fullmatch(given) else new_request_id()
        token = request_id.set(name)
        began = time.perf_counter()
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
            log.debug("request %s: the client left before its body had come", name)
        except Exception as error:
            failure = as_service_error(error)
            if not status:
                await failure.response()(scope, receive, send_named)
        finally:
            if status:
                route = self._meter.answered(scope["path"], status)
                if route not in WATCHING or status >= 400:
                    took = round(time.perf_counter() - began, 4)
                    told.info("answered", extra={"route": route, "status": status, "seconds": took})
            request_id.reset(token)


def _bounded(receive: Receive, limit: int) -> Receive:
    """`receive` that raises once a body, which need not tell its length before, has grown too long."""
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
