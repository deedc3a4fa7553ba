"""How a failure goes over the wire.

Always the same JSON, `{"error": {"type", "message", "param", "code"}}`: as the body of a response with a
matching status, or, once events have begun to flow, as the data of an event called `error`, after which the
stream ends without `[DONE]`. `type` is the kind of failure, `code` the exact one, `param` the field at fault.
Whatever is not meant for a reader (a bug) goes to the log and reaches the client as one line without details.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from model.errors import BusyError, InputError, LimitError, ModelError, StoryError
from model.serving.http.wire import json_bytes

log = logging.getLogger(__name__)

INVALID = "invalid_request_error"
UNAVAILABLE = "service_unavailable"


class ServiceError(StoryError):
    """A failure with all that a client is told of it."""

    def __init__(
        self,
        status: int,
        kind: str,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """`retry_after` is in seconds; a client is told whole ones, at least 1."""
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))

    def body(self) -> dict[str, Any]:
        """The JSON that a client gets."""
        return {
            "error": {"type": self.kind, "message": str(self), "param": self.param, "code": self.code},
        }

    def response(self) -> Response:
        """The whole response, for a failure before anything was sent."""
        return Response(
            json_bytes(self.body()), self.status, headers=self.headers, media_type="application/json"
        )


def bad_body(message: str) -> ServiceError:
    """400: what came is no JSON object."""
    return ServiceError(400, INVALID, "invalid_json", message)


def bad_value(param: str, message: str) -> ServiceError:
    """422: a field is wrong; the message goes on from the field's name."""
    return ServiceError(422, INVALID, "invalid_value", f"{param} {message}", param=param)


def unknown_model(name: str, known: str) -> ServiceError:
    """404: another model was asked for."""
    message = f"model must be {known}, got {name[:80]!r}"
    return ServiceError(404, INVALID, "model_not_found", message, param="model")


def too_large(limit: int) -> ServiceError:
    """413, with the connection closed, for the rest of the body is not read."""
    message = f"the body must have at most {limit} bytes"
    return ServiceError(413, INVALID, "body_too_large", message, headers={"Connection": "close"})


def draining() -> ServiceError:
    """503: this copy ends; another, or the same one started again, takes the story."""
    message = "the service is draining: it ends its running stories and takes no new ones"
    return ServiceError(503, UNAVAILABLE, "draining", message, retry_after=2)


def broke_off(reason: str | None) -> ServiceError:
    """503: the model could not go on with a story."""
    return ServiceError(
        503, UNAVAILABLE, "model_failed", reason or "the model could not go on", retry_after=1
    )


def as_service_error(error: Exception) -> ServiceError:
    """What a client is told of `error`."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, InputError):
        return ServiceError(422, INVALID, "invalid_value", str(error), param=error.param)
    if isinstance(error, LimitError):
        message = f"{error}; try again in {max(1, math.ceil(error.retry_after))} s"
        return ServiceError(429, "rate_limit_error", "rate_limited", message, retry_after=error.retry_after)
    if isinstance(error, BusyError):
        return ServiceError(429, "rate_limit_error", "queue_full", str(error), retry_after=error.retry_after)
    if isinstance(error, ModelError):
        return ServiceError(503, UNAVAILABLE, "model_unavailable", str(error), retry_after=5)
    if isinstance(error, StoryError):
        return ServiceError(503, UNAVAILABLE, "unavailable", str(error), retry_after=1)
    log.error("a request failed", exc_info=error)
    return ServiceError(500, "internal_error", "internal", "something went wrong on this side")


def install(app: FastAPI) -> None:
    """Make `app` answer every failure of a route in this form, unknown addresses and methods included."""

    async def on_story_error(_request: Request, error: Exception) -> Response:
        return as_service_error(error).response()

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _http_error(request, error).response()

    app.add_exception_handler(StoryError, on_story_error)
    app.add_exception_handler(HTTPException, on_http_error)


def _http_error(request: Request, error: HTTPException) -> ServiceError:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        message = f"there is nothing at {request.url.path[:80]}"
        return ServiceError(404, INVALID, "not_found", message, headers=headers)
    if error.status_code == 405:
        allowed = headers.get("Allow", headers.get("allow", "another method"))
        message = f"{request.method[:20]} is not allowed at {request.url.path[:80]}; use {allowed}"
        return ServiceError(405, INVALID, "method_not_allowed", message, headers=headers)
    return ServiceError(error.status_code, INVALID, "http_error", str(error.detail), headers=headers)
