"""Merge the streams of one request into a single event sequence and settle its rate-limit reservation.

Every route opens a `GenerationSession` here. It cancels its streams however it is left, so a client that disconnects
frees its slots at the next step; and the `GenerationManager` knows all open sessions, so that a service can drain.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from model.errors import LimitError
from model.generation import Chunk, Completion, GenerationRequest
from model.serving.backend import CACHE, Backend, Stream
from model.serving.http.errors import as_service_error, broke_off, draining
from model.serving.metrics import Meter
from model.serving.rate_limit.clients import UNKNOWN
from model.serving.rate_limit.limiter import Limiter, Reservation

AHEAD = 8
"""Pieces that are read ahead of a client; while one is slow, its backend's own stream keeps the rest."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to one of the streams: a chunk came, it ended, or it failed."""

    index: int
    at: float
    """Seconds since 1970, when the chunk was read from the backend."""
    chunk: Chunk | None = None
    completion: Completion | None = None
    error: Exception | None = None


class GenerationSession:
    """The streams of one request. Made by `GenerationManager.session`."""

    def __init__(self, reservation: Reservation) -> None:
        self.streams: list[Stream] = []
        self.stopped = False
        self._reservation = reservation
        self._aborted = False
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue(AHEAD)
        self._tasks: list[asyncio.Task[None]] = []
        self._told = 0

    @property
    def served_by(self) -> str:
        """Who writes at this moment."""
        return self.streams[0].served_by

    def add(self, stream: Stream) -> None:
        """Tell `stream` too; it ends at once where the telling was ended while it was being opened."""
        self.streams.append(stream)
        self._reservation.commit(stories=1)
        if self.stopped or self._aborted:
            stream.cancel()

    def stop(self) -> None:
        """End the streams because the client says so; each then completes as `cancelled`."""
        self.stopped = True
        self.cancel()

    def abort(self) -> None:
        """End the streams because the service ends; the client is told so."""
        self._aborted = True
        self.cancel()

    def cancel(self) -> None:
        """End the streams at the next step."""
        for stream in self.streams:
            stream.cancel()

    async def events(self, every: float) -> AsyncIterator[Event | None]:
        """All events of all streams as they come, and None after about `every` seconds of silence."""
        self._tasks = [
            asyncio.create_task(self._pump(index, stream)) for index, stream in enumerate(self.streams)
        ]
        self._tasks.append(asyncio.create_task(self._beat(every)))
        left = len(self.streams)
        while left:
            event = await self._queue.get()
            if event is not None:
                self._told += 1
                left -= event.chunk is None
            yield event

    async def close(self) -> None:
        """End what has not ended, and let go of it."""
        self.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # A cancelled task's error leads to its frame and so back here: left in place, each story's states would stay in
        # memory until the collector comes by, which took 200 MB with 16 readers and 600 with 64.
        self._tasks.clear()
        self._reservation.release()

    async def _beat(self, every: float) -> None:
        """Put None into the line after silence.

        One timer for the whole telling instead of one for each wait, and chunks encoded in parts
        (`model.serving.http.completions`), brought the service's own share of a token from 60 to 34 µs.
        """
        while True:
            told = self._told
            await asyncio.sleep(every)
            if told == self._told and self._queue.empty():
                self._queue.put_nowait(None)

    async def _pump(self, index: int, stream: Stream) -> None:
        try:
            async for chunk in stream:
                if stream.served_by != CACHE:
                    self._reservation.commit(tokens=len(chunk.tokens))
                await self._queue.put(Event(index, time.time(), chunk=chunk))
            end = self._end(index, stream.completion)
        except Exception as error:
            end = Event(index, time.time(), error=as_service_error(error))
        await self._queue.put(end)

    def _end(self, index: int, completion: Completion) -> Event:
        if completion.finish_reason == "error":
            return Event(index, time.time(), error=broke_off(completion.error))
        if completion.finish_reason == "cancelled" and not self.stopped:
            error = draining() if self._aborted else broke_off("the story was stopped on this side")
            return Event(index, time.time(), error=error)
        return Event(index, time.time(), completion=completion)


class GenerationManager:
    """Opens tellings on a backend for one service, and knows those that are open."""

    def __init__(self, backend: Backend, meter: Meter, limiter: Limiter | None = None) -> None:
        self.backend = backend
        self.limiter = limiter or Limiter()
        self.draining = False
        self._meter = meter
        self._open: set[GenerationSession] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def open(self) -> int:
        """Requests that are being answered with stories."""
        return len(self._open)

    @contextlib.asynccontextmanager
    async def session(
        self, requests: Sequence[GenerationRequest], client: str = UNKNOWN
    ) -> AsyncIterator[GenerationSession]:
        """Begin one story for each request of `client`; leaving this ends those that have not ended.

        Raises `ServiceError` while draining, `LimitError` where the client has had too much, and what the backend
        raises: `BusyError`, `ModelError`.
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
        """Take no more stories and let those at hand end, for at most `seconds`; then end them.

        Returns whether all ended by themselves.
        """
        self.draining = True
        if await self._wait_until_idle(seconds):
            return True
        self.abort()
        await self._wait_until_idle(2.0)
        return False

    def abort(self) -> None:
        """End all stories now; their clients are told that the service ends."""
        self.draining = True
        for session in list(self._open):
            session.abort()

    async def _wait_until_idle(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
