"""One stream from submission to its end, as the scheduler and the consumer share it.

The scheduler's thread writes a `Job`, any other thread reads its `Stream`, chunk by chunk, with or without an event
loop. What crosses is a few fields whose single operations are atomic (`deque.append`, `deque.popleft`, setting a flag),
so neither side ever waits for the other: a slow consumer costs the engine nothing. What waits for a consumer is bounded
by `max_tokens`.

A consumer that finds nothing registers a waiter; the engine collects the waiters of a whole step and wakes each event
loop once. A late consumer gets all that has come since in one chunk.

A story with wishes is drawn until one meets them (`Job.redraw`), in the same slot; nothing is sent before it is whole.

A stop string may lie across the borders of chunks, and none of it may be sent. So a `StopMatcher` holds back the end of
the text as long as it may still become a stop string, and not one character more.
"""

import asyncio
import contextlib
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from model.architecture.folder import END_ID
from model.architecture.tokenizer import StoryTokenizer, StreamDecoder
from model.engine.title import split_title, title_of
from model.errors import StoryError
from model.generation import (
    Chunk,
    Completion,
    FinishReason,
    GenerationRequest,
    PromptEcho,
    TokenLogprob,
    Usage,
    choice_seed,
)
from model.runtimes.protocol import Logits, Runtime
from model.runtimes.sampling import log_probabilities
from model.wishes import DRAWN_TOKENS, DRAWS

if TYPE_CHECKING:
    from model.engine.scheduler import Scheduler

_SENTENCE_MARK = re.compile(r'[.!?"\u201c\u201e\n]')


class StopMatcher:
    """Lets text through up to the first of several stop strings.

    The first is the one that is complete first, and of those complete at once the longest: a definition that
    does not depend on how the text was cut. What was released, joined, is the text before that stop string.
    """

    __slots__ = ("_first", "_longest", "_words", "held", "stopped")

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(words)
        self._first = {word[0] for word in self._words}
        self._longest = max(map(len, self._words), default=0)
        self.held = ""
        """Text that came and was not released: it may be the beginning of a stop string."""
        self.stopped = False
        """Whether a stop string was met; no text is released after it."""

    def push(self, text: str) -> str:
        """Take in `text` and return what may be shown now."""
        if self.stopped:
            return ""
        if not self.held and self._first.isdisjoint(text):
            return text
        whole = self.held + text
        found = [(start + len(word), start) for word in self._words if (start := whole.find(word)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return whole[: min(found)[1]]
        ends = range(max(0, len(whole) - self._longest + 1), len(whole))
        keep = next(
            (
                at
                for at in ends
                if whole[at] in self._first and any(word.startswith(whole[at:]) for word in self._words)
            ),
            len(whole),
        )
        self.held = whole[keep:]
        return whole[:keep]

    def flush(self) -> str:
        """The text held back, which no stop string will claim any more: the stream has ended."""
        text, self.held = self.held, ""
        return text


Item = tuple[str, int | None, TokenLogprob | None]
"""Text that may be sent, the token that it came with, and its log-probability where one was asked for."""


class Draw(NamedTuple):
    """A whole story that was generated for one with wishes."""

    unmet: int
    reason: FinishReason
    tokens: list[int]
    items: deque[Item]
    parts: list[str]
    logprobs: list[TokenLogprob]


class Job:
    """A story being generated. Fields without a comment belong to the scheduler's thread."""

    def __init__(self, request: GenerationRequest, tokenizer: StoryTokenizer, now: float) -> None:
        self.request = request
        prompt = request.prompt
        self.prompt = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        read = self.prompt
        if isinstance(prompt, str) and not request.echo:
            title = title_of(prompt, request.wishes.words, names=request.sampling.keep_names)
            read = tokenizer.encode(title + prompt) if title else read
        self.story = [END_ID, *(read[1:] if read[:1] == [END_ID] else read)]
        self.first = len(self.story)  # where the generated tokens begin in `story`
        self.scores: Iterator[Logits] | None = None  # of the prompt's tokens, while they are being computed
        self.taken = 0  # prompt tokens that prefill has taken in
        self.state: Any = None  # the runtime's state after them
        self.prefix = b""  # their hash, chunk by chunk
        self.admitted = 0.0
        # Read and written by all threads.
        self.pending: deque[Item] = deque()
        self.waiters: deque[Any] = deque()  # consumers to wake when there is something to read
        self.enders: deque[Any] = deque()  # and those to wake when the stream has ended
        self.cancelled = False
        self.done = False  # set last: then nothing else changes any more
        self.completion: Completion | None = None
        self.echo: PromptEcho | None = None  # until it is in a chunk

        self._tokenizer = tokenizer
        self._prompt_tokens = len(read)
        self._submitted = now
        self._first_at = self._last_at = 0.0
        self._limit = self.first + request.max_tokens
        self.sampling = request.sampling  # of this draw
        self._draws = self._drawn = 0  # draws begun, and tokens of those that have ended
        self._best: Draw | None = None  # of those with wishes that were not met
        self._begin_draw()
        self._before = prompt if isinstance(prompt, str) else ""
        if request.wishes and not isinstance(prompt, str):
            self._before = split_title(self._decoder.begun, request.wishes.words)[1]
        self._searched = self.first + request.sampling.min_tokens  # no stop string is looked for before
        self._echo: PromptEcho | None = None
        self._prompt_logprobs: list[TokenLogprob] = []
        if request.echo and request.prompt_logprobs is None:
            self.send_prompt()

    def _begin_draw(self) -> None:
        request = self.request
        self._items: deque[Item] = deque() if request.wishes else self.pending  # a draw is sent when it is taken
        self._logprobs: list[TokenLogprob] = []
        self._parts: list[str] = []
        self._decoder = StreamDecoder(self._tokenizer, () if isinstance(request.prompt, str) else self.prompt)
        self._matcher = StopMatcher(request.stop) if request.stop else None
        self._draws += 1
        self._last = self._draws == DRAWS or self._drawn >= DRAWN_TOKENS
        self._lost = False

    def redraw(self, reason: FinishReason) -> bool:
        """Begin another draw of a story whose last one has ended; False where none is needed, or there were enough."""
        if not self.request.wishes or not self.request.max_tokens:
            return False
        if not self._lost:
            self._release_held()
            unmet = self.request.wishes.unmet(self._before + "".join(self._parts))
            if self._best is None or unmet < self._best.unmet:
                self._best = Draw(unmet, reason, self.story[self.first :], self._items, self._parts, self._logprobs)
            if unmet == 0 or self._last:
                return False
        self._drawn += len(self.story) - self.first
        del self.story[self.first :]
        self.sampling = replace(self.sampling, seed=choice_seed(self.request.sampling.seed, self._draws))
        self._begin_draw()
        self.taken, self.state, self.prefix = 0, None, b""
        return True

    def _take_draw(self, draw: "Draw") -> None:
        self.story[self.first :], self._items, self._parts, self._logprobs = draw[2:]
        self._first_at = self._last_at  # nothing was sent before

    def _release_held(self) -> None:
        """Let the text go that the matcher holds back."""
        if self._matcher is not None and (text := self._matcher.flush()):
            self._parts.append(text)
            self._items.append((text, None, None))

    def score_prompt(self, runtime: Runtime) -> Iterator[Logits]:
        """Logits (T, V) behind the prompt's tokens, chunk by chunk: at each place of the story, in order."""
        starts = [place for place, token in enumerate(self.story) if token == END_ID]
        for start, end in pairwise([*starts, self.first]):
            for _, logits_BTV in runtime.score([self.story[start:end]]):
                yield logits_BTV[0]

    def add_scores(self, logits_TV: Logits) -> None:
        """Take in the next chunk of `score_prompt`."""
        place = len(self._prompt_logprobs) + 1
        tokens = self.story[place : min(place + len(logits_TV), self.first)]
        self._prompt_logprobs += self._logprobs_of(tokens, logits_TV[: len(tokens)], self.request.prompt_logprobs)

    def send_prompt(self) -> None:
        """Let the prompt come back to the consumer, with its log-probabilities where they were computed."""
        text = self.request.prompt if isinstance(self.request.prompt, str) else self._decoder.begun
        texts = tuple(self._tokenizer.decode([token]) for token in self.prompt)
        # The first token of a prompt has none, whether or not the start of the story was put before it.
        known = self._prompt_logprobs[len(self._prompt_logprobs) + 1 - len(self.prompt) :]
        logprobs = (None, *known) if self.prompt and self.request.prompt_logprobs is not None else ()
        self.echo = self._echo = PromptEcho(text, tuple(self.prompt), texts, logprobs)
        self.pending.append(("", None, None))

    def accept(self, token: int, logits_V: Logits | None, now: float) -> FinishReason | None:
        """Add a sampled token to the story; return why the story ends here, if it does.

        `logits_V` are given when log-probabilities were asked for.
        """
        if not self._first_at:
            self._first_at = now
        self._last_at = now
        if token == END_ID:
            if logits_V is not None and self.request.prompt_logprobs is not None:
                # A scored text ends with a generated token, as with vLLM: evaluation harnesses drop the last unseen.
                (end,) = self._logprobs_of([token], logits_V[None], self.request.logprobs)
                self._logprobs.append(end)
                self._items.append(("", None, end))
            return "stop"
        self.story.append(token)
        text = self._decoder.push(token)
        matcher = self._matcher if len(self.story) > self._searched else None
        if matcher is not None:
            text = matcher.push(text)
        logprob = None
        if logits_V is not None:
            (logprob,) = self._logprobs_of([token], logits_V[None], self.request.logprobs)
            self._logprobs.append(logprob)
        self._parts.append(text)
        self._items.append((text, token, logprob))
        if matcher is not None and matcher.stopped:
            return "stop"
        if self.request.wishes and not self._last and _SENTENCE_MARK.search(text):
            self._lost = self.request.wishes.is_lost(self._before + "".join(self._parts))
            if self._lost:
                return "stop"
        return "length" if len(self.story) == self._limit else None

    def finish(self, reason: FinishReason, now: float, error: str | None = None) -> None:
        """End the stream: release the text that was held back, and record how it ended.

        A character that was cut short, by `max_tokens` or a cancel, is left out.
        """
        self._release_held()
        if self._best is not None:
            reason = self._best.reason if reason in ("stop", "length") else reason
            self._take_draw(self._best)
        if self._items is not self.pending:
            self.pending.extend(self._items)
        ended = (self._last_at or now) - self._submitted
        self.completion = Completion(
            text="".join(self._parts),
            finish_reason=reason,
            usage=Usage(
                prompt_tokens=self._prompt_tokens,
                completion_tokens=len(self.story) - self.first,
                queued=(self.admitted or now) - self._submitted,
                ttft=self._first_at - self._submitted if self._first_at else ended,
                duration=ended,
            ),
            logprobs=tuple(self._logprobs),
            error=error,
            prompt=self._echo,
        )
        self.state = self.scores = None
        self.done = True

    def _logprobs_of(self, tokens: Sequence[int], logits_TV: Logits, best: int | None) -> list[TokenLogprob]:
        decode = self._tokenizer.decode
        return [
            TokenLogprob(token, decode([token]), own, tuple((i, decode([i]), p) for i, p in alternatives))
            for token, (own, alternatives) in zip(tokens, log_probabilities(logits_TV, tokens, best or 0), strict=True)
        ]


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

    def __init__(self, job: Job, scheduler: "Scheduler", owner: object) -> None:
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
