"""Modal first, and the engine in this process whenever Modal fails: no user is left waiting.

A request that Modal never started is started here. A stream that breaks off continues here: the text received becomes
the new prompt, and the request's parameters still hold over the whole story: its length, stop strings,
log-probabilities and seed.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace

from model.engine.stop import StopMatcher
from model.errors import StoryError
from model.generation import (
    MAX_PROMPT_CHARS,
    MAX_PROMPT_TOKENS,
    Chunk,
    Completion,
    FinishReason,
    GenerationRequest,
    merge_chunks,
)
from model.serving.backend import Health, ModelInfo, Stream, StreamRecorder, finished
from model.serving.following import EmbeddedBackend
from model.serving.remote.modal import ModalBackend, ModalStream

log = logging.getLogger(__name__)


class ContinuedStop:
    """Stop strings over a story of which the client has already got the beginning, `sent`.

    A stop string may begin in what was sent: text that was let through because it completed none can still be the
    start of one. Such a story ends there. So this matches over the whole story, where a matcher of the second backend
    would see its own part only.
    """

    def __init__(self, stop: tuple[str, ...], sent: str) -> None:
        self._matcher = StopMatcher(stop)
        self._matcher.push(sent)
        self._ahead = len(self._matcher.held)  # characters that the client has and the matcher still holds

    @property
    def met(self) -> bool:
        """Whether a stop string is complete."""
        return self._matcher.stopped

    def push(self, text: str) -> str:
        """Return what of `text`, and of what was held back, may be sent now."""
        return self._new(self._matcher.push(text))

    def flush(self) -> str:
        """Return what was held back, at the end of the story."""
        return self._new(self._matcher.flush())

    def _new(self, free: str) -> str:
        known = min(self._ahead, len(free))
        self._ahead -= known
        return free[known:]


class FailoverStream:
    """One story, started by Modal. It raises no failure of Modal, only of this process."""

    def __init__(self, request: GenerationRequest, remote: ModalStream, local: EmbeddedBackend, started: float) -> None:
        """`started`: when the request arrived, by `time.perf_counter`."""
        self._request = request
        self._remote = remote
        self._local = local
        self._current: Stream = remote
        self._cancelled = False
        self._completion: Completion | None = None
        self._stops: ContinuedStop | None = None
        self._recorder = StreamRecorder(started)
        self._taken_at = 0.0

    @property
    def served_by(self) -> str:
        """Which backend generates now: `modal` or `local`."""
        return self._current.served_by

    @property
    def completion(self) -> Completion:
        """How the stream ended. Raises `StoryError` while it is open."""
        return finished(self._completion)

    @property
    def whole(self) -> Stream | None:
        """The one stream that the whole story came from; None where it came from two."""
        return self._current if self._stops is None else None

    def cancel(self) -> None:
        """End the stream at once, whichever backend generates."""
        self._cancelled = True
        self._current.cancel()

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        async for chunk in self._from_modal():
            yield chunk
        if self._completion is None:
            async for chunk in self._from_here():
                yield chunk

    async def take_over(self) -> None:
        """Start, or continue, the story in this process. Raises what the engine raises: `BusyError`."""
        left = self._request.max_tokens - self._recorder.tokens
        if self._cancelled or left < 1:
            self._end("cancelled" if self._cancelled else "length")
            return
        request = self._request
        if text := self._text:
            self._stops = ContinuedStop(request.stop, text)
            # The end of a long story is enough: the model's state reaches no further back.
            prompt: str | tuple[int, ...]
            if isinstance(request.prompt, str):
                prompt = (request.prompt + text)[-MAX_PROMPT_CHARS:]
            else:
                prompt = (*request.prompt, *merge_chunks(self._recorder.chunks).tokens)[-MAX_PROMPT_TOKENS:]
            fewer = replace(request.sampling, min_tokens=max(request.sampling.min_tokens - self._recorder.tokens, 0))
            request = replace(request, prompt=prompt, max_tokens=left, sampling=fewer, stop=())
        self._taken_at = time.perf_counter()
        self._current = await self._local.submit(request)
        if self._cancelled:
            self._current.cancel()

    @property
    def _text(self) -> str:
        return "".join(chunk.text for chunk in self._recorder.chunks)

    async def _from_modal(self) -> AsyncGenerator[Chunk, None]:
        """Yield Modal's chunks; sets the completion, unless the story has to continue here."""
        # A token whose text has not come (half a character, perhaps the beginning of a stop string) waits for it:
        # were the connection lost between them, that text would be generated again, and the token counted twice.
        waiting: list[Chunk] = []
        with contextlib.suppress(StoryError):  # it is in `failure` too
            async for chunk in self._remote:
                waiting.append(chunk)
                if chunk.text:
                    yield self._sent(waiting)
                    waiting = []
        if self._remote.failure is not None:
            return
        if waiting:
            yield self._sent(waiting)
        self._completion = self._remote.completion

    async def _from_here(self) -> AsyncGenerator[Chunk, None]:
        """Yield the story from where it stands, from the engine in this process."""
        if self._current is self._remote:
            try:
                await self.take_over()
            except StoryError as error:
                if not self._text:
                    raise
                self._end("error", f"Modal was lost, and {error}")
            if self._completion is not None:
                return
        stream, stops = self._current, self._stops
        async for chunk in stream:
            yield self._sent([chunk if stops is None else replace(chunk, text=stops.push(chunk.text))])
            if stops is not None and stops.met:
                stream.cancel()
                self._end("stop")
                return
        if stops is not None and (rest := stops.flush()):
            yield self._sent([Chunk(rest, ())])
        completion = stream.completion
        queued = self._taken_at - self._recorder.started + completion.usage.queued if stops is None else 0.0
        self._end(completion.finish_reason, completion.error, queued=queued)

    def _sent(self, chunks: list[Chunk]) -> Chunk:
        """Return the chunks as one, recorded."""
        chunk = chunks[0] if len(chunks) == 1 else merge_chunks(chunks)
        self._recorder.add(chunk)
        return chunk

    def _end(self, finish: FinishReason, error: str | None = None, *, queued: float = 0.0) -> None:
        prompt = self._request.prompt
        prompt_tokens = len(self._local.engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        usage = self._recorder.usage(prompt_tokens, queued=queued)
        self._completion = self._recorder.completion(finish, usage, error)


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

    def fingerprint_of(self, stream: Stream) -> str | None:
        """Of the backend that generated all of it."""
        whole = stream.whole if isinstance(stream, FailoverStream) else stream
        if whole is None:
            return None
        return (self.modal if isinstance(whole, ModalStream) else self.local).fingerprint_of(whole)

    async def submit(self, request: GenerationRequest) -> Stream:
        """Start a stream; see `Backend.submit`. Only this process can be too busy for it."""
        started = time.perf_counter()
        if not await self.modal.usable():
            return await self.local.submit(request)
        remote = await self.modal.open(request)
        stream = FailoverStream(request, remote, self.local, started)
        if remote.failure is not None and not remote.started:
            await stream.take_over()  # now, so that a full queue is raised by this call
        return stream
