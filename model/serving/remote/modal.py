"""Backend over the service on Modal, or any server of its API at `MODAL_ENDPOINT_URL`, behind a circuit breaker.

Each stream is read by a task of its own, so that a cancel closes the connection at once, whatever the client is doing,
and the slot at the other end is free a moment later.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any, Literal, Self

from model.errors import StoryError
from model.generation import Chunk, FinishReason, GenerationRequest
from model.serving.backend import Health, ModelInfo, RecordedStream, Stream
from model.serving.remote.client import CONNECTIONS, RemoteError, ServiceClient, WireEvent

ACCEPT_TIMEOUT = 0.4
"""Seconds that `submit` waits for the service to accept a request, so that it can raise a refusal itself. While a
container is still starting, the stream is returned, so that its client can see that it waits, and cancel."""
COLD_START_TIMEOUT = 150.0
"""Seconds that a probe waits for its first token: longer than a cold start. No user waits for it."""
PROBE = GenerationRequest(prompt="Once", max_tokens=1)
"""The smallest request that proves that the service admits, has a slot, and generates."""
FINGERPRINT_TTL = 30.0
"""Seconds for which the version of the last response is taken to serve the next request."""

log = logging.getLogger(__name__)


class Breaker:
    """Circuit breaker (Nygard, Release It!, 2007) of one service.

    Closed, every request may use the service. After several failures in a row it opens, and no request waits for the
    service any more. After `reset` seconds it is half open: one probe, for which no user waits, closes it by success or
    restarts the pause by failure.
    """

    def __init__(self, limit: int, reset: float) -> None:
        """`limit`: failures in a row that open it. `reset`: seconds from then to the probe."""
        self.reset = reset
        self.state: Literal["closed", "open", "half-open"] = "closed"
        """`half-open` while a probe runs."""
        self.failures = 0
        """Failures in a row."""
        self.reason = ""
        """The last one, for an operator."""
        self._limit = limit

    @property
    def closed(self) -> bool:
        """Whether requests may use the service."""
        return self.state == "closed"

    def succeeded(self) -> None:
        """Close: the service works."""
        self.failures = 0
        self.reason = ""
        self.state = "closed"

    def failed(self, reason: str, *, slow: bool = False) -> None:
        """Count a failure. A slow one opens at once: each further one would cost a user that wait."""
        self.failures += 1
        self.reason = reason
        if self.closed and (slow or self.failures >= self._limit):
            self.state = "open"

    async def recover(self, probe: Callable[[], Coroutine[Any, Any, str]]) -> None:
        """Probe after each pause until it is closed; `probe` returns what failed, empty: the service works."""
        while not self.closed:
            self.state = "open"
            await asyncio.sleep(self.reset)
            if self.closed:  # by a request that had started before
                return
            self.state = "half-open"
            reason = await probe()
            if not reason:
                self.succeeded()
            elif not self.closed:
                self.failed(reason)


class ModalStream(RecordedStream):
    """A stream of the service.

    A failure before the first token is raised by the iteration, a later one is in `completion`.
    """

    served_by = "modal"

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.task: asyncio.Task[None] | None = None
        """Reads the stream."""
        self.accepted = asyncio.Event()
        """Set when the service has answered, and in any case at the end."""
        self.finish: FinishReason | None = None
        """As the service has sent it."""
        self.failure: RemoteError | None = None
        """Why the service could not finish, if it could not."""
        self._counts: dict[str, Any] = {}
        self._pending: deque[Chunk] = deque()
        self._changed = asyncio.Event()

    @property
    def begun(self) -> bool:
        """Whether any chunk has come."""
        return bool(self.chunks)

    def cancel(self) -> None:
        """Close the connection at once. Harmless when the stream has ended."""
        if self.ended is None and self.task is not None:
            self.task.cancel()

    def take(self, event: WireEvent) -> None:
        """Keep what came, and wake the client."""
        if event.chunk is not None:
            self.add(event.chunk)
            self._pending.append(event.chunk)
        self.finish = event.finish or self.finish
        self._counts = event.counts or self._counts
        if event.version is not None:
            self.fingerprint = f"{event.version} at {self.url}"
        if event.done and self.finish is not None:
            self.over(self.finish)
        self._changed.set()

    def over(self, finish: FinishReason, failure: RemoteError | None = None) -> None:
        """End the stream; only the first call counts."""
        if self.ended is None:
            self.failure = failure
            self.end(finish, replace(self.usage(), **self._counts), None if failure is None else str(failure))
            self.accepted.set()
            self._changed.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while not self._pending:
            if self.ended is not None:
                if self.failure is not None and not self.begun:
                    raise self.failure.raised
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._pending.popleft()


class ModalBackend:
    """The service on Modal. It works between entering and leaving `running`."""

    name = "modal"
    capacity = CONNECTIONS

    def __init__(
        self, endpoint: Callable[[], str], connect: Callable[[], ServiceClient], *, model: ModelInfo, breaker: Breaker
    ) -> None:
        """`endpoint` returns the address for a new request and may block for a moment."""
        self.model = model
        self.breaker = breaker
        self._endpoint = endpoint
        self._url: str | None = None
        self._fingerprint: tuple[str, str | None, float] = ("", None, 0.0)  # address, fingerprint, when seen
        self._connect = connect
        self._client: ServiceClient | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._recovery: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep connections, and probe a service that failed; on exit cancel open streams."""
        self._client = self._connect()
        try:
            yield
        finally:
            tasks = list(self._tasks)
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

    async def submit(self, request: GenerationRequest) -> Stream:
        """Start a stream; see `Backend.submit`."""
        stream = await self.open(request)
        if stream.failure is not None and not stream.begun:
            raise stream.failure.raised
        return stream

    async def open(self, request: GenerationRequest) -> ModalStream:
        """Do as `submit`, but return a refusal as the stream's `failure`."""
        await self.usable()
        url, client = self._url, self._client
        if url is None or client is None:
            raise StoryError("the backend is not running")
        stream = ModalStream(url)
        stream.task = self._start(self._read(client, request, stream))
        try:
            async with asyncio.timeout(ACCEPT_TIMEOUT):
                await stream.accepted.wait()
        except TimeoutError:
            pass
        except BaseException:
            stream.cancel()
            raise
        return stream

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _read(self, client: ServiceClient, request: GenerationRequest, stream: ModalStream) -> None:
        """Read one stream to its end and report the outcome to the breaker."""
        try:
            await client.stream(stream.url, request, accepted=stream.accepted.set, take=stream.take)
            if stream.finish is None:
                raise RemoteError("the service ended the stream without a finish reason")
            stream.over(stream.finish)
            self.breaker.succeeded()
            self._fingerprint = (stream.url, stream.fingerprint, time.monotonic())
        except RemoteError as failure:
            self._failed(failure)
            stream.over("error", failure)
        except Exception as error:  # an address that no socket takes, a bug of ours: the stream must end
            log.exception("a request to Modal failed unexpectedly")
            unexpected = RemoteError(type(error).__name__)
            self._failed(unexpected)
            stream.over("error", unexpected)
        finally:
            stream.over("cancelled")

    def _failed(self, failure: RemoteError) -> None:
        log.warning("a request to Modal failed: %s", failure.reason)
        if failure.trips_breaker:
            self.breaker.failed(failure.reason, slow=failure.slow)
        if not self.breaker.closed and (self._recovery is None or self._recovery.done()):
            self._recovery = self._start(self.breaker.recover(self._probe))

    async def _probe(self) -> str:
        """Request one token, with enough time for a cold start; returns what failed."""
        assert self._client is not None, "probes are made while running"
        longer = dict.fromkeys(("story_response_timeout", "story_first_token_timeout"), COLD_START_TIMEOUT)
        settings = self._client.settings.model_copy(update=longer)
        try:
            url = await asyncio.to_thread(self._endpoint)
            await self._client.stream(url, PROBE, accepted=_ignore, take=_ignore, settings=settings)
        except RemoteError as failure:
            return failure.reason
        except Exception as error:
            log.exception("a probe of Modal failed")
            return type(error).__name__
        log.info("Modal is available again")
        return ""


def _ignore(*_anything: object) -> None:
    """Discard the events of a probe."""
