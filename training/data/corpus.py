"""Stream stories out of files; memory does not grow with the file.

A damaged line raises an error that names file and line, unless the caller passes `on_bad`. Damage of the whole file (a
truncated gzip stream, no story at all) always raises.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast, get_args

from model.errors import DataError, InputError
from training.data.bpe import END_OF_STORY

JSON_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt",)
SUFFIXES = tuple(suffix + gz for suffix in (*JSON_SUFFIXES, *TEXT_SUFFIXES) for gz in ("", ".gz"))
MAX_STORY_BYTES = 4 * 1024 * 1024
"""One line (JSON) or one story (text) may take this much; it bounds the memory of everything behind."""

_END = END_OF_STORY.encode()
_BUFFER = 1024 * 1024


class Story(NamedTuple):
    """One story and where it stands: `line` counts from 1 and is the story's first line."""

    text: str
    path: Path
    line: int
    title: str = ""
    split: str = ""


class BadLineError(DataError):
    """One line or story of a file is unusable; `reason` is the short name under which it is counted."""

    def __init__(self, path: Path, line: int, reason: str, detail: str) -> None:
        super().__init__(f"{path}, line {line}: {detail}")
        self.reason = reason


BadLineHandler = Callable[[BadLineError], None]
"""Called for each unusable line, which is then left out; without a handler the error is raised."""


def story_id(text: str) -> str:
    """The name of a story: the first 12 hex digits of the SHA-1 of its UTF-8 text."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:12]


def file_sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's bytes, in hex; `on_bytes` hears how many bytes were read since the last call."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BUFFER):
                digest.update(block)
                if on_bytes:
                    on_bytes(len(block))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def find_files(sources: Iterable[Path]) -> list[Path]:
    """The story files behind files and folders, each once; a folder gives all of its files, sorted by name.

    Raises `DataError` for a source that does not exist, has another suffix, or is a folder without story files.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        if source.is_dir():
            inside = sorted(
                path
                for path in source.rglob("*")
                if path.name.endswith(SUFFIXES) and path.is_file() and not path.name.startswith(".")
            )
            if not inside:
                raise DataError(f"{source}: the folder holds no story files ({', '.join(SUFFIXES)})")
        elif not source.exists():
            raise DataError(f"{source}: no such file or folder")
        elif not source.name.endswith(SUFFIXES):
            raise DataError(f"{source}: unknown kind of file; allowed are {', '.join(SUFFIXES)}")
        else:
            inside = [source]
        for path in inside:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def read_stories(
    path: Path, *, on_bad: BadLineHandler | None = None, on_bytes: Callable[[int], None] | None = None
) -> Iterator[Story]:
    """Stream the stories of one file, as they stand there (not repaired, not filtered).

    JSON Lines: one object a line with a string "text" (and, if present, "title" and "split"). Text: stories end at
    `<|endoftext|>` or, in a file without that mark, at blank lines. `.gz` is read through gzip. `on_bytes` gets the
    number of bytes read from the disk since the last call.

    Raises:
        BadLineError: a line is unusable and `on_bad` is not given.
        DataError: the file cannot be read, its gzip stream is damaged, or it holds no story at all.
    """

    def bad(error: BadLineError) -> None:
        if on_bad is None:
            raise error
        on_bad(error)

    seen = False
    try:
        if path.name.removesuffix(".gz").endswith(JSON_SUFFIXES):
            stories = _read_json(path, bad, on_bytes)
        else:
            stories = _read_text(path, bad, on_bytes)
        for story in stories:
            seen = True
            yield story
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not seen:
        size = path.stat().st_size
        raise DataError(f"{path}: " + ("holds no usable story" if size else "the file is empty"))


class _MeteredFile(io.FileIO):
    """A file that reports the bytes read from it, so that progress is exact for compressed files too."""

    def __init__(self, path: Path, on_bytes: Callable[[int], None] | None) -> None:
        super().__init__(path, "rb")
        self._on_bytes = on_bytes

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        count = super().readinto(buffer)
        if self._on_bytes and count:
            self._on_bytes(count)
        return count or 0


@contextmanager
def _open(path: Path, on_bytes: Callable[[int], None] | None) -> Iterator[BinaryIO]:
    with io.BufferedReader(_MeteredFile(path, on_bytes), _BUFFER) as raw:
        if not path.name.endswith(".gz"):
            yield raw
            return
        # A buffer of our own, because GzipFile's readline costs a Python call a line.
        with gzip.GzipFile(fileobj=raw) as unpacked, io.BufferedReader(cast(io.RawIOBase, unpacked), _BUFFER) as file:
            yield file


def _read_lines(path: Path, bad: BadLineHandler, on_bytes: Callable[[int], None] | None) -> Iterator[tuple[int, str]]:
    """(line number, text without its line end); a line that is unusable comes as `bad` and is left out."""
    for number, line, error in _read_lines_or_errors(path, on_bytes):
        if error:
            bad(error)
        else:
            yield number, line


def _read_lines_or_errors(
    path: Path, on_bytes: Callable[[int], None] | None
) -> Iterator[tuple[int, str, BadLineError | None]]:
    number, offset = 0, 0
    with _open(path, on_bytes) as file:
        while data := file.readline(MAX_STORY_BYTES + 1):
            number += 1
            start = offset
            offset += len(data)
            if len(data) > MAX_STORY_BYTES:
                while data and not data.endswith(b"\n"):
                    data = file.readline(MAX_STORY_BYTES)
                    offset += len(data)
                limit = f"longer than the {MAX_STORY_BYTES:,} bytes allowed"
                yield number, "", BadLineError(path, number, "line too long", f"the line is {limit}")
                continue
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                start += 3 if number == 1 and offset - start > len(data) else 0
                where = f"column {error.start + 1} (offset {start + error.start:,} of the text)"
                detail = f"byte 0x{data[error.start]:02x} at {where} is not UTF-8"
                yield number, "", BadLineError(path, number, "not UTF-8", detail)
                continue
            yield number, text.rstrip("\r\n"), None


def _read_json(path: Path, bad: BadLineHandler, on_bytes: Callable[[int], None] | None) -> Iterator[Story]:
    for number, line in _read_lines(path, bad, on_bytes):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            bad(BadLineError(path, number, "bad JSON", f"bad JSON: {reason}"))
            continue
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            bad(BadLineError(path, number, "no text", 'needs an object with a string under "text"'))
            continue
        try:
            text.encode()
        except UnicodeEncodeError:
            detail = "holds half of a surrogate pair (\\ud800 to \\udfff)"
            bad(BadLineError(path, number, "not UTF-8", detail))
            continue
        yield Story(text, path, number, str(record.get("title") or ""), str(record.get("split") or ""))


def _has_end_marks(path: Path) -> bool:
    """Whether `<|endoftext|>` stands anywhere in the file; mostly known after the first block."""
    tail = b""
    with _open(path, None) as file:
        while block := file.read(_BUFFER):
            if _END in tail + block:
                return True
            tail = block[-len(_END) :]
    return False


def _read_text(path: Path, bad: BadLineHandler, on_bytes: Callable[[int], None] | None) -> Iterator[Story]:
    marked = _has_end_marks(path)
    parts: list[str] = []
    first, size, damage = 0, 0, False  # of the story being gathered

    def close() -> Iterator[Story]:
        nonlocal first, size, damage
        text = "\n".join(parts).strip("\n")
        parts.clear()
        if text.strip() and not damage:
            yield Story(text, path, first)
        first, size, damage = 0, 0, False

    for number, line, error in _read_lines_or_errors(path, on_bytes):
        if error:
            # One bad line spoils its whole story: a story with a hole is worse than none.
            if not damage:
                bad(error)
            damage = True
            continue
        parts_of_line = line.split(END_OF_STORY) if marked else [line]
        for index, part in enumerate(parts_of_line):
            if index or (not marked and not line.strip()):
                yield from close()
            if part.strip() or (parts and marked):
                first = first or number
                size += len(part) + 1
                if size > MAX_STORY_BYTES and not damage:
                    limit = f"longer than the {MAX_STORY_BYTES:,} bytes allowed"
                    bad(BadLineError(path, first, "story too long", f"the story is {limit}"))
                    damage = True
                if damage:
                    parts.clear()
                else:
                    parts.append(part)
    yield from close()


Split = Literal["train", "heldout", "all"]


def own_stories_folder() -> Path:
    """Where the files lie; `find_files` takes the folder as a source."""
    return Path(str(resources.files("training"))) / "stories"


def load_own_stories(split: Split = "all") -> list[Story]:
    """The stories of one split, always in the same order. Raises `InputError` and `DataError`."""
    if split not in get_args(Split):
        raise InputError("split", f'must be "train", "heldout" or "all", got {split!r}')
    return [story for story in _all_stories() if split in ("all", story.split)]


@cache
def _all_stories() -> tuple[Story, ...]:
    stories: list[Story] = []
    for path in sorted(own_stories_folder().glob("*.jsonl")):
        for story in read_stories(path):
            if not story.title or story.split not in ("train", "heldout"):
                needs = 'needs a "title" and the "split" train or heldout'
                raise DataError(f"{path}, line {story.line}: {needs}")
            stories.append(story)
    return tuple(stories)
