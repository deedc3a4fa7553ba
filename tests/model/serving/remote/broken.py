"""A real HTTP server that breaks on purpose, for what the real service cannot be brought to do.

It stands on bare sockets, because a library would not let half an event, a lie about the length or silence
through. Each request is read as any server would read it, and then a script has the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

WORDS = re.findall(
    r"\w+", "saw a frog by the old pond and the frog said hello to the little fox who sat there alone"
)
"""What the scripts tell, one word a token: twenty of them."""


def text_of(words: int) -> str:
    """The text of the first `words` words."""
    return "".join(f" {word}" for word in WORDS[:words])


@dataclass
class Line:
    """One connection, after its request has come."""

    writer: asyncio.StreamWriter
    told: int = 0
    """Words told so far."""

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
        for word in WORDS[self.told : self.told + count]:
            self.told += 1
            await self.event({"choices": [{"index": 0, "text": f" {word}", "token_ids": [self.told]}]})
            await asyncio.sleep(pace)

    async def end(self) -> None:
        """The end of a story, as the service tells it."""
        await self.event({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 3, "completion_tokens": self.told, "total_tokens": self.told + 3}
        await self.event(
            {"choices": [], "usage": usage, "times": {"queued": 0.01, "ttft": 0.02, "duration": 0.5}}
        )
        await self.event("[DONE]")

    async def closed(self) -> None:
        """Wait until the client is gone."""
        while not self.writer.transport.is_closing():
            await asyncio.sleep(0.005)


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
                int(line.partition(":")[2])
                for line in head.splitlines()
                if line.lower().startswith("content-length")
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
