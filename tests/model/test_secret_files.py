"""Secrets that lie in files: read as they are meant, refused in one line, and shown nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from model.settings import environment_names, load_settings, secret_names


def value_of(name: str) -> str | None:
    secret = getattr(load_settings(), name.lower())
    return None if secret is None else secret.get_secret_value()


def test_the_secrets_are_among_the_settings() -> None:
    assert {"MODAL_SECRET", "REDIS_URL", "DATABASE_URL"} <= set(secret_names()) <= set(environment_names())
    assert {"PORT", "MODAL_KEY", "MLFLOW_TRACKING_URI"}.isdisjoint(secret_names())


@pytest.mark.parametrize("name", secret_names())
def test_a_secret_is_read_from_the_file_that_its_variable_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODAL_KEY", "wk-1")
    monkeypatch.setenv("MODAL_SECRET", "" if name == "MODAL_SECRET" else "ws-1")
    (tmp_path / "secret").write_text("hunter2 in a hat\n", "utf-8")
    monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "secret"))
    assert value_of(name) == "hunter2 in a hat"
    assert "hunter2" not in repr(load_settings())


@given(secret=st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1, max_size=40))
def test_only_the_line_end_of_a_file_is_dropped(secret: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("secret") / "redis"
    path.write_bytes(f"{secret}\r\n".encode())
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("REDIS_URL_FILE", str(path))
        assert value_of("REDIS_URL") == secret


def test_an_empty_file_and_an_empty_name_count_as_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").touch()
    monkeypatch.setenv("REDIS_URL_FILE", "empty")
    monkeypatch.setenv("DATABASE_URL_FILE", "")
    assert (value_of("REDIS_URL"), value_of("DATABASE_URL")) == (None, None)


def test_a_secret_in_a_file_and_in_the_environment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("hunter2", "utf-8")
    monkeypatch.setenv("REDIS_URL_FILE", "secret")
    monkeypatch.setenv("REDIS_URL", "redis://other-hat")
    with pytest.raises(InputError, match=r"^REDIS_URL_FILE and REDIS_URL cannot both be set$"):
        load_settings()


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No such file or directory"), (b"\xff\xfe hunter2", "it is not UTF-8 text")]
)
def test_a_file_that_cannot_be_read_is_named_and_its_content_is_not(
    content: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "secret").write_bytes(content)
    monkeypatch.setenv("REDIS_URL_FILE", "secret")
    with pytest.raises(InputError, match=f"^REDIS_URL_FILE names 'secret', which cannot be read: {reason}$"):
        load_settings()


def test_a_setting_that_is_no_secret_cannot_lie_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORY_SLOTS_FILE", "slots")
    with pytest.raises(InputError, match="STORY_SLOTS_FILE is not a setting"):
        load_settings()
