"""One request to the story service, from the first connection to the last event, under its time-outs.

Each stage has a clock of its own. The stage of the start lasts until the service answers at all: connecting,
further tries, a container that has to be started. Then comes the wait for the first token, then that between
two tokens. A comment that only keeps the connection open is no token and winds no clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from tenacity import AsyncRetrying, RetryCallState
from tenacity.stop import stop_after_attempt, stop_never
from tenacity.wait import wait_random_exponential

from model.errors import InputError
from model.generation import GenerationRequest
from model.serving.backend import ModelInfo
from model.serving.remote.failures import BROKE_OFF, RemoteError, from_exception, from_status, one_line
from model.serving.remote.wire import PATH, WireEvent, body, read_events

if TYPE_CHECKING:
    from model.settings import Settings

LONGEST_ANSWER = 65_536
"""Bytes that are read of an answer which is no stream of events."""

LINGER = 1.0
"""Seconds for the connection to come to its end after the last event, so that it can be used again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeOuts:
    """How long each stage may take, in seconds."""

    connect: float
    first_token: float
    """From the service's answer to the first token: the wait in its line, and the reading of the prompt."""
    between_tokens: float
    start: float
    """From the request to the service's answer, all tries and a cold start together."""

    @classmethod
    def of(cls, settings: Settings) -> TimeOuts:
        """Those that the environment's settings say."""
        return cls(
            connect=settings.story_connect_timeout,
            first_token=settings.story_first_token_timeout,
            between_tokens=settings.story_token_timeout,
            start=settings.story_response_timeout,
        )


class Exchange:
    """Talks to a story service through one pool of connections. Make it, and close it, in an event loop."""

    def __init__(
        self, headers: dict[str, str], times: TimeOuts, *, connections: int, fail_fast: bool
    ) -> None:
        """Open the pool.

        Args:
            headers: sent with each request; see `proxy_auth`.
            times: the time-outs.
            connections: at most so many at once.
            hurry: there is another backend, so try a second time at most, and never after a time-out.
        """
        self._times = times
        self._fail_fast = fail_fast
        self._client = httpx.AsyncClient(
            headers=headers,
            # What is not a connection being made is timed by stage, in `talk`.
            timeout=httpx.Timeout(None, connect=times.connect, pool=times.connect),
            limits=httpx.Limits(
                max_connections=connections, max_keepalive_connections=32, keepalive_expiry=30
            ),
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def talk(
        self,
        url: str,
        request: GenerationRequest,
        *,
        accepted: Callable[[], None],
        take: Callable[[WireEvent], None],
        times: TimeOuts | None = None,
    ) -> None:
        """Have `request` written by the service at `url`; calls `take` with each event as it comes.

        Returns when the story is whole; cancelling this closes its connection at once. Raises `RemoteError`.

        Args:
            url: the service's address, without a path.
            request: the story.
            accepted: called once, when the service has answered that it writes.
            take: called with every event that came in order, the last one being `done` or the story's end.
            times: other time-outs than this exchange's own.
        """
        times = times or self._times
        now = asyncio.get_running_loop().time
        began = finished = False
        tries: list[RemoteError] = []
        limit = times.start
        try:
            async with asyncio.timeout(limit) as clock:
                response = await self._open(url, request, tries)
                try:
                    accepted()
                    limit = times.first_token
                    clock.reschedule(now() + limit)
                    async with aclosing(read_events(response)) as events:
                        async for event in events:
                            if event.done:
                                finished = True
                                clock.reschedule(now() + LINGER)
                            elif event.chunk is not None or event.finish is not None:
                                began = True
                                finished = finished or event.finish is not None
                                limit = times.between_tokens
                                clock.reschedule(now() + limit)
                            take(event)
                finally:
                    await response.aclose()
        except TimeoutError:
            if not finished:
                raise self._too_slow(began, limit, tries) from None
        except RemoteError:
            # A story whose last event came is whole, whatever became of the connection after it.
            if not finished:
                raise
        if not finished:
            raise RemoteError("the service closed the connection in mid-story", BROKE_OFF)

    def _too_slow(self, began: bool, limit: float, tries: list[RemoteError]) -> RemoteError:
        if began:
            return RemoteError(f"no token came for {limit:g} s", BROKE_OFF, slow=True)
        last = f" (last: {tries[-1].reason})" if tries else ""
        return RemoteError(f"no first token within {limit:g} s{last}", slow=True)

    async def _open(self, url: str, request: GenerationRequest, tries: list[RemoteError]) -> httpx.Response:
        """The response that the story will flow from. What failed on the way is added to `tries`."""

        def worth_it(state: RetryCallState) -> bool:
            error = state.outcome and state.outcome.exception()
            if not isinstance(error, RemoteError):
                return False
            tries.append(error)
            return error.retryable and not (self._fail_fast and error.slow)

        retrying = AsyncRetrying(
            retry=worth_it,
            stop=stop_after_attempt(2) if self._fail_fast else stop_never,
            wait=wait_random_exponential(multiplier=0.1, max=0.2 if self._fail_fast else 2.0),
            reraise=True,
        )
        response: httpx.Response = await retrying(self._ask, url.rstrip("/") + PATH, body(request))
        return response

    async def _ask(self, address: str, asked: dict[str, Any]) -> httpx.Response:
        try:
            request = self._client.build_request(
                "POST",
                address,
                json=asked,
                headers={"Accept": "text/event-stream", "Cache-Control": "no-store"},
            )
            response = await self._client.send(request, stream=True)
        except httpx.TimeoutException as error:
            raise from_exception(error, retryable=True, slow=True) from None
        except httpx.TransportError as error:
            # Refused, reset, or a kept connection that the other side had just closed: nothing was written.
            raise from_exception(error, retryable=True) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise from_exception(error) from None
        if response.status_code == 200:
            return response
        try:
            raise from_status(response.status_code, response.headers, await _beginning(response))
        finally:
            await response.aclose()


async def _beginning(response: httpx.Response) -> bytes:
    """The answer's body as far as it is of interest; what cannot be read is as good as empty."""
    read = b""
    try:
        async for part in response.aiter_bytes():
            read += part
            if len(read) > LONGEST_ANSWER:
                break
    except httpx.HTTPError:
        return b""
    return read


def proxy_auth(settings: Settings) -> dict[str, str]:
    """The headers that Modal's proxy asks for, if a token is set. Raises `InputError`, never with the token."""
    if settings.modal_key is None or settings.modal_secret is None:
        return {}
    pair = {"MODAL_KEY": settings.modal_key, "MODAL_SECRET": settings.modal_secret.get_secret_value()}
    for name, value in pair.items():
        if not (value.isascii() and value.isprintable() and value == value.strip()):
            raise InputError(name, "must be plain ASCII without spaces around it, and is not")
    return {"Modal-Key": pair["MODAL_KEY"], "Modal-Secret": pair["MODAL_SECRET"]}


def introduce(url: str, headers: dict[str, str], seconds: float = 2.0) -> ModelInfo | str:
    """Which model writes at `url`, or in one line why that is not known after about `seconds`."""
    try:
        answer = httpx.get(f"{url.rstrip('/')}/v1/models", headers=headers, timeout=seconds)
        if answer.status_code != 200:
            return from_status(answer.status_code, answer.headers, answer.content).reason
        first = answer.json()["data"][0]
        return ModelInfo(name=one_line(str(first["name"])), version=one_line(str(first["version"])))
    except httpx.HTTPError as error:
        return from_exception(error).reason
    except (ValueError, LookupError, TypeError):
        return "what answers there is no story service"
    except Exception as error:  # an address that no socket takes
        return type(error).__name__
