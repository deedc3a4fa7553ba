"""Registered versions by MLflow's REST API, from a real server; the cache, and what happens without the server."""

from __future__ import annotations

import base64
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.registry.versions import StoreRegistry, Version, register
from model.architecture.folder import DIGESTED, PRETRAINED, ModelFolder
from model.errors import InputError, ModelError
from model.serving.backend import LocalBackend
from model.serving.registry import (
    KEPT,
    RegisteredVersion,
    RegistryError,
    ServerRegistry,
    alias_of,
    cache_folder,
    fetch,
    parse_reference,
    resolve_model,
)
from model.settings import Settings
from tests.mlflow_server import MlflowServer, Proxy, proxied
from tests.model.small_model import copy_of, small_folder
from training.tracking.store import open_store

CHAMPION = "models:/story-writer@champion"
WITHOUT_MLFLOW = """
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mlflow", "torch", "gradio"):
            raise ImportError(f"{name} is not installed where stories are served")

sys.meta_path.insert(0, Forbidden())
from model.serving.registry import resolve_model
from model.settings import load_settings
print(resolve_model(load_settings().story_model, load_settings()).path)
"""


@pytest.fixture(scope="module")
def version(mlflow: MlflowServer) -> Iterator[Version]:
    """The small model as version 1, `champion`, on the server."""
    yield register(ModelFolder.open(small_folder()), mlflow.address, alias="champion")
    open_store(mlflow.address).delete_registered_model("story-writer")


@pytest.fixture
def proxy(mlflow: MlflowServer, version: Version, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """A proxy in front of the server, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with proxied(mlflow) as proxy:
        yield proxy


def settings(proxy: Proxy, **more: Any) -> Settings:
    return Settings(mlflow_tracking_uri=proxy.address, **more)


@pytest.mark.parametrize("wanted", ["1", "champion", "digest"])
def test_the_server_says_what_mlflow_says(wanted: str, mlflow: MlflowServer, version: Version, tmp_path: Path) -> None:
    wanted = version.digest[:10] if wanted == "digest" else wanted
    ours, theirs = ServerRegistry(mlflow.address), StoreRegistry(mlflow.address)
    found, expected = ours.find(wanted), theirs.find(wanted)
    assert (found.number, found.digest, found.source) == (expected.number, expected.digest, expected.source)
    assert wanted == "1" or found.aliases == expected.aliases == ("champion",)
    for name, registry in (("ours", ours), ("theirs", theirs)):
        (tmp_path / name).mkdir()
        registry.download(found, tmp_path / name)
    files = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    assert {*DIGESTED, "digest"} <= files.keys()


def test_a_version_is_fetched_once_and_verified(proxy: Proxy, version: Version) -> None:
    found = resolve_model(CHAMPION, settings(proxy))
    assert found.alias == "champion"
    assert found.version is not None
    assert (found.version.name, found.path) == ("story-writer 1", cache_folder() / version.digest)
    assert ModelFolder.open(found.path).digest == version.digest
    asked = len(proxy.paths)
    assert resolve_model("models:/story-writer/1", settings(proxy)).path == found.path
    assert len(proxy.paths) == asked + 1, "only which version it is was asked"
    backend = LocalBackend.load(settings(proxy, story_model=CHAMPION, story_slots=1))
    model = backend.model
    assert (model.name, model.version, model.number, model.alias) == ("story-writer 1", version.digest, 1, "champion")
    backend.engine.close()


def test_a_cached_version_that_was_damaged_is_fetched_again(proxy: Proxy, version: Version) -> None:
    place = resolve_model(CHAMPION, settings(proxy)).path
    (place / "tokenizer.json").write_bytes(b"{}")
    assert ModelFolder.open(resolve_model(CHAMPION, settings(proxy)).path).digest == version.digest


def test_without_the_server_the_version_that_was_last_named_is_used(
    proxy: Proxy, version: Version, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.down = True
    with pytest.raises(RegistryError, match="answers with status 503"):
        resolve_model(CHAMPION, settings(proxy))
    proxy.down = False
    first = resolve_model(CHAMPION, settings(proxy))
    proxy.down = True
    again = resolve_model(CHAMPION, settings(proxy))
    assert (again.path, again.version, again.alias) == (first.path, first.version, "champion")
    down = f"the MLflow server {proxy.address} answers with status 503"
    assert caplog.messages == [f"{down}; story-writer 1, which {CHAMPION} last named, is used"]
    with pytest.raises(RegistryError):
        resolve_model("models:/story-writer@challenger", settings(proxy))


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(RegistryError, match=r"the MLflow server http://127\.0\.0\.1:9 does not answer: ConnectError"):
        resolve_model(CHAMPION, Settings(mlflow_tracking_uri="http://127.0.0.1:9"))


def test_files_that_arrive_damaged_are_refused_and_not_kept(proxy: Proxy) -> None:
    proxy.damaged = "model.safetensors"
    with pytest.raises(ModelError, match="is damaged"):
        resolve_model(CHAMPION, settings(proxy))
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]


@pytest.mark.parametrize("reference", ["models:/story-writer@nobody", "models:/story-writer/77"])
def test_what_is_not_registered_is_answered_with_what_is(reference: str, proxy: Proxy) -> None:
    with pytest.raises(InputError, match=r"got '(nobody|77)'; versions: 1; aliases: champion"):
        resolve_model(reference, settings(proxy))


@pytest.mark.parametrize("way", ["address", "password", "token"])
def test_credentials_are_sent_and_never_shown(way: str, proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    basic = "Basic " + base64.b64encode(b"lily:hunter/2").decode()
    proxy.authorization = "Bearer hunter/2" if way == "token" else basic
    caplog.set_level(logging.DEBUG)
    given: dict[str, Any] = {
        "address": {"mlflow_tracking_uri": proxy.address.replace("//", "//lily:hunter%2F2@")},
        "password": {"mlflow_tracking_username": "lily", "mlflow_tracking_password": "hunter/2"},
        "token": {"mlflow_tracking_token": "hunter/2"},
    }[way]
    chosen = Settings(**{"mlflow_tracking_uri": proxy.address} | given)
    assert resolve_model(CHAMPION, chosen).version is not None
    proxy.authorization = "something else"
    shutil.rmtree(cache_folder())
    with pytest.raises(RegistryError, match="refuses the credentials: set MLFLOW_TRACKING_USERNAME") as refused:
        resolve_model(CHAMPION, chosen)
    shown = f"{refused.value} {caplog.text} {chosen!r}"
    assert way == "address" or "hunter" not in shown
    assert "hunter" not in f"{refused.value} {caplog.text}"


def test_neither_mlflow_nor_torch_is_needed(proxy: Proxy, version: Version, repository: Path) -> None:
    environment = {"STORY_MODEL": CHAMPION, "MLFLOW_TRACKING_URI": proxy.address, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", WITHOUT_MLFLOW]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(cache_folder() / version.digest), done.stderr


def test_a_database_is_refused_where_mlflow_may_not_be_loaded() -> None:
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI must be the http"):
        resolve_model(CHAMPION, Settings())


def test_the_cache_keeps_the_last_versions_and_those_that_references_name(
    proxy: Proxy, version: Version, tmp_path: Path
) -> None:
    named = resolve_model(CHAMPION, settings(proxy)).path
    others = []
    for number in range(KEPT + 2):
        folder = copy_of(small_folder(), tmp_path / f"model-{number}")
        (folder / "tokenizer.json").write_text(f'{{"number": {number}}}')
        others.append(_Files(folder))
        os.utime(fetch(others[-1], others[-1].version).path, (number, number))
    last = _Files(PRETRAINED)
    fetch(last, last.version)
    kept = {path.name for path in cache_folder().iterdir() if path.is_dir()}
    assert kept == {named.name, last.version.digest, *(each.version.digest for each in others[-KEPT:])}


class _Files:
    """A registry with one version, whose files are those of a folder."""

    address = "here"

    def __init__(self, folder: Path) -> None:
        from model.architecture.folder import compute_digest

        self.folder = folder
        digest = compute_digest(folder)
        if folder != PRETRAINED:
            (folder / "digest").write_text(digest)
        self.version = RegisteredVersion(number=1, digest=digest, aliases=(), source="")

    def find(self, wanted: str) -> RegisteredVersion:
        return self.version

    def download(self, version: RegisteredVersion, out: Path) -> None:
        shutil.copytree(self.folder, out, dirs_exist_ok=True)


def test_two_processes_that_fetch_a_version_at_the_same_time_both_get_it() -> None:
    class Slower(_Files):
        def download(self, version: RegisteredVersion, out: Path) -> None:
            super().download(version, out)
            fetch(_Files(self.folder), version)  # by the other process, in the meantime

    slower = Slower(PRETRAINED)
    folder = fetch(slower, slower.version)
    assert folder.path == cache_folder() / slower.version.digest
    assert ModelFolder.open(folder.path).digest == slower.version.digest


@pytest.mark.parametrize("digest", ["", "../../etc", "0" * 63, "G" * 64])
def test_a_version_without_a_digest_is_refused(digest: str) -> None:
    registry = _Files(PRETRAINED)
    with pytest.raises(ModelError, match=r"has no tag artifact\.digest"):
        fetch(registry, RegisteredVersion(number=1, digest=digest, aliases=(), source=""))


@given(text=st.text(max_size=40) | st.from_regex(r"models:/(story-writer)?[@/]\w{0,5}", fullmatch=True))
def test_a_reference_is_a_folder_a_version_or_an_error(text: str) -> None:
    try:
        wanted = parse_reference(text)
    except InputError:
        assert text.startswith("models:/")
        return
    assert (wanted is not None) == text.startswith("models:/story-writer")
    assert wanted is None or text in (f"models:/story-writer@{wanted}", f"models:/story-writer/{wanted}")
    assert alias_of(text) in (None, wanted)


def test_what_is_an_alias() -> None:
    assert alias_of(CHAMPION) == "champion"
    assert [alias_of(each) for each in (None, "pretrained", "runs/x", "models:/story-writer/3")] == [None] * 4
