"""The MLflow UI: on this machine only, and gone when it is stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from experiments.dashboard.mlflow_ui import serve_ui, ui_command
from model.errors import InputError, MissingExtraError
from model.serving.http.server import bound, free_port


def test_only_this_machine_is_listened_to_and_answered() -> None:
    command = ui_command("sqlite:///runs.db", 5123)
    options = dict(zip(command[4::2], command[5::2], strict=True))
    assert options == {
        "--backend-store-uri": "sqlite:///runs.db",
        "--host": "127.0.0.1",
        "--port": "5123",
        "--workers": "1",
        "--allowed-hosts": "127.0.0.1:5123,localhost:5123",
    }


def test_a_server_is_not_served_again_and_its_password_not_reported() -> None:
    with pytest.raises(InputError, match=r"is a server with a UI of its own: open https://…@runs\.example$"):
        serve_ui("https://lily:hunter2@runs.example")


def test_a_taken_port_is_reported_before_anything_starts() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} on 127\.0\.0\.1 cannot be used"):
            serve_ui("sqlite:///mlflow.db", port=port)


def test_without_mlflow_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as if mlflow were not installed
    with pytest.raises(MissingExtraError, match=r"story ui needs the 'train' packages: pip install -e '\.\[train\]'"):
        serve_ui("sqlite:///mlflow.db")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_ui_answers_here_refuses_foreign_names_and_leaves_nothing_behind(
    number: signal.Signals, tmp_path: Path
) -> None:
    port = free_port()
    ui = subprocess.Popen(
        [sys.executable, "-m", "story", "ui", "--port", str(port)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=None).text == "OK"
                break
            except httpx.TransportError:
                assert ui.poll() is None, "the UI ended by itself"
                assert time.monotonic() < deadline, "the UI did not answer in time"
                time.sleep(0.3)
        foreign = httpx.get(f"http://127.0.0.1:{port}/", headers={"Host": "stories.example"}, timeout=None)
        assert foreign.status_code == 403
        ui.send_signal(number)
        assert ui.wait(timeout=30) == 0
        bound("127.0.0.1", port).close()
        assert (tmp_path / "mlflow.db").exists()
    finally:
        ui.terminate()  # on which it ends the server and its helpers; does nothing to one that has ended
        ui.wait(60)
