"""Stories written by the service on Modal, or by whatever answers in its words at `MODAL_ENDPOINT_URL`.

Each story is read by a task of its own, so that a cancel reaches the connection at once, whatever the reader
is doing, and the slot at the other end is free a moment later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from model.errors import StoryError
from model.generation import Chunk, Completion, FinishReason, GenerationRequest, TokenLogprob, Usage
from model.serving.backend import Health, ModelInfo
from model.serving.remote.breaker import Breaker
from model.serving.remote.exchange import Exchange, TimeOuts
from model.serving.remote.failures import RemoteError
from model.serving.remote.wire import Counts, WireEvent

if TYPE_CHECKING:
    from model.serving.backend import Stream

ACCEPT_TIMEOUT = 0.4
"""Seconds that `submit` waits for the service to accept a story, so that a refusal comes from `submit` itself.

A service that is awake answers within its network's delay. One that is being started does not, and then the
stream is handed out while it still waits, so that its reader can see that, and stop."""

COLD_START_TIMEOUT = 150.0
"""Seconds that a probe waits for its first token: longer than a cold start. No reader waits for it."""

PROBE = GenerationRequest(prompt="Once", max_tokens=1)
"""The least that proves a service: that it lets us in, has a place, and writes."""

FINGERPRINT_TTL = 30.0
"""Seconds for which the version that wrote the last story is taken to be the one that writes the next."""

CONNECTIONS = 256
"""Stories at once; how many are written at once is the service's affair."""

log = logging.getLogger(__name__)


class _Story:
    """What the task that reads and the stream that is read share."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.version: str | None = None
        self.began = time.perf_counter()
        self.pending: deque[Chunk] = deque()
        self.news = asyncio.Event()
        self.accepted = asyncio.Event()
        """Set when the service has answered, and in any case at the end."""
        self.parts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.tokens = 0
        self.first_at = self.last_at = 0.0
        self.finish: FinishReason | None = None
        self.counts: Counts | None = None
        self.completion: Completion | None = None
        self.failure: RemoteError | None = None

    def take(self, event: WireEvent) -> None:
        """Note what came, and wake the reader."""
        chunk = event.chunk
        if chunk is not None:
            if chunk.tokens:
                self.last_at = time.perf_counter()
                self.first_at = self.first_at or self.last_at
            self.tokens += len(chunk.tokens)
            self.parts.append(chunk.text)
            self.logprobs.extend(chunk.logprobs)
            self.pending.append(chunk)
        self.finish = event.finish or self.finish
        self.counts = event.counts or self.counts
        self.version = event.version or self.version
        if event.done and self.finish is not None:
            self.end(self.finish)
        self.news.set()

    @property
    def fingerprint(self) -> str | None:
        """What writes it, once the service has said so."""
        return None if self.version is None else f"{self.version} at {self.url}"

    def end(self, finish: FinishReason, failure: RemoteError | None = None) -> None:
        """The story is over; only the first call counts."""
        if self.completion is not None:
            return
        ended = (self.last_at or time.perf_counter()) - self.began
        counts = self.counts or Counts(prompt_tokens=0, completion_tokens=self.tokens, queued=0.0)
        usage = Usage(
            prompt_tokens=counts.prompt_tokens,
            completion_tokens=counts.completion_tokens,
            queued=counts.queued,
            ttft=self.first_at - self.began if self.first_at else ended,
            duration=ended,
        )
        error = None if failure is None else str(failure)
        self.failure = failure
        self.completion = Completion("".join(self.parts), finish, usage, tuple(self.logprobs), error)
        self.accepted.set()
        self.news.set()


class ModalStream:
    """A story that the service writes. Read it in the event loop that began it; cancel it from anywhere.

    A failure before the first token is raised by the iteration, a later one is told by `completion`.
    """

    served_by = "modal"

    def __init__(self, story: _Story, task: asyncio.Task[None]) -> None:
        self._story = story
        self._task = task  # holds the story, and not this stream: one that is let go of is cancelled
        self._loop = task.get_loop()

    @property
    def failure(self) -> RemoteError | None:
        """Why the service could not tell the story to its end, where it could not."""
        return self._story.failure

    @property
    def fingerprint(self) -> str | None:
        """See `FingerprintedBackend.fingerprint_of`."""
        return self._story.fingerprint

    @property
    def begun(self) -> bool:
        """Whether anything of the story has come."""
        return bool(self._story.parts)

    @property
    def completion(self) -> Completion:
        """How the story ended. Raises `StoryError` while it is being written."""
        if self._story.completion is None:
            raise StoryError("the story is still being written: its completion comes with its end")
        return self._story.completion

    def cancel(self) -> None:
        """Close the connection at once. Harmless when the story has ended."""
        if self._story.completion is None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)

    async def accepted(self, seconds: float) -> None:
        """Wait until the service has accepted or refused the story, for at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._story.accepted.wait()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        story = self._story
        while not story.pending:
            if story.completion is not None:
                if story.failure is not None and not self.begun:
                    raise story.failure.told
                raise StopAsyncIteration
            story.news.clear()
            await story.news.wait()
        return story.pending.popleft()

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
        times: TimeOuts,
        breaker: Breaker,
        headers: dict[str, str] | None = None,
        fail_fast: bool = False,
    ) -> None:
        """Describe the service.

        Args:
            endpoint: tells where a story that begins now goes; may block for a moment.
            model: who writes there.
            times: the time-outs of each stage.
            breaker: keeps account of how the service does.
            headers: sent with each request; see `model.serving.remote.exchange.proxy_auth`.
            hurry: there is another served_by: give up soon.
        """
        self.model = model
        self.breaker = breaker
        self._endpoint = endpoint
        self._url: str | None = None
        self._fingerprint: tuple[str, str | None, float] = (
            "",
            None,
            0.0,
        )  # where, what, and when it was seen
        self._times = times
        self._headers = headers or {}
        self._fail_fast = fail_fast
        self._exchange: Exchange | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._trouble = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep connections, and look after a service that failed; on exit cancel what is left."""
        self._exchange = Exchange(
            self._headers, self._times, connections=CONNECTIONS, fail_fast=self._fail_fast
        )
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            tasks = [watch, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._exchange.aclose()
            self._exchange = None

    def health(self) -> Health:
        """What the last stories and probes have shown."""
        breaker = self.breaker
        detail = "writes" if breaker.closed else f"Modal failed: {breaker.reason}"
        return Health(breaker.closed, self.name, detail, None, breaker.state)

    async def usable(self) -> bool:
        """Whether a story that begins now should try the service. A new address begins with a clean record."""
        url = await asyncio.to_thread(self._endpoint)
        if url != self._url:
            if self._url is not None:
                log.info("new stories go to another deployment on Modal")
                self.breaker.succeeded()
            self._url = url
        return self.breaker.closed

    async def fingerprint(self) -> str | None:
        """What wrote the last story there, while that is news: another version may be deployed at any time."""
        await self.usable()
        url, fingerprint, seen = self._fingerprint
        return fingerprint if url == self._url and time.monotonic() - seen < FINGERPRINT_TTL else None

    def fingerprint_of(self, stream: Stream) -> str | None:
        """What wrote it, as the service told with the story."""
        return stream.fingerprint if isinstance(stream, ModalStream) else None

    async def submit(self, request: GenerationRequest) -> Stream:
        """Begin a story; see `Backend.submit`."""
        stream = await self.begin(request)
        if stream.failure is not None and not stream.begun:
            raise stream.failure.told
        return stream

    async def begin(self, request: GenerationRequest) -> ModalStream:
        """`submit` that raises nothing of the service's: what it refused is the stream's `failure`."""
        await self.usable()
        url, exchange = self._url, self._exchange
        if url is None or exchange is None:
            raise StoryError("the backend is not running")
        story = _Story(url)
        task = asyncio.create_task(self._tell(exchange, url, request, story))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        stream = ModalStream(story, task)
        await stream.accepted(ACCEPT_TIMEOUT)
        return stream

    async def _tell(self, exchange: Exchange, url: str, request: GenerationRequest, story: _Story) -> None:
        """Read one story to its end and keep account of how that went."""
        try:
            await exchange.talk(url, request, accepted=story.accepted.set, take=story.take)
            if story.finish is None:
                raise RemoteError("the service said that all is told, and not how it ended")
            story.end(story.finish)
            self.breaker.succeeded()
            self._fingerprint = (url, story.fingerprint, time.monotonic())
        except asyncio.CancelledError:
            story.end("cancelled")
            raise
        except RemoteError as failure:
            self._failed(failure)
            story.end("error", failure)
        except Exception as error:  # an address that no socket takes, a fault of ours: the story must end
            log.exception("a story on Modal failed in a way that nobody foresaw")
            fault = RemoteError(type(error).__name__)
            self._failed(fault)
            story.end("error", fault)

    def _failed(self, failure: RemoteError) -> None:
        log.warning("a story on Modal failed: %s", failure.reason)
        if failure.trips_breaker:
            self.breaker.failed(failure.reason, slow=failure.slow)
            if not self.breaker.closed:
                self._trouble.set()

    async def _watch(self) -> None:
        """While the breaker is open, probe the service after each pause."""
        while True:
            await self._trouble.wait()
            self._trouble.clear()
            while not self.breaker.closed:
                await asyncio.sleep(self.breaker.wait)
                if self.breaker.probe():
                    await self._probe()

    async def _probe(self) -> None:
        """Have one token written, with all the time that a cold start takes."""
        assert self._exchange is not None, "probes are made while running"
        times = replace(self._times, first_token=COLD_START_TIMEOUT, start=COLD_START_TIMEOUT)
        try:
            url = await asyncio.to_thread(self._endpoint)
            await self._exchange.talk(url, PROBE, accepted=_ignore, take=_ignore, times=times)
        except RemoteError as failure:
            self.breaker.probe_failed(failure.reason)
        except Exception as error:
            log.exception("a probe of Modal failed")
            self.breaker.probe_failed(type(error).__name__)
        else:
            log.info("Modal writes again")
            self.breaker.succeeded()


def _ignore(*_anything: object) -> None:
    """Nobody reads what a probe writes."""
