"""Request bodies, and how they become `GenerationRequest`s.

The bodies share their fields: OpenAI's completions and chat (`model.serving.http.chat`), with vLLM's names for what
goes beyond them, and the simple form. Types are checked here, by pydantic; ranges of numbers in `model.generation`. An
unknown field is an error, because a mistyped one that is silently ignored looks exactly like one that works. `null`
counts as not given, everywhere.

The description of a field says what is allowed: it ends the error message of a wrong type, and is the field's text in
the OpenAPI document.
"""

import dataclasses
import difflib
import json
import secrets
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self, TypeVar, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from model.generation import (
    MAX_BIASES,
    MAX_ID_CHARS,
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_TOKENS,
    GenerationRequest,
    SamplingParams,
    choice_seed,
    new_seed,
)
from model.serving.http.response import bad_body, bad_value, unknown_model
from model.serving.registry import NAME
from model.wishes import MAX_WORDS, Ending, Length, Wishes

MODEL_ID = NAME
"""The one model name of the API; its version is sent beside it."""
MAX_CHOICES = 8
MAX_STREAMS = 64
"""Stories of one request: prompts times choices."""
DEFAULTS = SamplingParams()
DEFAULT_MAX_TOKENS = GenerationRequest(prompt="").max_tokens
MAX_SHOWN = 60
"""Characters of a wrong value that its error message repeats."""
IGNORED = "accepted and ignored"


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a body that must be a JSON object. Raises `ServiceError` (400)."""
    try:
        value = json.loads(body)
    except RecursionError:
        raise bad_body("the body nests too deeply") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise bad_body(f"the body must be a JSON object, and is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_body(f"the body must be a JSON object, got {shown(value)}")
    return value


class Body(BaseModel):
    """Base of all objects in a body: strict types, no unknown fields, error messages that name the field."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @classmethod
    def read(cls, values: Mapping[str, Any], within: str = "") -> Self:
        """Check an object, of the whole body or at `within` in it. Raises `ServiceError` (422) for the first error."""
        given = {name: value for name, value in values.items() if value is not None}
        for name in given.keys() - cls.model_fields.keys():
            near = difflib.get_close_matches(name[:MAX_SHOWN], cls.model_fields, n=1, cutoff=0.0)[0]
            raise bad_value(f"{within}{name[:MAX_SHOWN]}", f"is not known; the nearest is {near}")
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
        path = [str(part) for part in first["loc"]]
        name = path[0]
        allowed = cls.model_fields[name].description
        if first["type"] == "missing" and len(path) == 1:
            raise bad_value(f"{within}{name}", f"must be given: {allowed}")
        raise bad_value(f"{within}{name}", f"must be {allowed}, got {shown(given[name])}")


def _integral(value: Any) -> Any:
    """Accept a float that is an integer: programs without integers send 100.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral)]
TokenId = Annotated[str, Field(pattern=r"^\d{1,7}$")]
"""As the name of a field, which JSON has as text."""


def number(default: float | None, low: int, high: int, note: str = "", *, whole: bool = False) -> Any:
    """Return a number's field; the range is for the document, and checked by `model.generation`."""
    kind = "a whole number" if whole else "a number"
    return Field(
        default,
        description=f"{kind} between {low} and {high}{note}",
        json_schema_extra={"minimum": low, "maximum": high},
    )


class WishesBody(Body):
    """What a story is to have."""

    words: list[str] = Field([], description=f"a list of at most {MAX_WORDS} words")
    length: Length | None = Field(None, description=f"one of {', '.join(get_args(Length))}")
    dialogue: bool | None = Field(None, description="true or false, whether somebody speaks")
    ending: Ending | None = Field(None, description=f"one of {', '.join(get_args(Ending))}")

    def wishes(self) -> Wishes:
        """Raises `InputError`."""
        return Wishes(words=tuple(self.words), length=self.length, dialogue=self.dialogue, ending=self.ending)


class GenerationBody(Body):
    """The fields that all bodies have."""

    max_tokens: Integer = number(DEFAULT_MAX_TOKENS, 0, MAX_TOKENS, ", the longest story", whole=True)
    temperature: float = number(DEFAULTS.temperature, 0, 2)
    top_p: float = Field(
        DEFAULTS.top_p,
        description="a number above 0 and at most 1",
        json_schema_extra={"exclusiveMinimum": 0, "maximum": 1},
    )
    top_k: Integer = number(DEFAULTS.top_k, -1, 1_000_000, "; 0 and -1 are off", whole=True)
    min_p: float = number(DEFAULTS.min_p, 0, 1, "; 0 is off")
    repetition_penalty: float = number(DEFAULTS.repetition_penalty, 1, 2, "; 1 is off")
    presence_penalty: float = number(DEFAULTS.presence_penalty, -2, 2, "; 0 is off")
    frequency_penalty: float = number(DEFAULTS.frequency_penalty, -2, 2, "; 0 is off")
    logit_bias: dict[TokenId, float] = Field(
        {}, description=f"an object of at most {MAX_BIASES} token ids, each with a number between -100 and 100"
    )
    ignore_eos: bool = Field(False, description="true or false, whether the story goes on to max_tokens")
    min_tokens: Integer = number(
        DEFAULTS.min_tokens, 0, MAX_TOKENS, ", before which the story does not end", whole=True
    )
    keep_names: bool = Field(
        True, description="true or false, whether the story keeps the prompt's names, and their spelling"
    )
    wishes: WishesBody | None = Field(
        None, description="an object with words, length, dialogue, ending: what the story is to have"
    )
    seed: Integer | None = number(None, -1, MAX_SEED, "; -1 is a random one", whole=True)
    stop: str | list[str] = Field([], description="a text or a list of at most 8 texts")
    stream: bool = Field(False, description="true or false")
    user: str = Field(
        "", description=f"text of at most {MAX_ID_CHARS} characters: the same one always meets the same version"
    )

    @property
    def given_seed(self) -> int | None:
        """The client's seed; None where it asked for a random one."""
        return None if self.seed == -1 else self.seed

    def generation_requests(
        self, prompts: Sequence[str | tuple[int, ...]], count: int = 1, **options: Any
    ) -> list[GenerationRequest]:
        """Return `count` requests for each prompt, in order, with these options of `GenerationRequest`.

        Raises `ServiceError` (422) or `InputError`.
        """
        if len(prompts) * count > MAX_STREAMS:
            asked = f"asks for {len(prompts) * count} stories: {len(prompts)} prompts, {count} each"
            raise bad_value("prompt", f"{asked}; a request has at most {MAX_STREAMS}")
        if not 0 <= (options.get("logprobs") or 0) <= MAX_LOGPROBS:  # more would be a large answer
            raise bad_value(
                "logprobs", f"must be a whole number between 0 and {MAX_LOGPROBS}, got {options['logprobs']}"
            )
        user = self.user or secrets.token_hex(16)  # an anonymous user is a new one each time
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        names = {field.name for field in dataclasses.fields(SamplingParams)} & type(self).model_fields.keys()
        sampling = {name: getattr(self, name) for name in names} | {
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "logit_bias": tuple((int(token), bias) for token, bias in self.logit_bias.items()),
        }
        options = {"max_tokens": self.max_tokens} | options
        requests = []
        for prompt in prompts:
            seed = new_seed() if self.given_seed is None else self.given_seed
            requests += [
                GenerationRequest(
                    prompt=prompt,
                    sampling=SamplingParams(**sampling | {"seed": choice_seed(seed, index)}),
                    wishes=self.wishes.wishes() if self.wishes else Wishes(),
                    stop=stop,
                    cacheable=self.given_seed is not None or self.temperature == 0,
                    user=user,
                    **options,
                )
                for index in range(count)
            ]
        return requests


class SimpleBody(GenerationBody):
    """The body of `POST /api/generate`: a prompt and the parameters of the page."""

    prompt: str = Field(description="text, the story's beginning")

    def requests(self) -> list[GenerationRequest]:
        """Return the request. Raises `InputError` for a number outside its range."""
        return self.generation_requests([self.prompt])


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = Field(False, description="whether the last chunk has usage and times")
    include_obfuscation: bool = Field(False, description=IGNORED)
    continuous_usage_stats: bool = Field(False, description=IGNORED)


class OpenAIBody(GenerationBody):
    """The fields that OpenAI's two bodies share. What could change the story and is not honoured is refused."""

    model: str | None = Field(None, description="a name of /v1/models")
    n: Integer = Field(
        1, ge=1, le=MAX_CHOICES, description=f"a whole number between 1 and {MAX_CHOICES}, how many stories"
    )
    stream_options: StreamOptions | None = Field(
        None,
        description="an object with include_usage, include_obfuscation, continuous_usage_stats, each true or false",
    )
    return_token_ids: bool = Field(False, description="true or false, whether token ids come too")
    metadata: Any = Field(None, description=IGNORED)
    prompt_cache_key: Any = Field(None, description=IGNORED)
    prompt_cache_retention: Any = Field(None, description=IGNORED)
    safety_identifier: Any = Field(None, description=IGNORED)
    service_tier: Any = Field(None, description=IGNORED)
    store: Any = Field(None, description=IGNORED)

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage and times."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def count(self) -> int:
        """How many stories are generated for each prompt."""
        return self.n

    @property
    @abstractmethod
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities come back."""

    def check(self) -> None:
        """Raise `ServiceError` (422) for fields that do not go together, 404 for another model."""
        if self.model not in (None, MODEL_ID):
            raise unknown_model(str(self.model), MODEL_ID)
        if self.stream_options is not None and not self.stream:
            raise bad_value("stream_options", "may be given only where stream is true")


T = TypeVar("T")
Prompts = Annotated[list[T], Field(min_length=1)]


class CompletionBody(OpenAIBody):
    """The body of `POST /v1/completions`."""

    prompt: str | Prompts[str] | Prompts[int] | Prompts[list[int]] = Field(
        description="a text, a list of texts, a list of token ids or a list of such lists"
    )
    logprobs: Integer | None = number(None, 0, MAX_LOGPROBS, whole=True)
    echo: bool = Field(False, description="true or false, whether the prompt comes back too")
    best_of: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None,
        description=f"a whole number between n and {MAX_CHOICES}: how many stories are generated, of which the n with "
        "the highest mean log-probability of a token come back; not with stream",
    )
    suffix: str = Field("", max_length=0, description="empty: this model only goes on from a beginning")

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts, also where there is one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        return [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in cast(list[Any], self.prompt)]

    @property
    def count(self) -> int:
        return self.best_of or self.n

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    def requests(self) -> list[GenerationRequest]:
        """Return `count` requests for each prompt, in order. Raises `ServiceError` (422) or `InputError`."""
        self.check()
        if self.count < self.n or (self.stream and self.count > self.n):
            allowed = type(self).model_fields["best_of"].description
            raise bad_value("best_of", f"must be {allowed}; got {self.best_of} with n {self.n}")
        if not (self.max_tokens or self.echo):
            raise bad_value("max_tokens", "may be 0 only where echo is true")
        scored = self.logprobs if self.echo else None
        return self.generation_requests(
            self.prompts,
            self.count,
            logprobs=0 if self.count > self.n and self.logprobs is None else self.logprobs,
            prompt_logprobs=scored,
            # A text without log-probabilities can be sent back from here.
            echo=self.echo and (scored is not None or not isinstance(self.prompts[0], str)),
        )


def apply_cache_control(requests: list[GenerationRequest], headers: Mapping[str, str]) -> list[GenerationRequest]:
    """Make the requests bypass the cache where the client sent `Cache-Control: no-cache` (RFC 9111, 5.2.1)."""
    control = headers.get("cache-control", "").lower()
    if not {"no-cache", "no-store"} & {word.strip() for word in control.split(",")}:
        return requests
    return [dataclasses.replace(request, cacheable=False) for request in requests]


def shown(value: object) -> str:
    """Return a wrong value as its error message repeats it."""
    try:
        text = repr(value)
    except RecursionError:  # nested just deep enough to be parsed
        text = type(value).__name__
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
