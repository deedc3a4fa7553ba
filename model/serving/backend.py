"""The interface between whoever asks for stories and whatever generates them.

Page and service know only `Backend`: the engine in this process or a service elsewhere. A stream is iterated for its
chunks, can be cancelled at any time, and knows its completion when it has ended, so that a cancel travels the whole way
back to the slot.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, runtime_checkable

from model.architecture.folder import PRETRAINED, ModelFolder
from model.errors import StoryError
from model.generation import Chunk, Completion, FinishReason, GenerationRequest, Usage, merge_chunks
from model.serving.registry import ResolvedModel, resolve_model
from model.settings import Settings

if TYPE_CHECKING:
    from model.engine.engine import Engine, EngineStats

CACHE = "cache"
"""`Stream.served_by` of a cache hit: nothing was generated for it."""


class Stream(Protocol):
    """One story being generated. Iterate it once; it ends by itself, at a limit, or soon after `cancel`.

    Read and cancelled in the event loop that submitted it.
    """

    def __aiter__(self) -> AsyncIterator[Chunk]: ...

    def cancel(self) -> None:
        """Ask the stream to end at the next step. Harmless when it has ended."""

    @property
    def completion(self) -> Completion:
        """How the stream ended; known once its iteration is over, `StoryError` before."""

    @property
    def served_by(self) -> str:
        """Which backend generates now: `local`, `modal`, `cache`; it may change in mid-story."""

    @property
    def fingerprint(self) -> str | None:
        """What generated the finished stream, see `FingerprintedBackend`; None: not known, or more than one."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Identity of a model."""

    name: str
    version: str
    """Digest of the model folder, in hexadecimal."""
    number: int | None = None
    """Of the registered version, where it is one."""
    alias: str = ""
    """By which that version was named, if it was."""
    folder: Path | None = field(default=None, compare=False)
    """Its files, where they are on this machine."""

    def as_dict(self) -> dict[str, str | int | None]:
        """For clients."""
        return {"name": self.name, "version": self.version, "number": self.number, "alias": self.alias or None}

    @classmethod
    def of(cls, found: ResolvedModel, digest: str) -> ModelInfo:
        """Return the identity of a resolved model."""
        if found.version is not None:
            return cls(found.version.name, digest, found.version.number, found.alias, found.path)
        shipped = found.path == PRETRAINED
        name = "the model that ships with this repository" if shipped else found.path.name
        return cls(name, digest, folder=found.path)


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a request could be served now, and by which backend."""

    ready: bool
    served_by: str
    """Which backend would serve it."""
    detail: str
    """One line for an operator, without secrets."""
    engine: EngineStats | None
    """State of the embedded engine, where there is one."""
    breaker: str | None = None
    """State of the circuit breaker of a remote service: `closed`, `open` or `half-open`."""
    models_refused: int = 0
    """Versions that an alias named and that could not be served (`model.serving.following`)."""


class Backend(Protocol):
    """Generates stories. It works between entering and leaving `running`."""

    @property
    def name(self) -> str:
        """`local`, `modal`, or `auto` for whichever of them is available."""

    @property
    def model(self) -> ModelInfo:
        """The model that generates; known before `running`."""

    @property
    def capacity(self) -> int:
        """Streams that can be open at once, queued ones included."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Start on entry; on exit cancel open streams and stop."""

    def health(self) -> Health:
        """Return the known state without a request to anyone: cheap enough for every health check."""

    async def submit(self, request: GenerationRequest) -> Stream:
        """Start a stream. Raises `BusyError` when the queue is full, `ModelError` when there is no model."""


@runtime_checkable
class FingerprintedBackend(Backend, Protocol):
    """A backend that knows the fingerprint of what generates, so that its responses can be cached."""

    async def fingerprint(self) -> str | None:
        """Return the model's digest and runtime that would serve a request now; None: not known.

        Equal seeded requests with equal fingerprints have equal responses.
        """


@runtime_checkable
class VariantRouter(Protocol):
    """A backend that serves different users with different models."""

    def model_for(self, user: str) -> ModelInfo:
        """Return the model for this user (`GenerationRequest.user`)."""


def model_for(backend: Backend, user: str) -> ModelInfo:
    """Return the model of `backend` for this user."""
    return backend.model_for(user) if isinstance(backend, VariantRouter) else backend.model


B = TypeVar("B", bound=Backend)


class BackendWrapper(Generic[B]):
    """A backend around another one. Subclasses override what they change, usually `submit`."""

    def __init__(self, backend: B) -> None:
        self.backend = backend

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def model(self) -> ModelInfo:
        return self.backend.model

    @property
    def capacity(self) -> int:
        return self.backend.capacity

    def health(self) -> Health:
        return self.backend.health()


class StreamTimer:
    """Counts a stream's tokens and times the first and the last of them, as `Usage` reports them."""

    __slots__ = ("first_at", "gap", "last_at", "started", "tokens")

    def __init__(self, started: float | None = None) -> None:
        """`started`: when the request arrived, by `time.perf_counter`; None: now."""
        self.started = time.perf_counter() if started is None else started
        self.first_at = self.last_at = 0.0
        self.tokens = 0
        self.gap = 0.0
        """Seconds of each token of the last chunk, those of one chunk evenly spaced; 0 for the first chunk."""

    def add(self, chunk: Chunk) -> None:
        """Count a chunk that has just come."""
        if chunk.tokens:
            now = time.perf_counter()
            self.first_at = self.first_at or now
            self.gap = (now - self.last_at) / len(chunk.tokens) if self.tokens else 0.0
            self.last_at = now
            self.tokens += len(chunk.tokens)

    def usage(self, prompt_tokens: int = 0, *, queued: float = 0.0) -> Usage:
        """Return counts and times up to the last token; up to now where no token came."""
        duration = (self.last_at or time.perf_counter()) - self.started
        ttft = self.first_at - self.started if self.first_at else duration
        return Usage(prompt_tokens, self.tokens, queued, ttft, duration)


class RecordedStream(StreamTimer):
    """Base of the streams that are no engine's own: it collects their chunks, to make their `Completion`."""

    fingerprint: str | None = None

    def __init__(self, started: float | None = None) -> None:
        super().__init__(started)
        self.chunks: list[Chunk] = []
        self.ended: Completion | None = None
        self.cancelled = False

    def add(self, chunk: Chunk) -> None:
        """Keep a chunk that has just come."""
        super().add(chunk)
        self.chunks.append(chunk)

    def end(self, finish: FinishReason, usage: Usage | None = None, error: str | None = None) -> None:
        """Make the completion of what was collected."""
        merged = merge_chunks(self.chunks)
        self.ended = Completion(merged.text, finish, usage or self.usage(), merged.logprobs, error, merged.prompt)

    @property
    def completion(self) -> Completion:
        """How the stream ended. Raises `StoryError` while it is open."""
        if self.ended is None:
            raise StoryError("the story is still being written: its completion comes with its end")
        return self.ended


class LocalBackend:
    """The engine in this process."""

    name = "local"

    def __init__(self, engine: Engine, model: ModelInfo, *, capacity: int) -> None:
        self.engine = engine
        self.model = model
        self.capacity = capacity

    @classmethod
    def load(cls, settings: Settings, found: ResolvedModel | None = None) -> LocalBackend:
        """Load `found`, by default the model that the settings name. Raises `ModelError` when it is damaged.

        Raises too what `model.serving.registry.resolve_model` raises.
        """
        from model.engine.load import load_engine  # a runtime is loaded only where it is used

        found = found or resolve_model(settings.story_model, settings)
        digest = ModelFolder.open(found.path).digest
        engine = load_engine(
            found.path,
            slots=settings.story_slots,
            threads=settings.story_threads,
            precision=settings.story_precision,
            runtime=settings.story_runtime,
            queue_limit=settings.story_queue,
        )
        capacity = settings.story_slots + settings.story_queue
        return cls(engine, ModelInfo.of(found, digest), capacity=capacity)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the engine's scheduler while this context is open."""
        async with self.engine:
            yield

    def health(self) -> Health:
        """Ready while the engine's last step succeeded and its queue is not full."""
        stats = self.engine.stats()
        full = stats.waiting - (stats.slots - stats.active) >= stats.queue_limit
        detail = "the queue is full" if full else (stats.last_error or "the model failed")
        ready = stats.healthy and not full
        return Health(ready, self.name, "ready" if ready else detail, stats)

    async def submit(self, request: GenerationRequest) -> Stream:
        """Hand the request to the engine; see `Backend.submit`."""
        stream = self.engine.submit(request)
        stream.fingerprint = await self.fingerprint()
        return stream

    async def fingerprint(self) -> str:
        """The model, and the runtime with its precision: each rounds in its own way."""
        return f"{self.model.version} {self.engine.runtime_name}"
