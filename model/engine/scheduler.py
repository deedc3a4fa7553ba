"""The one thread that owns the runtime: it admits, prefills, steps and samples, round after round.

Each round: (1) drop cancelled streams; (2) give free slots to waiting requests, in order of arrival; (3) prefill a
bounded number of prompt tokens; (4) advance all streams by one token; (5) wake the consumers. Streams join and leave
between any two rounds (continuous batching: Yu et al. 2022, Orca).

Prompts are read in chunks cut at multiples of `prefill_chunk` from their own beginning, never where the other
streams happen to leave time: so a prompt's logits, and with them the story, do not depend on the load. A round reads
at most one chunk's worth of tokens, and long prompts take turns: neither decoding streams nor a short prompt wait for
a long one.

Shapes: V vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque

from model.architecture.characters import TokenMasks
from model.engine.batch import DecodeBatch, Ending, failure, log
from model.engine.stream import Job, Waiter, wake
from model.errors import BusyError, StoryError
from model.generation import FinishReason
from model.runtimes.protocol import Runtime


class Scheduler:
    """See the module. `run` and the private methods belong to its thread, the others to any."""

    def __init__(
        self, runtime: Runtime, masks: TokenMasks, *, slots: int, queue_limit: int, prefill_chunk: int
    ) -> None:
        self.slots = slots
        self.queue_limit = queue_limit
        self.healthy = True
        self.last_error: str | None = None
        self.finished: Counter[FinishReason] = Counter()
        self.refused = self.steps = self.prompt_tokens = 0
        self.waiting: deque[Job] = deque()
        self.held = 0  # slots taken
        self._runtime = runtime
        self._chunk = prefill_chunk
        self._prefilling: deque[Job] = deque()
        self._batch = DecodeBatch(runtime, slots, masks)
        self._to_wake: list[Waiter] = []
        self._hold_seconds = 0.0  # how long a stream keeps its slot, a running mean
        self._cancelled = False
        self._closing = self._cancel_all = False
        self._change = threading.Condition()

    @property
    def tokens(self) -> int:
        """Tokens written by all streams so far."""
        return self._batch.tokens

    def submit(self, job: Job) -> None:
        """Queue a job. Raises `BusyError` if the queue is full, `StoryError` if the engine is closed."""
        with self._change:
            if self._closing:
                raise StoryError("the engine is closed: it takes no more stories")
            if len(self.waiting) - (self.slots - self.held) >= self.queue_limit:
                self.refused += 1
                full = f"all {self.slots} slots are taken and {len(self.waiting)} stories wait"
                raise BusyError(f"{full}: try again later", self.retry_after())
            self.waiting.append(job)
            self._change.notify()

    def retry_after(self) -> float:
        """Seconds until a place in the queue should be free: as often as one of the slots turns over."""
        return min(max(self._hold_seconds / self.slots, 0.1), 60.0) if self._hold_seconds else 1.0

    def check_cancelled(self) -> None:
        """Look for cancelled jobs before the next step. Takes no lock: the garbage collector calls it too."""
        self._cancelled = True

    def stop(self, *, cancel: bool) -> None:
        """Take no more jobs, and end the thread when those it has are finished, or cancelled."""
        with self._change:
            self._closing = True
            self._cancel_all |= cancel
            self._cancelled |= cancel
            self._change.notify()

    def run(self) -> None:
        """The thread's body: rounds until stopped."""
        try:
            while True:
                with self._change:
                    while not (self.held or self.waiting or self._closing):
                        self._change.wait()
                    if self._closing and not (self.held or self.waiting):
                        break
                try:
                    self._round()
                except Exception as error:
                    # A runtime may fail in giving up a row too; whatever it is, no consumer is left waiting.
                    self._fail(error)
                    self._wake()
        finally:
            with self._change:
                self._closing = True
                jobs = [*self._batch.jobs, *self._prefilling, *self.waiting]
            for job in jobs:
                self._end(job, Ending("error", "the engine has stopped; the story ends here"))
            self._wake()

    def _round(self) -> None:
        if self._cancelled:
            self._cancelled = False
            self._forget_cancelled()
        if self.waiting:
            self._admit()
        if self._prefilling:
            self._prefill()
        self._wake()
        if self._batch.jobs:
            self._step()
            self._wake()

    def _forget_cancelled(self) -> None:
        with self._change:
            cancelled = [job for job in self.waiting if job.cancelled or self._cancel_all]
            for job in cancelled:
                self.waiting.remove(job)
        for job in [job for job in self._prefilling if job.cancelled or self._cancel_all]:
            self._prefilling.remove(job)
            cancelled.append(job)
        for job in cancelled:
            self._end(job, Ending("cancelled"))
        for row in range(len(self._batch.jobs) - 1, -1, -1):
            if self._batch.jobs[row].cancelled or self._cancel_all:
                self._leave(row, Ending("cancelled"))

    def _admit(self) -> None:
        now = time.perf_counter()
        while self.held < self.slots:
            with self._change:
                if not self.waiting:
                    return
                job = self.waiting.popleft()
                self.held += 1
            job.admitted = now
            if job.request.prompt_logprobs is not None:
                job.scores = job.score_prompt(self._runtime)
            elif not job.request.max_tokens:
                self._end(job, Ending("length"))
                continue
            self._prefilling.append(job)

    def _prefill(self) -> None:
        """Read one chunk's worth of prompt tokens, a chunk of each prompt in turn."""
        budget = self._chunk
        while self._prefilling and budget > 0:
            job = self._prefilling.popleft()
            if job.scores is not None:
                budget -= self._score(job)
                continue
            chunk = job.story[job.taken : min(job.taken + self._chunk, job.first)]
            budget -= len(chunk)
            try:
                logits_V, job.state = self._runtime.prefill(chunk, job.state)
                self.healthy = True
                self.prompt_tokens += len(chunk)
                job.taken += len(chunk)
                if job.taken < job.first:
                    self._prefilling.append(job)
                    continue
                ending = self._batch.join(job, logits_V)
            except Exception as error:
                self._unhealthy(error)
                ending = Ending("error", failure(error))
            if ending is not None:
                self._end(job, ending)
            else:
                self._collect(job.waiters)

    def _score(self, job: Job) -> int:
        """Compute one chunk of the prompt's log-probabilities. Returns how many tokens it had."""
        try:
            assert job.scores is not None
            logits_TV = next(job.scores, None)
            self.healthy = True
            if logits_TV is not None:
                job.add_scores(logits_TV)
                self._prefilling.append(job)
                return len(logits_TV)
            job.scores = None
            job.send_prompt()
        except Exception as error:
            self._unhealthy(error)
            self._end(job, Ending("error", failure(error)))
            return 0
        if job.request.max_tokens:
            self._prefilling.appendleft(job)
            self._collect(job.waiters)
        else:
            self._end(job, Ending("length"))
        return 0

    def _step(self) -> None:
        try:
            ended = self._batch.step()
            self.healthy = True
            self.steps += 1
            for row, ending in ended:
                self._leave(row, ending)
        except Exception as error:
            self._fail(error)
        for job in self._batch.jobs:
            if job.waiters:
                self._collect(job.waiters)

    def _leave(self, row: int, ending: Ending) -> None:
        self._end(self._batch.leave(row), ending)

    def _fail(self, error: Exception) -> None:
        """The runtime failed while it held the batch: the streams in it end, and the next get a new one."""
        self._unhealthy(error)
        for job in self._batch.abandon():
            self._end(job, Ending("error", failure(error)))

    def _end(self, job: Job, ending: Ending) -> None:
        now = time.perf_counter()
        if job.admitted:
            self.held -= 1
            taken = now - job.admitted
            self._hold_seconds = 0.8 * self._hold_seconds + 0.2 * taken if self._hold_seconds else taken
        self.finished[ending.reason] += 1
        job.finish(ending.reason, now, ending.error)
        self._collect(job.waiters)
        self._collect(job.enders)

    def _collect(self, waiters: deque[Waiter]) -> None:
        while waiters:
            self._to_wake.append(waiters.popleft())

    def _wake(self) -> None:
        if self._to_wake:
            waiters, self._to_wake = self._to_wake, []
            wake(waiters)

    def _unhealthy(self, error: Exception) -> None:
        log.error("the runtime failed", exc_info=error)
        self.healthy = False
        self.last_error = failure(error)
