"""The one thread that owns the runtime: it admits, prefills, steps and samples, round after round.

Each round: (1) drop cancelled streams; (2) give free slots to waiting requests, in order of arrival; (3) prefill a
bounded number of prompt tokens; (4) advance all streams by one token; (5) wake the consumers. Streams join and leave
between any two rounds (continuous batching: Yu et al. 2022, Orca).

Prompts are read in chunks cut at multiples of `prefill_chunk` from their own beginning, never where the other
streams happen to leave time: so a prompt's logits, and with them the story, do not depend on the load. A round reads
at most one chunk's worth of tokens, and long prompts take turns: neither decoding streams nor a short prompt wait for
a long one.

The states after the chunks of the latest prompts are kept (automatic prefix caching, as in vLLM): a prompt that many
streams have is read once, and a fork or a continuation reads only what is new. The chunks are cut alike with and
without, so that no bit changes.

A `DecodeBatch` holds the streams that decode together: their states in the runtime, their rows in the sampler, their
next tokens. Rows join at the end and leave by swap-remove, here as in the runtime's own batch, so that row numbers
agree.

Shapes: B streams in the batch, V vocabulary.
"""

import hashlib
import logging
import threading
import time
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from model.architecture.folder import END_ID
from model.architecture.tokenizer import TokenMasks
from model.engine.stream import Job, Waiter, wake
from model.errors import BusyError, StoryError
from model.generation import FinishReason
from model.runtimes.protocol import Batch, Logits, RowLogits, Runtime, Sampler, SamplingRuntime, Tokens
from model.runtimes.sampling import SamplingRows

PREFIXES = 64
"""Prefixes of prompts whose states are kept, of 0.4 MB each for the shipped model."""

log = logging.getLogger("model.engine.engine")

NOT_FINITE = "the network's output is not a number; the story ends here"


def failure(error: Exception) -> str:
    """A failure in one line, without the details, which go to the log: they may hold what is private."""
    return f"the model failed ({type(error).__name__}); the story ends here"


class Ending(NamedTuple):
    """Why a stream ends."""

    reason: FinishReason
    error: str | None = None


class Prefix(NamedTuple):
    """What the runtime made of a story's first tokens. Neither changes."""

    logits_V: Logits
    state: Any


class DecodeBatch:
    """Jobs in the order of the batch's rows. Used by the scheduler's thread only."""

    def __init__(self, runtime: Runtime, slots: int, masks: TokenMasks) -> None:
        self.jobs: list[Job] = []
        self.tokens = 0  # generated, all streams together
        self._runtime = runtime
        self._states: Batch | None = None
        self._next_B = np.zeros(slots, dtype=np.int64)  # the token that each row takes in next
        self._position_B = np.zeros(slots, dtype=np.int64)  # how many each row has taken in
        self._rows: Sampler
        self._single: Sampler
        self._advance: Callable[[Tokens, Any], RowLogits]
        if isinstance(runtime, SamplingRuntime):
            self._advance, self._rows = runtime.step_in_place, runtime.new_sampler(slots, masks)
            self._single = runtime.new_host_sampler(1, masks)
        else:
            self._advance, self._rows = runtime.step, SamplingRows(slots, runtime.vocab_size, masks)
            self._single = SamplingRows(1, runtime.vocab_size, masks)

    def join(self, job: Job, logits_V: Logits) -> Ending | None:
        """Add a job whose prompt was read, with the logits after it; return how it ends, if its first token ends it.

        Raises whatever the runtime raises; the job has not joined then.
        """
        position = len(job.story)
        self._single.set(0, job.sampling, job.story[1:])
        token_B, usable_B = self._single.sample(logits_V[None], np.array([position]))
        if not usable_B[0]:
            return Ending("error", NOT_FINITE)
        token = int(token_B[0])
        self.tokens += token != END_ID
        wanted_V = logits_V if job.request.logprobs is not None else None
        reason = job.accept(token, wanted_V, time.perf_counter())
        if reason is not None:
            return Ending(reason)
        if self._states is None:
            self._states = self._runtime.new_batch()
        row = self._states.append(job.state)
        job.state = None
        self.jobs.append(job)
        self._next_B[row] = token
        self._position_B[row] = position
        self._rows.set(row, job.sampling, job.story[1:-1], [token])
        return None

    def step(self) -> list[tuple[int, Ending]]:
        """Advance every row by one token. Returns the rows that have ended, in descending order.

        Raises whatever the runtime raises: the batch's states are lost then.
        """
        rows = len(self.jobs)
        logits_BV = self._advance(self._next_B[:rows], self._states)
        position_B = self._position_B[:rows]
        position_B += 1
        chosen_B, usable_B = self._rows.sample(logits_BV, position_B)
        now = time.perf_counter()
        unusable = set() if usable_B.all() else set((~usable_B).nonzero()[0].tolist())
        ended: list[tuple[int, Ending]] = []
        for row, (job, token) in enumerate(zip(self.jobs, chosen_B.tolist(), strict=True)):
            if row in unusable:
                ended.append((row, Ending("error", NOT_FINITE)))
                continue
            try:
                reason = job.accept(token, logits_BV[row] if job.request.logprobs is not None else None, now)
                if reason is None:
                    self._rows.note(row, token)
            except Exception as error:
                log.exception("one stream failed")
                ended.append((row, Ending("error", failure(error))))
                continue
            self.tokens += token != END_ID
            if reason is not None:
                ended.append((row, Ending(reason)))
        self._next_B[:rows] = chosen_B
        return ended[::-1]

    def leave(self, row: int) -> Job:
        """Take a row out. Raises whatever the runtime raises."""
        assert self._states is not None, "there is no row without states"
        job, last = self.jobs[row], len(self.jobs) - 1
        self._states.remove(row)
        self.jobs[row] = self.jobs[last]
        self._next_B[row] = self._next_B[last]
        self._position_B[row] = self._position_B[last]
        self._rows.move(last, row)
        self.jobs.pop()
        return job

    def abandon(self) -> list[Job]:
        """Give up all states, which a failed step has left undefined; the next job gets a new batch."""
        jobs, self.jobs, self._states = self.jobs, [], None
        return jobs


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
        self.refused = self.steps = self.prompt_tokens = self.cached_tokens = 0
        self.waiting: deque[Job] = deque()
        self.held = 0  # slots taken
        self._runtime = runtime
        self._chunk = prefill_chunk
        self._prefilling: deque[Job] = deque()
        self._prefixes = OrderedDict[bytes, Prefix]()  # by the hash chain over their chunks; the latest used last
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
            job.prefix = hashlib.blake2b(job.prefix + array("q", chunk).tobytes(), digest_size=16).digest()
            try:
                if (known := self._prefixes.get(job.prefix)) is None:
                    budget -= len(chunk)
                    logits_V, state = self._runtime.prefill(chunk, job.state)
                    self.healthy = True
                    self.prompt_tokens += len(chunk)
                    known = self._prefixes[job.prefix] = Prefix(logits_V.copy(), state)
                    if len(self._prefixes) > PREFIXES:
                        self._prefixes.popitem(last=False)
                else:
                    self._prefixes.move_to_end(job.prefix)
                    self.cached_tokens += len(chunk)
                logits_V, job.state = known
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
        if ending.reason in ("stop", "length") and job.redraw(ending.reason):
            self._prefilling.append(job)
            return
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
