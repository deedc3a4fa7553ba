"""What a client asks for and what comes back: the types that engine, service, page and benchmark share.

Values are checked here, once, so that nothing behind this file has to doubt them.
"""

import hashlib
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from model.errors import InputError
from model.wishes import Wishes

MAX_PROMPT_CHARS = 20_000
MAX_PROMPT_TOKENS = 20_000
MAX_TOKENS = 4_096
MAX_ID_CHARS = 200
MAX_LOGPROBS = 20
MAX_BIASES = 1_024
MAX_SEED = 2**63 - 1
MAX_TOKEN_ID = 2**20 - 1

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: the story ended itself or met a stop string. `length`: `max_tokens` was reached."""


def new_seed() -> int:
    """Draw a seed for a request that names none: ten digits at most, so JavaScript's numbers hold it exactly."""
    return secrets.randbelow(2**32)


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

    temperature: float = 0.85
    """0 is greedy; up to 2."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 0.95
    """Nucleus: keep the smallest set of tokens whose probabilities sum to at least p (Holtzman et al. 2019)."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the likeliest (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in this story (Keskar et al. 2019); 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens generated so far, -2 to 2 (OpenAI); the prompt's do not count."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time that it was generated so far, -2 to 2 (OpenAI)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, -100 to 100): added to that token's logit. At most 1,024 tokens; kept in the order of their ids."""
    ignore_eos: bool = False
    """Never sample the end of story, so that the story has `max_tokens` tokens unless a stop string ends it."""
    min_tokens: int = 0
    """Tokens before which neither the end of story is sampled nor a stop string looked for."""
    keep_names: bool = True
    """Keep the names: those of a text prompt are read once more in a line before it (`model.engine.title`; not with
    `echo`), and one of several tokens is spelled as the story spelled it before (`model.architecture.names`)."""
    seed: int = 0
    """The same seed, prompt and settings give the same story, alone or among others. See `GenerationRequest.prompt`."""

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0, 2)
        _check_int("top_k", self.top_k, 0, 1_000_000)
        _check_number("top_p", self.top_p, 0, 1, open_low=True)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 1, 2)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        if len(self.logit_bias) > MAX_BIASES:
            raise InputError("logit_bias", f"must name at most {MAX_BIASES} tokens, got {len(self.logit_bias)}")
        for token, bias in self.logit_bias:
            _check_int("logit_bias", token, 0, MAX_TOKEN_ID)
            _check_number("logit_bias", bias, -100, 100)
        if len(dict(self.logit_bias)) < len(self.logit_bias):
            raise InputError("logit_bias", "must name each token once")
        object.__setattr__(self, "logit_bias", tuple(sorted(self.logit_bias)))
        for name in ("ignore_eos", "keep_names"):
            if not isinstance(value := getattr(self, name), bool):
                raise InputError(name, f"must be true or false, got {value!r}")
        _check_int("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        _check_int("seed", self.seed, 0, MAX_SEED)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One story to generate. Raises `InputError` that names the bad field."""

    prompt: str | tuple[int, ...]
    """The story's beginning, as text or as token ids; the model goes on from its end. Empty: a story from nothing.

    Token ids are used as they are. The start of the story (the end-of-story token) is put before them unless they begin
    with it. Since the random number of a token depends on nothing but the seed and its place in the story, a
    prompt of the first tokens of a story, with the same seed and settings, continues it as before: so a story is
    forked at any token. Logits after a prompt that is read have the bits of those after tokens that were generated in
    the native runtime; other runtimes agree up to rounding. What counts generated tokens begins anew: `max_tokens`,
    `min_tokens`, `presence_penalty`, `frequency_penalty`, and stop strings, which do not reach back into the prompt.
    A prompt may end within a character: only tokens that complete it follow, and the text that comes back begins
    with that character.
    """
    max_tokens: int = 400
    """Tokens to generate at most. 0 generates none, which with `prompt_logprobs` scores the prompt."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    wishes: Wishes = field(default_factory=Wishes)
    """What the story is to have. The engine draws stories, each with a seed of its own (`choice_seed`), until one meets
    them all, and sends the one that meets most when it is whole (`model.wishes`)."""
    stop: tuple[str, ...] = ()
    """Text that ends the story; it is not part of what comes back."""
    logprobs: int | None = None
    """None: no log-probabilities. n ≥ 0: each token's own, and those of its n best alternatives, 20 at most. In this
    process a request of one token may ask for those of the whole vocabulary."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt; they come in `Chunk.prompt`."""
    echo: bool = False
    """Whether the prompt as the model reads it comes back, in `Chunk.prompt`."""
    cacheable: bool = True
    """Whether a response cache may serve and keep the story. False where the seed was drawn at random, so that nobody
    will ask for it again, and where the story must be generated anew, as in a measurement."""
    user: str = field(default="", compare=False)
    """Who asks: does not change the story of a model, but decides which variant serves it in an A/B test."""
    variant: str = field(default="", compare=False)
    """Which variant serves the story, whoever asks: of a comparison that an A/B test is not to count."""
    story_id: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)
    """Id of the story; a request that continues a story has that one's."""

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        _check_int("max_tokens", self.max_tokens, 0, MAX_TOKENS)
        if self.sampling.min_tokens > self.max_tokens:
            raise InputError("min_tokens", f"must be at most max_tokens, {self.max_tokens}")
        if len(self.stop) > 8 or not all(isinstance(text, str) and 0 < len(text) <= 200 for text in self.stop):
            raise InputError("stop", "must be at most 8 texts of 1 to 200 characters each")
        most = {"logprobs": MAX_TOKEN_ID if self.max_tokens == 1 else MAX_LOGPROBS, "prompt_logprobs": MAX_LOGPROBS}
        for name, high in most.items():
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, high)
        if self.wishes != Wishes() and self.prompt_logprobs is not None:
            raise InputError("wishes", "cannot be had together with log-probabilities of the prompt")
        if len(self.user) > MAX_ID_CHARS:
            raise InputError("user", f"must have at most {MAX_ID_CHARS} characters, got {len(self.user)}")

    def check_tokens(self, vocab_size: int) -> None:
        """Check the token ids of the request. Raises `InputError` for one that is not in a vocabulary of this size."""
        given = {"prompt": () if isinstance(self.prompt, str) else self.prompt}
        given["logit_bias"] = tuple(token for token, _ in self.sampling.logit_bias)
        for name, tokens in given.items():
            if tokens and (most := max(tokens)) >= vocab_size:
                raise InputError(name, f"must hold token ids between 0 and {vocab_size - 1}, got {most}")


def choice_seed(seed: int, index: int) -> int:
    """Return the seed of story `index` of one request: the request's own for the first, derived from it for the others.

    Derived seeds have 53 bits, so that JavaScript's numbers hold them exactly.
    """
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 11


def _check_prompt(prompt: object) -> None:
    if isinstance(prompt, str):
        if len(prompt) > MAX_PROMPT_CHARS:
            raise InputError("prompt", f"must have at most {MAX_PROMPT_CHARS} characters, got {len(prompt)}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InputError("prompt", f"holds half a character (a lone surrogate) at {error.start}") from None
    elif isinstance(prompt, tuple):
        if len(prompt) > MAX_PROMPT_TOKENS:
            raise InputError("prompt", f"must have at most {MAX_PROMPT_TOKENS} tokens, got {len(prompt)}")
        for token in prompt:
            if type(token) is not int or not 0 <= token <= MAX_TOKEN_ID:
                raise InputError("prompt", f"must be text or token ids, got {token!r} among the ids")
    else:
        raise InputError("prompt", f"must be text or token ids, got {type(prompt).__name__}")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of the story with its natural-log probability before sampling filters, and its best rivals."""

    token: int
    text: str
    logprob: float
    alternatives: tuple[tuple[int, str, float], ...] = ()
    """(token, text, log-probability), likeliest first."""


@dataclass(frozen=True, slots=True)
class PromptEcho:
    """A prompt as the model read it, for a request with `echo` or `prompt_logprobs`."""

    text: str
    """Its whole characters. Half a character at its end comes completed, with the story's text."""
    tokens: tuple[int, ...]
    token_texts: tuple[str, ...]
    """Each token by itself: one that is no whole characters shows U+FFFD."""
    logprobs: tuple[TokenLogprob | None, ...] = ()
    """Of each token given those before it, if asked for; None for the first, as in OpenAI's and vLLM's answers."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one or more decode steps added to a story: whole characters only, possibly none."""

    text: str
    tokens: tuple[int, ...]
    """The tokens decoded for this chunk. A token may come before its text, when it holds half a character."""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt: PromptEcho | None = None
    """In the first chunk of a story whose request asked for it."""


def merge_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """One chunk that holds everything of `chunks`, in order."""
    return Chunk(
        text="".join(chunk.text for chunk in chunks),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
        prompt=next((chunk.prompt for chunk in chunks if chunk.prompt is not None), None),
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
    prompt: PromptEcho | None = None
    """The prompt, where the request asked for it."""
