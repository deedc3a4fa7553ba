"""What is judged and measured when nothing is named: the store's challenger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.registry import trial
from experiments.registry.trial import challenger_name, model_to_judge
from experiments.registry.versions import Version
from model.architecture.folder import ModelFolder
from model.settings import Settings


def settings(uri: str, **more: Any) -> Settings:
    return Settings(mlflow_tracking_uri=uri, **more)


def test_it_is_the_challenger_fetched_for_as_long_as_it_is_needed(registered: tuple[str, Version]) -> None:
    uri, version = registered
    assert challenger_name(settings(uri)) == f"models:/story-writer/{version.number}"
    with model_to_judge(None, settings(uri)) as folder:
        assert folder is not None
        assert ModelFolder.open(folder).digest == version.digest
    assert not folder.exists()


def test_what_an_option_or_the_settings_name_goes_first(registered: tuple[str, Version]) -> None:
    chosen = settings(registered[0], story_model="there")
    assert challenger_name(chosen) is None
    with model_to_judge(None, chosen) as folder:
        assert folder == Path("there")
    with model_to_judge(Path("here"), chosen) as folder:
        assert folder == Path("here")


def test_where_there_is_no_store_none_is_made(tmp_path: Path) -> None:
    with model_to_judge(None, settings(f"sqlite:///{tmp_path}/mlflow.db")) as folder:
        assert folder is None
    assert list(tmp_path.iterdir()) == []


def test_without_mlflow_it_is_the_shipped_model(
    registered: tuple[str, Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stands in for an installation that only serves; this one has MLflow.
    monkeypatch.setattr(trial, "find_spec", lambda name: None)
    assert challenger_name(settings(registered[0])) is None
