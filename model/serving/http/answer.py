"""From a request's streams to its response: events as they come, or the whole at the end.

One ASGI object does all of it, so that one place knows when the client goes away. It watches the connection
from before the first stream is opened to after the last byte; when the client is gone, or sending fails, its
streams end. How the words are dressed is left to an `Answer`.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from model.generation import Chunk, Completion, GenerationRequest
from model.serving.http.errors import as_service_error
from model.serving.http.session import Event, GenerationManager, GenerationSession
from model.serving.http.wire import EVENT_STREAM, KEEP_ALIVE, event, json_bytes

STREAM_HEADERS = [
    (b"content-type", EVENT_STREAM.encode()),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
"""Those of an event stream; the last keeps nginx and its like from gathering what should flow."""


class Answer(Protocol):
    """The form of an answer. Its methods are called in the order in which they stand here."""

    def opening(self) -> bytes:
        """What comes before the first chunk."""
        ...

    def chunk(self, index: int, chunk: Chunk, at: float) -> bytes:
        """The event of a chunk that was read at `at` (seconds since 1970)."""
        ...

    def ended(self, index: int, completion: Completion) -> bytes:
        """The event of a story's end."""
        ...

    def closing(self, completions: list[Completion], served_by: str) -> bytes:
        """What comes after all stories have ended."""
        ...

    def whole(
        self, chunks: list[list[Chunk]], completions: list[Completion], served_by: str
    ) -> dict[str, Any]:
        """Everything at once, for a client that did not ask for events."""
        ...


class StoryResponse(Response):
    """Tells `requests` in the form of `answer`, as events if `stream`, else as one JSON object."""

    def __init__(
        self,
        manager: GenerationManager,
        requests: list[GenerationRequest],
        answer: Answer,
        *,
        stream: bool,
        name: str,
        keep_alive: float,
    ) -> None:
        """`name`: of this copy, empty for that of the writer; `keep_alive`: seconds between comments."""
        super().__init__()
        self._manager = manager
        self._requests = requests
        self._answer = answer
        self._stream = stream
        self._name = name
        self._keep_alive = keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or leave off when the client is gone."""
        work = asyncio.create_task(self._tell(scope, receive, send))
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

    async def _tell(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._manager.session(
                self._requests, self._manager.limiter.clients.of(scope)
            ) as session:
                if self._stream:
                    await self._tell_events(session, send)
                    return
                body = await self._tell_whole(session)
                headers = {"x-story-backend": self._name or session.served_by}
                response = Response(json_bytes(body), headers=headers, media_type="application/json")
        except _ClientGoneError:
            return
        except Exception as error:
            response = as_service_error(error).response()
        await response(scope, receive, send)

    async def _tell_whole(self, session: GenerationSession) -> dict[str, Any]:
        chunks: list[list[Chunk]] = [[] for _ in self._requests]
        completions: dict[int, Completion] = {}
        async for what in session.events(self._keep_alive):
            if what is None:
                continue
            if what.error is not None:
                raise what.error
            if what.chunk is not None:
                chunks[what.index].append(what.chunk)
            elif what.completion is not None:
                completions[what.index] = what.completion
        ordered = [completions[index] for index in range(len(self._requests))]
        return self._answer.whole(chunks, ordered, session.served_by)

    async def _tell_events(self, session: GenerationSession, send: Send) -> None:
        served_by = (b"x-story-backend", (self._name or session.served_by).encode("latin-1", "replace"))
        await send({"type": "http.response.start", "status": 200, "headers": [*STREAM_HEADERS, served_by]})
        completions: dict[int, Completion] = {}
        try:
            await _send(send, self._answer.opening())
            async for what in session.events(self._keep_alive):
                await _send(send, self._event(what, completions))
            ordered = [completions[index] for index in range(len(self._requests))]
            await _send(send, self._answer.closing(ordered, session.served_by))
        except _ClientGoneError:
            raise
        except Exception as error:
            await _send(send, event(as_service_error(error).body(), "error"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _event(self, what: Event | None, completions: dict[int, Completion]) -> bytes:
        if what is None:
            return KEEP_ALIVE
        if what.chunk is not None:
            return self._answer.chunk(what.index, what.chunk, what.at)
        if what.completion is not None:
            completions[what.index] = what.completion
            return self._answer.ended(what.index, what.completion)
        assert what.error is not None, "an event is a chunk, an end or an error"
        raise what.error


class _ClientGoneError(Exception):
    """Sending failed: nobody reads any more. Apart from `OSError`, which a backend may raise too."""


async def _send(send: Send, body: bytes) -> None:
    if not body:
        return
    try:
        await send({"type": "http.response.body", "body": body, "more_body": True})
    except OSError:
        raise _ClientGoneError from None


async def _disconnected(receive: Receive) -> None:
    """Returns when the client is gone; the body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


def usage_of(completions: list[Completion]) -> dict[str, Any]:
    """Token counts of a request; its prompt counts once, however many stories begin with it."""
    prompt = completions[0].usage.prompt_tokens
    written = sum(completion.usage.completion_tokens for completion in completions)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def times_of(completions: list[Completion]) -> dict[str, float]:
    """Seconds, as the backend measured them: the longest wait, the earliest first token, the latest end."""
    usages = [completion.usage for completion in completions]
    return {
        "queued": round(max(usage.queued for usage in usages), 6),
        "ttft": round(min(usage.ttft for usage in usages), 6),
        "duration": round(max(usage.duration for usage in usages), 6),
    }
