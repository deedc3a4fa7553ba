"""A store with three training runs, a version of one of them, and its evidence; made once a test session."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.registry.versions import Version, find
from model.serving.registry import NAME
from tests.training.conftest import _migrated_store, tracking_uri
from tests.training.tracked import RECIPE, end, evaluation, observer_on, start, step
from training.tracking.store import open_experiment, open_store

__all__ = ["_migrated_store", "tracking_uri"]

DIGEST = "5f" * 32
JUDGED = {
    "bits_per_byte": 0.61,
    "bits_per_byte_low": 0.60,
    "bits_per_byte_high": 0.62,
    "stories": 48.0,
    "written/ended": 0.95,
    "written/looping": 0.0,
    "written/names_straight": 0.58,
}


@dataclass(frozen=True, slots=True)
class Place:
    """To be read only."""

    uri: str
    runs: dict[str, str]
    """Ids by name; two runs are called "twin"."""
    version: Version


def _train(uri: str, out: Path, *, steps: int, factor: float, **recipe: object) -> str:
    """A run as the loop reports it: its loss falls as `factor` / step, seen by hand in the tests."""
    out.mkdir(parents=True)
    observer = observer_on(uri)
    observer.started(start(out, recipe=RECIPE | recipe))
    for number in range(1, steps + 1):
        observer.stepped(step(number, loss=2 + factor / number))
        if number % 4 == 0:
            observer.evaluated(evaluation(number, 1 + factor / number))
    observer.ended(end())
    return observer.run_id


def _evidence(uri: str, experiment: str, metrics: dict[str, float], status: str = "FINISHED") -> None:
    client = open_store(uri)
    tags = {"artifact.digest": DIGEST, "data.digest": "23e8e5daf148"}
    run_id = client.create_run(open_experiment(client, uri, experiment), tags=tags).info.run_id
    for name, value in metrics.items():
        client.log_metric(run_id, name, value)
    client.set_terminated(run_id, status)


@pytest.fixture(scope="session")
def place(_migrated_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A version is a row with a digest here: its files have nothing to do with a comparison."""
    folder = tmp_path_factory.mktemp("compare")
    shutil.copy(_migrated_store, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    runs = {
        "fox": _train(uri, folder / "fox", steps=8, factor=1.0),
        "twin": _train(uri, folder / "one/twin", steps=8, factor=2.0, seed=1),
        "other twin": _train(uri, folder / "two/twin", steps=12, factor=3.0, model={"width": 96}),
    }
    client = open_store(uri)
    client.create_registered_model(NAME)
    client.create_model_version(NAME, "somewhere", runs["fox"], tags={"artifact.digest": DIGEST})
    client.set_registered_model_alias(NAME, "challenger", "1")
    _evidence(uri, "story-evaluation", JUDGED)
    _evidence(uri, "story-benchmark", {"tokens_per_second": 900.0, "ttft_p95": 0.01})
    _evidence(uri, "story-benchmark", {"tokens_per_second": 1.0}, status="FAILED")
    return Place(uri, runs, find(uri, "1"))
