"""Owners of runs are recognised; points that were not sent are read back from their file."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.outbox import Leftover
from training.tracking.observer import Point, read_leftover, write_leftover
from training.tracking.store import Owner, open_store, owner_of


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
