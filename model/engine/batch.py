"""The streams that decode together: their states in the runtime, their rows in the sampler, their next tokens.

Rows join at the end and leave by swap-remove, here as in the runtime's own batch, so that row numbers agree.

Shapes: B streams in the batch, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from model.architecture.characters import TokenMasks
from model.architecture.config import END_ID
from model.engine.stream import Job
from model.generation import FinishReason
from model.runtimes.protocol import Batch, Logits, RowLogits, Runtime, Sampler, SamplingRuntime, Tokens
from model.runtimes.sampling import SamplingRows

log = logging.getLogger("model.engine.engine")

NOT_FINITE = "the network's output is not a number; the story ends here"


def failure(error: Exception) -> str:
    """A failure in one line, without the details, which go to the log: they may hold what is private."""
    return f"the model failed ({type(error).__name__}); the story ends here"


class Ending(NamedTuple):
    """Why a stream ends."""

    reason: FinishReason
    error: str | None = None


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
        self._single.set(0, job.request.sampling, job.story[1:])
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
        self._rows.set(row, job.request.sampling, job.story[1:-1], [token])
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
