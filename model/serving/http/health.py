"""`GET /api/health` (also `/health` and `/ping`) and `GET /metrics`, for load balancers and operators."""

import hmac
import importlib.metadata
import ipaddress
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from model.serving.http.openapi import HealthResponse, errors_of, get
from model.serving.http.response import json_response
from model.serving.http.schemas import MODEL_ID
from model.serving.metrics import CONTENT_TYPE, Meter
from model.serving.session import GenerationManager
from model.settings import ServiceOptions

FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host")
"""Headers of a request that came through a proxy."""


def health_of(manager: GenerationManager) -> tuple[bool, dict[str, Any]]:
    """Return whether a request could be served now, and the body of the health route."""
    health = manager.backend.health()
    ready = health.ready and not manager.draining
    info = manager.backend.model
    body: dict[str, Any] = {
        "status": "healthy" if ready else "draining" if manager.draining else "unhealthy",
        "timestamp": datetime.now(UTC).isoformat(),
        "version": version(),
        "model": {"id": MODEL_ID, **info.as_dict()},
        "backend": manager.options.name or health.served_by,
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
    """Return the project's version; `source` where it is not installed, as in a container."""
    try:
        return importlib.metadata.version("write-me-a-story")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def may_read_metrics(request: Request, options: ServiceOptions) -> bool:
    """Return whether `/metrics` answers this request: with its token, or without one to this machine."""
    if (token := options.settings.story_metrics_token) is not None:
        given = request.headers.get("authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {token.get_secret_value()}".encode())
    return not options.public and is_local(request)


def is_local(request: Request) -> bool:
    """Return whether a request comes from this machine, and not through a proxy or under another name."""
    if any(name in request.headers for name in FORWARDED):
        return False
    peer = request.client.host if request.client else ""
    return is_loopback(peer) and is_loopback(request.url.hostname or "")


def is_loopback(host: str) -> bool:
    """Return whether a host's name or address is this machine's own."""
    try:
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return host == "localhost"


def router(manager: GenerationManager, meter: Meter) -> APIRouter:
    """Return the two routes."""
    routes = APIRouter()

    # vLLM's clients ask `/health`, SageMaker and load generators `/ping`; the answer is the same everywhere.
    @get(routes, "/ping", include_in_schema=False)
    @get(routes, "/health", include_in_schema=False)
    @get(routes, "/api/health", responses={200: {"model": HealthResponse}, 503: {"model": HealthResponse}})
    async def health() -> Response:
        """Return 200 if a request could be served now, else 503 with the same body."""
        ready, body = health_of(manager)
        headers = {"cache-control": "no-store"} | ({} if ready else {"Retry-After": "1"})
        return json_response(body, 200 if ready else 503, headers)

    @get(routes, "/metrics", response_class=PlainTextResponse, responses=errors_of(404))
    async def metrics(request: Request) -> Response:
        """Return all metrics in Prometheus' text format."""
        if not may_read_metrics(request, manager.options):
            raise HTTPException(404)  # as if there were none
        return Response(meter.text(), media_type=CONTENT_TYPE)

    return routes
