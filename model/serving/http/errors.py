"""Encoding of JSON, server-sent events and errors.

An error is always the same JSON, `{"error": {"type", "message", "param", "code"}}`: the body of a response with a
matching status or, once events have been sent, the data of an event called `error`, after which the stream ends without
`[DONE]`. `type` is the kind of error, `code` the exact one, `param` the field at fault. An unexpected exception goes to
the log and reaches the client as one line without details.
"""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from model.errors import BusyError, DrainingError, GenerationError, InputError, LimitError, ModelError, StoryError

log = logging.getLogger(__name__)

INVALID = "invalid_request_error"
UNAVAILABLE = "service_unavailable"
EVENT_STREAM = "text/event-stream; charset=utf-8"
KEEP_ALIVE = b": still here\n\n"
"""A comment: event-stream clients skip it, and proxies see that the connection is alive."""
DONE = b"data: [DONE]\n\n"

_encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


def json_bytes(value: Any) -> bytes:
    """Encode as compact JSON in ASCII.

    ASCII, because some clients of event streams take U+2028 in a story for the end of a line, and because a lone
    surrogate in a request can then be named in the response.
    """
    return _encode(value).encode("ascii")


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response."""
    return Response(json_bytes(value), status, headers, "application/json")


def sse_event(value: Any, name: str = "", event_id: str = "") -> bytes:
    """Encode one server-sent event; without a name it is a plain `data:` event, as OpenAI's clients expect."""
    fields = {"event": name, "id": event_id}
    head = "".join(f"{field}: {text}\n" for field, text in fields.items() if text).encode()
    return b"%bdata: %b\n\n" % (head, json_bytes(value))


class ServiceError(StoryError):
    """An error as a client gets it."""

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
        """`retry_after` is in seconds; a client gets whole ones, at least 1."""
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))

    def body(self) -> dict[str, Any]:
        """Return the JSON that a client gets."""
        return {"error": {"type": self.kind, "message": str(self), "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the whole response, for an error before anything was sent."""
        return json_response(self.body(), self.status, self.headers)


def bad_body(message: str) -> ServiceError:
    """400: the body is no JSON object."""
    return ServiceError(400, INVALID, "invalid_json", message)


def bad_value(param: str, message: str) -> ServiceError:
    """422: a field is wrong; the message continues from the field's name."""
    shown = param if param.isprintable() else repr(param)[1:-1]  # an unknown field may be called anything
    return ServiceError(422, INVALID, "invalid_value", f"{shown} {message}", param=param)


def unknown_model(name: str, known: str) -> ServiceError:
    """404: another model was asked for."""
    message = f"model must be {known}, got {name[:80]!r}"
    return ServiceError(404, INVALID, "model_not_found", message, param="model")


def too_large(limit: int) -> ServiceError:
    """413, with the connection closed, for the rest of the body is not read."""
    message = f"the body must have at most {limit} bytes"
    return ServiceError(413, INVALID, "body_too_large", message, headers={"Connection": "close"})


def foreign_origin() -> ServiceError:
    """403: a page of another site made the request."""
    message = "requests from pages of other sites are refused, except of the origins that STORY_ORIGINS names"
    return ServiceError(403, INVALID, "foreign_origin", message)


def as_service_error(error: Exception) -> ServiceError:
    """Return what a client gets for `error`."""
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
    if isinstance(error, DrainingError):  # another replica, or this one restarted, takes the request
        return ServiceError(503, UNAVAILABLE, "draining", str(error), retry_after=2)
    if isinstance(error, GenerationError):
        return ServiceError(503, UNAVAILABLE, "model_failed", str(error), retry_after=1)
    if isinstance(error, StoryError):
        return ServiceError(503, UNAVAILABLE, "unavailable", str(error), retry_after=1)
    log.error("a request failed", exc_info=error)
    return ServiceError(500, "internal_error", "internal", "something went wrong on this side")


def install(app: FastAPI) -> None:
    """Make `app` return every error of a route in this form, unknown paths and methods included."""

    async def on_story_error(_request: Request, error: Exception) -> Response:
        return as_service_error(error).response()

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _http_error(request, error).response()

    app.add_exception_handler(StoryError, on_story_error)
    app.add_exception_handler(HTTPException, on_http_error)


def _http_error(request: Request, error: HTTPException) -> ServiceError:
    headers = dict(error.headers or {})
    code, message = "http_error", str(error.detail)
    if error.status_code == 404:
        code, message = "not_found", f"there is nothing at {request.url.path[:80]}"
    elif error.status_code == 405:
        allowed = headers.get("Allow", headers.get("allow", "another method"))
        code = "method_not_allowed"
        message = f"{request.method[:20]} is not allowed at {request.url.path[:80]}; use {allowed}"
    return ServiceError(error.status_code, INVALID, code, message, headers=headers)
