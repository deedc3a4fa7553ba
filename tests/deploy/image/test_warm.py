"""The trial run of an image's build: what it asks for, what it does not let pass, and the bytecode that it keeps."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.image import warm

APP = """
import http.server, json, os, signal, sys, threading
import kept_module

class App(http.server.BaseHTTPRequestHandler):
    def answer(self):
        body = {
            "/": b"<html>gradio</html>",
            "/api/generate": b"data: x\\n\\n" * EVENTS,
        }.get(self.path, b"{}")
        self.send_response(STATUS if self.path == "/v1/models" else 200)
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self): self.answer()
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.answer()
    def log_message(self, *_): pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), App)
def stop(*_): threading.Thread(target=server.shutdown).start()
signal.signal(signal.SIGTERM, stop)
server.serve_forever()
sys.exit(CODE)
"""


def app(folder: Path, **values: int) -> list[str]:
    """The command of an app that answers as told."""
    (folder / "kept_module.py").write_text("ANSWER = 42\n", "utf-8")
    lines = [
        f"{name} = {value}" for name, value in {"EVENTS": 20, "STATUS": 200, "CODE": 0, **values}.items()
    ]
    (folder / "app.py").write_text("\n".join(lines) + APP, "utf-8")
    return [sys.executable, str(folder / "app.py")]


def test_an_app_that_does_all_it_should_is_kept_with_its_bytecode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "bytecode"))
    assert warm.main(app(tmp_path)) == 0
    assert "healthy after" in capsys.readouterr().out
    kept = (
        tmp_path / "bytecode" / tmp_path.relative_to("/") / f"kept_module.{sys.implementation.cache_tag}.pyc"
    )
    flags = int.from_bytes(kept.read_bytes()[4:8], "little")
    assert flags == 0b01  # by hash, which nobody checks

    # Python takes it as it is, however the source's time stamp or content change.
    (tmp_path / "kept_module.py").write_text("ANSWER = 43\n", "utf-8")
    os.utime(tmp_path / "kept_module.py", (1, 1))
    program = "import kept_module; print(kept_module.ANSWER)"
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert told.stdout == "42\n"


def test_bytecode_of_files_that_are_gone_is_dropped(tmp_path: Path) -> None:
    bytecode = tmp_path / "bytecode"
    (tmp_path / "here.py").write_text("x = 1\n", "utf-8")
    folder = bytecode / tmp_path.relative_to("/")
    folder.mkdir(parents=True)
    for name in ("here", "gone"):
        (folder / f"{name}.{sys.implementation.cache_tag}.pyc").write_bytes(b"old")
    assert warm.keep(bytecode) == 1
    (left,) = folder.iterdir()
    assert left.name.startswith("here.")
    assert left.read_bytes()[:4] == importlib.util.MAGIC_NUMBER


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"EVENTS": 3}, "the app streamed no story, but"),
        ({"STATUS": 500}, "v1/models: HTTP Error 500"),
        ({"CODE": 3}, "the app answered SIGTERM with exit code 3"),
    ],
)
def test_an_app_that_fails_is_not_kept(
    values: dict[str, int],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "bytecode"))
    assert warm.main(app(tmp_path, **values)) == 1
    assert told in capsys.readouterr().err


def test_an_app_that_ends_at_once_is_told_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(warm.ColdError, match="the app ended with exit code 5 before it served"):
        warm.try_out([sys.executable, "-c", "raise SystemExit(5)"], write_bytecode=False)
    assert time.monotonic() - began < 20


def test_bad_use_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    assert warm.main(["story", "demo"]) == 2
    assert capsys.readouterr().err == "usage: PYTHONPYCACHEPREFIX=DIR python deploy/image/warm.py COMMAND…\n"
