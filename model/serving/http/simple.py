"""The simple form, for a script or a page that wants a story and no contract: `/api/generate` and Socket.IO.

Whole: one object with `text` (what was generated), `story` (the prompt with it), `finish_reason`, `seed`, counts and
times. As events: `token` for each chunk (`{"text"}`), then `complete` with that same object, or `error`.

GET takes the fields as a query and streams, for a browser's `EventSource`, which connects again whenever its connection
ends. So its events have ids: after the end it is answered 204, which makes it stop (WHATWG HTML, 9.2.2), and where
the connection was lost it gets the rest of the story.

A Socket.IO client emits `generate_story` with the same body and receives `story_token` (`{"id", "text"}`) for each
chunk, then `story_complete` with that object, or `story_error` with the usual error object. `stop_story` ends the
story, which then completes as `cancelled`. A client has one story at a time; when it disconnects, its story ends.
"""

import contextlib
import functools
import json
import re
import uuid
from dataclasses import replace
from typing import Any

import socketio
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from model.generation import Chunk, Completion, GenerationRequest
from model.serving.backend import ModelInfo, model_for
from model.serving.http.completions import respond
from model.serving.http.openapi import StoryResponse, generates, streams
from model.serving.http.response import (
    INVALID,
    ResponseFormat,
    ServiceError,
    as_service_error,
    sse_event,
    times_of,
    usage_of,
)
from model.serving.http.schemas import MODEL_ID, SimpleBody, parse_object
from model.serving.session import GenerationManager, GenerationSession

COMPLETE = "complete"
"""Id of the last event."""
PLACE = re.compile(r"(\d{1,19}):(\d{1,9})")
"""Id of another event: the story's seed, and how many of its characters have come."""
RETRY_MS = 500


class SimpleFormat(ResponseFormat):
    """A `ResponseFormat` of few fields, for one story."""

    def __init__(self, requests: list[GenerationRequest], model: ModelInfo, *, resume_at: int | None = None) -> None:
        """`resume_at`: characters of the story that an `EventSource` has; None: it is none, and gets no ids."""
        self.id = f"story-{uuid.uuid4().hex}"
        (self._request,) = requests
        self._model = model
        self._resume_at = resume_at
        self._seen = 0  # characters generated

    def opening(self) -> bytes:
        """How soon an `EventSource` connects again."""
        return b"" if self._resume_at is None else b"retry: %d\n\n" % RETRY_MS

    def chunk(self, index: int, chunk: Chunk, at: float) -> bytes:
        """`token`, or nothing for a token whose text is still to come."""
        text = chunk.text[max(0, (self._resume_at or 0) - self._seen) :]
        self._seen += len(chunk.text)
        place = "" if self._resume_at is None else f"{self._request.sampling.seed}:{self._seen}"
        return sse_event({"text": text}, "token", place) if text else b""

    def closing(self, completions: list[Completion], served_by: str) -> bytes:
        """`complete`, with the whole object."""
        return sse_event(
            self.whole([], completions, served_by), "complete", "" if self._resume_at is None else COMPLETE
        )

    def whole(self, chunks: list[list[Chunk]], completions: list[Completion], served_by: str) -> dict[str, Any]:
        """The story with all that is known of it."""
        completion = completions[0]
        return {
            "id": self.id,
            "prompt": self._request.prompt,
            "text": completion.text,
            "story": f"{self._request.prompt}{completion.text}",
            "finish_reason": completion.finish_reason,
            "seed": self._request.sampling.seed,
            "model": MODEL_ID,
            "version": self._model.version,
            "served_by": served_by,
            "usage": usage_of(completions),
            "times": times_of(completions),
        }


def router(manager: GenerationManager) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.post("/api/generate", **generates(SimpleBody, StoryResponse))
    async def generate(request: HttpRequest) -> Response:
        """Generate one story, as events or whole."""
        body = SimpleBody.read(parse_object(await request.body()))
        return respond(manager, body.requests(), SimpleFormat, request.headers, stream=body.stream)

    @routes.get("/api/generate", **streams(SimpleBody))
    async def generate_events(request: HttpRequest) -> Response:
        """Stream one story as events, from where the client lost it."""
        last = request.headers.get("last-event-id", "")
        if last == COMPLETE:
            return Response(status_code=204)
        body = SimpleBody.read({"stream": True, **_query(request)})
        requests, resume_at = body.requests(), 0
        if place := PLACE.fullmatch(last):
            sampling = replace(requests[0].sampling, seed=int(place[1]))
            requests, resume_at = [replace(requests[0], sampling=sampling)], int(place[2])
        form = functools.partial(SimpleFormat, resume_at=resume_at)
        return respond(manager, requests, form, request.headers, stream=body.stream)

    return routes


def _query(request: HttpRequest) -> dict[str, Any]:
    """Return the fields of a query; those that are no text are written as in JSON."""
    values: dict[str, Any] = dict(request.query_params)
    for name, text in request.query_params.items():
        if name not in ("prompt", "stop", "user"):
            with contextlib.suppress(ValueError, RecursionError):
                values[name] = json.loads(text)
    if "stop" in values:
        values["stop"] = request.query_params.getlist("stop")
    return values


class Sockets:
    """The Socket.IO side of a service; `app` is mounted at `/socket.io`."""

    def __init__(self, manager: GenerationManager) -> None:
        self._manager = manager
        self._sessions: dict[str, GenerationSession] = {}
        self._closed = False
        self._server = socketio.AsyncServer(
            async_mode="asgi",
            max_http_buffer_size=manager.options.settings.story_max_body,
            cors_allowed_origins=[],  # no check of its own: `SameOriginMiddleware` makes it
        )
        self.app = socketio.ASGIApp(self._server, socketio_path=None)
        self._server.on("generate_story", self._generate)
        self._server.on("stop_story", self._stop)
        self._server.on("disconnect", self._stop)

    async def close(self) -> None:
        """Disconnect all clients; once: a server that drains does it before the lifespan."""
        if self._closed:
            return
        self._closed = True
        clients = [sid for sid, _ in self._server.manager.get_participants("/", None)]
        for sid in clients:
            await self._server.disconnect(sid)
        await self._server.shutdown()

    async def _generate(self, sid: str, data: Any = None) -> None:
        try:
            if sid in self._sessions:
                message = "a story is running; stop it with stop_story first"
                raise ServiceError(409, INVALID, "story_running", message)
            if not isinstance(data, dict):
                raise ServiceError(422, INVALID, "invalid_value", "generate_story needs an object with a prompt")
            requests = SimpleBody.read(data).requests()
            client = self._manager.client_of(self._server.get_environ(sid)["asgi.scope"])
            session = self._sessions[sid] = self._manager.session(requests, client)
            try:
                await self._run(sid, requests, session)
            finally:
                del self._sessions[sid]
        except Exception as error:
            await self._server.emit("story_error", as_service_error(error).body(), to=sid)

    async def _run(self, sid: str, requests: list[GenerationRequest], session: GenerationSession) -> None:
        form = SimpleFormat(requests, model_for(self._manager.backend, requests[0].user))
        async with session:
            async for event in session.events(self._manager.options.keep_alive):
                if event is None:
                    continue
                if event.chunk is not None and event.chunk.text:
                    token = {"id": form.id, "text": event.chunk.text}
                    await self._server.emit("story_token", token, to=sid)
                elif event.completion is not None:
                    whole = form.whole([], [event.completion], session.served_by)
                    await self._server.emit("story_complete", whole, to=sid)

    async def _stop(self, sid: str, _data: Any = None) -> None:
        """End the client's story, because it asked for that or has disconnected."""
        if (session := self._sessions.get(sid)) is not None:
            session.stop()
