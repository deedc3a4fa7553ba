"""The page as an ASGI application: what any server serves is what `story demo` serves."""

from __future__ import annotations

import contextlib
import importlib
import json
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from demo.asgi import compose
from model.errors import InputError
from model.serving.http.server import bound, url_of
from tests.demo.engines import local_backend
from tests.demo.scripted import ScriptedBackend
from tests.demo.served import serve


@contextlib.contextmanager
def hosted(app: FastAPI) -> Iterator[str]:
    """The application under a uvicorn that knows nothing of it."""
    listener = bound("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield url_of(listener, "127.0.0.1")
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def test_the_page_is_the_one_that_the_demo_serves() -> None:
    with serve(ScriptedBackend("A story.")) as served:
        by_the_demo = {
            path: httpx.get(f"{served.url}{path}", timeout=None).text for path in ("config", "theme.css", "favicon.ico")
        }
    with hosted(compose(ScriptedBackend("A story."))) as url:
        here = {path: httpx.get(f"{url}/{path}", timeout=None).text for path in by_the_demo}
        page = httpx.get(url, timeout=None)
    assert page.status_code == 200
    assert "Write me a story" in page.text
    assert here["theme.css"] == by_the_demo["theme.css"]
    assert here["favicon.ico"] == by_the_demo["favicon.ico"]
    same = ("title", "footer_links", "stylesheets", "analytics_enabled", "show_error", "mode")
    config, other = (json.loads(both["config"]) for both in (here, by_the_demo))
    assert {key: config.get(key) for key in same} == {key: other.get(key) for key in same}
    assert len(config["components"]) == len(other["components"]) > 5
    assert config["footer_links"] == []


def test_the_service_lies_beside_it_and_writes() -> None:
    with hosted(compose(local_backend(step_seconds=0.001))) as url:
        assert httpx.get(f"{url}/api/health", timeout=None).json()["status"] == "healthy"
        assert "/v1/completions" in httpx.get(f"{url}/openapi.json", timeout=None).json()["paths"]
        body = {"prompt": "Once upon a time", "max_tokens": 8}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=None).json()
        assert answer["usage"]["completion_tokens"] >= 1
        assert "story_" in httpx.get(f"{url}/metrics", timeout=None).text
        assert (
            httpx.post(f"{url}/v1/completions", json={"prompt": 7}, timeout=None).json()["error"]["param"] == "prompt"
        )


def test_what_is_closed_in_the_demo_is_closed_here() -> None:
    paths = ("gradio_api/runs", "monitoring", "monitoring/summary", "docs", "redoc")
    with serve(ScriptedBackend("A story.")) as served:
        by_the_demo = [httpx.get(f"{served.url}{path}", timeout=None).status_code for path in paths]
    with hosted(compose(ScriptedBackend("A story."))) as url:
        here = [httpx.get(f"{url}/{path}", timeout=None).status_code for path in paths]
    assert here == by_the_demo
    assert set(here) <= {403, 404}


def test_the_engine_stops_with_the_application() -> None:
    before = set(threading.enumerate())  # other tests' engines may still be ending
    with hosted(compose(local_backend())) as url:
        body = {"prompt": "Once", "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=None).status_code == 200
        threads = [thread for thread in threading.enumerate() if thread.name == "story-engine" and thread not in before]
        assert threads
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)


def test_a_factory_by_name_reads_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Modal's page does it: by name, with nothing but the environment, and over the shipped model."""
    factory = importlib.import_module("demo.asgi").create_app
    monkeypatch.setenv("STORY_SLOTS", "1")
    with hosted(factory()) as url:
        assert httpx.get(f"{url}/api/health", timeout=None).json()["engine"]["slots"] == 1
    monkeypatch.setenv("STORY_SLOTS", "0")
    with pytest.raises(InputError, match="STORY_SLOTS must be a whole number between 1 and 256, got '0'"):
        factory()
