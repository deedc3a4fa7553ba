"""What is costly to make is made once a run of the tests, though several processes share the work."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import TypeVar, cast

from filelock import FileLock

T = TypeVar("T")

VARIABLE = "TESTS_SHARED_FOLDER"
"""Set by the first process, whose children share its folder; it goes when that process ends."""


def shared_folder() -> Path:
    """A folder that all processes of this run have, for what is only read once it is there."""
    return Path(os.environ[VARIABLE])


def once_a_run(make: Callable[[], T]) -> Callable[[], T]:
    """Cache what `make` returns: the first process that asks makes it, the others wait and read a pickle of it."""

    @cache
    @wraps(make)
    def made() -> T:
        kept = shared_folder() / f"{make.__module__}.{make.__name__}.pickle"
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                kept.write_bytes(pickle.dumps(make()))
            return cast(T, pickle.loads(kept.read_bytes()))

    return made
