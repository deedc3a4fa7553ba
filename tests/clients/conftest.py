"""Other people's programs, run unmodified against the service on loopback. `make clients` installs and runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.serving.backend import LocalBackend
from model.settings import Settings
from tests.model.serving.http.serving import Running, serving

ENVIRONMENT = Path(sys.prefix) / "clients"
"""Where `make clients` installs: a Python environment, and in `npm` what runs on Node."""
SECONDS = 600
"""Longest run of a client: load generators take minutes to start on a busy machine."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def service() -> Iterator[Running]:
    """The service over the shipped model, as anyone would start it."""
    with serving(LocalBackend.load(Settings())) as running:
        yield running


@pytest.fixture
def run(service: Running, tmp_path: Path) -> Run:
    """Runs a program of the clients' environment; anything but success fails the test with what it printed."""

    def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        places = ("bin", f"{name}/bin", "npm/node_modules/.bin")
        programs = (ENVIRONMENT / place / name for place in places)
        program = next((program for program in programs if program.exists()), Path(name))
        home = {"HOME": str(tmp_path), "OPENAI_API_KEY": "none", "OPENAI_BASE_URL": f"{service.url}/v1"}
        done = subprocess.run(
            [str(program), *arguments],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], **home, **environment},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    return run


@pytest.fixture
def python(run: Run, service: Running, tmp_path: Path) -> Callable[..., Any]:
    """Runs a script with `BASE` (the API's address) and returns what its variable `result` held."""

    def python(script: str, **environment: str) -> Any:
        (tmp_path / "script.py").write_text(
            f"BASE = {service.url + '/v1'!r}\n{script}\nimport json\nprint('\\n' + json.dumps(result))\n"
        )
        return json.loads(run("python", "script.py", **environment).stdout.splitlines()[-1])

    return python


@pytest.fixture
def node(run: Run, service: Running, tmp_path: Path) -> Callable[..., Any]:
    """Runs a module with `BASE` and returns what its variable `result` held."""

    def node(script: str) -> Any:
        (tmp_path / "node_modules").symlink_to(ENVIRONMENT / "npm" / "node_modules")
        (tmp_path / "script.mjs").write_text(
            f"const BASE = {json.dumps(service.url + '/v1')};\n{script}\nconsole.log(JSON.stringify(result));\n"
        )
        return json.loads(run("node", "--preserve-symlinks", "script.mjs").stdout.splitlines()[-1])

    return node


@pytest.fixture
def story(service: Running) -> Callable[..., str]:
    """The text that the service generates for a prompt, asked for without any client."""

    def story(prompt: str, **body: Any) -> str:
        answer = httpx.post(f"{service.url}/v1/completions", json={"prompt": prompt, **body}, timeout=60).json()
        text: str = answer["choices"][0]["text"]
        return text

    return story
