"""Files and folders that are replaced whole: after a kill or a power cut there is the old content or the new one."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import IO


def discard(stream: IO[str]) -> None:
    """Send nowhere what is written to a stream that nobody reads any more, for a program that has to go on."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


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
