"""Files and folders that are replaced whole, and output: past a broken pipe, and as JSON.

After a kill or a power cut a file holds the old content or the new one.
"""

import codecs
import json
import os
import shutil
import sys
import tempfile
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO


class _PipeStream(TextIOWrapper):
    original: TextIO
    """Kept, because it closes what both write to when it goes."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._discard()

    def _discard(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)


def ignore_broken_pipe(stream: TextIO, errors: str | None = None) -> TextIO:
    """Return `stream` as one whose output is discarded once its pipe is broken, with another handling of `errors`.

    Of `story train 2>&1 | tee log`, Ctrl-C ends `tee` first, and the training still has to save.
    """
    if not isinstance(stream, TextIOWrapper):
        return stream
    made = _PipeStream(stream.buffer, stream.encoding, errors or stream.errors, line_buffering=stream.line_buffering)
    made.original = stream
    return made


def print_json(value: object) -> None:
    """Print one JSON value on stdout, for `--json`. Where its encoding is not UTF-8, other characters are escaped."""
    utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    print(json.dumps(value, ensure_ascii=not utf8, indent=2, default=str))


def write_atomically(path: Path, text: str) -> None:
    """Write a text file (UTF-8, readable by all users) and bring it to the disk. Raises `OSError`.

    Of several writers at the same time the last one wins: each has a new file of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
    os.close(handle)
    fresh = Path(name)
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.chmod(0o644)
        _sync(fresh)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def replace_folder(fresh: Path, folder: Path, old: Path) -> None:
    """Bring `fresh` to the disk and rename it to `folder`, whose earlier content is first renamed to `old`.

    A kill between the two renames leaves the earlier content at `old`; after an error it is put back.

    Raises:
        OSError: a file cannot be brought to the disk, or a folder renamed.
    """
    for path in (*fresh.iterdir(), fresh):
        _sync(path)
    replaced = folder.exists()
    if replaced:
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        if replaced:
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Bring a file or a folder's list of files to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
