"""A notebook's own folder and store, and its small models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from experiments.notebook.workspace import begin, empty_store, sample_lines, small_recipe
from model.architecture.network import StoryNetwork
from tests.training.conftest import _migrated_store, tracking_uri
from training.tracking.store import open_store

__all__ = ["_migrated_store", "tracking_uri"]


def test_it_begins_in_an_empty_folder_with_an_empty_store_and_keeps_the_others(
    tracking_uri: str, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    for name in ("01", "02"):
        (home / name).mkdir(parents=True)
        (home / name / "old.txt").touch()
    shutil.copy(tracking_uri.removeprefix("sqlite:///"), home / empty_store())
    workspace = begin("01", small=True, folder=home)
    assert Path.cwd() == home / "01"
    assert [path.name for path in Path.cwd().iterdir()] == ["mlflow.db"]
    assert (home / "02/old.txt").exists()
    assert workspace.pick("full", "small") == "small"
    assert open_store(workspace.uri).search_experiments(filter_string="name LIKE 'story%'") == []


def test_the_users_own_store_is_left_alone(tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
    workspace = begin("01", folder=tmp_path / "elsewhere")
    assert workspace.uri == f"sqlite:///{tmp_path}/elsewhere/01/mlflow.db"
    assert workspace.pick("full", "small") == "full"
    assert (tmp_path / "elsewhere" / empty_store()).exists(), "the next one is copied"


def test_a_small_recipe_is_small_and_evaluated_as_often_as_asked() -> None:
    recipe = small_recipe(40, "seed=3", evaluations=4)
    assert (recipe.steps, recipe.eval_every, recipe.seed) == (40, 10, 3)
    assert 200_000 < StoryNetwork(recipe.model).parameter_count() < 400_000


def test_each_step_shows_its_first_story_cut_short() -> None:
    columns = ["step", "prompt", "continuation"]
    rows = [[5, "Once", " upon\n\na time"], [5, "The", " fox"], [10, "Once", " more"]]
    assert sample_lines(rows, columns, letters=9) == ["step  5: Once upon…", "step 10: Once more"]
