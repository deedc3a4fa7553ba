"""A real HTTP server on the loopback that answers by a function and records the requests."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    method: str
    path: str
    """With its query."""
    headers: dict[str, str]
    """Names in lower case."""
    body: Any

    @property
    def token(self) -> str:
        """The Authorization header."""
        return self.headers.get("authorization", "")


@dataclass(frozen=True, slots=True)
class Text:
    """A body that is not JSON."""

    text: str
    kind: str = "text/plain"


@contextlib.contextmanager
def json_server(answer: Callable[[Asked], tuple[int, Any]], port: int = 0) -> Iterator[tuple[str, list[Asked]]]:
    """(address, requests so far) of a server that sends the status and the value that `answer` returns."""
    seen: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            headers = {name.lower(): value for name, value in self.headers.items()}
            seen.append(Asked(self.command, self.path, headers, body))
            status, value = answer(seen[-1])
            text = value if isinstance(value, Text) else Text(json.dumps(value), "application/json")
            self.send_response(status)
            self.send_header("Content-Type", text.kind)
            self.send_header("Content-Length", str(len(text.text.encode())))
            self.end_headers()
            self.wfile.write(text.text.encode())

        do_GET = do_POST = do_PATCH = _serve

        def log_message(self, *_arguments: Any) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
