"""What the tests of remote backends talk to: backends over real engines, a server that breaks, processes to kill."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from model.generation import Completion, GenerationRequest
from model.serving.backend import LocalBackend, ModelInfo
from model.serving.remote.client import ServiceClient
from model.serving.remote.modal import Breaker, FailoverBackend, ModalBackend
from model.settings import Settings
from tests.model.serving.http.serving import paced


def within(connect: float, stages: float) -> Settings:
    """Timeouts of a connection, and of each stage after it."""
    return Settings(
        story_connect_timeout=connect,
        story_response_timeout=stages,
        story_first_token_timeout=stages,
        story_token_timeout=stages,
    )


QUICK = within(1.0, 0.5)
CALM = within(10.0, 10.0)
"""For a service that does its part on a machine that may be busy."""
REMOTE = ModelInfo(name="a model elsewhere", version="fedcba9876543210" * 4)


def modal(
    endpoint: str | Callable[[], str],
    *,
    timeouts: Settings = QUICK,
    failures: int = 3,
    reset: float = 30.0,
    headers: dict[str, str] | None = None,
    fail_fast: bool = False,
) -> ModalBackend:
    """The service at `endpoint`."""
    return ModalBackend(
        endpoint if callable(endpoint) else lambda: endpoint,
        partial(ServiceClient, headers or {}, timeouts, fail_fast=fail_fast),
        model=REMOTE,
        breaker=Breaker(failures, reset),
    )


def auto(
    endpoint: str | Callable[[], str],
    *,
    local: LocalBackend | None = None,
    timeouts: Settings = QUICK,
    failures: int = 3,
    reset: float = 30.0,
) -> FailoverBackend:
    """That service, with a real engine beside it whose stories end only at their length."""
    return FailoverBackend(
        modal(endpoint, timeouts=timeouts, failures=failures, reset=reset, fail_fast=True), local or paced(slots=4)[0]
    )


def alone(request: GenerationRequest) -> Completion:
    """What the engine of `auto` writes when nobody else has a hand in it."""
    with paced()[0].engine as engine:
        return engine.submit(request).wait(10)


WORDS = re.findall(r"\w+", "saw a frog by the old pond and the frog said hello to the little fox who sat there alone")
"""What the scripts send, one word a token: twenty of them."""


def text_of(words: int) -> str:
    """The text of the first `words` words."""
    return "".join(f" {word}" for word in WORDS[:words])


@dataclass
class Line:
    """One connection, after its request has come."""

    writer: asyncio.StreamWriter
    sent: int = 0
    """Words sent so far."""

    async def raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    async def status(self, code: int, message: str = "", **headers: str) -> None:
        """A whole answer that is not a story."""
        error = {"error": {"type": "test", "message": message, "param": None, "code": "test"}}
        content = json.dumps(error).encode() if message else b""
        extra = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {code} Test\r\n{extra}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        await self.raw(head.encode() + content)

    async def open(self) -> None:
        """The head of an event stream whose length nobody knows."""
        await self.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")

    async def event(self, value: Any, name: str = "") -> None:
        """One whole event."""
        head = f"event: {name}\n" if name else ""
        data = value if isinstance(value, str) else json.dumps(value)
        await self.raw(f"{head}data: {data}\n\n".encode())

    async def words(self, count: int, pace: float = 0.0) -> None:
        """The next words, each as an event of one token."""
        for word in WORDS[self.sent : self.sent + count]:
            self.sent += 1
            await self.event({"choices": [{"index": 0, "text": f" {word}", "token_ids": [self.sent]}]})
            await asyncio.sleep(pace)

    async def end(self) -> None:
        """The end of a story, as the service sends it."""
        await self.event({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 3, "completion_tokens": self.sent, "total_tokens": self.sent + 3}
        await self.event({"choices": [], "usage": usage, "times": {"queued": 0.01, "ttft": 0.02, "duration": 0.5}})
        await self.event("[DONE]")

    async def closed(self) -> None:
        """Wait until the client is gone."""
        await self.writer.wait_closed()


Script = Callable[[Line], Awaitable[None]]


@dataclass
class Broken:
    """The server: where it is and what it was asked."""

    script: Script
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    connections: int = 0
    gone: int = 0
    """Connections that the client left."""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read a request and run the script."""
        self.connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = next(
                int(line.partition(":")[2]) for line in head.splitlines() if line.lower().startswith("content-length")
            )
            self.heads.append(head)
            self.bodies.append(json.loads(await reader.readexactly(length)))
            script = asyncio.ensure_future(self.script(Line(writer)))
            left = asyncio.ensure_future(reader.read())
            await asyncio.wait({script, left}, return_when=asyncio.FIRST_COMPLETED)
            self.gone += not script.done()
            script.cancel()
            left.cancel()
            await asyncio.gather(script, left, return_exceptions=True)
        writer.close()


@contextlib.asynccontextmanager
async def broken(script: Script) -> AsyncIterator[Broken]:
    """Serve with `script` on a free port of the loopback."""
    service = Broken(script)
    server = await asyncio.start_server(service.answer, "127.0.0.1", 0)
    service.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield service
    finally:
        server.close()
        await asyncio.sleep(0)


COPY = """
import sys
from model.serving.http.server import bound
from model.serving.http.app import create_service
from model.settings import ServiceOptions, Settings
from model.serving.http.server import DrainingServer
from tests.model.serving.http.serving import paced

service = create_service(paced(step_seconds=0.02)[0], ServiceOptions(settings=Settings(story_drain=1)))
listener = bound("127.0.0.1", int(sys.stdin.readline()))
announce = lambda: print(listener.getsockname()[1], flush=True)
DrainingServer(service, announce).run(sockets=[listener])
"""


class Copies:
    """Processes of the service, one after the other on one port. All start at once, and wait for their turn."""

    def __init__(self, repository: Path, count: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        command = [sys.executable, "-c", COPY]
        self.port = 0
        self.waiting = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            for _ in range(count)
        ]
        self.running: list[subprocess.Popen[str]] = []

    def start(self) -> str:
        """Let the next one listen; it does when this returns."""
        process = self.waiting.pop()
        self.running.append(process)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{self.port}\n")
        process.stdin.flush()
        self.port = int(process.stdout.readline())
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """End the last one as a power cut would."""
        self.running[-1].send_signal(signal.SIGKILL)
        self.running[-1].wait()

    def close(self) -> None:
        for process in [*self.waiting, *self.running]:
            process.kill()
            process.communicate()
