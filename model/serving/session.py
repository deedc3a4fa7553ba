"""One request from admission to its end, for every interface: page, HTTP, Socket.IO and terminal.

    async with manager.session(requests, client) as session:
        async for event in session.events(every=5.0): ...

A `GenerationSession` merges the streams of one request into a single event sequence and settles its rate-limit
reservation. It cancels its streams however it is left, so a client that disconnects frees its slots at the next step.
Observers (metrics, the recorder of an A/B test) see each event once. The `GenerationManager` knows all open sessions,
so that an application can drain.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

from model.errors import BusyError, DrainingError, GenerationError, InputError, LimitError
from model.generation import Chunk, Completion, GenerationRequest, Usage
from model.serving.backend import CACHE, Backend, Stream, StreamTimer
from model.serving.logs import new_request_id, request_id
from model.settings import ServiceOptions

if TYPE_CHECKING:
    from model.serving.rate_limit import Limiter, Reservation

READ_AHEAD = 8
"""Chunks that are read ahead of a client; while one is slow, its backend's own stream keeps the rest."""
UNKNOWN = "unknown"
"""Client of a connection without an address (a Unix socket), and through a proxy that hides it."""

Outcome = Literal["stop", "length", "cancelled", "error", "refused", "limited", "draining"]
"""A stream's finish reason, or why it was not started: the queue was full, a rate limit was reached, the application
stops. `cancelled` also where the client disconnected."""


@dataclass(slots=True, eq=False)
class Generation:
    """One stream of a session, with what is known of it so far."""

    request: GenerationRequest
    request_id: str = field(default_factory=lambda: request_id.get() or new_request_id())
    timer: StreamTimer = field(default_factory=StreamTimer)
    submitted: bool = False
    stream: Stream | None = None
    places: list[str] = field(default_factory=list)
    """Which backends generated, in their order."""
    completion: Completion | None = None
    outcome: Outcome | None = None
    aborted: bool = False
    """It was cancelled on this side, not by its client."""

    @property
    def usage(self) -> Usage:
        """Counts and times: of the completion, or as far as they are known without one."""
        return self.timer.usage() if self.completion is None else self.completion.usage


@runtime_checkable
class Observer(Protocol):
    """Follows the streams of all sessions. Methods are called in the order of the events and must not block."""

    def submitted(self, generation: Generation) -> None:
        """Handle a stream that is about to be requested from the backend."""

    def received(self, generation: Generation, chunk: Chunk) -> None:
        """Handle a chunk, which `generation.timer` has counted."""

    def ended(self, generation: Generation) -> None:
        """Handle the end of a stream, once; `limited` and `draining` ones were never submitted."""


class Event(NamedTuple):
    """One of the streams yielded a chunk, or ended."""

    number: int
    """Of the stream, from 0."""
    at: float
    """Seconds since 1970, when it was read from the backend."""
    chunk: Chunk | None = None
    completion: Completion | None = None


class GenerationSession:
    """The streams of one request, open inside `async with`. Made by `GenerationManager.session`.

    Entering it raises `DrainingError`, `LimitError` where the client has reached a rate limit, and what the backend
    raises: `BusyError`, `ModelError`.
    """

    def __init__(
        self, manager: GenerationManager, requests: Sequence[GenerationRequest], client: str, stories: int
    ) -> None:
        self.generations = [Generation(request) for request in requests]
        self.stopped = False
        self._manager = manager
        self._client = client
        self._stories = stories
        self._reservation: Reservation | None = None
        self._aborted = False
        self._queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue(READ_AHEAD)
        self._tasks: list[asyncio.Task[None]] = []
        self._events = 0

    @property
    def served_by(self) -> str:
        """Which backend generates now."""
        stream = self.generations[0].stream
        assert stream is not None, "the session is open"
        return stream.served_by

    @property
    def completions(self) -> list[Completion]:
        """How each stream ended, once all have."""
        return [generation.completion for generation in self.generations if generation.completion is not None]

    def stop(self) -> None:
        """End the streams because the client asked for it; each completes as `cancelled`."""
        self.stopped = True
        self._cancel()

    def abort(self) -> None:
        """End the streams because the application stops; the client gets `DrainingError`."""
        self._aborted = True
        self._cancel()

    async def __aenter__(self) -> Self:
        self._manager.track(self, opened=True)
        try:
            await self._open()
        except BaseException:
            await asyncio.shield(self.close())
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(self.close())

    async def events(self, every: float) -> AsyncIterator[Event | None]:
        """Yield all events of all streams as they come, and None after about `every` seconds of silence.

        Raises `GenerationError` and `DrainingError` when a stream ends too early, and what a stream raises.
        """
        self._tasks = [asyncio.create_task(self._pump(index)) for index in range(len(self.generations))]
        self._tasks.append(asyncio.create_task(self._beat(every)))
        left = len(self.generations)
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
        self._cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # A cancelled task's error refers to its frame and so back here: left in place, each stream's states would stay
        # in memory until the garbage collector runs, which took 200 MB with 16 clients and 600 with 64.
        self._tasks.clear()
        try:
            for generation in self.generations:
                if generation.submitted:
                    self._end(generation, "cancelled")
        finally:
            if self._reservation is not None:
                self._reservation.release()
            self._manager.track(self, opened=False)

    async def _open(self) -> None:
        """Pass admission and submit each request."""
        manager = self._manager
        try:
            if manager.draining:
                raise DrainingError
            if manager.limiter is not None:
                requests = [generation.request for generation in self.generations]
                self._reservation = await manager.limiter.admit(self._client, requests, self._stories)
        except (DrainingError, LimitError) as error:
            for generation in self.generations:
                self._end(generation, "limited" if isinstance(error, LimitError) else "draining")
            raise
        for generation in self.generations:
            generation.submitted = True
            for observer in manager.observers:
                observer.submitted(generation)
            try:
                stream = generation.stream = await manager.backend.submit(generation.request)
            except Exception as error:
                self._end(generation, "refused" if isinstance(error, BusyError | InputError) else "error")
                raise
            if self._reservation is not None:
                self._reservation.commit(stories=int(self._stories > 0))
                self._stories -= 1
            if self.stopped or self._aborted:  # meanwhile
                stream.cancel()

    def _cancel(self) -> None:
        """End the streams at the next step."""
        for generation in self.generations:
            if generation.stream is not None:
                generation.stream.cancel()

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

    async def _pump(self, index: int) -> None:
        generation = self.generations[index]
        stream = generation.stream
        assert stream is not None, "the session is open"
        try:
            async for chunk in stream:
                self._receive(generation, stream.served_by, chunk)
                await self._queue.put(Event(index, time.time(), chunk=chunk))
            end: Event | Exception = Event(index, time.time(), completion=self._complete(generation, stream.completion))
        except Exception as error:
            self._end(generation, "error")
            end = error
        await self._queue.put(end)

    def _receive(self, generation: Generation, served_by: str, chunk: Chunk) -> None:
        if not generation.places or generation.places[-1] != served_by:
            generation.places.append(served_by)
        generation.timer.add(chunk)
        if self._reservation is not None and served_by != CACHE:
            self._reservation.commit(tokens=len(chunk.tokens))
        for observer in self._manager.observers:
            observer.received(generation, chunk)

    def _complete(self, generation: Generation, completion: Completion) -> Completion:
        """Settle a stream that has ended. Raises where its client did not get the whole of it."""
        generation.completion = completion
        generation.aborted = completion.finish_reason == "cancelled" and not self.stopped
        self._end(generation, completion.finish_reason)
        if generation.aborted:
            raise DrainingError if self._aborted else GenerationError("the story was stopped on this side")
        if completion.finish_reason == "error":
            raise GenerationError(completion.error or "the model could not go on")
        return completion

    def _end(self, generation: Generation, outcome: Outcome) -> None:
        """Note the outcome of a stream; only the first one counts."""
        if generation.outcome is None:
            generation.outcome = outcome
            for observer in self._manager.observers:
                observer.ended(generation)


class GenerationManager:
    """Opens sessions on a backend for one application, and knows those that are open."""

    def __init__(
        self,
        backend: Backend,
        *,
        limiter: Limiter | None = None,
        observers: Sequence[Observer] = (),
        options: ServiceOptions | None = None,
    ) -> None:
        """A backend that is an `Observer` follows its own streams."""
        self.backend = backend
        self.limiter = limiter
        self.observers = [*observers, backend] if isinstance(backend, Observer) else [*observers]
        self.options = options or ServiceOptions()
        self.draining = False
        self._open: set[GenerationSession] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def open(self) -> int:
        """Number of open sessions."""
        return len(self._open)

    def client_of(self, scope: Any) -> str:
        """Return the client of an ASGI connection, as the rate limiter counts it."""
        return UNKNOWN if self.limiter is None else self.limiter.clients.of(scope)

    def session(
        self, requests: Sequence[GenerationRequest], client: str = UNKNOWN, stories: int | None = None
    ) -> GenerationSession:
        """Return a session of one stream for each request of `client`, to be entered.

        `stories`: for how many of them the rate limits count it; None: for all.
        """
        return GenerationSession(self, requests, client, len(requests) if stories is None else stories)

    def track(self, session: GenerationSession, *, opened: bool) -> None:
        """Count a session as open, or no longer."""
        (self._open.add if opened else self._open.discard)(session)
        (self._idle.clear if self._open else self._idle.set)()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the backend; on exit end all sessions first."""
        async with self.backend.running():
            try:
                yield
            finally:
                await self._abort_all()

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests and let open sessions end, for at most `seconds`; then abort them.

        Returns whether all ended by themselves.
        """
        self.draining = True
        ended = await self._idle_within(seconds)
        if not ended:
            await self._abort_all()
        return ended

    def abort(self) -> None:
        """End all sessions now; their clients get an error that says that the application stops."""
        self.draining = True
        for session in list(self._open):
            session.abort()

    async def _abort_all(self) -> None:
        """Abort all sessions, and close those whose clients do not read."""
        self.abort()
        if not await self._idle_within(2.0):
            await asyncio.gather(*(session.close() for session in list(self._open)))

    async def _idle_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return self._idle.is_set()
