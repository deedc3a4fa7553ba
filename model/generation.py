"""What a client asks for and what comes back: the types that engine, service, page and benchmark share.

Values are checked here, once, so that nothing behind this file has to doubt them.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from model.errors import InputError

MAX_PROMPT_CHARS = 20_000
MAX_TOKENS = 4_096
MAX_ID_CHARS = 200
MAX_LOGPROBS = 20

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: the story ended itself or met a stop string. `length`: `max_tokens` was reached."""


def _check_number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    # A NaN lies in no range, and what is no number at all must not be compared.
    inside = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not inside or (open_low and value == low):
        bound = f"above {low:g} and at most {high:g}" if open_low else f"between {low:g} and {high:g}"
        raise InputError(name, f"must be {bound}, got {value!r}")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(name, f"must be a whole number between {low} and {high}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Raises `InputError` that names the bad field."""

    temperature: float = 0.7
    """0 is greedy; up to 2."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 0.95
    """Nucleus: keep the smallest set of tokens whose probabilities sum to at least p (Holtzman et al. 2019)."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the likeliest (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in this story (Keskar et al. 2019); 1 is off."""
    seed: int = 0
    """The same seed, prompt and settings give the same story, alone or among others."""

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0, 2)
        _check_int("top_k", self.top_k, 0, 1_000_000)
        _check_number("top_p", self.top_p, 0, 1, open_low=True)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 1, 2)
        _check_int("seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One story to generate. Raises `InputError` that names the bad field."""

    prompt: str
    """The story's beginning; the model goes on from its last character. Empty: a story from nothing."""
    max_tokens: int = 400
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    """Text that ends the story; it is not part of what comes back."""
    logprobs: int | None = None
    """None: no log-probabilities. n ≥ 0: each token's own, and those of its n best alternatives."""
    cacheable: bool = True
    """Whether a response cache may serve and keep the story. False where the seed was drawn at random, so that nobody
    will ask for it again, and where the story must be generated anew, as in a measurement."""
    user: str = field(default="", compare=False)
    """Who asks: does not change the story of a model, but decides which variant serves it in an A/B test."""
    story_id: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)
    """Id of the story; a request that continues a story has that one's."""

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise InputError("prompt", f"must be text, got {type(self.prompt).__name__}")
        if len(self.prompt) > MAX_PROMPT_CHARS:
            raise InputError("prompt", f"must have at most {MAX_PROMPT_CHARS} characters, got {len(self.prompt)}")
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:
            raise InputError("prompt", f"holds half a character (a lone surrogate) at {error.start}") from None
        _check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        if len(self.stop) > 8 or not all(isinstance(text, str) and 0 < len(text) <= 200 for text in self.stop):
            raise InputError("stop", "must be at most 8 texts of 1 to 200 characters each")
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.user) > MAX_ID_CHARS:
            raise InputError("user", f"must have at most {MAX_ID_CHARS} characters, got {len(self.user)}")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of the story with its natural-log probability before sampling filters, and its best rivals."""

    token: int
    text: str
    logprob: float
    alternatives: tuple[tuple[int, str, float], ...] = ()
    """(token, text, log-probability), likeliest first."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one or more decode steps added to a story: whole characters only, possibly none."""

    text: str
    tokens: tuple[int, ...]
    """The tokens decoded for this chunk. A token may come before its text, when it holds half a character."""
    logprobs: tuple[TokenLogprob, ...] = ()


def merge_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """One chunk that holds everything of `chunks`, in order."""
    return Chunk(
        text="".join(chunk.text for chunk in chunks),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
    )


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts and times (seconds) of one finished stream."""

    prompt_tokens: int
    completion_tokens: int
    queued: float
    """From submission until a slot was free."""
    ttft: float
    """From submission to the first token."""
    duration: float
    """From submission to the last token."""

    @property
    def tokens_per_second(self) -> float:
        """Decode rate after the first token; 0 when there were fewer than two."""
        span = self.duration - self.ttft
        return (self.completion_tokens - 1) / span if self.completion_tokens > 1 and span > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole story, as it ended."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None
    """One line for the user when `finish_reason` is `error`."""
