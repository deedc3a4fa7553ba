"""The image's health check as a process, against servers that are well, ill, silent and absent."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def app(status: int) -> Iterator[int]:
    """A server that answers the health route so; its port."""

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/api/health" else 404)
            self.end_headers()
            self.wfile.write(b'{"status": "as told"}')

        def log_message(self, *_arguments: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Health)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def check(repository: Path, port: int | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", str(repository / "deploy/image/healthy.py")],
        env={**os.environ, "PORT": str(port)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (429, 1)])
def test_only_an_app_that_could_write_is_healthy(status: int, code: int, repository: Path) -> None:
    with app(status) as port:
        checked = check(repository, port)
    assert checked.returncode == code
    assert checked.stdout == f'{status} {{"status": "as told"}}\n'


def test_no_app_is_told_in_one_line(repository: Path) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        checked = check(repository, port)
    assert (checked.returncode, checked.stderr) == (1, "")
    assert checked.stdout == f"port {port} does not answer: [Errno 111] Connection refused\n"


def test_it_imports_nothing_of_the_project(repository: Path) -> None:
    program = "import sys, runpy; runpy.run_path(sys.argv[1]); print(*sorted(sys.modules))"
    told = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(repository / "deploy/image/healthy.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"model", "demo", "pydantic", "httpx"}.isdisjoint(told.stdout.split())
