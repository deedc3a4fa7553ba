"""Readers split between versions, and what came of each story put down for the test's judge.

To page and service this is one backend. Each story goes to its visitor's arm, which is a backend of its own, and passes
through here on its way back: so a story is noted once, whoever asked for it. With a single arm nothing is split, and
only noted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from experiments.ab.assignment import TrafficSplit
from experiments.ab.events import Ending, Exposure, Outcome, Rating, new_id
from model.errors import BusyError
from model.generation import Chunk, Completion, FinishReason, GenerationRequest, Usage
from model.serving.backend import Backend, Health, ModelInfo, Stream, StreamTimer
from model.serving.metrics import MeteredBackend

if TYPE_CHECKING:
    from experiments.ab.recorder import Recorder
    from model.engine.engine import EngineStats

OUTCOMES: dict[FinishReason, Outcome] = {
    "stop": "finished",
    "length": "length",
    "cancelled": "stopped",
    "error": "failed",
}


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm with what writes for it."""

    name: str
    backend: Backend
    version: str = ""
    """Number of the registered version, where it is one."""


class SplitBackend:
    """Writes each story with the model of its visitor's arm, and tells the recorder.

    Every arm of `split` that has a share must be among `arms`.
    """

    def __init__(self, split: TrafficSplit, arms: Sequence[Arm], recorder: Recorder) -> None:
        self.split = split
        self.arms = {arm.name: arm for arm in arms}
        self.recorder = recorder
        self.capacity = sum(arm.backend.capacity for arm in arms)
        self._closing = False

    @property
    def compares(self) -> bool:
        """Whether there is more than one version that a reader may get."""
        return len(self.arms) > 1

    @property
    def name(self) -> str:
        """Of the only arm; else `split`."""
        return "split" if self.compares else self._only.name

    @property
    def model(self) -> ModelInfo:
        """Of the only arm; else what can be said for all of them, with a version that changes as they do."""
        if not self.compares:
            return self._only.model
        mixed = hashlib.sha256()
        for arm in self.arms.values():
            mixed.update(f"{arm.name}:{arm.backend.model.version}\n".encode())
        return ModelInfo(f"one of {len(self.arms)} versions that are being compared", mixed.hexdigest())

    def model_for(self, user: str) -> ModelInfo:
        """The model of this user's arm."""
        return self._arm(user).backend.model

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run every arm, and the recorder around them, so that stories cut at the end are noted too."""
        async with contextlib.AsyncExitStack() as stack:
            recording = self.recorder.running()
            recording.__enter__()
            # Its last batch may take seconds, which the loop needs for streams that are ending.
            stack.push_async_callback(asyncio.to_thread, recording.__exit__, None, None, None)
            for arm in self.arms.values():
                await stack.enter_async_context(arm.backend.running())
            self._closing = False
            try:
                yield
            finally:
                self._closing = True

    def health(self) -> Health:
        """Ready while every arm is, for each has readers whom no other one will serve. Arms are not named."""
        if not self.compares:
            return self._only.health()
        each = [arm.backend.health() for arm in self.arms.values()]
        worst = next((health for health in each if not health.ready), each[0])
        detail = worst.detail if worst.ready else f"a version under test: {worst.detail}"
        engines = [health.engine for health in each if health.engine is not None]
        return replace(worst, detail=detail, engine=_together(engines) if engines else None)

    async def submit(self, request: GenerationRequest) -> Stream:
        """Begin a story with its visitor's arm; see `Backend.submit`. No story waits for the recorder."""
        request = replace(request, user=request.user or new_id(), story_id=request.story_id or new_id())
        arm = self._arm(request.user)
        self.recorder.add(self._exposure(request, arm))
        began = time.perf_counter()
        try:
            stream = await arm.backend.submit(request)
        except Exception as error:
            outcome: Outcome = "refused" if isinstance(error, BusyError) else "failed"
            waited = time.perf_counter() - began
            self._end(request, outcome, served_by=arm.backend.name, usage=Usage(0, 0, waited, waited, waited))
            raise
        return RecordedStream(self, request, stream, began)

    def rate(self, story: str, rating: int) -> None:
        """A reader's verdict on a story: 1 up, -1 down, 0 taken back."""
        self.recorder.add(Rating(story=story, rating=rating))

    def ended(
        self, request: GenerationRequest, stream: RecordedStream, completion: Completion | None
    ) -> None:
        """A story ended; without a completion it failed, or nobody read it any more."""
        if completion is None:
            outcome: Outcome = "failed" if stream.failed else "stopped"
        else:
            outcome = OUTCOMES[completion.finish_reason]
        if outcome == "stopped" and self._closing:
            outcome = "aborted"
        usage = stream.usage if completion is None else completion.usage
        self._end(request, outcome, served_by=stream.served_by, usage=usage)

    def _end(self, request: GenerationRequest, outcome: Outcome, *, served_by: str, usage: Usage) -> None:
        tokens, rate = usage.completion_tokens, usage.tokens_per_second
        self.recorder.add(
            Ending(
                story=request.story_id,
                outcome=outcome,
                tokens=tokens,
                ttft=usage.ttft if tokens else None,
                duration=usage.duration,
                rate=rate if rate > 0 else None,
                served_by=served_by,
            )
        )

    def _exposure(self, request: GenerationRequest, arm: Arm) -> Exposure:
        return Exposure(
            story=request.story_id,
            test=self.split.name,
            split=str(self.split),
            variant=arm.name,
            user_hash=self.recorder.hashed(request.user),
            digest=arm.backend.model.version,
            version=arm.version,
            prompt=request.prompt if self.recorder.keeps_prompts else None,
        )

    @property
    def _only(self) -> Backend:
        return next(iter(self.arms.values())).backend

    def _arm(self, visitor: str) -> Arm:
        return self.arms[self.split.assign(visitor)]


def noting(backend: Backend) -> SplitBackend | None:
    """The backend that notes stories, where there is one: it may stand behind the service's meter."""
    while isinstance(backend, MeteredBackend):
        backend = backend.backend
    return backend if isinstance(backend, SplitBackend) else None


class RecordedStream:
    """A stream of an arm, watched on its way. However it ends, it is noted once."""

    def __init__(
        self, backend: SplitBackend, request: GenerationRequest, stream: Stream, began: float
    ) -> None:
        self.failed = False
        self._timer = StreamTimer(began)
        self._backend = backend
        self._request = request
        self._stream = stream

    @property
    def served_by(self) -> str:
        """Who writes at this moment."""
        return self._stream.served_by

    @property
    def completion(self) -> Completion:
        """How the story ended."""
        return self._stream.completion

    @property
    def usage(self) -> Usage:
        """What has come so far, as it was seen here: for a story that is left before it has a completion."""
        return self._timer.usage()

    def cancel(self) -> object:
        """End the story at the next step."""
        return self._stream.cancel()

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        completion: Completion | None = None
        try:
            async for chunk in self._stream:
                self._timer.add(chunk)
                yield chunk
            completion = self._stream.completion
        except Exception:
            self.failed = True
            raise
        finally:  # also where whoever read it is gone
            self._backend.ended(self._request, self, completion)


def _together(engines: list[EngineStats]) -> EngineStats:
    """Several engines' figures as one's."""
    first, *others = engines
    for other in others:
        finished = {
            reason: first.finished.get(reason, 0) + other.finished.get(reason, 0)
            for reason in {**first.finished, **other.finished}
        }
        first = replace(
            first,
            healthy=first.healthy and other.healthy,
            slots=first.slots + other.slots,
            active=first.active + other.active,
            waiting=first.waiting + other.waiting,
            queue_limit=first.queue_limit + other.queue_limit,
            steps=first.steps + other.steps,
            tokens=first.tokens + other.tokens,
            prompt_tokens=first.prompt_tokens + other.prompt_tokens,
            finished=finished,
            refused=first.refused + other.refused,
            last_error=first.last_error or other.last_error,
        )
    return first
