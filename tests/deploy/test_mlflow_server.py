"""How MLflow's server is started: the password where it belongs, and options that the installed MLflow knows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.mlflow.serve import command, with_password

SETTINGS = {
    "DATABASE": "postgresql+psycopg://mlflow@postgres:5432/mlflow",
    "ALLOWED_HOSTS": "mlflow:5000,localhost:5000",
}
RECORDER = """
import os, runpy, sys
def record(program, arguments, environment):
    print(arguments[1:], environment["MLFLOW_BACKEND_STORE_URI"])
    raise SystemExit(0)
os.execve = record
runpy.run_path(sys.argv[1], run_name="__main__")
"""
"""Stops where the program would become MLflow, whose start takes many seconds."""


@given(password=st.text(min_size=1, max_size=30))
def test_a_password_of_any_characters_arrives_as_it_is(password: str) -> None:
    whole = urlsplit(with_password(SETTINGS["DATABASE"], password))
    assert (whole.username, whole.hostname, whole.port, whole.path) == ("mlflow", "postgres", 5432, "/mlflow")
    assert whole.password is not None
    assert unquote(whole.password) == password


@pytest.mark.parametrize("address", ["postgresql://postgres/mlflow", "postgresql://mlflow:open@postgres/mlflow"])
def test_an_address_without_a_user_or_with_a_password_is_refused(address: str) -> None:
    with pytest.raises(SystemExit, match="DATABASE must name a user and no password") as refused:
        with_password(address, "hunter2")
    assert "open" not in str(refused.value)


def test_the_server_knows_each_option() -> None:
    from mlflow.cli import cli

    (program, dash_m, module, verb, *options) = command(SETTINGS)
    assert (program, dash_m, module) == (sys.executable, "-m", "mlflow")
    context = cli.commands[verb].make_context(verb, options, resilient_parsing=False)
    assert context.params["allowed_hosts"] == SETTINGS["ALLOWED_HOSTS"]
    assert context.params["serve_artifacts"] is True
    assert context.params["artifacts_destination"] == "/artifacts"
    assert context.params["host"] == "0.0.0.0"


def started(repository: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RECORDER, str(repository / "deploy/mlflow/serve.py")]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def test_the_password_goes_into_the_environment_and_into_no_argument(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("hunter2\n", "utf-8")
    done = started(repository, **SETTINGS, PASSWORD_FILE=str(tmp_path / "password"))
    arguments, _, address = done.stdout.strip().rpartition(" ")
    assert address == "postgresql+psycopg://mlflow:hunter2@postgres:5432/mlflow"
    assert "hunter2" not in arguments


@pytest.mark.parametrize(
    ("environment", "error"),
    [
        ({}, "PASSWORD_FILE must be set"),
        ({"ALLOWED_HOSTS": ""}, "PASSWORD_FILE, ALLOWED_HOSTS must be set"),
        ({"PASSWORD_FILE": "nowhere"}, "PASSWORD_FILE cannot be read: No such file or directory"),
    ],
)
def test_a_missing_setting_is_one_line(environment: dict[str, str], error: str, repository: Path) -> None:
    done = started(repository, **{**SETTINGS, **environment})
    assert (done.returncode, done.stderr) == (1, f"{error}\n")
