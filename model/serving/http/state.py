"""`GET /api/health` and `GET /metrics`: what a balancer and an operator ask."""

from __future__ import annotations

import hmac
import importlib.metadata
import ipaddress
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from model.serving.http.completions import MODEL_ID
from model.serving.http.options import ServiceOptions
from model.serving.http.session import GenerationManager
from model.serving.http.wire import json_bytes
from model.serving.metrics import CONTENT_TYPE, Meter

FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host")
"""Headers by which a proxy says that it asks for somebody else."""


def health_of(manager: GenerationManager, options: ServiceOptions) -> tuple[bool, dict[str, Any]]:
    """Whether a story could be written now, and all there is to say of it."""
    health = manager.backend.health()
    ready = health.ready and not manager.draining
    info = manager.backend.model
    body: dict[str, Any] = {
        "status": "ok" if ready else "draining" if manager.draining else "unavailable",
        "timestamp": datetime.now(UTC).isoformat(),
        "version": version(),
        "model": {"id": MODEL_ID, "name": info.name, "version": info.version},
        "backend": options.name or health.served_by,
        "served_by": health.served_by,
        "detail": "ends its running stories and takes no new ones" if manager.draining else health.detail,
        "open": manager.open,
        "capacity": manager.backend.capacity,
    }
    if health.breaker is not None:
        body["breaker"] = health.breaker
    if (engine := health.engine) is not None:
        body["engine"] = {"slots": engine.slots, "active": engine.active, "waiting": engine.waiting}
    return ready, body


def version() -> str:
    """The project's version; `source` where only its files are there, as in a container."""
    try:
        return importlib.metadata.version("write-me-a-story")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def may_watch(request: Request, options: ServiceOptions) -> bool:
    """Whether `/metrics` answers this request: by its token, or by its coming from this machine itself."""
    if options.metrics_token is not None:
        given = request.headers.get("authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {options.metrics_token}".encode())
    if options.public or any(name in request.headers for name in FORWARDED):
        return False
    return is_loopback(request.client.host if request.client else "") and is_loopback(
        request.url.hostname or ""
    )


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def router(manager: GenerationManager, meter: Meter, options: ServiceOptions) -> APIRouter:
    """The two routes."""
    routes = APIRouter()

    @routes.head("/api/health", include_in_schema=False)
    @routes.get("/api/health")
    async def health() -> Response:
        """200 if a story could be written now, else 503 with the same body."""
        ready, body = health_of(manager, options)
        headers = {"cache-control": "no-store"} | ({} if ready else {"Retry-After": "1"})
        return Response(json_bytes(body), 200 if ready else 503, headers, "application/json")

    @routes.get("/metrics")
    async def metrics(request: Request) -> Response:
        """All figures, as Prometheus reads them, for those whom they concern."""
        if not may_watch(request, options):
            raise HTTPException(404)  # as if there were none
        return Response(meter.text(), media_type=CONTENT_TYPE)

    return routes
