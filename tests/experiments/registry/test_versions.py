"""Registered versions in a real store: made once an artifact, found again, held to their digest."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import story
from experiments.cli import print_versions
from experiments.registry.versions import StoreRegistry, Version, find, register, versions
from model.architecture.folder import ModelFolder
from model.errors import InputError, ModelError
from model.serving.registry import fetch
from tests.model.small_model import small_folder
from training.tracking.store import open_store


def test_a_version_names_its_artifact_and_where_it_comes_from(registered: tuple[str, Version]) -> None:
    uri, version = registered
    assert (version.number, version.aliases, version.new) == (1, ("challenger",), True)
    assert version.digest == version.tags["artifact.digest"] == ModelFolder.open(small_folder()).digest
    client = open_store(uri)
    found = client.get_model_version_by_alias("story-writer", "challenger")
    assert int(found.version) == 1
    run = client.get_run(str(found.run_id))
    assert (run.info.status, run.data.tags["imported"]) == ("FINISHED", "true")
    assert client.get_experiment(run.info.experiment_id).name == "story-training"


def test_the_same_artifact_is_not_registered_twice(registered: tuple[str, Version]) -> None:
    uri, version = registered
    again = register(ModelFolder.open(small_folder()), uri, alias=None)
    assert (again.number, again.new) == (version.number, False)
    assert [each.number for each in versions(uri)] == [1]


@pytest.mark.parametrize("wanted", ["1", "challenger", "digest"])
def test_a_version_is_found_by_number_alias_and_digest(wanted: str, registered: tuple[str, Version]) -> None:
    uri, version = registered
    assert find(uri, version.digest[:10] if wanted == "digest" else wanted).number == 1


def test_what_is_not_there_is_answered_with_what_is(registered: tuple[str, Version]) -> None:
    with pytest.raises(InputError, match=r"got 'champion'; versions: 1; aliases: challenger"):
        find(registered[0], "champion")


def test_an_empty_store_says_how_to_make_a_version(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(InputError, match="none yet; `story register` makes one"):
        find(uri, "1")
    shown = io.StringIO()
    print_versions(versions(uri), Console(file=shown))
    assert "story register" in shown.getvalue()


def test_a_version_gives_back_the_folder_that_went_in(registered: tuple[str, Version], tmp_path: Path) -> None:
    uri, version = registered
    StoreRegistry(uri).download(version, tmp_path)
    assert ModelFolder.open(tmp_path).digest == version.digest


def test_a_version_whose_files_were_changed_is_refused(
    registered: tuple[str, Version], package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, version = registered
    shutil.copytree(package, tmp_path / "kept")
    tokenizer = package / "artifacts/folder/tokenizer.json"
    try:
        tokenizer.write_bytes(tokenizer.read_bytes() + b" ")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
        with pytest.raises(ModelError, match="is damaged"):
            fetch(StoreRegistry(uri), version)
        assert not [each for each in (tmp_path / "empty").rglob("*") if each.is_file()], "nothing damaged is kept"
    finally:
        shutil.copy(tmp_path / "kept/artifacts/folder/tokenizer.json", tokenizer)


def test_a_version_that_lacks_files_says_so_and_is_repaired(
    registered: tuple[str, Version], package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, version = registered
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    named = rf"^story-writer 1 \({version.digest[:12]}\) lacks "
    (package / "artifacts/folder/tokenizer.json").unlink()
    with pytest.raises(ModelError, match=f"{named}tokenizer.json in {package}/artifacts/folder; `story register MODEL"):
        fetch(StoreRegistry(uri), version)
    shutil.rmtree(package)
    with pytest.raises(ModelError, match=f"{named}config.json, model.safetensors, tokenizer.json, decode.+, digest in"):
        fetch(StoreRegistry(uri), version)
    runner, command = CliRunner(), ["register", str(small_folder()), "--alias", "none"]
    refused = runner.invoke(story.app, command)
    assert (refused.exit_code, refused.stdout) == (2, ""), "not 'was registered before'"
    assert "`story register MODEL --repair`" in refused.stderr
    repaired = runner.invoke(story.app, [*command, "--repair"])
    assert repaired.stdout == f"version 1 ({version.digest[:12]}) has its files again, known as challenger\n"
    assert fetch(StoreRegistry(uri), version).digest == version.digest
    assert [each.number for each in versions(uri)] == [1]
    assert runner.invoke(story.app, command).stdout.endswith("was registered before, known as challenger\n")


def test_the_table_shows_number_alias_and_verdict(registered: tuple[str, Version]) -> None:
    shown = io.StringIO()
    print_versions(versions(registered[0]), Console(file=shown, width=120))
    assert all(text in shown.getvalue() for text in ("challenger", registered[1].digest[:12], "not judged"))
