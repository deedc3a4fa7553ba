"""The wire contract with the story service, seen from its client: one request out, events in.

The service speaks OpenAI's completions (`model.serving.http`), with token ids, times and rivals of a token beside
them. Whatever comes from outside is checked here, event by event; what does not hold raises `RemoteError` and
nothing else, whatever the bytes were.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import httpx
from httpx_sse import EventSource
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.generation import Chunk, GenerationRequest, TokenLogprob
from model.serving.remote.failures import BROKE_OFF, RemoteError, from_event, from_exception

PATH = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Counts:
    """What the service counted and measured (seconds)."""

    prompt_tokens: int
    completion_tokens: int
    queued: float


@dataclass(frozen=True, slots=True)
class WireEvent:
    """What one event told."""

    chunk: Chunk | None = None
    """New text or tokens."""
    finish: Literal["stop", "length"] | None = None
    """Why the story ended; nothing of it comes after this."""
    counts: Counts | None = None
    done: bool = False
    """The service has said all."""
    version: str | None = None
    """The beginning of the writing model's digest."""


def body(request: GenerationRequest) -> dict[str, Any]:
    """The JSON body that asks for `request`, streamed, under the same seed."""
    sampling = request.sampling
    asked: dict[str, Any] = {
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": sampling.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if request.stop:
        asked["stop"] = list(request.stop)
    if request.logprobs is not None:
        asked["logprobs"] = request.logprobs
    return asked


async def read_events(response: httpx.Response) -> AsyncGenerator[WireEvent, None]:
    """The events of an answer, as they come; ends when the connection's data ends. Raises `RemoteError`."""
    response.encoding = "utf-8"  # events are nothing else, whatever the head says (WHATWG HTML, 9.2.5)
    try:
        async with aclosing(EventSource(response).aiter_sse()) as events:
            async for event in events:
                if event.data:
                    yield parse(event.event, event.data)
    except httpx.HTTPError as error:
        failure = from_exception(error)
        raise RemoteError(failure.reason, BROKE_OFF) from None


def parse(name: str, data: str) -> WireEvent:
    """One event. Raises `RemoteError` for an error that the service tells, and for what is no event of ours."""
    if data == "[DONE]":
        return WireEvent(done=True)
    if name == "error":
        raise from_event(data)
    try:
        event = _Event.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RemoteError(f"a malformed event: {place} {first['msg']}", BROKE_OFF) from None
    if event.error is not None:
        raise from_event(data)
    counts = None
    if event.usage is not None:
        queued = event.times.queued if event.times is not None else 0.0
        counts = Counts(event.usage.prompt_tokens, event.usage.completion_tokens, queued)
    choice = event.choices[0] if event.choices else None
    if choice is None:
        return WireEvent(counts=counts, version=event.system_fingerprint)
    chunk = Chunk(choice.text, choice.token_ids or (), _logprobs(choice))
    told = chunk if chunk.text or chunk.tokens else None
    return WireEvent(told, choice.finish_reason, counts, version=event.system_fingerprint)


_Count = Annotated[int, Field(ge=0, le=2**31)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    # What is not named here is left alone, so that the service may tell more one day.
    model_config = ConfigDict(strict=True)


class _Logprobs(_Strict):
    tokens: tuple[str, ...]
    token_logprobs: tuple[_Number, ...]
    alternatives: tuple[tuple[tuple[_Count, str, _Number], ...], ...] | None = None


class _Choice(_Strict):
    index: Literal[0] = 0  # we ask for one story
    text: str
    token_ids: tuple[_Count, ...] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class _Usage(_Strict):
    prompt_tokens: _Count
    completion_tokens: _Count


class _Times(_Strict):
    queued: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class _Event(_Strict):
    choices: Annotated[tuple[_Choice, ...], Field(max_length=1)] = ()
    system_fingerprint: Annotated[str, Field(max_length=64)] | None = None
    usage: _Usage | None = None
    times: _Times | None = None
    error: dict[str, Any] | None = None


def _logprobs(choice: _Choice) -> tuple[TokenLogprob, ...]:
    given, ids = choice.logprobs, choice.token_ids or ()
    if given is None:
        return ()
    rivals = ((),) * len(ids) if given.alternatives is None else given.alternatives
    if not len(ids) == len(given.tokens) == len(given.token_logprobs) == len(rivals):
        raise RemoteError("a malformed event: log-probabilities and tokens of different number", BROKE_OFF)
    return tuple(
        TokenLogprob(*entry) for entry in zip(ids, given.tokens, given.token_logprobs, rivals, strict=True)
    )
