"""The secrets of the compose file: random, kept, closed, and in agreement with each other."""

from __future__ import annotations

import stat
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from deploy.make_secrets import make_all


def read(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text("utf-8").strip() for path in folder.iterdir()}


def test_each_secret_is_long_random_and_used_by_one_part(tmp_path: Path) -> None:
    make_all(tmp_path / "one")
    make_all(tmp_path / "two")
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(len(value) >= 32 and value != two[name] for name, value in one.items())
    assert len(set(one.values())) == len(one)


def test_an_address_holds_the_password_that_its_server_is_told(tmp_path: Path) -> None:
    make_all(tmp_path)
    made = read(tmp_path)
    assert made["redis_auth"] == f"requirepass {urlsplit(made['redis_url']).password}"
    assert urlsplit(made["database_url"]).password == made["stories_db_password"]


def test_nobody_else_gets_into_the_folder_and_each_container_can_read_its_file(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir(mode=0o755)
    make_all(tmp_path / "secrets")
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "secrets").iterdir()} == {0o444}


def test_what_is_there_is_never_changed_and_what_is_missing_fits_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stories_db_password").write_text("hunter2\n", "utf-8")
    make_all(tmp_path)
    made = read(tmp_path)
    assert made["stories_db_password"] == "hunter2"
    assert made["database_url"] == "postgresql://stories:hunter2@postgres:5432/stories"
    assert "hunter2" not in capsys.readouterr().out
    make_all(tmp_path)
    assert (read(tmp_path), capsys.readouterr().out) == (made, "")
