"""`story ui`: the MLflow UI on the project's store, on this machine only.

The server is a process of its own, because importing it into the command line would take seconds. It answers named
Host headers only, so that no web page elsewhere can reach the store through DNS rebinding.
"""

import contextlib
import importlib.util
import os
import signal
import sqlite3
import subprocess
import sys

from model.errors import InputError, MissingExtraError
from model.serving.http.server import bound
from model.settings import without_password
from training.tracking.store import database_file, follow_database, unusable

LOOPBACK = "127.0.0.1"


def serve_ui(tracking_uri: str, *, port: int = 5000) -> int:
    """Run the MLflow UI for `tracking_uri` on 127.0.0.1 until interrupted; return its exit status.

    Raises `InputError` when `tracking_uri` is a server already or `port` cannot be used, and `MissingExtraError`
    when MLflow is not installed.
    """
    if tracking_uri.startswith(("http://", "https://")):
        raise InputError(
            "MLFLOW_TRACKING_URI", f"is a server with a UI of its own: open {without_password(tracking_uri)}"
        )
    if importlib.util.find_spec("mlflow") is None:
        raise MissingExtraError("story ui", "train")
    bound(LOOPBACK, port).close()
    if (database := database_file(tracking_uri)) is not None:
        try:
            follow_database(database)
        except sqlite3.Error as error:
            raise unusable(tracking_uri, error) from None
    print(f"MLflow UI: http://{LOOPBACK}:{port} (Ctrl-C stops it)", file=sys.stderr, flush=True)
    # Nothing may leave this machine, so MLflow's telemetry is off. The server starts helpers of its own: in a session
    # of their own, one signal reaches them all.
    child = subprocess.Popen(
        ui_command(tracking_uri, port), env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}, start_new_session=True
    )
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return child.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)
        for number in (signal.SIGTERM, signal.SIGKILL):  # to the server and its helpers, politely first
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(child.pid, number)
                child.wait(timeout=10)


def ui_command(tracking_uri: str, port: int) -> list[str]:
    """Return the command that serves the UI: one worker, loopback only, named hosts only."""
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", tracking_uri),
        *("--host", LOOPBACK, "--port", str(port), "--workers", "1"),
        *("--allowed-hosts", f"{LOOPBACK}:{port},localhost:{port}"),
    ]
