"""Send the events of a `GenerationSession` over HTTP, as server-sent events or whole.

How a response is encoded is up to a `ResponseFormat`.
"""

import asyncio
import contextlib
from abc import ABC, abstractmethod
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from model.generation import Chunk, Completion, GenerationRequest
from model.serving.http.errors import EVENT_STREAM, KEEP_ALIVE, as_service_error, json_response, sse_event
from model.serving.session import GenerationManager, GenerationSession

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
