"""Owners of runs are recognised; points that were not sent are read back from their file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from model.outbox import Leftover
from tests.training.tracking.test_tracking_outages import wait_until
from training.tracking import store
from training.tracking.observer import Point, read_leftover, write_leftover
from training.tracking.store import Owner, open_experiment, open_store, owner_of


def test_mlflow_gets_a_password_that_the_settings_read_from_a_file(
    tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.utils.credentials import read_mlflow_creds

    (tmp_path / "password").write_text("hunter2\n")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "lily")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD_FILE", str(tmp_path / "password"))
    open_store(tracking_uri)
    found = read_mlflow_creds()
    assert (found.username, found.password) == ("lily", "hunter2")


OPEN = """
import sys
import mlflow.store.model_registry.sqlalchemy_store, mlflow.store.tracking.sqlalchemy_store
from training.tracking.store import open_store
print("ready", flush=True)
sys.stdin.readline()
print(*(found.name for found in open_store(sys.argv[1]).search_experiments()))
"""


def test_two_that_open_a_new_database_at_the_same_moment_both_can_use_it(tmp_path: Path) -> None:
    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", OPEN, f"sqlite:///{tmp_path}/new/mlflow.db"]
        return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    with start() as one, start() as two:
        for process in (one, two):
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        for process in (one, two):
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [process.communicate()[0] for process in (one, two)] == ["Default\n", "Default\n"]


def test_artifacts_follow_a_database_that_was_copied_or_moved(
    tracking_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also those of runs, models and versions that were logged before, and of a run that goes on."""
    from experiments.registry.versions import StoreRegistry, find, register
    from model.architecture.folder import ModelFolder
    from tests.model.small_model import small_folder

    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (tmp_path / "mlflow.db").rename(old / "mlflow.db")
    uri = f"sqlite:///{old}/mlflow.db"
    version = register(ModelFolder.open(small_folder()), uri)
    shutil.copytree(old, new)
    kept = sorted(path for path in old.rglob("*") if path.is_file())

    uri = f"sqlite:///{new}/mlflow.db"
    client = open_store(uri)
    client.log_text(version.run_id, "after", "after.txt")
    assert sorted(path for path in old.rglob("*") if path.is_file()) == kept, "the copy writes into the original"
    assert len(list(new.rglob("after.txt"))) == 1
    (message,) = caplog.messages
    assert message == f"{new}/mlflow.db was copied or moved from {old}/: its artifacts now lie beside it"
    with sqlite3.connect(new / "mlflow.db") as connection:
        dump = "\n".join(connection.iterdump())
    connection.close()
    assert dump.count(f"{new}/mlartifacts") >= 5
    assert f"{old}/mlartifacts" not in dump

    shutil.rmtree(old)
    out = tmp_path / "out"
    out.mkdir()
    StoreRegistry(uri).download(find(uri, "1"), out)
    assert ModelFolder.open(out).digest == version.digest
    open_store(uri)
    assert len(caplog.messages) == 1


def test_a_database_that_was_moved_alone_says_how_its_artifacts_follow(
    tracking_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = open_store(tracking_uri)
    experiment = open_experiment(client, tracking_uri, "story-training")
    elsewhere = client.create_experiment("mine", artifact_location="s3://bucket/mlartifacts/mine")
    new = tmp_path / "new"
    new.mkdir()
    (tmp_path / "mlflow.db").rename(new / "mlflow.db")
    client = open_store(f"sqlite:///{new}/mlflow.db")
    assert caplog.messages[0].endswith(f"is still missing here: mv {tmp_path}/mlartifacts {new}/")
    assert client.get_experiment(experiment).artifact_location == f"{new}/mlartifacts/story-training"
    assert client.get_experiment(elsewhere).artifact_location == "s3://bucket/mlartifacts/mine"


def test_two_users_with_a_store_of_the_same_name_share_no_lock(
    tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's lock lies in the folder for temporary files, and only who made it may open it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lock = hashlib.md5(b"sqlite:///mlflow.db", usedforsecurity=False).hexdigest()
    (tmp_path / f"db_init_lock-{lock}").mkdir()  # which cannot be opened as a file, not even by root
    assert [found.name for found in open_store("sqlite:///mlflow.db").search_experiments()] == ["Default"]


@contextlib.contextmanager
def locked(database: Path) -> Iterator[sqlite3.Connection]:
    """A database that another connection has for itself alone, until that is rolled back."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None, check_same_thread=False)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield connection


def test_a_locked_database_is_waited_for_with_one_line(
    tracking_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(store, "LOCK_NOTICE", 0.02)
    with locked(tmp_path / "mlflow.db") as other, ThreadPoolExecutor(1) as pool:
        names = pool.submit(lambda: [found.name for found in open_store(tracking_uri).search_experiments()])
        wait_until(lambda: bool(caplog.messages) or names.done())
        other.execute("ROLLBACK")
        assert names.result() == ["Default"]
    database = tmp_path / "mlflow.db"
    assert caplog.messages == [f"{database} is locked by another process; waiting for at most 60 s"]
    assert capfd.readouterr() == ("", "")


def test_a_database_that_stays_locked_is_an_error_of_one_line(
    tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LOCK_NOTICE", 0.02)
    monkeypatch.setattr(store, "LOCK_SECONDS", 0)
    with locked(tmp_path / "mlflow.db"), pytest.raises(InputError, match=r"cannot be used \(database is locked\)"):
        open_store(tracking_uri)


def test_sessions_wait_for_a_lock_as_long_as_the_first_connection(tracking_uri: str) -> None:
    """MLflow sets 20 s at the beginning of each session."""
    from mlflow.store.db.utils import _get_managed_session_maker, create_sqlalchemy_engine
    from sqlalchemy import text
    from sqlalchemy.orm import sessionmaker

    open_store(tracking_uri)
    engine = create_sqlalchemy_engine(tracking_uri)
    with _get_managed_session_maker(sessionmaker(engine), "sqlite")() as session:
        assert session.execute(text("PRAGMA busy_timeout")).scalar_one() == 60_000
    engine.dispose()


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_this_process_is_alive() -> None:
    assert owner_of().pid == os.getpid()
    assert owner_of().state() == "alive"


def test_a_killed_process_is_dead_before_and_after_its_parent_takes_notice(child: subprocess.Popen[bytes]) -> None:
    owner = owner_of(child.pid)
    assert owner.state() == "alive"
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, but still a zombie
    assert owner.state() == "dead"
    child.wait()
    assert owner.state() == "dead"


@pytest.mark.parametrize(
    ("other", "state"),
    [({"began": -100.0}, "dead"), ({"boot": "another"}, "dead"), ({"host": "another", "pid": 2**22}, "unknown")],
)
def test_another_process_of_the_same_id_another_boot_or_machine_is_not_this_one(
    other: dict[str, Any], state: str
) -> None:
    assert dataclasses.replace(owner_of(), **other).state() == state


@given(st.builds(Owner, st.text(), st.text(), st.integers(0, 2**31), st.floats(allow_nan=False, allow_infinity=False)))
def test_an_owner_reads_back_from_its_tag(owner: Owner) -> None:
    assert Owner.from_text(owner.to_text()) == owner


FOREIGN = ["null", "[]", "{}", "1", '{"host": 1, "boot": 1, "pid": "x", "began": 1}']


@given(st.text() | st.sampled_from(FOREIGN))
def test_a_foreign_tag_is_nobody(text: str) -> None:
    assert Owner.from_text(text) is None


@given(
    kept=st.lists(
        st.builds(Point, st.text(), st.floats(allow_nan=False), st.integers(0, 2**62), st.integers(0, 2**62))
    ),
    files=st.dictionaries(st.text(), st.text()),
)
def test_leftovers_read_back_from_their_file(
    kept: list[Point], files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("unsent") / "unsent.jsonl"
    write_leftover(path, Leftover(tuple(kept), files, 0, None))
    assert read_leftover(path) == (kept, files)


@pytest.mark.parametrize("text", ["{", "[1]\n", '{"other": 1}\n', '{"point": [1]}\n', '{"path": "a"}\n'])
def test_a_damaged_file_of_leftovers_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "unsent.jsonl").write_text(text)
    with pytest.raises((ValueError, TypeError, KeyError)):
        read_leftover(tmp_path / "unsent.jsonl")
