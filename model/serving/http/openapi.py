"""The description of the service in OpenAPI: what its responses look like, and how routes take part in it.

Responses are encoded by hand, for speed; tests check them against the models here.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

REFERENCE = "#/components/schemas/{model}"

Handler = TypeVar("Handler", bound=Callable[..., Any])


class _Response(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Response):
    """What went wrong, and in which field."""

    type: str
    message: str
    param: str | None
    code: str


class ErrorResponse(_Response):
    """The body of every response but those of success."""

    error: ErrorDetail


class Usage(_Response):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Times(_Response):
    """Times in seconds from the arrival of the request."""

    queued: float
    ttft: float
    duration: float


class Logprobs(_Response):
    """Log-probabilities of a completion; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    alternatives: list[list[tuple[int, str, float]]] | None = None
    """With `return_token_ids`: (id, text, log-probability)."""


class _Choice(_Response):
    index: int
    finish_reason: Literal["stop", "length", "cancelled"]
    seed: int
    token_ids: list[int] | None = None


class CompletionChoice(_Choice):
    """One story of a completion."""

    text: str
    logprobs: Logprobs | None
    prompt_token_ids: list[int] | None = None
    """With `echo` and `return_token_ids`."""


class _OpenAIResponse(_Response):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    times: Times
    served_by: str


class CompletionResponse(_OpenAIResponse):
    """A whole completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TokenBytes(_Response):
    """A token with its log-probability; one that holds half a character has no bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TokenBytes):
    """A token of a chat completion."""

    top_logprobs: list[TokenBytes]


class ChatLogprobs(_Response):
    """Log-probabilities of a chat completion."""

    content: list[ChatLogprob]
    refusal: None


class AssistantMessage(_Response):
    """The message that a chat completion consists of."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Choice):
    """One story of a chat completion."""

    message: AssistantMessage
    logprobs: ChatLogprobs | None


class ChatResponse(_OpenAIResponse):
    """A whole chat completion."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class StoryResponse(_Response):
    """A whole story of the simple form."""

    id: str
    prompt: str
    text: str
    story: str
    finish_reason: Literal["stop", "length", "cancelled"]
    seed: int
    model: str
    version: str
    served_by: str
    usage: Usage
    times: Times


class ModelResponse(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    name: str
    version: str
    number: int | None
    alias: str | None


class ModelList(_Response):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelResponse]


class HealthResponse(BaseModel):
    """State of the service."""

    status: Literal["healthy", "draining", "unhealthy"]
    timestamp: str
    version: str
    model: dict[str, Any]
    backend: str
    served_by: str
    detail: str
    open: int
    capacity: int
    breaker: str | None = None
    engine: dict[str, int] | None = None


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return `responses` of a route that may answer with an error of one of `statuses`."""
    return {status: {"model": ErrorResponse} for status in statuses}


def generates(body: type[BaseModel], response: type[BaseModel]) -> dict[str, Any]:
    """Return the options of a route that generates: it reads its body itself, as `body`, and may stream."""
    content = {"application/json": {"schema": {"$ref": REFERENCE.format(model=body.__name__)}}}
    whole = {"model": response, "content": {"text/event-stream": {}}}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": {200: whole, **errors_of(400, 404, 413, 422, 429, 500, 503)},
    }


def streams(query: type[BaseModel]) -> dict[str, Any]:
    """Return the options of a GET route that generates: its query has the fields of `query`, and it streams."""
    schemas = query.model_json_schema(ref_template=REFERENCE)["properties"].values()
    parameters = [
        {"name": name, "in": "query", "required": field.is_required(), "schema": schema}
        for (name, field), schema in zip(query.model_fields.items(), schemas, strict=True)
    ]
    return {
        "openapi_extra": {"parameters": parameters},
        "responses": generates(query, StoryResponse)["responses"] | {204: {"description": "The story has ended."}},
    }


def get(routes: APIRouter, path: str, **options: Any) -> Callable[[Handler], Handler]:
    """Register a handler of GET, and of HEAD, which the document leaves out; `options` as for `APIRouter.get`."""

    def register(handler: Handler) -> Handler:
        routes.head(path, include_in_schema=False)(handler)
        return routes.get(path, **options)(handler)

    return register


def schemas_of(*bodies: type[BaseModel]) -> dict[str, Any]:
    """Return the schemas of bodies and of what is within them, by name."""
    _, document = models_json_schema([(body, "validation") for body in bodies], ref_template=REFERENCE)
    schemas: dict[str, Any] = document["$defs"]
    return schemas
