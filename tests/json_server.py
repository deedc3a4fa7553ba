"""A real HTTP server on the loopback that answers by a function and records the requests."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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


@dataclass
class PullRequest:
    """The comments of a pull request as GitHub's API keeps them."""

    comments: list[dict[str, Any]] = field(default_factory=list)

    def add(self, body: str, kind: str = "User") -> None:
        """Add a comment."""
        self.comments.append({"id": 1000 + len(self.comments), "body": body, "user": {"type": kind}})

    def answer(self, asked: Asked) -> tuple[int, Any]:
        """Answer as GitHub does."""
        if asked.token != "Bearer right":
            return 401, {"message": "Bad credentials"}
        root = "/repos/someone/write-me-a-story/issues"
        path, _, query = asked.path.partition("?")
        if (asked.method, path) == ("POST", f"{root}/7/comments"):
            self.add(asked.body["body"], "Bot")
            return 201, self.comments[-1]
        if (asked.method, path) == ("GET", f"{root}/7/comments"):
            size, page = (int(part.partition("=")[2]) for part in query.split("&"))
            return 200, self.comments[size * (page - 1) : size * page]
        if asked.method == "PATCH" and path.startswith(f"{root}/comments/"):
            for comment in self.comments:
                if path.endswith(f"/{comment['id']}"):
                    comment["body"] = asked.body["body"]
                    return 200, comment
        return 404, {}
