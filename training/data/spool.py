"""Stories parked on disk between the passes, so that memory holds eight bytes a story instead of its text."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class StorySpool:
    """An append-only file of texts with random access by number; the caller deletes the file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=1024 * 1024)
        self._ends = array("q", [0])
        self._flushed = True

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, text: str) -> None:
        """Park one text; its number is the length before."""
        data = text.encode()
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))
        self._flushed = False

    def sizes(self) -> NDArray[np.int64]:
        """Length of every text in UTF-8 bytes."""
        ends = np.array(self._ends, np.int64)
        return ends[1:] - ends[:-1]

    def __getitem__(self, number: int) -> str:
        if not self._flushed:
            self._file.flush()
            self._flushed = True
        start, end = self._ends[number], self._ends[number + 1]
        return os.pread(self._file.fileno(), end - start, start).decode()

    def read(self, numbers: Iterable[int]) -> Iterator[str]:
        """The texts of these numbers, in this order."""
        return map(self.__getitem__, numbers)

    def close(self) -> None:
        """Close the file; the texts are gone for this object."""
        self._file.close()
