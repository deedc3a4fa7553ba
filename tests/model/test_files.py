"""Files that are replaced whole: several writers at once, and a write that fails; output to a broken pipe."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path

import pytest

from model.files import ignore_broken_pipe, write_atomically


def test_of_several_writers_at_once_none_fails_and_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.json"
    texts = [letter * 10_000 for letter in "abcd"]
    start, errors = threading.Barrier(len(texts)), []

    def write(text: str) -> None:
        start.wait()
        try:
            for _ in range(10):
                write_atomically(path, text)
        except OSError as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert errors == []
    assert path.read_text("utf-8") in texts
    assert path.stat().st_mode & 0o777 == 0o644
    assert [each.name for each in path.parent.iterdir()] == ["state.json"]


def test_a_write_that_fails_leaves_the_old_content_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half a character: \ud800")
    assert path.read_text("utf-8") == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["state.json"]


def test_output_to_a_broken_pipe_is_discarded_and_before_that_all_arrives() -> None:
    reading, writing = os.pipe()
    with ignore_broken_pipe(open(writing, "w", encoding="ascii", errors="strict"), errors="replace") as stream:
        print("fox Zoë", file=stream, flush=True)
        assert os.read(reading, 100) == b"fox Zo?\n"
        os.close(reading)
        for _ in range(3):
            print("x" * 100_000, file=stream, flush=True)
        print("left in the buffer", file=stream)


def test_what_is_no_file_stays_as_it_is() -> None:
    assert ignore_broken_pipe(stream := io.StringIO()) is stream
