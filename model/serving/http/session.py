"""One request from admission to its last byte.

A `GenerationSession` merges the streams of one request into a single event sequence and settles its rate-limit
reservation. It cancels its streams however it is left, so a client that disconnects frees its slots at the next step.
The `GenerationManager` knows all open sessions, so that a service can drain. A `GenerationResponse` sends a session
over HTTP, as server-sent events or whole; how it is encoded is up to a `ResponseFormat`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from model.errors import LimitError
from model.generation import Chunk, Completion, GenerationRequest
from model.serving.backend import CACHE, Backend, Stream
from model.serving.http.errors import (
    EVENT_STREAM,
    KEEP_ALIVE,
    as_service_error,
    broke_off,
    draining,
    json_response,
    sse_event,
)
from model.serving.http.options import ServiceOptions
from model.serving.metrics import Meter
from model.serving.rate_limit import UNKNOWN, Limiter, Reservation

READ_AHEAD = 8
"""Chunks that are read ahead of a client; while one is slow, its backend's own stream keeps the rest."""
STREAM_HEADERS = [
    (b"content-type", EVENT_STREAM.encode()),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # keeps nginx and its like from buffering
]


@dataclass(frozen=True, slots=True)
class Event:
    """One of the streams yielded a chunk, or ended."""

    index: int
    at: float
    """Seconds since 1970, when it was read from the backend."""
    chunk: Chunk | None = None
    completion: Completion | None = None


class GenerationSession:
    """The streams of one request. Made by `GenerationManager.session`."""

    def __init__(self, reservation: Reservation) -> None:
        self.streams: list[Stream] = []
        self.stopped = False
        self._reservation = reservation
        self._aborted = False
        self._queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue(READ_AHEAD)
        self._tasks: list[asyncio.Task[None]] = []
        self._events = 0

    @property
    def served_by(self) -> str:
        """Which backend generates now."""
        return self.streams[0].served_by

    @property
    def completions(self) -> list[Completion]:
        """How each stream ended, once all have."""
        return [stream.completion for stream in self.streams]

    def add(self, stream: Stream) -> None:
        """Add a stream; it is cancelled at once where the session was ended while it was being opened."""
        self.streams.append(stream)
        self._reservation.commit(stories=1)
        if self.stopped or self._aborted:
            stream.cancel()

    def stop(self) -> None:
        """End the streams because the client asked for it; each completes as `cancelled`."""
        self.stopped = True
        self.cancel()

    def abort(self) -> None:
        """End the streams because the service stops; the client gets an error that says so."""
        self._aborted = True
        self.cancel()

    def cancel(self) -> None:
        """End the streams at the next step."""
        for stream in self.streams:
            stream.cancel()

    async def events(self, every: float) -> AsyncIterator[Event | None]:
        """Yield all events of all streams as they come, and None after about `every` seconds of silence.

        Raises `ServiceError` when a stream fails.
        """
        self._tasks = [asyncio.create_task(self._pump(index, stream)) for index, stream in enumerate(self.streams)]
        self._tasks.append(asyncio.create_task(self._beat(every)))
        left = len(self.streams)
        while left:
            event = await self._queue.get()
            if isinstance(event, Exception):
                raise event
            if event is not None:
                self._events += 1
                left -= event.chunk is None
            yield event

    async def close(self) -> None:
        """Cancel what has not ended and release the reservation."""
        self.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # A cancelled task's error refers to its frame and so back here: left in place, each stream's states would stay
        # in memory until the garbage collector runs, which took 200 MB with 16 clients and 600 with 64.
        self._tasks.clear()
        self._reservation.release()

    async def _beat(self, every: float) -> None:
        """Queue None after silence.

        One timer for the whole session instead of one for each wait, and chunks encoded in parts
        (`model.serving.http.completions`), brought the service's own share of a token from 60 to 34 µs.
        """
        while True:
            before = self._events
            await asyncio.sleep(every)
            if before == self._events and self._queue.empty():
                self._queue.put_nowait(None)

    async def _pump(self, index: int, stream: Stream) -> None:
        try:
            async for chunk in stream:
                if stream.served_by != CACHE:
                    self._reservation.commit(tokens=len(chunk.tokens))
                await self._queue.put(Event(index, time.time(), chunk=chunk))
            completion = stream.completion
            if completion.finish_reason == "error":
                raise broke_off(completion.error)
            if completion.finish_reason == "cancelled" and not self.stopped:
                raise draining() if self._aborted else broke_off("the story was stopped on this side")
            end: Event | Exception = Event(index, time.time(), completion=completion)
        except Exception as error:
            end = as_service_error(error)
        await self._queue.put(end)


class GenerationManager:
    """Opens sessions on a backend for one service, and knows those that are open."""

    def __init__(
        self, backend: Backend, meter: Meter, limiter: Limiter | None = None, options: ServiceOptions | None = None
    ) -> None:
        self.backend = backend
        self.limiter = limiter or Limiter()
        self.options = options or ServiceOptions()
        self.draining = False
        self._meter = meter
        self._open: set[GenerationSession] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def open(self) -> int:
        """Number of open sessions."""
        return len(self._open)

    @contextlib.asynccontextmanager
    async def session(
        self, requests: Sequence[GenerationRequest], client: str = UNKNOWN
    ) -> AsyncIterator[GenerationSession]:
        """Start one stream for each request of `client`; leaving this cancels those that have not ended.

        Raises `ServiceError` while draining, `LimitError` where the client has reached a rate limit, and what the
        backend raises: `BusyError`, `ModelError`.
        """
        if self.draining:
            self._meter.refused("draining", len(requests))
            raise draining()
        try:
            reservation = await self.limiter.admit(client, requests)
        except LimitError:
            self._meter.refused("limited", len(requests))
            raise
        session = GenerationSession(reservation)
        self._open.add(session)
        self._idle.clear()
        try:
            for request in requests:
                session.add(await self.backend.submit(request))
            yield session
        finally:
            await asyncio.shield(self._close(session))

    async def _close(self, session: GenerationSession) -> None:
        try:
            await session.close()
        finally:
            self._open.discard(session)
            if not self._open:
                self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests and let open sessions end, for at most `seconds`; then abort them.

        Returns whether all ended by themselves.
        """
        self.draining = True
        if await self._idle_within(seconds):
            return True
        self.abort()
        await self._idle_within(2.0)
        return False

    def abort(self) -> None:
        """End all sessions now; their clients get an error that says that the service stops."""
        self.draining = True
        for session in list(self._open):
            session.abort()

    async def _idle_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return self._idle.is_set()


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
            async with manager.session(self._requests, manager.limiter.clients.of(scope)) as session:
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
                chunks[event.index].append(event.chunk)
        return self._form.whole(chunks, session.completions, session.served_by)

    async def _send_events(self, session: GenerationSession, send: Send) -> None:
        name = (b"x-story-backend", self._name(session).encode("latin-1", "replace"))
        await send({"type": "http.response.start", "status": 200, "headers": [*STREAM_HEADERS, name]})
        try:
            await _send(send, self._form.opening())
            async for event in session.events(self._manager.options.keep_alive):
                await _send(send, self._encode(event))
            await _send(send, self._form.closing(session.completions, session.served_by))
        except _ClientGoneError:
            raise
        except Exception as error:
            await _send(send, sse_event(as_service_error(error).body(), "error"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _encode(self, event: Event | None) -> bytes:
        if event is None:
            return KEEP_ALIVE
        if event.chunk is not None:
            return self._form.chunk(event.index, event.chunk, event.at)
        assert event.completion is not None, "an event is a chunk or an end"
        return self._form.ended(event.index, event.completion)


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
