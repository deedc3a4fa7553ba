"""HTTP client of a remote story service: one streamed request under timeouts for each of its stages.

The first stage lasts until the service answers: connecting, retries, a container's cold start. Then comes the wait for
the first token (queue and prefill), then that between two tokens. A comment that only keeps the connection open is no
token and restarts no timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import httpx
from tenacity import AsyncRetrying, retry_if_exception
from tenacity.stop import stop_after_attempt, stop_never
from tenacity.wait import wait_random_exponential

from model.errors import InputError, one_line
from model.generation import GenerationRequest
from model.serving.backend import ModelInfo
from model.serving.remote.protocol import (
    BROKE_OFF,
    PATH,
    RemoteError,
    WireEvent,
    body,
    from_exception,
    from_status,
    read_events,
)
from model.settings import Settings

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
        return ModelInfo(name=one_line(str(first["name"])), version=one_line(str(first["version"])))
    except httpx.HTTPError as error:
        return from_exception(error).reason
    except (ValueError, LookupError, TypeError):
        return "what answers there is no story service"
    except Exception as error:  # an address that no socket takes
        return type(error).__name__
