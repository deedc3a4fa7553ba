"""Modal first, and the engine in this process whenever Modal fails: no user is left waiting.

A request that Modal never started is started here. A stream that breaks off continues here: the text received becomes
the new prompt, and the request's parameters still hold over the whole story: its length, stop strings,
log-probabilities and seed.
"""

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace

from model.engine.stream import StopMatcher
from model.errors import StoryError
from model.generation import MAX_PROMPT_CHARS, MAX_PROMPT_TOKENS, Chunk, FinishReason, GenerationRequest, merge_chunks
from model.serving.backend import Health, ModelInfo, RecordedStream, Stream
from model.serving.following import EmbeddedBackend
from model.serving.remote.modal import ModalBackend, ModalStream


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
