"""The service as clients meet it: a real uvicorn on loopback, over engines with a pace or the shipped model.

`paced` stands on `FakeRuntime`, because only it can be held still or slowed down: a story of the shipped model
is over before a client has gone away in its middle. Where text matters, the shipped model writes.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from model.serving.backend import Backend, LocalBackend, ModelInfo
from model.serving.http.app import Service, SharedState, create_service
from model.serving.http.server import DrainingServer, bound, url_of
from model.settings import ServiceOptions, Settings
from tests.model.engines import engine, runtime
from tests.model.fake_runtime import FakeRuntime


@dataclass(frozen=True)
class Running:
    """A service that can be reached."""

    url: str
    service: Service
    server: DrainingServer
    client: httpx.Client
    """Made once: httpx takes 30 ms to make one, certificates and all."""

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def get(self, path: str) -> httpx.Response:
        return self.client.get(path)

    def figures(self) -> dict[str, float]:
        """The metrics as they read now: name with labels → value; a story's backends are summed up."""
        found: defaultdict[str, float] = defaultdict(float)
        for line in self.get("/metrics").text.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = re.sub(r'(served_by|version|deployment)="[^"]*",?', "", name).replace(",}", "}")
                found[name] += float(value)
        return found


@contextlib.contextmanager
def serving(
    backend: Backend, *, drain: float = 5.0, shared: SharedState | None = None, host: str = "127.0.0.1", **options: Any
) -> Iterator[Running]:
    """Serve `backend` while this context is open."""
    own = {name: options.pop(name) for name in ("name", "keep_alive", "public") if name in options}
    # A copy is not checked: a test drains for parts of a second.
    settings = Settings(**{f"story_{name}": value for name, value in options.items()})
    settings = settings.model_copy(update={"story_drain": drain})
    service = create_service(backend, ServiceOptions(settings=settings, **own), shared)
    listener = bound(host, 0)
    server = DrainingServer(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        url = url_of(listener, host)
        with httpx.Client(base_url=url, timeout=30) as client:
            yield Running(url, service, server, client)
    finally:
        if not server.should_exit:  # by the test
            for _ in range(2):  # as a signal does: drain, and at the second one no longer wait for stories
                server.handle_exit(signal.SIGTERM, None)
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"
        assert not server.lifespan.shutdown_failed


def paced(
    *, slots: int = 2, queue: int = 2, step_seconds: float = 0.0, end_bias: float = -1000.0
) -> tuple[LocalBackend, FakeRuntime]:
    """A backend over a real engine whose network keeps the pace it is given, and that network."""
    network = runtime(max_batch=slots, step_seconds=step_seconds, end_bias=end_bias)
    model = ModelInfo(name="a network without training", version="0123456789abcdef" * 4)
    return LocalBackend(engine(network, queue_limit=queue), model, capacity=slots + queue), network


def events(lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """(name, data) of each server-sent event; comments come as (":", text). Data is parsed but for [DONE]."""
    name = ""
    for line in lines:
        if line.startswith(":"):
            yield ":", line[1:].strip()
        elif line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield name, data if data == "[DONE]" else json.loads(data)
        elif not line:
            name = ""


@contextlib.contextmanager
def streaming(running: Running, path: str = "/v1/completions", **body: Any) -> Iterator[Iterator[tuple[str, Any]]]:
    """The events of a streamed answer, as they come."""
    request = {"stream": True, **body}
    with running.client.stream("POST", path, json=request) as response:
        assert response.status_code == 200, response.read()
        yield events(response.iter_lines())


def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for something that another thread or process brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)
