"""One stream from submission to its last word, as the scheduler and the reader share it.

The scheduler's thread writes, any other thread reads. What crosses is a few fields whose single operations
are atomic (`deque.append`, `deque.popleft`, setting a flag), so neither side ever waits for the other: a slow
reader costs the engine nothing. What waits for a reader is bounded by `max_tokens`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from model.architecture.tokenizer import END_ID, StoryTokenizer, StreamDecoder
from model.engine.snapshot import KeptStates, Snapshot
from model.engine.stop import StopMatcher
from model.errors import InputError
from model.generation import Completion, FinishReason, GenerationRequest, TokenLogprob, Usage
from model.runtimes.protocol import Logits
from model.runtimes.sampling import log_probabilities


class Job:
    """A story being written. Fields without a comment belong to the scheduler's thread."""

    __slots__ = (
        "_decoder",
        "_first_at",
        "_last_at",
        "_limit",
        "_logprobs",
        "_matcher",
        "_origin",
        "_parts",
        "_submitted",
        "_tokenizer",
        "admitted",
        "base",
        "base_logits",
        "cancelled",
        "completion",
        "done",
        "enders",
        "final",
        "first",
        "kept",
        "pending",
        "prompt",
        "reading",
        "replay",
        "request",
        "row",
        "story",
        "taken",
        "waiters",
    )

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: StoryTokenizer,
        now: float,
        origin: Snapshot | None,
        keep_bytes: int,
    ) -> None:
        """Raises `InputError` if `origin` ends inside a character and `request` adds a prompt."""
        self.request = request
        self.story = [END_ID, *(origin.tokens if origin else ()), *tokenizer.encode(request.prompt)]
        self.first = len(self.story)  # where the tokens that this stream writes begin in `story`
        self.taken = 0  # tokens that prefill has taken in
        self.reading: Any = None  # the state after them
        self.row = -1  # in the batch; -1 while not in it
        self.replay = 0  # where in `story` the next token stands that is fed again; 0: none
        self.admitted = 0.0
        # States to go on from: after the prompt, at tokens on the way if asked for, and at the end.
        self.base: Any = origin.state if origin else None
        self.base_logits: Logits | None = origin.logits if origin and not request.prompt else None
        self.kept = KeptStates(self.first, keep_bytes) if keep_bytes else None
        self.final: Any = None
        # Read and written by all threads.
        self.pending: deque[tuple[str, int | None, TokenLogprob | None]] = deque()
        self.waiters: deque[Any] = deque()  # readers to wake when there is something to read
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
        if origin is not None and request.prompt:
            if origin.tail:
                raise InputError("prompt", "cannot be added here: the snapshot ends inside a character")
            self.prompt = origin.prompt + origin.text + request.prompt
            self._origin = (b"", "")
        elif origin is not None:
            self.prompt = origin.prompt + origin.text[: len(origin.text) - len(origin.held)]
            self._origin = (origin.tail, origin.held)
        else:
            self.prompt = request.prompt
            self._origin = (b"", "")
        self._decoder, self._matcher, opening = self._text_side()
        if opening:
            self._parts.append(opening)
            self.pending.append((opening, None, None))

    def _text_side(self) -> tuple[StreamDecoder, StopMatcher | None, str]:
        """Decoder and stop matcher as they stand before the first token, and the text that is free
        already.
        """
        tail, held = self._origin
        decoder = StreamDecoder(self._tokenizer, tail)
        if not self.request.stop:
            return decoder, None, held
        matcher = StopMatcher(self.request.stop)
        return decoder, matcher, matcher.push(held)

    @property
    def written(self) -> int:
        """Tokens written so far."""
        return len(self.story) - self.first

    def accept(self, token: int, logits_V: Logits | None, now: float) -> FinishReason | None:
        """Add a sampled token to the story; why the story ends here, if it does.

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
        """End the stream: free what was held back, and say how it ended."""
        matcher = self._matcher
        text = self._decoder.flush()
        if matcher is not None:
            text = matcher.push(text) + matcher.flush()
        if text:
            self._parts.append(text)
            self.pending.append((text, None, None))
        ended = (self._last_at or now) - self._submitted
        self.completion = Completion(
            text="".join(self._parts),
            finish_reason=reason,
            usage=Usage(
                prompt_tokens=self.first - 1,
                completion_tokens=self.written,
                queued=(self.admitted or now) - self._submitted,
                ttft=self._first_at - self._submitted if self._first_at else ended,
                duration=ended,
            ),
            logprobs=tuple(self._logprobs),
            error=error,
        )
        self.row = -1
        self.done = True

    def _logprob(self, token: int, logits_V: Logits) -> TokenLogprob:
        best = self.request.logprobs or 0
        own, alternatives = log_probabilities(logits_V, token, best)
        decode = self._tokenizer.decode
        return TokenLogprob(token, decode([token]), own, tuple((i, decode([i]), p) for i, p in alternatives))

    def check_place(self, at: int | None) -> int:
        """`at`, or the number of tokens written. Raises `InputError` if that token has not been written."""
        if at is None:
            return self.written
        if not 0 <= at <= self.written:
            raise InputError("at", f"must be a whole number between 0 and {self.written}, got {at!r}")
        return at

    def state_before(self, at: int) -> tuple[Any, Logits | None]:
        """The latest state from which token `at` of the stream can be reached, with its logits if it is
        there.

        Raises `InputError` while the prompt has not been read.
        """
        end = self.first + at
        if self.base is None:
            raise InputError("snapshot", "needs a story that has begun; this one has not read its prompt yet")
        if self.base.position == end and self.base_logits is not None:
            return self.base, self.base_logits
        if self.final is not None and self.final.position < end:
            return self.final, None
        kept = self.kept.latest(end - 1) if self.kept is not None else None
        return (kept if kept is not None else self.base), None

    def snapshot(self, at: int, state: Any, logits: Logits | None) -> Snapshot:
        """The story after `at` tokens of this stream, to go on from `state`."""
        decoder, matcher, opening = self._text_side()
        text = opening + (matcher.held if matcher is not None else "")
        for token in self.story[self.first : self.first + at]:
            new = decoder.push(token)
            text += new
            if matcher is not None:
                matcher.push(new)
        return Snapshot(
            prompt=self.prompt,
            text=text,
            held=matcher.held if matcher is not None else "",
            tail=decoder.tail,
            tokens=tuple(self.story[1 : self.first + at]),
            state=state,
            logits=logits,
        )
