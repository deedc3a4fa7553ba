"""A store whose champion went the whole way once, made once a run of the tests and copied for each test."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.common.thresholds import Thresholds
from experiments.gate.run import promote, run_gate
from experiments.registry.versions import register
from model.architecture.folder import ModelFolder
from tests.experiments.gate.worse import held_out_file, log_quality, log_speed, noised, thresholds
from tests.model.small_model import small_folder
from tests.once import once_a_run, shared_folder


@dataclass(frozen=True, slots=True)
class Place:
    """A store, and what its evidence was measured on."""

    uri: str
    stories: Path
    bounds: Thresholds
    champion: ModelFolder
    challenger: ModelFolder
    """As good as the champion: the same network with a whisper of noise."""


@once_a_run
def promoted() -> Place:
    """The store as it stood after the promotion; to be read only."""
    folder = Path(tempfile.mkdtemp(prefix="gate-", dir=shared_folder()))
    place = Place(
        uri=f"sqlite:///{folder}/mlflow.db",
        stories=held_out_file(folder),
        bounds=thresholds(folder),
        champion=ModelFolder.open(small_folder()),
        challenger=noised(folder, strength=1e-4),
    )
    register(place.champion, place.uri)
    log_quality(place.uri, place.champion, place.stories)
    log_speed(place.uri, place.champion, place.bounds)
    assert run_gate(place.uri, place.bounds).verdict == "pass"
    promote(place.uri, place.bounds, apply=True)
    register(place.challenger, place.uri)
    return place


@once_a_run
def evaluated() -> Place:
    """That store with an evaluation of the challenger; to be read only."""
    place = copied(Path(tempfile.mkdtemp(prefix="gate-", dir=shared_folder())), promoted())
    log_quality(place.uri, place.challenger, place.stories)
    return place


def judged(folder: Path) -> Place:
    """A store in `folder`, to be written to, in which the challenger has passed the gate."""
    place = copied(folder, evaluated())
    log_speed(place.uri, place.challenger, place.bounds, against=place.champion)
    assert run_gate(place.uri, place.bounds).verdict == "pass"
    return place


def copied(folder: Path, place: Place) -> Place:
    """A store like that of `place`, to be written to, in `folder`."""
    database = Path(place.uri.removeprefix("sqlite:///"))
    shutil.copy(database, folder)
    shutil.copytree(database.parent / "mlartifacts", folder / "mlartifacts")
    return replace(place, uri=f"sqlite:///{folder / 'mlflow.db'}")
