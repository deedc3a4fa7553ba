"""Memory against what Python itself can find out."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from model.serving.metrics import memory
from model.serving.metrics.memory import memory_limit, resident


@pytest.fixture(autouse=True)
def _fresh() -> None:
    memory_limit.cache_clear()


def test_resident_memory_grows_with_what_is_touched_and_stays_below_the_peak() -> None:
    before = resident()
    assert before is not None
    held = bytearray(os.urandom(1 << 20) * 64)
    after = resident()
    assert after is not None
    assert after - before > 50 << 20
    assert after <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert len(held) == 64 << 20


@pytest.mark.parametrize(("text", "limited"), [("123456789\n", True), ("max\n", False), ("9" * 18, False)])
def test_the_limit_is_the_containers_or_else_the_machines(
    text: str, limited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(memory, "GROUP_LIMITS", (tmp_path / "none", tmp_path / "memory.max"))
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory_limit() == (123456789 if limited else machine)


def test_where_there_is_no_such_file_nothing_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    assert resident() is None
