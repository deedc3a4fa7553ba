"""The service as a process: its address, its options, its signals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.errors import InputError
from model.serving.http.server import bound
from tests.model.serving.http.serving import events, until

PACED = """
import sys
from model.serving.backend import LocalBackend
from model.serving.http.__main__ import main
from tests.model.serving.http.serving import paced

# Stories at a pace, so that a signal meets them in their middle; everything around them is the real thing.
LocalBackend.load = classmethod(lambda cls, settings, found: paced(slots=4, step_seconds=0.01)[0])
sys.argv[0] = "service"
main()
"""


@contextlib.contextmanager
def process(
    repository: Path, *arguments: str, program: str | None = None, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A service as a process, the line it printed and the address in it."""
    command = [sys.executable, *(["-m", "model.serving.http"] if program is None else ["-c", program])]
    started = subprocess.Popen(
        [*command, "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository), **environment},
    )
    assert started.stdout is not None
    try:
        line = started.stdout.readline()
        yield started, line, line.rpartition(": ")[2].strip()
    finally:
        started.kill()
        started.communicate()


class StreamClient(threading.Thread):
    """Reads one streamed story to its end and keeps what came."""

    def __init__(self, url: str, **body: Any) -> None:
        super().__init__()
        self.received: list[tuple[str, Any]] = []
        self._url = url
        self._body = {"prompt": "Once", "stream": True, "return_token_ids": True, **body}
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=60) as response:
            for event in events(response.iter_lines()):
                self.received.append(event)

    @property
    def tokens(self) -> int:
        choices = [choice for _, data in self.received if data != "[DONE]" for choice in data["choices"]]
        return sum(len(choice.get("token_ids", ())) for choice in choices)

    @property
    def ended(self) -> str:
        """`whole`, or the code of the error it ended with."""
        name, data = self.received[-1]
        return "whole" if data == "[DONE]" else str(data["error"]["code"]) if name == "error" else "torn"


def test_it_prints_its_address_writes_stories_and_ends_cleanly(repository: Path) -> None:
    with process(repository, "--name", "blue", "--slots", "2", STORY_QUEUE="3") as (started, line, url):
        assert line.startswith("Story service blue: http://127.0.0.1:")
        health = httpx.get(f"{url}/api/health", timeout=30).json()
        assert (health["backend"], health["engine"]["slots"], health["capacity"]) == ("blue", 2, 5)
        answer = httpx.post(f"{url}/api/generate", json={"prompt": "A fox", "max_tokens": 5}, timeout=30)
        assert answer.json()["story"].startswith("A fox")
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0
        assert started.communicate() == ("", "")


def test_on_sigterm_running_stories_finish_and_new_ones_refused(repository: Path) -> None:
    with process(repository, program=PACED) as (started, _, url):
        clients = [StreamClient(url, max_tokens=300, seed=seed) for seed in range(4)]
        until(lambda: all(len(client.received) > 5 for client in clients), 30)
        started.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/api/health", timeout=None).status_code == 503)
        assert httpx.get(f"{url}/api/health", timeout=None).json()["status"] == "draining"
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=None)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert all(client.is_alive() for client in clients), "they run on"
        assert started.wait(30) == 0
        for client in clients:
            client.join(10)
        assert [client.ended for client in clients] == ["whole"] * 4
        assert [client.tokens for client in clients] == [300] * 4
        assert started.communicate()[1] == ""


@pytest.mark.parametrize("second", [None, signal.SIGINT])
def test_the_wait_is_bounded_by_the_option_and_by_a_second_signal(
    second: signal.Signals | None, repository: Path
) -> None:
    drain = "1" if second is None else "60"
    with process(repository, "--drain", drain, program=PACED) as (started, _, url):
        client = StreamClient(url, max_tokens=4000)
        until(lambda: len(client.received) > 5, 30)
        began = time.monotonic()
        started.send_signal(signal.SIGTERM)
        if second is not None:
            until(lambda: httpx.get(f"{url}/api/health", timeout=None).status_code == 503)
            started.send_signal(second)
        assert started.wait(60) == 0
        assert second is not None or time.monotonic() - began >= 1
        client.join(10)
        assert client.ended == "draining", "its story would have taken longer than the wait"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slots", "0"], "STORY_SLOTS must be a whole number between 1 and 256, got 0"),
        (["--model", "nowhere"], "nowhere"),
        (["--host", "192.0.2.1"], "cannot be used"),
        (["--name", "two words"], "name must be at most 40 letters"),
    ],
)
def test_what_is_wrong_at_the_start_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, repository: Path
) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "model.serving.http", "--port", "0", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
        timeout=60,
        check=False,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("story service: ")
    assert message in run.stderr
    assert run.stderr.count("\n") == 1


async def test_a_connection_sends_small_messages_at_once() -> None:
    received: list[int] = []

    async def greet(client: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted = writer.get_extra_info("socket")
        received.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    listening = bound("127.0.0.1", 0)
    server = await asyncio.start_server(greet, sock=listening)
    async with server:
        client, writer = await asyncio.open_connection(*listening.getsockname())
        await client.read()
        writer.close()
    assert received
    assert all(received), "a token does not wait for the acknowledgement of the one before"


def test_a_port_that_is_taken_and_an_address_elsewhere_are_reported_in_one_line() -> None:
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(InputError, match=r"port .* cannot be used"):
            bound("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="host must be an address of this machine"):
        bound("no-such-host.invalid", 0)
