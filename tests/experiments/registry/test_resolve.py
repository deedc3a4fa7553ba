"""Model references: folders, registered versions by every name they have, and the challenger as the default."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments.registry import resolve
from experiments.registry.resolve import challenger_reference, folder_to_register, resolve_model
from experiments.registry.versions import StoreRegistry, Version
from model.architecture.folder import PRETRAINED, ModelFolder
from model.errors import InputError
from model.serving.registry import RegisteredVersion, ResolvedModel, cache_folder, last_version, remember
from model.settings import Settings
from tests.model.small_model import small_checkpoint, small_folder


def settings(uri: str, **more: Any) -> Settings:
    return Settings(mlflow_tracking_uri=uri, **more)


@pytest.mark.parametrize(
    "reference", ["models:/story-writer/1", "models:/story-writer@challenger", "1", "challenger", "digest"]
)
def test_a_registered_version_has_many_names(reference: str, registered: tuple[str, Version]) -> None:
    uri, version = registered
    reference = version.digest[:10] if reference == "digest" else reference
    found = resolve_model(reference, settings(uri), bare_names=True)
    assert found.version is not None
    assert found.version.digest == ModelFolder.open(found.path).digest == version.digest
    assert found.alias == ("challenger" if "challenger" in reference else "")


def test_what_a_store_named_last_is_not_taken_for_the_store_of_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = ModelFolder.open(small_folder())
    version = RegisteredVersion(number=1, digest=folder.digest, aliases=("champion",), source="")
    shutil.copytree(folder.path, cache_folder() / folder.digest)
    known = []
    for place in ("one", "other", "one"):
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        store = StoreRegistry("sqlite:///mlflow.db")
        known.append(last_version(store, "champion") is not None)
        if place == "one":
            remember(store, "champion", version)
    assert known == [False, False, True]


def test_a_path_is_itself_and_nothing_is_the_shipped_model(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    paths: dict[str | Path | None, Path] = {
        small_folder(): small_folder(),
        "./there": Path("./there"),
        None: PRETRAINED,
        "pretrained": PRETRAINED,
    }
    for reference, path in paths.items():
        assert resolve_model(reference, settings(uri), bare_names=True) == ResolvedModel(path)
    found = resolve_model("challenger", settings(uri))
    assert found.path == Path("challenger"), "without bare names a word is a folder"
    assert list(tmp_path.iterdir()) == []


def test_a_version_of_another_model_is_refused(registered: tuple[str, Version]) -> None:
    with pytest.raises(InputError, match=r"model must be a folder, pretrained, .* got 'models:/other/1'"):
        resolve_model("models:/other/1", settings(registered[0]))


def test_the_challenger_is_the_default_unless_the_settings_name_a_model(registered: tuple[str, Version]) -> None:
    uri, version = registered
    assert challenger_reference(settings(uri)) == f"models:/story-writer/{version.number}"
    assert challenger_reference(settings(uri, story_model="there")) is None


def test_where_there_is_no_store_none_is_made(tmp_path: Path) -> None:
    assert challenger_reference(settings(f"sqlite:///{tmp_path}/mlflow.db")) is None
    assert list(tmp_path.iterdir()) == []


def test_without_mlflow_there_is_no_challenger(
    registered: tuple[str, Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stands in for an installation that only serves; this one has MLflow.
    monkeypatch.setattr(resolve, "find_spec", lambda name: None)
    assert challenger_reference(settings(registered[0])) is None


def test_a_checkpoint_is_exported_beside_itself_and_belongs_to_its_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_checkpoint(), run / "best")
    (run / "last").mkdir()
    folder, belongs_to = folder_to_register(run / "best")
    assert folder.path == run / "model"
    assert belongs_to == run
    assert folder.digest == ModelFolder.open(small_folder()).digest  # the same checkpoint, exported elsewhere


def test_without_a_source_the_last_training_is_taken_and_else_the_shipped_model(tmp_path: Path) -> None:
    assert folder_to_register(None)[0].path == PRETRAINED
    shutil.copytree(small_checkpoint(), tmp_path / "runs/story/best")
    assert folder_to_register(None)[0].path == tmp_path / "runs/story/model"


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a model folder or a checkpoint"):
        folder_to_register(tmp_path)
