"""Request bodies, and how they become `GenerationRequest`s.

Two bodies share their fields: the OpenAI completions contract, with vLLM's names for what goes beyond it, and the
simple form. Types are checked here, by pydantic; ranges of numbers in `model.generation`. An unknown field is an error,
because a mistyped one that is silently ignored looks exactly like one that works. `null` counts as not given,
everywhere.

The description of a field says what is allowed: it ends the error message of a wrong type, and is the field's text in
the OpenAPI document.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.generation import MAX_ID_CHARS, MAX_LOGPROBS, MAX_TOKENS, GenerationRequest, SamplingParams
from model.serving.http.errors import bad_body, bad_value

MAX_CHOICES = 8
DEFAULTS = SamplingParams()
DEFAULT_MAX_TOKENS = GenerationRequest(prompt="").max_tokens
MAX_SHOWN = 60
"""Characters of a wrong value that its error message repeats."""


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a body that must be a JSON object. Raises `ServiceError` (400)."""
    try:
        value = json.loads(body)
    except RecursionError:
        raise bad_body("the body nests too deeply") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise bad_body(f"the body must be a JSON object, and is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_body(f"the body must be a JSON object, got {_shown(value)}")
    return value


class _Body(BaseModel):
    """Base of both bodies: strict types, no unknown fields, error messages that name the field."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @classmethod
    def read(cls, values: dict[str, Any]) -> Self:
        """Check a body. Raises `ServiceError` (422) for the first field that is wrong."""
        given = {name: value for name, value in values.items() if value is not None}
        for name in given.keys() - cls.model_fields.keys():
            name = name[:MAX_SHOWN]
            near = difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.0)[0]
            raise bad_value(name, f"is not known; the nearest is {near}")
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
        path = [str(part) for part in first["loc"]]
        name = path[0]
        allowed = cls.model_fields[name].description
        if first["type"] == "missing" and len(path) == 1:
            raise bad_value(name, f"must be given: {allowed}")
        raise bad_value(name, f"must be {allowed}, got {_shown(given[name])}")


class _StoryBody(_Body):
    """The fields that both bodies have."""

    max_tokens: int = Field(
        DEFAULT_MAX_TOKENS, description=f"a whole number between 1 and {MAX_TOKENS}, the longest story"
    )
    temperature: float = Field(DEFAULTS.temperature, description="a number between 0 and 2")
    top_p: float = Field(DEFAULTS.top_p, description="a number above 0 and at most 1")
    top_k: int = Field(DEFAULTS.top_k, description="a whole number between 0 and 1000000; 0 is off")
    min_p: float = Field(DEFAULTS.min_p, description="a number between 0 and 1; 0 is off")
    repetition_penalty: float = Field(DEFAULTS.repetition_penalty, description="a number between 1 and 2; 1 is off")
    seed: int | None = Field(None, description=f"a whole number between 0 and {2**63 - 1}")
    stop: str | list[str] = Field([], description="a text or a list of at most 8 texts")
    stream: bool = Field(False, description="true or false")
    user: str = Field(
        "", description=f"text of at most {MAX_ID_CHARS} characters: the same one always meets the same version"
    )

    def _requests(self, prompt: str, count: int = 1, logprobs: int | None = None) -> list[GenerationRequest]:
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        user = self.user or secrets.token_hex(16)  # an anonymous user is a new one each time
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return [
            GenerationRequest(
                prompt=prompt,
                max_tokens=self.max_tokens,
                sampling=SamplingParams(
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p,
                    min_p=self.min_p,
                    repetition_penalty=self.repetition_penalty,
                    seed=choice_seed(seed, index),
                ),
                stop=stop,
                logprobs=logprobs,
                cacheable=self.seed is not None or self.temperature == 0,
                user=user,
            )
            for index in range(count)
        ]


class SimpleBody(_StoryBody):
    """The body of `POST /api/generate`: a prompt and the parameters of the page."""

    prompt: str = Field(description="text, the story's beginning")

    def requests(self) -> list[GenerationRequest]:
        """Return the request. Raises `InputError` for a number outside its range."""
        return self._requests(self.prompt)


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: bool = False


class CompletionBody(_StoryBody):
    """The body of `POST /v1/completions`. Fields that could only be ignored are refused instead."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)] = Field(
        description="a text or a list of one text (arrays of tokens are not taken)"
    )
    model: str | None = Field(None, description="a name of /v1/models")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description=f"a whole number between 1 and {MAX_CHOICES}, how many stories")
    stream_options: StreamOptions | None = Field(None, description="an object with include_usage, true or false")
    logprobs: int | None = Field(None, description=f"a whole number between 0 and {MAX_LOGPROBS}")
    echo: bool = Field(False, description="true or false, whether the prompt comes back too")
    presence_penalty: float = Field(0.0, ge=0, le=0, description="0: repetition_penalty is what this model takes")
    frequency_penalty: float = Field(0.0, ge=0, le=0, description="0: repetition_penalty is what this model takes")
    best_of: int | None = Field(None, description="the same as n: all stories come back, none is chosen")
    suffix: str = Field("", max_length=0, description="empty: this model only goes on from a beginning")
    logit_bias: dict[str, float] = Field({}, max_length=0, description="empty: this model takes no biases")
    return_token_ids: bool = Field(False, description="true or false, whether token ids come too")

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage and times."""
        return self.stream_options is not None and self.stream_options.include_usage

    def text(self) -> str:
        """Return the prompt, also where it came as a list of one."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    def requests(self) -> list[GenerationRequest]:
        """Return one request for each of `n` stories. Raises `ServiceError` (422) or `InputError`."""
        if self.best_of not in (None, self.n):
            allowed = type(self).model_fields["best_of"].description
            raise bad_value("best_of", f"must be {allowed}, got {self.best_of}")
        if self.stream_options is not None and not self.stream:
            raise bad_value("stream_options", "may be given only where stream is true")
        if self.echo and self.logprobs is not None:
            raise bad_value("logprobs", "cannot be combined with echo: those of the prompt are not computed")
        return self._requests(self.text(), self.n, self.logprobs)


def apply_cache_control(requests: list[GenerationRequest], headers: Mapping[str, str]) -> list[GenerationRequest]:
    """Make the requests bypass the cache where the client sent `Cache-Control: no-cache` (RFC 9111, 5.2.1)."""
    control = headers.get("cache-control", "").lower()
    if not {"no-cache", "no-store"} & {word.strip() for word in control.split(",")}:
        return requests
    return [replace(request, cacheable=False) for request in requests]


def choice_seed(seed: int, index: int) -> int:
    """Return the seed of choice `index`: the request's own for the first, derived from it for the others."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _shown(value: object) -> str:
    """Return a wrong value as its error message repeats it."""
    try:
        text = repr(value)
    except RecursionError:  # nested just deep enough to be parsed
        text = type(value).__name__
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
