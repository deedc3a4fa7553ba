"""A real HTTP server that sends given bytes: for what a healthy service never does."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STREAM = {"Content-Type": "text/event-stream"}


def chunk(text: str = "", **more: Any) -> bytes:
    """An event of the completions contract."""
    choice = {"index": 0, "text": text, "finish_reason": None, **more}
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


USAGE = b'data: {"choices":[],"usage":{"completion_tokens":5}}\n\n'
DONE = b"data: [DONE]\n\n"
END = chunk(finish_reason="stop")


class Answer:
    """What is sent: a status, headers and bytes; then the connection is closed, or reset."""

    def __init__(
        self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, *, reset: bool = False
    ) -> None:
        self.body, self.status, self.reset = body, status, reset
        self.headers = STREAM if headers is None else headers


@contextlib.contextmanager
def answering(answer: Answer, models: Any = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(address, requests seen) of a server that gives every completion this answer."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(models).encode()
            self.send_response(200 if models is not None else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({**body, "headers": dict(self.headers), "path": self.path})
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)
            self.wfile.flush()
            if answer.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
