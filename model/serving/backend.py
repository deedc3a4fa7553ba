"""Where stories come from, seen from page and service: an engine in this process, or one elsewhere.

Page and service know only `Backend`. A stream is iterated for its chunks, can be cancelled at any time from
anywhere, and afterwards knows how it ended; so a stop travels the whole way back to the slot, whatever lies
between.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from model.architecture.folder import PRETRAINED, ModelFolder
from model.generation import Chunk, Completion, GenerationRequest

if TYPE_CHECKING:
    from model.engine.engine import Engine, EngineStats
    from model.settings import Settings


class Stream(Protocol):
    """One story being written. Iterate it once; it ends by itself, at a limit, or soon after `cancel`."""

    def __aiter__(self) -> AsyncIterator[Chunk]: ...

    def cancel(self) -> object:
        """Ask the stream to end at the next step. Harmless when it has ended."""
        ...

    @property
    def completion(self) -> Completion:
        """How the stream ended, known once its iteration is over."""
        ...

    @property
    def served_by(self) -> str:
        """Who writes it at this moment: `local`, or the name of where else; it may change in mid-story."""
        ...


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which model writes."""

    name: str
    version: str
    """Digest of the model folder, in hexadecimal."""


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a story could be written now, and by whom."""

    ready: bool
    served_by: str
    """Who would write it."""
    detail: str
    """One line for an operator; nothing private."""
    engine: EngineStats | None
    """The embedded engine's figures, where there is one."""
    breaker: str | None = None
    """Where stories may be written elsewhere: `closed` (they are), `open` or `half-open` (it is being tried)."""


class Backend(Protocol):
    """Something that writes stories. It works between entering and leaving `running`."""

    @property
    def name(self) -> str:
        """`local`, `modal`, or `auto` for the one of them that can."""
        ...

    @property
    def model(self) -> ModelInfo:
        """Which model writes; known before `running`."""
        ...

    @property
    def capacity(self) -> int:
        """Streams that can be open at once, those that wait in line included."""
        ...

    def running(self) -> AbstractAsyncContextManager[None]:
        """Start on entry; on exit cancel what is left and stop."""
        ...

    def health(self) -> Health:
        """What is known at this moment, without asking anyone: cheap enough for every health check."""
        ...

    async def submit(self, request: GenerationRequest) -> Stream:
        """Begin a story. Raises `BusyError` when the line is full, `ModelError` when there is no model."""
        ...


@runtime_checkable
class FingerprintedBackend(Backend, Protocol):
    """A backend that can say which edition of a model writes, so that its stories can be told again."""

    async def fingerprint(self) -> str | None:
        """What would write a story that begins now: the model's digest, and what computes it where that matters.

        Two editions may tell different stories for the same request, one edition never does. None: not known.
        """
        ...

    def fingerprint_of(self, stream: Stream) -> str | None:
        """What has written this stream of the backend's, which has ended; None: not known, or more than one."""
        ...


@runtime_checkable
class VariantRouter(Protocol):
    """A backend that does not write for everyone with the same model."""

    def model_for(self, user: str) -> ModelInfo:
        """Which model writes for this user (`GenerationRequest.user`)."""
        ...


def model_for(backend: Backend, user: str) -> ModelInfo:
    """Which model of `backend` writes for this user."""
    return backend.model_for(user) if isinstance(backend, VariantRouter) else backend.model


class LocalBackend:
    """The engine in this process: no network between the page and the model."""

    name = "local"

    def __init__(self, engine: Engine, model: ModelInfo, *, capacity: int) -> None:
        self.engine = engine
        self.model = model
        self.capacity = capacity

    @classmethod
    def load(cls, settings: Settings) -> LocalBackend:
        """Load the model folder that the settings name. Raises `ModelError` when it is missing or damaged."""
        from model.engine.load import load_engine  # a runtime is loaded only where one writes

        folder = Path(settings.story_model) if settings.story_model else PRETRAINED
        version = ModelFolder.open(folder).digest
        engine = load_engine(
            folder,
            slots=settings.story_slots,
            threads=settings.story_threads,
            precision=settings.story_precision,
            runtime=settings.story_runtime,
            queue_limit=settings.story_queue,
        )
        name = "the model that ships with this repository" if folder == PRETRAINED else folder.name
        capacity = settings.story_slots + settings.story_queue
        return cls(engine, ModelInfo(name=name, version=version), capacity=capacity)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the engine's scheduler for as long as this context is open."""
        async with self.engine:
            yield

    def health(self) -> Health:
        """The engine's own word: ready while its last step succeeded and the line is not full."""
        stats = self.engine.stats()
        full = stats.waiting - (stats.slots - stats.active) >= stats.queue_limit
        detail = "the line is full" if full else (stats.last_error or "the model failed")
        ready = stats.healthy and not full
        return Health(ready, self.name, "writes" if ready else detail, stats)

    async def submit(self, request: GenerationRequest) -> Stream:
        """Hand the request to the engine; see `Backend.submit`."""
        return self.engine.submit(request)

    async def fingerprint(self) -> str:
        """The model, and the runtime with its precision: each rounds in its own way."""
        return f"{self.model.version} {self.engine.runtime_name}"

    def fingerprint_of(self, stream: Stream) -> str:
        """Always the same."""
        return f"{self.model.version} {self.engine.runtime_name}"
