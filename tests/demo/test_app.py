"""The app as a process and over HTTP: it answers, it keeps to itself, and it stops on a signal."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from demo.asgi import launch
from model.errors import InputError
from model.serving.http.middleware import SECURITY_HEADERS
from model.settings import Settings
from tests.demo.engines import local_backend
from tests.demo.scripted import ScriptedBackend
from tests.demo.served import Served, serve

LAUNCHER = """
import demo.asgi
from model.settings import Settings
from tests.demo.engines import local_backend

# The shipped weights are no part of this test; the engine behind the page is real.
demo.asgi.open_demo_backend = lambda kind, settings, shared: local_backend(step_seconds=0.01, end_bias=-50)
demo.asgi.launch(Settings(host="127.0.0.1", port=0))
print("Closed.", flush=True)
"""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(ScriptedBackend("A story.")) as running:
        yield running


def test_the_page_is_served_without_a_word_about_its_maker_or_a_foreign_font(served: Served) -> None:
    theme = httpx.get(f"{served.url}theme.css", timeout=None).text
    config = httpx.get(f"{served.url}config", timeout=None).json()
    assert config["title"] == "Write me a story"
    assert config["footer_links"] == []
    assert config["stylesheets"] == []
    assert not config["analytics_enabled"]
    assert "@import" not in theme
    assert all(address.startswith("data:") for address in re.findall(r"""url\(["']?([^)]*)""", theme))


def test_monitoring_and_the_list_of_runs_are_closed(served: Served) -> None:
    assert httpx.get(f"{served.url}gradio_api/runs", timeout=None).status_code in (403, 404)
    assert httpx.get(f"{served.url}monitoring", timeout=None).status_code in (403, 404)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "mlflow.db", "pyproject.toml", "..%2f..%2f..%2fetc%2fpasswd", "http://127.0.0.1:1/x"]
)
def test_no_file_and_no_other_address_can_be_read_through_the_page(served: Served, path: str) -> None:
    for route in ("file=", "proxy="):
        answer = httpx.get(f"{served.url}gradio_api/{route}{path}", timeout=None)
        assert answer.status_code in (400, 403, 404)
        assert "root:" not in answer.text


def test_no_route_leads_to_mlflow(served: Served) -> None:
    for path in ("ajax-api/2.0/mlflow/experiments/search", "api/2.0/mlflow/runs/search", "get-artifact", "docs"):
        answer = httpx.get(f"{served.url}{path}", timeout=None)
        assert "experiment" not in answer.text
        assert not answer.headers.get("content-type", "").startswith("application/json") or answer.status_code == 404


def test_the_page_carries_the_headers_that_bind_a_browser(served: Served) -> None:
    answer = httpx.get(served.url, timeout=None)
    assert {name: answer.headers.get(name) for name in SECURITY_HEADERS} == SECURITY_HEADERS


def test_a_port_that_is_taken_is_reported_in_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=rf"^port {port} on 127.0.0.1 cannot be used: "):
            launch(Settings(host="127.0.0.1", port=port))


def test_an_address_of_another_machine_is_reported_in_one_line() -> None:
    with pytest.raises(InputError, match=r"port .* cannot be used|host must be an address"):
        launch(Settings(host="192.0.2.1", port=7860))


def test_a_folder_of_gradios_that_others_own_does_not_keep_it_from_starting(tmp_path: Path) -> None:
    """Root may write into every user's folder, so a file stands for one that cannot be used."""
    (tmp_path / "gradio").touch()
    program = "from demo.asgi import create_app; create_app(); print('started')"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    del environment["GRADIO_TEMP_DIR"]  # which importing this package has set
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert run.stdout == "started\n", run.stderr


def test_when_it_stops_the_engine_stops_with_it() -> None:
    before = set(threading.enumerate())  # other tests' engines may still be ending
    backend = local_backend()
    with serve(backend) as served:
        body = {"prompt": "Once", "max_tokens": 2}
        assert httpx.post(f"{served.url}v1/completions", json=body, timeout=None).status_code == 200
        thread = [t for t in threading.enumerate() if t.name == "story-engine" and t not in before]
        assert thread
    assert all(not t.is_alive() for t in thread)
    with pytest.raises(httpx.ConnectError):
        httpx.get(served.url, timeout=None)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_process_soon_and_cleanly_even_with_a_tab_open(
    number: signal.Signals, repository: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        url = line.removeprefix("Write me a story: ").strip()
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream("GET", f"{url}gradio_api/heartbeat/me", timeout=None) as tab,
        ):
            assert tab.status_code == 200
            for _ in range(2):  # a shell and `make` may both pass it on; a handler that took a lock would hang
                process.send_signal(number)
            process.wait(60)  # a tab left open would hold it up for ever
        out, err = process.communicate()
    finally:
        process.kill()
        process.wait()
    assert re.fullmatch(r"Closing: .*\nClosed\.\n", out)
    assert process.returncode == 0
    assert "Traceback" not in err


def test_a_signal_ends_it_cleanly_when_nobody_reads_its_output_any_more(repository: Path) -> None:
    """As of `story demo 2>&1 | tee log`, where Ctrl-C ends both."""
    command = [sys.executable, str(repository / "story.py"), "demo", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("Write me a story: ")
        process.stdout.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
