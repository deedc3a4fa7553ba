"""TinyStories are fetched by the hub's own client, here from a small hub on this machine.

The public hub cannot be reached in a test. What stands in for it speaks the part of its protocol that a file download
needs (a HEAD and a GET on `/datasets/REPOSITORY/resolve/REVISION/FILE` with commit and ETag), over a real socket. The
client runs in a process of its own, because it reads its environment once, when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from model.errors import DataError
from training.data.prepare import REPOSITORY, TRAIN_FILE, VALID_FILE, download_tinystories

FILES = {TRAIN_FILE: b"One.\n<|endoftext|>\nTwo.\n", VALID_FILE: "Zoë.\n".encode()}


class Hub(ThreadingHTTPServer):
    """Serves `files`; `requests` keeps what it was asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        prefix = f"/datasets/{REPOSITORY}/resolve/main/"
        data = self.server.files.get(self.path.removeprefix(prefix)) if self.path.startswith(prefix) else None
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


@contextmanager
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def fetch(endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Call `download_tinystories` as a program would, with the hub's address in its environment."""
    code = """if True:
        import json, sys
        from pathlib import Path
        from model.errors import DataError
        from training.data.prepare import download_tinystories
        try:
            found = download_tinystories(Path("stories"))
        except DataError as error:
            sys.exit(str(error))
        print(json.dumps([str(found.train), str(found.valid)]))
    """
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home / "hub"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.run(
        [sys.executable, "-c", code], cwd=home, env=environment, capture_output=True, text=True, timeout=60
    )


def test_both_files_arrive_whole_and_are_not_fetched_twice(tmp_path: Path) -> None:
    with hub(FILES) as server:
        first = fetch(server.address, tmp_path)
        assert first.returncode == 0, first.stderr
        train, valid = (tmp_path / path for path in json.loads(first.stdout))
        assert train.read_bytes() == FILES[TRAIN_FILE]
        assert valid.read_bytes() == FILES[VALID_FILE]
        assert sum(request.startswith("GET") and "resolve" in request for request in server.requests) == 2
        server.requests.clear()
        assert fetch(server.address, tmp_path).stdout == first.stdout
        assert not [request for request in server.requests if request.startswith("GET") and "resolve" in request]


def test_a_file_that_the_hub_does_not_have_is_named(tmp_path: Path) -> None:
    with hub({TRAIN_FILE: b"One.\n"}) as server:
        result = fetch(server.address, tmp_path)
    assert result.returncode == 1
    assert f"{REPOSITORY}/{VALID_FILE} at revision main could not be fetched (" in result.stderr
    assert result.stderr.rstrip().endswith("or give local files instead")


@pytest.mark.slow  # the hub's client tries five times with growing pauses: 24 seconds
def test_a_hub_that_does_not_answer_is_given_up_with_advice(tmp_path: Path) -> None:
    with hub({}) as server:
        address = server.address
    result = fetch(address, tmp_path)  # nobody listens there any more
    assert result.returncode == 1
    assert "check the network and HF_ENDPOINT" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_offline_mode_is_respected(tmp_path: Path) -> None:
    # Tests run with HF_HUB_OFFLINE=1.
    with pytest.raises(DataError, match="could not be fetched"):
        download_tinystories(tmp_path, endpoint="http://127.0.0.1:9")
