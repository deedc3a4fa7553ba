"""Points that never reached the store are read back from their file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.outbox import Leftover
from training.tracking.outbox import Point, read_leftover, write_leftover


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
