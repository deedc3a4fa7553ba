"""Counts every story that goes past, whoever asked for it: the page's and the programs' alike.

It stands outermost, before memory and limits' tickets, so the times are those that readers have.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from model.errors import BusyError
from model.generation import Chunk, Completion, GenerationRequest
from model.serving.backend import Backend, Health, ModelInfo, Stream, model_for
from model.serving.metrics.metrics import Meter, Timing


class MeteredStream:
    """A stream whose chunks are counted as they are read."""

    def __init__(self, stream: Stream, timing: Timing) -> None:
        self._stream, self._timing = stream, timing
        self._read = False

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        self._read = True
        timing = self._timing
        try:
            async for chunk in self._stream:
                timing.chunk(len(chunk.tokens))
                yield chunk
            timing.end(self._stream.completion, self._stream.served_by)
        except Exception:
            timing.end(None, self._stream.served_by)
            raise
        finally:
            timing.abandoned(self._stream.served_by)

    def cancel(self) -> object:
        if not self._read:  # nobody will ever read how it ended
            self._timing.abandoned(self._stream.served_by)
        return self._stream.cancel()

    @property
    def completion(self) -> Completion:
        return self._stream.completion

    @property
    def served_by(self) -> str:
        return self._stream.served_by


class MeteredBackend:
    """`backend`, counted by `meter`."""

    def __init__(self, backend: Backend, meter: Meter) -> None:
        self.backend, self._meter = backend, meter

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def model(self) -> ModelInfo:
        return self.backend.model

    def model_for(self, user: str) -> ModelInfo:
        """Which model of the backend writes for this user."""
        return model_for(self.backend, user)

    @property
    def capacity(self) -> int:
        return self.backend.capacity

    def running(self) -> AbstractAsyncContextManager[None]:
        return self.backend.running()

    def health(self) -> Health:
        return self.backend.health()

    async def submit(self, request: GenerationRequest) -> Stream:
        """See `Backend.submit`; what is refused or fails at once is counted too."""
        began = time.perf_counter()
        try:
            stream = await self.backend.submit(request)
        except BusyError:
            self._meter.refused("refused", 1)
            raise
        except Exception:
            self._meter.begin(began).end(None, self.backend.name)
            raise
        return MeteredStream(stream, self._meter.begin(began))
