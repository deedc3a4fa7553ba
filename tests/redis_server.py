"""A real Redis of a test's own, on a free port of the loopback, that keeps nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from model.serving.http.server import free_port
from model.serving.redis import RedisLink


@dataclass
class RedisServer:
    """One that runs, or ran."""

    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:hunter2-in-a-hat@127.0.0.1:{self.port}/0"

    def start(self) -> None:
        order = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        order += ["--appendonly", "no", "--requirepass", "hunter2-in-a-hat"]
        self.process = subprocess.Popen(order, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert time.monotonic() < deadline, "redis-server did not start"
            assert self.process.poll() is None, "redis-server ended at once"
            time.sleep(0.02)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


async def settled(link: RedisLink) -> None:
    """Return when Redis has answered what was said to it without waiting."""
    await asyncio.gather(*link._tasks)


@contextlib.contextmanager
def redis_server() -> Iterator[RedisServer]:
    """A server that runs on entry. On a CI machine its absence is a failure, elsewhere a skip that says why."""
    if shutil.which("redis-server") is None:
        missing = "redis-server is not on the PATH (Debian: redis-server)"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    port = free_port()
    server = RedisServer(port)
    server.start()
    try:
        yield server
    finally:
        server.stop()
