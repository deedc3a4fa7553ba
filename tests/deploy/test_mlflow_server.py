"""How MLflow's server is started: the password where it belongs, and options that the installed MLflow knows."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.test_containers import SERVICES, stages

ADDRESS = "postgresql+psycopg://mlflow:hunter2@postgres:5432/mlflow"
RECORDER = """#!/bin/sh
echo "$MLFLOW_BACKEND_STORE_URI"
for argument; do echo "$argument"; done
"""
"""In place of MLflow, whose start takes many seconds."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """As the compose file gives it, with the secret's file here."""
    (tmp_path / "mlflow").write_text(RECORDER, "utf-8")
    (tmp_path / "mlflow").chmod(0o755)
    (tmp_path / "secret").write_text(f"{ADDRESS}\n", "utf-8")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    given = SERVICES["mlflow"]["environment"]
    assert given.keys() == {"DATABASE_URL_FILE", "ALLOWED_HOSTS"}
    return {**given, "DATABASE_URL_FILE": str(tmp_path / "secret"), "PATH": path}


def started(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The image's command, run."""
    command = json.loads(dict(stages("deploy/mlflow/Dockerfile")[-1])["CMD"])
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_password_goes_into_the_environment_and_into_no_argument(environment: dict[str, str]) -> None:
    address, *arguments = started(environment).stdout.splitlines()
    assert address == ADDRESS
    assert "hunter2" not in "".join(arguments)


def test_the_server_knows_each_option(environment: dict[str, str]) -> None:
    from mlflow.cli import cli

    _, verb, *options = started(environment).stdout.splitlines()
    context = cli.commands[verb].make_context(verb, options, resilient_parsing=False)
    assert context.params["allowed_hosts"] == SERVICES["mlflow"]["environment"]["ALLOWED_HOSTS"]
    assert context.params["serve_artifacts"] is True
    assert context.params["artifacts_destination"] == "/artifacts"
    assert context.params["host"] == "0.0.0.0"


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("ALLOWED_HOSTS", None, "ALLOWED_HOSTS: "),
        ("DATABASE_URL_FILE", None, "DATABASE_URL_FILE: "),
        ("DATABASE_URL_FILE", "nowhere", "nowhere: No such file or directory"),
    ],
)
def test_a_missing_setting_is_one_line(environment: dict[str, str], name: str, value: str | None, error: str) -> None:
    changed = {key: text for key, text in {**environment, name: value}.items() if text is not None}
    done = started(changed)
    assert done.returncode != 0
    assert error in done.stderr
    assert done.stderr.count("\n") == 1
