"""What can be benchmarked: an engine in this process, or a service at an address; both behind one protocol."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
from httpx_sse import SSEError, aconnect_sse
from pydantic import BaseModel, Field, ValidationError

from experiments.benchmark import cold_start
from experiments.benchmark.measures import FailureKind, Listener
from experiments.registry.resolve import resolve_model
from model.errors import BusyError, InputError, StoryError, one_line
from model.generation import GenerationRequest
from model.serving.backend import LocalBackend
from model.serving.registry import MODELS, NAME, SHIPPED, parse_reference
from model.serving.remote.client import header_value, proxy_auth
from model.settings import Settings
from model.validation import fault_of
from training.tracking.provenance import ROOT

CONNECT_SECONDS = 10.0


class Failed(Exception):
    """The request was not answered with a complete story."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(" ".join(message.split())[:300])
        self.kind = kind


class UnreachableError(StoryError):
    """The service to be measured does not answer at all, so there is nothing to measure."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a story ended."""

    finish: str
    """`stop` or `length`."""
    tokens: int
    """By the server's usage, else by token ids."""


class Target(Protocol):
    """Something that generates stories between entering and leaving `running`."""

    name: str
    """For reports: no secret, no folder above the model's own."""
    digest: str | None
    """Of the model folder; None: the target does not say. Known while `running`."""
    cold_start_means: str
    """What a cold request measures here, in words."""
    cold_starts: int
    """How many cold starts can be measured: a service that was woken once may stay awake."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Start on entry, stop on exit. Raises `StoryError` if the target cannot be used at all."""

    async def generate(self, request: GenerationRequest, listener: Listener, *, cold: bool = False) -> Ending:
        """Generate one story, with `cold` from as cold as this target can be made. Raises `Failed`."""

    def processes(self) -> list[int]:
        """Ids of the processes of this machine that serve; empty: none, or not to be found."""


def open_target(text: str, settings: Settings, *, option: str = "target") -> Target:
    """The target that `text` names: `local`, an http(s) address, a registered version or a model folder.

    `local` is the model of the settings, in this process. The settings decide about slots, threads and precision of
    whatever runs in this process; only their own endpoint is sent their proxy token, other addresses their API key.

    Raises:
        InputError: `text` names no target. `ModelError`: the model is missing or damaged.
    """
    if text.startswith(("http://", "https://")):
        return WebTarget(text, headers=_headers(text, settings))
    reference = settings.story_model if text == "local" else text
    if text not in ("local", SHIPPED) and parse_reference(text) is None and not Path(text).is_dir():
        allowed = f"local, an http(s) address, a model folder, {SHIPPED}, {MODELS}{NAME}@ALIAS or {MODELS}{NAME}/NUMBER"
        raise InputError(option, f"must be {allowed}, got {text!r}")
    found = resolve_model(reference, settings)
    name = text
    if found.version is not None and text == "local":
        name = f"local ({found.version.name})"
    elif found.version is None and reference not in (None, SHIPPED):
        name = f"local ({found.path.resolve().name})"
    return LocalTarget(LocalBackend.load(settings, found), found.path, name=name)


def _headers(address: str, settings: Settings) -> dict[str, str]:
    """The proxy token for the endpoint that it belongs to and for no other address, which gets the API key."""
    own = settings.modal_endpoint_url
    is_own = own is not None and f"{address.rstrip('/')}/".startswith(f"{own.rstrip('/')}/")
    headers = proxy_auth(settings) if is_own else {}
    if not headers and settings.openai_api_key is not None:
        key = header_value("OPENAI_API_KEY", settings.openai_api_key.get_secret_value())
        headers = {"Authorization": f"Bearer {key}"}
    return headers


class LocalTarget:
    """An engine in this process, without a network between. `folder` is what a new process loads for a cold start."""

    cold_start_means = "a new process, from its start to its first token"
    cold_starts = 3

    def __init__(self, backend: LocalBackend, folder: Path | None, *, name: str = "local") -> None:
        self.name = name
        self.digest: str | None = backend.model.version
        self._backend, self._folder = backend, folder

    def running(self) -> AbstractAsyncContextManager[None]:
        return self._backend.running()

    async def generate(self, request: GenerationRequest, listener: Listener, *, cold: bool = False) -> Ending:
        if cold:
            return await self._start_process(str(request.prompt), listener)
        try:
            stream = await self._backend.submit(request)
        except StoryError as error:
            raise Failed("busy" if isinstance(error, BusyError) else "error", str(error)) from None
        try:
            async for chunk in stream:
                if chunk.tokens:
                    listener.arrived(len(chunk.tokens))
            listener.complete()
        finally:
            stream.cancel()  # frees the slot of a request that timed out; harmless when it has ended
        done = stream.completion
        if done.finish_reason not in ("stop", "length"):
            raise Failed("error", done.error or f"the story ended as {done.finish_reason}")
        return Ending(done.finish_reason, done.usage.completion_tokens)

    async def _start_process(self, prompt: str, listener: Listener) -> Ending:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        if self._folder is not None:
            environment["STORY_MODEL"] = str(self._folder)
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", cold_start.__name__, prompt),
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert child.stdout is not None
            if await child.stdout.readline() == b"first\n":
                listener.arrived(1)
                listener.complete()
            _, stderr = await child.communicate()
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if child.returncode != 0:
            last = stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise Failed("error", f"the process ended with status {child.returncode}: {last[0]}")
        return Ending("length", 1)

    def processes(self) -> list[int]:
        """This process: engine and benchmark in one."""
        return [os.getpid()]


class WebTarget:
    """A service that speaks the OpenAI completions protocol over server-sent events.

    `address` is the server's root, its `/v1`, or the completions route itself. Tokens are counted by the server's own
    `usage`, and while it streams by `token_ids` where it sends them; never by messages.
    """

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
        """Hold connections open, and ask once which model serves. Raises `UnreachableError` when nobody answers."""
        async with self._new_client() as self._client:
            await self._ask_model()
            yield

    def _new_client(self) -> httpx.AsyncClient:
        # As many connections as open requests: waiting for a pool would be measured as the server's latency. How long
        # a request may take is up to the load generator.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        return httpx.AsyncClient(headers=self._headers, limits=limits, timeout=timeout)

    async def _ask_model(self) -> None:
        try:
            answer = await self._client.get(f"{self._root}/v1/models", timeout=CONNECT_SECONDS)
        except httpx.HTTPError as error:
            raise UnreachableError(f"{self.name} does not answer: {one_line(error)}") from None
        # A server without this route is measured too; its figures then belong to no version.
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            entry = answer.json()["data"][0] if answer.status_code == 200 else {}
            self._model, version = entry.get("id"), entry.get("version")
            self.digest = version if isinstance(version, str) and len(version) == 64 else None

    async def generate(self, request: GenerationRequest, listener: Listener, *, cold: bool = False) -> Ending:
        parser = _StreamParser(listener)
        try:
            url, body = f"{self._root}/v1/completions", self._body(request)
            async with (
                self._new_client() if cold else contextlib.nullcontext(self._client) as client,
                aconnect_sse(client, "POST", url, json=body) as source,
            ):
                if source.response.status_code != 200:
                    raise await _refusal(source.response)
                # Read on after [DONE]: a connection whose answer was not read to its end is not used again.
                async for event in source.aiter_sse():
                    parser.take(event.data)
        except (SSEError, httpx.DecodingError) as error:  # first: SSEError is a TransportError
            raise Failed("malformed", one_line(error)) from None
        except httpx.TransportError as error:
            raise Failed(_kind_of(error), one_line(error)) from None
        except Failed as failure:
            raise Failed(failure.kind, self._without_secrets(str(failure))) from None
        return parser.ending()

    def processes(self) -> list[int]:
        """The processes that listen at this port of this machine."""
        # Imported here: it needs psutil, and the check of a deployment (deploy.release.release) does not.
        from experiments.benchmark.memory import listening_processes

        return listening_processes(self._port) if self._here else []

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        sampling = request.sampling
        return ({} if self._model is None else {"model": self._model}) | {
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "seed": sampling.seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }

    def _without_secrets(self, message: str) -> str:
        """What a server says about a request may repeat its headers."""
        for value in self._headers.values():
            message = message.replace(value.removeprefix("Bearer "), "…")
        return message


class _Choice(BaseModel):
    text: str | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Usage(BaseModel):
    completion_tokens: int | None = Field(default=None, ge=0)


class _Event(BaseModel):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class _StreamParser:
    """Reads the events of one completion."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._done = False
        self._messages = 0
        self._ids = 0
        self._finish: str | None = None
        self._usage: int | None = None

    def take(self, data: str) -> None:
        """Read one event. Raises `Failed`."""
        if self._done or data == "[DONE]":
            self._done = True
            return
        try:
            event = _Event.model_validate_json(data)
        except ValidationError as error:
            place, problem = fault_of(error)
            raise Failed("malformed", f"an event is not usable: {place or data[:80]!r} {problem}") from None
        if fault := event.error:
            raise Failed("error", str(fault.get("message") if isinstance(fault, dict) else fault))
        if event.choices is None:
            raise Failed("malformed", f"an event has no choices: {data[:80]!r}")
        for choice in event.choices:
            count = len(choice.token_ids or ())
            if count or (choice.text and choice.token_ids is None):
                self._listener.arrived(count)
                self._messages += 1
                self._ids += count
            if choice.finish_reason:
                self._finish = choice.finish_reason
                self._listener.complete()
        if event.usage is not None and event.usage.completion_tokens is not None:
            self._usage = event.usage.completion_tokens

    def ending(self) -> Ending:
        """How the story ended. Raises `Failed` when the server did not say."""
        if not self._done:
            raise Failed("truncated", f"the stream ended before [DONE], after {self._messages} messages")
        if self._finish not in ("stop", "length"):
            raise Failed("error" if self._finish else "malformed", f"the finish reason is {self._finish}")
        if self._usage is None and self._messages and not self._ids:
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
    busy = status == 429 or (status == 503 and "retry-after" in response.headers)
    kind: FailureKind = "busy" if busy else "http_5xx" if status >= 500 else "rejected"
    return Failed(kind, f"HTTP {status} ({message[:200]})")


def _kind_of(error: httpx.TransportError) -> FailureKind:
    if isinstance(error, httpx.ConnectError):
        return "refused"
    return "timeout" if isinstance(error, httpx.TimeoutException) else "truncated"
