"""No test meets this machine: not its environment, its home, its working directory or its network.

Whatever a setting or a library would pick up from outside is removed before anything of the project is
imported, and each test starts in an empty folder of its own. Only the loopback answers,
so a test that would have gone out fails with the address it wanted.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.mlflow_server import MlflowServer, mlflow_server
from tests.once import VARIABLE

REPOSITORY = Path(__file__).resolve().parents[1]

FOREIGN = ("STORY_", "MLFLOW_", "MODAL_", "HF_", "GRADIO_", "ORT_", "TORCH_", "TORCHINDUCTOR_", "DATABRICKS_")
FOREIGN_NAMES = (
    "STAGE",
    "HOST",
    "PORT",
    "USE_MODAL",
    "REDIS_URL",
    "REDIS_URL_FILE",
    "DATABASE_URL",
    "DATABASE_URL_FILE",
    "OPENAI_API_KEY",
    "OPENAI_API_KEY_FILE",
    "XDG_CACHE_HOME",
    "XDG_STATE_HOME",
    "COLUMNS",
    "PYTHONDONTWRITEBYTECODE",
)
# Files with a test of many seconds start first, or one process would be left alone with them at the end.
LONG = (
    "experiments/notebook/test_notebooks.py",
    "deploy/release",
    "workflows",
    "experiments/sweep",
    "demo/test_endpoints.py",
    "demo/test_browser_rating.py",
    "demo/test_browser_experiments.py",
    "experiments/studies/test_decode_speed.py",
)
LOGGERS = ("model", "training", "experiments", "demo", "deploy", "story")
QUIET = {
    "OMP_NUM_THREADS": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "NO_COLOR": "1",
}

# Here and not in `pytest_configure`: a conftest below this one may be loaded before that and import torch, which reads
# its number of threads once. With one a core, tests on a busy machine took thirty times as long.
for name in list(os.environ):
    if name.startswith(FOREIGN) or name in FOREIGN_NAMES:
        del os.environ[name]
os.environ.update(QUIET)
# Bytecode is kept: compiling our own modules takes half a second of each process that a test starts.
sys.dont_write_bytecode = False

_home = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


class NetworkUsedError(RuntimeError):
    """A test reached for an address outside this machine. No `OSError`: some code expects those."""


def _is_loopback(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if not isinstance(host, str) or host in ("", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host == socket.gethostname()
    return address.is_loopback or address.is_unspecified


def _refuse_the_network(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        address = arguments[1]
        if isinstance(address, tuple) and not _is_loopback(address[0]):
            raise NetworkUsedError(f"a test tried to connect to {address[0]}:{address[1]}")
    elif event == "socket.getaddrinfo" and not _is_loopback(arguments[0]):
        raise NetworkUsedError(f"a test tried to look up {arguments[0]}")


def pytest_configure(config: pytest.Config) -> None:
    """Give the process a home of its own and no network, before any test module is imported."""
    home = config.stash[_home] = tempfile.TemporaryDirectory(prefix="story-home-", ignore_cleanup_errors=True)
    os.environ["HOME"] = home.name
    os.environ.setdefault(VARIABLE, home.name)
    sys.addaudithook(_refuse_the_network)
    # Where `CI` is set, hypothesis starts from a profile of its own that draws the same examples in each run and
    # keeps none; a database on top of that is a contradiction. Elsewhere, failures are kept in the checkout.
    examples = hypothesis.database.DirectoryBasedExampleDatabase(REPOSITORY / ".hypothesis")
    hypothesis.settings.register_profile(
        "project",
        deadline=None,  # wall-clock deadlines fail on a busy machine, not on a slow function
        derandomize="CI" in os.environ,
        database=None if "CI" in os.environ else examples,
    )
    hypothesis.settings.load_profile("project")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of `LONG` in front; `-p randomly` puts all into its own order afterwards."""
    long = [str(REPOSITORY / "tests" / path) for path in LONG]
    items.sort(key=lambda item: not str(item.path).startswith(tuple(long)))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the home that `pytest_configure` made."""
    if home := config.stash.get(_home, None):
        home.cleanup()


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory, and an environment and log levels that are put back whatever a test did to them."""
    before = dict(os.environ)
    levels = {logger: logger.level for logger in map(logging.getLogger, LOGGERS)}
    monkeypatch.chdir(tmp_path)
    yield
    for logger, level in levels.items():
        logger.setLevel(level)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """An MLflow server for the whole session; who writes to it removes what it wrote."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow-server")) as server:
        yield server
