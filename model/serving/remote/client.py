"""HTTP client of a remote story service, and the wire contract from its side: one request out, events in, its failures.

The service speaks OpenAI's completions (`model.serving.http`), with token ids, times and alternatives beside them.
Everything received is checked here, event by event; what does not hold raises `RemoteError` and nothing else, whatever
the bytes were. A user gets one plain line; an operator gets the reason, in the log and in the health report. Neither
contains a token, a password or more of a foreign response than one short line.

A request has a timeout for each of its stages. The first lasts until the service answers: connecting, retries, a
container's cold start. Then comes the wait for the first token (queue and prefill), then that between two tokens. A
comment that only keeps the connection open is no token and restarts no timeout.
"""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, Literal

import httpx
from httpx_sse import EventSource
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tenacity import AsyncRetrying, retry_if_exception
from tenacity.stop import stop_after_attempt, stop_never
from tenacity.wait import wait_random_exponential

from model.architecture.folder import END_ID
from model.errors import BusyError, InputError, StoryError, one_line
from model.generation import Chunk, GenerationRequest, PromptEcho, SamplingParams, TokenLogprob
from model.serving.backend import ModelInfo
from model.settings import Settings

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
        **({} if not request.wishes else {"wishes": dataclasses.asdict(request.wishes)}),
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


MAX_BODY = 65_536
"""Bytes read of a response that is not an event stream."""
CONNECTIONS = 256
"""Streams at once; how many are generated at once is up to the service."""
LINGER = 1.0
"""Seconds for the connection to end after the last event, so that it can be reused."""


class ServiceClient:
    """Client of a story service with one connection pool. Make it, and close it, in an event loop."""

    def __init__(self, headers: dict[str, str], settings: Settings, *, fail_fast: bool) -> None:
        """`headers`: of each request. `settings`: timeouts. `fail_fast`: there is a fallback, so retry at most once,
        and never after a timeout.
        """
        self.settings, connect = settings, settings.story_connect_timeout
        self._fail_fast = fail_fast
        self._client = httpx.AsyncClient(
            headers=headers,
            # Everything after connecting is timed by stage, in `stream`.
            timeout=httpx.Timeout(None, connect=connect, pool=connect),
            limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=32, keepalive_expiry=30),
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def stream(
        self,
        url: str,
        request: GenerationRequest,
        *,
        accepted: Callable[[], None],
        take: Callable[[WireEvent], None],
        settings: Settings | None = None,
    ) -> None:
        """Have the service at `url` (without a path) generate, and return when the stream is complete.

        Calls `accepted` once, when the service has accepted the request, and `take` with every event in order.
        Cancelling this closes its connection at once. Raises `RemoteError`.
        """
        settings = settings or self.settings
        now = asyncio.get_running_loop().time
        started = finished = False
        failures: list[RemoteError] = []
        limit = settings.story_response_timeout
        try:
            async with asyncio.timeout(limit) as clock:
                response = await self._open(url, request, failures)
                try:
                    accepted()
                    limit = settings.story_first_token_timeout
                    clock.reschedule(now() + limit)
                    async with aclosing(read_events(response)) as events:
                        async for event in events:
                            if event.done:
                                finished = True
                                clock.reschedule(now() + LINGER)
                            elif event.chunk is not None or event.finish is not None:
                                started = True
                                finished = finished or event.finish is not None
                                limit = settings.story_token_timeout
                                clock.reschedule(now() + limit)
                            take(event)
                finally:
                    await response.aclose()
        except TimeoutError:
            if started and not finished:
                raise RemoteError(f"no token came for {limit:g} s", BROKE_OFF, slow=True) from None
            if not finished:
                last = f" (last: {failures[-1].reason})" if failures else ""
                raise RemoteError(f"no first token within {limit:g} s{last}", slow=True) from None
        except RemoteError:
            # A stream whose last event came is complete, whatever became of the connection after it.
            if not finished:
                raise
        if not finished:
            raise RemoteError("the service closed the connection in mid-story", BROKE_OFF)

    async def _open(self, url: str, request: GenerationRequest, failures: list[RemoteError]) -> httpx.Response:
        """Return the response that the stream will come from; failed attempts are added to `failures`."""

        def worth_it(error: BaseException) -> bool:
            if not isinstance(error, RemoteError):
                return False
            failures.append(error)
            return error.retryable and not (self._fail_fast and error.slow)

        retrying = AsyncRetrying(
            retry=retry_if_exception(worth_it),
            stop=stop_after_attempt(2) if self._fail_fast else stop_never,
            wait=wait_random_exponential(multiplier=0.1, max=0.2 if self._fail_fast else 2.0),
            reraise=True,
        )
        response: httpx.Response = await retrying(self._post, url.rstrip("/") + PATH, body(request))
        return response

    async def _post(self, address: str, fields: dict[str, Any]) -> httpx.Response:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        try:
            request = self._client.build_request("POST", address, json=fields, headers=headers)
            response = await self._client.send(request, stream=True)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise from_exception(error) from None
        if response.status_code == 200:
            return response
        try:
            raise from_status(response.status_code, response.headers, await _beginning(response))
        finally:
            await response.aclose()


async def _beginning(response: httpx.Response) -> bytes:
    """Return the response's body up to `MAX_BODY`, as far as it can be read."""
    read = b""
    with contextlib.suppress(httpx.HTTPError):
        async for part in response.aiter_bytes():
            read += part
            if len(read) > MAX_BODY:
                break
    return read


def proxy_auth(settings: Settings) -> dict[str, str]:
    """Return the headers that Modal's proxy asks for, if a token is set. Raises `InputError` without the token."""
    if settings.modal_key is None or settings.modal_secret is None:
        return {}
    secret = header_value("MODAL_SECRET", settings.modal_secret.get_secret_value())
    return {"Modal-Key": header_value("MODAL_KEY", settings.modal_key), "Modal-Secret": secret}


def header_value(name: str, value: str) -> str:
    """Return the value of the setting `name` if a header can carry it. Raises `InputError`, without the value."""
    if not (value.isascii() and value.isprintable() and value == value.strip()):
        raise InputError(name, "must be plain ASCII without spaces around it, and is not")
    return value


def fetch_model_info(url: str, headers: dict[str, str], seconds: float = 2.0) -> ModelInfo | str:
    """Ask the service at `url` for its model; returns one line that says why that failed."""
    try:
        response = httpx.get(f"{url.rstrip('/')}/v1/models", headers=headers, timeout=seconds)
        if response.status_code != 200:
            return from_status(response.status_code, response.headers, response.content).reason
        first = response.json()["data"][0]
        name, version = (one_line(str(first[field])) for field in ("name", "version"))
        return ModelInfo(name, version)
    except httpx.HTTPError as error:
        return from_exception(error).reason
    except (ValueError, LookupError, TypeError):
        return "what answers there is no story service"
    except Exception as error:  # an address that no socket takes
        return type(error).__name__
