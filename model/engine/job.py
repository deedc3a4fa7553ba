"""One stream from submission to its end, as the scheduler and the consumer share it.

The scheduler's thread writes, any other thread reads. What crosses is a few fields whose single operations are atomic
(`deque.append`, `deque.popleft`, setting a flag), so neither side ever waits for the other: a slow consumer costs the
engine nothing. What waits for a consumer is bounded by `max_tokens`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from model.architecture.config import END_ID
from model.architecture.tokenizer import StoryTokenizer, StreamDecoder
from model.engine.stop import StopMatcher
from model.generation import Completion, FinishReason, GenerationRequest, TokenLogprob, Usage
from model.runtimes.protocol import Logits
from model.runtimes.sampling import log_probabilities


class Job:
    """A story being generated. Fields without a comment belong to the scheduler's thread."""

    def __init__(self, request: GenerationRequest, tokenizer: StoryTokenizer, now: float) -> None:
        self.request = request
        self.story = [END_ID, *tokenizer.encode(request.prompt)]
        self.first = len(self.story)  # where the generated tokens begin in `story`
        self.taken = 0  # prompt tokens that prefill has taken in
        self.state: Any = None  # the runtime's state after them
        self.admitted = 0.0
        # Read and written by all threads.
        self.pending: deque[tuple[str, int | None, TokenLogprob | None]] = deque()
        self.waiters: deque[Any] = deque()  # consumers to wake when there is something to read
        self.enders: deque[Any] = deque()  # and those to wake when the stream has ended
        self.cancelled = False
        self.done = False  # set last: then nothing else changes any more
        self.completion: Completion | None = None

        self._tokenizer = tokenizer
        self._submitted = now
        self._first_at = self._last_at = 0.0
        self._limit = self.first + request.max_tokens
        self._logprobs: list[TokenLogprob] = []
        self._parts: list[str] = []
        self._decoder = StreamDecoder(tokenizer)
        self._matcher = StopMatcher(request.stop) if request.stop else None

    def accept(self, token: int, logits_V: Logits | None, now: float) -> FinishReason | None:
        """Add a sampled token to the story; return why the story ends here, if it does.

        `logits_V` are given when log-probabilities were asked for.
        """
        if not self._first_at:
            self._first_at = now
        self._last_at = now
        if token == END_ID:
            return "stop"
        self.story.append(token)
        text = self._decoder.push(token)
        matcher = self._matcher
        if matcher is not None:
            text = matcher.push(text)
        logprob = None
        if logits_V is not None:
            logprob = self._logprob(token, logits_V)
            self._logprobs.append(logprob)
        self._parts.append(text)
        self.pending.append((text, token, logprob))
        if matcher is not None and matcher.stopped:
            return "stop"
        return "length" if len(self.story) == self._limit else None

    def finish(self, reason: FinishReason, now: float, error: str | None = None) -> None:
        """End the stream: release the text that was held back, and record how it ended."""
        text = self._decoder.flush()
        if self._matcher is not None:
            text = self._matcher.push(text) + self._matcher.flush()
        if text:
            self._parts.append(text)
            self.pending.append((text, None, None))
        ended = (self._last_at or now) - self._submitted
        self.completion = Completion(
            text="".join(self._parts),
            finish_reason=reason,
            usage=Usage(
                prompt_tokens=self.first - 1,
                completion_tokens=len(self.story) - self.first,
                queued=(self.admitted or now) - self._submitted,
                ttft=self._first_at - self._submitted if self._first_at else ended,
                duration=ended,
            ),
            logprobs=tuple(self._logprobs),
            error=error,
        )
        self.state = None
        self.done = True

    def _logprob(self, token: int, logits_V: Logits) -> TokenLogprob:
        own, alternatives = log_probabilities(logits_V, token, self.request.logprobs or 0)
        decode = self._tokenizer.decode
        return TokenLogprob(token, decode([token]), own, tuple((i, decode([i]), p) for i, p in alternatives))
