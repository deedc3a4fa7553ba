from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.tracking.store import Owner, owner_of


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_this_process_is_alive() -> None:
    assert owner_of().pid == os.getpid()
    assert owner_of().state() == "alive"


def test_a_killed_process_is_dead_before_and_after_its_parent_takes_notice(
    child: subprocess.Popen[bytes],
) -> None:
    owner = owner_of(child.pid)
    assert owner.state() == "alive"
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, but still a zombie
    assert owner.state() == "dead"
    child.wait()
    assert owner.state() == "dead"


def test_a_process_that_got_the_same_id_later_is_somebody_else() -> None:
    assert dataclasses.replace(owner_of(), began=owner_of().began - 100).state() == "dead"


def test_a_process_from_before_the_reboot_is_dead() -> None:
    assert dataclasses.replace(owner_of(), boot="another").state() == "dead"


def test_nothing_is_known_about_another_machine() -> None:
    assert dataclasses.replace(owner_of(), host="another", pid=2**22).state() == "unknown"


@given(
    st.builds(
        Owner,
        st.text(),
        st.text(),
        st.integers(0, 2**31),
        st.floats(allow_nan=False, allow_infinity=False),
    )
)
def test_an_owner_reads_back_from_its_tag(owner: Owner) -> None:
    assert Owner.from_text(owner.to_text()) == owner


FOREIGN = ["null", "[]", "{}", "1", '{"host": 1, "boot": 1, "pid": "x", "began": 1}']


@given(st.text() | st.sampled_from(FOREIGN))
def test_a_foreign_tag_is_nobody(text: str) -> None:
    assert Owner.from_text(text) is None
