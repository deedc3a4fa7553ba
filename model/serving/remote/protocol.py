"""The wire contract with a remote story service, from the client's side: one request out, events in, and its failures.

The service speaks OpenAI's completions (`model.serving.http`), with token ids, times and alternatives beside them.
Everything received is checked here, event by event; what does not hold raises `RemoteError` and nothing else, whatever
the bytes were. A user gets one plain line; an operator gets the reason, in the log and in the health report. Neither
contains a token, a password or more of a foreign response than one short line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, Literal

import httpx
from httpx_sse import EventSource
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.architecture.config import END_ID
from model.errors import BusyError, InputError, StoryError, one_line
from model.generation import Chunk, GenerationRequest, PromptEcho, SamplingParams, TokenLogprob

PATH = "/v1/completions"
UNREACHABLE = "the story service on Modal does not answer at the moment"
REFUSED = "the story service on Modal does not let this page in; its operator can see why in the log"
BROKE_OFF = "the connection to the model on Modal was lost"
MAX_REASON = 200
DEFAULT_RETRY_AFTER = 5.0
"""Seconds to wait after a 429 that names none."""


@dataclass(eq=False)
class RemoteError(StoryError):
    """The service failed. As text it is the line for a user; `reason` is for the operator."""

    exit_code = 1

    reason: str
    """What happened, for the operator."""
    message: str = UNREACHABLE
    """What happened, for the user."""
    _: KW_ONLY
    slow: bool = False
    """It took a timeout to notice, so each retry costs a user that time."""
    retryable: bool = False
    """Nothing was generated, and the same request may well succeed in a moment."""
    trips_breaker: bool = True
    """It says something about the service, not about this one request."""
    instead: StoryError | None = None
    """The error that a user should meet instead of this one."""

    def __post_init__(self) -> None:
        super().__init__(self.message)
        self.reason = one_line(self.reason, MAX_REASON)

    @property
    def raised(self) -> StoryError:
        """What a user meets."""
        return self.instead or self


def from_exception(error: Exception) -> RemoteError:
    """Describe a failure of the connection itself."""
    # Refused, reset, or a kept connection that the other side had just closed: nothing was generated.
    lost, slow = isinstance(error, httpx.TransportError), isinstance(error, httpx.TimeoutException)
    return RemoteError(f"{type(error).__name__}: {error}".rstrip(": "), slow=slow, retryable=lost)


def from_status(status: int, headers: Mapping[str, str], body: bytes) -> RemoteError:
    """Describe a response other than 200."""
    message, param = _error_of(body)
    reason = f"HTTP {status}" + (f": {message}" if message else "")
    if status in (400, 413, 422):
        wrong_input = InputError(param, message.removeprefix(f"{param} ")) if param else None
        shown = f"the story service on Modal did not take this: {message}".rstrip(": ")
        return RemoteError(reason, shown, trips_breaker=False, instead=wrong_input)
    if status in (401, 403):
        return RemoteError(f"{reason} (check MODAL_KEY and MODAL_SECRET)", REFUSED)
    if status == 429:
        wait = _seconds(headers.get("retry-after"))
        return RemoteError(reason, instead=BusyError("every place on Modal is taken", retry_after=wait))
    return RemoteError(reason, retryable=status in (502, 503, 504))


def from_event(data: str) -> RemoteError:
    """Describe an error among the events of a stream."""
    message, _ = _error_of(data.encode("utf-8", "replace"))
    return RemoteError(f"the service broke off: {message or 'it did not say why'}", BROKE_OFF)


def _error_of(body: bytes) -> tuple[str, str]:
    """Return (message, param) of an error's JSON; empty where it holds none."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(body)
        error = value.get("error") if isinstance(value, dict) else None
        if isinstance(error, dict):
            message, param = error.get("message"), error.get("param")
            return (
                one_line(message, MAX_REASON) if isinstance(message, str) else "",
                param if isinstance(param, str) and param.isidentifier() else "",
            )
    return "", ""


def _seconds(text: str | None) -> float:
    """Return `Retry-After` in seconds, which may also be a date; between 1 s and 10 minutes."""
    try:
        return min(max(float(text or ""), 1.0), 600.0)
    except ValueError:
        return DEFAULT_RETRY_AFTER


@dataclass(frozen=True, slots=True)
class WireEvent:
    """Content of one event."""

    chunk: Chunk | None = None
    """New text or tokens."""
    finish: Literal["stop", "length"] | None = None
    """Why the stream ended; no chunk comes after this."""
    counts: dict[str, Any] | None = None
    """Fields of `Usage` that the service counted and measured."""
    done: bool = False
    """Nothing more follows."""
    version: str | None = None
    """The beginning of the model's digest."""


def body(request: GenerationRequest) -> dict[str, Any]:
    """Return the JSON body that asks for `request`, streamed."""
    usual = dataclasses.asdict(SamplingParams())
    return {
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        # What has no effect is left out: a service of an earlier version does not know every name.
        **{
            name: dict(value) if name == "logit_bias" else value
            for name, value in dataclasses.asdict(request.sampling).items()
            if value != usual[name] or name in ("temperature", "top_p", "seed")
        },
        "stop": list(request.stop),
        "logprobs": request.logprobs,
        "echo": request.echo or request.prompt_logprobs is not None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }


async def read_events(response: httpx.Response) -> AsyncGenerator[WireEvent, None]:
    """Yield the events of a response as they come; ends with the connection's data. Raises `RemoteError`."""
    response.encoding = "utf-8"  # events are nothing else, whatever the header says (WHATWG HTML, 9.2.5)
    try:
        async with aclosing(EventSource(response).aiter_sse()) as events:
            async for event in events:
                if event.data:
                    yield parse(event.event, event.data)
    except httpx.HTTPError as error:
        raise RemoteError(from_exception(error).reason, BROKE_OFF) from None


def parse(name: str, data: str) -> WireEvent:
    """Read one event. Raises `RemoteError` for an error of the service, and for malformed data."""
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
    counts = None if event.usage is None else event.usage.model_dump() | event.times.model_dump()
    chunk = finish = None
    for choice in event.choices:
        chunk, finish = _chunk(choice), choice.finish_reason
    return WireEvent(chunk, finish, counts, version=event.system_fingerprint)


_Count = Annotated[int, Field(ge=0, le=2**31)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    # Unknown fields are ignored, so that the service may add some.
    model_config = ConfigDict(strict=True)


class _Logprobs(_Strict):
    tokens: tuple[str, ...]
    token_logprobs: tuple[_Number | None, ...]
    alternatives: tuple[tuple[tuple[_Count, str, _Number], ...], ...] | None = None


class _Choice(_Strict):
    index: Literal[0] = 0  # we ask for one story
    text: str
    token_ids: tuple[_Count, ...] | None = None
    prompt_token_ids: tuple[_Count, ...] | None = None
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
    times: _Times = _Times()
    error: dict[str, Any] | None = None


def _chunk(choice: _Choice) -> Chunk | None:
    rows = _logprobs(choice)
    if choice.prompt_token_ids is not None:
        texts = choice.logprobs.tokens if choice.logprobs is not None else ()
        return Chunk("", (), prompt=PromptEcho(choice.text, choice.prompt_token_ids, texts, rows))
    chunk = Chunk(choice.text, choice.token_ids or (), tuple(row for row in rows if row is not None))
    return None if chunk == Chunk("", ()) else chunk


def _logprobs(choice: _Choice) -> tuple[TokenLogprob | None, ...]:
    given, ids = choice.logprobs, choice.prompt_token_ids or choice.token_ids or ()
    if given is None:
        return ()
    if len(given.tokens) == len(ids) + 1 and not given.tokens[-1]:
        ids = (*ids, END_ID)  # the end of a scored story, which has no id among the story's
    alternatives = ((),) * len(ids) if given.alternatives is None else given.alternatives
    if not len(ids) == len(given.tokens) == len(given.token_logprobs) == len(alternatives):
        raise RemoteError("a malformed event: log-probabilities and tokens of different number", BROKE_OFF)
    rows = zip(ids, given.tokens, given.token_logprobs, alternatives, strict=True)
    return tuple(
        None if logprob is None else TokenLogprob(token, text, logprob, best) for token, text, logprob, best in rows
    )
