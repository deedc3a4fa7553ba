"""Backend over the service on Modal, or any server of its API at `MODAL_ENDPOINT_URL`, behind a circuit breaker.

Each stream is read by a task of its own, so that a cancel closes the connection at once, whatever the client is doing,
and the slot at the other end is free a moment later.

`FailoverBackend` asks Modal first, and the engine in this process whenever Modal fails. A request that Modal never
started is started here. A stream that breaks off continues here: the text received becomes the new prompt, and the
request's parameters still hold over the whole story: its length, stop strings, log-probabilities and seed.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

from model.engine.stream import StopMatcher
from model.errors import StoryError
from model.generation import MAX_PROMPT_CHARS, MAX_PROMPT_TOKENS, Chunk, FinishReason, GenerationRequest, merge_chunks
from model.serving.backend import Health, ModelInfo, RecordedStream, Stream
from model.serving.following import EmbeddedBackend
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


class ContinuedStop(StopMatcher):
    """Stop strings over a story of which the client has already got the beginning, `sent`.

    A stop string may begin in what was sent: text that was let through because it completed none can still be the
    start of one. Such a story ends there. So this matches over the whole story, where a matcher of the second backend
    would see its own part only.
    """

    def __init__(self, words: Sequence[str], sent: str) -> None:
        super().__init__(words)
        super().push(sent)
        self._ahead = len(self.held)  # characters that the client has and the matcher still holds

    def push(self, text: str) -> str:
        """Return what of `text`, and of what was held back, may be sent now."""
        return self._new(super().push(text))

    def flush(self) -> str:
        """Return what was held back, at the end of the story."""
        return self._new(super().flush())

    def _new(self, free: str) -> str:
        known = min(self._ahead, len(free))
        self._ahead -= known
        return free[known:]


class FailoverStream(RecordedStream):
    """One story, started by Modal. It raises no failure of Modal, only of this process."""

    def __init__(self, request: GenerationRequest, remote: ModalStream, local: EmbeddedBackend, started: float) -> None:
        """`started`: when the request arrived, by `time.perf_counter`."""
        super().__init__(started)
        self._request = request
        self._remote = remote
        self._local = local
        self._current: Stream = remote
        self._stops: ContinuedStop | None = None
        self._taken_at = 0.0

    @property
    def served_by(self) -> str:
        """Which backend generates now: `modal` or `local`."""
        return self._current.served_by

    def cancel(self) -> None:
        """End the stream at once, whichever backend generates."""
        self.cancelled = True
        self._current.cancel()

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        # A token whose text has not come (half a character, perhaps the beginning of a stop string) waits for it:
        # were the connection lost between them, that text would be generated again, and the token counted twice.
        waiting: list[Chunk] = []
        with contextlib.suppress(StoryError):  # it is in `failure` too
            async for chunk in self._remote:
                waiting.append(chunk)
                if chunk.text:
                    yield self._sent(waiting)
                    waiting = []
        if self._remote.failure is None:
            if waiting:
                yield self._sent(waiting)
            self.ended, self.fingerprint = self._remote.completion, self._remote.fingerprint
            return
        if self._current is self._remote:
            try:
                await self.take_over()
            except StoryError as error:
                if not self._text:
                    raise
                self._end("error", f"Modal was lost, and {error}")
        if self.ended is not None:
            return
        stream, stops = self._current, self._stops
        async for chunk in stream:
            yield self._sent([chunk if stops is None else replace(chunk, text=stops.push(chunk.text))])
            if stops is not None and stops.stopped:
                stream.cancel()
                self._end("stop")
                return
        if stops is not None and (rest := stops.flush()):
            yield self._sent([Chunk(rest, ())])
        completion, queued = stream.completion, 0.0
        if stops is None:  # all of it was generated here
            self.fingerprint = stream.fingerprint
            queued = self._taken_at - self.started + completion.usage.queued
        self._end(completion.finish_reason, completion.error, queued=queued)

    async def take_over(self) -> None:
        """Start, or continue, the story in this process. Raises what the engine raises: `BusyError`."""
        left = self._request.max_tokens - self.tokens
        if self.cancelled or left < 1:
            self._end("cancelled" if self.cancelled else "length")
            return
        request = self._request
        if text := self._text:
            self._stops = ContinuedStop(request.stop, text)
            # The end of a long story is enough: the model's state reaches no further back.
            prompt: str | tuple[int, ...]
            if isinstance(request.prompt, str):
                prompt = (request.prompt + text)[-MAX_PROMPT_CHARS:]
            else:
                prompt = (*request.prompt, *merge_chunks(self.chunks).tokens)[-MAX_PROMPT_TOKENS:]
            fewer = replace(request.sampling, min_tokens=max(request.sampling.min_tokens - self.tokens, 0))
            request = replace(request, prompt=prompt, max_tokens=left, sampling=fewer, stop=())
        self._taken_at = time.perf_counter()
        self._current = await self._local.submit(request)
        if self.cancelled:
            self._current.cancel()

    @property
    def _text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    def _sent(self, chunks: list[Chunk]) -> Chunk:
        """Return the chunks as one, recorded."""
        chunk = chunks[0] if len(chunks) == 1 else merge_chunks(chunks)
        self.add(chunk)
        return chunk

    def _end(self, finish: FinishReason, error: str | None = None, *, queued: float = 0.0) -> None:
        prompt = self._request.prompt
        prompt_tokens = len(self._local.engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        self.end(finish, self.usage(prompt_tokens, queued=queued), error)


class FailoverBackend:
    """Modal while it works, else the engine in this process, which is always loaded."""

    name = "auto"

    def __init__(self, modal: ModalBackend, local: EmbeddedBackend) -> None:
        self.modal = modal
        self.local = local
        self.capacity = modal.capacity

    @property
    def model(self) -> ModelInfo:
        """The model in this process, which can finish any story; the page's links name its version."""
        return self.local.model

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run both."""
        async with self.local.running(), self.modal.running():
            yield

    def health(self) -> Health:
        """Ready while either is; the detail says why Modal is not used."""
        here, there = self.local.health(), self.modal.health()
        if there.ready:
            return replace(there, engine=here.engine, models_refused=here.models_refused)
        detail = f"{there.detail}; {'the embedded model is used' if here.ready else here.detail}"
        return replace(here, detail=detail, breaker=there.breaker)

    async def fingerprint(self) -> str | None:
        """Of the backend that would start the stream."""
        return await (self.modal if await self.modal.usable() else self.local).fingerprint()

    async def submit(self, request: GenerationRequest) -> Stream:
        """Start a stream; see `Backend.submit`. Only this process can be too busy for it."""
        started = time.perf_counter()
        if not await self.modal.usable():
            return await self.local.submit(request)
        remote = await self.modal.open(request)
        stream = FailoverStream(request, remote, self.local, started)
        if remote.failure is not None and not remote.begun:
            await stream.take_over()  # now, so that a full queue is raised by this call
        return stream
