"""A real MLflow server on the loopback, as `mlflow server` starts it, without its helper processes for jobs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from model.serving.http.server import free_port


@dataclass(frozen=True, slots=True)
class MlflowServer:
    """A server that keeps its store and all artifacts in `folder`, and sends artifacts itself."""

    address: str
    folder: Path


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """Start a server; its end ends it."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    settings = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"127.0.0.1:{port}",
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    }
    command = [sys.executable, "-m", "uvicorn", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "mlflow.server.fastapi_app:app"],
            env=os.environ | settings,
            cwd=folder,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{address}/health", timeout=10).is_success:
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield MlflowServer(address, folder)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


class Proxy:
    """What stands in front of an MLflow server: it can be down, ask for credentials, and damage a file."""

    def __init__(self, server: MlflowServer) -> None:
        self.server = server
        self.address = ""
        self.down = False
        self.authorization: str | None = None
        """The header that each request must have."""
        self.damaged = ""
        """Name of the file that arrives changed."""
        self.paths: list[str] = []
        """Of the requests so far."""

    def answer(self, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        """The status and the body of one request."""
        self.paths.append(path)
        if self.authorization not in (None, headers.get("authorization")):
            return 401, b"no"
        if self.down:
            return 503, b"down"
        got = httpx.get(f"{self.server.address}{path}", timeout=30)
        body = got.content
        if self.damaged and urlsplit(path).path.endswith(f"/{self.damaged}"):
            body = bytes([body[0] ^ 1]) + body[1:]
        return got.status_code, body


@contextlib.contextmanager
def proxied(server: MlflowServer) -> Iterator[Proxy]:
    """A proxy in front of `server`."""
    proxy = Proxy(server)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = proxy.answer(self.path, {name.lower(): value for name, value in self.headers.items()})
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        proxy.address = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield proxy
        finally:
            http.shutdown()
            thread.join()
