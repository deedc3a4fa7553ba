"""Stories come out of files as they went in; damage is named by file and line or counted."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections import Counter
from importlib import resources
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import DataError, InputError
from training.data import corpus
from training.data.corpus import (
    BadLineError,
    file_sha256,
    find_files,
    layout_of,
    load_own_stories,
    own_stories_folder,
    read_stories,
    story_id,
)
from training.data.shards import END_OF_STORY


def texts(path: Path) -> list[str]:
    return [story.text for story in read_stories(path)]


def write_json(path: Path, *stories: str) -> Path:
    data = "".join(json.dumps({"text": text}) + "\n" for text in stories).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


@given(stories=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_json_lines_come_back_whole_plain_and_compressed(
    tmp_path_factory: pytest.TempPathFactory, stories: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("json")
    assert texts(write_json(folder / "a.jsonl", *stories)) == stories
    assert texts(write_json(folder / "a.jsonl.gz", *stories)) == stories


STORY_LINES = st.lists(
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters="\ufeff"), min_size=1).filter(
        lambda line: line.strip() and END_OF_STORY not in line
    ),
    min_size=1,
)


@given(stories=st.lists(STORY_LINES, min_size=1), marked=st.booleans())
def test_text_is_cut_at_marks_or_else_at_blank_lines(
    tmp_path_factory: pytest.TempPathFactory, stories: list[list[str]], marked: bool
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    between = "\n<|endoftext|>\n" if marked else "\n\n"
    path.write_text(between.join("\n".join(lines) for lines in stories) + between, "utf-8")
    if not marked and len(stories) == 1 and layout_of(path) == "line ends":
        assert texts(path) == stories[0]
    else:
        assert texts(path) == ["\n".join(lines) for lines in stories]


@given(stories=st.lists(STORY_LINES, min_size=2), ends=st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=1))
def test_a_line_may_end_in_three_ways_and_in_any_mixture(
    tmp_path_factory: pytest.TempPathFactory, stories: list[list[str]], ends: list[str]
) -> None:
    path = tmp_path_factory.mktemp("ends") / "a.txt"
    wanted = ["\n".join(lines) for lines in stories]
    first, *lines = "\n\n".join(wanted).split("\n")
    text = first
    for line, end in zip(lines, cycle(ends), strict=False):
        # Behind a CR an LF would not be an end of its own.
        text += ("\r\n" if text.endswith("\r") and end == "\n" else end) + line
    path.write_bytes(text.encode())
    assert texts(path) == wanted


def test_line_ends_that_fall_between_two_blocks_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    monkeypatch.setattr(corpus, "_BUFFER", 8)
    for padding in range(1, 20):
        path.write_bytes(b"x" * padding + b"\r\n\r\ny\r\rz\r\n")
        assert texts(path) == ["x" * padding, "y", "z"]


def test_stories_one_a_line_are_recognised_and_broken_prose_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    lines = [f"Story {number} was told to the fox. \u201cGood!\u201d" for number in range(150)]
    path.write_text("\n".join(lines) + "\n\n")
    assert (layout_of(path), texts(path)) == ("line ends", lines)
    path.write_text("\n\n".join(lines))
    assert (layout_of(path), texts(path)) == ("blank lines", lines)
    path.write_text("<|endoftext|>".join(lines))
    assert (layout_of(path), texts(path)) == ("<|endoftext|>", lines)
    path.write_text("There was a fox who\nlived in a wood and\nwas fond of cheese.\n")
    assert len(texts(path)) == 1


def test_arrays_csv_and_parquet_hold_the_same_stories(tmp_path: Path) -> None:
    import pandas

    stories = ["One,\nsaid \u201cthe fox\u201d.", "Two.", "Three."]
    frame = pandas.DataFrame({"text": stories, "title": ["a", "b", "c"], "split": ["train", "heldout", "train"]})
    frame.to_csv(tmp_path / "a.CSV", index=False)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.CSV").read_bytes()))
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_json(tmp_path / "a.json", orient="records")
    (tmp_path / "b.json").write_text(json.dumps(stories))
    write_json(tmp_path / "c.json", *stories)
    write_json(tmp_path / "d.JSONL", *stories)
    assert len(find_files([tmp_path])) == 7
    for path in find_files([tmp_path]):
        assert texts(path) == stories, path
    for name in ("a.CSV", "a.parquet", "a.json"):
        assert [(story.title, story.split) for story in read_stories(tmp_path / name)][1] == ("b", "heldout")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"story\nOne.\n", 'a.csv: needs a column "text", has story'),
        ("a.csv", b'text\n"One.', r"a\.csv, near line 2: not usable as CSV"),
        ("a.csv", b"text\n\xff.\n", r"a\.csv, near line \d: not usable as CSV"),
        ("a.json", b'["One.", "Tw', "a.json: is no valid JSON"),
        ("a.json", b'["One.", 2]', 'a.json, line 2: needs an object with a string under "text"'),
        ("a.parquet", b"PAR1 and rubbish", "a.parquet: not usable as Parquet"),
    ],
)
def test_a_damaged_table_or_array_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        texts(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_with_end_marks_a_blank_line_is_part_of_the_story(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One.\n\nStill one.\n<|endoftext|>\nTwo.<|endoftext|>Three.\n\n<|endoftext|>\n\n")
    assert texts(path) == ["One.\n\nStill one.", "Two.", "Three."]


def test_an_end_mark_far_into_the_file_or_across_blocks_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    for padding in range(40, 80):
        monkeypatch.setattr(corpus, "_BUFFER", 64)
        path.write_text("x" * padding + "\n\ny\n<|endoftext|>\nz\n")
        assert texts(path) == ["x" * padding + "\n\ny", "z"]


def test_a_story_knows_its_line_title_and_split(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "One.", "title": "T", "split": "heldout"}\n{"text": "Two."}\n')
    first, second = read_stories(path)
    assert (first.line, first.title, first.split) == (2, "T", "heldout")
    assert (second.line, second.title, second.split) == (3, "", "")
    path = tmp_path / "b.txt"
    path.write_text("One.\nmore\n\n\nTwo.\n")
    assert [story.line for story in read_stories(path)] == [1, 5]


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_story(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "One."}\r\n{"text": "Two."}\r\n')
    assert texts(path) == ["One.", "Two."]
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfOne.\r\nmore\r\n\r\nTwo.\r\n")
    assert texts(path) == ["One.\nmore", "Two."]


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b'{"text": "cut', "bad JSON", "line 2: bad JSON: Unterminated string"),
        (b"[" * 200_000, "bad JSON", "line 2: bad JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "bad JSON", "line 2: bad JSON"),
        (b'{"story": "x"}', "no text", 'line 2: needs an object with a string under "text"'),
        (b'{"text": 7}', "no text", 'line 2: needs an object with a string under "text"'),
        (b'["text"]', "no text", 'line 2: needs an object with a string under "text"'),
        (b'{"text": "\\ud83d"}', "not UTF-8", "line 2: holds half of a surrogate pair"),
        (b'{"text": "\xff"}', "not UTF-8", "line 2: byte 0xff at column 11 is not"),
        (b'{"text": "' + b"x" * corpus.MAX_STORY_BYTES + b'"}', "line too long", "line 2: .* 4,194,304 bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_bad_line_is_named_or_skipped_and_counted(
    tmp_path: Path, suffix: str, line: bytes, reason: str, message: str
) -> None:
    path = tmp_path / f"a{suffix}"
    data = b'{"text": "One."}\n' + line + b'\n{"text": "Three."}\n'
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    with pytest.raises(BadLineError, match=message) as raised:
        texts(path)
    assert str(path) in str(raised.value)
    skipped: list[BadLineError] = []
    kept = [(story.text, story.line) for story in read_stories(path, on_bad=skipped.append)]
    assert kept == [("One.", 1), ("Three.", 3)]
    assert [error.reason for error in skipped] == [reason]


def test_the_place_of_a_bad_byte_is_right_behind_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    data = b'\xef\xbb\xbf{"text": "\x80"}\n'
    path.write_bytes(data)
    with pytest.raises(BadLineError, match="byte 0x80 at column 11 is not"):
        texts(path)


@pytest.mark.parametrize("marked", [True, False])
def test_one_bad_byte_spoils_its_whole_story_and_no_other(tmp_path: Path, marked: bool) -> None:
    path = tmp_path / "a.txt"
    between = b"\n<|endoftext|>\n" if marked else b"\n\n"
    path.write_bytes(between.join([b"One.", b"Tw\xffo.\nstill \xfe two\nand more", b"Three."]))
    with pytest.raises(BadLineError, match=r"a\.txt, line 3: byte 0xff at column 3"):
        texts(path)
    skipped: list[BadLineError] = []
    assert [story.text for story in read_stories(path, on_bad=skipped.append)] == ["One.", "Three."]
    assert len(skipped) == 1


def test_a_text_story_without_end_is_stopped_by_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_STORY_BYTES", 100)
    path = tmp_path / "a.txt"
    path.write_text("One.\n\n" + "a line of the endless story\n" * 10 + "\nThree.\n")
    with pytest.raises(BadLineError, match=r"line 3: the story is longer than the 100 bytes allowed"):
        texts(path)
    skipped: list[BadLineError] = []
    assert [story.text for story in read_stories(path, on_bad=skipped.append)] == ["One.", "Three."]
    assert [error.reason for error in skipped] == ["story too long"]


@pytest.mark.parametrize("skip", [True, False])
def test_a_damaged_gzip_file_stops_even_when_lines_may_be_skipped(tmp_path: Path, skip: bool) -> None:
    # Incompressible stories, so that the damage falls behind the first of them.
    stories = [hashlib.sha256(bytes([i])).hexdigest() * 20 for i in range(200)]
    whole = write_json(tmp_path / "a.jsonl.gz", *stories).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for damaged in (whole[: len(whole) // 2], bytes(flipped), b"plain text", whole + b"rubbish"):
        path = tmp_path / "b.jsonl.gz"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"b\.jsonl\.gz: damaged gzip file"):
            list(read_stories(path, on_bad=(lambda error: None) if skip else None))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_file_without_stories_is_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        texts(path)
    path.write_text("\n \n\n")
    with pytest.raises(DataError, match="holds no usable story"):
        texts(path)


def test_progress_counts_the_bytes_on_disk(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = write_json(tmp_path / name, *(f"Story number {i}." for i in range(5000)))
        seen: list[int] = []
        list(read_stories(path, on_bytes=seen.append))
        assert sum(seen) == path.stat().st_size
        seen.clear()
        assert file_sha256(path, seen.append) == hashlib.sha256(path.read_bytes()).hexdigest()
        assert sum(seen) == path.stat().st_size


def test_folders_are_searched_in_order_and_no_file_is_taken_twice(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.txt.gz", "deep/c.ndjson", "README.md", ".hidden.jsonl"):
        (tmp_path / name).write_text("x")
    found = find_files([tmp_path / "b.jsonl", tmp_path, tmp_path / "deep" / ".." / "b.jsonl"])
    assert [path.name for path in found] == ["b.jsonl", "a.txt.gz", "c.ndjson"]


def test_links_are_followed_once_and_everything_left_out_is_reported(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for path in (folder, elsewhere):
        path.mkdir()
    for path in (folder / "a.jsonl", elsewhere / "b.txt", folder / "notes.md", folder / ".c.txt"):
        path.write_text("x")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    (folder / "gone.txt").symlink_to(tmp_path / "none.txt")
    os.mkfifo(folder / "pipe.txt")
    others: list[Path] = []
    assert [path.name for path in find_files([folder], others.append)] == ["a.jsonl", "b.txt"]
    assert sorted(path.name for path in others) == [".c.txt", "gone.txt", "notes.md", "pipe.txt"]
    with pytest.raises(DataError, match=r"pipe\.txt: is a pipe or a device"):
        find_files([folder / "pipe.txt"])


def test_a_source_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file or folder"):
        find_files([tmp_path / "none.jsonl"])
    with pytest.raises(DataError, match=r"holds no story files \(\.jsonl, "):
        find_files([tmp_path])
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(DataError, match=r"a\.pdf: unknown kind of file; allowed are \.jsonl, "):
        find_files([tmp_path / "a.pdf"])
    with pytest.raises(DataError, match="cannot be read: No such file"):
        file_sha256(tmp_path / "gone.jsonl")


def test_a_story_is_named_by_its_text() -> None:
    assert story_id("Zoë.") == hashlib.sha1("Zoë.".encode()).hexdigest()[:12]


def test_there_are_enough_stories_and_enough_of_them_are_held_out() -> None:
    everything, held_out = load_own_stories(), load_own_stories("heldout")
    assert len(everything) >= 120
    assert len(held_out) >= 100
    assert len(load_own_stories("train")) >= 20
    assert Counter(load_own_stories("train") + held_out) == Counter(everything)


def test_no_split_but_the_known_ones() -> None:
    with pytest.raises(InputError, match='split must be "train", "heldout" or "all", got \'val\''):
        load_own_stories("val")  # type: ignore[arg-type]


def test_titles_and_endings_are_all_their_own_and_openings_nearly_all() -> None:
    stories = load_own_stories()
    assert len({story.title for story in stories}) == len(stories)
    openings = Counter(" ".join(story.text.split()[:8]) for story in stories)
    # "Once upon a time there was a little" may come twice; a template comes again and again.
    assert max(openings.values()) <= 2
    assert len(openings) >= 0.98 * len(stories)
    assert len({" ".join(story.text.split()[-8:]) for story in stories}) == len(stories)


def test_stories_are_short_plain_ascii_with_a_proper_end() -> None:
    for story in load_own_stories():
        assert story.text.isascii(), story.title
        assert 60 <= len(story.text.split()) <= 400, story.title
        assert re.fullmatch(r'["A-Z].*[.!?]["\']?', story.text, re.DOTALL), story.title


def test_many_names_carry_the_stories_and_many_speak() -> None:
    stories = load_own_stories()
    # A name is a capital letter inside a sentence.
    names = {name for story in stories for name in re.findall(r"[a-z,] ([A-Z][a-z]{2,})\b", story.text)}
    assert len(names) > 100
    assert sum('"' in story.text for story in stories) > len(stories) / 2


def test_the_licence_stands_beside_the_stories_and_travels_with_the_package() -> None:
    assert "CC0 1.0" in (own_stories_folder() / "README.md").read_text("utf-8")
    packed = {file.name for file in (resources.files("training") / "stories").iterdir()}
    assert {"README.md", "a.jsonl", "b.jsonl"} <= packed
