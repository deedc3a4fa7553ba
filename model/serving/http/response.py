"""Responses: the events of a `GenerationSession`, as server-sent events or whole in a `ResponseFormat`, and errors.

An error is always the same JSON, `{"error": {"type", "message", "param", "code"}}`: the body of a response with a
matching status or, once events have been sent, the data of an event called `error`, after which the stream ends without
`[DONE]`. `type` is the kind of error, `code` the exact one, `param` the field at fault. An unexpected exception goes to
the log and reaches the client as one line without details.
"""

import asyncio
import contextlib
import json
import logging
import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from model.errors import BusyError, DrainingError, GenerationError, InputError, LimitError, ModelError, StoryError
from model.generation import Chunk, Completion, GenerationRequest
from model.serving.session import GenerationManager, GenerationSession

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


@dataclass(eq=False)
class ServiceError(StoryError):
    """An error as a client gets it."""

    status: int
    kind: str
    code: str
    message: str
    _: KW_ONLY
    param: str | None = None
    retry_after: float | None = None
    """In seconds; a client gets whole ones, at least 1."""
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.message)
        if self.retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))

    def body(self) -> dict[str, Any]:
        """Return the JSON that a client gets."""
        return {"error": {"type": self.kind, "message": self.message, "param": self.param, "code": self.code}}

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


AS_SENT: tuple[tuple[type[StoryError], int, str, str, float | None], ...] = (
    (InputError, 422, INVALID, "invalid_value", None),
    (LimitError, 429, "rate_limit_error", "rate_limited", None),
    (BusyError, 429, "rate_limit_error", "queue_full", None),
    (ModelError, 503, UNAVAILABLE, "model_unavailable", 5),
    (DrainingError, 503, UNAVAILABLE, "draining", 2),  # another replica, or this one restarted, takes the request
    (GenerationError, 503, UNAVAILABLE, "model_failed", 1),
    (StoryError, 503, UNAVAILABLE, "unavailable", 1),
)
"""Status, type, code and seconds to wait of each error, unless it says itself when to try again."""


def as_service_error(error: Exception) -> ServiceError:
    """Return what a client gets for `error`."""
    if isinstance(error, ServiceError):
        return error
    for kind, status, name, code, wait in AS_SENT:
        if isinstance(error, kind):
            wait, message = getattr(error, "retry_after", wait), str(error)
            if isinstance(error, LimitError):
                message += f"; try again in {max(1, math.ceil(error.retry_after))} s"
            return ServiceError(status, name, code, message, param=getattr(error, "param", None), retry_after=wait)
    log.error("a request failed", exc_info=error)
    return ServiceError(500, "internal_error", "internal", "something went wrong on this side")


def install(app: FastAPI) -> None:
    """Make `app` return every error of a route in this form, unknown paths and methods included."""

    async def on_error(request: Request, error: Exception) -> Response:
        return (_http_error(request, error) if isinstance(error, HTTPException) else as_service_error(error)).response()

    app.add_exception_handler(StoryError, on_error)
    app.add_exception_handler(HTTPException, on_error)


def _http_error(request: Request, error: HTTPException) -> ServiceError:
    path, headers = request.url.path[:80], dict(error.headers or {})
    if error.status_code == 404:
        return ServiceError(404, INVALID, "not_found", f"there is nothing at {path}", headers=headers)
    if error.status_code == 405:
        allowed = headers.get("Allow", headers.get("allow", "another method"))
        message = f"{request.method[:20]} is not allowed at {path}; use {allowed}"
        return ServiceError(405, INVALID, "method_not_allowed", message, headers=headers)
    return ServiceError(error.status_code, INVALID, "http_error", str(error.detail), headers=headers)


STREAM_HEADERS = [
    (b"content-type", EVENT_STREAM.encode()),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # keeps nginx and its like from buffering
]


class ResponseFormat(ABC):
    """Encodes a response. Its methods are called in the order in which they stand here."""

    def opening(self) -> bytes:
        """Encode what comes before the first chunk."""
        return b""

    @abstractmethod
    def chunk(self, index: int, chunk: Chunk, at: float) -> bytes:
        """Encode a chunk of stream `index` that was read at `at` (seconds since 1970)."""

    def ended(self, index: int, completion: Completion) -> bytes:
        """Encode a stream's end."""
        return b""

    @abstractmethod
    def closing(self, completions: list[Completion], served_by: str) -> bytes:
        """Encode what comes after all streams have ended."""

    @abstractmethod
    def whole(self, chunks: list[list[Chunk]], completions: list[Completion], served_by: str) -> dict[str, Any]:
        """Return everything at once, for a client that did not ask for events."""


class GenerationResponse(Response):
    """Generates and sends `requests` in `form`, as server-sent events if `stream`, else as one JSON object.

    One ASGI object does all of it, so that one place knows when the client disconnects: it watches the connection from
    before the first stream is opened to after the last byte. When the client is gone, or sending fails, the session
    ends.
    """

    def __init__(
        self, manager: GenerationManager, requests: list[GenerationRequest], form: ResponseFormat, *, stream: bool
    ) -> None:
        super().__init__()
        self._manager = manager
        self._requests = requests
        self._form = form
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._run(scope, receive, send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            for task in (work, gone):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(work, gone, return_exceptions=True)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        manager = self._manager
        try:
            async with manager.session(self._requests, manager.client_of(scope)) as session:
                if self._stream:
                    await self._send_events(session, send)
                    return
                body = await self._collect(session)
                response = json_response(body, headers={"x-story-backend": self._name(session)})
        except _ClientGoneError:
            return
        except Exception as error:
            response = as_service_error(error).response()
        await response(scope, receive, send)

    def _name(self, session: GenerationSession) -> str:
        return self._manager.options.name or session.served_by

    async def _collect(self, session: GenerationSession) -> dict[str, Any]:
        chunks: list[list[Chunk]] = [[] for _ in self._requests]
        async for event in session.events(self._manager.options.keep_alive):
            if event is not None and event.chunk is not None:
                chunks[event.number].append(event.chunk)
        return self._form.whole(chunks, session.completions, session.served_by)

    async def _send_events(self, session: GenerationSession, send: Send) -> None:
        form, name = self._form, (b"x-story-backend", self._name(session).encode("latin-1", "replace"))
        await send({"type": "http.response.start", "status": 200, "headers": [*STREAM_HEADERS, name]})
        try:
            await _send(send, form.opening())
            async for event in session.events(self._manager.options.keep_alive):
                if event is None:
                    await _send(send, KEEP_ALIVE)
                elif event.chunk is not None:
                    await _send(send, form.chunk(event.number, event.chunk, event.at))
                elif event.completion is not None:
                    await _send(send, form.ended(event.number, event.completion))
            await _send(send, form.closing(session.completions, session.served_by))
        except _ClientGoneError:
            raise
        except Exception as error:
            await _send(send, sse_event(as_service_error(error).body(), "error"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _ClientGoneError(Exception):
    """Sending failed: the client is gone. Apart from `OSError`, which a backend may raise too."""


async def _send(send: Send, body: bytes) -> None:
    if not body:
        return
    try:
        await send({"type": "http.response.body", "body": body, "more_body": True})
    except OSError:
        raise _ClientGoneError from None


async def _disconnected(receive: Receive) -> None:
    """Return when the client is gone; the body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


def usage_of(completions: list[Completion], per_prompt: int | None = None) -> dict[str, Any]:
    """Return token counts of a request; a prompt counts once for the `per_prompt` (all) stories from it."""
    prompt = sum(completion.usage.prompt_tokens for completion in completions[:: per_prompt or len(completions)])
    generated = sum(completion.usage.completion_tokens for completion in completions)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def times_of(completions: list[Completion]) -> dict[str, float]:
    """Return times in seconds, as the backend measured them: longest queue, earliest first token, latest end."""
    usages = [completion.usage for completion in completions]
    return {
        "queued": round(max(usage.queued for usage in usages), 6),
        "ttft": round(min(usage.ttft for usage in usages), 6),
        "duration": round(max(usage.duration for usage in usages), 6),
    }
