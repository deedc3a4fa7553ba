"""Questions and answers of the process that reads, and that it cannot write."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from experiments.dashboard.__main__ import StoreReader, reply
from model.errors import InputError
from tests.experiments.dashboard.made import made
from training.tracking.store import open_store


def test_no_question_changes_the_store_and_its_client_could_not(tmp_path: Path) -> None:
    database = Path(
        shutil.copy(made().uri.removeprefix("sqlite:///"), tmp_path / "it's 100% mine?.db".replace("?", ""))
    )
    before = hashlib.sha256(database.read_bytes()).hexdigest()
    uri = f"sqlite:///{database}"
    store = StoreReader(uri)
    run = json.loads(reply(store, '{"ask": "overview"}'))["answer"]["runs"][0]["id"]
    for question in ({"ask": "curves", "runs": [run], "measure": "training"}, {"ask": "samples", "run": run}):
        assert "answer" in json.loads(reply(store, json.dumps(question)))
    with pytest.raises(MlflowException, match="readonly"):
        open_store(uri, read_only=True).set_tag(run, "seen", "yes")
    assert hashlib.sha256(database.read_bytes()).hexdigest() == before
    assert [path.name for path in tmp_path.iterdir()] == [database.name]


def test_a_missing_database_is_not_created_to_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        open_store(f"sqlite:///{tmp_path}/mlflow.db", read_only=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", '{"ask": "delete"}', '{"ask": "samples"}', '{"ask": "curves", "runs": ["x"], "measure": "m"}'],
)
def test_an_invalid_question_is_answered_with_an_error_in_one_line(line: str) -> None:
    answer = reply(StoreReader(made().uri), line)
    assert "\n" not in answer
    assert set(json.loads(answer)) == {"error"}
