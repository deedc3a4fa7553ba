"""What the image's build runs: slimming, the trial run that keeps bytecode, and the health check."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from deploy.image import warm
from tests.json_server import json_server

REPOSITORY = Path(__file__).resolve().parents[2]


def write(path: Path, size: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


# slim


def slimmed(site: Path) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(REPOSITORY / "deploy/image/slim.sh"), str(site)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_name_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "hf_xet" / "core.py")
    done = slimmed(tmp_path)
    assert done.returncode != 0
    assert "onnxruntime/capi/libonnxruntime.so*" in done.stderr
    assert list(tmp_path.iterdir()) == [], "what stands before it is gone"


def serving_distributions() -> set[str]:
    """What an installation of the app alone brings in, by the metadata of what is installed here."""
    wanted, found = ["write-me-a-story"], set()
    while wanted:
        for line in metadata.requires(wanted.pop()) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                name = re.sub(r"[-_.]+", "-", requirement.name).lower()
                if name not in found:
                    found.add(name)
                    wanted.append(name)
    return found


def link_installed(names: set[str], site: Path) -> None:
    """Put the files of installed packages into `site`, as hard links where possible, without their bytecode."""
    for name in names:
        for file in metadata.files(name) or []:
            source, target = Path(str(file.locate())), site / file
            if ".." in file.parts or file.suffix == ".pyc" or not source.is_file():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:
                shutil.copy2(source, target)


@pytest.mark.slow
def test_the_slimmed_app_shows_its_page_and_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site, bytecode = tmp_path / "site-packages", tmp_path / "bytecode"
    link_installed(serving_distributions(), site)
    done = slimmed(site)
    assert done.returncode == 0, done.stderr
    before, after = (int(line.split()[0]) for line in done.stdout.splitlines())
    assert after < 0.7 * before
    assert [path for path in site.rglob("*") if path.name == "tests" or path.suffix in (".pyi", ".pyx")] == []

    # Nothing but the slimmed packages and this checkout: -S leaves the environment's own out.
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{site}")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(bytecode))
    monkeypatch.setenv("STAGE", "PROD")
    find = "import importlib.util as u; print(*(bool(u.find_spec(n)) for n in ('torch', 'mlflow', 'hf_xet', 'gradio')))"
    found = subprocess.run([sys.executable, "-S", "-c", find], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False", "False", "True"]
    command = [sys.executable, "-S", str(REPOSITORY / "story.py"), "demo", "--host", "127.0.0.1"]
    assert warm.main(command) == 0, capsys.readouterr()
    assert "a story of 40 tokens" in capsys.readouterr().out
    assert len(list(bytecode.rglob("*.pyc"))) > 500


# warm

APP = """
import http.server, json, os, signal, sys, threading
import kept_module

class App(http.server.BaseHTTPRequestHandler):
    def answer(self):
        body = {"/": b"<html>gradio</html>", "/api/generate": b"data: x\\n\\n" * EVENTS}.get(self.path, b"{}")
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
    """The command of an app that behaves by these values."""
    (folder / "kept_module.py").write_text("ANSWER = 42\n", "utf-8")
    values = {"EVENTS": 20, "STATUS": 200, "CODE": 0, **values}
    lines = [f"{name} = {value}" for name, value in values.items()]
    (folder / "app.py").write_text("\n".join(lines) + APP, "utf-8")
    return [sys.executable, str(folder / "app.py")]


def test_the_bytecode_of_a_working_app_is_kept_and_not_checked_against_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "bytecode"))
    assert warm.main(app(tmp_path)) == 0
    assert "healthy after" in capsys.readouterr().out
    (tmp_path / "kept_module.py").write_text("ANSWER = 43\n", "utf-8")
    os.utime(tmp_path / "kept_module.py", (1, 1))
    program = "import kept_module; print(kept_module.ANSWER)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"


def test_bytecode_of_missing_files_is_removed(tmp_path: Path) -> None:
    bytecode = tmp_path / "bytecode"
    (tmp_path / "here.py").write_text("x = 1\n", "utf-8")
    for name in ("here", "gone"):
        write(bytecode / tmp_path.relative_to("/") / f"{name}.{sys.implementation.cache_tag}.pyc")
    assert warm.mark_valid(bytecode) == 1
    (left,) = bytecode.rglob("*.pyc")
    assert left.name.startswith("here.")
    assert left.read_bytes()[:4] == importlib.util.MAGIC_NUMBER


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"EVENTS": 3}, "the app streamed no story, but"),
        ({"STATUS": 500}, "500 Internal Server Error"),
        ({"CODE": 3}, "the app answered SIGTERM with exit code 3"),
    ],
)
def test_a_broken_app_fails_the_build(
    values: dict[str, int],
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "bytecode"))
    assert warm.main(app(tmp_path, **values)) == 1
    assert error in capsys.readouterr().err


def test_an_app_that_exits_and_bad_use_are_reported_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(warm.WarmError, match="the app ended with exit code 5 before it served"):
        warm.try_app([sys.executable, "-c", "raise SystemExit(5)"], write_bytecode=False)
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    assert warm.main(["story", "demo"]) == 2
    assert capsys.readouterr().err.startswith("usage: PYTHONPYCACHEPREFIX=DIR python ")


# healthy

HEALTHY = REPOSITORY / "deploy/image/healthy.py"


def check_health(port: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PORT": str(port)}
    command = [sys.executable, "-I", str(HEALTHY)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (429, 1)])
def test_only_status_200_is_healthy(status: int, code: int) -> None:
    with json_server(lambda asked: (status if asked.path == "/api/health" else 404, {})) as (url, _):
        checked = check_health(int(url.rpartition(":")[2]))
    assert (checked.returncode, checked.stdout) == (code, f"{status} {{}}\n")


def test_a_missing_app_is_one_line() -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        checked = check_health(port)
    assert (checked.returncode, checked.stderr) == (1, "")
    assert checked.stdout == f"port {port} does not answer: [Errno 111] Connection refused\n"


def test_the_health_check_imports_nothing_but_the_standard_library() -> None:
    program = "import sys, runpy; runpy.run_path(sys.argv[1]); print(*sorted(sys.modules))"
    command = [sys.executable, "-I", "-S", "-c", program, str(HEALTHY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} <= {
        *sys.stdlib_module_names,
        "__main__",
        "sitecustomize",
    }
