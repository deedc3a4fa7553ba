"""A backend that streams a given story.

Faked, because these tests need what a network cannot promise: a known text, a known pace and every way to
end. The real engine stands behind the page in `test_browser.py` and `test_backend.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

from demo.handlers import AppState
from model.errors import BusyError
from model.generation import Chunk, Completion, FinishReason, GenerationRequest, Usage
from model.serving.backend import Backend, Health, ModelInfo
from model.serving.rate_limit import Limiter
from model.serving.session import GenerationManager

HELD_AFTER = 2
"""Words before a held stream waits."""


def state_of(backend: Backend, limiter: Limiter | None = None) -> AppState:
    """The page's state over `backend`, which a test runs itself."""
    return AppState(GenerationManager(backend, limiter=limiter))


class ScriptedStream:
    """Yields one word a step, each one token, and ends as its script or `cancel` says."""

    served_by = "scripted"
    fingerprint = None

    def __init__(
        self, request: GenerationRequest, story: str, pace: float, finish: FinishReason, hold: threading.Event | None
    ) -> None:
        self.request = request
        self.cancelled = False
        self.closed = False
        self._completion: Completion | None = None
        self._words = story.split(" ")
        self._pace = pace
        self._finish: FinishReason = finish
        self._hold = hold

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def completion(self) -> Completion:
        assert self._completion is not None, "asked for before the stream had ended"
        return self._completion

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        sent: list[str] = []
        finish = self._finish
        try:
            for number, word in enumerate(self._words[: self.request.max_tokens]):
                await asyncio.sleep(self._pace)
                if self._hold is not None and number == HELD_AFTER:
                    await asyncio.to_thread(self._hold.wait)
                if self.cancelled:
                    finish = "cancelled"
                    break
                sent.append(word if number == 0 else f" {word}")
                yield Chunk(text=sent[-1], tokens=(number + 1,))
            count = len(sent)
            usage = Usage(
                prompt_tokens=3,
                completion_tokens=count,
                queued=0.0,
                ttft=0.012,
                duration=0.012 + 0.001 * max(0, count - 1),
            )
            error = "the pen broke" if finish == "error" else None
            self._completion = Completion(text="".join(sent), finish_reason=finish, usage=usage, error=error)
        finally:
            self.closed = True


class ScriptedBackend:
    """Streams `story` at `pace` seconds a word and keeps every stream it opened; `hold` stops it half-way until set."""

    name = "scripted"
    capacity = 8

    def __init__(
        self,
        story: str,
        *,
        pace: float = 0.0,
        finish: FinishReason = "stop",
        fail: Exception | None = None,
        hold: threading.Event | None = None,
    ) -> None:
        self.model = ModelInfo(name="a scripted model", version="5eed" * 16)
        self.story = story
        self.pace = pace
        self.finish: FinishReason = finish
        self.fail = fail
        self.hold = hold
        self.streams: list[ScriptedStream] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    def health(self) -> Health:
        return Health(ready=self.fail is None, served_by=self.name, detail="scripted", engine=None)

    async def submit(self, request: GenerationRequest) -> ScriptedStream:
        if self.fail is not None:
            raise self.fail
        stream = ScriptedStream(request, self.story, self.pace, self.finish, self.hold)
        self.streams.append(stream)
        return stream


def busy() -> BusyError:
    """The error of a full line."""
    return BusyError("all 4 slots are taken and 4 streams wait", retry_after=3.0)
