"""What takes seconds to make, made once a test session: a migrated MLflow database (copying it then takes a
millisecond), token shards of our own stories, and a training run on them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.training.runs import Recorder


@pytest.fixture(scope="session")
def _migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from training.tracking.store import open_store

    database = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    open_store(f"sqlite:///{database}")
    return database


@pytest.fixture
def tracking_uri(_migrated_store: Path, tmp_path: Path) -> str:
    """A store of the test's own in `tmp_path/mlflow.db`, empty and of the present schema."""
    database = tmp_path / "mlflow.db"
    shutil.copy(_migrated_store, database)
    return f"sqlite:///{database}"


@pytest.fixture(scope="session")
def shards() -> Path:
    """Our own stories as `story data` makes them, with a tokenizer of 512 tokens; to be read only."""
    from tests.training.own_shards import own_shards

    return own_shards()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def checkpoint(out: Path) -> Path:
    folder = out / "best"
    folder.mkdir()
    (folder / "config.json").write_text('{"width": 64}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture(scope="session")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorder, Path]:
    """The smallest run, disturbed by nobody, and its folder; to be read only."""
    from tests.training.runs import smallest, train

    out = tmp_path_factory.mktemp("whole") / "run"
    return train(smallest(), shards, out), out
