"""The stream of one story, read chunk by chunk with or without an event loop.

Consumers never take a lock that the engine holds. A consumer that finds nothing registers a waiter; the engine collects
the waiters of a whole step and wakes each event loop once. A late consumer gets all that has come since in one chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Self

from model.engine.job import Job
from model.errors import StoryError
from model.generation import Chunk, Completion, GenerationRequest

if TYPE_CHECKING:
    from model.engine.scheduler import Scheduler


class LoopWaiter(NamedTuple):
    """A coroutine that waits for a job."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]


Waiter = LoopWaiter | threading.Event


def wake(waiters: Iterable[Waiter]) -> None:
    """Wake all, each event loop by a single call."""
    by_loop: dict[asyncio.AbstractEventLoop, list[LoopWaiter]] = {}
    for waiter in waiters:
        if isinstance(waiter, LoopWaiter):
            by_loop.setdefault(waiter.loop, []).append(waiter)
        else:
            waiter.set()
    for loop, group in by_loop.items():
        # A loop that was closed meanwhile has no consumer left to wake; its streams end when let go of.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_release, group)


def _release(group: list[LoopWaiter]) -> None:
    for waiter in group:
        if not waiter.future.done():
            waiter.future.set_result(None)


class Stream:
    """A story being generated: iterate it with `for` or `async for`, from one consumer at a time.

    Iteration ends with the story; `completion` then says how it ended, an error too, which is not raised. Dropping the
    stream, leaving a `with` block, or `cancel()` frees its slot at the next step.
    """

    served_by = "local"
    fingerprint: str | None = None
    """Of what generates; the backend sets it. See `model.serving.backend.Stream`."""

    def __init__(self, job: Job, scheduler: Scheduler, owner: object) -> None:
        self._job = job
        self._scheduler = scheduler
        self._owner = owner  # an engine lives as long as one of its streams is read

    @property
    def request(self) -> GenerationRequest:
        """What was asked for."""
        return self._job.request

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens written so far, read or not."""
        return tuple(self._job.story[self._job.first :])

    @property
    def completion(self) -> Completion:
        """The whole story. Raises `StoryError` while it is being written."""
        if self._job.completion is None or not self._job.done:
            raise StoryError("the story is still being written: its completion comes with its end")
        return self._job.completion

    def cancel(self) -> None:
        """Stop the story. It takes effect at the engine's next step."""
        self._job.cancelled = True
        self._scheduler.check_cancelled()

    def wait(self, timeout: float | None = None) -> Completion:
        """Block until the end of the story, read or not. Raises `TimeoutError` after `timeout` seconds."""
        event = threading.Event()
        self._job.enders.append(event)
        if not self._job.done and not event.wait(timeout):
            raise TimeoutError(f"the story was not finished within {timeout} s")
        return self.completion

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        event: threading.Event | None = None
        while True:
            ended = self._job.done  # looked at before `pending`: what came last is then seen
            if self._job.pending:
                return self._take()
            if ended:
                raise StopIteration
            event = event or threading.Event()
            event.clear()
            self._job.waiters.append(event)
            if not self._job.pending and not self._job.done:
                event.wait()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while True:
            ended = self._job.done
            if self._job.pending:
                return self._take()
            if ended:
                raise StopAsyncIteration
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            self._job.waiters.append(LoopWaiter(loop, future))
            # What came before the waiter was registered would wake nobody: look again.
            if not self._job.pending and not self._job.done:
                await future

    def _take(self) -> Chunk:
        """All that has come, as one chunk."""
        pending = self._job.pending
        prompt, self._job.echo = self._job.echo, None
        if len(pending) == 1:
            text, token, logprob = pending.popleft()
            return Chunk(text, () if token is None else (token,), () if logprob is None else (logprob,), prompt)
        items = [pending.popleft() for _ in range(len(pending))]
        return Chunk(
            "".join([item[0] for item in items]),
            tuple([item[1] for item in items if item[1] is not None]),
            tuple([item[2] for item in items if item[2] is not None]),
            prompt,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        # Runs wherever the last reference goes, in the engine's own thread too: so no lock, only flags.
        if not self._job.done:
            self.cancel()
