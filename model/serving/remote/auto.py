"""Modal first, and the model in this process whenever Modal does not do its part: no reader is left waiting.

A story that Modal never began is begun here, within the same request. One that breaks off goes on here from
the text that has come: that text is the new prompt, and what was asked for still holds, counted over the whole
story: its length, its stop strings, its log-probabilities, its seed.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace

from model.errors import StoryError
from model.generation import (
    MAX_PROMPT_CHARS,
    Chunk,
    Completion,
    FinishReason,
    GenerationRequest,
    TokenLogprob,
    Usage,
)
from model.serving.backend import Health, LocalBackend, ModelInfo, Stream
from model.serving.remote.continued_stop import ContinuedStop
from model.serving.remote.remote import ModalBackend, ModalStream

log = logging.getLogger(__name__)


class AutoStream:
    """One story, begun by Modal. Iterate it once; it never raises what Modal did, only what happens here."""

    def __init__(
        self, request: GenerationRequest, remote: ModalStream, local: LocalBackend, began: float
    ) -> None:
        """`began`: when the story was asked for, by `time.perf_counter`."""
        self._request = request
        self._remote = remote
        self._local = local
        self._current: Stream = remote
        self._cancelled = False
        self._completion: Completion | None = None
        self._stops: ContinuedStop | None = None
        self._began = began
        self._taken_at = 0.0
        self._first_at = self._last_at = 0.0
        self._text = ""
        self._tokens = 0
        self._logprobs: list[TokenLogprob] = []

    @property
    def served_by(self) -> str:
        """Who writes at this moment: `modal` or `local`."""
        return self._current.served_by

    @property
    def completion(self) -> Completion:
        """How the story ended. Raises `StoryError` while it is being written."""
        if self._completion is None:
            raise StoryError("the story is still being written: its completion comes with its end")
        return self._completion

    @property
    def whole(self) -> Stream | None:
        """The one stream that all of the story came from; None where two writers share it."""
        return self._current if self._stops is None else None

    def cancel(self) -> None:
        """End the story at once, whoever writes it."""
        self._cancelled = True
        self._current.cancel()

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        async for chunk in self._from_modal():
            yield chunk
        if self._completion is None:
            async for chunk in self._from_here():
                yield chunk

    async def take_over(self) -> None:
        """Begin, or go on with, the story in this process. Raises what the engine raises: `BusyError`."""
        left = self._request.max_tokens - self._tokens
        if self._cancelled or left < 1:
            self._end("cancelled" if self._cancelled else "length")
            return
        request = self._request
        if self._text:
            self._stops = ContinuedStop(request.stop, self._text)
            # The end of a long story is what it goes on from; the model's memory reaches no further back.
            prompt = (request.prompt + self._text)[-MAX_PROMPT_CHARS:]
            request = replace(request, prompt=prompt, max_tokens=left, stop=())
        self._taken_at = time.perf_counter()
        self._current = await self._local.submit(request)
        if self._cancelled:
            self._current.cancel()

    async def _from_modal(self) -> AsyncGenerator[Chunk, None]:
        """What Modal tells; afterwards the story has a completion, unless it has to go on elsewhere."""
        # A token whose text has not come (half a character, perhaps the beginning of a stop string) waits for it:
        # were the connection lost between them, that text would be written again, and the token counted twice.
        waiting: list[Chunk] = []
        with contextlib.suppress(StoryError):  # it is in `failure` too
            async for chunk in self._remote:
                waiting.append(chunk)
                if chunk.text:
                    yield self._told(waiting)
                    waiting = []
        if self._remote.failure is not None:
            return
        if waiting:
            yield self._told(waiting)
        self._completion = self._remote.completion

    async def _from_here(self) -> AsyncGenerator[Chunk, None]:
        """The story from where it stands, by the model in this process."""
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
            yield self._told([chunk if stops is None else replace(chunk, text=stops.push(chunk.text))])
            if stops is not None and stops.met:
                stream.cancel()
                self._end("stop")
                return
        if stops is not None and (rest := stops.flush()):
            yield self._told([Chunk(rest, ())])
        completion = stream.completion
        queued = self._taken_at - self._began + completion.usage.queued if stops is None else 0.0
        self._end(completion.finish_reason, completion.error, queued=queued)

    def _told(self, chunks: list[Chunk]) -> Chunk:
        """The chunks as one, noted as told."""
        chunk = chunks[0]
        if len(chunks) > 1:
            chunk = Chunk(
                "".join(one.text for one in chunks),
                tuple(token for one in chunks for token in one.tokens),
                tuple(entry for one in chunks for entry in one.logprobs),
            )
        if chunk.tokens:
            self._last_at = time.perf_counter()
            self._first_at = self._first_at or self._last_at
        self._text += chunk.text
        self._tokens += len(chunk.tokens)
        self._logprobs.extend(chunk.logprobs)
        return chunk

    def _end(self, finish: FinishReason, error: str | None = None, *, queued: float = 0.0) -> None:
        ended = (self._last_at or time.perf_counter()) - self._began
        usage = Usage(
            prompt_tokens=len(self._local.engine.tokenizer.encode(self._request.prompt)),
            completion_tokens=self._tokens,
            queued=queued,
            ttft=self._first_at - self._began if self._first_at else ended,
            duration=ended,
        )
        self._completion = Completion(self._text, finish, usage, tuple(self._logprobs), error)


class AutoBackend:
    """Modal while it does its part, else the engine in this process, which is always loaded."""

    name = "auto"

    def __init__(self, modal: ModalBackend, local: LocalBackend) -> None:
        self.modal = modal
        self.local = local
        self.capacity = modal.capacity

    @property
    def model(self) -> ModelInfo:
        """The model in this process, which can finish any story; links of the page name its version."""
        return self.local.model

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run both."""
        async with self.local.running(), self.modal.running():
            yield

    def health(self) -> Health:
        """Ready while either is; who would write, and why not Modal if it would not."""
        here, there = self.local.health(), self.modal.health()
        if there.ready:
            return Health(True, there.served_by, "writes", here.engine, there.breaker)
        detail = f"{there.detail}; {'the embedded model writes' if here.ready else here.detail}"
        return Health(here.ready, here.served_by, detail, here.engine, there.breaker)

    async def fingerprint(self) -> str | None:
        """That of the one who would begin the story."""
        return await (self.modal if await self.modal.usable() else self.local).fingerprint()

    def fingerprint_of(self, stream: Stream) -> str | None:
        """That of the one who wrote all of it."""
        whole = stream.whole if isinstance(stream, AutoStream) else stream
        if whole is None:
            return None
        return (self.modal if isinstance(whole, ModalStream) else self.local).fingerprint_of(whole)

    async def submit(self, request: GenerationRequest) -> Stream:
        """Begin a story; see `Backend.submit`. Only this process can be too busy for it."""
        began = time.perf_counter()
        if not await self.modal.usable():
            return await self.local.submit(request)
        remote = await self.modal.begin(request)
        stream = AutoStream(request, remote, self.local, began)
        if remote.failure is not None and not remote.begun:
            await stream.take_over()  # now, so that a full line is told by this call
        return stream
