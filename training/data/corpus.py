"""Read stories out of files. Memory does not grow with the file, except for a JSON array, which is parsed whole.

A damaged line raises an error that names file and line, unless the caller passes `on_bad`. Damage of the whole file (a
truncated gzip stream, no story at all) always raises. A line ends at CR LF, LF or CR in every kind of text file.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TextIO, cast, get_args

from model.errors import DataError, InputError, MissingExtraError
from training.data.shards import END_OF_STORY

KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".txt": "text", ".csv": "csv", ".parquet": "parquet"}
"""Kind of file by suffix, in any case; all but Parquet also as `.gz`."""
ALLOWED = f"{', '.join(KINDS)}, also as .gz"
MAX_STORY_BYTES = 4 * 1024 * 1024
"""One line (JSON) or one story (text) may take this much; it bounds the memory of everything behind."""

Layout = Literal["<|endoftext|>", "blank lines", "line ends"]
"""What separates the stories of a text file."""
CLOSING = (".", "!", "?", "\u2026", '"', "'", "\u201d", "\u2019", "\u00bb", ")", "]", "*")
"""Characters that a story ends with."""
CLOSED_SHARE = 0.8
"""A file without blank lines holds one story a line if at least this share of its lines ends like a story; otherwise it
is one story that was broken into lines."""
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


def kind_of(path: Path) -> str | None:
    """The kind of a story file by its name, one of the values of `KINDS`; None: not a story file."""
    name = path.name.lower()
    if name.startswith("."):
        return None
    kind = KINDS.get(Path(name.removesuffix(".gz")).suffix)
    return None if kind == "parquet" and name.endswith(".gz") else kind


def find_files(sources: Iterable[Path], on_other: Callable[[Path], None] = lambda path: None) -> list[Path]:
    """The story files behind files and folders, each once; a folder gives all of its files, sorted by name.

    Links are followed, each folder once. `on_other` gets every file of a folder that is left out: one of another kind,
    a hidden one, or no regular file (a pipe, a broken link); of a hidden folder, the folder.

    Raises `DataError` for a source that does not exist, is of another kind, or is a folder without story files.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        if source.is_dir():
            every = sorted(_files_below(source, set()))
            inside = [path for path in every if kind_of(path) and path.is_file()]
            if not inside:
                raise DataError(f"{source}: the folder holds no story files ({ALLOWED})")
            for path in set(every) - set(inside):
                on_other(path)
        elif not source.exists():
            raise DataError(f"{source}: no such file or folder")
        elif kind_of(source) is None:
            raise DataError(f"{source}: unknown kind of file; allowed are {ALLOWED}")
        elif not source.is_file():
            raise DataError(f"{source}: is a pipe or a device; save its content to a file first")
        else:
            inside = [source]
        for path in inside:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _files_below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """All files of a folder and of those in it, through links, and hidden folders as one entry each.

    `seen` keeps a loop of links from going on for ever.
    """
    if (real := folder.resolve()) in seen:
        return
    seen.add(real)
    try:
        entries = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from error
    for path in map(folder.joinpath, entries):
        if path.is_dir() and not path.name.startswith("."):
            yield from _files_below(path, seen)
        else:
            yield path


def read_stories(
    path: Path, *, on_bad: BadLineHandler | None = None, on_bytes: Callable[[int], None] | None = None
) -> Iterator[Story]:
    """Stream the stories of one file, as they stand there (not repaired, not filtered).

    JSON Lines, a JSON array, CSV and Parquet hold records with a string "text" (and, if present, "title" and "split"),
    an array also plain strings. Text: see `layout_of`. `.gz` is read through gzip. `on_bytes` gets the number of bytes
    read from the disk since the last call.

    Raises:
        BadLineError: a line is unusable and `on_bad` is not given.
        DataError: the file cannot be read, its gzip stream is damaged, or it holds no story at all.
        MissingExtraError: a Parquet file, and pyarrow is not installed.
    """

    def bad(error: BadLineError) -> None:
        if on_bad is None:
            file.read(_BUFFER)  # a line may be bad because the gzip stream is damaged, which shows further on
            raise error
        on_bad(error)

    kind = kind_of(path) or "text"
    read = {"json": _read_json, "text": _read_text, "csv": _read_csv, "parquet": _read_parquet}[kind]
    counted, seen = 0, False
    try:
        # A byte that is not UTF-8 spoils its line in most kinds of files, in a table the whole of it.
        with _open(path, errors="strict" if kind == "csv" else "surrogateescape") as (raw, file):
            for story in read(file, path, bad):
                seen = True
                yield story
                if on_bytes and (position := raw.tell()) > counted:
                    on_bytes(position - counted)
                    counted = position
            size = path.stat().st_size
            if on_bytes and size > counted:
                on_bytes(size - counted)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not seen:
        raise DataError(f"{path}: " + ("holds no usable story" if size else "the file is empty"))


@contextmanager
def _open(path: Path, errors: str = "surrogateescape") -> Iterator[tuple[BinaryIO, TextIO]]:
    """The file on the disk, whose place tells the progress, and its text with every line end as LF."""
    with path.open("rb", _BUFFER) as raw:
        source = cast(BinaryIO, gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw)
        with io.TextIOWrapper(source, "utf-8-sig", errors) as file:
            yield raw, file


def _read_lines(file: TextIO, path: Path) -> Iterator[tuple[int, str | BadLineError]]:
    """(line number, the text without its line end, or why it is unusable)."""
    number = 0
    while line := file.readline(MAX_STORY_BYTES + 1):
        number += 1
        if len(line) > MAX_STORY_BYTES:
            while line and not line.endswith("\n"):
                line = file.readline(MAX_STORY_BYTES)
            limit = f"longer than the {MAX_STORY_BYTES:,} bytes allowed"
            yield number, BadLineError(path, number, "line too long", f"the line is {limit}")
            continue
        try:
            line.encode()
        except UnicodeEncodeError as error:
            byte = line[error.start].encode("utf-8", "surrogateescape").hex()
            detail = f"byte 0x{byte} at column {error.start + 1} is not UTF-8"
            yield number, BadLineError(path, number, "not UTF-8", detail)
        else:
            yield number, line.removesuffix("\n")


def _read_json(file: TextIO, path: Path, bad: BadLineHandler) -> Iterator[Story]:
    is_array = ".json" in (path.suffix.lower(), Path(path.stem).suffix.lower())
    if is_array and file.read(_BUFFER).lstrip().startswith("["):
        file.seek(0)
        try:
            records = json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: is no valid JSON: {error}") from error
        for number, record in enumerate(records, 1):  # counted as if each were a line
            yield from _story({"text": record} if isinstance(record, str) else record, path, number, bad)
        return
    file.seek(0)
    for number, line in _read_lines(file, path):
        if isinstance(line, BadLineError):
            bad(line)
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            bad(BadLineError(path, number, "bad JSON", f"bad JSON: {reason}"))
            continue
        yield from _story(record, path, number, bad)


def _read_csv(file: TextIO, path: Path, bad: BadLineHandler) -> Iterator[Story]:
    csv.field_size_limit(MAX_STORY_BYTES)
    rows = csv.DictReader(file, strict=True)
    try:
        if "text" not in (rows.fieldnames or ()):
            raise DataError(f'{path}: needs a column "text", has {", ".join(rows.fieldnames or ()) or "none"}')
        for row in rows:
            yield from _story(row, path, rows.line_num, bad)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}, near line {rows.line_num + 1}: not usable as CSV: {error}") from error


def _read_parquet(_file: TextIO, path: Path, bad: BadLineHandler) -> Iterator[Story]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"reading {path.name}", "train") from error
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                raise DataError(f'{path}: needs a column "text", has {", ".join(names) or "none"}')
            wanted = [name for name in ("text", "title", "split") if name in names]
            batches = file.iter_batches(1024, columns=wanted)
            records = (record for batch in batches for record in batch.to_pylist())
            for number, record in enumerate(records, 1):
                yield from _story(record, path, number, bad)
    except ArrowException as error:
        raise DataError(f"{path}: not usable as Parquet: {str(error).splitlines()[0]}") from error


def _story(record: Any, path: Path, number: int, bad: BadLineHandler) -> Iterator[Story]:
    """The story of a record, or nothing where `bad` was called."""
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        bad(BadLineError(path, number, "no text", 'needs an object with a string under "text"'))
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        bad(BadLineError(path, number, "not UTF-8", "holds half of a surrogate pair (\\ud800 to \\udfff)"))
        return
    yield Story(text, path, number, str(record.get("title") or ""), str(record.get("split") or ""))


def layout_of(path: Path) -> Layout:
    """What separates the stories of a text file: marks if there is one, else blank lines, else the lines themselves.

    A file with neither holds one story a line if its lines end like stories (`CLOSED_SHARE`), else a single story.
    """
    lines = closed = 0
    blank = separated = False
    with _open(path) as (_, file):
        while line := file.readline(MAX_STORY_BYTES):
            if END_OF_STORY in line:
                return "<|endoftext|>"
            text = line.strip()
            if not text:
                blank = bool(lines)
                continue
            separated = separated or blank
            lines, closed = lines + 1, closed + text.endswith(CLOSING)
    return "line ends" if not separated and lines > 1 and closed >= CLOSED_SHARE * lines else "blank lines"


def _read_text(file: TextIO, path: Path, bad: BadLineHandler) -> Iterator[Story]:
    layout = layout_of(path)
    marked = layout == "<|endoftext|>"
    parts: list[str] = []
    first, size, damage = 0, 0, False  # of the story being gathered

    def close() -> Iterator[Story]:
        nonlocal first, size, damage
        text = "\n".join(parts).strip("\n")
        parts.clear()
        if text.strip() and not damage:
            yield Story(text, path, first)
        first, size, damage = 0, 0, False

    for number, line in _read_lines(file, path):
        if isinstance(line, BadLineError):
            # One bad line spoils its whole story: a story with a hole is worse than none.
            if not damage:
                bad(line)
            damage = True
            continue
        for index, part in enumerate(line.split(END_OF_STORY) if marked else [line]):
            if index or layout == "line ends" or (not marked and not line.strip()):
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
