"""A store with one registered version of the small model, made once a test session."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.registry.versions import Version, register
from model.architecture.folder import ModelFolder
from tests.model.small_model import small_folder


@pytest.fixture(scope="session")
def registered(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Version]:
    """(store, version); to be read only."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"
    return uri, register(ModelFolder.open(small_folder()), uri)


@pytest.fixture(scope="session")
def package(registered: tuple[str, Version]) -> Path:
    """The version's files, as MLflow keeps them."""
    return Path(registered[1].source)
