"""A service, or the demo, in a process of its own with the shipped model, and clients that stream from it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ServiceProcess:
    """A running service."""

    url: str
    process: subprocess.Popen[str]

    @property
    def rss_mb(self) -> float:
        """Its resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def terminate(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


ORDERS = {"service": ["-m", "model.serving.http"], "demo": [str(REPOSITORY / "story.py"), "demo"]}


@contextlib.contextmanager
def service_process(what: str = "service", port: int = 0, /, **settings: str) -> Iterator[ServiceProcess]:
    """The service alone, or the demo with its page around it, with these settings, until this context ends."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **settings}
    order = [sys.executable, *ORDERS[what], "--port", str(port)]
    process = subprocess.Popen(order, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield ServiceProcess(process.stdout.readline().split()[-1], process)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
        assert process.stdout is not None
        process.stdout.close()


@dataclass
class Readings:
    """What the clients of one load saw."""

    stories: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """Seconds between two events with text of one story."""

    def quantile(self, values: list[float], share: float) -> float:
        """The value below which a share of them lies, in seconds."""
        ordered = sorted(values)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def read_story(client: httpx.AsyncClient, seed: int, into: Readings, *, pause: float = 0.0) -> None:
    """Stream one story to its end; `pause` seconds after each event make a slow client."""
    asked = {"prompt": "Once upon a time", "max_tokens": 200, "seed": seed, "stream": True}
    began = last = time.perf_counter()
    done = False
    try:
        async with client.stream("POST", "/v1/completions", json=asked) as answer:
            if answer.status_code != 200:
                into.errors.append(f"status {answer.status_code}")
                return
            async for data in _events(answer):
                now = time.perf_counter()
                if data == "[DONE]":
                    done = True
                elif "error" in data:
                    into.errors.append(data[:200])
                elif json.loads(data)["choices"][0]["text"]:
                    (into.ttft if last == began else into.gaps).append(now - last)
                    last = now
                    into.tokens += 1
                if pause:
                    await asyncio.sleep(pause)
    except httpx.HTTPError as error:
        into.errors.append(type(error).__name__)
        return
    if done:
        into.stories += 1
    else:
        into.errors.append("broke off")


async def _events(answer: httpx.Response) -> AsyncIterator[str]:
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")
