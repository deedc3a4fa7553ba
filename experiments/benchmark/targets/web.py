"""A service at an address, asked by the OpenAI completions contract over server-sent events.

Any server of that contract will do. One that sends `token_ids` is counted by them while it writes; the total is
the server's own `usage` in any case, and the number of messages never is.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx
from httpx_sse import SSEError, aconnect_sse

from experiments.benchmark.memory import listening_processes
from experiments.benchmark.sample import FailureKind
from experiments.benchmark.targets.base import Ending, Failed, Listener
from model.errors import InputError, StoryError
from model.generation import GenerationRequest

CONNECT_SECONDS = 10.0
LONGEST_MESSAGE = 200


class UnreachableError(StoryError):
    """The service to be measured does not answer at all, so there is nothing to measure."""

    exit_code = 2


class WebTarget:
    """`address` is the server's root, its `/v1`, or the completions route itself."""

    cold_start_means = "the first request to a service that was already running, over a new connection"
    cold_starts = 1

    def __init__(self, address: str, *, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError("target", f"must be an http(s) address, got {address!r}")
        path = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/v1")
        host = parts.netloc.rpartition("@")[2]
        self.name = f"{parts.scheme}://{host}{path}"
        self.digest: str | None = None
        self._root = parts._replace(path=path, query="", fragment="").geturl()
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._here = parts.hostname in ("127.0.0.1", "localhost", "::1")
        self._headers = dict(headers or {})
        self._model: str | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hold connections open, and ask once which model writes.

        Raises `UnreachableError` when nobody answers.
        """
        async with self._new_client() as self._client:
            await self._ask_model()
            yield

    def _new_client(self) -> httpx.AsyncClient:
        # As many connections as requests are open: a pool that makes them wait would be measured as the server's
        # slowness. How long a request may take is the load generator's to say.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        return httpx.AsyncClient(headers=self._headers, limits=limits, timeout=timeout)

    async def _ask_model(self) -> None:
        try:
            answer = await self._client.get(f"{self._root}/v1/models", timeout=CONNECT_SECONDS)
        except httpx.HTTPError as error:
            raise UnreachableError(f"{self.name} does not answer: {_said(error)}") from None
        try:
            entry = answer.json()["data"][0] if answer.status_code == 200 else {}
            self._model = entry.get("id")
            version = entry.get("version")
        except (ValueError, LookupError, TypeError, AttributeError):
            return  # a server without this route is measured too; its figures then belong to no version
        if isinstance(version, str) and len(version) == 64:
            self.digest = version

    async def write(self, request: GenerationRequest, listener: Listener) -> Ending:
        """Write one story over a connection that is kept for the next."""
        return await self._write(self._client, request, listener)

    async def write_cold(self, request: GenerationRequest, listener: Listener) -> Ending:
        """Write one story over a connection of its own."""
        async with self._new_client() as client:
            return await self._write(client, request, listener)

    def processes(self) -> list[int]:
        """Whoever listens at this port of this machine."""
        return listening_processes(self._port) if self._here else []

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        sampling = request.sampling
        body = {
            "prompt": request.prompt, "max_tokens": request.max_tokens, "seed": sampling.seed,
            "temperature": sampling.temperature, "top_p": sampling.top_p,
            "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True,
        }  # fmt: skip
        return body if self._model is None else {"model": self._model, **body}

    async def _write(
        self, client: httpx.AsyncClient, request: GenerationRequest, listener: Listener
    ) -> Ending:
        reading = _Reading(listener)
        try:
            url = f"{self._root}/v1/completions"
            async with aconnect_sse(client, "POST", url, json=self._body(request)) as source:
                if source.response.status_code != 200:
                    raise await _refusal(source.response)
                # Read on after [DONE]: a connection whose answer was not read to its end is not used again.
                async for event in source.aiter_sse():
                    reading.take(event.data)
        except (SSEError, httpx.DecodingError) as error:  # before the next: the first of them is one of those
            raise Failed("malformed", _said(error)) from None
        except httpx.TransportError as error:
            raise Failed(_kind_of(error), _said(error)) from None
        return reading.ending()


class _Reading:
    """What has come of one story so far."""

    def __init__(self, listener: Listener) -> None:
        self.messages = 0
        self._done = False
        self._listener = listener
        self._ids = 0
        self._finish: str | None = None
        self._usage: int | None = None

    def take(self, data: str) -> None:
        """Read one event. Raises `Failed`."""
        if self._done or data == "[DONE]":
            self._done = True
            return
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            raise Failed("malformed", f"an event is not JSON: {data[:80]!r}") from None
        if not isinstance(chunk, dict):
            raise Failed("malformed", f"an event is not an object: {data[:80]!r}")
        if error := chunk.get("error"):
            raise Failed("error", str(error.get("message") if isinstance(error, dict) else error))
        choices, usage = chunk.get("choices"), chunk.get("usage")
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise Failed("malformed", f"an event has no choices: {data[:80]!r}")
        for choice in choices:
            ids, text = choice.get("token_ids"), choice.get("text")
            count = len(ids) if isinstance(ids, list) else 0
            if count or (text and not isinstance(ids, list)):
                self._listener.arrived(count)
                self.messages += 1
                self._ids += count
            if choice.get("finish_reason"):
                self._finish = choice["finish_reason"]
                self._listener.whole()
        if isinstance(usage, dict):
            told = usage.get("completion_tokens")
            self._usage = told if isinstance(told, int) else self._usage

    def ending(self) -> Ending:
        """How the story ended. Raises `Failed` when that was not said."""
        if not self._done:
            raise Failed("cut", f"the stream ended before [DONE], after {self.messages} messages")
        if self._finish not in ("stop", "length"):
            raise Failed("error" if self._finish else "malformed", f"the finish reason is {self._finish}")
        if self._usage is None and self.messages and not self._ids:
            raise Failed("malformed", "neither usage nor token ids were sent, so tokens cannot be counted")
        return Ending(self._finish, self._ids if self._usage is None else self._usage)


async def _refusal(response: httpx.Response) -> Failed:
    """The failure that a status other than 200 stands for."""
    text = (await response.aread()).decode(errors="replace")
    try:
        message = str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = text
    status = response.status_code
    kind: FailureKind = "http_5xx" if status >= 500 else "rejected"
    if status == 429 or (status == 503 and "retry-after" in response.headers):
        kind = "busy"
    return Failed(kind, f"{status}: {message[:LONGEST_MESSAGE]}")


def _kind_of(error: httpx.TransportError) -> FailureKind:
    if isinstance(error, httpx.ConnectError):
        return "refused"
    if isinstance(error, httpx.TimeoutException):
        return "timeout"
    return "cut"


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
