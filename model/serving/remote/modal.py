"""Backend over the service on Modal, or any server of its API at `MODAL_ENDPOINT_URL`, behind a circuit breaker.

Each stream is read by a task of its own, so that a cancel closes the connection at once, whatever the client is doing,
and the slot at the other end is free a moment later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from model.errors import StoryError
from model.generation import Chunk, Completion, FinishReason, GenerationRequest
from model.serving.backend import Health, ModelInfo, StreamRecorder, finished
from model.serving.remote.client import ServiceClient, Timeouts
from model.serving.remote.protocol import Counts, RemoteError, WireEvent

if TYPE_CHECKING:
    from model.serving.backend import Stream

ACCEPT_TIMEOUT = 0.4
"""Seconds that `submit` waits for the service to accept a request, so that it can raise a refusal itself. While a
container is still starting, the stream is returned, so that its client can see that it waits, and cancel."""
COLD_START_TIMEOUT = 150.0
"""Seconds that a probe waits for its first token: longer than a cold start. No user waits for it."""
PROBE = GenerationRequest(prompt="Once", max_tokens=1)
"""The smallest request that proves that the service admits, has a slot, and generates."""
FINGERPRINT_TTL = 30.0
"""Seconds for which the version of the last response is taken to serve the next request."""
CONNECTIONS = 256
"""Streams at once; how many are generated at once is up to the service."""

log = logging.getLogger(__name__)


class Breaker:
    """Circuit breaker (Nygard, Release It!, 2007) of one service. Used from one event loop.

    Closed, every request may use the service. After several failures in a row it opens, and no request waits for the
    service any more. After `reset` seconds it is half open: one probe, for which no user waits, closes it by success or
    restarts the pause by failure.
    """

    def __init__(self, limit: int, reset: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`limit`: failures in a row that open it. `reset`: seconds from then to the probe."""
        self._limit = limit
        self._reset = reset
        self._clock = clock
        self._opened_at: float | None = None
        self._probing = False
        self.failures = 0
        """Failures in a row."""
        self.reason = ""
        """The last one, for an operator."""

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        """`half-open` while a probe runs."""
        if self._opened_at is None:
            return "closed"
        return "half-open" if self._probing else "open"

    @property
    def closed(self) -> bool:
        """Whether requests may use the service."""
        return self._opened_at is None

    @property
    def wait(self) -> float:
        """Seconds until the next probe is due; 0 when it is due, or none is needed."""
        if self._opened_at is None:
            return 0.0
        return max(0.0, self._opened_at + self._reset - self._clock())

    def succeeded(self) -> None:
        """Close: the service works."""
        self.failures = 0
        self.reason = ""
        self._opened_at = None
        self._probing = False

    def failed(self, reason: str, *, slow: bool = False) -> None:
        """Count a failure. A slow one opens at once: each further one would cost a user that wait.

        A request that started before the breaker opened, and fails afterwards, does not prolong the pause.
        """
        self.failures += 1
        self.reason = reason
        if self._opened_at is None and (slow or self.failures >= self._limit):
            self._opened_at = self._clock()

    def probe(self) -> bool:
        """Take the right to probe, if the pause is over and no probe runs; report the outcome afterwards."""
        if self._opened_at is None or self._probing or self.wait > 0:
            return False
        self._probing = True
        return True

    def probe_failed(self, reason: str) -> None:
        """Restart the pause: the service is still down."""
        self.failures += 1
        self.reason = reason
        self._probing = False
        if self._opened_at is not None:
            self._opened_at = self._clock()


class _State:
    """Shared by the task that reads a stream and the `ModalStream` that is iterated."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.version: str | None = None
        self.recorder = StreamRecorder()
        self.pending: deque[Chunk] = deque()
        self.changed = asyncio.Event()
        self.accepted = asyncio.Event()
        """Set when the service has answered, and in any case at the end."""
        self.finish: FinishReason | None = None
        self.counts: Counts | None = None
        self.completion: Completion | None = None
        self.failure: RemoteError | None = None

    def take(self, event: WireEvent) -> None:
        """Keep what came, and wake the client."""
        if event.chunk is not None:
            self.recorder.add(event.chunk)
            self.pending.append(event.chunk)
        self.finish = event.finish or self.finish
        self.counts = event.counts or self.counts
        self.version = event.version or self.version
        if event.done and self.finish is not None:
            self.end(self.finish)
        self.changed.set()

    @property
    def fingerprint(self) -> str | None:
        """What generates, once the service has said so."""
        return None if self.version is None else f"{self.version} at {self.url}"

    def end(self, finish: FinishReason, failure: RemoteError | None = None) -> None:
        """End the stream; only the first call counts."""
        if self.completion is not None:
            return
        usage = self.recorder.usage()
        if (counts := self.counts) is not None:
            usage = replace(
                usage,
                prompt_tokens=counts.prompt_tokens,
                completion_tokens=counts.completion_tokens,
                queued=counts.queued,
            )
        self.failure = failure
        self.completion = self.recorder.completion(finish, usage, None if failure is None else str(failure))
        self.accepted.set()
        self.changed.set()


class ModalStream:
    """A stream of the service. Read it in the event loop that started it; cancel it from anywhere.

    A failure before the first token is raised by the iteration, a later one is in `completion`.
    """

    served_by = "modal"

    def __init__(self, state: _State, task: asyncio.Task[None]) -> None:
        self._state = state
        self._task = task  # refers to the state, not to this stream: one that is garbage-collected is cancelled
        self._loop = task.get_loop()

    @property
    def failure(self) -> RemoteError | None:
        """Why the service could not finish, if it could not."""
        return self._state.failure

    @property
    def fingerprint(self) -> str | None:
        """See `FingerprintedBackend.fingerprint_of`."""
        return self._state.fingerprint

    @property
    def started(self) -> bool:
        """Whether any chunk has come."""
        return bool(self._state.recorder.chunks)

    @property
    def completion(self) -> Completion:
        """How the stream ended. Raises `StoryError` while it is open."""
        return finished(self._state.completion)

    def cancel(self) -> None:
        """Close the connection at once. Harmless when the stream has ended."""
        if self._state.completion is None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)

    async def accepted(self, seconds: float) -> None:
        """Wait until the service has accepted or refused the request, for at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._state.accepted.wait()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        state = self._state
        while not state.pending:
            if state.completion is not None:
                if state.failure is not None and not self.started:
                    raise state.failure.raised
                raise StopAsyncIteration
            state.changed.clear()
            await state.changed.wait()
        return state.pending.popleft()

    def __del__(self) -> None:
        self.cancel()


class ModalBackend:
    """The service on Modal. It works between entering and leaving `running`."""

    name = "modal"
    capacity = CONNECTIONS

    def __init__(
        self,
        endpoint: Callable[[], str],
        *,
        model: ModelInfo,
        timeouts: Timeouts,
        breaker: Breaker,
        headers: dict[str, str] | None = None,
        fail_fast: bool = False,
    ) -> None:
        """`endpoint` returns the address for a new request and may block for a moment; `headers` are sent with each.

        `fail_fast`: there is a fallback, so give up soon.
        """
        self.model = model
        self.breaker = breaker
        self._endpoint = endpoint
        self._url: str | None = None
        self._fingerprint: tuple[str, str | None, float] = ("", None, 0.0)  # address, fingerprint, when seen
        self._timeouts = timeouts
        self._headers = headers or {}
        self._fail_fast = fail_fast
        self._client: ServiceClient | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._opened = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep connections, and probe a service that failed; on exit cancel open streams."""
        self._client = ServiceClient(self._headers, self._timeouts, connections=CONNECTIONS, fail_fast=self._fail_fast)
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            tasks = [watch, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.aclose()
            self._client = None

    def health(self) -> Health:
        """As the last requests and probes have shown."""
        breaker = self.breaker
        detail = "ready" if breaker.closed else f"Modal failed: {breaker.reason}"
        return Health(breaker.closed, self.name, detail, None, breaker.state)

    async def usable(self) -> bool:
        """Whether a new request should try the service. A new address starts with a closed breaker."""
        url = await asyncio.to_thread(self._endpoint)
        if url != self._url:
            if self._url is not None:
                log.info("new requests go to another deployment on Modal")
                self.breaker.succeeded()
            self._url = url
        return self.breaker.closed

    async def fingerprint(self) -> str | None:
        """What served the last request, if that was recent: another version may be deployed at any time."""
        await self.usable()
        url, fingerprint, seen = self._fingerprint
        return fingerprint if url == self._url and time.monotonic() - seen < FINGERPRINT_TTL else None

    def fingerprint_of(self, stream: Stream) -> str | None:
        """As the service said in the stream."""
        return stream.fingerprint if isinstance(stream, ModalStream) else None

    async def submit(self, request: GenerationRequest) -> Stream:
        """Start a stream; see `Backend.submit`."""
        stream = await self.open(request)
        if stream.failure is not None and not stream.started:
            raise stream.failure.raised
        return stream

    async def open(self, request: GenerationRequest) -> ModalStream:
        """Do as `submit`, but return a refusal as the stream's `failure`."""
        await self.usable()
        url, client = self._url, self._client
        if url is None or client is None:
            raise StoryError("the backend is not running")
        state = _State(url)
        task = asyncio.create_task(self._read(client, request, state))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        stream = ModalStream(state, task)
        await stream.accepted(ACCEPT_TIMEOUT)
        return stream

    async def _read(self, client: ServiceClient, request: GenerationRequest, state: _State) -> None:
        """Read one stream to its end and report the outcome to the breaker."""
        try:
            await client.stream(state.url, request, accepted=state.accepted.set, take=state.take)
            if state.finish is None:
                raise RemoteError("the service ended the stream without a finish reason")
            state.end(state.finish)
            self.breaker.succeeded()
            self._fingerprint = (state.url, state.fingerprint, time.monotonic())
        except asyncio.CancelledError:
            state.end("cancelled")
            raise
        except RemoteError as failure:
            self._failed(failure)
            state.end("error", failure)
        except Exception as error:  # an address that no socket takes, a bug of ours: the stream must end
            log.exception("a request to Modal failed unexpectedly")
            unexpected = RemoteError(type(error).__name__)
            self._failed(unexpected)
            state.end("error", unexpected)

    def _failed(self, failure: RemoteError) -> None:
        log.warning("a request to Modal failed: %s", failure.reason)
        if failure.trips_breaker:
            self.breaker.failed(failure.reason, slow=failure.slow)
            if not self.breaker.closed:
                self._opened.set()

    async def _watch(self) -> None:
        """While the breaker is open, probe the service after each pause."""
        while True:
            await self._opened.wait()
            self._opened.clear()
            while not self.breaker.closed:
                await asyncio.sleep(self.breaker.wait)
                if self.breaker.probe():
                    await self._probe()

    async def _probe(self) -> None:
        """Request one token, with enough time for a cold start."""
        assert self._client is not None, "probes are made while running"
        timeouts = replace(self._timeouts, first_token=COLD_START_TIMEOUT, start=COLD_START_TIMEOUT)
        try:
            url = await asyncio.to_thread(self._endpoint)
            await self._client.stream(url, PROBE, accepted=_ignore, take=_ignore, timeouts=timeouts)
        except RemoteError as failure:
            self.breaker.probe_failed(failure.reason)
        except Exception as error:
            log.exception("a probe of Modal failed")
            self.breaker.probe_failed(type(error).__name__)
        else:
            log.info("Modal is available again")
            self.breaker.succeeded()


def _ignore(*_anything: object) -> None:
    """Discard the events of a probe."""
