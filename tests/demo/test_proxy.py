"""The app under a path behind a real nginx, on IPv6 addresses, and met by a page of another site in a real browser."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.server
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import socketio
from playwright.sync_api import expect

from demo.routing import RoutingBackend
from experiments.ab.assignment import without_test
from experiments.ab.recorder import Recorder
from model.serving.http.server import bound, free_port
from model.settings import ServiceOptions, Settings
from tests.demo.engines import local_backend
from tests.demo.served import serve
from tests.demo.tabs import TIMEOUT, Tab, chromium
from tests.model.serving.http.serving import paced, serving

ROOT = "/sub/path"
CONFIG = """
daemon off; pid {folder}/pid; error_log stderr; worker_processes 1;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  map $http_upgrade $connection_upgrade {{ default upgrade; '' close; }}
  server {{
    listen 127.0.0.1:{port};
    location {root}/ {{
      proxy_pass {target};
      proxy_http_version 1.1;
      proxy_set_header Host $http_host;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
      proxy_buffering off;
    }}
  }}
}}
"""


@contextlib.contextmanager
def proxied(target: str, folder: Path) -> Iterator[str]:
    """The address of an nginx that publishes `target` under `ROOT`."""
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed on this machine (Debian package: nginx-light)")
    port = free_port()
    (folder / "nginx.conf").write_text(CONFIG.format(folder=folder, port=port, root=ROOT, target=target))
    with subprocess.Popen([nginx, "-p", str(folder), "-c", str(folder / "nginx.conf")]) as process:
        try:
            for _ in range(2_000):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
                    break
                assert process.poll() is None, "nginx did not start"
                threading.Event().wait(0.005)
            yield f"http://127.0.0.1:{port}{ROOT}/"
        finally:
            process.terminate()


@pytest.mark.browser
async def received(url: str, transport: str, body: dict[str, Any]) -> list[str]:
    """Names of the events of a story by Socket.IO."""
    names: list[str] = []
    client = socketio.AsyncSimpleClient()
    await client.connect(url, socketio_path=f"{ROOT}/socket.io", transports=[transport])
    try:
        await client.emit("generate_story", body)
        while not {"story_complete", "story_error"} & set(names):
            names.append((await client.receive(timeout=30))[0])
    finally:
        await client.client.eio.disconnect(abort=True)  # without waiting for its last poll, which takes half a minute
    return names


@pytest.mark.parametrize("strips", [True, False])
def test_page_assets_api_and_socket_io_work_under_a_path(strips: bool, tmp_path: Path) -> None:
    recorder = Recorder(f"sqlite:///{tmp_path}/stories.db", salt="s")
    backend = RoutingBackend(without_test("t"), {"default": local_backend(end_bias=-50)}, recorder)
    with (
        serve(backend, options=ServiceOptions(settings=Settings(story_root_path=ROOT))) as served,
        # With a path after its address, nginx replaces the published one by it; without, it leaves that in place.
        proxied(served.url if strips else served.url.rstrip("/"), tmp_path) as url,
    ):
        assert httpx.get(f"{url}api/health", timeout=None).json()["status"] == "healthy"
        assert httpx.get(f"{url}openapi.json", timeout=None).json()["servers"] == [{"url": ROOT}]
        body = {"prompt": "One day", "max_tokens": 4}
        assert httpx.post(f"{url}v1/completions", json=body, timeout=None).json()["usage"]["completion_tokens"] == 4
        assert httpx.get(f"{url}config", timeout=None).json()["root"] == url.rstrip("/")
        for transport in ("polling", "websocket"):
            assert "story_complete" in asyncio.run(received(url, transport, body))
        with chromium() as browser:
            tab = Tab(browser.new_context().new_page(), url)
            missing: list[str] = []
            tab.page.on("response", lambda answer: missing.append(answer.url) if answer.status >= 400 else None)
            tab.open()
            tab.page.fill("#prompt textarea", "One day")
            tab.length(20)
            tab.page.click("#write")
            tab.reaches("open")
            assert tab.story().startswith("One day")
            assert [cookie["path"] for cookie in tab.page.context.cookies()] == [f"{ROOT}/"]
            assert (missing, tab.foreign, tab.errors) == ([], [], [])


@pytest.mark.parametrize("host", ["::1", "[::1]", "::"])
def test_both_entry_points_listen_on_ipv6(host: str) -> None:
    try:
        bound("::1", 0).close()
    except Exception:
        pytest.skip("this machine has no IPv6")
    with serve(local_backend(), host=host) as served:
        assert served.url.startswith(f"http://[{host.strip('[]')}]:")
        port = urlsplit(served.url).port
        for name in ("[::1]", "127.0.0.1") if host == "::" else ("[::1]",):
            assert "Write me a story" in httpx.get(f"http://{name}:{port}/", timeout=None).text
            assert httpx.get(f"http://{name}:{port}/metrics", timeout=None).status_code == 200, (
                "this machine reads the metrics"
            )
    backend, _ = paced()
    with serving(backend, host=host) as running:
        assert running.url.startswith(f"http://[{host.strip('[]')}]:")
        assert running.get("/api/health").status_code == 200


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


CALLS = """async (app) => {
  const call = async (path, options) => {
    try { return (await fetch(app + path, options)).status } catch (error) { return 'blocked' }
  };
  const body = '{"prompt": "x", "max_tokens": 1}';
  const json = {method: 'POST', headers: {'content-type': 'application/json'}, body};
  const socket = await new Promise((done) => {
    const made = new WebSocket(app.replace('http', 'ws') + 'socket.io/?EIO=4&transport=websocket');
    made.onopen = () => { made.close(); done('open') };
    made.onerror = () => done('blocked');
  });
  return [await call('config'), await call('api/health'), await call('v1/completions', json), socket];
}"""


@pytest.mark.browser
def test_a_page_of_another_site_reads_nothing_in_a_browser_unless_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<!doctype html><title>Another site</title>")
    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as other, chromium() as browser:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        port = other.server_address[1]
        friend, stranger = f"http://127.0.0.1:{port}", f"http://evil.localhost:{port}"
        backend = local_backend()
        with serve(backend, options=ServiceOptions(settings=Settings(story_origins=(friend,)))) as served:
            # The app under a name that is not `localhost`, where Gradio's own policy let everyone in.
            app = f"http://stories.localhost:{urlsplit(served.url).port}/"
            page = browser.new_page()
            page.add_init_script("localStorage['story-visited'] = 'yes'")  # without the example of a first visit
            for site, expected in ((friend, [200, 200, 200, "open"]), (stranger, ["blocked"] * 4), (app, None)):
                page.goto(site)
                expected = expected or [200, 200, 200, "open"]
                assert page.evaluate(CALLS, app) == expected, site
            expect(page.locator("#prompt textarea")).to_be_visible(timeout=TIMEOUT)
            assert backend.engine.stats().finished["length"] == 2, "a refused request writes nothing"
        other.shutdown()
