"""Questions and answers of the process that reads, and that it cannot write."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from experiments.dashboard.rows import run_rows
from experiments.dashboard.worker import answer
from model.errors import InputError
from tests.experiments.dashboard.made import made
from training.tracking.store import open_store


def test_no_question_changes_the_store_and_its_client_could_not(tmp_path: Path) -> None:
    database = Path(
        shutil.copy(made().uri.removeprefix("sqlite:///"), tmp_path / "it's 100% mine?.db".replace("?", ""))
    )
    before = hashlib.sha256(database.read_bytes()).hexdigest()
    uri = f"sqlite:///{database}"
    (first, *_), _ = run_rows(open_store(uri, read_only=True))
    questions: tuple[Any, ...] = (("overview",), ("curves", [first.id], "training"), ("sample_sets", first.id))
    for question in questions:
        found, error = answer(uri, *question)
        assert (bool(found), error) == (True, None)
    with pytest.raises(MlflowException, match="readonly"):
        open_store(uri, read_only=True).set_tag(first.id, "seen", "yes")
    assert hashlib.sha256(database.read_bytes()).hexdigest() == before
    assert [path.name for path in tmp_path.iterdir()] == [database.name]


def test_a_missing_database_is_not_created_to_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        open_store(f"sqlite:///{tmp_path}/mlflow.db", read_only=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("question", [("delete",), ("sample_sets",), ("curves", ["x"], "m")])
def test_what_cannot_be_answered_is_an_error_in_one_line(question: Any) -> None:
    found, error = answer(made().uri, *question)
    assert found is None
    assert error
    assert "\n" not in error
