"""What the tests of deploying share: a control plane to talk to, and the command line as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy.modal_server import ControlPlane, control_plane

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    """A stand-in for Modal."""
    with control_plane() as running:
        yield running


@pytest.fixture(scope="session")
def run(repository: Path) -> Run:
    """Run Python with these arguments in the repository; every warning in it is an error."""

    def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            cwd=repository,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run_python
