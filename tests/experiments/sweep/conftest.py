"""A store and shards of the training tests, and a sweep of real, very small trainings that is made once a session."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.experiments.sweep.sweeps import STEPS, small_space
from tests.training.conftest import _migrated_store, shards, tracking_uri

__all__ = ["_migrated_store", "shards", "tracking_uri"]


@dataclass(frozen=True, slots=True)
class Swept:
    """A finished sweep of three trials, to be read only."""

    storage: str
    uri: str
    out: Path
    data: Path
    lines: tuple[str, ...]
    code: int


@pytest.fixture(scope="session")
def swept(_migrated_store: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """The recipe as it stands, then two trials, of which one cannot learn and is ended early."""
    from experiments.sweep.run import SweepOptions, run_sweep

    folder = tmp_path_factory.mktemp("sweep")
    shutil.copy(_migrated_store, folder / "mlflow.db")
    storage, uri = f"sqlite:///{folder}/sweeps.db", f"sqlite:///{folder}/mlflow.db"
    lines: list[str] = []
    before = os.getcwd()
    os.chdir(folder)
    try:
        asked = SweepOptions(
            name="first",
            storage=storage,
            trials=3,
            steps=STEPS,
            space=small_space(folder),
            data=str(shards),
            threads=1,
            tracking_uri=uri,
            seed=3,
        )
        _, code = run_sweep(asked, lines.append)
    finally:
        os.chdir(before)
    return Swept(storage, uri, folder / "runs" / "sweeps" / "first", shards, tuple(lines), code)
