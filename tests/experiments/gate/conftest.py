"""A store whose champion went the whole way once: registered, measured, judged, promoted."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.gate.promotion import promote
from experiments.gate.run import run_gate
from experiments.registry.versions import register
from experiments.thresholds import Thresholds
from model.folder import ModelFolder
from tests.experiments.gate.worse import held_out_file, log_quality, log_speed, noised, thresholds
from tests.model.small_model import small_folder


@dataclass(frozen=True, slots=True)
class Place:
    """A store, and what its evidence was measured on."""

    uri: str
    stories: Path
    bounds: Thresholds
    champion: ModelFolder
    challenger: ModelFolder
    """As good as the champion: the same network with a whisper of noise."""


@pytest.fixture(scope="session")
def _promoted(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("gate")
    place = Place(
        uri=f"sqlite:///{folder}/mlflow.db", stories=held_out_file(folder), bounds=thresholds(folder),
        champion=ModelFolder.open(small_folder()), challenger=noised(folder, strength=1e-4),
    )  # fmt: skip
    register(place.champion, place.uri)
    log_quality(place.uri, place.champion, place.stories)
    log_speed(place.uri, place.champion, place.bounds)
    assert run_gate(place.uri, place.bounds).verdict == "pass"
    promote(place.uri, place.bounds, apply=True)
    register(place.challenger, place.uri)
    return place


@pytest.fixture
def place(_promoted: Place, tmp_path: Path) -> Place:
    """The store as it stood after the promotion, to be written to; files already kept are shared."""
    database = tmp_path / "mlflow.db"
    shutil.copy(_promoted.uri.removeprefix("sqlite:///"), database)
    return Place(
        f"sqlite:///{database}", _promoted.stories, _promoted.bounds, _promoted.champion, _promoted.challenger
    )
